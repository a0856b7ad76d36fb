"""`strop eval`: evaluate models by name on data by name, and store the result in the run's report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from strop.config.load import read_resolved
from strop.config.schema import DataSection, Recipe
from strop.data.formats import DOCUMENT, PAIRED, ConversationReader
from strop.data.prepare import prepare
from strop.data.reading.sources import read_rows
from strop.data.row_errors import RowError
from strop.data.store import digest, dump_conversation
from strop.data.types import Conversation, DataKind
from strop.distributed.devices import ALONE, Devices
from strop.engine.decode.model import Model, load, load_renderer
from strop.errors import DataError, InputError, RecipeError, RunError, Where, nearest
from strop.evaluation.compare import (
    FIGURES,
    Advance,
    Side,
    compare,
    judged_texts,
    left_out,
    make_questions,
    side_of,
)
from strop.evaluation.general import check_tasks, compare_general, run_tasks
from strop.evaluation.judge import Judge, compare_by_judge, judge_for
from strop.evaluation.metrics import check_golds, paired_difference, verdict
from strop.evaluation.metrics import metric as metric_named
from strop.evaluation.model_card import write_card
from strop.evaluation.preferences import METRIC, compare_preferences
from strop.evaluation.report import write_report
from strop.models.adapters import adapter_folder, base_source, check_adapter_kind, is_reward_adapter, tokenizer_source
from strop.models.tokenizer import load_tokenizer
from strop.objectives.table import data_kind_of
from strop.runs.events import read_events
from strop.runs.folder import RunFolder, cache_folder, is_run, write_json

SAMPLES_IN_REPORT = 20
READ_FIELDS = ("data.format", "data.columns", "data.encoding")  # recipe fields that are options of eval too


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    metric: str = "exact"  # name of the metric, or file.py:function
    max_new_tokens: int = 80  # longest answer
    quantization: str = "auto"  # how the base is stored
    force: bool = False  # load a model that does not match its adapter
    general: bool = False  # also ask the built-in general set, to see what training broke (`general` in the result)
    regression_data: str | Sequence[str] = ()  # rows of the user that should not get worse (`regression` in the result)
    regression_metric: str | None = None  # their metric; default: `metric`
    tasks: Sequence[str] = ()  # tasks of lm-evaluation-harness, if it is installed (`tasks` in the result)
    task_limit: int | None = None  # number of documents of each task
    judge: str | None = None  # compares base's and tuned's answers: file.py:function, or the address of a server
    judge_model: str | None = None  # which of the server's models
    read: Mapping[str, Any] = field(default_factory=dict)  # how rows are read: values of READ_FIELDS


def evaluate_models(
    names: Sequence[str],
    data: str | Sequence[str],
    options: EvalOptions | None = None,
    *,
    advance: Advance | None = None,
    devices: Devices = ALONE,
) -> list[dict[str, Any]]:
    """Evaluate base and tuned model on the rows of `data`, for each model; without an adapter, the base only."""
    # Returns compare.compare's (for pairs, compare_preferences's) result of each, with `run`, `notes` and `train_rows`:
    # the number of rows that the run was trained on, None if unknown. Input errors but ModelError are raised before a
    # model loads. A RunError of the judge has the answers as `partial_result`.
    options = options or EvalOptions()
    request = _check_request(names, data, options, advance, devices)
    bases: dict[tuple[str, str, str], Side] = {}
    results = []
    for name in names:
        if _is_paired(request.rows):
            results.append(_evaluate_pairs(name, request))
            continue
        results.append(_evaluate_answers(name, request, bases))
        if "interrupted" in results[-1] or "interrupted" in results[-1].get("regression", {}):
            break
    return results


@dataclass(frozen=True)
class _Request:
    options: EvalOptions
    rows: list[Conversation]
    regression: list[Conversation]  # rows that should not get worse
    notes: list[str]  # how the rows are read
    judge: Judge | None
    tasks: list[str]  # of lm-evaluation-harness
    manager: Any  # the harness's task manager
    advance: Advance | None
    devices: Devices


def _check_request(
    names: Sequence[str], data: str | Sequence[str], options: EvalOptions, advance: Advance | None, devices: Devices
) -> _Request:
    """Check all options and rows, before a model loads."""
    if options.regression_metric and not options.regression_data:
        raise RecipeError("--regression-metric: there are no rows for it", fix="give --regression-data")
    if options.tasks and devices.world_size > 1:
        raise RecipeError("--tasks: the harness runs on one device", fix="run tasks in a separate command")
    if options.task_limit and not options.tasks:
        raise RecipeError("--task-limit: there are no tasks", fix="give --tasks")
    if options.judge is None and options.judge_model is not None:
        raise RecipeError("--judge-model: there is no judge", fix="give --judge")
    if options.judge is not None and options.metric == "choice":
        raise RecipeError("--judge: nothing is generated with --metric choice", fix="use another metric")
    judge = None if options.judge is None else judge_for(options.judge, options.judge_model)
    read, notes = read_options(names, options.read)
    rows = _scorable_rows(names, read, notes, data, options.metric)
    regression: list[Conversation] = []
    if options.regression_data:
        regression_metric = options.regression_metric or options.metric
        regression = _scorable_rows(names, read, notes, options.regression_data, regression_metric)
    fields = "metric", "max_new_tokens", "quantization", "general", "regression_metric", "judge", "judge_model"
    values = {name: getattr(options, name) for name in fields}
    content = digest(b"\n".join(map(dump_conversation, [*rows, *regression])))
    devices.require_same({"the models": list(names), **values, "the content of the rows": content})
    if _is_paired(rows) and (options.general or regression or options.tasks or judge):
        fix = "leave --general, --regression-data, --tasks and --judge out"
        raise RecipeError("pairs: nothing is generated, so nothing else can be evaluated", fix=fix)
    if _is_paired(regression):
        raise RecipeError("--regression-data: pairs", fix="evaluate them in a separate command: --data")
    for name in names:
        if (options.general or regression or judge) and adapter_folder(name) is None:
            flag = "--general" if options.general else "--regression-data" if regression else "--judge"
            raise RecipeError(f"{flag}: {name} has no adapter, so there is nothing to compare", fix="leave it out")
    tasks, manager = check_tasks(options.tasks) if options.tasks else ([], None)
    return _Request(options, rows, regression, notes, judge, tasks, manager, advance, devices)


def _evaluate_pairs(name: str, request: _Request) -> dict[str, Any]:
    train_rows = request.devices.run_on_main(partial(trained_on, name, request.rows))
    folder = adapter_folder(name)
    model = _load(name, request, scores=folder is not None and is_reward_adapter(folder))
    compared = compare_preferences(model, request.rows, request.advance, request.devices)
    result = {"run": name, **compared, "notes": [*model.notes, *request.notes]}
    count_train_rows(result, train_rows)
    if request.devices.is_main and is_run(Path(name)):
        _store(RunFolder(Path(name)), result)
    return result


def _evaluate_answers(name: str, request: _Request, bases: dict[tuple[str, str, str], Side]) -> dict[str, Any]:
    """Evaluate one model. bases: results of the bases that were evaluated before, which are used and extended."""
    options, advance, devices = request.options, request.advance, request.devices
    rows = [question.conversation for question in make_questions(request.rows)]
    train_rows = devices.run_on_main(partial(trained_on, name, rows))
    folder = adapter_folder(name)
    if folder is not None and is_reward_adapter(folder):
        check_adapter_kind(folder, scores=False)
    model = _load(name, request)
    base_key = (str(model.source), model.quantization, model.renderer.fingerprint)
    compare_rows = partial(compare, model, max_new_tokens=options.max_new_tokens, advance=advance, devices=devices)
    compared = compare_rows(request.rows, metric=options.metric, base=bases.get(base_key))
    bases[base_key] = side_of(compared, "base")
    result = {"run": name, **compared, "notes": [*model.notes, *request.notes]}
    count_train_rows(result, train_rows)
    store = devices.is_main and is_run(Path(name))
    judge = None if "interrupted" in compared else request.judge
    if "interrupted" not in compared:
        if store and (options.general or request.regression or request.tasks or judge is not None):
            _store(RunFolder(Path(name)), result)  # the following may fail, or be stopped
        if options.general:
            result["general"] = compare_general(model, advance, devices)
        if request.regression:
            regression_metric = options.regression_metric or options.metric
            result["regression"] = compare_rows(request.regression, metric=regression_metric)
        if "interrupted" in result.get("regression", {}):
            judge = None
        elif request.tasks:
            result["tasks"] = run_tasks(model, request.tasks, request.manager, options.task_limit)
    renderer = model.renderer
    answers = [row.messages[-1] for row in request.rows if row.messages]
    if not renderer.reasoning_ends and any(renderer.shows_reasoning(answer) for answer in answers):
        result["notes"] += ["the end of the reasoning is not marked in an answer's text, so all of it is judged"]
    del model, compare_rows  # frees the memory, as the judge may be another model
    if judge is not None:
        questions = make_questions(request.rows, renderer)
        base, tuned = (judged_texts(renderer, questions, side_of(result, side).texts) for side in ("base", "tuned"))
        call = partial(compare_by_judge, judge, str(options.judge), questions, base, tuned, advance)
        try:
            result["judge"] = devices.run_on_main(call)
        except RunError as fault:
            fault.partial_result = result
            raise
    if store:
        _store(RunFolder(Path(name)), result)
    return result


def _load(name: str, request: _Request, *, scores: bool = False) -> Model:
    with request.devices.all_or_none():
        return load(name, quantization=request.options.quantization, force=request.options.force, scores=scores)


def leaderboard(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rank models by score, best first: {run, score, low, high, loss, behind: {value, low, high}, verdict}."""
    # Interrupted ones, which have not answered the same rows, are left out. `loss` is None for a reward model.
    # `behind`: score minus the best score on the same rows, and the verdict is on that difference.
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


def read_conversations(
    data: str | Sequence[str],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    encoding: str = "utf-8",
) -> list[Conversation]:
    """Read all rows of the data as conversations: either all are pairs, or none."""
    bad: list[RowError] = []
    rows = read_rows(data, encoding=encoding, columns=columns, bad=bad, documents=format == DOCUMENT)
    reader = ConversationReader(rows, format=format, columns=columns, bad=bad)
    parsed = list(reader)
    kinds = {"pairs" if name in PAIRED else name for name in reader.formats.values()}
    if "labelled" in kinds:
        fix = "give rows with right answers, or pairs"
        raise DataError("answers labelled good or bad are not all right answers", fix=fix)
    if bad:
        raise DataError(f"{len(bad)} rows are wrong", fix="fix or remove them", where=[fault.where for fault in bad])
    if "pairs" in kinds and len(kinds) > 1:
        raise DataError("pairs and other rows in one evaluation", fix="evaluate them in two commands")
    return parsed


def read_options(names: Sequence[str], options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return how rows are read (format, columns, encoding), by default as in the runs' recipes, and notes."""
    if unknown := sorted(set(options) - set(READ_FIELDS)):
        what = f"--{unknown[0]}: not an option of eval{nearest(unknown[0], READ_FIELDS)}"
        raise RecipeError(what, fix=", ".join(READ_FIELDS))
    read, notes = {name.removeprefix("data."): value for name, value in options.items()}, []
    sections = [recipe.data for recipe in map(recipe_of, names) if recipe is not None]
    for name in (name.removeprefix("data.") for name in READ_FIELDS if name not in options):
        values = [getattr(section, name) for section in sections]
        if any(value != values[0] for value in values):
            what = f"the runs were trained with different data.{name}: {', '.join(map(_as_option, values))}"
            raise RecipeError(what, fix=f"choose how to read the rows: --data.{name}")
        default = DataSection.model_fields[name].default
        if values and values[0] != default:
            read[name] = values[0]
            note = f"rows are read with the run's data.{name}, {_as_option(values[0])}"
            notes.append(f"{note}; for others give --data.{name} {_as_option(default)}")
    return read, notes


def _as_option(value: str | Mapping[str, str] | None) -> str:
    pairs = value.items() if isinstance(value, Mapping) else ()
    return ",".join(f"{name}={column}" for name, column in pairs) or str(value or "none")


def _is_paired(rows: Sequence[Conversation]) -> bool:
    return bool(rows and rows[0].rejected)


def _scorable_rows(
    names: Sequence[str], read: Mapping[str, Any], notes: Sequence[str], data: str | Sequence[str], metric: str
) -> list[Conversation]:
    """Read the rows of the data and check that these models' answers can be scored."""
    if metric != METRIC and (name := metric_named(metric).name) in FIGURES:
        what = f"metric {metric}: {name} is the name of another figure of an evaluation"
        raise RecipeError(what, fix="give the function another name")
    try:
        rows = read_conversations(data, **read)
    except DataError as fault:
        fault.fix = "; ".join(filter(None, [fault.fix, *notes]))
        raise
    if _is_paired(rows):
        if metric not in ("exact", METRIC):  # exact is the default
            raise RecipeError(f"--metric {metric}: pairs have no single right answer", fix=f"--metric {METRIC}")
        return rows
    if metric == METRIC:
        raise RecipeError(f"--metric {METRIC}: the rows are not pairs", fix="give rows with chosen and rejected")
    # The text of a tool call depends on the chat template.
    called = (row for row in rows if row.answer is not None and row.messages[-1].tool_calls)
    calls = [Where(row.file, row.line, "the right answer is a call") for row in called]
    if calls and metric == "choice":
        raise DataError("choice: tool calls cannot be chosen from", fix="use another metric", where=calls)
    for renderer in map(load_renderer, names) if calls else [None]:
        questions = make_questions(rows, renderer)
        if not questions:
            what = f"{data if isinstance(data, str) else ', '.join(data)}: no row ends with an answer to score"
            if all(row.text is not None for row in rows):
                fix = "give rows with the right answers; the loss on text is in the report of a run with --data.eval"
                raise DataError(f"{what}: it is plain text", fix=fix)
            raise DataError(what, fix="give rows with the right answers", where=left_out(rows))
        places = [(question.conversation.file, question.conversation.line) for question in questions]
        check_golds(metric, [question.gold for question in questions], places)
    return rows


def run_of(name: str) -> RunFolder | None:
    """Return the run of a run folder or of its adapter folder; None for anything else."""
    adapter = adapter_folder(name)
    if adapter is None:
        return None
    run = RunFolder(adapter.parent)
    return run if is_run(run.path) and run.adapter == adapter else None


def recipe_of(name: str) -> Recipe | None:
    """Return the recipe of a run; None for anything else, and for a recipe of an older version."""
    run = run_of(name)
    try:
        return None if run is None else read_resolved(run.recipe).recipe
    except RecipeError:
        return None


def trained_on(name: str, rows: Sequence[Conversation]) -> list[bool] | None:
    """Return for each row whether a run, or a run it started from, was trained on it (by content); None if unknown."""
    # Unknown: there is no run, or its data is unreadable or has changed. Cached rows are not tokenized again.
    try:
        run, recipe = run_of(name), recipe_of(name)
        if run is None or recipe is None:
            return None
        start, source = recipe.model.adapter, base_source(run.adapter)
        before = [False] * len(rows) if start is None else trained_on(start, rows)
        folder = None if start is None else adapter_folder(start)
        tokenizer = load_tokenizer(source if folder is None else tokenizer_source(folder, source))
        data_kind = data_kind_of(recipe.train)
        data = prepare(recipe.data, tokenizer, cache=cache_folder() / "data", data_kind=data_kind)
    except InputError:
        return None
    if before is None or data.hash != run.read_lock()["data"]:
        return None
    train_rows = data.train_conversations
    digests = train_rows.digests if data_kind == "turns" else [_digest(row, data_kind) for row in train_rows]
    own = np.isin([_digest(row, data_kind) for row in rows], digests)
    return [bool(was or now) for was, now in zip(before, own, strict=True)]


def _digest(row: Conversation, data_kind: DataKind) -> int:
    """Return the digest of what is learned from a row: its right answer, or only its prompt. Labels do not count."""
    turns = row.messages[:-1] if data_kind == "prompts" and row.answer is not None else row.messages
    return digest(dump_conversation(replace(row, messages=turns, rejected=(), desirable=None)))


def count_train_rows(result: dict[str, Any], train_rows: Sequence[bool] | None) -> None:
    """Add to a result how many of its rows are also training rows, by `trained_on`, and a note if there are any."""
    result["train_rows"] = None if train_rows is None else sum(train_rows[: result["rows"]])
    if result["train_rows"]:
        what = f"{result['train_rows']} of {result['rows']} rows are also train rows: the run may have memorized them"
        result.setdefault("notes", []).append(what)


def _store(folder: RunFolder, result: dict[str, Any]) -> None:
    """Store a result in the run's report, unless it would replace a complete one, or note why it cannot be."""
    before = folder.read_report().get("evaluation") or {}
    if "interrupted" in result and before and "interrupted" not in before:
        note = f"the report of {folder.path} keeps the earlier evaluation, of {before.get('rows')} rows"
        result["notes"].append(f"interrupted: {note}")
        return
    try:
        add_to_report(folder, result)
    except OSError as error:
        note = f"not stored in the report of {folder.path}: {os.strerror(error.errno or 0).lower()}"
        if note not in result["notes"]:
            result["notes"].append(note)


def add_to_report(folder: RunFolder, result: dict[str, Any]) -> None:
    """Store scores, intervals and some samples in report.json and report.html of a run; all samples in answers.json."""
    report = folder.read_report() or {"run": str(folder.path)}
    every = max(1, len(result["samples"]) // SAMPLES_IN_REPORT)  # evenly spaced, whether hit or miss
    apart = ("samples", "intervals", "run", "general", "regression", "tasks")
    report["evaluation"] = {key: value for key, value in result.items() if key not in apart}
    report["intervals"] = result["intervals"]
    report |= {key: result[key] for key in ("general", "tasks") if key in result}
    complete = "regression" in report and "interrupted" not in report["regression"]
    if "regression" in result and not (complete and "interrupted" in result["regression"]):
        report["regression"] = {key: value for key, value in result["regression"].items() if key != "samples"}
    report["samples"] = result["samples"][::every][:SAMPLES_IN_REPORT]
    write_json(folder.answers, {"metric": result["metric"], "samples": result["samples"]})
    write_json(folder.report, report)
    write_report(folder.path, report, read_events(folder.events))
    if "recipe" in report:
        write_card(folder.adapter, report)
