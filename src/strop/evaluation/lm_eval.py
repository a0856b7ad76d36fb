"""Run tasks of lm-evaluation-harness on base and tuned model, if the harness is installed.

Prompts and scores are the harness's own, so that they compare with published ones. strop adds the change with its
interval.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from strop.errors import RecipeError, nearest
from strop.evaluation.metrics import Z_95, Difference
from strop.models.adapters import Model


def check_tasks(tasks: Sequence[str]) -> tuple[list[str], Any]:
    """Return the names of the tasks, and the harness's task manager.

    Args:
        tasks: names, or .yaml files that define a task.

    Raises:
        RecipeError: the package is not installed, or a task does not exist.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise RecipeError("--tasks: lm-eval is not installed", fix="pip install lm-eval") from None
    files = [Path(task) for task in tasks if task.endswith(".yaml")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise RecipeError(f"--tasks {missing[0]}: no such file", fix="give a file that defines a task of lm-eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=[str(file.parent.resolve()) for file in files] or None)
    names = [_task_name(Path(task)) if task.endswith(".yaml") else task for task in tasks]
    for name in names:
        if name not in manager.all_tasks:
            raise RecipeError(
                f"--tasks {name}: no such task{nearest(name, manager.all_tasks)}", fix="see `lm-eval ls tasks`"
            )
    return names, manager


def run_tasks(model: Model, names: Sequence[str], manager: Any, limit: int | None = None) -> dict[str, Any]:
    """Run tasks on base and tuned model; without an adapter, on the base only.

    Args:
        model: the model.
        names: names of the tasks.
        manager: the harness's task manager.
        limit: number of documents of each task.

    Returns:
        {task: {metric: {base, tuned, difference: {value, low, high} | None, documents}}}. The interval is the normal
        one of the mean of paired differences.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    outputs: dict[str, Any] = {}
    for side in ("base", "tuned") if model.adapter else ("base",):
        with model.base() if model.adapter and side == "base" else nullcontext():
            wrapped = HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=8)
            outputs[side] = simple_evaluate(
                wrapped, tasks=list(names), limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True
            )
    result: dict[str, Any] = {}
    for task, scores in outputs["base"]["results"].items():
        result[task] = {}
        for key, value in scores.items():
            if not isinstance(value, (int, float)) or "_stderr" in key or "," not in key:
                continue
            metric = key.partition(",")[0]
            rows = {side: _by_document(outputs[side]["samples"].get(task, []), key) for side in outputs}
            values = {side: outputs[side]["results"][task][key] for side in outputs}
            pairs = [(rows["base"][doc], rows["tuned"][doc]) for doc in rows["base"]] if "tuned" in rows else []
            result[task][metric] = {**values, "documents": len(rows["base"]), "difference": _difference(pairs)}
    return result


def _by_document(samples: Sequence[dict[str, Any]], key: str) -> dict[Any, float]:
    """Return the value of a metric (`metric,filter`) for each document."""
    metric, _, chosen = key.partition(",")
    filtered = [sample for sample in samples if sample.get("filter", "none") == chosen]
    return {
        sample["doc_id"]: float(sample[metric]) for sample in filtered if isinstance(sample.get(metric), (int, float))
    }


def _difference(pairs: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    if len(pairs) < 2:
        return None
    changes = [after - before for before, after in pairs]
    value, reach = statistics.mean(changes), Z_95 * statistics.stdev(changes) / math.sqrt(len(changes))
    return vars(Difference(value, value - reach, value + reach))


def _task_name(file: Path) -> str:
    """Return the name of the task that a file defines. Only its line is parsed, as its tags are the harness's own."""
    line = next((line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("task:")), "")
    name = yaml.safe_load(line or "{}").get("task")
    if not isinstance(name, str):
        raise RecipeError(f"--tasks {file}: names no task", fix="add a line `task: NAME`")
    return name
