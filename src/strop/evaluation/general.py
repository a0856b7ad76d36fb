"""Measure what training broke: base and tuned model on a small general set and on tasks of lm-evaluation-harness."""

# general.jsonl has 126 rows of six kinds (arithmetic, copying, facts, instructions, plain text where nothing else is
# asked for, memory of earlier turns), each with a regular expression that a good answer matches. So small a set shows a
# lost ability, not a loss of two points. Prompts and scores of the harness are its own, comparable with published ones.

from __future__ import annotations

import json
import logging
import math
import re
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from strop.data.types import Message
from strop.distributed.devices import ALONE, Devices
from strop.engine.decode.model import Model
from strop.errors import RecipeError, nearest
from strop.evaluation.compare import Advance, generate_answers
from strop.evaluation.metrics import Z_95, Difference, paired_difference, wilson

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Row:
    """A question of the general set. pattern: a regular expression that a good answer matches."""

    kind: str
    messages: tuple[Message, ...]
    pattern: str


def rows() -> list[Row]:
    lines = (files(__package__) / "general.jsonl").read_text(encoding="utf-8").splitlines()
    parsed = map(json.loads, lines)
    return [Row(row["kind"], tuple(Message(**turn) for turn in row["messages"]), row["pattern"]) for row in parsed]


def compare_general(model: Model, advance: Advance | None = None, devices: Devices = ALONE) -> dict[str, Any]:
    """Return {rows, base, tuned, intervals, difference, kinds: {kind: {rows, base, tuned, difference}}, lost}."""
    questions = rows()
    prompts = [model.renderer.prompt(list(row.messages)) for row in questions]
    answers = generate_answers(
        model, prompts, devices, max_new_tokens=MAX_NEW_TOKENS, both=True,
        advance=advance and (lambda done: advance("general, base and tuned", done, 2 * len(questions))),
    )  # fmt: skip
    texts = [answer.text for answer in answers]
    texts_by_side = {"base": texts[: len(questions)], "tuned": texts[len(questions) :]}
    hits = {
        side: [bool(re.search(row.pattern, text)) for row, text in zip(questions, side_texts, strict=True)]
        for side, side_texts in texts_by_side.items()
    }
    kinds = {}
    for kind in dict.fromkeys(row.kind for row in questions):
        places = [place for place, row in enumerate(questions) if row.kind == kind]
        shares = {side: sum(hits[side][place] for place in places) / len(places) for side in hits}
        change = paired_difference(*([hits[side][place] for place in places] for side in ("base", "tuned")))
        kinds[kind] = {"rows": len(places), **shares, "difference": asdict(change)}
    lost = [place for place in range(len(questions)) if hits["base"][place] and not hits["tuned"][place]]
    return {
        "rows": len(questions),
        **{side: sum(side_hits) / len(questions) for side, side_hits in hits.items()},
        "intervals": {side: list(wilson(sum(side_hits), len(questions))) for side, side_hits in hits.items()},
        "difference": asdict(paired_difference(hits["base"], hits["tuned"])),
        "kinds": kinds,
        "lost": [
            {"prompt": questions[place].messages[-1].content, **{side: texts_by_side[side][place] for side in hits}}
            for place in lost
        ],
    }


def check_tasks(tasks: Sequence[str]) -> tuple[list[str], Any]:
    """Return the names of tasks given by name or .yaml file, and the harness's task manager."""
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
            what = f"--tasks {name}: no such task{nearest(name, manager.all_tasks)}"
            raise RecipeError(what, fix="see `lm-eval ls tasks`")
    return names, manager


def run_tasks(model: Model, names: Sequence[str], manager: Any, limit: int | None = None) -> dict[str, Any]:
    """Return {task: {metric: {base, tuned, difference, documents}}} of tasks, on `limit` documents of each."""
    # difference: {value, low, high}, the normal interval of the mean of paired differences; None without an adapter.
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
            difference = None
            if len(pairs) > 1:
                changes = [after - before for before, after in pairs]
                mean, reach = statistics.mean(changes), Z_95 * statistics.stdev(changes) / math.sqrt(len(changes))
                difference = vars(Difference(mean, mean - reach, mean + reach))
            result[task][metric] = {**values, "documents": len(rows["base"]), "difference": difference}
    return result


def _by_document(samples: Sequence[dict[str, Any]], key: str) -> dict[Any, float]:
    """Return the value of a metric (`metric,filter`) for each document."""
    metric, _, chosen = key.partition(",")
    filtered = [sample for sample in samples if sample.get("filter", "none") == chosen]
    scored = [sample for sample in filtered if isinstance(sample.get(metric), (int, float))]
    return {sample["doc_id"]: float(sample[metric]) for sample in scored}


def _task_name(file: Path) -> str:
    """Return the name of the task that a file defines. Only its line is parsed, as its tags are the harness's own."""
    line = next((line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("task:")), "")
    name = yaml.safe_load(line or "{}").get("task")
    if not isinstance(name, str):
        raise RecipeError(f"--tasks {file}: names no task", fix="add a line `task: NAME`")
    return name
