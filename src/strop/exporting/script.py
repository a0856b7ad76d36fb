"""A run as a plain script: transformers, peft and torch, its rows and its tokenizer, in a folder of their own."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import transformers

from strop import __version__
from strop.config.load import read_resolved
from strop.config.schema import Recipe
from strop.data.batching import BatchStream
from strop.data.prepare import Prepared, prepare
from strop.data.types import Conversation, Example, Message
from strop.engine.train.eligibility import find_model_dropout
from strop.errors import InputError
from strop.models.adapters import adapter_folder, tokenizer_source
from strop.models.load import DTYPES, load_without_weights
from strop.models.lora import add_lora
from strop.models.source import Source, locate
from strop.models.tokenizer import load_tokenizer
from strop.objectives.table import data_kind_of
from strop.runs.folder import cache_folder, create, open_run, write_atomic

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW(groups, lr=0.0, weight_decay={decay})",
    "adamw_8bit": '__import__("bitsandbytes").optim.AdamW8bit(groups, lr=1.0, weight_decay={decay})',
    "paged_adamw_8bit": '__import__("bitsandbytes").optim.PagedAdamW8bit(groups, lr=1.0, weight_decay={decay})',
    "lion": '__import__("bitsandbytes").optim.Lion(groups, lr=1.0, weight_decay={decay})',
    "sgd": "torch.optim.SGD(groups, lr=0.0, weight_decay={decay})",
}
SHOWN_VERSIONS = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Written:
    """out: the folder. files: what is in it. rows: how many. encoded: whether the script renders the rows by the chat
    template itself (it was compared on every row), or the rows hold their tokens. notes: what the script leaves out."""

    out: Path
    files: list[str]
    rows: int
    encoded: bool
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "files": self.files,
            "rows": self.rows,
            "encoded": self.encoded,
            "notes": self.notes,
        }


def export_script(run: Path, out: Path) -> Written:
    """Writes train.py, rows.jsonl and tokenizer/ into the new folder `out`.

    Raises InputError where the run has what plain peft does not do alike, or its rows are not there any more.
    """
    folder = open_run(run)
    recipe = read_resolved(folder.recipe).recipe
    _refuse(recipe)
    source = locate(recipe.model.name, recipe.model.revision)
    start = adapter_folder(recipe.model.adapter) if recipe.model.adapter else None
    tokenizer = load_tokenizer(source if start is None else tokenizer_source(start, source))
    data_kind = data_kind_of(recipe.train)
    data = prepare(recipe.data, tokenizer, cache=cache_folder() / "data", data_kind=data_kind)
    then = folder.read_lock()["data"]
    if data.hash != then:
        raise InputError(f"{run}: its rows are not those it was trained on", fix="put the data files back as they were")
    if data.renderer.template is not None:
        tokenizer.chat_template = data.renderer.template
    if recipe.model.quantization != "none" and source.kind == "gguf":
        what = f"{run}: transformers does not quantize the weights of a GGUF file"
        raise InputError(what, fix="train on a model folder or a Hub id")
    settings = _settings(recipe, source, start, data, run)
    encoded = recipe.data.loss == "assistant" and _encoded(data, tokenizer)
    lines = _as_messages(data) if encoded else _as_tokens(data)
    own = _untyped(inspect.getsource(encode).strip()) if encoded else ""
    text = _template().render(settings, encode=own, ends=list(data.renderer.stop_ids))
    create(out)
    write_atomic(out / "rows.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    tokenizer.save_pretrained(out / "tokenizer")
    write_atomic(out / "train.py", text)
    return Written(out, ["train.py", "rows.jsonl", "tokenizer"], _count(data), encoded, settings["notes"])


def encode(tokenizer: Any, row: Any, ends: Sequence[int]) -> tuple[list[int], list[float]]:
    """The tokens of a row, and the weight of each as a label: 1 for the words of an answer and the end of its turn."""

    def tokens(messages: Any, prompt: bool) -> list[int]:
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        )

    messages = row["messages"]
    ids = tokens(messages, False)
    weights = [0.0] * len(ids)
    for turn in row["trained"]:
        begin, end = len(tokens(messages[:turn], True)), len(tokens(messages[: turn + 1], False))
        while end > begin and ids[end - 1] not in ends:
            end -= 1
        weights[begin:end] = [1.0] * (end - begin)
    last = max(place for place, weight in enumerate(weights) if weight) + 1
    return ids[:last], weights[:last]


def _untyped(source: str) -> str:
    """A function's text without the types that the script does not import."""
    for said, plain in (
        ("tokenizer: Any, row: Any, ends: Sequence[int]) -> tuple[list[int], list[float]]", "tokenizer, row, ends)"),
        ("messages: Any, prompt: bool) -> list[int]", "messages, prompt)"),
    ):
        source = source.replace(said, plain)
    return source


def _refuse(recipe: Recipe) -> None:
    """Raises InputError for what plain peft and torch do not do, or not alike."""
    reasons = {
        f"train.objective {recipe.train.objective}": recipe.train.objective not in ("sft", "dpo"),
        f"train.optimizer {recipe.train.optimizer}": recipe.train.optimizer not in OPTIMIZERS,
        "lora.init loftq": recipe.lora.init == "loftq",
        "lora.new_tokens": bool(recipe.lora.new_tokens),
        "model.quantization int8": recipe.model.quantization == "int8",
    }
    for what, there in reasons.items():
        if there:
            raise InputError(f"{what}: the script cannot do it", fix="export the adapter; or train without it")


def _settings(recipe: Recipe, source: Source, start: Path | None, data: Prepared, run: Path) -> dict[str, Any]:
    """What the template is filled in with."""
    train, pairs = recipe.train, recipe.train.objective == "dpo"
    lora = None if start else _lora(recipe, source)
    count = _count(data)
    stream = BatchStream(
        count, batch_size=train.batch_size, seed=recipe.seed, epochs=train.epochs, max_steps=train.max_steps
    )
    longest = max(len(example) for example in data.train) * (2 if pairs else 1)
    at_once = train.micro_batch or max(1, min(train.batch_size, (train.micro_batch_tokens or longest) // longest))
    warmup = int(np.ceil(train.warmup * stream.total_steps)) if train.warmup < 1 else round(train.warmup)
    kind = recipe.model.quantization
    base = {"folder": repr(source.name)} | (
        {"gguf": f"{str(source.path.parent)!r}, gguf_file={source.path.name!r}"} if source.kind == "gguf" else {}
    )
    where = base[source.kind] + (f", revision={recipe.model.revision!r}" if recipe.model.revision else "")
    four = f'load_in_4bit=True, bnb_4bit_quant_type="{kind}", bnb_4bit_compute_dtype=DTYPE, '
    four += f"bnb_4bit_use_double_quant={recipe.model.double_quantization}"
    return {
        "title": f"{'DPO' if pairs else 'Supervised fine-tuning'} of {recipe.model.name} with LoRA.",
        "strop": __version__,
        "run": str(run),
        "versions": ", ".join(f"{name} {version(name)}" for name in SHOWN_VERSIONS),
        "notes": _notes(recipe, find_model_dropout(load_without_weights(source))),
        "pairs": pairs,
        "device": repr(recipe.model.device),
        "dtype": str(DTYPES[recipe.model.dtype]).removeprefix("torch."),
        "seed": recipe.seed,
        "batch": train.batch_size,
        "at_once": at_once,
        "rate": train.learning_rate,
        "warmup": warmup,
        "steps": stream.total_steps,
        "schedule": train.lr_scheduler,
        "beta": train.beta,
        "label_smoothing": train.label_smoothing,
        "sft_weight": train.sft_weight,
        "by_length": train.length_normalized,
        "quantization": four if kind in ("nf4", "fp4") else "",
        "unpack": source.kind == "gguf" and hasattr(transformers, "GgufConfig"),
        "gguf": source.kind == "gguf",
        "base": where,
        "start": repr(str(start.resolve())) if start else "",
        "dropout": recipe.lora.dropout,
        "lora": lora,
        "checkpointing": train.gradient_checkpointing not in ("off", "auto"),
        "ratio": train.lora_plus_ratio,
        "optimizer": OPTIMIZERS[train.optimizer].format(decay=train.weight_decay),
        "clip": train.max_grad_norm,
    }


def _lora(recipe: Recipe, source: Source) -> str:
    """peft's LoraConfig as strop makes it for this model, as the arguments of a call."""
    made = add_lora(load_without_weights(source), recipe.lora, None).peft_config["default"]
    if getattr(made, "target_parameters", None):
        raise InputError("adapters on a mixture's experts: the script cannot do it", fix="export the adapter")
    names = sorted(made.target_modules) if isinstance(made.target_modules, set) else made.target_modules
    given = {
        "r": made.r,
        "lora_alpha": made.lora_alpha,
        "lora_dropout": made.lora_dropout,
        "target_modules": names,
        "bias": made.bias,
        "use_rslora": made.use_rslora,
        "use_dora": made.use_dora,
        "init_lora_weights": made.init_lora_weights,
        "rank_pattern": made.rank_pattern,
        "alpha_pattern": made.alpha_pattern,
        "modules_to_save": made.modules_to_save,
        "exclude_modules": made.exclude_modules,
        "fan_in_fan_out": made.fan_in_fan_out,
        "task_type": str(getattr(made.task_type, "value", made.task_type)),
    }
    usual = {"bias": "none", "init_lora_weights": True}
    kept = {name: value for name, value in given.items() if (value and usual.get(name) != value) or name == "r"}
    return ", ".join(f"{name}={value!r}" for name, value in kept.items())


def _notes(recipe: Recipe, dropout: str | None) -> list[str]:
    """What the script does not do as the run did. dropout: of the base itself, by name."""
    train = recipe.train
    said = {
        "It does not evaluate, and keeps the last weights, not the best.": recipe.data.eval is not None,
        "It does not stop early.": bool(train.early_stopping or train.max_time),
        "It multiplies frozen weights in fp32.": train.int8_matmul,
        "Dropout draws other masks than strop's: losses differ by chance.": recipe.lora.dropout > 0
        or dropout is not None,
        "In 16 bit, peft rounds what a young adapter adds away: its losses are higher than strop's at first.": (
            recipe.model.dtype != "fp32"
        ),
    }
    return [note for note, there in said.items() if there]


def _count(data: Prepared) -> int:
    return len(data.train_items if data.train_items is not None else data.train)


def _plain(message: Message) -> bool:
    return message.weight == 1 and not (message.tool_calls or message.reasoning or message.name or message.call_id)


def _messages(conversation: Conversation, only_last: bool) -> dict[str, Any]:
    turns = [place for place, message in enumerate(conversation.messages) if message.role == "assistant"]
    said = [{"role": message.role, "content": message.content} for message in conversation.messages]
    return {"messages": said, "trained": turns[-1:] if only_last else turns}


def _encoded(data: Prepared, tokenizer: Any) -> bool:
    """Whether `encode` gives the run's own tokens and weights for each of its rows."""
    conversations, pairs = data.train_conversations, data.train_items is not None
    if len(data.train) != len(conversations) * (2 if pairs else 1):
        return False
    examples: Iterator[Example] = iter(data.train)
    for conversation in conversations:
        if conversation.text is not None or conversation.tools or not all(map(_plain, conversation.messages)):
            return False
        for side in conversation.sides:
            example = next(examples)
            ids, weights = encode(tokenizer, _messages(side, pairs), data.renderer.stop_ids)
            if ids != example.ids.tolist() or weights != example.weights.tolist():
                return False
    return True


def _as_messages(data: Prepared) -> Iterator[dict[str, Any]]:
    for conversation in data.train_conversations:
        if data.train_items is None:
            yield _messages(conversation, False)
        else:
            chosen, rejected = (_messages(side, True) for side in conversation.sides)
            yield {"chosen": chosen, "rejected": rejected}


def _as_tokens(data: Prepared) -> Iterator[dict[str, Any]]:
    def row(example: Example) -> dict[str, Any]:
        return {"ids": example.ids.tolist(), "weights": example.weights.tolist()}

    if data.train_items is None:
        yield from map(row, data.train)
    else:
        for unit in data.train_items:
            yield dict(zip(("chosen", "rejected"), map(row, unit.examples), strict=True))


def _template() -> jinja2.Template:
    text = (files("strop.exporting") / "script.jinja").read_text(encoding="utf-8")
    return jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined).from_string(text)
