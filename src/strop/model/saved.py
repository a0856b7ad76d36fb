"""What the folder of a saved adapter says of it. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strop.errors import ModelError
from strop.model.facts import safetensors_header
from strop.model.tokenizer import new_tokens

NOT_ALWAYS = ("alora_invocation_tokens", "arrow_config")  # of adapters that do not act on every token


def adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises ModelError where it is damaged, or of an adapter that strop cannot compute."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: not an object", fix="give a LoRA adapter")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder}: a {config.get('peft_type')} adapter", fix="give a LoRA adapter")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), (int, float)):
            what = f"{file}: {name} is {config.get(name)!r}, and no number"
            raise ModelError(what, fix="put in what the adapter was trained with")
    if acts := next((name for name in NOT_ALWAYS if config.get(name)), None):
        what = f"{folder}: an adapter that does not act on every token ({acts} in its config)"
        raise ModelError(what, fix="use peft for it; strop's adapters act on all tokens")
    return config


def as_start(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json for a run that starts from the adapter: with `new_tokens`, their texts, and the layers and
    experts that it sits on by name."""
    targets = _adapted_names(config, folder / "adapter_model.safetensors")
    return {**config, "new_tokens": new_tokens(folder, config), "target_modules": targets}


def _adapted_names(config: Mapping[str, Any], weights: Path) -> list[str]:
    """As lora.target_modules names them; of a pattern, what it met."""
    parameters = [name.removesuffix(".weight") for name in config.get("target_parameters") or []]
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        paths = {name.partition(".lora_A.")[0] for name in safetensors_header(weights) if ".lora_A." in name}
        inside = ("base_layer", *(name.partition(".")[0] for name in parameters))
        targets = [leaf for leaf in (path.rpartition(".")[2] for path in paths) if leaf not in inside]
    return sorted({*targets, *parameters})
