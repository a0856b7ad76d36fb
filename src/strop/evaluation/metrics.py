"""Metrics and rewards: judge an answer as a hit or a miss, aggregate hits with intervals, weight rewards for RL."""

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
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from strop.errors import DataError, RecipeError, RunError, Where, nearest
from strop.runs.lock import sha256_file, sha256_text

LOG = logging.getLogger(__name__)
# Errors of a user-defined function: a parser's own error classes, or exit() in an answer that is evaluated as code.
FAULTS = (Exception, SystemExit)
_RETURN_FIX = "return True or False, for example `return ... >= 0.8`"
MAX_SEARCH_S = 5.0  # CPU time for a pattern in one answer: (a+)+b takes exponential time on aaaa...
METRIC_ARGUMENTS = ("right answer", "answer")  # of a user-defined function, by position
_NOT_THE_GOLD = {"prompt", "prompts", "question", "questions", "messages", "completions"}
_NOT_THE_ANSWER = _NOT_THE_GOLD | {
    *("gold", "right_answer", "reference", "target", "expected", "truth", "ground_truth", "y_true"),
}  # parameter names that show that a function expects other arguments
MAX_OPTIONS = 50  # for the metric choice, which computes the loss of each option for each row
WORD = r"[^\W_]+|[\W_]"  # a word, or a character between words
SIMILAR = 0.6  # differences between less similar answers are not marked
Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
Judgement = dict[str, bool]  # the hit under the metric's name first, then side scores
Interval = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    name: str  # the key of its score
    # (gold, answer) -> judgement; raises ValueError for a gold answer that the metric cannot use
    judge: Callable[[str, str], Judgement]
    function: Callable[[str, str], Any] | None = None  # the user's function, for a metric of `file.py:function`


@dataclass(frozen=True)
class Scores:
    """Judgements of answers. hits: the metric's own, by row. rates: share from 0 to 1, by name."""

    metric: str
    hits: tuple[bool, ...]
    rates: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """Tuned rate minus base rate, with its 95 % interval; each from -1 to 1."""

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
        with _time_limit(MAX_SEARCH_S):
            return {"regex": re.search(gold, answer) is not None}
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from error
    except TimeoutError:
        what = "searching the pattern %.80r takes more than %g s in the answer %.80r: counted as a miss"
        LOG.warning(what, gold, MAX_SEARCH_S, answer)
        return {"regex": False}


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that uses more CPU time. There is no limit in a thread, nor on Windows."""

    def stop(*_: object) -> None:
        raise TimeoutError

    if not hasattr(signal, "SIGVTALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _json_object(text: str) -> dict[str, Any] | None:
    """Return a text's JSON object, or None. Keys and values become text without case and extra spaces."""
    try:
        value = json.loads(text)
        return _as_text(value) if isinstance(value, dict) else None
    except (ValueError, RecursionError):  # RecursionError: thousands of brackets
        return None


def _as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {_normalize_spaces(key).casefold(): _as_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_text(inner) for inner in value]
    return _normalize_spaces(str(value)).casefold()


def _exact_json(gold: str, answer: str) -> Judgement:
    right, parsed = _json_object(gold), _json_object(answer)
    if right is None:
        raise ValueError("the gold answer is not a JSON object")
    judgement = {"exact_json": right == parsed, "valid_json": parsed is not None}
    if "intent" in right:
        judgement["intent"] = parsed is not None and parsed.get("intent") == right["intent"]
    return judgement


METRICS: dict[str, Metric] = {
    "exact": Metric("exact", partial(_equal, "exact")),  # equal up to white space
    "exact_json": Metric("exact_json", _exact_json),  # the same JSON object; text around it is a miss
    "contains": Metric("contains", _contains),  # the answer contains the gold, ignoring case and white space
    "regex": Metric("regex", _regex),  # the gold is a pattern, which is found in the answer
    # Classification: among the golds of all rows, the gold has the lowest loss. Nothing is generated.
    "choice": Metric("choice", partial(_equal, "choice")),
}


def metric(name: str, arguments: Sequence[str] = METRIC_ARGUMENTS) -> Metric:
    """Return a metric by name, or the user's function `file.py:function` of `arguments`, which returns a bool."""
    if not isinstance(name, str):
        raise RecipeError("metric: give a function by its name", fix="give 'file.py:function'")
    if ".py:" in name:
        file, _, function = name.rpartition(":")
        return _user_metric(file, function, arguments)
    if name not in METRICS:
        known = f"use one of {', '.join(METRICS)}, or file.py:function"
        raise RecipeError(f"metric {name} is not known{nearest(name, METRICS)}", fix=known)
    return METRICS[name]


@lru_cache(maxsize=8)
def _run_file(file: str, content_hash: str) -> Mapping[str, Any]:
    """Run the user's file, which may load a model, once per content, and return what it defines."""
    if (folder := os.path.dirname(file)) not in sys.path:  # it may import modules next to it, now and later
        sys.path.append(folder)
    return runpy.run_path(file)


def _check_parameters(function: Callable[..., Any], name: str, arguments: Sequence[str]) -> None:
    """Check that the function can be called with these arguments, and that no parameter is named as another one."""
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
        names = zip(parameters, (_NOT_THE_GOLD, _NOT_THE_ANSWER), strict=False)
        wrong = [parameter for parameter, excluded in names if parameter.lower() in excluded]
        if wrong:
            raise RecipeError(f"{name}{signature}: {wrong[0]} is not an argument it gets", fix=fix)


def _user_metric(file: str, name: str, arguments: Sequence[str]) -> Metric:
    """Return the metric of a function in the user's file. The file is run, as it is named on the command line."""
    if not Path(file).is_file():
        raise RecipeError(f"metric {file}:{name}: no such file", fix="write it as file.py:function")
    try:
        function = _run_file(str(Path(file).resolve()), sha256_file(Path(file))).get(name)
    except FAULTS as error:
        raise RecipeError(f"metric {file}:{name}: {type(error).__name__}: {error}", fix="fix the file") from None
    if not callable(function):
        raise RecipeError(f"metric {file}:{name}: no such function in the file", fix="write it as file.py:function")
    _check_parameters(function, f"{file}:{name}", arguments)

    def judge(gold: str, answer: str) -> Judgement:
        try:
            result = function(gold, answer)
        except FAULTS:  # check_golds has shown that it can read the gold, so it cannot read this answer
            return {name: False}
        if not _is_hit_or_miss(result):
            raise RunError(f"{name} returns {result!r:.80} (for the answer {answer[:80]!r})", fix=_RETURN_FIX)
        return {name: bool(result)}

    return Metric(name, judge, function)


def _is_hit_or_miss(result: Any) -> bool:
    """Return whether a result is True, False, 0 or 1. A score is not: every score but zero would count as a hit."""
    return isinstance(result, (int, np.integer, np.bool_)) and result in (0, 1)


def check_golds(
    name: str, golds: Sequence[str], places: Sequence[tuple[str, int]], *, any_number: bool = False
) -> None:
    """Raise DataError for rows (file, line) whose gold answers a metric cannot use. any_number: it is a reward."""
    scorer, wrong = metric(name), []
    if name == "choice" and not 2 <= len(options(golds)) <= MAX_OPTIONS:
        what = f"choice: {len(options(golds))} different right answers to choose from, not 2 to {MAX_OPTIONS}"
        raise DataError(what, fix="use another metric, such as exact")
    for gold, (file, line) in zip(golds, places, strict=True):
        result: Any = True
        try:
            if scorer.function is None:
                if name in ("contains", "regex") and not _normalize_spaces(gold):
                    raise ValueError("the right answer is empty, so every answer contains it")
                scorer.judge(gold, "")
            else:
                result = scorer.function(gold, gold)
        except FAULTS as error:
            if scorer.function is None and not isinstance(error, ValueError):
                raise
            failed = f"{scorer.name} fails on the right answer itself: {error!r}"
            wrong.append(Where(file, line, str(error) if scorer.function is None else failed))
        if not (any_number or _is_hit_or_miss(result)):
            what = f"metric {name}: {scorer.name} returns {result!r:.80} for the right answer of {file}:{line}"
            raise RecipeError(what, fix=_RETURN_FIX)
    if wrong:
        fix = "correct these rows or choose another metric"
        if scorer.function is not None:
            fix = f"fix {scorer.name}, which gets (right answer, answer), or correct these rows"
        raise DataError(f"{len(wrong)} rows cannot be scored with {name}", fix=fix, where=wrong)


def options(golds: Sequence[str]) -> list[str]:
    """Return what the metric `choice` chooses from: the distinct golds of all rows."""
    return list({_normalize_spaces(gold): gold for gold in reversed(golds)}.values())[::-1]


def score(name: str, golds: Sequence[str], answers: Sequence[str]) -> Scores:
    """Judge answers, at least one, against golds row by row. A side score is kept if every row has it."""
    scorer = metric(name)
    rows = [scorer.judge(gold, answer) for gold, answer in zip(golds, answers, strict=True)]
    assert rows, "nothing to score"
    common = [key for key in rows[0] if all(key in row for row in rows)]
    rates = {key: sum(row[key] for row in rows) / len(rows) for key in common}
    return Scores(scorer.name, tuple(row[scorer.name] for row in rows), rates)


def verdict(difference: Difference) -> tuple[str, str]:
    """Return (better | worse | unclear, sentence). The difference is clear if its interval does not contain zero."""
    value, low, high = (100 * end for end in (difference.value, difference.low, difference.high))
    kind = "better" if low > 0 else "worse" if high < 0 else "unclear"
    word = {"better": "better", "worse": "worse", "unclear": "no clear difference"}[kind]
    return kind, f"{word}: {value:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}"


def rows_label(result: Mapping[str, Any]) -> str:
    """Return "held-out rows" if it is known that the run was trained on none of them, else "rows"."""
    return "held-out rows" if result.get("train_rows") == 0 else "rows"


def rows_text(result: Mapping[str, Any]) -> str:
    """Return the number of an evaluation's rows, and whether it was interrupted."""
    text = f"{result['rows']:,} rows"
    return f"{text} (interrupted {result['interrupted']})" if "interrupted" in result else text


def in_points(difference: Mapping[str, float]) -> str:
    """Return a difference of rates with its interval, in points: +12 (+3 to +21)."""
    value, low, high = (100 * difference[end] for end in ("value", "low", "high"))
    return f"{value:+.0f} ({low:+.0f} to {high:+.0f})"


def task_rows(tasks: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Yield (task, metric, documents, base, tuned, change) of tasks of lm-evaluation-harness, as text."""
    for task, metrics in tasks.items():
        for name, values in metrics.items():
            difference, tuned = values.get("difference"), values.get("tuned")
            change = ""
            if difference:
                change = f"{difference['value']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"
            tuned_text = "" if tuned is None else f"{tuned:.4f}"
            yield task, name, f"{values['documents']:,}", f"{values['base']:.4f}", tuned_text, change


def general_verdict(result: Mapping[str, Any]) -> str:
    """Return the verdict on the general set, and the kinds that clearly changed, as a gain may hide a loss."""
    text = verdict(Difference(**result["difference"]))[1]
    clear: dict[str, list[str]] = {}
    for kind, values in result["kinds"].items():
        clear.setdefault(verdict(Difference(**values["difference"]))[0], []).append(kind)
    parts = [f"{word} at {', '.join(clear[word])}" for word in ("worse", "better") if word in clear]
    return f"{text}; by kind: {'; '.join(parts)}" if parts else text


def wilson(successes: int, n: int, z: float = Z_95) -> Interval:
    """Return the score interval of `successes` in `n` >= 1 trials (E. B. Wilson, JASA 22 (1927), 209-212)."""
    assert 0 <= successes <= n and n > 0
    rate = successes / n
    middle = rate + z * z / (2 * n)
    reach = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The ends are exact at 0 and n; rounding must not move them.
    low = 0.0 if successes == 0 else (middle - reach) / scale
    high = 1.0 if successes == n else (middle + reach) / scale
    return low, high


def paired_difference(base_hits: Sequence[bool], tuned_hits: Sequence[bool]) -> Difference:
    """Return tuned rate minus base rate on the same rows (at least one) with a 95 % interval within -1 to 1."""
    # R. G. Newcombe, Statistics in Medicine 17 (1998), 2635-2650, method 10: the Wilson intervals of both rates,
    # combined with their correlation phi (lowered by a continuity correction where positive).
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

    tuned_low, tuned_high = (abs(end - tuned / n) for end in wilson(tuned, n))
    base_low, base_high = (abs(end - base / n) for end in wilson(base, n))
    value = (gained - lost) / n
    low = value - math.sqrt(max(0.0, tuned_low**2 - 2 * phi * tuned_low * base_high + base_high**2))
    high = value + math.sqrt(max(0.0, tuned_high**2 - 2 * phi * tuned_high * base_low + base_low**2))
    return Difference(value, max(low, -1.0), min(high, 1.0))


def changed_rows(places: Sequence[str], before: Sequence[bool], after: Sequence[bool]) -> dict[str, list[str]]:
    """Return the places of rows that became hits (gained) and of rows that became misses (lost)."""
    rows = list(zip(places, before, after, strict=True))
    return {
        "gained": [place for place, was, now in rows if now and not was],
        "lost": [place for place, was, now in rows if was and not now],
    }


def mark_differences(gold: str, answer: str) -> list[tuple[str, str]]:
    """Return the answer in pieces (text, same | added | missing) compared with the gold, word by word."""
    gold_words, answer_words = (re.findall(WORD, text) for text in (gold, answer))
    matcher = difflib.SequenceMatcher(None, gold_words, answer_words, autojunk=False)
    if matcher.ratio() < SIMILAR:
        return [(answer, "same")]
    parts = []
    for tag, a1, a2, b1, b2 in matcher.get_opcodes():
        if tag in ("delete", "replace"):
            parts.append(("".join(gold_words[a1:a2]), "missing"))
        if b2 > b1:
            parts.append(("".join(answer_words[b1:b2]), "same" if tag == "equal" else "added"))
    return parts


@dataclass(frozen=True)
class Reward:
    """A metric or function as a reward. A metric gives 1 for a hit and 0 for a miss, a function what it returns."""

    spec: str  # as in the recipe
    weight: float
    metric: Metric

    @property
    def name(self) -> str:
        return self.metric.name

    def __call__(self, gold: str | None, answer: str, place: tuple[str, int]) -> float:
        if self.metric.function is None:
            return float(self.metric.judge(gold or "", answer)[self.name])
        prefix = f"reward {self.spec}: row {place[0]}:{place[1]}"
        try:
            value = float(self.metric.function(gold or "", answer))
        except FAULTS as fault:
            what = f"{prefix}: {type(fault).__name__}: {fault} (for the answer {answer[:80]!r})"
            raise RunError(what, fix="a reward function must return a number for any answer") from None
        if not math.isfinite(value):
            raise RunError(f"{prefix}: returns {value}", fix="return a finite number for any answer")
        return value


def parse_rewards(setting: str | Sequence[str] | None) -> list[Reward]:
    """Return the rewards of a recipe: NAME or NAME=WEIGHT each, in a list or separated by commas."""
    rewards = []
    for text in setting.split(",") if isinstance(setting, str) else setting or []:
        name, _, weight = text.strip().partition("=")
        try:
            number = float(weight or 1)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise RecipeError(f"--train.rewards {text}: no number after =", fix="write it as exact_json=1")
        if name == "choice":
            raise RecipeError("--train.rewards choice: it does not judge generated answers", fix="use exact")
        rewards.append(Reward(name, number, metric(name)))
    names = [reward.name for reward in rewards]
    if twice := next((name for name in names if names.count(name) > 1), None):
        fix = "give each once, and functions of two files different names"
        raise RecipeError(f"--train.rewards: {twice} is given twice", fix=fix)
    return rewards


def rewards_hash(rewards: Sequence[Reward]) -> str | None:
    """Return the SHA-256 of the files of user-defined rewards, which decide what is learned; None without any."""
    files = [reward.spec.rsplit(":", 1)[0] for reward in rewards if reward.metric.function is not None]
    return sha256_text("".join(sha256_file(Path(file)) for file in files)) if files else None


def check_rewards(rewards: Sequence[Reward], golds: Sequence[str | None], places: Sequence[tuple[str, int]]) -> None:
    """Check that each row has the right answer that a metric needs, and that the metric can use it. Needs no model."""
    answered = [(gold, place) for gold, place in zip(golds, places, strict=True) if gold is not None]
    missing = [Where(*place, "no right answer") for gold, place in zip(golds, places, strict=True) if gold is None]
    for reward in rewards:
        if reward.metric.function is None and missing:
            fix = "give rows with right answers, or a reward function: file.py:function"
            raise DataError(f"{len(missing)} rows have no answer for reward {reward.name}", fix=fix, where=missing)
        check_golds(reward.spec, [gold for gold, _ in answered], [place for _, place in answered], any_number=True)
