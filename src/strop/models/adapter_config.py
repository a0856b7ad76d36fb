"""What the folder of a saved adapter says of it. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from strop.errors import ModelError
from strop.models.source import read_safetensors_header
from strop.models.tokenizer import trained_token_texts

WEIGHTS_FILE = "adapter_model.safetensors"
NOT_ALWAYS = ("alora_invocation_tokens", "arrow_config")  # of adapters that do not act on every token


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises ModelError where it is damaged, or of an adapter that strop cannot compute, or has no
    safetensors beside it."""
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
        raise ModelError(f"{folder}: a {config.get('peft_type')} adapter", fix="give a LoRA adapter")
    numbers = {name: config.get(name) for name in ("r", "lora_alpha")}
    for field in ("rank_pattern", "alpha_pattern"):
        given = config.get(field) or {}
        each = isinstance(given, dict)
        numbers |= {f"{field} {key}": value for key, value in given.items()} if each else {field: given}
    trained = "put in what the adapter was trained with"
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ModelError(f"{file}: {name} is {value!r}, and no number", fix=trained)
        if name.startswith("r") and (value < 1 or value != int(value)):
            raise ModelError(f"{file}: {name} is {value!r}, and no rank", fix=trained)
    targets = config.get("target_modules") or []
    listed = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not listed and not isinstance(targets, str):
        raise ModelError(f"{file}: target_modules is {targets!r}, and no list of names", fix=trained)
    if acts := next((name for name in NOT_ALWAYS if config.get(name)), None):
        what = f"{folder}: an adapter that does not act on every token ({acts} in its config)"
        raise ModelError(what, fix="use peft for it; strop's adapters act on all tokens")
    return config


@contextmanager
def peft_load_errors(folder: Path, base: str) -> Iterator[None]:
    """Around peft's putting an adapter on a base: raises ModelError for what it refuses."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError) as error:
        raise ModelError(f"{folder}: does not fit {base}: {' '.join(str(error).split()[:40])}") from None


def check_adapter_fits(places: Mapping[str, Sequence[int]], folder: Path, base: str, *, matrices: bool = False) -> None:
    """Raises ModelError where a tensor of the file has no place in the model, an adapter of the model no tensor, or one
    has another shape; peft only warns.

    places: shapes by name, as peft would save the model's. matrices: LoRA's own matrices alone, of which each must be
    there; of others the caller knows more.
    """
    saved = {name: entry["shape"] for name, entry in read_safetensors_header(folder / WEIGHTS_FILE).items()}
    wanted = {name: list(shape) for name, shape in places.items() if not matrices or ".lora_" in name}
    if matrices:
        saved = {name: shape for name, shape in saved.items() if name in wanted}
    fix = "load it on the base it was trained on"
    for names, what in ((saved.keys() - wanted, "have no place in"), (wanted.keys() - saved, "are missing for")):
        if names:
            said = f"{len(names)} of its tensors {what} {base}, first {min(names)}"
            raise ModelError(f"{folder}: {said}", fix=fix)
    if unlike := sorted(name for name, shape in saved.items() if shape != wanted[name]):
        name = unlike[0]
        said = f"{len(unlike)} of its tensors have another shape, first {name}: {saved[name]}, {wanted[name]} expected"
        raise ModelError(f"{folder}: does not fit {base}: {said}", fix=fix)


def expand_adapter_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json for a run that starts from the adapter: with `trained_token_texts`, their texts, and the layers and
    experts that it sits on by name."""
    targets = _adapted_names(config, folder / WEIGHTS_FILE)
    return {**config, "new_tokens": trained_token_texts(folder, config), "target_modules": targets}


def _adapted_names(config: Mapping[str, Any], weights: Path) -> list[str]:
    """As lora.target_modules names them; of a pattern, what it met."""
    parameters = [name.removesuffix(".weight") for name in config.get("target_parameters") or []]
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        paths = {name.partition(".lora_A.")[0] for name in read_safetensors_header(weights) if ".lora_A." in name}
        inside = ("base_layer", *(name.partition(".")[0] for name in parameters))
        targets = [leaf for leaf in (path.rpartition(".")[2] for path in paths) if leaf not in inside]
    return sorted({*targets, *parameters})
