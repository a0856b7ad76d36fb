"""The model of a run: the frozen base, whole or this device's share of it, with adapters."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

from strop.config.schema import ModelSection, Recipe
from strop.distributed.devices import Devices
from strop.distributed.sharded import Sharded
from strop.errors import RunError
from strop.models import lora
from strop.models.adapters import attach_adapter
from strop.models.load import DTYPES, load_base
from strop.models.lora import add_lora, cast_trainable_to_fp32, set_dropout
from strop.models.sharding import load_sharded
from strop.models.source import Source
from strop.objectives.table import objective_of
from strop.runs.folder import RunFolder, write_json
from strop.training.preflight import Setup, start_adapter


def build(setup: Setup, resuming: bool, devices: Devices) -> peft.PeftModel:
    """Base with adapters in train mode; the seed decides the adapters' first values and, from here on, dropout.

    resuming: the adapters' values come from a checkpoint."""
    recipe = setup.resolved.recipe
    assert recipe.model.dtype != "auto"
    base = _base(setup.source, recipe.model, devices)
    torch.manual_seed(recipe.seed)
    start = start_adapter(recipe)
    if start is not None:
        model = cast_trainable_to_fp32(
            attach_adapter(base, start, setup.source, trainable=True, scores=_scored(recipe))[0]
        )
        set_dropout(model, recipe.lora.dropout)
    else:
        model = add_lora(base, recipe.lora, setup.tokenizer, scored=_scored(recipe))
        if recipe.lora.init == "loftq" and not resuming:
            lora.init_loftq(model, setup.source)
    return model.train()


def _base(source: Source, model: ModelSection, devices: Devices) -> nn.Module:
    where = source, DTYPES[model.dtype], model.device
    how: dict[str, Any] = {
        "quantization": model.quantization,
        "double": model.double_quantization,
        "resident_layers": model.resident_layers or 0,
    }
    if devices.world == 1 or model.placement != "sharded":
        return load_base(*where, **how)
    with devices.together():
        base, parts = load_sharded(*where, devices.rank, devices.world, **how)
    devices.base = Sharded(parts, devices)
    return base


def hold_to_lock(folder: RunFolder, devices: Devices) -> None:
    """Writes down what the bytes of a sharded base are, of each layer; they are compared with what is gathered at the
    first step. Raises RunError where the run was started with others."""
    if devices.base is None:
        return
    found = devices.base.digests
    with devices.together():
        lock = folder.read_lock()
        before = lock.get("layers", {})
        if differing := [name for name, digest in before.items() if found.get(name) != digest]:
            what = f"{differing[0]} of the base is not what it was when this run was started"
            raise RunError(what, fix="put the base back, or start a new run")
        if devices.main and not before:
            write_json(folder.lock, {**lock, "layers": found})


def _scored(recipe: Recipe) -> bool:
    objective = objective_of(recipe.train)
    return objective is not None and objective.scored
