"""One run from recipe to report. `train` and `resume` are the same story; the second starts from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch

from strop.config.load import Resolved, read_resolved, resolve
from strop.config.schema import Recipe, option_fields
from strop.distributed.devices import ALONE, Devices
from strop.distributed.environment import may_restart, restarted
from strop.engine.decode.decoder import why_not_decoder
from strop.engine.decode.generate import Sampler, generation_stop_ids
from strop.engine.device import repeatable
from strop.engine.eligibility import own_dropout
from strop.engine.step import step_for
from strop.errors import TROUBLESHOOTING_PAGE, InputError, MemoryLimitError, RecipeError, StropError, Where
from strop.evaluation.report import write_report
from strop.evaluation.rewards import rewards_of
from strop.machine.memory import MemoryWatch, is_out_of_memory, start_peak, trim_heap
from strop.machine.probe import probe
from strop.models.experts import count_trained_in_experts
from strop.models.load import DTYPES, restore_packed_weights
from strop.models.lora import trainable_parameters
from strop.models.upstream_errors import attribute_errors
from strop.planning.choose import usable_bytes
from strop.planning.workload import Setting
from strop.runs.events import EventLog, Listener, read_events
from strop.runs.folder import (
    RunFolder,
    create,
    disk_errors,
    is_run,
    next_numbered,
    open_run,
    run_name,
    write_atomic,
    write_json,
)
from strop.runs.lock import Difference, check_allowed_names, compare_locks, is_allowed
from strop.training import state as checkpoints
from strop.training.build import build, hold_to_lock
from strop.training.check_causal import hold_to_order
from strop.training.check_int8 import hold_to_floats
from strop.training.criteria import Criterion, criterion_for
from strop.training.dry_run import forecast, rehearse
from strop.training.finish import figures, finish, take_best
from strop.training.job import Job, stream_of
from strop.training.loop import fit, go_back, save
from strop.training.multi_device import count_of, described, refuse_another, set_up_together, start_alike
from strop.training.optim import make_optimizer
from strop.training.preflight import Setup, remarks
from strop.training.reference import check as check_reference
from strop.training.reference import with_reference
from strop.training.rollouts import OfGroups, without_dropout
from strop.training.signals import seconds
from strop.training.state import Progress, TrainState
from strop.training.trackers import tracking
from strop.training.vllm_rollouts import ByVllm, drawing


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what report.json holds."""

    folder: Path
    report: dict[str, Any]

    def __fspath__(self) -> str:
        """A Run is taken where the path of a run is: `strop.load(run)`."""
        return str(self.folder)


def train(
    resolved: Resolved,
    listeners: Sequence[Listener] = (),
    *,
    memory: int | None = None,
    devices: Devices = ALONE,
    go_on: bool = False,
) -> Run:
    """Fine-tunes by a recipe into a new run folder.

    listeners: each receives every event that events.jsonl gets. memory: bytes the run may have, less than there is.
    devices: those that train together. go_on: with the run that `out` holds already, where it does.
    Raises InputError (and its kinds) before weights are read; RunError, Stopped while training.
    """
    devices.refuse_unlike({field: choice.value for field, choice in resolved.choices.items()} | {"--resume": go_on})
    named = resolved.recipe.out
    out = Path(os.path.expanduser(named)) if named else None  # a recipe's ~ has not met a shell
    if out is None and (go_on or may_restart()):
        what = "a run that may be started again has no folder to be found in"
        raise InputError(what, fix="give --out a folder of its own")
    if out is not None and devices.once(lambda: (go_on or restarted()) and is_run(out)):
        refuse_another(resolved, out)
        return resume(out, listeners, memory=memory, devices=devices)
    folder = devices.once(lambda: create(out or _numbered(resolved.recipe)))
    with disk_errors(folder.path), _claimed(folder, devices):
        try:
            setup = set_up_together(resolved, memory, folder, devices)
            if devices.main:
                write_atomic(folder.recipe, setup.resolved.as_yaml())
                write_json(folder.lock, setup.lock)
            return _execute(folder, setup, listeners, devices)
        except BaseException:
            if devices.main:
                folder.remove_if_empty()
            raise


def resume(
    path: Path,
    listeners: Sequence[Listener] = (),
    *,
    options: Mapping[str, Any] | None = None,
    allow_changed: Sequence[str] = (),
    memory: int | None = None,
    devices: Devices = ALONE,
) -> Run:
    """Goes on from the newest checkpoint that verifies; a finished run is returned as it is.

    options: recipe fields that are to differ from now on. allow_changed: names of what may differ from the run's
    start: recipe fields (or their last part), base, data, template, versions, and the groups lr and schedule.
    devices: those that train together, of any number.
    Raises InputError where anything else differs that decides the numbers, and for a name that is none of these.
    """
    devices.refuse_unlike({"the run": path, **(options or {}), "--allow-changed": list(allow_changed)})
    devices.once(lambda: check_allowed_names(allow_changed, dict(option_fields())))
    if begun := sorted({"out", "preset"} & set(options or ())):
        raise RecipeError(f"--{begun[0]}: a run that has begun does not read it", fix="leave it out")
    folder = devices.once(lambda: open_run(path))
    with disk_errors(folder.path), _claimed(folder, devices):
        if devices.once(lambda: folder.finished):
            if options and resolve(folder.recipe, options).recipe != read_resolved(folder.recipe).recipe:
                what = f"{path} is finished: no option changes it any more"
                raise InputError(what, fix=f"train further in a new run that starts from it: --model.adapter {path}")
            here = {"run": str(folder.path), "adapter": str(folder.adapter)}  # it may have been moved, or be a copy
            report = folder.read_report() | here
            if devices.main and not folder.page.is_file():  # it was killed just before its last line
                write_report(folder.path, report, read_events(folder.events))
            return Run(folder.path, report)
        before = folder.read_lock()
        resolved = resolve(folder.recipe, options) if options else read_resolved(folder.recipe)
        alike = resolved.recipe.train.exact or devices.world == count_of(before)
        setup = set_up_together(resolved, memory, folder, devices, before["threads"] if alike else None)
        changed = compare_locks(before, setup.lock)
        refused = [change for change in changed if not is_allowed(change, allow_changed)]
        if refused:
            raise InputError("cannot resume", fix=_how_to_allow(refused), where=[
                Where(str(folder.path), None, f"{change.name} is not what the run was started with: "
                      f"{change.was} then, {change.now} now") for change in refused
            ])  # fmt: skip
        elsewhere = devices.world != count_of(before)
        if devices.main and (changed or elsewhere or options):
            write_atomic(folder.recipe, setup.resolved.as_yaml())
            kept = {"layers": before["layers"]} if "layers" in before else {}
            overrides = [*before.get("overrides", []), *map(asdict, changed)]
            write_json(folder.lock, {**setup.lock, **kept, "overrides": overrides})
        moved = (count_of(before), devices.world) if elsewhere else None
        return _execute(folder, setup, listeners, devices, resuming=True, changed=changed, moved=moved)


@contextmanager
def _claimed(folder: RunFolder, devices: Devices) -> Iterator[None]:
    """Rank 0 holds the folder for all."""
    with ExitStack() as stack:
        with devices.together():
            if devices.main:
                stack.enter_context(folder.claim())
        yield


def _how_to_allow(refused: Sequence[Difference]) -> str:
    if all(change.allowable for change in refused):
        names = " ".join(f"--allow-changed {name}" for name in dict.fromkeys(change.name for change in refused))
        return f"put it back, or go on with {names}"
    return "put it back, or start a new run (from this adapter with --model.adapter)"


def _numbered(recipe: Recipe) -> Path:
    """runs/<first data file>-N"""
    first = recipe.data.train if isinstance(recipe.data.train, str) else recipe.data.train[0]
    return next_numbered(Path("runs"), run_name(first))


def _execute(
    folder: RunFolder,
    setup: Setup,
    listeners: Sequence[Listener],
    devices: Devices,
    *,
    resuming: bool = False,
    changed: Sequence[Difference] = (),
    moved: tuple[int, int] | None = None,
) -> Run:
    """moved: the numbers of devices before and now, where they differ."""
    recipe = setup.resolved.recipe
    devices.limit(seconds(recipe.train.timeout))
    config = {field: choice.value for field, choice in setup.resolved.choices.items()}
    with ExitStack() as stack:
        more = stack.enter_context(tracking(recipe.track if devices.main else [], folder.path, config))
        log = EventLog(folder.events if devices.main else None, [*listeners, *more])
        job: Job | None = None
        try:
            log.emit("machine", lines=setup.machine.describe())
            choices = [asdict(choice) for choice in setup.resolved.choices.values()]
            log.emit("recipe", choices=choices, resuming=resuming)
            log.emit("data", report=setup.data.report.as_json())
            for text in remarks(setup):
                log.emit("note", text=text)
            memory = start_peak(recipe.model.device)
            if recipe.train.deterministic and recipe.model.device != "cpu":
                stack.enter_context(repeatable())
            stack.enter_context(attribute_errors(setup.shape.family))
            model = build(setup, resuming, devices)
            hold_to_lock(folder, devices)
            draws = stack.enter_context(drawing(recipe, setup.source, model)) if recipe.train.vllm_python else None
            job = _job(folder, setup, model, log, devices, draws)
            trim_heap()  # what reading and converting the weights has left
            if resuming and devices.once(folder.checkpoints):
                _restore(job, changed, moved)
            start_alike(job)
            _announce(job, setup)
            ended, key = "steps", reference_key(setup)
            if recipe.model.device == "cpu":  # CUDA says by itself when there is no more
                free = probe().free_bytes // devices.local_world
                job.step.watch(MemoryWatch(setup.machine.memory_bytes, free))
            usable = usable_bytes(setup.machine, recipe.model.device)
            here = torch.get_num_threads(), devices.world
            expected = forecast(job, Setting.of(recipe, setup.shape, setup.parameters, *here), usable)
            if job.state.progress.step < _total(job):
                if recipe.train.int8_matmul:
                    hold_to_floats(job, expected.items)
                hold_to_order(job, expected.items)
                expected = rehearse(job, expected, usable, memory)
                job = with_reference(job, key)
                ended = _fit(job)
                check_reference(job, key)
        except KeyboardInterrupt:  # outside the loop, which saves before it stops
            at = 0 if job is None else job.state.progress.step
            log.emit("stop", step=at, why="asked to while no steps were done: nothing new to save")
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fix = "take a smaller model, or a machine with more memory"
            raise MemoryLimitError(f"out of memory: {str(error).splitlines()[0]}", fix=fix) from None
        change = take_best(job, key)
        report = devices.once(lambda: finish(job, setup, memory, expected, ended, change))
        log.emit("end", step=job.state.progress.step, seconds=report["seconds"], adapter=report["adapter"])
    if devices.main:
        write_report(folder.path, report, read_events(folder.events))
    return Run(folder.path, report)


def _fit(job: Job) -> str:
    try:
        return fit(job)
    except StropError as error:
        error.partial_result = {"run": str(job.folder.path), **figures(job.state.progress)}
        raise


def _job(
    folder: RunFolder, setup: Setup, model: peft.PeftModel, log: EventLog, devices: Devices, draws: Sampler | None
) -> Job:
    recipe, weights = setup.resolved.recipe, trainable_parameters(model)
    step = step_for(model, integers=recipe.train.int8_matmul)
    state = TrainState(weights, make_optimizer(weights, recipe.train), Progress())
    checkpoints.ask_memory(state.progress, recipe.train)
    data = setup.data
    base, of, stream = model.get_base_model(), recipe.model, None
    if devices.base is not None:
        step.gather(devices.base)
    elif of.quantization != "none" and of.resident_layers:
        how = (of.quantization, of.double_quantization, DTYPES[of.dtype])
        stream = partial(restore_packed_weights, base, setup.source, *how)
    train, held_out = data.train_units or data.train, data.eval_units or data.eval
    criterion: Criterion
    if rewards := rewards_of(recipe.train.rewards):
        without_dropout(model)
        ends = (*data.renderer.ends, *generation_stop_ids(model.generation_config))
        told = setup.tokenizer, ends, rewards, weights, log
        criterion = OfGroups(recipe.train, recipe.seed, model, *told, draws=draws)
    else:
        criterion = criterion_for(recipe.train, model, devices)
    usable = usable_bytes(setup.machine, of.device)
    remembered = setup.memory_key, usable
    return Job(recipe, folder, model, step, train, held_out, state, log, stream, *remembered, criterion, devices)


def reference_key(setup: Setup) -> dict[str, str]:
    """What the log-probabilities of the reference depend on, besides the weights that training starts from."""
    recipe, lock = setup.resolved.recipe, setup.lock
    stored = f"{recipe.model.quantization} {recipe.model.double_quantization} {recipe.model.dtype}"
    parts = {"base": lock["base"]["fingerprint"], "stored": stored, "template": lock["template"], "rows": lock["data"]}
    return {**parts, "adapter": str(recipe.model.adapter), "held_out": str(recipe.data.eval)}


def _total(job: Job) -> int:
    return stream_of(job.recipe, len(job.train)).total_steps


def _restore(job: Job, changed: Sequence[Difference], moved: tuple[int, int] | None) -> None:
    checkpoint = go_back(job)
    progress = job.state.progress
    for change in changed:
        job.log.emit("override", step=progress.step, field=change.name, was=change.was, now=change.now)
    checkpoints.ask_memory(progress, job.recipe.train, besides=not changed)
    if any(change.name == "train.learning_rate" for change in changed):  # as it is given, not what a roll-back left
        progress.rate_scale, progress.rollbacks = 1.0, 0
    told = {"devices_before": moved[0], "devices": moved[1]} if moved else {}
    job.log.emit("resume", step=progress.step, checkpoint=checkpoint.name, **told)
    if changed:  # they hold from here on, whatever comes before the next save
        save(job)


def _announce(job: Job, setup: Setup) -> None:
    trained = sum(weight.numel() for weight in job.state.weights.values())
    numbers = {"trainable": trained, "all": setup.parameters}  # of the base, as `strop plan` counts
    if held := count_trained_in_experts(job.model):
        numbers |= {"experts": held, "active": setup.parameters - setup.shape.idle_expert_weights}
    if isinstance(job.criterion, OfGroups) and isinstance(job.criterion.draws, ByVllm):
        job.log.emit("note", text=f"answers are drawn by vLLM {job.criterion.draws.version}")
    elif isinstance(job.criterion, OfGroups) and (why := why_not_decoder(job.model)):
        job.log.emit("note", text=f"answers are drawn by transformers' generate: {why}")
    if job.devices.world > 1 and not job.recipe.train.exact and (found := own_dropout(job.model)):
        text = f"{found}: dropout of the model's own, drawn by micro-batch: other masks than on one device"
        job.log.emit("note", text=f"{text} (--train.exact true: the same)")
    bias = job.recipe.lora.bias
    if bias != "none" and not any(name.endswith("bias") for name in job.state.weights):
        job.log.emit("note", text=f"lora.bias {bias}: there is no such bias in this model")
    step, at = job.step, job.state.progress.step
    if step.lacking:
        said = f"PyTorch's own operations train this model, more slowly: {step.lacking}"
        job.log.emit("note", text=f"{said}; see {TROUBLESHOOTING_PAGE}#triton")
    told = {"devices": described(job.devices, job.recipe.train.exact)} if job.devices.world > 1 else {}
    job.log.emit("start", steps=_total(job), step=at, engine=step.name, why=step.why, parameters=numbers, **told)
