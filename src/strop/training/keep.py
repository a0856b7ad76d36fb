"""Rows that keep what a model knows: general prompts with the model's own answers, mixed into the training rows.

Training on one job makes a model worse at others. Rows with the answers that it gives before training hold its
behaviour in place, as rehearsal with generated rows does (Robins 1995, doi:10.1080/09540099550039318). The labels are
the TOP_K largest probabilities that it gives before training, so that an unchanged model has no gradient there
(knowledge distillation, arXiv:1503.02531). The prompts (general_prompts.jsonl) are of 16 kinds, and every prefix of the
file has all of them. None is in the general set of `strop eval`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

from strop.config.schema import Recipe, keep_share
from strop.data.prepare import Prepared, prepare
from strop.data.rendering.render import Renderer
from strop.data.row_errors import RenderError
from strop.data.store import JoinedExamples, message_json
from strop.data.types import Example, Indices, Message, SoftLabels
from strop.errors import ModelError, RecipeError
from strop.models.source import Source, fingerprint
from strop.runs.folder import cache_folder, write_atomic
from strop.runs.lock import sha256_file, sha256_text

if TYPE_CHECKING:
    from strop.engine.decode.model import Model

MAX_NEW_TOKENS = 32  # longer answers are cut: soft labels need no stop token
TOP_K = 32
WEIGHT = 3.0  # of the loss of a kept token, relative to a token of the recipe's rows
MIN_ROWS = 16

LOG = logging.getLogger(__name__)


def add_kept_rows(data: Prepared, recipe: Recipe, source: Source, file: Path) -> Prepared:
    """Return the data with the rows that train.keep asks for. Their training rows come after those of the recipe.

    file: where the answered prompts of the run are, or are written; their probabilities are in a file next to it.
    Raises RecipeError without a chat template, and ModelError if the model does not answer.
    """
    if data.renderer.template is None:
        fix = "leave it out, or give --data.template"
        raise RecipeError("train.keep: its prompts need a chat template, and these rows are plain text", fix=fix)
    load_once = lru_cache(lambda: _load(recipe))
    if not file.is_file():
        text = _answered_prompts(load_once, _key(recipe, source), data.renderer)
        if (number := text.count("\n")) < MIN_ROWS:
            what = f"train.keep: the model ended {number} answers to general prompts within {MAX_NEW_TOKENS} tokens"
            raise ModelError(what, fix="leave it out: the model does not answer questions")
        write_atomic(file, text)
    changes = {
        "train": str(file), "eval": None, "format": "messages", "columns": None, "encoding": "utf-8",
        "loss": "assistant", "overlong": "drop",
    }  # fmt: skip
    section, tokenizer = recipe.data.model_copy(update=changes), data.renderer.tokenizer
    prepared = prepare(section, tokenizer, cache=cache_folder() / "data", new_tokens=recipe.lora.new_tokens)
    rows, distributions = prepared.train, file.with_suffix(".safetensors")
    if not distributions.is_file():
        cached = cache_folder() / "keep" / f"{sha256_text(f'{prepared.hash} {_key(recipe, source)}')[:32]}.safetensors"
        if not cached.is_file():
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(cached, save(_find_distributions(rows, load_once().module)))
        write_atomic(distributions, cached.read_bytes())
    kept = _with_soft_labels(rows, load_file(distributions))
    chosen = _choose(rows.lengths, int(data.train.lengths.sum()), keep_share(recipe.train))
    checksum = sha256_text(f"{data.hash} {sha256_file(file)} {sha256_file(distributions)} {len(chosen)}")
    return replace(data, train_items=JoinedExamples(data.train, kept, chosen), hash=checksum)


def _find_distributions(rows: Sequence[Example], module: Any) -> dict[str, npt.NDArray[Any]]:
    """Return the most likely token ids and their probabilities, (S, TOP_K), for the supervised tokens of all rows."""
    import torch

    LOG.info("computing the model's probabilities for train.keep")
    ids, probs = [], []
    for row in rows:
        with torch.inference_mode():
            inputs = torch.from_numpy(row.ids.astype(np.int64))[None].to(module.device)
            logits = module(input_ids=inputs, use_cache=False).logits[0, :-1]
            logits = logits[torch.from_numpy(row.weights[1:] > 0).to(logits.device)].float()
            top = torch.log_softmax(logits, -1).topk(min(TOP_K, logits.shape[1]))
        ids.append(top.indices.cpu().numpy().astype(np.int32))
        probs.append(top.values.exp().cpu().numpy().astype(np.float32))
    return {"ids": np.concatenate(ids), "probs": np.concatenate(probs)}


def _with_soft_labels(rows: Sequence[Example], distributions: dict[str, npt.NDArray[Any]]) -> list[Example]:
    """Return the rows with distributions as labels, and with the weight of kept tokens."""
    softened, begin = [], 0
    for row in rows:
        supervised = row.weights > 0
        span = slice(begin, begin := begin + int(supervised.sum()))
        ids, probs = distributions["ids"][span].copy(), distributions["probs"][span].copy()
        labels = row.ids[supervised, None]
        missing = ~(ids == labels).any(1)  # the label is always among the ids
        ids[missing, -1], probs[missing, -1] = labels[missing, 0], 0
        shape = len(row), ids.shape[1]
        soft = SoftLabels(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
        soft.ids[supervised], soft.probs[supervised] = ids, probs / probs.sum(1, keepdims=True)
        softened.append(replace(row, soft=soft, weights=row.weights * np.float32(WEIGHT)))
    return softened


def _choose(lengths: Indices, tokens: int, share: float) -> Indices:
    """Return indices of rows whose tokens are `share` of all, together with `tokens`; in order, repeated if needed."""
    target = tokens * share / (1 - share)
    whole, rest = divmod(target, int(lengths.sum()))
    count = int(np.searchsorted(np.cumsum(lengths), rest)) + (whole == 0)
    order = np.arange(len(lengths))
    return np.concatenate([*[order] * int(whole), order[:count]])


def _answered_prompts(load_once: Callable[[], Model], model_key: str, renderer: Renderer) -> str:
    """Return the prompts with the answers of the model before training, as JSON Lines, cached."""
    prompts = (files(__package__) / "general_prompts.jsonl").read_text(encoding="utf-8")
    key = sha256_text(f"{model_key} {renderer.template_hash} {MAX_NEW_TOKENS} {prompts}")
    cached = cache_folder() / "keep" / f"{key[:32]}.jsonl"
    if not cached.is_file():
        rows = [json.loads(line)["messages"] for line in prompts.splitlines()]
        text = "".join(
            json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in _answer(rows, load_once(), renderer)
        )
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cached, text)
    return cached.read_text(encoding="utf-8")


def _key(recipe: Recipe, source: Source) -> str:
    """Return a key of the model before training, as it answers."""
    model = recipe.model
    return json.dumps([fingerprint(source), model.adapter, model.quantization, model.dtype, model.device, TOP_K])


def _load(recipe: Recipe) -> Model:
    from strop.engine.decode.model import load

    model = recipe.model
    return load(model.adapter or model.name, device=model.device, dtype=model.dtype, quantization=model.quantization)


def _answer(rows: Sequence[list[dict[str, Any]]], model: Model, renderer: Renderer) -> list[list[dict[str, Any]]]:
    """Return the rows whose answer the model ends, with that answer; earlier answers are not trained on."""
    from strop.engine.decode.generate import generate

    LOG.info("answering general prompts for train.keep")
    prompts, answerable = [], []
    for row in rows:
        messages = [Message(**turn) for turn in row]
        try:
            prompts.append(renderer.prompt(messages))
        except RenderError:  # a template without system prompts
            continue
        answerable.append([{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in row])
    answers = generate(
        model.module, renderer.tokenizer, prompts, stop_ids=renderer.end_ids, max_new_tokens=MAX_NEW_TOKENS
    )
    return [
        [*row, message_json(Message("assistant", answer.text))]
        for row, answer in zip(answerable, answers, strict=True)
        if answer.text.strip()
    ]
