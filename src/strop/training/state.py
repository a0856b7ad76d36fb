"""All of a run that must survive a crash, and its form on disk: a checkpoint that is complete or does not exist.

    step-000120/  weights.safetensors  optimizer.safetensors  random.safetensors  state.json  manifest.json

The manifest (size and sha256 of each file) is written last, into a temp folder that is synced and then renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from strop.errors import CheckpointError
from strop.runs.folder import RunFolder, new_folder
from strop.runs.lock import sha256_file

Note = Callable[[str], None]


@dataclass
class Progress:
    """The numbers of a run so far. `position` is the place in the batch stream after the last finished step."""

    step: int = 0
    position: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0  # training alone
    eval_seconds: float = 0.0
    save_seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_loss: float | None = None  # of the newest evaluation
    best_loss: float | None = None
    best_step: int | None = None
    evals_without_better: int = 0
    skipped_steps: int = 0


@dataclass
class TrainState:
    weights: Mapping[str, nn.Parameter]  # trainable ones, by name in the model
    optimizer: torch.optim.Optimizer
    progress: Progress


def save(folder: RunFolder, state: TrainState) -> Path:
    """Writes the checkpoint of the state's step. Nothing non-finite is ever saved: asserts that weights are finite."""
    final = folder.checkpoint(state.progress.step)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in state.weights.items()}
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    with new_folder(final) as temp:
        save_file(weights, temp / "weights.safetensors")
        save_file(_optimizer_tensors(state), temp / "optimizer.safetensors")
        save_file(_random_tensors(), temp / "random.safetensors")
        (temp / "state.json").write_text(json.dumps(asdict(state.progress)), encoding="utf-8")
        files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in temp.iterdir()}
        (temp / "manifest.json").write_text(json.dumps(files), encoding="utf-8")
    return final


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a missing, changed or unreadable file; None where it verifies."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        return "no manifest"
    except (ValueError, AttributeError, TypeError, KeyError):
        return "its manifest is damaged"
    for name, (size, digest) in entries.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or sha256_file(file) != digest:
            return f"{name} is damaged"
    return None


def newest(folder: RunFolder, note: Note) -> Path:
    """The newest checkpoint that verifies; each newer one that does not is noted with its reason.

    Raises CheckpointError where none verifies.
    """
    for _, checkpoint in reversed(folder.checkpoints()):
        why = fault(checkpoint)
        if why is None:
            return checkpoint
        note(f"{checkpoint}: passed over: {why}")
    raise CheckpointError(f"{folder.path}: no checkpoint that verifies", fix="start the run again with `strop train`")


def load_weights(checkpoint: Path, weights: Mapping[str, nn.Parameter]) -> None:
    """Copies a checkpoint's weights into the model's. Raises CheckpointError where names or shapes differ."""
    saved = load_file(checkpoint / "weights.safetensors")
    if {name: tensor.shape for name, tensor in saved.items()} != {name: w.shape for name, w in weights.items()}:
        raise CheckpointError(f"{checkpoint}: holds other adapters than this recipe makes")
    with torch.no_grad():
        for name, tensor in saved.items():
            weights[name].copy_(tensor)


def restore(checkpoint: Path, state: TrainState) -> None:
    """Puts a verified checkpoint into a fresh state, random generators included."""
    load_weights(checkpoint, state.weights)
    try:
        moments = load_file(checkpoint / "optimizer.safetensors")
        random = load_file(checkpoint / "random.safetensors")
    except SafetensorError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
    for key, tensor in moments.items():
        name, _, part = key.rpartition("/")
        weight = state.weights[name]
        place = tensor if part == "step" else tensor.to(weight.device)
        state.optimizer.state.setdefault(weight, {})[part] = place
    torch.set_rng_state(random["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda{index}" in random:
            torch.cuda.set_rng_state(random[f"cuda{index}"], index)
    state.progress = Progress(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


def prune(folder: RunFolder, keep: int, best_step: int | None) -> None:
    """Removes the oldest checkpoints, once the newest verifies; the best stays."""
    found = folder.checkpoints()
    if not found or fault(found[-1][1]) is not None:
        return
    for step, checkpoint in found[:-keep]:
        if step != best_step:
            shutil.rmtree(checkpoint)


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{name}/{part}": tensor.detach().cpu().contiguous()
        for name, weight in state.weights.items()
        for part, tensor in state.optimizer.state.get(weight, {}).items()
    }


def _random_tensors() -> dict[str, Tensor]:
    cards = {f"cuda{index}": torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())}
    return {"cpu": torch.get_rng_state(), **cards}
