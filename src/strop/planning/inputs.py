"""Which machine a plan is for: this one, a size of memory, or a card by name; and how fast it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from strop.config.load import SHORT_FORMS
from strop.config.schema import Recipe
from strop.data.prepare import prepare
from strop.data.reading.sources import needs_download
from strop.errors import ModelError, RecipeError
from strop.machine.doctor import is_installed
from strop.machine.probe import Machine, compute_capability, probe
from strop.machine.rates import load_precision, load_rates
from strop.models.adapter_config import expand_adapter_config, read_adapter_config
from strop.models.families.shape import ModelInfo, read_model_info
from strop.models.source import locate, quantization_method, read_headers
from strop.models.tokenizer import load_tokenizer
from strop.objectives.table import data_kind_of, max_completion_tokens, objective_of, sequences_per_row
from strop.planning.gpus import Card, find_card, recognise
from strop.planning.microbatch import Rows
from strop.planning.time import CORE_FP32, GUESS, Rate, has_bf16
from strop.runs.folder import is_run

ANY_CARD = Card("a card that is not in the table", "unknown", 0, 500, 60)
NO_DATA = "-"  # a plan that names no rows
LEAST_BF16 = 8.0  # compute capability of the first cards with bf16 (Ampere)


@dataclass(frozen=True)
class Place:
    """machine: with the memory that counts. device, dtype (name, why): for a recipe that leaves them open. rate_of: how
    fast it is in a type."""

    machine: Machine
    device: str
    dtype: tuple[str, str]
    rate_of: Callable[[str], Rate]


def place_for(device: str, memory: int | None = None, gpu: str | None = None) -> Place:
    """device: as the recipe says, which may be auto; memory: bytes that there are, in place of what is found.

    Raises RecipeError for a card that is not in the table, or CUDA where nothing says how large the card is.
    """
    machine = probe()
    if gpu is not None:
        return _of_card(machine, find_card(gpu), memory)
    kind, _, number = device.partition(":")
    if kind == "auto":
        kind = "cuda" if machine.gpus and memory is None else "cpu"
    if kind == "cuda":
        if not machine.gpus and memory is None:
            raise RecipeError("--device cuda: no card is here", fix="give --gpu NAME, or --memory SIZE")
        index = min(int(number or 0), max(0, len(machine.gpus) - 1))
        card = recognise(machine.gpus[index]) if machine.gpus else None
        if card is None and machine.gpus:
            card = replace(ANY_CARD, bf16=(compute_capability(index) or LEAST_BF16) >= LEAST_BF16)
        return _of_card(machine, card or ANY_CARD, memory, found=machine.gpus if memory is None else ())
    if memory is not None:
        machine = replace(machine, memory_bytes=memory, free_bytes=memory)
    rates, precision = load_rates(machine, "cpu"), load_precision(machine) if is_installed("torch") else None
    if kind == "mps":
        rate = Rate(CORE_FP32 * 30, 200e9, "an Apple GPU as the table has it")
        return Place(machine, kind, ("fp32", "bf16 is not reliable on every MPS release"), lambda _: rate)
    guessed = "bf16" if has_bf16(machine) else "fp32", f"by {GUESS}"
    better = precision or (guessed if rates is None else (rates.dtype, "measured by strop doctor"))
    return Place(machine, "cpu", better, partial(Rate.of_cpu, machine, rates))


def _of_card(machine: Machine, card: Card, memory: int | None, found: tuple[str, ...] = ()) -> Place:
    size = memory or card.memory_bytes
    dtype = ("bf16", "the card computes in bf16") if card.bf16 else ("fp32", "the card has no fast bf16")
    if card.device != "cuda":
        machine = replace(machine, memory_bytes=size, free_bytes=size, gpus=())
    else:
        machine = replace(machine, gpus=found or (f"{card.name}, {size >> 20} MiB",))
    rate = Rate.of(card)
    if card.kind == ANY_CARD.kind:
        rate = replace(rate, source=f"a guess: {card.name}")
    return Place(machine, card.device, dtype, lambda _: rate)


def look_at(recipe: Recipe) -> ModelInfo:
    """The model's sizes: by its config; of a family that is not in the table by the model itself, built without weights
    (where torch is not installed, by its config and its files' headers). Raises InputError for modules to train in full
    that it has not."""
    found = _held_to_weights(read_model_info(recipe.model.name, recipe.model.revision))
    whole = recipe.lora.modules_to_save
    if (found.shape.known and not whole) or not is_installed("torch"):
        return found
    from strop.models.introspect import refine_with_model

    objective = objective_of(recipe.train)
    return refine_with_model(found, whole_modules=whole, predicts=objective is None or not objective.scored)


def _held_to_weights(found: ModelInfo) -> ModelInfo:
    """Refused, where the weight files of its folder hold less than its config describes, or further layers."""
    folder, shape = Path(found.name).expanduser(), found.shape
    if (
        found.config is None
        or not shape.known
        or quantization_method(found.config)
        or not any(folder.glob("*.safetensors"))
    ):
        return found
    names = (name for _, header in read_headers(folder) for name in header)
    layers = {int(match[1]) for name in names if (match := re.search(r"\blayers\.(\d+)\.", name))}
    if found.parameters >= shape.parameters and max(layers, default=0) < shape.layers:
        return found
    config = f"its config describes {shape.parameters:,} in {shape.layers} layers"
    return replace(found, refused=f"{found.name}: {found.parameters:,} weights in {len(layers)} layers, and {config}")


def without_data(options: Mapping[str, Any] | None, recipe_given: bool) -> dict[str, Any]:
    """Options that a plan can be made of: one that names no rows is about rows of the longest length."""
    given = {SHORT_FORMS.get(name, name): value for name, value in (options or {}).items()}
    if not recipe_given:
        given.setdefault("data.train", NO_DATA)
    return given


def start_adapter(recipe: Recipe) -> dict[str, Any] | None:
    """The adapter or run to start from, as expand_adapter_config returns it. Raises ModelError where there is none."""
    if recipe.model.adapter is None:
        return None
    path = Path(recipe.model.adapter).expanduser()
    file = next((place for place in (path, path / "adapter") if (place / "adapter_config.json").is_file()), None)
    if file is None:
        raise ModelError(f"--model.adapter {path}: no adapter there", fix="give a run or adapter folder")
    return expand_adapter_config(file, read_adapter_config(file))


def row_sizes(recipe: Recipe) -> Rows:
    """Of each row (of pairs: of each answer; of prompts: of each answer as long as it may be), where the recipe names
    rows that are here and the model's tokenizer is; else none.

    Raises DataError where files that it names are not there.
    """
    found, model = Rows(), Path(recipe.model.name).expanduser()
    named = [recipe.data.train] if isinstance(recipe.data.train, str) else recipe.data.train
    if named == [NO_DATA]:
        found.unknown = "no data is named"
    elif any(needs_download(one) for one in named):
        found.unknown = "the data is on the Hub"
    elif not (recipe.model.name.startswith("demo") or is_run(model) or model.is_dir()):
        found.unknown = "the model's tokenizer is not here"
    if found.unknown:
        return found
    source = locate(recipe.model.name, recipe.model.revision)
    if source.kind == "folder" and not (source.path / "tokenizer_config.json").is_file():
        found.unknown = "the model's folder has no tokenizer"
        return found
    data_kind = data_kind_of(recipe.train)
    prepared = prepare(recipe.data, load_tokenizer(source), strict=False, data_kind=data_kind)
    rows, refusal, shared = prepared.train, prepared.report.refusal, None
    found.refused = "" if refusal is None else str(refusal)
    if drawn := max_completion_tokens(recipe.train):
        found += [
            (int(length) + drawn, drawn) for length in rows.lengths for _ in range(sequences_per_row(recipe.train))
        ]
        return found
    for number in range(len(rows)):
        example = rows[number]
        found.append((len(example), example.supervised))
        shared = _alike(shared, example.ids) if data_kind == "turns" else None
    found.prefix = 0 if shared is None else len(shared)
    return found


def _alike(beginning: Any, ids: Any) -> Any:
    """What both begin with."""
    if beginning is None:
        return ids
    size = min(len(beginning), len(ids))
    differs = (beginning[:size] != ids[:size]).nonzero()[0]
    return beginning[: differs[0] if len(differs) else size]
