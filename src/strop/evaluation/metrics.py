"""How an answer is judged: one (gold, answer) pair is a hit or a miss, and the rates carry their intervals."""

from __future__ import annotations

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
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from strop.errors import DataError, RecipeError, RunError, Where, nearest
from strop.runs.lock import sha256_file

LOG = logging.getLogger(__name__)
FAULTS = (Exception, SystemExit)  # of a function of the user's: a parser's own errors, or an answer that says exit()
_SAY = "let it return True or False, for example `return ... >= 0.8`"
LONGEST_SEARCH_S = 5.0  # of a pattern in one answer, in computing time: (a+)+b takes for ever on aaaa...
GETS = ("right answer", "answer")  # of a function of the user's, by position
_NO_GOLD = {"prompt", "prompts", "question", "questions", "messages", "completions"}
_NO_ANSWER = _NO_GOLD | {"gold", "right_answer", "reference", "target", "expected", "truth", "ground_truth", "y_true"}
MOST_OPTIONS = 50  # of choice: each is computed for each row
Z_95 = 1.959963984540054  # 97.5 % point of the standard normal
Judgement = dict[str, bool]  # the hit first, under the metric's own name; then the side scores
Interval = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """`judge(gold, answer)` raises ValueError where the gold is not what the metric needs. own: a user's function."""

    name: str
    judge: Callable[[str, str], Judgement]
    own: Callable[[str, str], Any] | None = None


@dataclass(frozen=True)
class Scores:
    """Judgements of n answers. `hits`: of the metric itself, by row. `rates`: name -> share from 0 to 1."""

    metric: str
    hits: tuple[bool, ...]
    rates: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """Tuned rate less base rate, with its 95 % interval; each from -1 to 1."""

    value: float
    low: float
    high: float


def _blanks(text: str) -> str:
    return " ".join(text.split())


def _exact(gold: str, answer: str) -> Judgement:
    return {"exact": _blanks(gold) == _blanks(answer)}


def _contains(gold: str, answer: str) -> Judgement:
    return {"contains": _blanks(gold).casefold() in _blanks(answer).casefold()}


def _choice(gold: str, answer: str) -> Judgement:
    return {"choice": _blanks(gold) == _blanks(answer)}


def _regex(gold: str, answer: str) -> Judgement:
    try:
        with _limited(LONGEST_SEARCH_S):
            return {"regex": re.search(gold, answer) is not None}
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from error
    except TimeoutError:
        what = "the pattern %.80r is still searched for after %g s in the answer %.80r: counted as a miss"
        LOG.warning(what, gold, LONGEST_SEARCH_S, answer)
        return {"regex": False}


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a block that computes for longer. Only where the system can: in a thread, or on Windows,
    there is no limit."""

    def end(*_: object) -> None:
        raise TimeoutError

    if not hasattr(signal, "SIGVTALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, keys and values as text without case and extra blanks, in whatever lies in it
    too; None if it is not one."""
    try:
        found = json.loads(text)
        return _as_text(found) if isinstance(found, dict) else None
    except (ValueError, RecursionError):  # RecursionError: a model may answer with thousands of brackets
        return None


def _as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {_blanks(key).casefold(): _as_text(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_text(one) for one in value]
    return _blanks(str(value)).casefold()


def _exact_json(gold: str, answer: str) -> Judgement:
    wanted, given = _object(gold), _object(answer)
    if wanted is None:
        raise ValueError("the gold answer is not a JSON object")
    judgement = {"exact_json": wanted == given, "valid_json": given is not None}
    if "intent" in wanted:
        judgement["intent"] = given is not None and given.get("intent") == wanted["intent"]
    return judgement


METRICS: dict[str, Metric] = {
    "exact": Metric("exact", _exact),  # equal up to blanks
    "exact_json": Metric("exact_json", _exact_json),  # the same object; text around it is a miss
    "contains": Metric("contains", _contains),  # the gold stands in the answer, case and blanks aside
    "regex": Metric("regex", _regex),  # the gold is a pattern that is found in the answer
    "choice": Metric(
        "choice", _choice
    ),  # the gold is the likeliest of all rows' golds: classification, nothing written
}


def metric(name: str, gets: Sequence[str] = GETS) -> Metric:
    """The metric of that name, or the function of `file.py:function`, which gets (gold, answer) and returns True or
    False. gets: what a function is given where it is no metric.

    Raises RecipeError.
    """
    if not isinstance(name, str):
        raise RecipeError("metric: a function is given by its name", fix="give 'file.py:function'")
    if ".py:" in name:
        file, _, function = name.rpartition(":")
        return _own_metric(file, function, gets)
    if name not in METRICS:
        known = f"use one of {', '.join(METRICS)}, or file.py:function"
        raise RecipeError(f"metric {name} is not known{nearest(name, METRICS)}", fix=known)
    return METRICS[name]


@lru_cache(maxsize=8)
def _names_in(file: str, content: str) -> Mapping[str, Any]:
    """What a file of the user's defines. It is run once, as long as its content (by hash) is the same: it may load a
    model that judges. It finds the files beside it, behind all other modules: also those that it imports later."""
    if (folder := os.path.dirname(file)) not in sys.path:
        sys.path.append(folder)
    return runpy.run_path(file)


def _check_parameters(own: Callable[..., Any], said: str, gets: Sequence[str]) -> None:
    """Raises RecipeError for a function that cannot be called so, or whose parameters are named as something else."""
    wanted = f"it gets ({', '.join(gets)}), in this order"
    try:
        signature = inspect.signature(own)
    except (TypeError, ValueError):  # some functions of C have none
        return
    try:
        named = list(signature.bind(*gets).arguments)
    except TypeError as fault:
        raise RecipeError(f"{said}{signature}: {fault}", fix=wanted) from None
    if gets is GETS:
        other = [name for name, known in zip(named, (_NO_GOLD, _NO_ANSWER), strict=False) if name.lower() in known]
        if other:
            raise RecipeError(f"{said}{signature}: {other[0]} is not what it is given", fix=wanted)


def _own_metric(file: str, function: str, gets: Sequence[str]) -> Metric:
    """A function of the user's own file, which is run: it is theirs, named on their command line."""
    if not Path(file).is_file():
        raise RecipeError(f"metric {file}:{function}: no such file", fix="write it as file.py:function")
    try:
        found = _names_in(str(Path(file).resolve()), sha256_file(Path(file))).get(function)
    except FAULTS as error:
        raise RecipeError(f"metric {file}:{function}: {type(error).__name__}: {error}", fix="mend the file") from None
    if not callable(found):
        raise RecipeError(f"metric {file}:{function}: no such function in it", fix="write it as file.py:function")
    _check_parameters(found, f"{file}:{function}", gets)

    def judge(gold: str, answer: str) -> Judgement:
        try:
            said = found(gold, answer)
        except FAULTS:  # it could read the gold itself (check_golds): an answer that it cannot read is a miss
            return {function: False}
        if not _is_verdict(said):
            raise RunError(f"{function} returns {said!r:.80} (for the answer {answer[:80]!r})", fix=_SAY)
        return {function: bool(said)}

    return Metric(function, judge, found)


def _is_verdict(said: Any) -> bool:
    """Is it hit or miss? A score is neither: what is not zero would all be a hit."""
    return isinstance(said, (int, np.integer, np.bool_)) and said in (0, 1)


def check_golds(
    name: str, golds: Sequence[str], places: Sequence[tuple[str, int]], *, any_number: bool = False
) -> None:
    """Raises DataError with file:line of every gold answer that the metric cannot use, RecipeError for a function that
    says neither hit nor miss (any_number: a reward, which may be worth anything); needs no model."""
    known, wrong = metric(name), []
    if name == "choice" and not 2 <= len(options(golds)) <= MOST_OPTIONS:
        what = f"choice: {len(options(golds))} different right answers to choose among, not 2 to {MOST_OPTIONS}"
        raise DataError(what, fix="use another metric, such as exact")
    for gold, (file, line) in zip(golds, places, strict=True):
        said: Any = True
        try:
            if known.own is None:
                if name in ("contains", "regex") and not _blanks(gold):
                    raise ValueError("the right answer is empty, and so in any answer")
                known.judge(gold, "")
            else:
                said = known.own(gold, gold)
        except FAULTS as error:
            if known.own is None and not isinstance(error, ValueError):
                raise
            what = str(error) if known.own is None else f"{known.name} fails on the right answer itself: {error!r}"
            wrong.append(Where(file, line, what))
        if not (any_number or _is_verdict(said)):
            what = f"metric {name}: {known.name} returns {said!r:.80} for the right answer of {file}:{line}"
            raise RecipeError(what, fix=_SAY)
    if wrong:
        fix = "correct these rows or choose another metric"
        if known.own is not None:
            fix = f"mend {known.name}, which gets (right answer, answer), or correct these rows"
        raise DataError(f"{len(wrong)} rows cannot be scored with {name}", fix=fix, where=wrong)


def options(golds: Sequence[str]) -> list[str]:
    """What `choice` chooses among: the right answers to all rows, each once."""
    return list({_blanks(gold): gold for gold in reversed(golds)}.values())[::-1]


def score(name: str, golds: Sequence[str], answers: Sequence[str]) -> Scores:
    """Judges answers, at least one, against golds row by row. A side score is kept where every row has it."""
    known = metric(name)
    rows = [known.judge(gold, answer) for gold, answer in zip(golds, answers, strict=True)]
    assert rows, "nothing to score"
    common = [key for key in rows[0] if all(key in row for row in rows)]
    rates = {key: sum(row[key] for row in rows) / len(rows) for key in common}
    return Scores(known.name, tuple(row[known.name] for row in rows), rates)


def verdict(difference: Difference) -> tuple[str, str]:
    """(better | worse | unclear, sentence): a difference is claimed where its interval leaves zero out."""
    value, low, high = (100 * end for end in (difference.value, difference.low, difference.high))
    kind = "better" if low > 0 else "worse" if high < 0 else "unclear"
    word = {"better": "better", "worse": "worse", "unclear": "no clear difference"}[kind]
    return kind, f"{word}: {value:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}"


def rows_asked(result: Mapping[str, Any]) -> str:
    """What the rows of an evaluation are called: they are held out only where it is known that none was trained on."""
    return "held-out rows" if result.get("train_rows") == 0 else "rows"


def rows_counted(result: Mapping[str, Any]) -> str:
    """How many rows an evaluation has, and whether there were to be more."""
    said = f"{result['rows']:,} rows"
    return f"{said} (interrupted {result['interrupted']})" if "interrupted" in result else said


def in_points(difference: Mapping[str, float]) -> str:
    """A difference of rates with its interval, in points: +12 (+3 to +21)."""
    value, low, high = (100 * difference[end] for end in ("value", "low", "high"))
    return f"{value:+.0f} ({low:+.0f} to {high:+.0f})"


def task_rows(tasks: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str, str]]:
    """(task, metric, documents, base, tuned, change) of the harness's tasks, as text."""
    for task, metrics in tasks.items():
        for name, found in metrics.items():
            change, tuned = found.get("difference"), found.get("tuned")
            said = f"{change['value']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f})" if change else ""
            shown = "" if tuned is None else f"{tuned:.4f}"
            yield task, name, f"{found['documents']:,}", f"{found['base']:.4f}", shown, said


def judged_by_kind(result: Mapping[str, Any]) -> str:
    """Of the general set: the change over all rows, and the kinds that have clearly changed: a gain may hide a loss."""
    said = verdict(Difference(**result["difference"]))[1]
    clear: dict[str, list[str]] = {}
    for kind, found in result["kinds"].items():
        clear.setdefault(verdict(Difference(**found["difference"]))[0], []).append(kind)
    parts = [f"{word} at {', '.join(clear[word])}" for word in ("worse", "better") if word in clear]
    return f"{said}; by kind: {'; '.join(parts)}" if parts else said


def wilson(successes: int, n: int, z: float = Z_95) -> Interval:
    """Score interval of a proportion of `successes` in `n` >= 1 trials.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927), 209-212.
    """
    assert 0 <= successes <= n and n > 0
    rate = successes / n
    middle = rate + z * z / (2 * n)
    reach = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The ends are exact at 0 and n; rounding must not put them a hair inside or outside.
    low = 0.0 if successes == 0 else (middle - reach) / scale
    high = 1.0 if successes == n else (middle + reach) / scale
    return low, high


def paired_difference(base_hits: Sequence[bool], tuned_hits: Sequence[bool]) -> Difference:
    """Tuned rate less base rate on the same rows, at least one, with a 95 % interval.

    R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions based on paired
    data, Statistics in Medicine 17 (1998), 2635-2650, method 10: the Wilson intervals of both rates, combined with
    their correlation phi (lowered by a continuity correction where it is positive). Stays within -1 to 1, and has
    a width where all rows agree or there is only one.
    """
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


# ---- from strop.evaluation.scoring ----
"""Where an answer differs from the right one, word by word; for both pages that show answers."""

from __future__ import annotations

import difflib

LIKE = 0.6  # answers that have less in common are shown as they are: marks all over help nobody


def pieces(gold: str, answer: str) -> list[tuple[str, str]]:
    """The answer in pieces (text, same | added | missing) against the gold; in one where they have little in common."""
    wanted, given = _words(gold), _words(answer)
    matcher = difflib.SequenceMatcher(None, wanted, given, autojunk=False)
    if matcher.ratio() < LIKE:
        return [(answer, "same")]
    parts = []
    for tag, a1, a2, b1, b2 in matcher.get_opcodes():
        if tag in ("delete", "replace"):
            parts.append(("".join(wanted[a1:a2]), "missing"))
        if b2 > b1:
            parts.append(("".join(given[b1:b2]), "same" if tag == "equal" else "added"))
    return parts


def _words(text: str) -> list[str]:
    """Words and what stands between them, one by one."""
    words: list[str] = []
    for character in text:
        if words and character.isalnum() and words[-1][-1].isalnum():
            words[-1] += character
        else:
            words.append(character)
    return words


# ---- from strop.evaluation.rewards ----
"""What an answer is worth to a policy: metrics of `strop eval`, or a function of one's own, each with a weight."""

from __future__ import annotations

from dataclasses import dataclass

from strop.evaluation.metrics import FAULTS, Metric, check_golds, metric
from strop.runs.lock import sha256_text


@dataclass(frozen=True)
class Reward:
    """One metric or function. A metric gives 1 for a hit and 0 for a miss, a function what it returns."""

    given: str  # as the recipe names it
    weight: float
    metric: Metric

    @property
    def name(self) -> str:
        return self.metric.name

    def __call__(self, gold: str | None, answer: str, place: tuple[str, int]) -> float:
        """Raises RunError, with the row, where a function of the user's fails or gives no number."""
        if self.metric.own is None:
            return float(self.metric.judge(gold or "", answer)[self.name])
        said = f"reward {self.given}: row {place[0]}:{place[1]}"
        try:
            found = float(self.metric.own(gold or "", answer))
        except FAULTS as fault:
            what = f"{said}: {type(fault).__name__}: {fault} (for the answer {answer[:80]!r})"
            raise RunError(what, fix="a reward function must give a number for any answer") from None
        if not math.isfinite(found):
            raise RunError(f"{said}: gives {found}", fix="give a finite number for any answer")
        return found


def rewards_of(given: str | Sequence[str] | None) -> list[Reward]:
    """The rewards that a recipe names: NAME or NAME=WEIGHT each, in a list or behind commas. Raises RecipeError."""
    found = []
    for text in given.split(",") if isinstance(given, str) else given or []:
        name, _, weight = text.strip().partition("=")
        try:
            number = float(weight or 1)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise RecipeError(f"--train.rewards {text}: no number behind =", fix="write it as exact_json=1")
        if name == "choice":
            raise RecipeError("--train.rewards choice: judges no answer that is written", fix="use exact")
        found.append(Reward(name, number, metric(name)))
    names = [reward.name for reward in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        fix = "give each once, and functions of two files names of their own"
        raise RecipeError(f"--train.rewards: {twice} twice", fix=fix)
    return found


def files_hash(rewards: Sequence[Reward]) -> str | None:
    """SHA-256 of the files of one's own functions, which decide what is learned; None where there are none."""
    files = [reward.given.rsplit(":", 1)[0] for reward in rewards if reward.metric.own is not None]
    return sha256_text("".join(sha256_file(Path(file)) for file in files)) if files else None


def check_rewards(rewards: Sequence[Reward], golds: Sequence[str | None], places: Sequence[tuple[str, int]]) -> None:
    """Raises DataError with file:line of rows without the right answer that a metric needs, or with one that it cannot
    use; needs no model."""
    answered = [(gold, place) for gold, place in zip(golds, places, strict=True) if gold is not None]
    missing = [Where(*place, "no right answer") for gold, place in zip(golds, places, strict=True) if gold is None]
    for reward in rewards:
        if reward.metric.own is None and missing:
            fix = "give rows with right answers, or reward with a function of your own: file.py:function"
            raise DataError(f"{len(missing)} rows have no answer for reward {reward.name}", fix=fix, where=missing)
        check_golds(reward.given, [gold for gold, _ in answered], [place for _, place in answered], any_number=True)
