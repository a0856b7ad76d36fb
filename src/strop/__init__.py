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
    from strop.training.run import Run

__version__ = "0.1.0"
__all__ = ["InputError", "RunError", "Stopped", "StropError", "evaluate", "load", "resume", "train"]


def train(
    recipe: str | Path | None = None,
    *,
    callback: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Run:
    """Fine-tunes and returns the Run (folder, report).

    options: recipe fields as on the command line: `model`, `data`, `eval`, `out`, `preset`, `seed`; a section as a
    dict (`lora={"r": 8}`); or a dotted name (`**{"train.epochs": 1}`). `model` and `data` may be dicts too.
    callback: receives each event that events.jsonl gets.
    Raises InputError before weights load, RunError while training, Stopped after Ctrl-C.
    """
    from strop.config.load import resolve
    from strop.training.run import train as run_training

    return run_training(resolve(Path(recipe) if recipe else None, _flat(options)), [callback] if callback else [])


def resume(run: str | Path, *, callback: Callable[[dict[str, Any]], None] | None = None) -> Run:
    """Goes on with a run from its newest complete checkpoint; a finished run is returned as it is."""
    from strop.training.run import resume as go_on

    return go_on(Path(run), [callback] if callback else [])


def evaluate(
    run: str | Path, data: str | Sequence[str], *, metric: str = "exact", max_new_tokens: int = 80
) -> dict[str, Any]:
    """Base and tuned on held-out rows: the fields of `strop eval --json`."""
    from strop.evaluation.run import evaluate_model

    return evaluate_model(str(run), data, metric=metric, max_new_tokens=max_new_tokens)


def load(name: str | Path, *, device: str = "auto", dtype: str = "auto") -> Model:
    """A run, adapter or model folder, .gguf file, Hub id or `demo`, ready to `.generate` and `.chat`."""
    from strop.adapters import load as load_model

    return load_model(name, device=device, dtype=dtype)


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    sections = ("model", "data", "lora", "train")
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if name in sections and isinstance(value, Mapping):
            flat.update({f"{name}.{field}": inner for field, inner in value.items()})
        else:
            flat[name] = str(value) if isinstance(value, Path) else value
    return flat
