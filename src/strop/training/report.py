"""Log the start of a run, send metrics to experiment trackers, and save the adapter, model card and report.json."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strop.config.schema import OBJECTIVE_OPTIONS
from strop.data.types import Conversation
from strop.engine.decode.decoder import why_decoder_unsupported
from strop.engine.train.eligibility import find_model_dropout
from strop.engine.train.plain import WeightGatherer
from strop.errors import TROUBLESHOOTING_PAGE, RecipeError, first_line
from strop.evaluation.diagnosis import diagnose
from strop.evaluation.model_card import write_card
from strop.machine.memory import PeakTracker
from strop.models.adapter_config import NEEDS_QUANTIZED_BASE
from strop.models.adapters import save_adapter
from strop.models.experts import count_trained_in_experts
from strop.models.families.layers import load_balancing_coefficient
from strop.models.host_layers import CopyAhead
from strop.models.introspect import has_tied_embeddings
from strop.models.load import DTYPES
from strop.models.lora import weight_change
from strop.models.model_folder import save_model
from strop.models.streaming import ReadAhead
from strop.objectives.table import objective_of
from strop.runs.events import Event, Listener, find_rewind_step, read_events
from strop.runs.folder import write_json
from strop.training.dry_run import Forecast
from strop.training.gradients import free_step_memory
from strop.training.loop import evaluate, reset_lost_best
from strop.training.preflight import Setup
from strop.training.reference import with_reference
from strop.training.rollouts import PolicyCriterion, VllmSampler
from strop.training.state import Job, Progress, batch_stream, load_weights

LOG = logging.getLogger(__name__)

_CHANGES = ("chosen_change", "rejected_change", "desirable_change", "undesirable_change")
_EVAL_METRICS = ("loss", "accuracy", "margin", *_CHANGES, "kl")
_METRICS = {"eval": _EVAL_METRICS, "step": (*_EVAL_METRICS, "learning_rate", "grad_norm", "tokens_per_s")}


def describe_start(job: Job, setup: Setup) -> None:
    """Log the "start" event, with notes on how the model is trained."""
    num_trained = sum(weight.numel() for weight in job.state.weights.values())
    parameters = {"trainable": num_trained, "all": setup.parameters}
    if num_expert_weights := count_trained_in_experts(job.model):
        parameters |= {"experts": num_expert_weights, "active": setup.parameters - setup.shape.idle_expert_weights}
    for text in _list_model_notes(job):
        job.log.emit("note", text=text)
    devices = {"devices": _describe_devices(job)} if job.devices.world_size > 1 else {}
    stream = batch_stream(job.recipe, len(job.train))
    job.log.emit(
        "start", steps=stream.total_steps, steps_per_epoch=stream.steps_per_epoch, step=job.state.progress.step,
        engine=job.step.name, why=job.step.why, parameters=parameters, **devices,
    )  # fmt: skip


def _list_model_notes(job: Job) -> Iterator[str]:
    criterion, bias = job.criterion, job.recipe.lora.bias
    if isinstance(criterion, PolicyCriterion):
        if isinstance(criterion.sampler, VllmSampler):
            yield f"completions are sampled by vLLM {criterion.sampler.version}"
        elif why := why_decoder_unsupported(job.model):
            yield f"completions are sampled by transformers' generate: {why}"
    if job.devices.world_size > 1 and not job.recipe.train.exact and (dropout := find_model_dropout(job.model)):
        yield (
            f"{dropout}: the model's own dropout is seeded per micro-batch, so masks differ from those on one device, "
            "except with --train.exact true"
        )
    if job.devices.world_size > 1 and not job.recipe.train.exact and load_balancing_coefficient(job.model.config):
        yield (
            "the load-balancing loss is computed per micro-batch, so losses differ a little from those on one device, "
            "except with --train.exact true"
        )
    if bias != "none" and job.recipe.lora.vision == "all":
        yield f"lora.bias {bias}: biases of the image encoder stay as they are"
    elif bias != "none" and not any(name.endswith("bias") for name in job.state.weights):
        yield f"lora.bias {bias} has no effect: this model has no such bias"
    head: Any = job.model.get_output_embeddings()  # type: ignore[operator]
    if hasattr(head, "lora_A") and has_tied_embeddings(job.model):
        yield (
            "lora.target_modules has the output head, whose weight the embeddings share: such an adapter cannot be "
            "merged, so it is served on its base"
        )
    if job.step.gpu_failures:
        yield f"on this GPU, slower operations replace some: {job.step.gpu_failures}; see {TROUBLESHOOTING_PAGE}#triton"


def load_best(job: Job, reference_key: Mapping[str, str], *, may_evaluate: bool) -> float | None:
    """Load the best weights (without an evaluation, the last ones), and return their change since the start.

    The change is relative, as in models.lora.weight_change. may_evaluate: evaluate the last weights if there was no
    evaluation.
    """
    progress, gatherer = job.state.progress, job.gatherer
    reset_lost_best(job)
    if may_evaluate and job.eval and progress.best_step is None and progress.step:
        evaluate(with_reference(job, reference_key))  # the best checkpoint is lost, so the last weights are the best
    with job.devices.all_or_none():
        best_step = progress.best_step or progress.step
        if best_step != progress.step:
            load_weights(job.folder.checkpoint(best_step), job.state.weights)
        (change,) = job.devices.run_passes(
            lambda rank: [[job.model] if gatherer is None else _iter_modules(gatherer)], weight_change, backward=False
        )
    return change


def _iter_modules(gatherer: WeightGatherer) -> Iterator[nn.Module]:
    """Yield the modules of a base in order of computation. Each has its weights until the next is requested."""
    for key, module in gatherer.modules.items():
        gatherer(key)
        yield module


def finish(
    job: Job, setup: Setup, memory: PeakTracker, expected: Forecast, ended: str, change: float | None, exit_code: int
) -> dict[str, Any]:
    """Save the adapter, write report.json and return its contents. change: the result of load_best."""
    progress, folder = job.state.progress, job.folder
    identity = {name: setup.lock[name] for name in ("base", "template", "data")}
    model = setup.resolved.recipe.model
    identity |= {name: getattr(model, name) for name in ("quantization", "double_quantization", "dtype")}
    identity |= {NEEDS_QUANTIZED_BASE: True} if setup.needs_quantized_base else {}
    identity["step"] = progress.best_step or progress.step
    identity["system"] = _shared_system(setup.data.train_conversations)
    identity["reasoning"] = setup.data.renderer.reasoning
    if (classes := setup.data.classes) is not None:
        identity |= {"labels": list(classes.names), "several_labels": classes.several}
    if (pooling := job.recipe.train.pooling) is not None:
        identity["pooling"] = pooling
    folder.answers.unlink(missing_ok=True)  # answers.json of an earlier session is outdated
    earlier = folder.read_report().get("memory", {}).get("measured_peak_bytes") or 0  # before the run was resumed
    full = job.recipe.train.method == "full"
    free_step_memory(job)  # the tokenizer of a large vocabulary takes twice the size of its file
    if full:
        save_model(
            job.model, setup.tokenizer, setup.source, folder.model, DTYPES[model.dtype], setup.data.renderer.end_ids,
            identity, new_tokens=bool(job.recipe.lora.new_tokens),
        )  # fmt: skip
    else:
        save_adapter(job.model, setup.tokenizer, folder.adapter, identity)
    data, total_steps = setup.data.report.as_json(), batch_stream(job.recipe, len(job.train)).total_steps
    report: dict[str, Any] = {
        "run": str(folder.path),
        **summarize_progress(progress),
        "predicted_seconds": None if expected.seconds is None else expected.seconds * progress.step / total_steps,
        "eval_loss": progress.best_loss,
        "objective": _describe_objective(job, setup),
        "skipped_steps": progress.skipped_steps,
        "rollbacks": progress.rollbacks,
        "weight_change": change,
        "diagnosis": diagnose(read_events(folder.events), change),
        "ended": ended,
        "data": {**data["rows"], "by_reason": data["by_reason"]},
        **({"images": len(images)} if (images := setup.data.renderer.image_table) else {}),
        "data_report": data,
        "memory": {
            "predicted_peak_bytes": expected.peak_bytes(str(model.device)),
            "calibrated_peak_bytes": expected.calibrated_bytes(str(model.device)),
            "measured_peak_bytes": max(memory.peak_bytes(), earlier),
            "micro_batch": asdict(expected.batch),
            "predicted": {name: phase.as_json() for name, phase in expected.phases.items()},
        },
        **({"model": str(folder.model)} if full else {"adapter": str(folder.adapter)}),
        NEEDS_QUANTIZED_BASE: setup.needs_quantized_base,
        "adapter_step": identity["step"],
        "recipe": [asdict(choice) for choice in setup.resolved.choices.values()],
        "lock": {name: setup.lock[name] for name in ("base", "data", "template", "versions")},
        "machine": setup.lock["machine"],
        "devices": _summarize_devices(job),
        **(job.gatherer.report() if isinstance(job.gatherer, ReadAhead | CopyAhead) else {}),
        "exit": exit_code,
    }
    write_card(folder, report)
    write_json(folder.report, report)
    return report


def _describe_objective(job: Job, setup: Setup) -> dict[str, Any]:
    """Return the objective's name and options, and metrics of the last step and the best evaluation.

    A reward model scores the last token of a conversation, after `answer_end.cut` at its end is replaced by `add`.
    """
    train, progress = job.recipe.train, job.state.progress
    options = {name: getattr(train, name) for name in OBJECTIVE_OPTIONS if getattr(train, name) is not None}
    facts: dict[str, Any] = {
        "name": train.objective,
        "options": options,
        "last": progress.figures,
        "held_out": progress.held_out,
    }
    objective = objective_of(train)
    if objective is not None and objective.scored and objective.data_kind == "pairs":
        ending = setup.data.renderer.chat.mode(setup.data.train_conversations[0].messages).ending
        facts["answer_end"] = {"cut": ending.removed, "add": ending.added}
    if (classes := setup.data.classes) is not None:
        facts["several_labels"] = classes.several
    return facts


def summarize_progress(progress: Progress) -> dict[str, Any]:
    """Return counters and rates for report.json, also for a failed run."""
    seconds = max(progress.seconds, 1e-9)
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "tokens_per_s": progress.tokens / seconds,
        "supervised_tokens_per_s": progress.supervised_tokens / seconds,
        "seconds": progress.seconds,
        "eval_seconds": progress.eval_seconds,
        "save_seconds": progress.save_seconds,
        "loss": {"first": progress.first_loss, "last": progress.last_loss},
    }


def _describe_devices(job: Job) -> dict[str, Any]:
    devices = job.devices
    mode = "one" if devices.world_size == 1 else "replicated" if devices.base is None else "sharded"
    counts = {"count": devices.world_size, "nodes": devices.nodes, "mode": mode}
    base = {} if devices.base is None else {"base": devices.base.sizes()}
    return {**counts, "exact": job.recipe.train.exact, "threads": torch.get_num_threads(), **base}


def _summarize_devices(job: Job) -> dict[str, Any]:
    """Return the devices and their times. balance: mean computation time divided by that of the slowest rank."""
    progress = job.state.progress
    return {
        **_describe_devices(job),
        "communication_s": progress.communication_s,
        "waiting_s": progress.waiting_s,
        "balance": progress.computing_s / progress.slowest_s if progress.slowest_s else 1.0,
        "tokens_per_s_each": progress.tokens / max(progress.seconds, 1e-9) / job.devices.world_size,
    }


def _shared_system(conversations: Iterable[Conversation]) -> str | None:
    """Return the system prompt that every conversation starts with, or None."""
    starts = ((x.messages[0].role, x.messages[0].content) if x.messages else ("", None) for x in conversations)
    role, content = next(starts, ("", None))
    return content if role == "system" and all(start == (role, content) for start in starts) else None


@contextmanager
def tracking(names: Sequence[str], folder: Path, config: dict[str, Any]) -> Iterator[Sequence[Listener]]:
    """Yield a listener that sends metrics of step and eval events to the named trackers, if there are any.

    Raises RecipeError if a tracker does not start. Later failures are logged, and the run continues. Output of the
    trackers is written to stderr.
    """
    if not names:
        yield ()
        return
    from accelerate import Accelerator

    names = sorted(names, key=lambda name: name == "tensorboard")  # last, because it writes into the run folder
    accelerator = Accelerator(log_with=names, project_dir=str(folder), cpu=config["model.device"] == "cpu")
    flat_config = {key: x if isinstance(x, bool | int | float | str) else str(x) for key, x in config.items()}
    run = folder.resolve().name
    # wandb ignores WANDB_PROJECT, because accelerate always passes a project
    project = os.environ.get("WANDB_PROJECT") if "wandb" in names else None
    init_kwargs = {"wandb": {"name": os.environ.get("WANDB_NAME", run)}} if project else {}
    try:
        with redirect_stdout(sys.stderr):
            accelerator.init_trackers(project or run, config=flat_config, init_kwargs=init_kwargs)
    except Exception as error:  # each tracker has its own error classes
        wandb = "`wandb login`, or set WANDB_MODE=offline, or " if "wandb" in names else ""
        what = f"--track {','.join(names)}: {' '.join(str(error).split()) or type(error).__name__}"
        raise RecipeError(what, fix=f"{wandb}remove it from `track`") from None
    working = True

    def send(event: Event) -> None:
        nonlocal working
        kind, prefix = event["event"], "eval" if event["event"] == "eval" else "train"
        metrics = {f"{prefix}/{key}": event[key] for key in _METRICS.get(kind, ()) if event.get(key) is not None}
        if working and (step := find_rewind_step(event)) is not None:
            working = _try_trackers(names, lambda: _rewind_trackers(accelerator.trackers, step))
        if working and metrics:
            working = _try_trackers(names, lambda: accelerator.log(metrics, step=event["step"]))

    try:
        yield (send,)
    finally:
        with redirect_stdout(sys.stderr):
            _try_trackers(names, accelerator.end_training)


def _rewind_trackers(trackers: Sequence[Any], step: int) -> None:
    """Hide the steps after this one in TensorBoard. wandb and trackio cannot remove values."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.writer.close()  # the next value opens a file that starts with purge_step
            tracker.writer.purge_step = step + 1


def _try_trackers(names: Sequence[str], action: Callable[[], object]) -> bool:
    """Run an action on the trackers, and return whether it succeeded. A failure must not end the run."""
    try:
        action()
    except Exception as error:  # each tracker has its own error classes
        reason = f"{type(error).__name__}: {first_line(error)}"
        LOG.warning("--track %s: stopped; events.jsonl still has all metrics: %s", ",".join(names), reason)
        return False
    return True
