"""Start a run with `train`, or resume one from a checkpoint with `resume`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from strop.config.arguments import check_path
from strop.config.load import Choice, Resolved, read_resolved, resolve
from strop.config.schema import option_fields
from strop.display.notebook import html_table, run_summary
from strop.distributed.devices import SINGLE_PROCESS, Devices, may_restart, was_restarted
from strop.engine.device import explain_driver_error, repeatable
from strop.errors import InputError, Location, MemoryLimitError, RecipeError, Stopped, StropError, first_line
from strop.evaluation.diagnosis import changes_loss
from strop.evaluation.report import write_report
from strop.machine.memory import is_out_of_memory, start_peak, trim_heap
from strop.models.host_layers import CopyAhead
from strop.models.streaming import ReadAhead
from strop.models.upstream_errors import convert_model_errors
from strop.planning.workload import Workload
from strop.runs.events import INTERRUPTED, Event, EventLog, Listener, drop_undone_events, read_events
from strop.runs.folder import (
    RunFolder,
    create_run_folder,
    disk_errors,
    is_run,
    next_numbered,
    open_run,
    run_name,
    write_atomic,
    write_json,
)
from strop.runs.lock import Difference, check_allowed_names, compare_locks, is_allowed
from strop.training.build import broadcast_weights, build_job, build_model, check_base_digests
from strop.training.dry_run import check_causal, check_images, check_int8, forecast, try_largest_batch, watch_memory
from strop.training.loop import fit, parse_seconds, restore_newest, save
from strop.training.preflight import (
    Setup,
    check_same_recipe,
    locked_device_count,
    set_up_on_all,
    startup_notes,
    suggest_changes,
)
from strop.training.reference import check_reference, with_reference
from strop.training.report import describe_start, finish, load_best, summarize_progress, tracking
from strop.training.rollouts import vllm_sampler
from strop.training.state import Job, batch_stream, set_memory_options


class Run:
    """A run folder. `train` and `resume` return it; `strop.Run("runs/mine")` opens one. Raises FolderError for others.

    Attributes:
        folder: the run folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = open_run(Path(check_path("folder", folder))).path

    @property
    def finished(self) -> bool:
        """True if the run is complete. Otherwise `strop.resume` continues it."""
        return RunFolder(self.folder).finished

    @property
    def report(self) -> dict[str, Any]:
        """The contents of report.json, {} if the run was killed before it wrote them.

        For example `steps`, `tokens`, `tokens_per_s`, `seconds`, `loss` (`first` and `last`), `eval_loss`, `data` (rows
        by what was done with them), `memory`, `adapter`, `diagnosis`, and after `strop.evaluate` its `evaluation`.
        """
        folder = RunFolder(self.folder)  # which may have been moved or copied
        report = folder.read_report()
        paths = {name: str(getattr(folder, name)) for name in ("adapter", "model") if report.get(name)}
        return report and {**report, "run": str(self.folder), **paths}

    @property
    def events(self) -> list[Event]:
        """The events in events.jsonl, of which some steps were undone if the run was resumed or rolled back.

        Each is a dictionary with `event` (its kind, such as "step"), `time`, and the fields of that kind.
        """
        return drop_undone_events(read_events(RunFolder(self.folder).events))

    def __fspath__(self) -> str:
        """Return the folder, so that a Run can be passed as a path: `strop.load(run)`."""
        return str(self.folder)

    def __repr__(self) -> str:
        report = self.report
        values = f"steps={report.get('steps')}, finished={self.finished}, loss={report.get('loss')}"
        return f"Run({str(self.folder)!r}, {values})"

    def __str__(self) -> str:
        return "\n".join(f"{name:9} {text}" for name, text in self._summary())

    def _repr_html_(self) -> str:
        return html_table((), self._summary())

    def _summary(self) -> list[tuple[str, str]]:
        return run_summary(self.folder, self.report, self.finished)


@dataclass(frozen=True)
class Resumed:
    """The differences between a run and its resume. fields: of the recipe, with other values than before."""

    fields: Sequence[str]
    changes: Sequence[Difference]
    devices: tuple[int, int] | None  # number of devices before and now, if they differ


def train(
    resolved: Resolved,
    listeners: Sequence[Listener] = (),
    *,
    memory: int | None = None,
    devices: Devices = SINGLE_PROCESS,
    resume_existing: bool = False,
) -> Run:
    """Fine-tune with a recipe in a new run folder. strop.api.train documents the errors.

    listeners: called with each event that is written to events.jsonl. memory: a limit in bytes. resume_existing: resume
    the run in the folder `out`, if there is one.
    """
    settings = {field: choice.value for field, choice in resolved.choices.items()}
    devices.require_same(settings | {"--resume": resume_existing})
    path = resolved.recipe.out
    out = Path(os.path.expanduser(path)) if path else None  # in a recipe, no shell has expanded ~
    if out is None and (resume_existing or may_restart()):
        raise InputError("a run that may be restarted needs a fixed folder", fix="give a folder with --out")
    if out is not None and devices.run_on_main(lambda: (resume_existing or was_restarted()) and is_run(out)):
        check_same_recipe(resolved, out)
        return resume(out, listeners, memory=memory, devices=devices)
    data = resolved.recipe.data.train
    name = run_name(data if isinstance(data, str) else data[0])
    folder = devices.run_on_main(lambda: create_run_folder(out or next_numbered(Path("runs"), name)))
    with disk_errors(folder.path), _claim(folder, devices):
        try:
            with suggest_changes(resolved, memory, devices):
                setup = set_up_on_all(resolved, memory, folder, devices)
                if devices.is_main:
                    write_atomic(folder.recipe, setup.resolved.as_yaml())
                    write_json(folder.lock, setup.lock)
                return _execute(folder, setup, listeners, devices)
        except BaseException as error:
            failed = isinstance(error, StropError) and not isinstance(error, Stopped)
            if devices.is_main and folder.remove_if_unused(failed) and isinstance(error, StropError):
                error.partial_result.pop("run", None)
            raise


def resume(
    path: Path,
    listeners: Sequence[Listener] = (),
    *,
    options: Mapping[str, Any] | None = None,
    allow_changed: Sequence[str] = (),
    memory: int | None = None,
    devices: Devices = SINGLE_PROCESS,
) -> Run:
    """Resume a run from its newest intact checkpoint, on any number of devices. A finished run is returned unchanged.

    options: recipe fields with new values. allow_changed: recipe fields (or their last part), base, data, template,
    versions, and the groups lr and schedule, which may have changed. Raises InputError for other changes.
    """
    devices.require_same({"the run": path, **(options or {}), "--allow-changed": list(allow_changed)})
    devices.run_on_main(lambda: check_allowed_names(allow_changed, dict(option_fields())))
    if fixed := sorted({"out", "preset"} & set(options or ())):
        raise RecipeError(f"--{fixed[0]}: cannot be changed when a run is resumed", fix="leave it out")
    folder = devices.run_on_main(lambda: open_run(path))
    with disk_errors(folder.path), _claim(folder, devices):
        if devices.run_on_main(lambda: folder.finished and folder.is_saved):
            return _finished_run(folder, options, devices)
        lock = folder.read_lock()
        resolved = resolve(folder.recipe, options) if options else read_resolved(folder.recipe)
        if resolved.recipe.train.keep == "auto":  # the run is older than this option
            resolved = resolved.decide([Choice("train.keep", "off", "default", "")])
        same_threads = resolved.recipe.train.exact or devices.world_size == locked_device_count(lock)
        setup = set_up_on_all(resolved, memory, folder, devices, lock["threads"] if same_threads else None)
        recorded = _recorded_choices(folder)
        setup = replace(setup, resolved=setup.resolved.with_origins(recorded))
        changes = compare_locks(lock, setup.lock)
        if refused := [change for change in changes if not is_allowed(change, allow_changed)]:
            texts = [f"{x.name} has changed since the run was started: {x.was} then, {x.now} now" for x in refused]
            where = [Location(str(folder.path), None, text) for text in texts]
            raise InputError("cannot resume", fix=_suggest_fix(refused, allow_changed), where=where)
        for file, content in setup.data.pending.items() if devices.is_main else ():
            write_atomic(file, content)
        counts = (locked_device_count(lock), devices.world_size)
        has_other_devices = counts[0] != counts[1]
        if devices.is_main and (changes or has_other_devices or options):
            write_atomic(folder.recipe, setup.resolved.as_yaml())
            layers = {"layers": lock["layers"]} if "layers" in lock else {}  # digests of the base's layers
            overrides = [*lock.get("overrides", []), *map(asdict, changes)]
            write_json(folder.lock, {**setup.lock, **layers, "overrides": overrides})
        choices = setup.resolved.choices
        fields = [name for name in choices if name not in recorded or recorded[name].value != choices[name].value]
        resumed = Resumed(fields, changes, counts if has_other_devices else None)
        try:
            return _execute(folder, setup, listeners, devices, resumed)
        except StropError as error:
            if devices.is_main and not isinstance(error, InputError | Stopped):
                _report_failure(folder, error)
            raise


def _report_failure(folder: RunFolder, error: StropError) -> None:
    """Add the error of a resume to the report of an earlier stop, whose adapter the run still has."""
    if report := folder.read_report():
        report |= {"ended": "error", "exit": error.exit_code, "error": error.as_json()}
        with suppress(OSError):  # a full disk may be the error
            write_json(folder.report, report)
            write_report(folder.path, report, read_events(folder.events))


def _recorded_choices(folder: RunFolder) -> dict[str, Choice]:
    """Return the choices of a run when it last began, by field."""
    recipes = [event for event in read_events(folder.events) if event["event"] == "recipe"]
    return {one["field"]: Choice(**one) for one in recipes[-1]["choices"]} if recipes else {}


def _finished_run(folder: RunFolder, options: Mapping[str, Any] | None, devices: Devices) -> Run:
    if options and resolve(folder.recipe, options).recipe != read_resolved(folder.recipe).recipe:
        what = f"{folder.path} is finished, so options no longer change it"
        command = f"strop train --model {shlex.quote(str(folder.path))} --data ROWS.jsonl"
        raise InputError(what, fix=f"train it further in a new run: `{command}`")
    run = Run(folder.path)
    if devices.is_main and not folder.page.is_file():  # the process was killed before it wrote report.html
        write_report(folder.path, run.report, read_events(folder.events))
    return run


@contextmanager
def _claim(folder: RunFolder, devices: Devices) -> Iterator[None]:
    with ExitStack() as stack:
        with devices.all_or_none():
            if devices.is_main:
                stack.enter_context(folder.claim())
        yield


def _suggest_fix(refused: Sequence[Difference], allowed: Sequence[str]) -> str:
    """Return the fix, with the names that were allowed already, because the command is given anew."""
    if all(change.allowable for change in refused):
        names = list(dict.fromkeys([*allowed, *(change.name for change in refused)]))
        value = names[0] if len(names) == 1 else f"'{','.join(names)}'"
        return f"restore it, or resume with --allow-changed {value}"
    return "restore it, or start a new run (from this adapter with --model.adapter)"


def _execute(
    folder: RunFolder, setup: Setup, listeners: Sequence[Listener], devices: Devices, resumed: Resumed | None = None
) -> Run:
    recipe = setup.resolved.recipe
    devices.set_timeout(parse_seconds(recipe.train.timeout))
    config = {field: choice.value for field, choice in setup.resolved.choices.items()}
    with ExitStack() as stack:
        trackers = stack.enter_context(tracking(recipe.track if devices.is_main else [], folder.path, config))
        log = EventLog(folder.events if devices.is_main else None, [*listeners, *trackers])
        job: Job | None = None
        stopped: Stopped | None = None
        try:
            log.emit("machine", lines=setup.machine.describe(devices.local_world_size))
            choices = [asdict(choice) for choice in setup.resolved.choices.values()]
            log.emit("recipe", choices=choices, changed=resumed and resumed.fields)
            log.emit("data", report=setup.data.report.as_json())
            for text in startup_notes(setup):
                log.emit("note", text=text)
            teacher = None if setup.teacher is None else setup.teacher.for_policy(setup.data)
            trim_heap()
            memory = start_peak(recipe.model.device)
            if recipe.train.deterministic and recipe.model.device != "cpu":
                stack.enter_context(repeatable())
            stack.enter_context(convert_model_errors(setup.shape.family))
            model, gatherer = build_model(setup, resumed is not None, devices)
            check_base_digests(folder, devices)
            use_vllm = recipe.train.vllm_python is not None
            sampler = stack.enter_context(vllm_sampler(recipe, setup.source, model)) if use_vllm else None
            job = build_job(folder, setup, model, log, devices, sampler, teacher, gatherer)
            trim_heap()  # free memory that was used to read and convert weights
            if resumed is not None and devices.run_on_main(folder.checkpoints):
                _restore(job, resumed)
            broadcast_weights(job)
            describe_start(job, setup)
            end_reason, key = "steps", reference_key(setup)
            usable = watch_memory(job, setup.machine)
            sizes = {"parameters": setup.parameters, "threads": torch.get_num_threads(), "devices": devices.world_size}
            expected = forecast(job, Workload.from_recipe(recipe, setup.shape, **sizes), usable)
            if job.state.progress.step < batch_stream(recipe, len(job.train)).total_steps:
                if recipe.train.int8_matmul:
                    check_int8(job, expected.items)
                check_causal(job, expected.items)
                check_images(job, expected.items)
                expected = try_largest_batch(job, expected, usable, memory)
                job = with_reference(job, key)
                try:
                    end_reason = fit(job)
                except StropError as error:
                    error.partial_result = {"run": str(folder.path), **summarize_progress(job.state.progress)}
                    if not isinstance(error, Stopped) or recipe.train.method == "full":  # a model of many GB
                        raise
                    end_reason, stopped = "stop", error
                else:
                    check_reference(job, key)
                if isinstance(gatherer, ReadAhead | CopyAhead):
                    log.emit("note", text=gatherer.describe())
        except KeyboardInterrupt:  # the second one in `fit`, or before or after it
            step = 0 if job is None else job.state.progress.step
            log.emit("stop", step=step, why=INTERRUPTED)
            saved = max([number for number, _ in folder.checkpoints()], default=0)
            what = f"stopped at once: {step} steps are complete, {saved} of them saved"
            again = "" if saved else ", which starts with step 1"
            fix = f"continue with `strop resume {shlex.quote(str(folder.path))}`{again}"
            raise Stopped(what, fix=fix) from None
        except (RuntimeError, MemoryError) as error:
            if (explained := explain_driver_error(error)) is not None:
                raise explained from None
            if not is_out_of_memory(error):
                raise
            fix = "use a smaller model, or a machine with more memory"
            raise MemoryLimitError(f"out of memory: {first_line(error)}", fix=fix) from None
        weight_change = load_best(job, key, may_evaluate=stopped is None)
        ends = (memory, expected, end_reason, weight_change, Stopped.exit_code if stopped else 0)
        report = devices.run_on_main(lambda: finish(job, setup, *ends))
        if stopped is None:
            paths = {name: report[name] for name in ("adapter", "model") if name in report}
            log.emit("end", step=job.state.progress.step, seconds=report["seconds"], **paths)
    if devices.is_main:
        write_report(folder.path, report, read_events(folder.events))
    if stopped is not None:
        stopped.what += "; its adapter so far is saved"
        raise stopped
    return Run(folder.path)


def _restore(job: Job, resumed: Resumed) -> None:
    checkpoint = restore_newest(job)
    progress, changes = job.state.progress, resumed.changes
    for change in changes:
        job.log.emit("override", step=progress.step, field=change.name, was=change.was, now=change.now)
    set_memory_options(progress, job.recipe.train, keep=not changes)
    if any(change.name == "train.learning_rate" for change in changes):  # a rollback had reduced the old rate
        progress.rate_scale, progress.rollbacks = 1.0, 0
    loss_changes = [change.name for change in changes if changes_loss(change.name)]
    if loss_changes and progress.best_step is not None:
        progress.forget_best()
        names = ", ".join(loss_changes)
        text = f"losses of evaluations until step {progress.step} do not count for the best step: {names} changed"
        job.log.emit("note", text=text)
    counts = dict(zip(("devices_before", "devices"), resumed.devices, strict=True)) if resumed.devices else {}
    job.log.emit("resume", step=progress.step, checkpoint=checkpoint.name, **counts)
    if changes:  # so that they are stored even if the run ends before its next save
        save(job)


def reference_key(setup: Setup) -> dict[str, str]:
    """Return what reference log-probabilities depend on, in addition to the start weights."""
    recipe, lock = setup.resolved.recipe, setup.lock
    stored = f"{recipe.model.quantization} {recipe.model.double_quantization} {recipe.model.dtype}"
    parts = {"base": lock["base"]["fingerprint"], "stored": stored, "template": lock["template"], "rows": lock["data"]}
    return {**parts, "adapter": str(recipe.model.adapter), "held_out": str(recipe.data.eval)}
