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

from strop.config.schema import Recipe
from strop.data.prepare import Prepared, prepare
from strop.data.rendering.render import Renderer
from strop.data.row_errors import RenderError
from strop.data.store import JoinedItems, message_json
from strop.data.types import Conversation, Example, Indices, Message
from strop.display.terminal import LASTING
from strop.errors import RecipeError
from strop.models.adapter_config import adapter_folder
from strop.models.source import Source
from strop.runs.folder import cache_folder, write_atomic
from strop.runs.lock import sha256_file, sha256_text
from strop.training.soft_labels import Distributions, find_distributions, model_key, read_or_compute, soften

if TYPE_CHECKING:
    from strop.engine.decode.model import Model

MAX_NEW_TOKENS = 32  # longer answers are cut: soft labels need no stop token
TOP_K = 32
WEIGHT = 3.0  # of a kept token's loss, relative to a token of the recipe's rows, or of a kept row to a preference
MIN_ROWS, MAX_PROMPTS = 16, 1000

LOG = logging.getLogger(__name__)


def add_kept_rows(data: Prepared, recipe: Recipe, source: Source, file: Path) -> Prepared:
    """Return the data with the rows that train.keep asks for. Their training rows come after those of the recipe.

    file: where the answered prompts of the run are, or are written; their probabilities are in a file next to it.
    Raises RecipeError without a chat template, or with too few answers.
    """
    if data.renderer.template is None:
        fix = "leave it out, or give --data.template"
        raise RecipeError("train.keep: its prompts need a chat template, and these rows are plain text", fix=fix)
    load_once = lru_cache(lambda: _load(recipe, source))
    if not file.is_file():
        prompts = _read_prompts(recipe, data.renderer.tokenizer)
        text = _answered_prompts(prompts, load_once, _key(recipe, source), data.renderer)
        write_atomic(file, text)
        if unanswered := len(prompts) - text.count("\n"):
            message = "keep     %d of %d prompts are left out: no answer, or refused by the template"
            LOG.info(message, unanswered, len(prompts), extra=LASTING)
    changes = {
        "train": str(file), "eval": None, "format": "messages", "columns": None, "encoding": "utf-8",
        "loss": "assistant", "overlong": "drop", "bad_rows": "drop",
    }  # fmt: skip
    section, tokenizer = recipe.data.model_copy(update=changes), data.renderer.tokenizer
    prepared = prepare(
        section, tokenizer, cache=cache_folder() / "data", new_tokens=recipe.lora.new_tokens, strict=False
    )
    new = [tokenizer.convert_tokens_to_ids(token) for token in recipe.lora.new_tokens]
    rows = [row for row in prepared.train if not np.isin(row.ids, new).any()]  # the model has no probabilities of them
    answered = file.read_bytes().count(b"\n")
    if len(rows) < MIN_ROWS:
        what = f"train.keep: {len(rows)} of {answered} answered prompts can be rows of this recipe; it needs {MIN_ROWS}"
        more = "raise --data.max_length" if answered >= MIN_ROWS else f"give {MIN_ROWS} prompts that the model answers"
        raise RecipeError(what, fix=f"{more}, or leave it out")
    if unused := answered - len(rows):
        message = (
            "keep     %d answered prompts are left out: longer than data.max_length, or not usable with these rows"
        )
        LOG.info(message, unused, extra=LASTING)
    distributions = file.with_suffix(".safetensors")
    key = sha256_text(f"{prepared.hash} {_key(recipe, source)} {new}")
    cached = cache_folder() / "keep" / f"{key[:32]}.safetensors"
    message = "computing the model's probabilities for train.keep: %d of %d rows"
    tensors = read_or_compute(
        distributions, key, sum(row.supervised for row in rows), lambda: cached,
        lambda: find_distributions(rows, load_once().module, TOP_K, message),
    )  # fmt: skip
    kept = _with_soft_labels(rows, tensors, by_row=data.train_items is not None)
    lengths = np.array([len(row) for row in rows])
    chosen = _choose(lengths, int(data.train.lengths.sum()), recipe.train.keep_share)
    checksum = sha256_text(f"{sha256_file(file)} {sha256_file(distributions)} {len(chosen)}")
    return replace(data, train_items=JoinedItems(data.train_items or data.train, kept, chosen), kept_hash=checksum)


def _with_soft_labels(rows: Sequence[Example], distributions: Distributions, *, by_row: bool) -> list[Example]:
    """Return the rows with distributions as labels, and with WEIGHT for each token, or by_row for all of a row."""
    softened, begin = [], 0
    for row in rows:
        span = slice(begin, begin := begin + row.supervised)
        weight = WEIGHT / row.supervised if by_row else WEIGHT
        soft = soften(row, distributions["ids"][span], distributions["probs"][span])
        softened.append(replace(soft, weights=row.weights * np.float32(weight)))
    return softened


def _choose(lengths: Indices, tokens: int, share: float) -> Indices:
    """Return indices of rows whose tokens are `share` of all, together with `tokens`; in order, repeated if needed."""
    target = tokens * share / (1 - share)
    whole, rest = divmod(target, int(lengths.sum()))
    count = int(np.searchsorted(np.cumsum(lengths), rest)) + (whole == 0)
    order = np.arange(len(lengths))
    return np.concatenate([*[order] * int(whole), order[:count]])


def _read_prompts(recipe: Recipe, tokenizer: Any) -> list[Conversation]:
    """Return the general prompts, or those of train.keep_prompts. Raises DataError."""
    if recipe.train.keep_prompts is None:
        text = (files(__package__) / "general_prompts.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line)["messages"] for line in text.splitlines()]
        return [Conversation("", 0, tuple(Message(**turn) for turn in messages)) for messages in rows]
    changes = {
        "train": recipe.train.keep_prompts, "eval": None, "format": "auto", "columns": None, "overlong": "drop",
    }  # fmt: skip
    prepared = prepare(recipe.data.model_copy(update=changes), tokenizer, data_kind="prompts")
    chosen, dropped = prepared.train_conversations, prepared.report.rows["dropped"]
    if dropped:
        message = "keep     %d of %d prompts of %s are left out: not valid, or longer than data.max_length"
        LOG.info(message, dropped, prepared.report.rows["read"], recipe.train.keep_prompts, extra=LASTING)
    return [chosen[i].prompt for i in range(min(len(chosen), MAX_PROMPTS))]


def _answered_prompts(
    prompts: Sequence[Conversation], load_once: Callable[[], Model], model_key: str, renderer: Renderer
) -> str:
    """Return the prompts with the answers of the model before training, as JSON Lines, cached."""
    text = "".join(map(_as_line, prompts))
    key = sha256_text(f"{model_key} {renderer.template_hash} {MAX_NEW_TOKENS} {text}")
    cached = cache_folder() / "keep" / f"{key[:32]}.jsonl"
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cached, "".join(map(_as_line, _answer(prompts, load_once(), renderer))))
    return cached.read_text(encoding="utf-8")


def _as_line(row: Conversation) -> str:
    """Return a row in the format `messages`."""
    value = {"messages": [*map(message_json, row.messages)]} | ({"tools": [*row.tools]} if row.tools else {})
    return json.dumps(value, ensure_ascii=False) + "\n"


def _key(recipe: Recipe, source: Source) -> str:
    """Return a key of the model before training, as it answers."""
    model = recipe.model
    start = adapter_folder(model.adapter) if model.adapter else None
    more = [model.revision] * bool(model.revision) + ["single"] * (not model.double_quantization)
    return json.dumps([*model_key(source, start), model.quantization, model.dtype, model.device, TOP_K, *more])


def _load(recipe: Recipe, source: Source) -> Model:
    from strop.engine.decode.model import load

    model = recipe.model
    name = f"{model.name}@{model.revision}" if model.revision else model.name
    return load(
        model.adapter or name, device=model.device, dtype=model.dtype, quantization=model.quantization,
        double_quantization=model.double_quantization, streamed=model.placement == "streamed",
        base=source,
    )  # fmt: skip


def _answer(rows: Sequence[Conversation], model: Model, renderer: Renderer) -> list[Conversation]:
    """Return the rows with the model's answers; earlier answers are not trained on."""
    from strop.engine.decode.generate import generate

    message = "answering general prompts: %d of %d"
    LOG.info(
        "keep     the model answers %d general prompts first, so that training keeps its other skills; "
        "`strop train` skips this with --train.keep off", len(rows), extra=LASTING,
    )  # fmt: skip
    prompts, answerable = [], []
    for row in rows:
        try:
            prompts.append(renderer.prompt(row.messages, row.tools))
        except RenderError:  # a template without system prompts
            continue
        turns = (replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in row.messages)
        answerable.append(replace(row, messages=tuple(turns)))
    answers = generate(
        model.module, renderer.tokenizer, prompts, stop_ids=renderer.end_ids, max_new_tokens=MAX_NEW_TOKENS,
        advance=lambda done: LOG.info(message, done, len(prompts)),
    )  # fmt: skip
    return [
        replace(row, messages=(*row.messages, Message("assistant", text)))
        for row, answer in zip(answerable, answers, strict=True)
        if (text := answer.text.rstrip("\ufffd")).strip()  # a cut answer may end within a character
    ]
