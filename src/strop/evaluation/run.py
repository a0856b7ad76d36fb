"""Implement `strop eval`: evaluate models on data files, and store the result in the run's report."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from strop.config.load import resolve
from strop.config.schema import DataSection, Recipe
from strop.data.formats import DOCUMENT, PAIRED, ConversationReader
from strop.data.reading.sources import read_rows
from strop.data.row_errors import FIXES, RenderError, RowError
from strop.data.store import digest, dump_conversation
from strop.data.types import Conversation, DataKind
from strop.distributed.devices import SINGLE_PROCESS, Devices
from strop.engine.decode.model import Model, load, load_renderer
from strop.engine.device import pick_device, pick_generation_dtype, prepare_process
from strop.errors import DataError, Location, ModelError, RecipeError, RunError, suggest
from strop.evaluation.classes import ACCURACY, check_labels, compare_classes
from strop.evaluation.compare import (
    EXTRA_SCORES,
    Progress,
    Side,
    compare,
    find_rows_without_answer,
    make_questions,
    read_side,
    remove_reasoning,
)
from strop.evaluation.environment_rewards import compare_traces, difference_of, make_prompts
from strop.evaluation.environments import check_hash, hash_file
from strop.evaluation.general import check_tasks, compare_general, run_tasks
from strop.evaluation.judge import Judge, compare_by_judge, make_judge
from strop.evaluation.metrics import (
    DEFAULT_METRIC,
    MEAN_REWARD,
    PREFERENCE,
    Estimate,
    are_json_objects,
    check_golds,
    describe_cut,
    find_metric,
    paired_difference,
    why_unfair,
)
from strop.evaluation.model_card import write_card
from strop.evaluation.preferences import compare_preferences
from strop.evaluation.report import write_report
from strop.evaluation.retrieval import NEAREST, compare_retrieval
from strop.evaluation.rewards import Rows, check_rewards, parse_rewards
from strop.evaluation.traces import make_tracer
from strop.evaluation.train_rows import add_row_notes, find_recipe, find_run, find_train_rows, prepare_train_rows
from strop.models.adapter_config import (
    WEIGHTS_FILE,
    AdapterKind,
    adapter_folder,
    adapter_kind,
    check_adapter_kind,
    is_tuned,
    read_identity,
)
from strop.models.adapters import read_classes
from strop.models.load import refuse_classifier, refuse_embedder
from strop.models.source import locate
from strop.objectives import require
from strop.runs.events import read_events
from strop.runs.folder import RunFolder, is_run, write_json
from strop.runs.lock import sha256_file

SAMPLES_IN_REPORT = 20
FURTHER_PARTS = {"general": "the general set", "regression": "the regression rows", "tasks": "tasks"}  # of a result
TEXT_MODELS: dict[AdapterKind, tuple[str, str, DataKind]] = {  # what they are, their metric and their rows
    "classifier": ("a classifier", ACCURACY, "classes"),
    "embedder": ("a model of embeddings", NEAREST, "triplets"),
}
READ_FIELDS = (
    "data.format",
    "data.columns",
    "data.encoding",
    "data.image_folder",
)  # recipe fields that are options of eval too


JSON_HINT = (
    "all right answers are JSON objects, which are compared as text here: with --metric exact_json, spaces and the "
    "order of the names do not matter"
)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    metric: str | None = None  # name of a metric, or file.py:function; default: DEFAULT_METRIC, or that of the model
    limit: int | None = None  # maximum number of rows, and of rows of regression_data
    max_new_tokens: int | None = None  # maximum length of an answer; default: see `compare`
    quantization: str = "auto"  # quantization of the base
    dtype: str = "auto"  # of its other weights
    force: bool = False  # load the adapter even if the base differs from the one it was trained on
    general: bool = False  # also run the built-in general questions, to find regressions (`general` in the result)
    regression_data: str | Sequence[str] = ()  # data to check for regressions (`regression` in the result)
    regression_metric: str | None = None  # metric for regression_data; default: `metric`
    tasks: Sequence[str] = ()  # tasks of lm-evaluation-harness, if it is installed (`tasks` in the result)
    task_limit: int | None = None  # maximum number of documents per task
    judge: str | None = None  # decides which answer is better: file.py:function, or a server's URL
    judge_model: str | None = None  # name of the model on that server
    base: bool = True  # False scores tuned models alone, without the base and a classifier's baseline
    reading: Mapping[str, Any] = field(default_factory=dict)  # values of READ_FIELDS that override the run's

    @property
    def answer_metric(self) -> str:
        """Metric of answers."""
        return self.metric or DEFAULT_METRIC


def evaluate_models(
    names: Sequence[str],
    data: str | Sequence[str],
    options: EvalOptions | None = None,
    *,
    advance: Progress | None = None,
    devices: Devices = SINGLE_PROCESS,
) -> list[dict[str, Any]]:
    """Evaluate each model, with and without its adapter, on the rows of `data`.

    Returns for each model the result of `compare` (of `compare_preferences` if the rows are pairs, and of
    `compare_classes` for a classifier, of `compare_retrieval` for a model of embeddings) with `run`, `notes` and
    `train_rows`, the number of rows that are also training rows (None if unknown). Options and rows are checked before
    a model is loaded. If the judge fails, `partial_result` of the RunError has the other results.
    """
    try:
        return _evaluate_models(names, data, options or EvalOptions(), advance, devices)
    except RenderError as error:
        if "--data." in error.fix:  # an option of training
            error.fix = "remove these rows: a model is evaluated with the template and the options of its training"
        raise


def _evaluate_models(
    names: Sequence[str], data: str | Sequence[str], options: EvalOptions, advance: Progress | None, devices: Devices
) -> list[dict[str, Any]]:
    request = _check_request(names, data, options, advance, devices)
    if options.limit is not None:
        request = _limit_rows(request, options.limit)
    bases: dict[tuple[str, ...], Side] = {}
    results = []
    for name in names:
        if request.environments:
            results.append(_evaluate_environment(name, request))
            continue
        if request.kind != "text":
            evaluate = _evaluate_classes if request.kind == "classifier" else _evaluate_retrieval
            results.append(evaluate(name, request))
            continue
        if _is_paired(request.rows):
            results.append(_evaluate_pairs(name, request))
            continue
        results.append(_evaluate_answers(name, request, bases))
        if why_incomplete(results[-1]):
            break
    return results


def why_incomplete(result: Mapping[str, Any]) -> str | None:
    """Return where Ctrl-C ended an evaluation, or None."""
    unfinished: str | None = result.get("interrupted") or result.get("regression", {}).get("interrupted")
    if "unfinished" in result:
        unfinished = f"in {result['unfinished']}; the scores of the rows are complete"
    return unfinished


@dataclass(frozen=True)
class _Request:
    options: EvalOptions
    rows: list[Conversation]
    regression: list[Conversation]  # the rows of regression_data
    trained_dtype: str | None  # of the runs, if all have the same
    notes: list[str]  # about run settings that change how the rows are read
    judge: Judge | None
    tasks: list[str]  # names of tasks of lm-evaluation-harness
    task_manager: Any  # the harness's TaskManager
    advance: Progress | None
    devices: Devices
    kind: AdapterKind = "text"  # of the adapters: text also for reward models
    environments: Mapping[str, Recipe] = field(default_factory=dict)  # recipes of runs with train.environment, by name
    columns: Rows = field(default_factory=dict)  # of the rows, for environments
    left_out: Sequence[Location] = ()  # rows without a right answer, for environments
    all_rows: Sequence[Conversation] = ()  # without --limit; () stands for `rows`
    all_regression: Sequence[Conversation] = ()


def _check_request(
    names: Sequence[str], data: str | Sequence[str], options: EvalOptions, advance: Progress | None, devices: Devices
) -> _Request:
    """Read the rows and check all options. Raises InputError before a model is loaded."""
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
    judge = None if options.judge is None else make_judge(options.judge, options.judge_model)
    reading, notes = choose_reading_options(names, options.reading)
    for name in names:
        if adapter_folder(name) is None:
            refuse_classifier(locate(name))
            refuse_embedder(locate(name))
    environments = {name: recipe for name in names if (recipe := find_environment(name)) is not None}
    if environments and options.metric not in ("choice", PREFERENCE):
        return _check_environment_request(environments, names, data, options, reading, notes, advance, devices)
    for kind in TEXT_MODELS:
        models = [name for name in names if (folder := adapter_folder(name)) and adapter_kind(folder) == kind]
        if models:
            return _check_text_request(kind, names, models, data, options, reading, notes, advance, devices)
    rows = read_scorable_rows(names, reading, notes, data, options.answer_metric)
    regression: list[Conversation] = []
    if options.regression_data:
        regression_metric = options.regression_metric or options.answer_metric
        regression = read_scorable_rows(names, reading, notes, options.regression_data, regression_metric)
    fields = "metric", "max_new_tokens", "quantization", "dtype", "general", "regression_metric", "judge", "judge_model"
    values = {name: getattr(options, name) for name in fields}
    content = digest(b"\n".join(map(dump_conversation, [*rows, *regression])))
    devices.require_same({"the models": list(names), **values, "the content of the rows": content})
    if _is_paired(rows) and options.metric == DEFAULT_METRIC:  # given, not the default
        raise _refuse_metric_of_pairs(options.metric)
    if _is_paired(rows) and (options.general or regression or options.tasks or judge):
        fix = "leave --general, --regression-data, --tasks and --judge out"
        raise RecipeError("pairs: nothing is generated, so nothing else can be evaluated", fix=fix)
    if _is_paired(regression):
        raise RecipeError("--regression-data: pairs", fix="evaluate them in a separate command: --data")
    for name in names:
        if (options.general or regression or judge) and not is_tuned(name):
            flag = "--general" if options.general else "--regression-data" if regression else "--judge"
            raise RecipeError(f"{flag}: {name} has no adapter, so there is nothing to compare", fix="leave it out")
    tasks, task_manager = check_tasks(options.tasks) if options.tasks else ([], None)
    dtypes = {read_identity(folder).get("dtype") for folder in map(adapter_folder, names) if folder is not None}
    trained_dtype = dtypes.pop() if len(dtypes) == 1 else None
    return _Request(options, rows, regression, trained_dtype, notes, judge, tasks, task_manager, advance, devices)


def _limit_rows(request: _Request, limit: int) -> _Request:
    """Return the request with at most `limit` rows, evenly chosen, because files may be sorted."""
    if limit < 1:
        raise RecipeError(f"--limit {limit}: below 1", fix="give a number of rows")
    notes = [*request.notes]

    def choose(rows: list[Conversation], label: str) -> list[Conversation]:
        if len(rows) <= limit:
            return rows
        notes.append(f"{limit:,} of {len(rows):,} {label}, evenly chosen (--limit)")
        return [rows[number * len(rows) // limit] for number in range(limit)]

    rows, regression = choose(request.rows, "rows"), choose(request.regression, "regression rows")
    return replace(
        request, rows=rows, regression=regression, notes=notes, all_rows=request.rows,
        all_regression=request.regression,
    )  # fmt: skip


def find_environment(name: str) -> Recipe | None:
    """Return the recipe of a run with train.environment, or None."""
    recipe = find_recipe(name)
    return recipe if recipe is not None and recipe.train.environment is not None else None


def _check_environment_request(
    environments: Mapping[str, Recipe], names: Sequence[str], data: str | Sequence[str], options: EvalOptions,
    reading: dict[str, Any], notes: list[str], advance: Progress | None, devices: Devices,
) -> _Request:  # fmt: skip
    """Read the rows of runs in an environment, and check the options."""
    if other := next((name for name in names if name not in environments), None):
        what = f"{other}: not a run with train.environment, unlike {next(iter(environments))}"
        raise RecipeError(what, fix="evaluate it in a separate command")
    if options.regression_data or options.tasks or options.judge:
        fix = "leave --regression-data, --tasks and --judge out, or merge the run and evaluate that model"
        raise RecipeError("an environment: only traces in it are evaluated", fix=fix)
    if devices.world_size > 1:
        raise RecipeError("an environment: traces are sampled on one device", fix="leave --devices out")
    rows = read_conversations(data, data_kind="prompts", **reading)
    if not rows:
        raise DataError("no rows to evaluate on", fix="give rows with prompts")
    left_out: list[Location] = []
    if options.metric not in (None, MEAN_REWARD):
        left_out = find_rows_without_answer(rows)
        rows = [row for row in rows if row.answer is not None and row.messages[-1].weight]
        if not rows:
            what = f"--metric {options.metric}: no row ends with an answer to score"
            fix = f"give rows with the right answers, or leave --metric out to evaluate {MEAN_REWARD}"
            if reading.get("format") == "prompt":  # as in the run
                fix = f"--data.format prompt-completion (format prompt reads no answers), or {fix}"
            raise DataError(what, fix=fix, where=left_out)
        places = [(row.file, row.line) for row in rows]
        if note := check_golds(str(options.metric), [str(row.answer) for row in rows], places):
            notes.append(note)
    columns, encoding = reading.get("columns"), reading.get("encoding", "utf-8")
    values = {(row.file, row.line): row.value for row in read_rows(data, encoding=encoding, columns=columns, errors=[])}
    return _Request(
        options, rows, [], None, notes, None, [], None, advance, devices, environments=environments, columns=values,
        left_out=left_out,
    )  # fmt: skip


def _evaluate_environment(name: str, request: _Request) -> dict[str, Any]:
    """Evaluate a run with train.environment on traces in it."""
    recipe, run, options = request.environments[name], find_run(name), request.options
    spec = recipe.train.environment
    assert run is not None and spec is not None
    check_hash(spec, run.read_lock().get("environment"), hash_file(spec), force=options.force)
    train = recipe.train
    if options.max_new_tokens is not None:
        train = train.model_copy(update={"answer_tokens": options.max_new_tokens})
    model = _load(name, request)
    if options.general and not model.has_base:
        raise ModelError(f"{name}: its base is not there to compare with", fix="restore it, or leave --general out")
    rewards = parse_rewards(train.rewards)
    tracer = make_tracer(train, recipe.data.max_length, model.renderer, request.columns)
    prompts = make_prompts(model, request.rows)
    if rewards:
        check_rewards(rewards, prompts, request.columns, require(train.reward_timeout))
    metric = None if options.metric in (None, MEAN_REWARD) else options.metric
    compared = compare_traces(
        model, request.rows, prompts, tracer, rewards, recipe.seed, request.advance, metric=metric,
        with_base=options.base and model.has_base,
    )  # fmt: skip
    result = _start_result(name, model, compared, request)
    result["environment"] = spec
    result["notes"] += describe_cut(compared)
    if metric is not None:
        result["left_out"] = [asdict(location) for location in request.left_out]
    if options.general:
        result["general"] = compare_general(model, request.advance, request.devices)
        result["notes"] += [f"general set: {text}" for text in describe_cut(result["general"])]
    add_row_notes(result, request.rows, find_train_rows(name, request.rows))
    if is_run(Path(name)):
        _store(RunFolder(Path(name)), result)
    return result


def _check_text_request(
    kind: AdapterKind, names: Sequence[str], models: Sequence[str], data: str | Sequence[str], options: EvalOptions,
    reading: dict[str, Any], notes: list[str], advance: Progress | None, devices: Devices,
) -> _Request:  # fmt: skip
    """Read the rows of models that classify or embed texts, and check the options. models: those of this kind."""
    what, metric, data_kind = TEXT_MODELS[kind]
    if len(models) < len(names):
        other = next(name for name in names if name not in models)
        raise RecipeError(f"{other}: not {what}, unlike {models[0]}", fix="evaluate it in a separate command")
    if options.metric not in (None, metric):
        raise RecipeError(f"--metric {options.metric}: {what} gives no text", fix=f"--metric {metric}")
    if options.general or options.regression_data or options.tasks or options.judge:
        fix = "leave --general, --regression-data, --tasks and --judge out"
        raise RecipeError(f"{what} generates nothing, so nothing else can be evaluated", fix=fix)
    needed, columns = "a text and a label", "text=COLUMN,label=COLUMN"
    if kind == "embedder":
        needed, columns = "an anchor and a positive", "anchor=COLUMN,positive=COLUMN"
    try:
        rows = read_conversations(data, data_kind=data_kind, **reading)
    except DataError as error:
        if error.fix == FIXES["missing-column"]:  # of all wrong rows
            error.what = f"{models[0]} is {what}: its rows need {needed}, which {len(error.where)} rows do not have"
            error.fix = f"give rows with {needed}, or name their columns with --data.columns {columns}"
        raise
    if not rows:
        raise DataError("no rows to evaluate on", fix=f"give rows with {needed}")
    for name in names if kind == "classifier" else ():
        folder = adapter_folder(name)
        assert folder is not None
        check_labels(rows, read_classes(folder))
    devices.require_same(
        {"the models": list(names), "the content of the rows": digest(b"\n".join(map(dump_conversation, rows)))}
    )
    return _Request(options, rows, [], None, notes, None, [], None, advance, devices, kind)


def _evaluate_classes(name: str, request: _Request) -> dict[str, Any]:
    train_rows = request.devices.run_on_main(partial(find_train_rows, name, request.rows))
    prepared = prepare_train_rows(name) if request.options.base else None
    model = _load(name, request)
    train_texts = None if prepared is None else prepared.train_conversations
    compared = compare_classes(model, request.rows, train_texts, request.advance, request.devices)
    notes = compared.pop("notes") if request.options.base else compared.pop("notes")[:0]
    result = _start_result(name, model, compared, request)
    result["notes"] += notes
    add_row_notes(result, request.rows, train_rows)
    if request.devices.is_main and is_run(Path(name)):
        _store(RunFolder(Path(name)), result)
    return result


def _evaluate_retrieval(name: str, request: _Request) -> dict[str, Any]:
    rows = list({row.text: row for row in reversed(request.rows)}.values())[::-1]  # the first of each anchor
    trained = request.devices.run_on_main(partial(find_train_rows, name, request.rows))
    known = {row.text for row, is_known in zip(request.rows, trained or (), strict=False) if is_known}
    train_rows = None if trained is None else [row.text in known for row in rows]
    prepared = prepare_train_rows(name)
    model = _load(name, request)
    train_texts = None if prepared is None else prepared.train_conversations
    compared = compare_retrieval(
        model, request.all_rows or request.rows, request.advance, request.devices, with_base=request.options.base,
        train_rows=train_texts, queries=request.rows if request.all_rows else (),
    )  # fmt: skip
    notes = compared.pop("notes")
    result = _start_result(name, model, compared, request)
    result["notes"] += notes
    add_row_notes(result, rows, train_rows)
    if request.devices.is_main and is_run(Path(name)):
        _store(RunFolder(Path(name)), result)
    return result


def _evaluate_pairs(name: str, request: _Request) -> dict[str, Any]:
    train_rows = request.devices.run_on_main(partial(find_train_rows, name, request.rows))
    folder = adapter_folder(name)
    model = _load(name, request, scores=folder is not None and adapter_kind(folder) == "reward")
    with_base = request.options.base
    compared = compare_preferences(model, request.rows, request.advance, request.devices, with_base=with_base)
    result = _start_result(name, model, compared, request)
    add_row_notes(result, request.rows, train_rows)
    if request.devices.is_main and is_run(Path(name)):
        _store(RunFolder(Path(name)), result)
    return result


def _evaluate_answers(name: str, request: _Request, bases: dict[tuple[str, ...], Side]) -> dict[str, Any]:
    """Evaluate one model. bases: cache of the results of base models, to which this one is added."""
    options, advance, devices = request.options, request.advance, request.devices
    rows = [question.conversation for question in make_questions(request.rows)]
    train_rows = devices.run_on_main(partial(find_train_rows, name, rows))
    folder = adapter_folder(name)
    if folder is not None:
        check_adapter_kind(folder, "text")
    model = _load(name, request)
    if not model.has_base and (options.general or request.regression or request.judge):
        raise ModelError(f"{name}: its base is not there to compare with", fix="restore it, or evaluate --data alone")
    base_key = (str(model.untuned or model.source), model.quantization, model.dtype, model.renderer.fingerprint)
    compare_rows = partial(compare, model, max_new_tokens=options.max_new_tokens, advance=advance, devices=devices)
    known_base = bases.get(base_key)
    compared = compare_rows(
        request.rows, metric=options.answer_metric, base=known_base, with_base=options.base, all_rows=request.all_rows
    )
    if "base" in compared:
        bases[base_key] = read_side(compared, "base")
    result = _start_result(name, model, compared, request)
    result["notes"] += describe_cut(compared)
    add_row_notes(result, rows, train_rows)
    if options.metric is None and are_json_objects([sample["gold"] for sample in compared["samples"]]):
        result["notes"] += [JSON_HINT]
    should_store = devices.is_main and is_run(Path(name))
    interrupted = "interrupted" in compared
    questions, renderer = make_questions(request.rows, model.renderer), model.renderer
    answers = [row.messages[-1] for row in request.rows if row.messages]
    if not renderer.reasoning_ends and any(renderer.shows_reasoning(answer) for answer in answers):
        result["notes"] += ["the end of the reasoning is not marked in an answer's text, so all of it is judged"]
    further = options.general or request.regression or request.tasks or request.judge is not None
    if should_store and further and not interrupted:
        measured = {"general": options.general, "regression": request.regression, "tasks": request.tasks}
        pending = [part for part, is_measured in measured.items() if is_measured]
        _store(RunFolder(Path(name)), result, pending)  # in case one of the evaluations below fails
    part = ""
    try:
        if options.general and not interrupted:
            part = "the general set"
            result["general"] = compare_general(model, advance, devices)
            result["notes"] += [f"general set: {text}" for text in describe_cut(result["general"])]
        if request.regression and not interrupted:
            part, metric = "the regression rows", options.regression_metric or options.answer_metric
            result["regression"] = compare_rows(request.regression, metric=metric, all_rows=request.all_regression)
            interrupted = "interrupted" in result["regression"]
            result["notes"] += [f"regression rows: {text}" for text in describe_cut(result["regression"])]
        if request.tasks and not interrupted:
            part = "the tasks"
            result["tasks"] = run_tasks(model, request.tasks, request.task_manager, options.task_limit)
        del model, compare_rows  # free memory, because the judge may load another model
        if request.judge is not None and not interrupted:
            part, sides = "the judge", [read_side(result, name) for name in ("base", "tuned")]
            base, tuned = (remove_reasoning(renderer, questions, side.texts) for side in sides)
            call = partial(compare_by_judge, request.judge, str(options.judge), questions, base, tuned, advance)
            result["judge"] = devices.run_on_main(call)
    except RunError as error:
        error.partial_result = result
        raise
    except KeyboardInterrupt:  # the scores of the rows are complete
        if devices.world_size > 1:
            raise
        result["unfinished"] = part
    if should_store:
        _store(RunFolder(Path(name)), result)
    return result


def _start_result(name: str, model: Model, compared: dict[str, Any], request: _Request) -> dict[str, Any]:
    notes = [*model.notes, *request.notes]
    recipe = find_recipe(name)
    if "tuned" in compared and "base" in compared and recipe is not None and recipe.model.adapter is not None:
        start = recipe.model.adapter
        notes.append(f"base is the model without adapters, so what {start} had learned before this run counts too")
    return {"run": name, **compared, "quantization": model.quantization, "dtype": model.dtype, "notes": notes}


def _load(name: str, request: _Request, *, scores: bool = False) -> Model:
    options, dtype = request.options, request.options.dtype
    with request.devices.all_or_none():
        if dtype == "auto" and adapter_folder(name) is None and request.trained_dtype is not None:
            prepare_process()
            dtype, _ = pick_generation_dtype(pick_device("auto"), request.trained_dtype)  # as the runs beside it
        return load(name, dtype=dtype, quantization=options.quantization, force=options.force, scores=scores)


def rank_models(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rank models by score, best first: {run, score, low, high, loss, behind: {value, low, high}, verdict}.

    `behind` is the best score minus this one, paired by row. `verdict` is "best" for the first, and then "worse", or
    "unclear", also where one of both evaluations is unfair. `loss` is None for a reward model, and if the models divide
    the answers into different numbers of tokens. Interrupted evaluations are omitted, because they cover fewer rows.
    """
    entries: list[tuple[dict[str, Any], str, Side]] = []
    for result in results:
        if result["metric"] == MEAN_REWARD:
            return _rank_by_reward(results)
        if "interrupted" not in result:
            name = "tuned" if "tuned" in result else "base"
            entries.append((result, name, read_side(result, name)))
    same_tokens = len({result.get("supervised_tokens") for result, _, _ in entries}) == 1

    def loss_of(side: Side) -> float | None:
        return side.scores.get("loss") if same_tokens else None

    entries.sort(key=lambda entry: (-entry[2].scores[entry[0]["metric"]], loss_of(entry[2]) or 0.0))
    ranking: list[dict[str, Any]] = []
    for result, name, side in entries:
        behind = paired_difference(*_common_hits((result, side.hits), (entries[0][0], entries[0][2].hits)))
        low, high = result["intervals"][name]
        ranking.append({
            "run": result["run"], "score": side.scores[result["metric"]], "low": low, "high": high,
            "loss": loss_of(side),
            **_describe_gap(behind, is_best=not ranking, is_fair=not (why_unfair(entries[0][0]) or why_unfair(result))),
        })  # fmt: skip
    return ranking


def _common_hits(*sides: tuple[dict[str, Any], list[bool]]) -> list[list[bool]]:
    """Return the hits of two models on the rows of both, without anchors that are equal by the tokens of one only.

    sides: the result of an evaluation and its hits.
    """
    if any(result["metric"] != NEAREST for result, _ in sides):
        return [hits for _, hits in sides]
    by_place = [{row["place"]: hit for row, hit in zip(result["samples"], hits, strict=True)} for result, hits in sides]
    places = [place for place in by_place[0] if place in by_place[1]]
    return [[hits[place] for place in places] for hits in by_place]


def _rank_by_reward(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rank runs in environments by their mean reward, as `rank_models`."""
    side = {id(result): "tuned" if "tuned" in result else "base" for result in results}
    ordered = sorted(results, key=lambda result: -result[side[id(result)]][MEAN_REWARD])
    rewards = [[row[f"{side[id(result)]}_reward"] for row in result["samples"]] for result in ordered]
    ranking: list[dict[str, Any]] = []
    for result, values in zip(ordered, rewards, strict=True):
        behind, (low, high) = difference_of(values, rewards[0]), result["intervals"][side[id(result)]]
        ranking.append({
            "run": result["run"], "score": result[side[id(result)]][MEAN_REWARD], "low": low, "high": high,
            "loss": None, **_describe_gap(behind, is_best=not ranking),
        })  # fmt: skip
    return ranking


def _describe_gap(behind: Estimate, *, is_best: bool, is_fair: bool = True) -> dict[str, Any]:
    """Return the fields of a leaderboard's entry about its distance from the best, which has none from itself."""
    if is_best:
        return {"behind": asdict(Estimate(0.0, 0.0, 0.0)), "verdict": "best"}
    return {"behind": asdict(behind), "verdict": "worse" if behind.low > 0 and is_fair else "unclear"}


def read_conversations(
    data: str | Sequence[str],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    encoding: str = "utf-8",
    image_folder: str | None = None,
    data_kind: DataKind = "turns",
) -> list[Conversation]:
    """Read all rows of the data as conversations. Raises DataError if only some are preference pairs."""
    errors: list[RowError] = []
    rows = read_rows(data, encoding=encoding, columns=columns, errors=errors, documents=format == DOCUMENT)
    reader = ConversationReader(
        rows, format=format, columns=columns, errors=errors, data_kind=data_kind, image_folder=image_folder,
        trains=False,
    )  # fmt: skip
    parsed = list(reader)
    kinds = {"pairs" if name in PAIRED else name for name in reader.formats.values()}
    if "classification" in kinds and data_kind != "classes":
        raise DataError("rows with the classes of texts", fix="give a run of --train.objective classify")
    if "triplet" in kinds and data_kind != "triplets":
        raise DataError("rows of texts that match", fix="give a run of --train.objective embed")
    if "labelled" in kinds:
        what = "rows labelled good or bad cannot be scored, because a bad answer is not a reference answer"
        raise DataError(what, fix="give rows with right answers, or pairs")
    if errors:
        where = [error.where for error in errors]
        fixes = sorted({FIXES.get(error.code, "correct or remove these rows") for error in errors})
        raise DataError(f"{len(errors)} rows are wrong", fix="; ".join(fixes), where=where)
    if "pairs" in kinds and len(kinds) > 1:
        raise DataError("pairs and other rows in one evaluation", fix="evaluate them in two commands")
    return parsed


def choose_reading_options(names: Sequence[str], options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the format, columns and encoding of the rows, by default from the runs' recipes, and notes about them."""
    if unknown := sorted(set(options) - set(READ_FIELDS)):
        what = f"--{unknown[0]}: not an option of eval{suggest(unknown[0], READ_FIELDS)}"
        raise RecipeError(what, fix=f"of the recipe's fields, give only {', '.join(READ_FIELDS)}")
    given = {option: None if value == "none" else value for option, value in options.items()}
    section = resolve(None, {"model.name": "demo", "data.train": "-", **given}).recipe.data  # checks the values
    reading, notes = {name: getattr(section, name) for name in (option.removeprefix("data.") for option in given)}, []
    sections = [recipe.data for recipe in map(find_recipe, names) if recipe is not None]
    for name in (option.removeprefix("data.") for option in READ_FIELDS if option not in options):
        values = [getattr(section, name) for section in sections]
        if any(value != values[0] for value in values):
            what = f"the runs were trained with different data.{name}: {', '.join(map(_format_option, values))}"
            raise RecipeError(what, fix=f"choose how to read the rows: --data.{name}")
        default = DataSection.model_fields[name].default
        if values and values[0] != default:
            reading[name] = values[0]
            note = f"rows are read with the run's data.{name}, {_format_option(values[0])}"
            notes.append(f"{note}; for others give --data.{name} {_format_option(default)}")
    return reading, notes


def _format_option(value: str | Mapping[str, str] | None) -> str:
    pairs = value.items() if isinstance(value, Mapping) else ()
    return ",".join(f"{name}={column}" for name, column in pairs) or str(value or "none")


def _is_paired(rows: Sequence[Conversation]) -> bool:
    return bool(rows and rows[0].rejected)


def _refuse_metric_of_pairs(metric: str) -> RecipeError:
    return RecipeError(f"--metric {metric}: pairs have no single right answer", fix=f"--metric {PREFERENCE}")


def read_scorable_rows(
    names: Sequence[str], reading: Mapping[str, Any], notes: list[str], data: str | Sequence[str], metric: str
) -> list[Conversation]:
    """Read the rows and check that the metric can score the models' answers to them. notes: what it finds is added."""
    if metric != PREFERENCE and (name := find_metric(metric).name) in EXTRA_SCORES:
        what = f"metric {metric}: the name {name} is already used for another score in the result"
        raise RecipeError(what, fix="give the function another name")
    try:
        rows = read_conversations(data, **reading)
    except DataError as error:
        error.fix = "; ".join(filter(None, [error.fix, *notes]))
        raise
    if _is_paired(rows):
        if metric not in (DEFAULT_METRIC, PREFERENCE):
            raise _refuse_metric_of_pairs(metric)
        return rows
    if metric == PREFERENCE:
        raise RecipeError(f"--metric {PREFERENCE}: the rows are not pairs", fix="give rows with chosen and rejected")
    calls = [
        Location(row.file, row.line, "the right answer is a call")
        for row in rows
        if row.answer is not None and row.messages[-1].tool_calls
    ]
    if calls and metric == "choice":
        raise DataError("choice: tool calls cannot be chosen from", fix="use another metric", where=calls)
    # The text of a tool call depends on the chat template, so check it with each model's renderer.
    for renderer in map(load_renderer, names) if calls else [None]:
        questions = make_questions(rows, renderer)
        if not questions:
            what = f"{data if isinstance(data, str) else ', '.join(data)}: no row ends with an answer to score"
            if all(row.text is not None for row in rows):
                fix = "give rows with the right answers; the loss on text is in the report of a run with --data.eval"
                raise DataError(f"{what}: it is plain text", fix=fix)
            raise DataError(what, fix="give rows with the right answers", where=find_rows_without_answer(rows))
        locations = [(question.conversation.file, question.conversation.line) for question in questions]
        if (note := check_golds(metric, [question.gold for question in questions], locations)) not in ("", *notes):
            notes.append(note)
    return rows


def _store(folder: RunFolder, result: dict[str, Any], pending: Collection[str] = ()) -> None:
    """Store a result in the run's report. A complete result is not replaced by an interrupted one.

    pending: parts of the result that will be measured next.
    """
    before = folder.read_report().get("evaluation") or {}
    if "interrupted" in result and before and "interrupted" not in before:
        note = f"the report of {folder.path} keeps the earlier evaluation, of {before.get('rows')} rows"
        result["notes"].append(f"interrupted: {note}")
        return
    if before.get("rows", 0) > result["rows"]:
        note = f"these {result['rows']:,} rows replace the earlier {before['rows']:,} in the report of {folder.path}"
        if note not in result["notes"]:
            result["notes"].append(note)
    try:
        add_to_report(folder, result, pending)
    except OSError as error:
        note = f"not stored in the report of {folder.path}: {os.strerror(error.errno or 0).lower()}"
        if note not in result["notes"]:
            result["notes"].append(note)


def add_to_report(folder: RunFolder, result: dict[str, Any], pending: Collection[str] = ()) -> None:
    """Write a result to the run's report.json, report.html and model card, and all samples to answers.json.

    The general set, regression rows and tasks of an earlier evaluation are kept if it had the same quantization, dtype
    and adapter, and otherwise removed with a note. pending: see `_store`.
    """
    report = folder.read_report() or {"run": str(folder.path)}
    excluded = ("samples", "intervals", "run", *FURTHER_PARTS)
    weights = folder.adapter / WEIGHTS_FILE
    stored = {**result, "adapter": sha256_file(weights) if weights.is_file() else None}
    earlier = report.get("evaluation") or {}
    before, after = (
        {name: value.get(name) for name in ("quantization", "dtype", "adapter")}
        for value in ({"adapter": stored["adapter"]} | earlier, stored)
    )
    if "evaluation" in report and before != after:
        removed = [part for part in FURTHER_PARTS if report.pop(part, None) and part not in result]
        if names := " and ".join(FURTHER_PARTS[part] for part in removed if part not in pending):
            changed = [name for name, value in before.items() if value != after[name]]
            settings = ", ".join(
                "another adapter" if name == "adapter" else f"{name} {before[name]}" for name in changed
            )
            result["notes"].append(f"removed from the report: earlier scores of {names}, measured with {settings}")
    report["evaluation"] = {key: value for key, value in stored.items() if key not in excluded}
    report["intervals"] = result["intervals"]
    report |= {key: result[key] for key in ("general", "tasks") if key in result}
    has_complete = "regression" in report and "interrupted" not in report["regression"]
    if "regression" in result and not (has_complete and "interrupted" in result["regression"]):
        report["regression"] = {key: value for key, value in result["regression"].items() if key != "samples"}
    interval = max(1, len(result["samples"]) // SAMPLES_IN_REPORT)  # evenly spaced samples are representative
    report["samples"] = result["samples"][::interval][:SAMPLES_IN_REPORT]
    write_json(folder.answers, {"metric": result["metric"], "samples": result["samples"]})
    write_json(folder.report, report)
    write_report(folder.path, report, read_events(folder.events))
    if "recipe" in report:
        write_card(folder, report)
