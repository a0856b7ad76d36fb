"""One run from recipe to report. `train` and `resume` are the same story; the second starts from a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch

from strop.adapters import adapter_folder, attach, model_card, read_adapter_config, save_adapter
from strop.config.load import Resolved, read_resolved
from strop.config.schema import Recipe
from strop.data.conversation import Conversation
from strop.data.prepare import Prepared, prepare
from strop.engine.choose import token_loss_for
from strop.engine.device import pick_device, pick_dtype
from strop.errors import InputError, ModelError, RunError, Where
from strop.evaluation.report import write_report
from strop.machine.memory import MemoryMark, mark
from strop.machine.probe import Machine, probe
from strop.model.facts import Source, fingerprint, locate
from strop.model.load import DTYPES, load_base, load_config, skeleton
from strop.model.lora import add_lora, as_fp32, check_lora, trainable
from strop.model.tokenizer import load_tokenizer
from strop.planning.choose import ModelShape, choose
from strop.runs.events import EventLog, Listener, read_events
from strop.runs.folder import RunFolder, cache_folder, create, next_numbered, open_run, write_atomic, write_json
from strop.runs.lock import differences, sha256_text, versions
from strop.training import state as checkpoints
from strop.training.loop import Job, fit, stream_of
from strop.training.optim import make_optimizer
from strop.training.state import Progress, TrainState
from strop.training.track import check_trackers, tracking


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what report.json holds."""

    folder: Path
    report: dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What a run is made of, all checked, before any weights are read."""

    resolved: Resolved
    machine: Machine
    source: Source
    tokenizer: Any
    data: Prepared
    lock: dict[str, Any]


def train(resolved: Resolved, listeners: Sequence[Listener] = ()) -> Run:
    """Fine-tunes by a recipe into a new run folder.

    listeners: each receives every event that events.jsonl gets.
    Raises InputError (and its kinds) before weights are read; RunError, Stopped while training.
    """
    folder = create(Path(resolved.recipe.out) if resolved.recipe.out else _numbered(resolved.recipe))
    try:
        with folder.claim():
            setup = _set_up(resolved)
            write_atomic(folder.recipe, setup.resolved.as_yaml())
            write_json(folder.lock, setup.lock)
            return _execute(folder, setup, listeners, resuming=False)
    except InputError:
        folder.remove_if_empty()
        raise


def resume(path: Path, listeners: Sequence[Listener] = ()) -> Run:
    """Goes on from the newest checkpoint that verifies; a finished run is returned as it is.

    Raises InputError where base, data, template or recipe are not those the run was started with.
    """
    folder = open_run(path)
    if folder.finished:
        return Run(folder.path, json.loads(folder.report.read_text(encoding="utf-8")))
    with folder.claim():
        before = json.loads(folder.lock.read_text(encoding="utf-8"))
        torch.set_num_threads(before["threads"])  # sums are split by thread: another number, other last bits
        setup = _set_up(read_resolved(folder.recipe))
        changed = differences(before, setup.lock)
        if changed:
            places = [Where(str(folder.path), None, f"{name} is not what the run was started with") for name in changed]
            raise InputError("cannot resume", fix="put it back, or start a new run", where=places)
        return _execute(folder, setup, listeners, resuming=True)


def preview(resolved: Resolved) -> Resolved:
    """The complete recipe that `train` would use here; reads no weights and no data."""
    return _plan(resolved, locate(resolved.recipe.model.name, resolved.recipe.model.revision), probe())


def _numbered(recipe: Recipe) -> Path:
    """runs/<first data file>-N"""
    first = recipe.data.train if isinstance(recipe.data.train, str) else recipe.data.train[0]
    return next_numbered(Path("runs"), re.sub(r"[^A-Za-z0-9._-]+", "-", Path(first).stem) or "run")


def _plan(resolved: Resolved, source: Source, machine: Machine) -> Resolved:
    recipe = resolved.recipe
    device = pick_device(recipe.model.device)
    start = _start_adapter(recipe)
    bare = skeleton(source)
    shape = ModelShape.of(load_config(source), sum(weight.numel() for weight in bare.parameters()))
    adapter = read_adapter_config(start) if start is not None else None
    dtype = pick_dtype(device) if recipe.model.dtype == "auto" else (recipe.model.dtype, "")
    resolved = choose(resolved, machine, shape, device, dtype, adapter)
    check_lora(bare, resolved.recipe.lora)
    return resolved


def _start_adapter(recipe: Recipe) -> Path | None:
    if recipe.model.adapter is None:
        return None
    folder = adapter_folder(recipe.model.adapter)
    if folder is None:
        raise ModelError(
            f"--model.adapter {recipe.model.adapter}: no adapter there", fix="give a run or adapter folder"
        )
    return folder


def _set_up(resolved: Resolved) -> Setup:
    check_trackers(resolved.recipe.track)
    machine, source = probe(), locate(resolved.recipe.model.name, resolved.recipe.model.revision)
    resolved = _plan(resolved, source, machine)
    tokenizer = load_tokenizer(source)
    data = prepare(resolved.recipe.data, tokenizer, cache=cache_folder() / "data")
    if data.renderer.template is not None:  # data.template: the adapter's tokenizer must say what it was trained with
        tokenizer.chat_template = data.renderer.template
    lock = {
        "base": {"name": source.name, "fingerprint": fingerprint(source)},
        "data": data.hash,
        "template": data.renderer.template_hash,
        "recipe": sha256_text(json.dumps(resolved.recipe.model_dump(exclude={"out"}), sort_keys=True)),
        "seed": resolved.recipe.seed,
        "precision": resolved.recipe.model.dtype,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "machine": asdict(machine),
    }
    return Setup(resolved, machine, source, tokenizer, data, lock)


def _execute(folder: RunFolder, setup: Setup, listeners: Sequence[Listener], *, resuming: bool) -> Run:
    recipe = setup.resolved.recipe
    config = {field: choice.value for field, choice in setup.resolved.choices.items()}
    with ExitStack() as stack:
        more = stack.enter_context(tracking(recipe.track, folder.path, config))
        log = EventLog(folder.events, [*listeners, *more])
        log.emit("machine", lines=setup.machine.lines())
        log.emit("recipe", choices=[asdict(choice) for choice in setup.resolved.choices.values()])
        log.emit("data", report=setup.data.report.as_json())
        memory = mark(recipe.model.device)
        model = _build(setup)
        weights = trainable(model)
        checkpointing = recipe.train.gradient_checkpointing == "on"
        token_loss, engine, why = token_loss_for(model, checkpointing=checkpointing)
        state = TrainState(weights, make_optimizer(weights, recipe.train), Progress())
        if resuming and folder.checkpoints():
            checkpoint = checkpoints.newest(folder, lambda text: log.emit("note", text=text))
            checkpoints.restore(checkpoint, state)
            log.emit("resume", step=state.progress.step, checkpoint=checkpoint.name)
        total = stream_of(recipe, len(setup.data.train)).total_steps
        numbers = {
            "trainable": sum(w.numel() for w in weights.values()),
            "all": sum(w.numel() for w in model.parameters()),
        }
        log.emit("start", steps=total, step=state.progress.step, engine=engine, why=why, parameters=numbers)
        job = Job(recipe, folder, model, token_loss, setup.data.train, setup.data.eval, state, log, engine == "fast")
        if state.progress.step < total:
            try:
                fit(job)
            except torch.OutOfMemoryError as error:
                fix = "lower --train.micro_batch_tokens, or set --train.gradient_checkpointing on"
                raise RunError(f"out of memory: {str(error).splitlines()[0]}", fix=fix) from None
        report = _finish(job, setup, memory)
        log.emit("end", step=state.progress.step, seconds=state.progress.seconds, adapter=report["adapter"])
    write_report(folder.path, report, read_events(folder.events))
    return Run(folder.path, report)


def _build(setup: Setup) -> peft.PeftModel:
    """Base with adapters in train mode; the seed decides the adapters' first values and, from here on, dropout."""
    recipe = setup.resolved.recipe
    assert recipe.model.dtype != "auto"
    base = load_base(setup.source, DTYPES[recipe.model.dtype], recipe.model.device)
    torch.manual_seed(recipe.seed)
    start = _start_adapter(recipe)
    if start is not None:
        model = as_fp32(attach(base, start, setup.source, trainable=True))
    else:
        model = add_lora(base, recipe.lora, setup.tokenizer)
    return model.train()


def _finish(job: Job, setup: Setup, memory: MemoryMark) -> dict[str, Any]:
    """Keeps the best weights (the last where nothing was evaluated) as the run's adapter; writes report.json."""
    progress, folder = job.state.progress, job.folder
    kept = progress.best_step or progress.step
    if kept != progress.step:
        checkpoints.load_weights(folder.checkpoint(kept), job.state.weights)
    identity = {name: setup.lock[name] for name in ("base", "template", "data")}
    identity["system"] = _shared_system(setup.data.train_conversations)
    card = model_card(folder.name, setup.source.name, setup.resolved.recipe, progress.eval_loss)
    save_adapter(job.model, setup.tokenizer, folder.adapter, identity, card)
    data = setup.data.report.as_json()
    report: dict[str, Any] = {
        "run": str(folder.path),
        "steps": progress.step,
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "tokens_per_s": progress.tokens / progress.seconds,
        "supervised_tokens_per_s": progress.supervised_tokens / progress.seconds,
        "seconds": progress.seconds,
        "eval_seconds": progress.eval_seconds,
        "save_seconds": progress.save_seconds,
        "loss": {"first": progress.first_loss, "last": progress.last_loss},
        "eval_loss": progress.best_loss,
        "skipped_steps": progress.skipped_steps,
        "data": {**data["rows"], "by_reason": data["by_reason"]},
        "data_report": data,
        "memory": {"predicted_peak_bytes": None, "measured_peak_bytes": memory.peak_bytes()},
        "adapter": str(folder.adapter),
        "adapter_step": kept,
        "recipe": [asdict(choice) for choice in setup.resolved.choices.values()],
        "lock": {name: setup.lock[name] for name in ("base", "data", "template", "versions")},
        "machine": setup.lock["machine"],
        "exit": 0,
    }
    write_json(folder.report, report)
    return report


def _shared_system(conversations: Iterable[Conversation]) -> str | None:
    """The system prompt that every conversation starts with, if there is one."""
    shared: str | None = None
    for number, conversation in enumerate(conversations):
        first = conversation.messages[0] if conversation.messages else None
        system = first.content if first is not None and first.role == "system" else None
        if system is None or (number > 0 and system != shared):
            return None
        shared = system
    return shared
