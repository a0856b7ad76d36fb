"""Tasks of lm-evaluation-harness, through its own package where it is installed, asked of base and tuned.

Its numbers are the field's, so nothing is changed about how it asks. What is added is the change with its interval.
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

from strop.engine.decode.model import Model
from strop.errors import RecipeError, nearest
from strop.evaluation.metrics import Z_95, Difference


def check_tasks(tasks: Sequence[str]) -> tuple[list[str], Any]:
    """(names, the harness's task manager). A task is a name of its own, or a .yaml file that describes one.

    Raises RecipeError where the package is not installed or there is no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise RecipeError("--tasks: lm-eval is not installed", fix="pip install lm-eval") from None
    files = [Path(task) for task in tasks if task.endswith(".yaml")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise RecipeError(f"--tasks {missing[0]}: no such file", fix="give a file that describes a task of lm-eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=[str(file.parent.resolve()) for file in files] or None)
    names = [_name(Path(task)) if task.endswith(".yaml") else task for task in tasks]
    for name in names:
        if name not in manager.all_tasks:
            raise RecipeError(
                f"--tasks {name}: no such task{nearest(name, manager.all_tasks)}", fix="see `lm-eval ls tasks`"
            )
    return names, manager


def run_tasks(model: Model, names: Sequence[str], manager: Any, limit: int | None = None) -> dict[str, Any]:
    """{task: {metric: {base, tuned, difference: {value, low, high} | None, documents}}}; base alone without an adapter.

    limit: this many documents of each task. The interval is that of the mean of paired differences (normal).
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found: dict[str, Any] = {}
    for side in ("base", "tuned") if model.adapter else ("base",):
        with model.base() if model.adapter and side == "base" else nullcontext():
            asked = HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=8)
            found[side] = simple_evaluate(
                asked, tasks=list(names), limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True
            )
    result: dict[str, Any] = {}
    for task, scores in found["base"]["results"].items():
        result[task] = {}
        for key, value in scores.items():
            if not isinstance(value, (int, float)) or "_stderr" in key or "," not in key:
                continue
            metric = key.partition(",")[0]
            rows = {side: _by_document(found[side]["samples"].get(task, []), key) for side in found}
            one = {side: found[side]["results"][task][key] for side in found}
            pairs = [(rows["base"][doc], rows["tuned"][doc]) for doc in rows["base"]] if "tuned" in rows else []
            result[task][metric] = {**one, "documents": len(rows["base"]), "difference": _difference(pairs)}
    return result


def _by_document(samples: Sequence[dict[str, Any]], key: str) -> dict[Any, float]:
    metric, _, chosen = key.partition(",")
    kept = [sample for sample in samples if sample.get("filter", "none") == chosen]
    return {sample["doc_id"]: float(sample[metric]) for sample in kept if isinstance(sample.get(metric), (int, float))}


def _difference(pairs: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    if len(pairs) < 2:
        return None
    changes = [after - before for before, after in pairs]
    value, reach = statistics.mean(changes), Z_95 * statistics.stdev(changes) / math.sqrt(len(changes))
    return vars(Difference(value, value - reach, value + reach))


def _name(file: Path) -> str:
    """A task's name out of its file, whose tags (!function) mean something to the harness alone."""
    line = next((line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("task:")), "")
    name = yaml.safe_load(line or "{}").get("task")
    if not isinstance(name, str):
        raise RecipeError(f"--tasks {file}: names no task", fix="add a line `task: NAME`")
    return name
