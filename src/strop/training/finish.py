"""What a run leaves: the adapter with its card, and report.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from strop.config.schema import OBJECTIVE_OPTIONS
from strop.data.types import Conversation
from strop.evaluation.diagnosis import diagnose
from strop.evaluation.model_card import write_card
from strop.machine.memory import PeakTracker
from strop.models.adapters import save_adapter
from strop.models.lora import weight_change
from strop.objectives.table import objective_of
from strop.runs.events import read_events
from strop.runs.folder import write_json
from strop.training import state as checkpoints
from strop.training.dry_run import Forecast
from strop.training.job import Job
from strop.training.loop import evaluate, forget_lost_best
from strop.training.multi_device import measured
from strop.training.preflight import Setup
from strop.training.reference import with_reference
from strop.training.state import Progress


def take_best(job: Job, key: Mapping[str, str]) -> float | None:
    """Puts the best weights (the last where nothing was evaluated) into the model, on every device; gives how far they
    have moved theirs (model.lora.weight_change). key: what the reference depends on."""
    progress, base = job.state.progress, job.devices.base
    forget_lost_best(job)
    if job.eval and progress.best_step is None and progress.step:
        evaluate(with_reference(job, key))  # the last weights are the best that there are
    with job.devices.together():
        kept = progress.best_step or progress.step
        if kept != progress.step:
            checkpoints.load_weights(job.folder.checkpoint(kept), job.state.weights)
        (change,) = job.devices.turns(
            lambda rank: [[job.model] if base is None else base.in_turn()], weight_change, backward=False
        )
    return change


def finish(
    job: Job, setup: Setup, memory: PeakTracker, expected: Forecast, ended: str, change: float | None
) -> dict[str, Any]:
    """Keeps the weights as the run's adapter; writes report.json. change: see take_best."""
    progress, folder = job.state.progress, job.folder
    identity = {name: setup.lock[name] for name in ("base", "template", "data")}
    model = setup.resolved.recipe.model
    identity |= {
        "quantization": model.quantization,
        "double_quantization": model.double_quantization,
        "dtype": model.dtype,
    }
    identity["system"] = _shared_system(setup.data.train_conversations)
    identity["reasoning"] = setup.data.renderer.reasoning
    folder.answers.unlink(missing_ok=True)  # of the adapter that a session before has left
    save_adapter(job.model, setup.tokenizer, folder.adapter, identity)
    data = setup.data.report.as_json()
    report: dict[str, Any] = {
        "run": str(folder.path),
        **figures(progress),
        "eval_loss": progress.best_loss,
        "objective": _objective(job, setup),
        "skipped_steps": progress.skipped_steps,
        "rollbacks": progress.rollbacks,
        "weight_change": change,
        "diagnosis": diagnose(read_events(folder.events), change),
        "ended": ended,
        "data": {**data["rows"], "by_reason": data["by_reason"]},
        "data_report": data,
        "memory": {
            "predicted_peak_bytes": expected.peak_bytes(str(model.device)),
            "calibrated_peak_bytes": expected.calibrated_bytes(str(model.device)),
            "measured_peak_bytes": memory.peak_bytes(),
            "micro_batch": asdict(expected.batch),
            "predicted": {name: phase.as_json() for name, phase in expected.phases.items()},
        },
        "adapter": str(folder.adapter),
        "adapter_step": progress.best_step or progress.step,
        "recipe": [asdict(choice) for choice in setup.resolved.choices.values()],
        "lock": {name: setup.lock[name] for name in ("base", "data", "template", "versions")},
        "machine": setup.lock["machine"],
        "devices": measured(job),
        "exit": 0,
    }
    write_card(folder.adapter, report)
    write_json(folder.report, report)
    return report


def _objective(job: Job, setup: Setup) -> dict[str, Any]:
    """What was learned: its name and options, the figures of the last step, and those of the best evaluation; of a
    reward model also where its score is: a rendered conversation that ends with `cut` gets `add` in its place."""
    train, progress = job.recipe.train, job.state.progress
    options = {name: getattr(train, name) for name in OBJECTIVE_OPTIONS if getattr(train, name) is not None}
    found = {"name": train.objective, "options": options, "last": progress.figures, "held_out": progress.held_out}
    objective = objective_of(train)
    if objective is not None and objective.scored:
        ending = setup.data.renderer.chat.mode(setup.data.train_conversations[0].messages).ending
        found["answer_end"] = {"cut": ending.cut, "add": ending.add}
    return found


def figures(progress: Progress) -> dict[str, Any]:
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
