"""`strop eval`: a model by name, rows by name; the result also goes into the run's report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from strop.adapters import adapter_folder, load
from strop.data.conversation import Conversation
from strop.data.formats import conversations
from strop.data.sources import RowFault, read_rows
from strop.errors import DataError, RecipeError
from strop.evaluation.compare import Advance, compare, questions
from strop.evaluation.general import compare_general
from strop.evaluation.metrics import check_golds
from strop.evaluation.metrics import metric as known_metric
from strop.evaluation.report import write_report
from strop.runs.events import read_events
from strop.runs.folder import RunFolder, is_run, write_json

SAMPLES_IN_REPORT = 20


def read_conversations(data: str | Sequence[str]) -> list[Conversation]:
    """All rows of the data as conversations. Raises DataError naming every row that is wrong."""
    bad: list[RowFault] = []
    reader = conversations(read_rows(data, bad=bad), bad=bad)
    found = list(reader)
    if "preference" in reader.found.values():
        raise DataError("preference pairs have no single right answer", fix="give rows with one answer each")
    if bad:
        raise DataError(f"{len(bad)} rows are wrong", fix="mend or remove them", where=[fault.where for fault in bad])
    return found


def evaluate_model(
    name: str,
    data: str | Sequence[str],
    *,
    metric: str = "exact",
    max_new_tokens: int = 80,
    advance: Advance | None = None,
    quantization: str = "auto",
    force: bool = False,
    general: bool = False,
) -> dict[str, Any]:
    """Base and tuned on the rows of `data` (base alone where there is no adapter); see compare.compare for the result.

    general: ask the built-in general set too, to see what training broke (`general` in the result).

    Raises RecipeError for a metric that does not exist, DataError for rows that are wrong or cannot be scored,
    ModelError for the model; all but the last before the model loads.
    """
    known_metric(metric)
    rows = read_conversations(data)
    asked = questions(rows)
    if not asked:
        raise DataError(f"{data}: no row ends with an assistant turn", fix="give rows with the right answers")
    golds = [(question.conversation.file, question.conversation.line) for question in asked]
    check_golds(metric, [question.gold for question in asked], golds)
    if general and adapter_folder(name) is None:
        raise RecipeError(f"--general: {name} has no adapter, so there is nothing to compare", fix="leave it out")
    model = load(name, quantization=quantization, force=force)
    result = {"run": name, **compare(model, rows, metric=metric, max_new_tokens=max_new_tokens, advance=advance)}
    result["notes"] = list(model.notes)
    if general:
        result["general"] = compare_general(model, advance)
    if is_run(Path(name)):
        add_to_report(RunFolder(Path(name)), result)
    return result


def add_to_report(folder: RunFolder, result: dict[str, Any]) -> None:
    """Puts scores, intervals and some samples into report.json and report.html of a run."""
    report = (
        json.loads(folder.report.read_text(encoding="utf-8")) if folder.report.is_file() else {"run": str(folder.path)}
    )
    every = max(1, len(result["samples"]) // SAMPLES_IN_REPORT)  # spread over the rows, misses as they come
    report["evaluation"] = {
        key: value for key, value in result.items() if key not in ("samples", "intervals", "run", "general")
    }
    report["intervals"] = result["intervals"]
    if "general" in result:
        report["general"] = result["general"]
    report["samples"] = result["samples"][::every][:SAMPLES_IN_REPORT]
    write_json(folder.report, report)
    write_report(folder.path, report, read_events(folder.events))
