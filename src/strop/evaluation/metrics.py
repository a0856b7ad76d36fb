"""Metrics that score an answer as a hit or a miss, and statistics of their results.

The right answer of a row is called its gold answer.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
import os
import re
import runpy
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from strop.data.reading.json_reader import loads
from strop.data.row_errors import type_name
from strop.data.types import Conversation
from strop.display.numbers import format_decimals, format_percent
from strop.errors import DataError, Location, RecipeError, RunError, first_line, suggest
from strop.runs.lock import sha256_file

LOG = logging.getLogger(__name__)
# User-defined functions may raise any exception, and call exit() if they run an answer as code.
USER_CODE_ERRORS = (Exception, SystemExit)
_RETURN_FIX = "return True or False, for example `return ... >= 0.8`"
MAX_SEARCH_S = 5.0  # CPU time to search one answer: a pattern like (a+)+b takes exponential time on aaaa...
METRIC_ARGUMENTS = ("right answer", "answer")  # positional arguments of a user-defined metric
# Names of the first and the second parameter which show that a function expects other arguments.
_NON_GOLD_PARAMETERS = {"prompt", "prompts", "question", "questions", "messages", "completions"}
GOLD_PARAMETERS = {  # names of a parameter which show that it is the right answer
    *("gold", "golden", "right", "right_answer", "correct", "correct_answer", "reference", "ref", "target", "expected"),
    *("truth", "ground_truth", "label", "solution", "y_true"),
}
_NON_ANSWER_PARAMETERS = _NON_GOLD_PARAMETERS | GOLD_PARAMETERS
MAX_OPTIONS = 50  # of the metric choice, which computes the loss of each option for each row
WORD_PATTERN = r"[^\W_]+|[\W_]"  # a word, or a character between words
MIN_SIMILARITY = 0.6  # differences are marked only between answers that are at least this similar
Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
T_95 = (12.7062, 4.3027, 3.1824, 2.7764)  # the same of Student's t distribution, for 1 to 4 degrees of freedom
MIN_CLAIM_ROWS = 3  # two equal coins differ clearly in 12.5 % of pairs of tosses; from 3 rows on, in 3 to 7 %
SMALL_ROWS = 20  # below it, a verdict says how many rows there are
SCORE_NAMES = {  # field of base and tuned -> its name in tables and reports
    "stop_rate": "answers that stopped", "tokens_per_answer": "tokens per answer", "valid_json": "valid JSON",
    "preference_sum": "preference, summed", "margin": "margin of rewards", "macro_f1": "macro F1",
    "micro_f1": "micro F1", "accuracy_at_1": "accuracy@1", "recall_at_10": "recall@10", "ndcg_at_10": "nDCG@10",
    "mrr": "MRR", "mean_reward": "reward", "tool_calls": "tool calls", "tool_errors": "tool errors",
    "truncated": "traces cut at a limit",
}  # fmt: skip
DEFAULT_METRIC = "exact"  # of answers
MEAN_REWARD = "mean_reward"  # metric of runs with train.environment
PREFERENCE = "preference"  # metric of pairs
MODEL_METRICS = (PREFERENCE, "accuracy", "accuracy_at_1", MEAN_REWARD)  # of pairs, classifiers, embeddings, traces
NUMBERS = {
    "loss": 3,
    "perplexity": 3,
    "tokens_per_answer": 1,
    "turns": 2,
    "tool_calls": 2,
    "tool_errors": 2,
}  # decimals
RETRIEVAL_SCORES = ("accuracy_at_1", "recall_at_10", "ndcg_at_10", "mrr")
Judgement = dict[str, bool]  # scores of one answer: first the hit, under the metric's name, then additional scores


class MetricError(Exception):
    """The user's function has failed on an answer, which counts as a miss."""


@dataclass(frozen=True)
class Metric:
    name: str  # key of the hit in a judgement
    # (gold, answer) -> judgement; raises ValueError for a gold answer that the metric cannot use, MetricError for an
    # answer on which the user's function fails
    judge: Callable[[str, str], Judgement]
    function: Callable[[str, str], Any] | None = None  # the user's function, for a metric `file.py:function`


class FunctionName(str):
    """The name of a function that a Python program gives as a metric or a judge, with the function."""

    function: Callable[..., Any]

    def __new__(cls, function: Callable[..., Any]) -> FunctionName:
        name = str.__new__(cls, getattr(function, "__name__", type(function).__name__).strip("<>"))
        _refuse_known_name(name, name)
        name.function = function
        return name


@dataclass(frozen=True)
class Scores:
    """Scores of several answers: the hit of each row, and the share of rows (0 to 1) for each score name."""

    metric: str
    hits: tuple[bool, ...]
    rates: dict[str, float]
    errors: tuple[str, ...] = ()  # of the user's function, one for each answer on which it failed

    @property
    def failures(self) -> dict[str, Any]:
        """The number of errors and the first one, or nothing."""
        return {"count": len(self.errors), "first": self.errors[0]} if self.errors else {}


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def _normalize_spaces(text: str) -> str:
    return " ".join(text.split())


def _equal(name: str, gold: str, answer: str) -> Judgement:
    return {name: _normalize_spaces(gold) == _normalize_spaces(answer)}


def _contains(gold: str, answer: str) -> Judgement:
    return {"contains": _normalize_spaces(gold).casefold() in _normalize_spaces(answer).casefold()}


def _regex(gold: str, answer: str) -> Judgement:
    try:
        with time_limit(MAX_SEARCH_S):
            return {"regex": re.search(gold, answer) is not None}
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from error
    except TimeoutError:
        message = "searching the pattern %.80r takes more than %g s in the answer %.80r: counted as a miss"
        LOG.warning(message, gold, MAX_SEARCH_S, answer)
        return {"regex": False}


@contextmanager
def time_limit(seconds: float, *, cpu_time: bool = True) -> Iterator[None]:
    """Raise TimeoutError if the block takes longer, in CPU time or in wall-clock time.

    There is no limit on Windows and outside the main thread.
    """

    def raise_timeout(*_: object) -> None:
        raise TimeoutError

    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    timer, number = signal.ITIMER_VIRTUAL, signal.SIGVTALRM
    if not cpu_time:
        timer, number = signal.ITIMER_REAL, signal.SIGALRM
    previous_handler = signal.signal(number, raise_timeout)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(number, previous_handler)


def _parse_json_object(text: str) -> tuple[tuple[str, Any], ...]:
    """Parse a JSON object as strictly as rows are read, and normalize it. Raise ValueError for other text."""
    value = loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"JSON, but {type_name(value)}")
    try:
        return cast("tuple[tuple[str, Any], ...]", _normalize_json(value))
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _normalize_text(text: str) -> str:
    return _normalize_spaces(text).casefold()


def _normalize_json(value: Any) -> Any:
    """Return a value that is equal for equal JSON. Names that differ only in case or spaces are all kept, in order."""
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: (_normalize_text(name), name))
        return tuple((_normalize_text(name), _normalize_json(value[name])) for name in names)
    if isinstance(value, list):
        return [_normalize_json(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 1.0 and 1 are one number
    return _normalize_text(value if isinstance(value, str) else json.dumps(value))


def _exact_json(gold: str, answer: str) -> Judgement:
    try:
        right = _parse_json_object(gold)
    except ValueError as error:
        raise ValueError(f"the gold answer is not a JSON object: {error}") from error
    try:
        parsed, is_valid = _parse_json_object(answer), True
    except ValueError:
        parsed, is_valid = (), False
    judgement = {"exact_json": is_valid and right == parsed, "valid_json": is_valid}
    intents, parsed_intents = ([value for name, value in members if name == "intent"] for members in (right, parsed))
    if intents:
        judgement["intent"] = intents == parsed_intents
    return judgement


def are_json_objects(golds: Sequence[str]) -> bool:
    """Return whether all right answers are JSON objects, for which "exact_json" is the better metric."""
    try:
        return bool(golds) and all(_parse_json_object(gold) is not None for gold in golds)
    except ValueError:
        return False


METRICS: dict[str, Metric] = {
    "exact": Metric("exact", partial(_equal, "exact")),  # equal up to runs of white space
    "exact_json": Metric("exact_json", _exact_json),  # the same JSON object, without any text around it
    "contains": Metric("contains", _contains),  # the answer contains the gold, ignoring case, up to runs of white space
    "regex": Metric("regex", _regex),  # the gold is a pattern that matches somewhere in the answer
    # Classification: the row's gold has the lowest loss among the golds of all rows. No text is generated.
    "choice": Metric("choice", partial(_equal, "choice")),
}


def find_metric(name: str, arguments: Sequence[str] = METRIC_ARGUMENTS) -> Metric:
    """Return a metric by name, or load a user-defined one from `file.py:function`, which takes these arguments."""
    if isinstance(name, FunctionName):
        return _refuse_async(_make_metric(name.function, str(name), name, arguments))
    if not isinstance(name, str):
        if isinstance(name, list | tuple):
            raise RecipeError("metric: one metric, not a list of them", fix="evaluate once with each metric")
        what = f"metric: a name or a function, not {name!r:.80}"
        raise RecipeError(what, fix=f"give one of {', '.join(METRICS)}, 'file.py:function', or a function")
    if ".py:" in name:
        file, _, function = name.rpartition(":")
        _refuse_known_name(function, name)
        return _refuse_async(load_metric("metric", file, function, arguments))
    if name not in METRICS:
        fix = f"use one of {', '.join(METRICS)}, or file.py:function"
        raise RecipeError(f"metric {name} is not known{suggest(name, METRICS)}", fix=fix)
    return METRICS[name]


def _refuse_known_name(function: str, spec: str) -> None:
    if function in (*METRICS, *MODEL_METRICS):
        raise RecipeError(f"{spec}: a function with the name of a built-in metric", fix="rename the function")


def _refuse_async(metric: Metric) -> Metric:
    if inspect.iscoroutinefunction(metric.function):
        raise RecipeError(f"{metric.name}: an async function", fix="only rewards may be async: write `def`")
    return metric


@lru_cache(maxsize=8)
def _run_file(file: str, content_hash: str) -> Mapping[str, Any]:
    """Run the user's file and return its global variables. Cached by content, because the file may load a model.

    The program that is running is not run again: its functions are those of `__main__`.
    """
    main = sys.modules["__main__"]
    if (main_file := getattr(main, "__file__", None)) is not None and os.path.realpath(main_file) == file:
        return vars(main)
    if (folder := os.path.dirname(file)) not in sys.path:  # the file may import modules of its folder at any time
        sys.path.append(folder)
    return runpy.run_path(file)


def _check_parameters(function: Callable[..., Any], name: str, arguments: Sequence[str]) -> None:
    """Raise RecipeError if the function does not accept these arguments, or its parameter names show other ones."""
    fix = f"it gets ({', '.join(arguments)}), in this order"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some C functions have no signature
        return
    try:
        parameters = list(signature.bind(*arguments).arguments)
    except TypeError as error:
        raise RecipeError(f"{name}{signature}: {error}", fix=fix) from None
    if arguments is METRIC_ARGUMENTS:
        for parameter, excluded in zip(parameters, (_NON_GOLD_PARAMETERS, _NON_ANSWER_PARAMETERS), strict=False):
            if parameter.lower() in excluded:
                raise RecipeError(f"{name}{signature}: {parameter} is not an argument it gets", fix=fix)


def load_function(kind: str, file: str, name: str) -> Callable[..., Any]:
    """Return a function of the user's file. kind: what it is used for, such as "metric", for errors."""
    if not Path(file).is_file():
        raise RecipeError(f"{kind} {file}:{name}: no such file", fix="write it as file.py:function")
    try:
        function = _run_file(str(Path(file).resolve()), sha256_file(Path(file))).get(name)
    except USER_CODE_ERRORS as error:
        raise RecipeError(f"{kind} {file}:{name}: {type(error).__name__}: {error}", fix="fix the file") from None
    if not callable(function):
        raise RecipeError(f"{kind} {file}:{name}: no such function in the file", fix="write it as file.py:function")
    return cast("Callable[..., Any]", function)


def load_metric(kind: str, file: str, name: str, arguments: Sequence[str] = METRIC_ARGUMENTS) -> Metric:
    """Return a user-defined metric, which takes these arguments."""
    return _make_metric(load_function(kind, file, name), name, f"{file}:{name}", arguments)


def _make_metric(function: Callable[..., Any], name: str, place: str, arguments: Sequence[str]) -> Metric:
    _check_parameters(function, place, arguments)

    def judge(gold: str, answer: str) -> Judgement:
        try:
            result = function(gold, answer)
        except USER_CODE_ERRORS as error:  # check_golds has called it with the gold, so this answer is the cause
            raise MetricError(f"{type(error).__name__}: {error}") from error
        if not _is_hit_or_miss(result):
            raise RunError(f"{name} returns {result!r:.80} (for the answer {answer[:80]!r})", fix=_RETURN_FIX)
        return {name: bool(result)}

    return Metric(name, judge, function)


def _is_hit_or_miss(result: Any) -> bool:
    """Return whether a result is True, False, 0 or 1. Other numbers are refused, as any nonzero one would be a hit."""
    return isinstance(result, (int, np.integer, np.bool_)) and result in (0, 1)


def check_golds(
    name: str, golds: Sequence[str], locations: Sequence[tuple[str, int]], *, any_number: bool = False
) -> str:
    """Raise DataError if the metric cannot use a row's gold answer. any_number: allow results other than 0 and 1.

    Returns a note if the user's metric is 0 for every gold answer given as the answer, else "".
    """
    metric, invalid, num_accepted = find_metric(name), [], 0
    if name == "choice":
        fewest, most = len({_normalize_spaces(gold) for gold in golds}), len(choice_options(golds))
        if fewest < 2 or most > MAX_OPTIONS:
            what = f"choice: {fewest if fewest < 2 else most} different right answers to choose from"
            raise DataError(f"{what}, not 2 to {MAX_OPTIONS}", fix="use another metric, such as exact")
    for gold, (file, line) in zip(golds, locations, strict=True):
        if metric.function is None:
            try:
                if name in ("contains", "regex") and not _normalize_spaces(gold):
                    raise ValueError("the right answer is empty, so every answer contains it")
                metric.judge(gold, "")
            except ValueError as error:
                invalid.append(Location(file, line, str(error)))
            continue
        try:
            result = metric.function(gold, gold)
        except USER_CODE_ERRORS as error:
            invalid.append(Location(file, line, f"{metric.name} fails on the right answer itself: {error!r}"))
            continue
        if not (any_number or _is_hit_or_miss(result)):
            what = f"metric {name}: {metric.name} returns {result!r:.80} for the right answer of {file}:{line}"
            raise RecipeError(what, fix=_RETURN_FIX)
        num_accepted += any_number or bool(result)
    if invalid:
        fix = "correct these rows or choose another metric"
        if metric.function is not None:
            fix = f"fix {metric.name}, which gets (right answer, answer), or correct these rows"
        raise DataError(f"{len(invalid)} rows cannot be scored with {name}", fix=fix, where=invalid)
    if metric.function is None or num_accepted or not golds:
        return ""
    return f"{metric.name} accepts none of the {len(golds)} right answers as an answer: check what it compares"


def choice_options(golds: Sequence[str]) -> list[str]:
    """Return the distinct gold answers of all rows, between which the metric `choice` chooses.

    Those that differ only in white space are equal to the metric, but may have different likelihoods.
    """
    return list(dict.fromkeys(golds))


def score(name: str, golds: Sequence[str], answers: Sequence[str]) -> Scores:
    """Score at least one answer by a metric. An additional score is included if the metric gives it for every row."""
    metric, rows, errors = find_metric(name), [], []
    for gold, answer in zip(golds, answers, strict=True):
        try:
            rows.append(metric.judge(gold, answer))
        except MetricError as error:
            rows.append({metric.name: False})
            errors.append(f"{first_line(error)[:120]}, for {answer[:80]!r}")
    assert rows, "nothing to score"
    common = [key for key in rows[0] if all(key in row for row in rows)]
    rates = {key: sum(row[key] for row in rows) / len(rows) for key in common}
    return Scores(metric.name, tuple(row[metric.name] for row in rows), rates, tuple(errors))


def is_number(score: str) -> bool:
    """Return whether a score is a number, and not a rate, which is shown in percent."""
    return score in NUMBERS or score == MEAN_REWARD or score.startswith("reward/")


def format_score(score: str, value: float) -> str:
    """Return a score as text: a rate in percent, others as a number."""
    return format_number(score, value) if is_number(score) else format_percent(value)


def format_number(score: str, value: float) -> str:
    """Return a score that is not a rate, with its decimals, but at least three digits, and no decimals from 1,000."""
    return format_decimals(value, NUMBERS.get(score, 3))


def describe_difference(difference: Mapping[str, float], metric: str | None = None) -> tuple[str, str]:
    """Return (better | worse | unclear, sentence). The difference is unclear if its interval contains zero."""
    value, low, high = (difference[end] for end in ("value", "low", "high"))
    kind = "better" if low > 0 else "worse" if high < 0 else "unclear"
    text = "no clear difference" if kind == "unclear" else kind
    if metric is not None and is_number(metric):
        return kind, f"{text}: {value:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    return kind, f"{text}: {100 * value:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"


def why_unfair(result: Mapping[str, Any]) -> list[str]:
    """Return why an evaluation has no verdict: reference answers are longer than the limit, or training rows."""
    reasons = [describe_cut(result)[0]] if result.get("answers", {}).get("references_cut") else []
    if result.get("train_rows"):
        reasons.append(f"{result['train_rows']:,} of {result['rows']:,} rows are also training rows")
    return reasons


def describe_change(result: Mapping[str, Any]) -> tuple[str, str]:
    """Return (better | worse | unclear, sentence) for an evaluation; unclear where it is unfair."""
    kind, text = describe_difference(result["difference"], result.get("metric"))
    reasons = why_unfair(result)
    if not reasons:
        verdict, _, numbers = text.partition(": ")
        return kind, f"{verdict}{describe_few(result.get('rows', SMALL_ROWS))}: {numbers}"
    return "unclear", f"not a fair test, because {' and '.join(reasons)}: {text.partition(': ')[2]}"


def describe_few(number: int, noun: str = "row") -> str:
    """Return ", but only 12 rows" if a verdict is based on few rows, else ""."""
    return f", but only {number} {noun}{'s' * (number != 1)}" if number < SMALL_ROWS else ""


def describe_baseline(result: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return as `describe_change` how a model compares with its baseline; None without one."""
    if "baseline_difference" not in result:
        return None
    kind, text = describe_change({**result, "difference": result["baseline_difference"]})
    return kind, f"compared with {result['baseline_name']}: {text}"


def describe_cut(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence each on references longer than the limit, answers cut at it, and failures of the metric."""
    answers = {"references_cut": 0, **(result.get("answers") or {})}
    cut = {side: count for side in ("base", "tuned") if (count := answers.get(f"{side}_cut"))}
    texts = []
    if answers["references_cut"]:
        limit = f"the limit of {answers['max_tokens']:,} tokens or the model's context"
        texts.append(f"{answers['references_cut']:,} of {result['rows']:,} reference answers are longer than {limit}")
    if cut:
        counts = " and ".join(f"{count:,} of {result['rows']:,} {side} answers" for side, count in cut.items())
        texts.append(f"{counts} were cut at {answers['max_tokens']:,} tokens or the model's context")
    for side, failed in result.get("metric_errors", {}).items():
        misses = f"{result['metric']} failed on {failed['count']:,} of {result['rows']:,} {side} answers"
        texts.append(f"{misses}, which count as misses: {failed['first']}")
    return texts


def list_notes(result: Mapping[str, Any]) -> list[str]:
    """Return the notes of an evaluation, which limit what its scores show; of an older one those on cut answers."""
    notes = result.get("notes")
    return [str(note) for note in notes] if isinstance(notes, list) else describe_cut(result)


def score_name(name: str, metric: str | None) -> str:
    """Return the name to show for a score; the metric keeps the name that --metric takes."""
    return SCORE_NAMES.get(name, name if name == metric else name.replace("_", " "))


def rows_label(result: Mapping[str, Any]) -> str:
    """Return "held-out rows" if it is known that the model was not trained on any of the rows, else "rows"."""
    return "held-out rows" if result.get("train_rows") == 0 else "rows"


def describe_rows(result: Mapping[str, Any]) -> str:
    """Return the number of evaluated rows, with a remark if the evaluation was interrupted."""
    text = f"{result['rows']:,} row{'s' * (result['rows'] != 1)}"
    return f"{text} (interrupted {result['interrupted']})" if "interrupted" in result else text


def format_points(difference: Mapping[str, float]) -> str:
    """Return a difference of rates and its interval in percentage points, such as "+12 (+3 to +21)"."""
    value, low, high = (100 * difference[end] for end in ("value", "low", "high"))
    return f"{value:+.0f} ({low:+.0f} to {high:+.0f})"


def format_task_scores(tasks: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Yield (task, metric, documents, base, tuned, change) as text, from the result of `general.run_tasks`."""
    for task, metrics in tasks.items():
        for name, values in metrics.items():
            difference, texts = values.get("difference"), [values.get(name) for name in ("base", "tuned")]
            change = ""
            if difference:
                change = f"{difference['value']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"
            base, tuned = ("" if value is None else f"{value:.4f}" for value in texts)
            yield task, name, f"{values['documents']:,}", base, tuned, change


def describe_general(result: Mapping[str, Any]) -> str:
    """Describe the change on the general set. Lists kinds that clearly changed, as a gain may hide a loss."""
    text = describe_difference(result["difference"])[1]
    kinds: dict[str, list[str]] = {}  # by better | worse | unclear
    for kind, values in result["kinds"].items():
        kinds.setdefault(describe_difference(values["difference"])[0], []).append(kind)
    parts = [f"{change} at {', '.join(kinds[change])}" for change in ("worse", "better") if change in kinds]
    return f"{text}; by kind: {'; '.join(parts)}" if parts else text


def wilson_interval(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return the score interval for `successes` in `n` >= 1 trials (E. B. Wilson, JASA 22 (1927), 209-212)."""
    assert 0 <= successes <= n and n > 0
    rate = successes / n
    center = rate + z * z / (2 * n)
    half_width = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # For 0 and n successes, one end is exactly 0 or 1 but for rounding errors.
    low = 0.0 if successes == 0 else (center - half_width) / scale
    high = 1.0 if successes == n else (center + half_width) / scale
    return low, high


def mean_interval(values: Sequence[float]) -> list[float]:
    """Return Student's 95 % interval of the mean of two or more values."""
    n, mean = len(values), statistics.fmean(values)
    half_width = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return [mean - half_width, mean + half_width]


def t_quantile(degrees: int, z: float = Z_95) -> float:
    """Return a quantile of Student's t distribution, within 0.2 %.

    z: the same quantile of the standard normal distribution; other levels than the default need 9 degrees of freedom.
    """
    if degrees <= len(T_95):
        assert z == Z_95, "only the default level has a table"
        return T_95[degrees - 1]
    n = degrees  # Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5
    g1, g2 = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / n + g2 / n**2 + g3 / n**3


def paired_difference(base_hits: Sequence[bool], tuned_hits: Sequence[bool]) -> Estimate:
    """Return the hit rate of the tuned model minus that of the base on the same rows (at least one).

    The interval of fewer than MIN_CLAIM_ROWS rows contains 0.
    """
    # R. G. Newcombe, Statistics in Medicine 17 (1998), 2635-2650, method 10: combines the Wilson intervals of both
    # rates with their correlation phi, to which a continuity correction is applied if it is positive.
    pairs = [(bool(tuned), bool(base)) for base, tuned in zip(base_hits, tuned_hits, strict=True)]
    n = len(pairs)
    assert n > 0, "nothing to compare"
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    tuned, base = both + gained, both + lost
    margins = tuned * (n - tuned) * base * (n - base)
    product = float(both * neither - gained * lost)
    if product > 0:
        product = max(product - n / 2, 0.0)
    phi = product / math.sqrt(margins) if margins else 0.0

    tuned_low, tuned_high = (abs(end - tuned / n) for end in wilson_interval(tuned, n))
    base_low, base_high = (abs(end - base / n) for end in wilson_interval(base, n))
    value = (gained - lost) / n
    low = value - math.sqrt(max(0.0, tuned_low**2 - 2 * phi * tuned_low * base_high + base_high**2))
    high = value + math.sqrt(max(0.0, tuned_high**2 - 2 * phi * tuned_high * base_low + base_low**2))
    if n < MIN_CLAIM_ROWS:
        low, high = min(low, 0.0), max(high, 0.0)
    return Estimate(value, max(low, -1.0), min(high, 1.0))


def compare_hits(hits: Mapping[str, Sequence[bool]], rows: Sequence[Conversation]) -> dict[str, Any]:
    """Return the intervals of the hit rates and, for base and tuned, their difference and the changed rows."""
    result: dict[str, Any] = {
        "intervals": {side: list(wilson_interval(sum(values), len(values))) for side, values in hits.items()}
    }
    if len(hits) > 1:
        result["difference"] = asdict(paired_difference(hits["base"], hits["tuned"]))
        changes = list(zip(rows, hits["base"], hits["tuned"], strict=True))
        result["changed"] = {
            "gained": [row.place for row, before, after in changes if after and not before],
            "lost": [row.place for row, before, after in changes if before and not after],
        }
    return result


def mark_differences(gold: str, answer: str) -> list[tuple[str, str]]:
    """Compare an answer with the gold word by word. Return pieces of text, each marked same, added or missing."""
    gold_words, answer_words = (re.findall(WORD_PATTERN, text) for text in (gold, answer))
    matcher = difflib.SequenceMatcher(None, gold_words, answer_words, autojunk=False)
    if matcher.ratio() < MIN_SIMILARITY:
        return [(answer, "same")]
    parts = []
    for tag, a1, a2, b1, b2 in matcher.get_opcodes():
        if tag in ("delete", "replace"):
            parts.append(("".join(gold_words[a1:a2]), "missing"))
        if b2 > b1:
            parts.append(("".join(answer_words[b1:b2]), "same" if tag == "equal" else "added"))
    return parts
