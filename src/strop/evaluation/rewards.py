"""Rewards for RL: built-in metrics, and functions of a completion and its row.

The form of a user-defined function follows from the names of its parameters:

- `f(completion, row)`: called for each completion
- `f(completions, rows)`: called once for all completions of a step
- `f(right_answer, answer)`: called for each completion; the first may also be named `gold`, `expected` or the like

It may be `async`; the calls of a step then run concurrently. It returns a finite number, or a dict of named numbers
whose sum is the reward; the batch form returns a list of them. A row is a dict with all columns of the row as in the
data file. `prompt` (the last user message), `messages` (of the prompt) and `answer` (the right answer) are added unless
the row has columns of these names.

With train.environment, the first two forms may also have the parameters `messages` (all turns of a trace) and
`environment` (`environments` in the second form, where both are lists); `f(environments)` is a second form too, as in
TRL. `completion` is then the text of the last turn.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from strop.config.schema import DataSection
from strop.data.reading.sources import read_eval_share, read_rows
from strop.data.types import Prompt
from strop.errors import DataError, Location, RecipeError, RunError
from strop.evaluation.calls import CallError, call_together, call_within, is_async
from strop.evaluation.metrics import (
    GOLD_PARAMETERS,
    Metric,
    check_golds,
    find_metric,
    load_function,
    load_metric,
)
from strop.runs.lock import sha256_file

Form = Literal["metric", "golds", "row", "batch"]
Rows = Mapping[tuple[str, int], Mapping[str, Any]]  # (file, line) -> columns
RETURNS = "a finite number, or a dict of finite numbers"
TRACE_PARAMETERS = {"row": ("messages", "environment"), "batch": ("messages", "environments")}  # by form
BATCH_PARAMETERS = ("completions", "rows")


@dataclass(frozen=True)
class Candidate:
    """A completion to reward."""

    text: str  # without reasoning
    prompt: Prompt
    messages: Sequence[Mapping[str, Any]] = ()  # of the whole trace, in an environment
    environment: Any = None  # the object whose tools were called

    @property
    def place(self) -> str:
        return f"{self.prompt.file}:{self.prompt.line}"


@dataclass(frozen=True)
class Reward:
    """A reward: 1 or 0 for a hit or a miss of a built-in metric, or the result of a user-defined function."""

    spec: str  # name in the recipe
    weight: float
    name: str
    form: Form
    metric: Metric | None = None  # for form "metric"
    function: Callable[..., Any] | None = None  # for the other forms
    parameters: tuple[str, ...] = ()  # those that are given by name: all of a batch, and those of a trace
    _names: set[str] = field(default_factory=set, compare=False, repr=False)  # of the parts, known from the first call

    @property
    def reads_rows(self) -> bool:
        """Return whether the function gets the columns of the row."""
        return self.form in ("row", "batch")

    def compute(self, candidates: Sequence[Candidate], rows: Rows, timeout: float) -> list[dict[str, float]]:
        """Return the named parts of the reward of each completion, without the weight.

        timeout: maximum duration of a call in seconds. Raises RunError if the function fails.
        """
        if self.metric is not None:
            return [{self.name: float(self.metric.judge(c.prompt.gold or "", c.text)[self.name])} for c in candidates]
        function = self.function
        assert function is not None
        if self.form == "batch":
            columns = {
                "completions": [c.text for c in candidates], "rows": [row_of(c.prompt, rows) for c in candidates],
                "messages": [list(c.messages) for c in candidates],
                "environments": [c.environment for c in candidates],
            }  # fmt: skip
            named = {name: columns[name] for name in self.parameters or BATCH_PARAMETERS}
            results = self._call([partial(function, **named)], candidates[:1], timeout)[0]
            results = results.tolist() if hasattr(results, "tolist") else results  # of NumPy or torch
            if not isinstance(results, Sequence) or isinstance(results, str) or len(results) != len(candidates):
                what = f"reward {self.spec}: returns {results!r:.80} for {len(candidates)} completions"
                raise RunError(what, fix="return a list with a number for each completion, in their order")
        elif self.form == "row":
            calls = [partial(function, c.text, row_of(c.prompt, rows), **self._name_trace(c)) for c in candidates]
            results = self._call(calls, candidates, timeout)
        else:
            results = self._call(
                [partial(function, c.prompt.gold or "", c.text) for c in candidates], candidates, timeout
            )
        what = f"reward {self.spec}"
        parts = [read_parts(self.name, what, result, c.place) for result, c in zip(results, candidates, strict=True)]
        self._names.update(() if self._names else parts[0])
        if different := next((names for names in map(set, parts) if names != self._names), None):
            before = ", ".join(sorted(self._names))
            what = f"reward {self.spec}: returns {', '.join(sorted(different))}, and {before} before"
            raise RunError(what, fix="return a dict with the same names for any answer")
        return parts

    @property
    def reads_traces(self) -> bool:
        """Return whether the function gets the messages or the environment of a trace."""
        return not {"messages", "environment", "environments"}.isdisjoint(self.parameters)

    def _name_trace(self, candidate: Candidate) -> dict[str, Any]:
        values = {"messages": list(candidate.messages), "environment": candidate.environment}
        return {name: values[name] for name in self.parameters}

    def _call(self, calls: Sequence[Callable[[], Any]], candidates: Sequence[Candidate], timeout: float) -> list[Any]:
        """Return the results of calls of the function. Raises RunError if one fails or takes too long."""
        assert self.function is not None
        together = is_async(self.function)
        results = call_together(calls, timeout) if together else (call_within(timeout, call) for call in calls)
        values = []
        for result, candidate in zip(results, candidates, strict=True):
            if isinstance(result, CallError):
                prefix = f"reward {self.spec}: row {candidate.place}"
                if result.timed_out:
                    what = f"{prefix}: takes more than {timeout:g} s"
                    raise RunError(what, fix="make it faster, or raise --train.reward_timeout")
                what = f"{prefix}: {result.text} (for the answer {candidate.text[:80]!r})"
                raise RunError(what, fix=f"a reward function must return {RETURNS} for any answer")
            values.append(result)
        return values


def read_parts(name: str, what: str, result: Any, place: str) -> dict[str, float]:
    """Check the result of a reward, and return it as named parts. Raises RunError. what: names the reward in errors."""
    is_dict = isinstance(result, Mapping) and bool(result)
    values = {f"{name}.{part}": value for part, value in result.items()} if is_dict else {name: result}
    for part, value in values.items():
        try:
            values[part] = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            values[part] = math.nan
        if not math.isfinite(values[part]):
            of_part = f" for {part}" if is_dict else ""
            text = f"{what}: row {place}: returns {value!r:.80}{of_part}"
            raise RunError(text, fix=f"return {RETURNS} for any answer")
    return values


@dataclass(frozen=True)
class Rewarded:
    """The reward of a completion: the weighted sum of the parts of all rewards, and the parts by name."""

    total: float
    parts: Mapping[str, float]


def compute_rewards(
    rewards: Sequence[Reward], candidates: Sequence[Candidate], rows: Rows, timeout: float
) -> list[Rewarded]:
    """Return the reward of each completion. Raises RunError if a function fails.

    Only the batch form gets several copies of a completion, because it may count or group them.
    """
    totals, parts = [0.0] * len(candidates), [dict[str, float]() for _ in candidates]
    places = [(id(one.prompt), one.text, id(one.environment)) for one in candidates]
    for reward in rewards if candidates else ():
        keys: Sequence[object] = range(len(candidates)) if reward.form == "batch" else places
        asked: dict[object, Candidate] = {}
        for key, candidate in zip(keys, candidates, strict=True):
            asked.setdefault(key, candidate)
        found = dict(zip(asked, reward.compute(list(asked.values()), rows, timeout), strict=True))
        for i, key in enumerate(keys):
            totals[i] += reward.weight * sum(found[key].values())
            parts[i] |= found[key]
    return [Rewarded(total, values) for total, values in zip(totals, parts, strict=True)]


def parse_rewards(setting: str | Sequence[str] | None) -> list[Reward]:
    """Parse the recipe's rewards: NAME or NAME=WEIGHT each, in a list or separated by commas."""
    rewards = []
    for text in setting.split(",") if isinstance(setting, str) else setting or []:
        spec, _, weight = text.strip().partition("=")
        try:
            number = float(weight or 1)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise RecipeError(f"--train.rewards {text}: no number after =", fix="write it as exact_json=1")
        if spec == "choice":
            raise RecipeError("--train.rewards choice: it does not judge generated answers", fix="use exact")
        rewards.append(_find_reward(spec, number))
    names = [reward.name for reward in rewards]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        fix = "give each once, and functions of two files different names"
        raise RecipeError(f"--train.rewards: {duplicate} is given twice", fix=fix)
    return rewards


def _find_reward(spec: str, weight: float) -> Reward:
    if ".py:" not in spec:
        metric = find_metric(spec)
        return Reward(spec, weight, metric.name, "metric", metric=metric)
    file, _, name = spec.rpartition(":")
    function = load_function("reward", file, name)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some C functions have no signature
        parameters = []
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    optional = {name for extra in TRACE_PARAMETERS.values() for name in extra}  # they are given with a default, too
    names = [p.name for p in parameters if (p.default is p.empty or p.name in optional) and p.kind not in variable]
    traced = {form: tuple(name for name in extra if name in names) for form, extra in TRACE_PARAMETERS.items()}
    if "environments" in names and {*names} <= {*BATCH_PARAMETERS, *TRACE_PARAMETERS["batch"]}:
        return Reward(spec, weight, name, "batch", function=function, parameters=tuple(names))
    fix = "write f(completion, row), f(completions, rows) or f(right_answer, answer)"
    if all(p.kind in variable for p in parameters):
        what = f"reward {spec}: its parameters have no names, from which its form follows"
        raise RecipeError(what, fix=f"{fix}; in a decorator, use functools.wraps")
    forms: tuple[tuple[Form, str, str], ...] = (("row", "completion", "row"), ("batch", "completions", "rows"))
    for form, completion, row in forms:
        if row in names or names[:1] == [completion] or "completions" in names:
            own_names = [name for name in names if name not in traced[form]]
            if len(own_names) != 2 or own_names[1] != row or names[:2] != own_names:
                if form == "row" and "completions" in names:
                    continue  # the other form
                what = f"reward {spec}({', '.join(names)}): not a form of a reward function"
                raise RecipeError(what, fix=fix)
            return Reward(
                spec, weight, name, form, function=function, parameters=traced[form] if form == "row" else tuple(names)
            )
    given = [p.name for p in parameters if p.kind not in variable]
    if given[0].lower() not in GOLD_PARAMETERS:  # called by position, it might get the answers swapped
        what = f"reward {spec}({', '.join(given)}): its parameters do not say which of them is the right answer"
        raise RecipeError(what, fix=f"{fix}, with these names")
    return Reward(spec, weight, name, "golds", function=load_metric("reward", file, name).function)


def row_of(prompt: Prompt, rows: Rows) -> dict[str, Any]:
    """Return the row of a prompt, as a reward function gets it."""
    users = [message["content"] for message in prompt.messages if message["role"] == "user"]
    extra = {"prompt": users[-1] if users else "", "messages": list(prompt.messages), "answer": prompt.gold}
    return deepcopy({**extra, **rows.get((prompt.file, prompt.line), {})})  # the function may change it


def read_columns(rewards: Sequence[Reward], data: DataSection, *, all_rows: bool = False) -> Rows:
    """Return the columns of all rows of the data, or nothing if no reward reads them. all_rows: something else does."""
    specs = [data.train] if read_eval_share(data.eval) or data.eval is None else [data.train, data.eval]
    if not all_rows and not any(reward.reads_rows for reward in rewards):
        return {}
    return {
        (row.file, row.line): row.value
        for spec in specs
        for row in read_rows(spec, encoding=data.encoding, columns=data.columns, errors=[])
    }


def hash_rewards(rewards: Sequence[Reward], rows: Rows) -> str | None:
    """Return the SHA-256 of the files of user-defined rewards and of the columns they read, to detect changes.

    None if there are no user-defined rewards.
    """
    files = [reward.spec.rsplit(":", 1)[0] for reward in rewards if reward.function is not None]
    if not files:
        return None
    hashed = sha256("".join(sha256_file(Path(file)) for file in files).encode())
    for (_, line), columns in rows.items():
        hashed.update(json.dumps([line, columns], sort_keys=True, default=str).encode())
    return hashed.hexdigest()


def check_rewards(rewards: Sequence[Reward], prompts: Sequence[Prompt], rows: Rows, timeout: float) -> None:
    """Check before training that the rewards can judge the rows.

    Functions of the right answer are called for each right answer, functions of the row for the first row. Raises
    DataError for rows without a right answer that a reward needs, or with one that it cannot use, and RecipeError if
    a function of the row fails.
    """
    places = [(prompt.file, prompt.line) for prompt in prompts]
    missing = [Location(*place, "no right answer") for place, p in zip(places, prompts, strict=True) if p.gold is None]
    answered = [prompt for prompt in prompts if prompt.gold is not None]
    for reward in rewards:
        if reward.reads_traces:  # there is no trace yet
            continue
        if reward.reads_rows:
            first = [Candidate(prompt.gold or "", prompt) for prompt in prompts[:1]]
            try:
                reward.compute(first, rows, timeout)
            except RunError as error:
                raise RecipeError(error.what, fix=error.fix) from None
            continue
        if reward.metric is not None and missing:
            fix = "give rows with right answers, or a reward function: file.py:function"
            raise DataError(f"{len(missing)} rows have no answer for reward {reward.name}", fix=fix, where=missing)
        golds = [str(prompt.gold) for prompt in answered]
        check_golds(reward.spec, golds, [(prompt.file, prompt.line) for prompt in answered], any_number=True)
