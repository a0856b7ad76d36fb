"""strop fine-tunes open language models with LoRA on your own hardware, and proves the result.

    import strop
    run = strop.train(model="demo", data="rows.jsonl", out="runs/mine", lora={"r": 8})
    strop.evaluate(run.folder, "held_out.jsonl", metric="exact_json")
    strop.load(run.folder).chat("...")

Importing strop imports no torch; each function imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strop.errors import InputError, RunError, Stopped, StropError

if TYPE_CHECKING:
    from strop.adapters import Model
    from strop.planning.compare import Row
    from strop.planning.plan import Plan
    from strop.training.run import Run

__version__ = "0.1.0"
__all__ = ["InputError", "RunError", "Stopped", "StropError", "evaluate", "load", "plan", "resume", "train"]


def plan(
    recipe: str | Path | None = None, *, memory: int | None = None, gpu: str | None = None, **options: Any
) -> Plan:
    """Whether a recipe fits, how long it takes, and what to change where it does not; reads no weights, needs no torch.

    options: as of `train`; without `data`, the plan is about rows of the longest length. `model` may be the path of a
    config.json alone. memory: bytes of the device; gpu: a card by its name. Default: this machine.
    Raises InputError.
    """
    from strop.config.load import resolve
    from strop.model.shape import peek
    from strop.planning.here import place_for, row_lengths, start_adapter, without_data
    from strop.planning.plan import make_plan

    resolved = resolve(Path(recipe) if recipe else None, without_data(_flat(options), recipe is not None))
    model = resolved.recipe.model
    place, looked_at = place_for(model.device, memory, gpu, model.dtype), peek(model.name, model.revision)
    return make_plan(
        resolved,
        place.machine,
        looked_at,
        place.rate,
        device=place.device,
        dtype=place.dtype,
        lengths=row_lengths(resolved.recipe),
        adapter=start_adapter(resolved.recipe),
    )


def compare_methods(
    recipe: str | Path | None = None, *, memory: int | None = None, gpu: str | None = None, **options: Any
) -> list[Row]:
    """Peak memory of full fine-tuning, 16-bit LoRA and QLoRA for models of several sizes, and for `model` if given."""
    from strop.config.load import resolve
    from strop.model.shape import peek
    from strop.planning.choose import usable_bytes
    from strop.planning.compare import compare, known_models
    from strop.planning.here import place_for, without_data

    given = without_data(_flat(options), recipe is not None)
    own = "model.name" in given or recipe is not None
    if not own:
        given["model.name"] = "-"
    chosen = resolve(Path(recipe) if recipe else None, given).recipe
    asked = memory is not None or gpu is not None or chosen.model.device != "auto"
    place = place_for(chosen.model.device, memory, gpu) if asked else None
    device, dtype = ("cuda", "bf16") if place is None else (place.device, place.dtype[0])
    model = chosen.model.model_copy(update={"device": device, "dtype": dtype})
    models = known_models()
    if own:
        found = peek(model.name, model.revision)
        models = sorted([*models, (found.name, found.shape, found.parameters)], key=lambda entry: entry[2])
    usable = usable_bytes(place.machine, device) if place is not None else None
    return compare(chosen.model_copy(update={"model": model}), models, usable)


def train(
    recipe: str | Path | None = None,
    *,
    callback: Callable[[dict[str, Any]], None] | None = None,
    memory: int | None = None,
    **options: Any,
) -> Run:
    """Fine-tunes and returns the Run (folder, report).

    options: recipe fields as on the command line: `model`, `data`, `eval`, `out`, `preset`, `seed`; a section as a
    dict (`lora={"r": 8}`); or a dotted name (`**{"train.epochs": 1}`). `model` and `data` may be dicts too.
    callback: receives each event that events.jsonl gets. memory: bytes the run may have, less than there is.
    Raises InputError before weights load, RunError while training, Stopped after Ctrl-C.
    """
    from strop.config.load import resolve
    from strop.training.run import train as run_training

    resolved = resolve(Path(recipe) if recipe else None, _flat(options))
    return run_training(resolved, [callback] if callback else [], memory=memory)


def resume(
    run: str | Path,
    *,
    callback: Callable[[dict[str, Any]], None] | None = None,
    allow_changed: Sequence[str] = (),
    memory: int | None = None,
    **options: Any,
) -> Run:
    """Goes on with a run from its newest complete checkpoint; a finished run is returned as it is.

    options: recipe fields with a new value, each of which `allow_changed` must name (see `strop resume --help`).
    """
    from strop.training.run import resume as go_on

    listeners = [callback] if callback else []
    return go_on(Path(run), listeners, options=_flat(options), allow_changed=allow_changed, memory=memory)


def evaluate(
    run: str | Path,
    data: str | Sequence[str],
    *,
    metric: str = "exact",
    max_new_tokens: int = 80,
    general: bool = False,
) -> dict[str, Any]:
    """Base and tuned on held-out rows: the fields of `strop eval --json`. general: and on the general set."""
    from strop.evaluation.run import evaluate_model

    return evaluate_model(str(run), data, metric=metric, max_new_tokens=max_new_tokens, general=general)


def load(
    name: str | Path, *, device: str = "auto", dtype: str = "auto", quantization: str = "auto", force: bool = False
) -> Model:
    """A run, adapter or model folder, .gguf file, Hub id or `demo`, ready to `.generate` and `.chat`."""
    from strop.adapters import load as load_model

    return load_model(name, device=device, dtype=dtype, quantization=quantization, force=force)


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    sections = ("model", "data", "lora", "train")
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if name in sections and isinstance(value, Mapping):
            flat.update({f"{name}.{field}": inner for field, inner in value.items()})
        else:
            flat[name] = str(value) if isinstance(value, Path) else value
    return flat
