"""The state of a run, and its checkpoints.

    step-000120/  weights.safetensors  optimizer.safetensors  random.safetensors  state.json  manifest.json

A checkpoint is written atomically, into a temporary folder that is renamed. The manifest has the size and SHA-256 of
each file.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from strop.config.schema import Recipe, TrainSection
from strop.data.batching import BatchStream
from strop.data.types import Item
from strop.distributed.devices import SINGLE_PROCESS, Devices
from strop.engine.step import Step
from strop.engine.train.plain import WeightGatherer
from strop.errors import CheckpointError, DiskError
from strop.models.tensor_files import is_finite
from strop.runs.events import EventLog
from strop.runs.folder import RunFolder, disk_errors, free_bytes, new_folder
from strop.runs.lock import sha256_file
from strop.training.criteria import Criterion, SupervisedCriterion
from strop.training.samples import SamplePrompts

Note = Callable[[str], None]
MAX_SHARED = 1024  # elements of the tensors that weights may share: steps, and the code tables of 8-bit optimizers


@dataclass
class Progress:
    """The progress of a run, stored in state.json. Steps count from 0, except `step` and `best_step`."""

    step: int = 0  # finished steps
    position: dict[str, int] = field(default_factory=dict)  # position in the stream of batches
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0  # spent on training steps
    eval_seconds: float = 0.0
    compile_seconds: float = 0.0  # part of eval_seconds in which kernels were compiled
    save_seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_loss: float | None = None  # of the newest evaluation
    best_loss: float | None = None
    best_step: int | None = None
    evals_without_better: int = 0  # evaluations since the best one
    moved: bool = True  # whether an update was applied since the last evaluation
    skipped_steps: int = 0
    recent: list[float] = field(default_factory=list)  # losses of the newest good steps
    streak: list[int] = field(default_factory=list)  # the latest consecutive bad steps, by index
    passed: list[int] = field(default_factory=list)  # steps whose batches are skipped after a rollback
    rate_scale: float = 1.0  # factor of the learning rate, lowered by a rollback
    rollbacks: int = 0
    halvings: int = 0  # number of times that the micro-batch was halved after running out of memory
    recompute: bool = False  # gradient checkpointing of all layers
    offload: bool = False  # inputs of checkpointed layers are kept in host memory
    streamed: bool = False  # all quantized weights are dequantized for each matmul
    loss_scale: float = 1.0  # factor of the loss in the backward, so that gradients in fp16 are not rounded to 0
    scale_steps: int = 0  # steps since loss_scale was changed
    figures: dict[str, float] = field(default_factory=dict)  # metrics of the newest step, without its loss
    held_out: dict[str, Any] = field(default_factory=dict)  # metrics of the best evaluation, without its loss
    told: list[str] = field(default_factory=list)  # warnings that were logged; each is logged once
    communication_s: float = 0.0  # communication between devices
    waiting_s: float = 0.0  # waiting for the slowest device
    computing_s: float = 0.0  # computation, averaged over the ranks
    slowest_s: float = 0.0  # computation of the slowest rank of each step
    budget_from: float = 0.0  # seconds that do not count in the time limit, because it ended an earlier session

    def forget_best(self) -> None:
        """Choose the best evaluation from those that follow."""
        self.best_step, self.best_loss, self.held_out, self.evals_without_better = None, None, {}, 0


@dataclass
class TrainState:
    """What training changes: the trainable parameters by name, the optimizer and the progress."""

    weights: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    progress: Progress

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device


@dataclass(frozen=True)
class Job:
    """A run that is ready to train."""

    recipe: Recipe
    folder: RunFolder
    model: nn.Module
    step: Step
    train: Sequence[Item]
    eval: Sequence[Item] | None
    state: TrainState
    log: EventLog
    repack_weights: Callable[[], None] | None = None  # replaces dequantized weights, if there are any
    memory_key: str = ""  # key under which reduced memory settings are stored for later runs, if not empty
    usable_bytes: int = 0
    criterion: Criterion = field(default_factory=SupervisedCriterion)
    devices: Devices = SINGLE_PROCESS
    samples: SamplePrompts | None = None  # completed at each evaluation
    gatherer: WeightGatherer | None = None  # makes weights available that are not in memory


def batch_stream(recipe: Recipe, num_rows: int, position: dict[str, int] | None = None) -> BatchStream:
    """Return the effective batches of a run, starting at `position`."""
    train = recipe.train
    return BatchStream(
        num_rows, batch_size=train.batch_size, seed=recipe.seed, epochs=train.epochs, max_steps=train.max_steps,
        position=position or None,
    )  # fmt: skip


def set_memory_options(progress: Progress, train: TrainSection, *, keep: bool = False) -> None:
    """Set the memory options of the recipe. keep: keep those that were enabled when memory ran out."""
    layers = train.gradient_checkpointing
    progress.recompute = layers in ("on", "offload") or (keep and progress.recompute)
    progress.offload = layers == "offload" or (keep and progress.offload)
    progress.streamed = keep and progress.streamed


@contextmanager
def temporary_values(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Set weights to these values inside the block, and restore them after it."""
    originals = {name: weights[name].detach().clone() for name in values}
    _copy_values(weights, values)
    try:
        yield
    finally:
        _copy_values(weights, originals)


def _copy_values(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            weights[name].copy_(value)


def first_not_finite(state: TrainState) -> str | None:
    """Return the name of the first weight or optimizer tensor with NaN or infinity, or None."""
    return next((name for name, tensor in all_tensors(state).items() if not is_finite(tensor)), None)


def all_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return weights and optimizer state by name."""
    return {**state.weights, **_optimizer_tensors(state)}


def checkpoint_bytes(num_weights: int) -> int:
    """Return an upper bound of a checkpoint's size, with weights and two moments in fp32."""
    return 12 * num_weights + (1 << 20)


def save_checkpoint(folder: RunFolder, state: TrainState) -> Path:
    """Write a checkpoint of the current step. Raises DiskError if the disk is full or fails."""
    final = folder.checkpoint(state.progress.step)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in state.weights.items()}
    needed, free = checkpoint_bytes(sum(weight.numel() for weight in weights.values())), free_bytes(folder.path)
    if free < needed:
        what = (
            f"{folder.path}: no room for a checkpoint: {needed / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free"
        )
        raise DiskError(what, fix=f"free some space, then `strop resume {shlex.quote(str(folder.path))}`")
    with disk_errors(final), new_folder(final) as temp:
        save_file(weights, temp / "weights.safetensors")
        metadata = {"optimizer": _optimizer_kind(state.optimizer)}
        save_file(_optimizer_tensors(state), temp / "optimizer.safetensors", metadata)
        save_file(random_states(state.device), temp / "random.safetensors")
        (temp / "state.json").write_text(json.dumps(asdict(state.progress)), encoding="utf-8")
        files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in temp.iterdir()}
        (temp / "manifest.json").write_text(json.dumps(files), encoding="utf-8")
    return final


def checkpoint_error(checkpoint: Path) -> str | None:
    """Return why a checkpoint is damaged, or None if it is intact."""
    name = "manifest.json"
    try:
        manifest = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        for name, entry in manifest.items():
            file = checkpoint / name
            if file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]:
                return f"{name} is damaged"
    except FileNotFoundError:
        return f"{name} is missing"
    except (ValueError, AttributeError, TypeError, KeyError):
        return f"{name} is damaged"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def newest_checkpoint(folder: RunFolder, note: Note, *, prefer_good: bool = False) -> Path:
    """Return the newest intact checkpoint. note: called with the reason why a checkpoint is skipped.

    prefer_good: prefer an older checkpoint to one that was saved during a streak of bad steps.
    Raises CheckpointError if none is intact.
    """
    doubtful = None
    for _, checkpoint in reversed(folder.checkpoints()):
        why = checkpoint_error(checkpoint)
        if why is not None:
            note(f"{checkpoint}: skipped: {why}")
        elif prefer_good and _read_progress(checkpoint).streak:
            doubtful = doubtful or checkpoint
        else:
            return checkpoint
    if doubtful is not None:
        return doubtful
    raise CheckpointError(f"{folder.path}: no intact checkpoint", fix="start the run again with `strop train`")


def load_weights(checkpoint: Path, weights: Mapping[str, nn.Parameter]) -> None:
    """Copy the weights of a checkpoint. Raises CheckpointError if names or shapes differ."""
    saved = load_file(checkpoint / "weights.safetensors")
    if {name: tensor.shape for name, tensor in saved.items()} != {name: w.shape for name, w in weights.items()}:
        raise CheckpointError(f"{checkpoint}: its adapters are not those of this recipe")
    _copy_values(weights, saved)


def restore_checkpoint(checkpoint: Path, state: TrainState, note: Note | None = None) -> None:
    """Load an intact checkpoint. If the optimizer has changed, its state is reset, and `note` is called."""
    load_weights(checkpoint, state.weights)
    try:
        with safe_open(checkpoint / "optimizer.safetensors", framework="pt") as file:
            saved_kind = (file.metadata() or {}).get("optimizer")
            moments = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        random = load_file(checkpoint / "random.safetensors")
    except SafetensorError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
    kind = _optimizer_kind(state.optimizer)
    if saved_kind not in (kind, None):
        moments = {}
        if note is not None:
            note(f"the optimizer state is reset: {checkpoint.name} has the state of {saved_kind}, and this is {kind}")
    state.optimizer.state.clear()
    for key, tensor in moments.items():
        name, _, part = key.rpartition("/")
        weight = state.weights[name]
        state.optimizer.state.setdefault(weight, {})[part] = _from_tensor(tensor, weight)
    set_random_states(random, state.device)
    state.progress = _read_progress(checkpoint)


def _read_progress(checkpoint: Path) -> Progress:
    saved = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if unknown := sorted(saved.keys() - {known.name for known in fields(Progress)}):
        what = f"{checkpoint}: made by another version of strop: {unknown[0]} is unknown"
        raise CheckpointError(what, fix="resume with the version that lock.json names")
    return Progress(**saved)


def _optimizer_kind(optimizer: torch.optim.Optimizer) -> str:
    """Return the optimizer's name without "Paged", because paging does not change the state."""
    return type(optimizer).__name__.removeprefix("Paged")


def prune_checkpoints(folder: RunFolder, keep: int, best_step: int | None) -> None:
    """Remove all but the best and the newest `keep` checkpoints, if the newest is intact."""
    checkpoints = folder.checkpoints()
    if not checkpoints or checkpoint_error(checkpoints[-1][1]) is not None:
        return
    for step, checkpoint in checkpoints[:-keep]:
        if step != best_step:
            shutil.rmtree(checkpoint)


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{name}/{part}": _to_tensor(value)
        for name, weight in state.weights.items()
        for part, value in state.optimizer.state.get(weight, {}).items()
    }


def _to_tensor(value: Tensor | int | float) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        return tensor if tensor.numel() > MAX_SHARED else tensor.clone()
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _from_tensor(tensor: Tensor, weight: Tensor) -> Tensor | int | float:
    if tensor.dim() == 0 and tensor.dtype in (torch.int64, torch.float64):
        return int(tensor) if tensor.dtype == torch.int64 else float(tensor)
    return tensor.to(weight.device)  # PyTorch's fused optimizers need the step count on the GPU too


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the random generators of the CPU and of the run's GPU."""
    # Other GPUs are not queried, because PyTorch may not be able to use them.
    gpu = {f"cuda{device.index or 0}": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **gpu}


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore generator states. A GPU without a saved state receives that of another GPU."""
    torch.set_rng_state(states["cpu"])
    gpus = [name for name in states if name != "cpu"]
    if device.type == "cuda" and gpus:
        state = states.get(f"cuda{device.index or 0}", states[gpus[0]])
        torch.cuda.set_rng_state(state, device)
