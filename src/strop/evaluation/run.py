"""`strop eval`: a model by name, rows by name; the result also goes into the run's report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from strop.config.schema import DataSection
from strop.data.formats import DOCUMENT, PAIRED, ConversationReader
from strop.data.reading.sources import read_rows
from strop.data.row_errors import RowError
from strop.data.store import digest, dump_conversation
from strop.data.types import Conversation
from strop.distributed.devices import ALONE, Devices
from strop.errors import DataError, RecipeError, RunError, Where, nearest
from strop.evaluation.compare import FIGURES, Advance, Side, as_judged, calling, compare, left_out, questions, side_of
from strop.evaluation.general import compare_general
from strop.evaluation.held_out import count_train_rows, recipe_of, trained_on
from strop.evaluation.judge import Judge, compare_by_judge, judge_for
from strop.evaluation.lm_eval import check_tasks, run_tasks
from strop.evaluation.metrics import check_golds, paired_difference, verdict
from strop.evaluation.metrics import metric as known_metric
from strop.evaluation.model_card import write_card
from strop.evaluation.preferences import METRIC, compare_preferences
from strop.evaluation.report import write_report
from strop.models.adapters import adapter_folder, is_reward, load, load_renderer, refuse_other_kind
from strop.runs.events import read_events
from strop.runs.folder import RunFolder, is_run, write_json

SAMPLES_IN_REPORT = 20
READ_BY = ("data.format", "data.columns", "data.encoding")  # the fields of a recipe that eval takes too


def read_conversations(
    data: str | Sequence[str],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    encoding: str = "utf-8",
) -> list[Conversation]:
    """All rows of the data as conversations: all of them pairs, or none. format, columns, encoding: as in a recipe.

    Raises DataError naming every row that is wrong.
    """
    bad: list[RowError] = []
    rows = read_rows(data, encoding=encoding, columns=columns, bad=bad, documents=format == DOCUMENT)
    reader = ConversationReader(rows, format=format, columns=columns, bad=bad)
    found = list(reader)
    kinds = {"pairs" if name in PAIRED else name for name in reader.formats.values()}
    if "labelled" in kinds:
        fix = "give rows with right answers, or pairs"
        raise DataError("answers that were judged good or bad are not all right answers", fix=fix)
    if bad:
        raise DataError(f"{len(bad)} rows are wrong", fix="mend or remove them", where=[fault.where for fault in bad])
    if "pairs" in kinds and len(kinds) > 1:
        raise DataError("pairs and other rows in one evaluation", fix="give them in two commands")
    return found


def reading(names: Sequence[str], options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(how rows are read: format, columns, encoding; notes on what is taken from a run). options: data.format and such,
    as given; what is not given is as in the recipes of the runs.

    Raises RecipeError for another option, and where the runs differ in one that is not given.
    """
    if unknown := sorted(set(options) - set(READ_BY)):
        raise RecipeError(f"--{unknown[0]}: no option of eval{nearest(unknown[0], READ_BY)}", fix=", ".join(READ_BY))
    how, notes = {name.removeprefix("data."): value for name, value in options.items()}, []
    sections = [recipe.data for recipe in map(recipe_of, names) if recipe is not None]
    for field in (name.removeprefix("data.") for name in READ_BY if name not in options):
        found = [getattr(section, field) for section in sections]
        if any(value != found[0] for value in found):
            what = f"the runs were trained with different data.{field}: {', '.join(map(_as_option, found))}"
            raise RecipeError(what, fix=f"say how the rows are to be read: --data.{field}")
        usual = DataSection.model_fields[field].default
        if found and found[0] != usual:
            how[field] = found[0]
            said = f"rows are read with the run's data.{field}, {_as_option(found[0])}"
            notes.append(f"{said}; for others give --data.{field} {_as_option(usual)}")
    return how, notes


def _as_option(value: str | Mapping[str, str] | None) -> str:
    """A recipe's value as the command line takes it."""
    pairs = value.items() if isinstance(value, Mapping) else ()
    return ",".join(f"{name}={column}" for name, column in pairs) or str(value or "none")


def evaluate_models(
    names: Sequence[str],
    data: str | Sequence[str],
    *,
    metric: str = "exact",
    max_new_tokens: int = 80,
    advance: Advance | None = None,
    quantization: str = "auto",
    force: bool = False,
    general: bool = False,
    regression_data: str | Sequence[str] = (),
    regression_metric: str | None = None,
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    devices: Devices = ALONE,
    judge: str | None = None,
    judge_model: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Base and tuned on the rows of `data` (base alone where there is no adapter), for each model in turn; what
    compare.compare returns (of pairs, preferences.compare_preferences), `run`, `notes` (sentences), and `train_rows`:
    how many of the rows the run was trained on, None where that is not known. A base that several have in common is
    asked once.

    general: ask the built-in general set too, to see what training broke (`general` in the result).
    regression_data: rows of the user's own for the same purpose (`regression`); regression_metric: theirs, or metric.
    tasks: of lm-evaluation-harness (`tasks`), where it is installed; task_limit: documents of each.
    devices: those that the rows are dealt out to.
    judge: which of base's and tuned's answers is better (`judge` in the result): file.py:function, or a server's
    address; judge_model: which of the server's models.
    options: how rows are read (see reading).

    Raises RecipeError for a metric that does not exist, DataError for rows that are wrong or cannot be scored,
    ModelError for the model; all but the last before the model loads. RunError where the judge fails: what was
    answered is in the report, and in its so_far.
    """
    if regression_metric and not regression_data:
        raise RecipeError("--regression-metric: there are no rows for it", fix="give --regression-data")
    if tasks and devices.world_size > 1:
        raise RecipeError("--tasks: the harness runs on one device", fix="ask for tasks in a command of their own")
    if task_limit and not tasks:
        raise RecipeError("--task-limit: there are no tasks", fix="give --tasks")
    judging = _judging(judge, judge_model, metric)
    how, notes = reading(names, options or {})
    scorable = partial(_scorable, names, how, notes)
    rows = scorable(data, metric)
    kept = scorable(regression_data, regression_metric or metric) if regression_data else []
    said = digest(b"\n".join(map(dump_conversation, [*rows, *kept])))
    given = {
        "the models": list(names),
        "metric": metric,
        "max_new_tokens": max_new_tokens,
        "quantization": quantization,
    }
    given |= {"general": general, "regression_metric": regression_metric, "judge": judge, "judge_model": judge_model}
    devices.require_same({**given, "what the rows say": said})
    if _is_paired(rows) and (general or kept or tasks or judging):
        raise RecipeError(
            "pairs: nothing is written, so there is nothing else to ask", fix="leave --general and such out"
        )
    if _is_paired(kept):
        raise RecipeError("--regression-data: pairs", fix="evaluate them in a command of their own: --data")
    for name in names:
        if (general or kept or judging) and adapter_folder(name) is None:
            flag = "--general" if general else "--regression-data" if kept else "--judge"
            raise RecipeError(f"{flag}: {name} has no adapter, so there is nothing to compare", fix="leave it out")
    paired = _is_paired(rows)
    names_of_tasks, manager = check_tasks(tasks) if tasks else ([], None)
    bases: dict[tuple[str, str, str], Side] = {}
    results = []
    for name in names:
        named = rows if paired else [question.conversation for question in questions(rows)]
        known = devices.run_on_main(partial(trained_on, name, named))
        scores = (folder := adapter_folder(name)) is not None and is_reward(folder)
        if scores and not paired:
            refuse_other_kind(folder or Path(name), scores=False)
        with devices.all_or_none():
            model = load(name, quantization=quantization, force=force, scores=scores)
        if paired:
            result = {
                "run": name,
                **compare_preferences(model, rows, advance, devices),
                "notes": [*model.notes, *notes],
            }
            count_train_rows(result, known)
            del model
            if devices.is_main and is_run(Path(name)):
                _keep(RunFolder(Path(name)), result)
            results.append(result)
            continue
        same = (str(model.source), model.quantization, model.renderer.fingerprint)
        asking = partial(compare, model, max_new_tokens=max_new_tokens, advance=advance, devices=devices)
        found = asking(rows, metric=metric, base=bases.get(same))
        bases[same] = side_of(found, "base")
        result = {"run": name, **found, "notes": [*model.notes, *notes]}
        count_train_rows(result, known)
        if "interrupted" in found:
            general, kept, tasks, judging = False, [], (), None
        in_report = devices.is_main and is_run(Path(name))
        if in_report and (general or kept or tasks or judging is not None):  # which may fail, or be stopped
            _keep(RunFolder(Path(name)), result)
        if general:
            result["general"] = compare_general(model, advance, devices)
        if kept:
            result["regression"] = asking(kept, metric=regression_metric or metric)
            if "interrupted" in result["regression"]:
                tasks, judging = (), None
        if tasks:
            result["tasks"] = run_tasks(model, names_of_tasks, manager, task_limit)
        asked = questions(rows, model.renderer) if judging is not None else []
        told = partial(as_judged, model.renderer, asked)
        if not model.renderer.reasoning_ends and any(
            model.renderer.shows_reasoning(row.messages[-1]) for row in rows if row.messages
        ):
            result["notes"] += ["where reasoning ends is not to be seen in an answer's text: all of it is judged"]
        del model, asking
        if judging is not None:
            texts = [told(side_of(found, side).texts) for side in ("base", "tuned")]
            ask = partial(compare_by_judge, judging, str(judge), asked, texts[0], texts[1], advance)
            try:
                result["judge"] = devices.run_on_main(ask)
            except RunError as fault:
                fault.partial_result = result
                raise
        if in_report:
            _keep(RunFolder(Path(name)), result)
        results.append(result)
        if "interrupted" in found or "interrupted" in result.get("regression", {}):
            break
    return results


def _judging(judge: str | None, model: str | None, metric: str) -> Judge | None:
    if judge is None:
        if model is not None:
            raise RecipeError("--judge-model: there is no judge", fix="give --judge")
        return None
    if metric == "choice":
        raise RecipeError("--judge: nothing is written with --metric choice", fix="use another metric")
    return judge_for(judge, model)


def leaderboard(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The models by their score, best first: {run, score, low, high, loss, behind: {value, low, high}, verdict}; one
    that was interrupted has not answered the same rows, and is left out. loss: None of a reward model.

    behind: the score less the best one's, on the same rows, with its interval; the verdict is on that difference.
    """
    sides = [(result, "tuned" if "tuned" in result else "base") for result in results if "interrupted" not in result]
    ordered = sorted(sides, key=lambda pair: (-pair[0][pair[1]][pair[0]["metric"]], pair[0][pair[1]].get("loss", 0.0)))
    best = side_of(*ordered[0])
    board = []
    for result, side in ordered:
        own = side_of(result, side)
        behind = paired_difference(best.hits, own.hits)
        low, high = result["intervals"][side]
        board.append({
            "run": result["run"], "score": own.scores[result["metric"]], "low": low, "high": high,
            "loss": own.scores.get("loss"), "behind": asdict(behind), "verdict": verdict(behind)[0],
        })  # fmt: skip
    return board


def _is_paired(rows: Sequence[Conversation]) -> bool:
    return bool(rows and rows[0].rejected)


def _scorable(
    names: Sequence[str], how: Mapping[str, Any], notes: Sequence[str], data: str | Sequence[str], metric: str
) -> list[Conversation]:
    """The rows of the data, read as `how` and `notes` say, to be scored for these models. Raises DataError where they
    cannot be."""
    if metric != METRIC and (own := known_metric(metric).name) in FIGURES:
        what = f"metric {metric}: {own} is what another figure of an evaluation is called"
        raise RecipeError(what, fix="give the function another name")
    try:
        rows = read_conversations(data, **how)
    except DataError as fault:
        fault.fix = "; ".join(filter(None, [fault.fix, *notes]))
        raise
    if _is_paired(rows):
        if metric not in ("exact", METRIC):  # exact: nobody asked for another
            raise RecipeError(f"--metric {metric}: pairs have no single right answer", fix=f"--metric {METRIC}")
        return rows
    if metric == METRIC:
        raise RecipeError(f"--metric {METRIC}: the rows are no pairs", fix="give rows with chosen and rejected")
    called = [Where(row.file, row.line, "the right answer is a call") for row in calling(rows)]
    if called and metric == "choice":
        raise DataError("choice: calls are no answers to choose among", fix="use another metric", where=called)
    for renderer in map(load_renderer, names) if called else [None]:
        asked = questions(rows, renderer)
        if not asked:
            what = f"{data if isinstance(data, str) else ', '.join(data)}: no row ends with an answer to score"
            if all(row.text is not None for row in rows):
                fix = "give rows with the right answers; the loss on text is in the report of a run with --data.eval"
                raise DataError(f"{what}: it is plain text", fix=fix)
            raise DataError(what, fix="give rows with the right answers", where=left_out(rows))
        places = [(question.conversation.file, question.conversation.line) for question in asked]
        check_golds(metric, [question.gold for question in asked], places)
    return rows


def _keep(folder: RunFolder, result: dict[str, Any]) -> None:
    """Puts a result into the run's report; where that cannot be written, says so in its notes: it took long to find. An
    evaluation that was interrupted is not put in the place of a whole one."""
    before = folder.read_report().get("evaluation") or {}
    if "interrupted" in result and before and "interrupted" not in before:
        kept = f"the report of {folder.path} keeps the evaluation from before, of {before.get('rows')} rows"
        result["notes"].append(f"interrupted: {kept}")
        return
    try:
        add_to_report(folder, result)
    except OSError as error:
        note = f"not put into the report of {folder.path}: {os.strerror(error.errno or 0).lower()}"
        if note not in result["notes"]:
            result["notes"].append(note)


def add_to_report(folder: RunFolder, result: dict[str, Any]) -> None:
    """Puts scores, intervals and some samples into report.json and report.html of a run; all samples: answers.json."""
    report = folder.read_report() or {"run": str(folder.path)}
    every = max(1, len(result["samples"]) // SAMPLES_IN_REPORT)  # spread over the rows, misses as they come
    report["evaluation"] = {
        key: value
        for key, value in result.items()
        if key not in ("samples", "intervals", "run", "general", "regression", "tasks")
    }
    report["intervals"] = result["intervals"]
    report |= {key: result[key] for key in ("general", "tasks") if key in result}
    whole = "regression" in report and "interrupted" not in report["regression"]
    if "regression" in result and not (whole and "interrupted" in result["regression"]):
        report["regression"] = {key: value for key, value in result["regression"].items() if key != "samples"}
    report["samples"] = result["samples"][::every][:SAMPLES_IN_REPORT]
    write_json(folder.answers, {"metric": result["metric"], "samples": result["samples"]})
    write_json(folder.report, report)
    write_report(folder.path, report, read_events(folder.events))
    if "recipe" in report:
        write_card(folder.adapter, report)
