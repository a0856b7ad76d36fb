"""All of a run that must survive a crash, and its form on disk: a checkpoint that is complete or does not exist.

    step-000120/  weights.safetensors  optimizer.safetensors  random.safetensors  state.json  manifest.json

The manifest (size and sha256 of each file) is written last, into a temp folder that is synced and then renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from strop.config.schema import TrainSection
from strop.errors import CheckpointError, DiskError
from strop.models.tensor_files import is_finite
from strop.runs.folder import RunFolder, disk_errors, free_bytes, new_folder
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
    moved: bool = True  # whether a step was taken since the last evaluation
    skipped_steps: int = 0
    recent: list[float] = field(default_factory=list)  # losses of the newest good steps
    streak: list[int] = field(default_factory=list)  # steps (from 0) in a row that were not good
    passed: list[int] = field(default_factory=list)  # steps whose batches are passed over after a roll-back
    rate_scale: float = 1.0  # what a roll-back left of the learning rate
    rollbacks: int = 0
    halvings: int = 0  # of the micro-batch, after running out of memory
    recompute: bool = False  # checkpoint layers, whatever the recipe says
    offload: bool = False  # inputs of checkpointed layers wait in the host's memory
    streamed: bool = False  # no quantized weight stays dequantized, whatever the recipe says
    figures: dict[str, float] = field(default_factory=dict)  # of the newest step, for objectives of answers
    held_out: dict[str, Any] = field(default_factory=dict)  # what the best evaluation found besides its loss
    told: list[str] = field(default_factory=list)  # what was said once and need not be said again
    communication_s: float = 0.0  # sending between devices, and waiting there for the slowest
    waiting_s: float = 0.0
    computing_s: float = 0.0  # of the mean rank, and of the slowest in each step
    slowest_s: float = 0.0
    budget_from: float = 0.0  # seconds that were spent before the time budget of this session


def ask_memory(progress: Progress, train: TrainSection, *, besides: bool = False) -> None:
    """Puts down what the recipe asks of memory; besides: what running out of it has added stays."""
    layers = train.gradient_checkpointing
    progress.recompute = layers in ("on", "offload") or (besides and progress.recompute)
    progress.offload = layers == "offload" or (besides and progress.offload)
    progress.streamed = besides and progress.streamed


@dataclass
class TrainState:
    weights: Mapping[str, nn.Parameter]  # trainable ones, by name in the model
    optimizer: torch.optim.Optimizer
    progress: Progress

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device


@contextmanager
def holding(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside this block the weights have these values (where there are any), and behind it their own again."""
    now = {name: weights[name].detach().clone() for name in values}
    _put(weights, values)
    try:
        yield
    finally:
        _put(weights, now)


def _put(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            weights[name].copy_(value)


def not_finite(state: TrainState) -> str | None:
    """The first weight or part of the optimizer's state that holds NaN or infinity."""
    return next((name for name, tensor in tensors_of(state).items() if not is_finite(tensor)), None)


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """All that a step changes: the weights and the optimizer's state, by name."""
    return {**state.weights, **_optimizer_tensors(state)}


def size_bytes(num_weights: int) -> int:
    """Bytes of a checkpoint: fp32 weights and two fp32 moments, and at most a mebibyte for all else."""
    return 12 * num_weights + (1 << 20)


def save(folder: RunFolder, state: TrainState) -> Path:
    """Writes the checkpoint of the state's step. Nothing non-finite is ever saved: the caller has asked `not_finite`.

    Raises DiskError where there is no room, or the disk refuses; what was there before is still whole then.
    """
    final = folder.checkpoint(state.progress.step)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in state.weights.items()}
    needed, free = size_bytes(sum(weight.numel() for weight in weights.values())), free_bytes(folder.path)
    if free < needed:
        what = f"{folder.path}: no room for a checkpoint: {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
        raise DiskError(what, fix=f"free some space, then `strop resume {folder.path}`")
    with disk_errors(final), new_folder(final) as temp:
        save_file(weights, temp / "weights.safetensors")
        save_file(_optimizer_tensors(state), temp / "optimizer.safetensors", {"optimizer": _kind(state.optimizer)})
        save_file(random_states(state.device), temp / "random.safetensors")
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
    except OSError as error:
        return f"its manifest cannot be read: {error.strerror}"
    for name, (size, digest) in entries.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        try:
            if file.stat().st_size != size or sha256_file(file) != digest:
                return f"{name} is damaged"
        except OSError as error:  # a bad sector
            return f"{name} cannot be read: {error.strerror}"
    return None


def newest(folder: RunFolder, note: Note, *, sure: bool = False) -> Path:
    """The newest checkpoint that verifies; each newer one that does not is noted with its reason.

    sure: rather an older one than one that was saved in the middle of bad steps. Raises CheckpointError where
    none verifies.
    """
    in_doubt = None
    for _, checkpoint in reversed(folder.checkpoints()):
        why = fault(checkpoint)
        if why is not None:
            note(f"{checkpoint}: passed over: {why}")
        elif sure and _progress_of(checkpoint).streak:
            in_doubt = in_doubt or checkpoint
        else:
            return checkpoint
    if in_doubt is not None:
        return in_doubt
    raise CheckpointError(f"{folder.path}: no checkpoint that verifies", fix="start the run again with `strop train`")


def load_weights(checkpoint: Path, weights: Mapping[str, nn.Parameter]) -> None:
    """Copies a checkpoint's weights into the model's. Raises CheckpointError where names or shapes differ."""
    saved = load_file(checkpoint / "weights.safetensors")
    if {name: tensor.shape for name, tensor in saved.items()} != {name: w.shape for name, w in weights.items()}:
        raise CheckpointError(f"{checkpoint}: holds other adapters than this recipe makes")
    _put(weights, saved)


def restore(checkpoint: Path, state: TrainState, note: Note | None = None) -> None:
    """Puts a verified checkpoint into a fresh state, random generators included. What another optimizer has kept says
    nothing to this one, which then begins anew: that is noted."""
    load_weights(checkpoint, state.weights)
    try:
        with safe_open(checkpoint / "optimizer.safetensors", framework="pt") as file:
            kind = (file.metadata() or {}).get("optimizer")
            moments = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        random = load_file(checkpoint / "random.safetensors")
    except SafetensorError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
    now = _kind(state.optimizer)
    if kind not in (now, None):
        moments = {}
        if note is not None:
            note(f"the optimizer begins anew: {checkpoint.name} holds what {kind} has kept, and this is {now}")
    state.optimizer.state.clear()  # a step that is undone leaves nothing behind
    for key, tensor in moments.items():
        name, _, part = key.rpartition("/")
        weight = state.weights[name]
        state.optimizer.state.setdefault(weight, {})[part] = _from_tensor(tensor, weight)
    set_random_states(random, state.device)
    state.progress = _progress_of(checkpoint)


def _progress_of(checkpoint: Path) -> Progress:
    """Raises CheckpointError for one with numbers that this version knows nothing of."""
    found = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if unknown := sorted(found.keys() - {one.name for one in fields(Progress)}):
        what = f"{checkpoint}: made by another version of strop: {unknown[0]} is not known here"
        raise CheckpointError(what, fix="go on with the version that lock.json names")
    return Progress(**found)


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """Optimizers of one kind go on from what each other has kept."""
    return type(optimizer).__name__.removeprefix("Paged")


def prune(folder: RunFolder, keep: int, best_step: int | None) -> None:
    """Removes the oldest checkpoints, once the newest verifies; the best stays."""
    found = folder.checkpoints()
    if not found or fault(found[-1][1]) is not None:
        return
    for step, checkpoint in found[:-keep]:
        if step != best_step:
            shutil.rmtree(checkpoint)


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """The optimizer's state; Python numbers as 64-bit tensors without dimensions, which no optimizer has."""
    return {
        f"{name}/{part}": value.detach().cpu().contiguous().clone()
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
        for name, weight in state.weights.items()
        for part, value in state.optimizer.state.get(weight, {}).items()
    }


def _from_tensor(tensor: Tensor, weight: Tensor) -> Tensor | int | float:
    if tensor.dim() == 0 and tensor.dtype in (torch.int64, torch.float64):
        return int(tensor) if tensor.dtype == torch.int64 else float(tensor)
    # a step count is kept where PyTorch's fused kernels want it: with the weight, on CUDA
    return tensor.to(weight.device)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Of the random generators that a run on this device draws from: the CPU's and its own card's. Another card is not
    asked: the driver lists some that PyTorch cannot use."""
    own = {f"cuda{device.index or 0}": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **own}


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """A state of another card goes into this one where there is none of its own."""
    torch.set_rng_state(states["cpu"])
    cards = [name for name in states if name != "cpu"]
    if device.type == "cuda" and cards:
        own = f"cuda{device.index or 0}"
        torch.cuda.set_rng_state(states[own if own in cards else cards[0]], device)
