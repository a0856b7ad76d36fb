"""Import what scripts of sentence-transformers have beside TRL's: the model, its pooling and the loss. Version 6.2."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

from strop.errors import InputError
from strop.interop.draft import IGNORED_KEYS, Draft, Keys, as_int
from strop.interop.script_parser import Call, Script, find_passed, read_arguments, report_expression

MODEL = "SentenceTransformer"
TRAINER = "SentenceTransformerTrainer"
ARGUMENTS = "SentenceTransformerTrainingArguments"
CACHED = "CachedMultipleNegativesRankingLoss"
LOSSES = ("MultipleNegativesRankingLoss", CACHED)
DEFAULT_SCALE = 20.0
_POOLING_MODES = {
    "lasttoken": "last", "mean": "mean", "pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean",
}  # fmt: skip
_IGNORED_MODEL_KEYS = (
    "device", "trust_remote_code", "token", "cache_folder", "local_files_only", "model_card_data", "similarity_fn_name",
    "backend", "tokenizer_args", "config_args",
)  # fmt: skip
IGNORED_ARGUMENTS = ("batch_sampler", "multi_dataset_batch_sampler")  # of the config
POOLING_NOTE = (
    "sentence-transformers reads the pooling of a model that has one, and otherwise takes the mean: if the model's "
    "1_Pooling/config.json says lasttoken, set train.pooling last"
)
DUPLICATES_NOTE = "strop leaves equal texts out of the negatives of an anchor, and needs no batch sampler for that"


def read_embedding_model(draft: Draft, script: Script, call: Call) -> Keys | None:
    """Import SentenceTransformer(...), and return the keys of its model_kwargs."""
    given = {key: node for key, node in call.keywords.items() if key != "modules"}  # calls, which are read below
    keys = read_arguments(draft, script, replace(call, keywords=given), ("model_name_or_path",))
    names = {"model_name_or_path": "model.name", "revision": "model.revision"}
    draft.put_fields(keys, names, str)
    for part in script.calls:
        if part.name == "Transformer" and part.arguments and draft.get("model.name") is None:
            name, length = script.value(part.arguments[0]), part.keywords.get("max_seq_length")
            if isinstance(name, str):
                draft.put("model.name", name, f"Transformer, line {part.line}")
            if length is not None and isinstance(value := script.value(length), int):
                draft.put("data.max_length", value, "max_seq_length")
    _read_pooling(draft, script)
    kwargs = keys.take("model_kwargs")
    keys.report_rest(draft, (*IGNORED_KEYS, *_IGNORED_MODEL_KEYS))
    return Keys(kwargs) if isinstance(kwargs, dict) else None


def _read_pooling(draft: Draft, script: Script) -> None:
    poolings = [call for call in script.calls if call.name == "Pooling"]
    if not poolings:
        draft.put("train.pooling", "mean", "the default of sentence-transformers")
        draft.add_difference("pooling", POOLING_NOTE)
        return
    call = poolings[0]
    options = {name: script.value(node) for name, node in call.keywords.items()}
    if len(call.arguments) > 1:
        options["pooling_mode"] = script.value(call.arguments[1])
    chosen = [options.get("pooling_mode", "mean")] if "pooling_mode" in options else []
    chosen += [name for name, value in options.items() if name.startswith("pooling_mode_") and value is True]
    mode = _POOLING_MODES.get(str(chosen[0])) if len(chosen) == 1 else "mean" if not chosen else None
    if mode is None:
        draft.add_unsupported("pooling_mode", f"{', '.join(map(str, chosen))}: set train.pooling", call.line)
    else:
        draft.put("train.pooling", mode, f"Pooling, line {call.line}")


def read_loss(draft: Draft, script: Script, node: Any) -> None:
    """Import the loss of the trainer. Raises InputError for a loss that strop does not have. node: the argument."""
    losses = [call for call in script.calls if call.name.endswith("Loss")]
    nodes = [] if node is None else [node]
    loss = find_passed(draft, script, "loss", nodes, losses, elsewhere=node is None)
    if loss is None or loss.name not in LOSSES:
        what = f"{draft.file}:{loss.line}: {loss.name}" if loss is not None else f"{draft.file}: no loss was found"
        raise InputError(f"{what}: not an objective of strop", fix=f"use {' or '.join(LOSSES)}, or write the recipe")
    given = {key: node for key, node in loss.keywords.items() if key not in ("model", "similarity_fct")}
    loss_arguments = replace(loss, arguments=loss.arguments[1:2], keywords=given)
    keys = read_arguments(draft, script, loss_arguments, ("scale",))
    scale, source = keys.take("scale", DEFAULT_SCALE), keys.default_source("scale", "scale 20, the loss's default")
    draft.put("train.temperature", round(1 / float(scale), 6), source if scale == DEFAULT_SCALE else "scale")
    similarity = loss.keywords.get("similarity_fct", loss.arguments[2] if len(loss.arguments) > 2 else None)
    if similarity is not None and "cos_sim" not in ast.unparse(similarity):
        report_expression(draft, "similarity_fct", similarity, "strop uses the cosine")
    if (size := keys.take("mini_batch_size")) is not None:
        draft.put("train.micro_batch", as_int("mini_batch_size", size), "mini_batch_size")
    elif loss.name == LOSSES[0]:
        text = "the negatives are those of the effective batch; there, of per_device_train_batch_size rows"
        draft.add_difference(loss.name, text)
    draft.add_difference("duplicates", DUPLICATES_NOTE)
    keys.report_rest(draft, ("gather_across_devices", "show_progress_bar"))
