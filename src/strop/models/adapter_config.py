"""Read and check the files of a saved adapter. This module does not import torch."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from strop.errors import ModelError, first_line
from strop.models.source import read_safetensors_header
from strop.models.tokenizer import trained_token_texts
from strop.runs.folder import RunFolder, is_run, name_runs, suggest_path

WEIGHTS_FILE = "adapter_model.safetensors"
ORIGIN_FILE = "merged_from.json"  # in a merged folder: the path of its adapter on this machine; never uploaded
STROP_FILE = "strop.json"  # next to adapter_config.json: base fingerprint, template and data hash
NEEDS_QUANTIZED_BASE = "needs_quantized_base"  # key there: the adapter corrects the error of its base (LoftQ)
SCORE_TASK = "SEQ_CLS"  # PEFT's task type of a model with a score head: a reward model or a classifier
SCORE_HEAD = "score"  # its name in transformers' sequence classifiers
EMBED_TASK = "FEATURE_EXTRACTION"  # PEFT's task type of a model of embeddings
AdapterKind = Literal["text", "reward", "classifier", "embedder"]  # generates text, scores, classifies or embeds it
IN_TOWER = re.compile(r"(^|\.)(vision|visual)")  # in paths of image encoders: vision_tower, vision_model, visual
_IN_TEXT = re.compile(r"\.(language|text)_model\.")  # the same of the text model, next to an encoder
_RESTORE = "restore the values that the adapter was trained with"  # a fix
STORED_BASE = ".base_layer.weight"  # ends the name of a base weight that PEFT saves with an adapter on the head
# settings of adapters that are more than a change of weights on an unchanged base
UNSUPPORTED_FIELDS = {
    "alora_invocation_tokens": "does not act on every token", "arrow_config": "does not act on every token",
    "layer_replication": "repeats layers of its base", "kasa_config": "changes the weights of its base",
}  # fmt: skip


def adapter_folder(name: str) -> Path | None:
    """Return `name` if it is an adapter folder, the adapter in it if it is a run, or None. Raises ModelError.

    A run that trained all weights has a model, and no adapter.
    """
    path = Path(name).expanduser()
    if is_run(path):
        adapter = RunFolder(path).adapter
        if (adapter / "adapter_config.json").is_file():
            return adapter
        if RunFolder(path).has_model:
            return None
        if (process := RunFolder(path).holder) is not None:
            what = f"{path}: is being trained by process {process}, and has no adapter yet"
            raise ModelError(what, fix="wait for its end, or stop it with Ctrl-C: a LoRA run then saves its adapter")
        what = f"{path}: this run ended before it saved its adapter or model"
        raise ModelError(what, fix=f"continue it with `strop resume {shlex.quote(str(path))}`")
    return path if (path / "adapter_config.json").is_file() else None


def unfinished_notes(name: str) -> list[str]:
    """Return a note if the adapter is that of a run that has not ended."""
    run = RunFolder(Path(name).expanduser())
    step = read_identity(run.adapter).get("step")
    if not is_run(run.path) or run.finished or step is None:
        return []
    return [f"{name}: this run has not ended; its adapter is that of step {step}"]


def find_adapter_folder(name: str) -> Path:
    """Return the adapter folder of a run or adapter folder. Raises ModelError if there is none."""
    folder, path = adapter_folder(name), Path(name).expanduser()
    if folder is None and is_run(path):
        what = f"{name}: all weights were trained, so there is no adapter"
        raise ModelError(what, fix=f"use its model: {RunFolder(path).model}")
    if folder is None:
        what = "no adapter there" if Path(name).exists() else f"no such run or adapter folder{suggest_path(name)}"
        raise ModelError(f"{name}: {what}", fix=name_runs(name, "give a run or adapter folder"))
    return folder


def base_of_model(name: str) -> str | None:
    """Return the name of the base of a run, or model folder of a run, that trained all weights; else None."""
    path = Path(name).expanduser()
    base = read_identity(RunFolder(path).model if is_run(path) else path).get("base")
    return str(base["name"]) if base and adapter_folder(name) is None else None


def is_tuned(name: str) -> bool:
    """Return whether a name means a model with a known base: an adapter, or a model whose weights were all trained."""
    return adapter_folder(name) is not None or base_of_model(name) is not None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json. Raises ModelError if strop does not support it or the weights are not safetensors."""
    file = folder / "adapter_config.json"
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{folder}: no {WEIGHTS_FILE}", fix="give an adapter saved as safetensors, never pickle")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: not an object", fix="give a LoRA adapter")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder}: an adapter of type {config.get('peft_type')}", fix="give a LoRA adapter")
    _check_numbers(config, file)
    targets = config.get("target_modules") or []
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise ModelError(f"{file}: target_modules is {targets!r}, not a list of names", fix=_RESTORE)
    if field := next((name for name in UNSUPPORTED_FIELDS if config.get(name)), None):
        what = f"{folder}: an adapter that {UNSUPPORTED_FIELDS[field]} ({field} in its config)"
        raise ModelError(what, fix="use peft for it; strop's adapters act on all tokens of an unchanged base")
    if any(".lora_embedding_" in name for name in read_safetensors_header(folder / WEIGHTS_FILE)):
        fix = "merge it into its base with peft (merge_and_unload), and use the merged model"
        raise ModelError(f"{folder}: has LoRA matrices on the embedding, which strop does not support", fix=fix)
    return config


def read_identity(folder: Path) -> dict[str, Any]:
    """Return strop.json of an adapter folder, or {} for an adapter that another tool saved."""
    file = folder / STROP_FILE
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file}: damaged: {error}", fix="restore it, or use another adapter of the run") from None


def refuse_on_16_bit_base(folder: Path, where: str) -> None:
    """Raise ModelError if an adapter corrects the error of its quantized base. where: what has the base in 16 bit."""
    identity = read_identity(folder)
    if identity.get(NEEDS_QUANTIZED_BASE):
        what = f"{folder}: began with LoftQ, so it belongs to its base in {identity['quantization']}"
        raise ModelError(f"{what}; {where} has it in 16 bit", fix="`strop merge` it, and use the merged folder")


def read_base_name(folder: Path) -> str | None:
    """Return the name of an adapter's base as `locate` expects it: a GGUF file, not the folder that PEFT reads."""
    name, base = read_adapter_config(folder).get("base_model_name_or_path"), read_identity(folder).get("base", {})
    return str(base["name"] if name == base.get("folder") else name) if name else None


def count_outputs(folder: Path) -> int:
    """Return the number of outputs of an adapter's score head, 0 if it has none."""
    if read_adapter_config(folder).get("task_type") != SCORE_TASK:
        return 0
    header = read_safetensors_header(folder / WEIGHTS_FILE)
    return next((entry["shape"][0] for name, entry in header.items() if name.endswith(f".{SCORE_HEAD}.weight")), 0)


def adapter_kind(folder: Path) -> AdapterKind:
    if read_adapter_config(folder).get("task_type") == EMBED_TASK:
        return "embedder"
    outputs = count_outputs(folder)
    return "text" if not outputs else "reward" if outputs == 1 else "classifier"


def check_adapter_kind(folder: Path, kind: AdapterKind) -> None:
    """Raise ModelError if an adapter is of another kind."""
    actual = adapter_kind(folder)
    if actual == kind:
        return
    kinds = {
        "text": ("generates text, and was not trained to score, classify or embed texts", ""),
        "reward": (
            "a reward model's adapter, which scores texts and generates none",
            "`strop eval RUN --data PAIRS`, or AutoModelForSequenceClassification of transformers",
        ),
        "classifier": (
            "a classifier's adapter, which classifies texts and generates none",
            "`strop eval RUN --data ROWS`, `strop chat RUN`, `strop serve RUN` or `strop.load(run).classify(texts)`",
        ),
        "embedder": (
            "an adapter for embeddings, which generates no text",
            "`strop eval RUN --data ROWS`, `strop serve RUN` or `strop.load(run).embed(texts)`",
        ),
    }
    what, fix = kinds[actual]
    needed = {"reward": "a reward model", "classifier": "a classifier"}.get(kind, "a model of embeddings")
    raise ModelError(f"{folder}: {what}", fix=fix if kind == "text" else f"give the adapter of {needed}")


def _check_numbers(config: Mapping[str, Any], file: Path) -> None:
    numbers = {name: config.get(name) for name in ("r", "lora_alpha")}
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        is_dict = isinstance(patterns, dict)
        numbers |= {f"{field} {key}": value for key, value in patterns.items()} if is_dict else {field: patterns}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ModelError(f"{file}: {name} is {value!r}, not a number", fix=_RESTORE)
        if name.startswith("r") and (value < 1 or value != int(value)):
            raise ModelError(f"{file}: {name} is {value!r}, not a rank", fix=_RESTORE)


@contextmanager
def peft_load_errors(folder: Path, base: str, shared: bool = False) -> Iterator[None]:
    """Raise ModelError where PEFT fails to load an adapter inside the block. shared: the base has another one."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError) as error:
        if shared:
            what = f"{folder}: PEFT cannot load it on a base with another adapter: {first_line(error)}"
            raise ModelError(what, fix="load each by itself") from None
        raise ModelError(f"{folder}: does not fit {base}: {' '.join(str(error).split()[:40])}") from None


def check_adapter_fits(
    shapes: Mapping[str, Sequence[int]], folder: Path, base: str, *, lora_only: bool = False
) -> None:
    """Raise ModelError if an adapter's tensor names or shapes differ from the model's, where PEFT only warns."""
    # shapes: of the model's adapter tensors. base: its name, for messages. lora_only: check only the LoRA matrices.
    header = read_safetensors_header(folder / WEIGHTS_FILE)
    saved = {name: entry["shape"] for name, entry in header.items() if not name.endswith(STORED_BASE)}
    expected = {name: list(shape) for name, shape in shapes.items() if not lora_only or ".lora_" in name}
    if lora_only:
        saved = {name: shape for name, shape in saved.items() if name in expected}
    fix = "load it on the base it was trained on"
    for names, problem in ((saved.keys() - expected, "do not exist in"), (expected.keys() - saved, "are missing for")):
        if names:
            raise ModelError(f"{folder}: {len(names)} of its tensors {problem} {base}, first {min(names)}", fix=fix)
    if mismatched := sorted(name for name, shape in saved.items() if shape != expected[name]):
        first = f"first {mismatched[0]}: {saved[mismatched[0]]}, {expected[mismatched[0]]} expected"
        what = f"{folder}: does not fit {base}: {len(mismatched)} of its tensors have another shape, {first}"
        raise ModelError(what, fix=fix)


def expand_adapter_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return an adapter's config with the texts of its new tokens and the names of its targets, to start a run."""
    targets = _adapted_names(config, folder / WEIGHTS_FILE)
    return {**config, "new_tokens": trained_token_texts(folder, config), "target_modules": targets}


def adapts_image_encoder(folder: Path) -> bool:
    """Return whether an adapter has LoRA matrices in the image encoder of a model."""
    return any(".lora_" in name and IN_TOWER.search(name) for name in read_safetensors_header(folder / WEIGHTS_FILE))


def _adapted_names(config: Mapping[str, Any], weights: Path) -> list[str]:
    """Return the names of adapted layers and experts of the text model.

    A pattern becomes the names of its matches in the weights. Raises ModelError if there are none.
    """
    parameters = [  # "mlp.gate.weight" is that of a layer, "mlp.experts.gate_up_proj" is one of several in a module
        name.split(".")[-2] if name.endswith(".weight") else name for name in config.get("target_parameters") or []
    ]
    targets = config.get("target_modules") or []
    every = {name.partition(".lora_A.")[0] for name in read_safetensors_header(weights) if ".lora_A." in name}
    paths = set(filter(_is_text, every)) if any(map(_IN_TEXT.search, every)) else every
    paths = {path for path in paths if not IN_TOWER.search(path)}
    if every and not paths:
        what = f"{weights.parent}: adapts only the image encoder, and strop trains adapters in the text model too"
        raise ModelError(what, fix="train a new adapter with --lora.vision all")
    if isinstance(targets, str):
        wrapper_names = ("base_layer", *(name.partition(".")[0] for name in parameters))
        targets = [leaf for leaf in (path.rpartition(".")[2] for path in paths) if leaf not in wrapper_names]
    elif paths != every:  # some names may be those of layers of other parts only
        targets = [name for name in targets if any(path.endswith(f".{name}") for path in paths)]
    return sorted({*targets, *parameters})


def _is_text(path: str) -> bool:
    """Return whether a layer of a model with an encoder is in its text model, or is the output head."""
    return bool(_IN_TEXT.search(path)) or path.endswith(".lm_head")


def why_base_changed(config: Mapping[str, Any]) -> str | None:
    """Return why an adapter does not fit its unmodified base (PiSSA, arXiv:2404.02948, modifies it), or None."""
    init = str(config.get("init_lora_weights", True)).lower()
    if not init.startswith(("pissa", "corda", "olora", "lora_ga", "loftq")):
        return None
    fix = "convert it to plain LoRA there with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    return f"trained with init_lora_weights {init} on a base that peft changed: {fix}"
