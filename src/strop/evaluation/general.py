"""Detect abilities that training made worse, on a small general set and on tasks of lm-evaluation-harness.

The general set (general.jsonl) has 340 questions of ten kinds: arithmetic, copying, facts, instructions, languages,
memory of earlier turns, plain text, reading, refusal and system prompts. It is large enough to show a lost ability, but
not a loss of two points. Scores of the harness are comparable with published ones.
"""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from strop.data.row_errors import RenderError
from strop.data.types import Ids, Message
from strop.distributed.devices import SINGLE_PROCESS, Devices
from strop.engine.decode.model import Model
from strop.errors import RecipeError, suggest
from strop.evaluation.compare import Progress, generate_answers
from strop.evaluation.metrics import mean_interval, paired_difference, wilson_interval

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class GeneralQuestion:
    kind: str
    messages: tuple[Message, ...]
    pattern: str  # regular expression that a good answer matches


def load_questions() -> list[GeneralQuestion]:
    lines = (files(__package__) / "general.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        GeneralQuestion(row["kind"], tuple(Message(**turn) for turn in row["messages"]), row["pattern"])
        for row in map(json.loads, lines)
    ]


def compare_general(model: Model, advance: Progress | None = None, devices: Devices = SINGLE_PROCESS) -> dict[str, Any]:
    """Return {rows, base, tuned, intervals, difference, kinds: {kind: {rows, base, tuned, difference}}, lost}.

    Questions that the chat template cannot render, such as those with system prompts, are left out.
    """
    questions, prompts = list[GeneralQuestion](), list[Ids]()
    for question in load_questions():
        with suppress(RenderError):
            prompts.append(model.renderer.prompt(list(question.messages)))
            questions.append(question)
    answers = generate_answers(
        model, prompts, devices, max_new_tokens=MAX_NEW_TOKENS, both=True,
        advance=advance and (lambda done: advance("general, base and tuned", done / 2, len(questions))),
    )  # fmt: skip
    texts = [answer.text for answer in answers]
    texts_by_side = {"base": texts[: len(questions)], "tuned": texts[len(questions) :]}
    hits = {
        side: [bool(re.search(question.pattern, text)) for question, text in zip(questions, side_texts, strict=True)]
        for side, side_texts in texts_by_side.items()
    }
    kinds = {}
    for kind in dict.fromkeys(question.kind for question in questions):
        rows = [i for i, question in enumerate(questions) if question.kind == kind]
        kinds[kind] = _summarize([hits["base"][i] for i in rows], [hits["tuned"][i] for i in rows])
    return {
        **_summarize(hits["base"], hits["tuned"]),
        "intervals": {side: list(wilson_interval(sum(side_hits), len(questions))) for side, side_hits in hits.items()},
        "kinds": kinds,
        "answers": {
            "max_tokens": MAX_NEW_TOKENS,
            "references_cut": 0,
            "base_cut": sum(not answer.stopped for answer in answers[: len(questions)]),
            "tuned_cut": sum(not answer.stopped for answer in answers[len(questions) :]),
        },
        "lost": [
            {
                "prompt": "\n".join(message.content for message in question.messages),
                **{side: texts_by_side[side][i] for side in hits},
            }
            for i, question in enumerate(questions)
            if hits["base"][i] and not hits["tuned"][i]
        ],
    }


def _summarize(base: Sequence[bool], tuned: Sequence[bool]) -> dict[str, Any]:
    rates = {side: sum(hits) / len(hits) for side, hits in (("base", base), ("tuned", tuned))}
    return {"rows": len(base), **rates, "difference": asdict(paired_difference(base, tuned))}


def check_tasks(tasks: Sequence[str]) -> tuple[list[str], Any]:
    """Return the names of the tasks, which are given by name or .yaml file, and the harness's TaskManager."""
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
    names = [_read_task_name(Path(task)) if task.endswith(".yaml") else task for task in tasks]
    for name in names:
        if name not in manager.all_tasks:
            what = f"--tasks {name}: no such task{suggest(name, manager.all_tasks)}"
            raise RecipeError(what, fix="see `lm-eval ls tasks`")
    return names, manager


def run_tasks(model: Model, names: Sequence[str], manager: Any, limit: int | None = None) -> dict[str, Any]:
    """Return {task: {metric: {base, tuned, difference, documents}}}. limit: maximum number of documents per task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    outputs: dict[str, Any] = {}
    for side in (("base", "tuned") if model.has_base else ("tuned",)) if model.is_tuned else ("base",):
        with model.base() if model.is_tuned and side == "base" else nullcontext():
            wrapped = HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=8)
            try:
                outputs[side] = simple_evaluate(
                    wrapped, tasks=list(names), limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True
                )
            except ValueError as error:
                if "Duplicate task" not in str(error):
                    raise
                raise RecipeError(f"--tasks: {error}", fix="give a task or a group that has it, not both") from None
    return _compare_outputs(outputs)


def _compare_outputs(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of `run_tasks`. outputs: the results of `simple_evaluate` for `base`, `tuned` or both."""
    result: dict[str, Any] = {}
    first = next(iter(outputs.values()))
    for task, task_scores in first["results"].items():
        result[task] = {}
        for key, value in task_scores.items():
            if not isinstance(value, (int, float)) or "_stderr" in key or "," not in key:
                continue
            metric, _, filter_name = key.partition(",")
            filters = {other.partition(",")[2] for other in task_scores if other.startswith(f"{metric},")}
            name = metric if filters == {filter_name} else key
            scores = {side: _scores_by_document(outputs[side]["samples"].get(task, []), key) for side in outputs}
            values = {side: outputs[side]["results"][task][key] for side in outputs}
            # the documents of groups have no scores
            documents = max(map(len, scores.values())) or _count_documents(first, task)
            # An aggregation such as perplexity is not the mean of its documents, whose interval would be another one's.
            are_means = all(
                len(found) > 1
                and math.isclose(statistics.fmean(found.values()), values[name], rel_tol=1e-6, abs_tol=1e-9)
                for name, found in scores.items()
            )
            difference = None
            if len(scores) == 2 and are_means:
                base, tuned = scores["base"], scores["tuned"]
                difference = _compare_scores(list(base.values()), [tuned[document] for document in base])
            result[task][name] = {**values, "documents": documents, "difference": difference}
    return result


def _count_documents(output: dict[str, Any], task: str) -> int:
    """Return the number of documents of a task, or of the tasks of a group."""
    if task in output.get("n-samples", {}):
        return int(output["n-samples"][task]["effective"])
    return sum(_count_documents(output, part) for part in output.get("group_subtasks", {}).get(task, []))


def _compare_scores(base: Sequence[float], tuned: Sequence[float]) -> dict[str, float]:
    """Return the mean change of scores of the same documents, with its 95 % interval."""
    if {*base, *tuned} <= {0, 1}:
        return asdict(paired_difference([score == 1 for score in base], [score == 1 for score in tuned]))
    changes = [after - before for before, after in zip(base, tuned, strict=True)]
    return dict(zip(("value", "low", "high"), (statistics.fmean(changes), *mean_interval(changes)), strict=True))


def _scores_by_document(samples: Sequence[dict[str, Any]], key: str) -> dict[Any, float]:
    """Return the score of each document. key: the harness's name of a score, `metric,filter`."""
    metric, _, filter_name = key.partition(",")
    return {
        sample["doc_id"]: float(sample[metric])
        for sample in samples
        if sample.get("filter", "none") == filter_name and isinstance(sample.get(metric), (int, float))
    }


def _read_task_name(file: Path) -> str:
    """Return the name of the task or group in a file. Other lines may have YAML tags that only the harness knows."""
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [line for key in ("group:", "task:") for line in lines if line.startswith(key)]
    name = next(iter(yaml.safe_load(found[0]).values())) if found else None
    if not isinstance(name, str):
        raise RecipeError(f"--tasks {file}: names no task", fix="add a line `task: NAME`")
    return name
