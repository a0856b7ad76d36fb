"""Implement `strop export-script`: write a run as a script that uses only transformers, peft and torch."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
from strop.data.images import FIRST_IMAGE_ID, open_image
from strop.data.prepare import Prepared
from strop.data.rendering.image_encoder import ImageEncoder, image_encoder
from strop.data.types import Conversation, Example, Image, Message
from strop.engine.images import token_types
from strop.engine.train.eligibility import find_model_dropout
from strop.errors import InputError
from strop.models.adapter_config import adapter_folder
from strop.models.adapters import locate_tokenizer
from strop.models.introspect import find_image_tower
from strop.models.load import DTYPES, auto_class, load_without_weights
from strop.models.lora import add_lora
from strop.models.source import Source, locate
from strop.models.tokenizer import load_tokenizer
from strop.objectives.table import prepare_rows
from strop.runs.folder import RunFolder, cache_folder, create_run_folder, open_run, write_atomic

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW(groups, lr=0.0, weight_decay={decay})",
    "adamw_8bit": '__import__("bitsandbytes").optim.AdamW8bit(groups, lr=1.0, weight_decay={decay})',
    "paged_adamw_8bit": '__import__("bitsandbytes").optim.PagedAdamW8bit(groups, lr=1.0, weight_decay={decay})',
    "lion": '__import__("bitsandbytes").optim.Lion(groups, lr=1.0, weight_decay={decay})',
    "sgd": "torch.optim.SGD(groups, lr=0.0, weight_decay={decay})",
}
# Arguments of LoraConfig that a script sets if they differ from peft's defaults.
LORA_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "use_dora", "init_lora_weights",
    "rank_pattern", "alpha_pattern", "modules_to_save", "exclude_modules", "fan_in_fan_out", "task_type",
)  # fmt: skip
IMAGES = "images"  # folder of an exported script
LORA_DEFAULTS = {"bias": "none", "init_lora_weights": True}


@dataclass(frozen=True)
class ExportedScript:
    """An exported script."""

    out: Path
    files: list[str]
    rows: int
    encoded: bool  # whether the script applies the chat template; otherwise, rows.jsonl has token ids
    notes: list[str]  # differences from the run

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


def export_script(run: Path, out: Path) -> ExportedScript:
    """Write train.py, rows.jsonl and tokenizer/ to a new folder.

    Raises InputError if the run uses a feature that scripts do not support, or if its rows are missing or changed.
    """
    folder = open_run(run)
    recipe = read_resolved(folder.recipe).recipe
    _check_supported(recipe)
    source = locate(recipe.model.name, recipe.model.revision)
    start = adapter_folder(recipe.model.adapter) if recipe.model.adapter else None
    tokenizer = load_tokenizer(source if start is None else locate_tokenizer(start, source))
    data = prepare_rows(recipe, tokenizer, cache=cache_folder() / "data")
    if data.hash != folder.read_lock()["data"]:
        raise InputError(f"{run}: its rows have changed since the training", fix="restore the data files")
    if data.renderer.template is not None:
        tokenizer.chat_template = data.renderer.template
    if recipe.model.quantization != "none" and source.kind == "gguf":
        what = f"{run}: transformers does not quantize the weights of a GGUF file"
        raise InputError(what, fix="train on a model folder or a Hub id")
    encoder = image_encoder(tokenizer) if data.renderer.image_table else None
    settings = _make_variables(recipe, source, start, data, run, encoder)
    encoded = recipe.data.loss == "assistant" and encoder is None and _encodes_all_rows(data, tokenizer)
    rows = _make_rows(data, encoded, encoder)
    encode_source = inspect.getsource(encode).strip().replace("  # type: ignore[no-untyped-def]", "") if encoded else ""
    template = (files("strop.exporting") / "script.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(template).render(settings, encode=encode_source, ends=list(data.renderer.stop_ids))
    create_run_folder(out)
    write_atomic(out / "rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if encoder is not None:
        (out / IMAGES).mkdir()
        for image in encoder.table.images:  # upright and in RGB, as strop reads them
            open_image(image).save(out / _file_of(image))
    tokenizer.save_pretrained(out / "tokenizer")
    write_atomic(out / "train.py", text)
    names = ["train.py", "rows.jsonl", "tokenizer", *([IMAGES] if encoder is not None else [])]
    return ExportedScript(out, names, _count_rows(data), encoded, settings["notes"])


# The source of this function is copied into the script.
def encode(tokenizer, row, ends):  # type: ignore[no-untyped-def]
    """Return a row's token ids and loss weights, which are 1 for the tokens of answers and the tokens that end them."""
    tokenize = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=False)
    messages = row["messages"]
    ids = list(tokenize(messages))
    weights = [0.0] * len(ids)
    for turn in row["trained"]:
        begin = len(tokenize(messages[:turn], add_generation_prompt=True))
        end = len(tokenize(messages[: turn + 1]))
        while end > begin and ids[end - 1] not in ends:
            end -= 1
        weights[begin:end] = [1.0] * (end - begin)
    length = max(i for i, weight in enumerate(weights) if weight) + 1
    return ids[:length], weights[:length]


def _check_supported(recipe: Recipe) -> None:
    """Raise InputError for features that a script does not support."""
    unsupported = {
        f"train.objective {recipe.train.objective}": recipe.train.objective not in ("sft", "dpo"),
        f"train.optimizer {recipe.train.optimizer}": recipe.train.optimizer not in OPTIMIZERS,
        "lora.init loftq": recipe.lora.init == "loftq",
        "train.method full": recipe.train.method == "full",
        "train.teacher": recipe.train.teacher is not None,
        "lora.new_tokens": bool(recipe.lora.new_tokens),
        "model.quantization int8": recipe.model.quantization == "int8",
    }
    for what, used in unsupported.items():
        if used:
            raise InputError(f"{what}: not supported in a script", fix="export the adapter, or train without it")


def _make_variables(
    recipe: Recipe, source: Source, start: Path | None, data: Prepared, run: Path, encoder: ImageEncoder | None
) -> dict[str, Any]:
    """Return the variables of script.jinja, except for `encode` and `ends`. encoder: None for rows without images."""
    bare, in_fp32 = load_without_weights(source), recipe.model.dtype == "fp32"
    if (
        recipe.lora.bias != "none"
        and not in_fp32
        and any(name.endswith(".bias") for name, _ in bare.named_parameters())
    ):
        what = "lora.bias in 16 bit: not supported in a script"
        raise InputError(what, fix="train with --model.dtype fp32, or export the adapter")
    train, pairs = recipe.train, recipe.train.objective == "dpo"
    stream = BatchStream(
        _count_rows(data), batch_size=train.batch_size, seed=recipe.seed, epochs=train.epochs, max_steps=train.max_steps
    )
    longest = max(len(example) for example in data.train) * (2 if pairs else 1)
    is_gguf, scheme = source.kind == "gguf", recipe.model.quantization
    base = f"{str(source.path.parent)!r}, gguf_file={source.path.name!r}" if is_gguf else repr(source.name)
    quantization = f'load_in_4bit=True, bnb_4bit_quant_type="{scheme}", bnb_4bit_compute_dtype=DTYPE, '
    quantization += f"bnb_4bit_use_double_quant={recipe.model.double_quantization}"
    return {
        "recipe": recipe,
        "train": train,
        "pairs": pairs,
        "strop": __version__,
        "run": str(run),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")),
        "notes": _find_differences(recipe, find_model_dropout(bare), RunFolder(run).read_lock().get("overrides", [])),
        "dtype": str(DTYPES[recipe.model.dtype]).removeprefix("torch."),
        "rows_at_once": train.micro_batch
        or max(1, min(train.batch_size, (train.micro_batch_tokens or longest) // longest)),
        "auto_class": auto_class(bare.config).__name__,
        "images": encoder is not None,
        "image_token": encoder.image_token_id if encoder is not None else None,
        "casts": bool(recipe.lora.modules_to_save) and not in_fp32,
        "token_types": [] if find_image_tower(bare) is None else token_types(bare),
        "placeholder": encoder.placeholder if encoder is not None else None,
        "warmup": int(np.ceil(train.warmup * stream.total_steps)) if train.warmup < 1 else round(train.warmup),
        "steps": stream.total_steps,
        "quantization": quantization if scheme in ("nf4", "fp4") else "",
        "gguf": is_gguf,
        "unpack": is_gguf and hasattr(transformers, "GgufConfig"),
        "base": base + (f", revision={recipe.model.revision!r}" if recipe.model.revision else ""),
        "start": repr(str(start.resolve())) if start else "",
        "lora": None if start else _format_lora_arguments(recipe, source),
        "optimizer": OPTIMIZERS[train.optimizer].format(decay=train.weight_decay),
    }


def _format_lora_arguments(recipe: Recipe, source: Source) -> str:
    """Return Python code for the arguments of the LoraConfig that strop uses for this model."""
    config = add_lora(load_without_weights(source), recipe.lora, None).peft_config["default"]
    if getattr(config, "target_parameters", None):
        raise InputError("adapters on experts: not supported in a script", fix="export the adapter")
    values = {name: getattr(config, name) for name in LORA_FIELDS}
    values["task_type"] = str(getattr(config.task_type, "value", config.task_type))
    if isinstance(config.target_modules, set):
        values["target_modules"] = sorted(config.target_modules)
    used = {
        name: value for name, value in values.items() if (value and LORA_DEFAULTS.get(name) != value) or name == "r"
    }
    return ", ".join(f"{name}={value!r}" for name, value in used.items())


def _find_differences(recipe: Recipe, base_dropout: str | None, overrides: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return how the script differs from the run.

    Args:
        recipe: of the run, as it was last resumed.
        base_dropout: a dropout setting of the base's config, if any.
        overrides: settings that a resume has changed: name, was, now.
    """
    sections = ("data.", "lora.", "model.", "train.")
    changed = [change for change in overrides if change["name"].startswith(sections)]
    changes = ", ".join(f"{change['name']} ({change['was']} before)" for change in changed)
    train, has_dropout = recipe.train, recipe.lora.dropout > 0 or base_dropout is not None
    notes = (
        (recipe.data.eval is not None, "It does not evaluate, and keeps the last weights, not the best."),
        (train.keep_share > 0, "It has no rows of train.keep, so it keeps less of what the base can do."),
        (train.early_stopping or train.max_time, "It does not stop early."),
        (train.int8_matmul, "It multiplies frozen weights in fp32."),
        (changes, f"The run was resumed with another {changes}, which the script has from the first step."),
        (has_dropout, "Dropout masks differ from strop's, so losses vary randomly."),
        (
            recipe.model.dtype != "fp32",
            "In 16 bit, peft rounds small LoRA updates away, so its losses are higher than strop's at first.",
        ),
    )
    return [note for applies, note in notes if applies]


def _count_rows(data: Prepared) -> int:
    return len(data.train_items if data.train_items is not None else data.train)


def _is_plain(message: Message) -> bool:
    return message.weight == 1 and not (message.tool_calls or message.reasoning or message.name or message.call_id)


def _make_message_row(conversation: Conversation, *, only_last: bool) -> dict[str, Any]:
    answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    return {"messages": messages, "trained": answers[-1:] if only_last else answers}


def _encodes_all_rows(data: Prepared, tokenizer: Any) -> bool:
    """Return whether `encode` returns the run's tokens and weights for every row."""
    conversations, pairs = data.train_conversations, data.train_items is not None
    if len(data.train) != len(conversations) * (2 if pairs else 1):
        return False
    examples: Iterator[Example] = iter(data.train)
    for conversation in conversations:
        if conversation.text is not None or conversation.tools or not all(map(_is_plain, conversation.messages)):
            return False
        for side in conversation.sides:
            example = next(examples)
            row = _make_message_row(side, only_last=pairs)
            ids, weights = encode(tokenizer, row, data.renderer.stop_ids)  # type: ignore[no-untyped-call]
            if ids != example.ids.tolist() or weights != example.weights.tolist():
                return False
    return True


def _make_token_row(example: Example, encoder: ImageEncoder | None) -> dict[str, Any]:
    row = {"ids": example.ids.tolist(), "weights": example.weights.tolist()}
    if encoder is None:
        return row
    table, is_image = encoder.table, example.ids >= FIRST_IMAGE_ID
    files = [_file_of(table.images[number]) for number, *_ in table.spans(example.ids[is_image])]
    return {**row, "ids": np.where(is_image, encoder.image_token_id, example.ids).tolist(), "images": files}


def _file_of(image: Image) -> str:
    return f"{IMAGES}/{image.digest[:32]}.png"


def _make_rows(data: Prepared, encoded: bool, encoder: ImageEncoder | None) -> Iterator[dict[str, Any]]:
    """Yield the content of rows.jsonl: messages for `encode`, or else token ids, loss weights and files of images."""
    items, is_pairs = data.train_items, data.train_items is not None
    if encoded:
        rows = ([_make_message_row(side, only_last=is_pairs) for side in row.sides] for row in data.train_conversations)
    else:
        groups = ([example] for example in data.train) if items is None else (item.examples for item in items)
        rows = ([_make_token_row(example, encoder) for example in examples] for examples in groups)
    for row in rows:
        yield dict(zip(("chosen", "rejected"), row, strict=True)) if is_pairs else row[0]
