"""Metrics compared with values computed by hand, published tables and the test data's reference scorer."""

from __future__ import annotations

import ast
import itertools
import json
import math
import random
import re
import signal
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from strop.errors import DataError, RecipeError, RunError
from strop.evaluation import general, metrics
from strop.evaluation.metrics import (
    METRICS,
    check_golds,
    describe_change,
    describe_cut,
    find_metric,
    format_score,
    paired_difference,
    score,
    wilson_interval,
)
from strop.evaluation.report import _format_scores
from strop.evaluation.tables import print_leaderboard
from tests.support.scripts import script
from tests.support.shared_data import shared

GOLD = '{"intent": "Play", "artist": "Nina Simone"}'


@pytest.mark.parametrize(
    "name, gold, answer, hit",
    [
        ("exact", "a  b\n", " a b", True),
        ("exact", "a b", "A b", False),
        ("exact", "", "", True),
        ("contains", "Paris", "It is  paris, of course", True),
        ("contains", "New York", "new\n york", True),
        ("contains", "Paris", "Par is", False),
        ("regex", r"\b4[0-9]\b", "about 42 of them", True),
        ("regex", r"^42$", "about 42", False),
        ("exact_json", GOLD, '{"artist":"nina  SIMONE","Intent":"play"}', True),
        ("exact_json", GOLD, f" {GOLD}\n", True),
        ("exact_json", GOLD, f"Here: {GOLD}", False),
        ("exact_json", GOLD, f"```json\n{GOLD}\n```", False),
        ("exact_json", GOLD, '{"intent": "Play"}', False),
        ("exact_json", GOLD, '{"intent": "Play", "artist": "Nina Simone", "year": 1965}', False),
        ("exact_json", '{"n": 3, "on": true}', '{"on": "True", "n": "3"}', True),
        ("exact_json", '{"f": {"x": 1, "y": [{"a": 1, "b": 2}]}}', '{"f": {"Y": [{"b": "2", "a": 1}], "x": 1}}', True),
        ("exact_json", '{"f": {"x": 1, "y": 2}}', '{"f": {"x": 2, "y": 1}}', False),
        ("exact_json", '{"f": [1, 2]}', '{"f": [2, 1]}', False),
        ("exact_json", '{"f": ["x"]}', '{"f": "[\'x\']"}', False),
        ("exact_json", '{"f": {}}', '{"f": []}', False),
        ("exact_json", '{"f": {}}', '{"f": "{}"}', False),
        ("exact_json", '{"room": "None"}', '{"room": null}', False),
        ("exact_json", '{"room": "null"}', '{"room": null}', True),
        ("exact_json", '{"room": null}', '{"room": null}', True),
        ("exact_json", '{"room": null}', '{"room": ""}', False),
        ("exact_json", '{"room": null}', "{}", False),
        ("exact_json", '{"n": [1, 0, 1000, 0.1]}', '{"n": [1.0, -0.0, 1e3, 0.10]}', True),
        ("exact_json", '{"n": 1}', '{"n": true}', False),
        ("exact_json", '{"n": 1.5}', '{"n": "1.5"}', True),
        ("exact_json", '{"n": "1.10"}', '{"n": "1.1"}', False),  # a version, for example
        ("exact_json", '{"A": 2, "a": 1}', '{"a": 1}', False),
        ("exact_json", '{"A": 2, "a": 1}', '{"a": 1, "A": 2}', True),
        ("exact_json", '{"A": 2, "a": 1}', '{"a": 2, "A": 1}', False),
        ("exact_json", '{"intent": "x"}', '{"intent": "x", "Intent": "y"}', False),
        ("exact_json", '{"a": 1}', '{"a": 2, "a": 1}', False),
        ("exact_json", '{"f": [{"a": 1}]}', '{"f": [{"a": 2, "a": 1}]}', False),
        ("exact_json", '{"a": "NaN"}', '{"a": NaN}', False),
        ("exact_json", "{}", "not JSON", False),
        ("exact_json", GOLD, f"[{GOLD}]", False),
        ("exact_json", GOLD, "[" * 100_000, False),
    ],
)
def test_metric_judges_an_answer(name: str, gold: str, answer: str, hit: bool) -> None:
    assert METRICS[name].judge(gold, answer)[name] is hit
    assert score(name, [gold], [answer]).hits == (hit,)


def test_exact_json_has_side_scores() -> None:
    answers = [GOLD, '{"intent": "play"}', '{"intent": "Stop"}', "no"]
    scores = score("exact_json", [GOLD] * 4, answers)
    assert scores.rates == {"exact_json": 0.25, "valid_json": 0.75, "intent": 0.5}


def test_invalid_json_with_a_duplicate_name_is_not_valid_json() -> None:
    assert score("exact_json", [GOLD], ['{"intent": "no", "intent": "Play", "artist": "Nina Simone"}']).rates == {
        "exact_json": 0, "valid_json": 0, "intent": 0,
    }  # fmt: skip
    with pytest.raises(DataError) as caught:
        check_golds("exact_json", ['{"a": 2, "a": 1}'], [("d.jsonl", 3)])
    assert "the key 'a' is duplicated" in caught.value.where[0].what


def test_intent_is_scored_only_if_every_gold_has_one() -> None:
    assert set(score("exact_json", [GOLD, '{"a": 1}'], [GOLD, GOLD]).rates) == {"exact_json", "valid_json"}


def test_unknown_metric_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="did you mean exact_json"):
        score("exactjson", ["a"], ["a"])


def test_different_numbers_of_golds_and_answers_raise() -> None:
    with pytest.raises(ValueError):
        score("exact", ["a", "b"], ["a"])


def test_golds_that_cannot_be_scored_are_listed() -> None:
    places = [("d.jsonl", line) for line in (1, 2, 5)]
    check_golds("exact", ["(", "[", "x"], places)
    with pytest.raises(DataError) as caught:
        check_golds("exact_json", [GOLD, "no", "[]"], places)
    assert [place.line for place in caught.value.where] == [2, 5]
    with pytest.raises(DataError, match="2 rows cannot be scored with regex"):
        check_golds("regex", ["(", "[", "x"], places)
    for name in ("contains", "regex"):  # an empty gold is in every answer
        with pytest.raises(DataError, match=f"2 rows cannot be scored with {name}"):
            check_golds(name, ["", "x", " \n"], places)


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return script(Path(shared("snips/score.py")))


def with_intent(value: dict[str, object]) -> dict[str, object]:
    return value if any(name.strip().casefold() == "intent" for name in value) else {"intent": "a", **value}


VALUES = st.one_of(st.sampled_from(["a", "A", " a", "b  c", "B C", "1"]), st.integers(0, 2), st.booleans(), st.none())
# unique names: of names that differ only in case or spaces, the reference scorer keeps the last
OBJECTS = st.dictionaries(st.sampled_from(["intent", "x", "y"]), VALUES, max_size=3) | st.dictionaries(
    st.sampled_from(["Intent ", "x", "y"]), VALUES, max_size=3
)
TEXTS = st.one_of(OBJECTS.map(json.dumps), st.sampled_from(["", "[]", "no", '{"intent": "a"', '"a"', "{} {}"]))


@given(st.lists(st.tuples(OBJECTS.map(with_intent).map(json.dumps), TEXTS), min_size=1, max_size=8))
def test_exact_json_agrees_with_the_reference(reference: ModuleType, pairs: list[tuple[str, str]]) -> None:
    golds, answers = [gold for gold, _ in pairs], [answer for _, answer in pairs]
    theirs, ours = reference.score(golds, answers), score("exact_json", golds, answers).rates
    assert ours == {"exact_json": theirs["exact"], "valid_json": theirs["valid_json"], "intent": theirs["intent"]}


def test_exact_json_agrees_with_the_reference_on_real_golds(reference: ModuleType) -> None:
    file = Path(shared("snips/test_210.jsonl"))
    golds = [json.loads(line)["messages"][-1]["content"] for line in file.read_text(encoding="utf-8").splitlines()]
    answers = [[gold, gold.upper(), gold[:-1], golds[0]][i % 4] for i, gold in enumerate(golds)]
    theirs, ours = reference.score(golds, answers), score("exact_json", golds, answers).rates
    assert ours == {"exact_json": theirs["exact"], "valid_json": theirs["valid_json"], "intent": theirs["intent"]}
    assert 0.25 < ours["exact_json"] < 0.75


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (1, 1, 1 / (1 + 1.96**2), 1.0),  # by hand: 1 / (1 + z^2)
    ],
)
def test_wilson_equals_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=6e-5)
    mirrored = wilson_interval(n - successes, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_rate_and_stays_within_0_and_1(counts: tuple[int, int]) -> None:
    low, high = wilson_interval(*counts)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1 and low < high


def difference(both: int, gained: int, lost: int, neither: int) -> tuple[float, float, float]:
    base = [True] * both + [False] * gained + [True] * lost + [False] * neither
    tuned = [True] * (both + gained) + [False] * (lost + neither)
    result = paired_difference(base, tuned)
    return result.value, result.low, result.high


def test_paired_difference_equals_a_published_example() -> None:
    # Bentur et al. 2009 as worked by Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014), 2850-2875.
    assert difference(1, 1, 7, 12) == pytest.approx((-6 / 21, -0.507, -0.026), abs=6e-4)


def test_paired_difference_of_correlated_rows_equals_values_by_hand() -> None:
    # Computed without the package, with the Wilson limits by bisection; phi is -0.1147, then 0.7146.
    assert difference(36, 12, 2, 0) == pytest.approx((0.2, 0.056930, 0.340428), abs=1e-6)
    assert difference(80, 20, 5, 70) == pytest.approx((15 / 175, 0.029937, 0.140127), abs=1e-6)


def test_paired_difference_of_extreme_counts_equals_values_by_hand() -> None:
    # All 10 gained: both margins are 0, so phi = 0, and the ends are those of the Wilson intervals 0/10 and 10/10.
    reach = 1.959964**2 / (10 + 1.959964**2)
    assert difference(0, 10, 0, 0) == pytest.approx((1, 1 - math.hypot(reach, reach), 1), abs=1e-6)
    # One row: the interval contains zero.
    value, low, high = difference(0, 1, 0, 0)
    assert (value, high) == (1, 1) and -0.2 < low < 0
    # All agree: no difference, with a narrower interval for more rows.
    assert difference(0, 0, 0, 1)[1:] == pytest.approx((-0.7935, 0.7935), abs=1e-4)
    assert difference(0, 0, 0, 100)[2] < 0.05
    assert difference(50, 0, 0, 50)[2] < 0.05


@pytest.mark.parametrize("rows", range(1, 11))
def test_equal_coins_are_rarely_called_different(rows: int) -> None:
    """Exact probability of a claim by `describe_difference`, for independent and for correlated pairs of coins."""
    claims = {
        (gained, lost, both)
        for gained, lost, both in itertools.product(range(rows + 1), repeat=3)
        if gained + lost + both <= rows
        and metrics.describe_difference(
            asdict(metrics.Estimate(*difference(both, gained, lost, rows - gained - lost - both)))
        )[0] != "unclear"
    }  # fmt: skip
    for rate, same in itertools.product((0.1, 0.3, 0.5, 0.7), (0.0, 0.5)):
        changed = (1 - same) * rate * (1 - rate)
        both = rate - changed
        cells = changed, changed, both, 1 - both - 2 * changed
        claimed = 0.0
        for counts in claims:
            numbers = [*counts, rows - sum(counts)]
            ways = math.factorial(rows) / math.prod(map(math.factorial, numbers))
            claimed += ways * math.prod(cell**number for cell, number in zip(cells, numbers, strict=True))
        assert claimed <= (0.0 if rows < metrics.MIN_CLAIM_ROWS else 0.072), (rate, same)


@pytest.mark.parametrize("rows", range(2, 11))
def test_means_of_no_change_are_rarely_called_different(rows: int) -> None:
    """Means of losses, margins and scores, as compared by `--tasks` and for preferences."""
    changes = np.random.default_rng(rows).normal(size=(4000, rows)).tolist()
    intervals = [metrics.mean_interval(values) for values in changes]
    assert 0.04 < statistics.fmean(low > 0 or high < 0 for low, high in intervals) < 0.06


def test_tasks_with_hits_are_compared_as_hits() -> None:
    compared = general._compare_scores([0.0] * 4, [1.0] * 4)
    assert compared == asdict(metrics.paired_difference([False] * 4, [True] * 4))
    assert general._compare_scores([0.0, 0.0], [1.0, 1.0])["low"] == 0
    compared = general._compare_scores([0.5, 0.25, 0.0], [0.5, 0.5, 0.5])
    assert compared["value"] == 0.25 and compared["low"] == pytest.approx(0.25 - 4.3027 * 0.25 / 3**0.5)


def test_clear_gain_excludes_zero_and_mirrors() -> None:
    value, low, high = difference(0, 148, 0, 28)
    assert 0.7 < low < value < high < 0.95
    assert difference(0, 0, 148, 28) == pytest.approx((-value, -high, -low))


@given(st.tuples(*[st.integers(0, 30)] * 4).filter(any))
def test_paired_difference_contains_its_value(counts: tuple[int, int, int, int]) -> None:
    value, low, high = difference(*counts)
    assert -1 <= low <= value <= high <= 1 and low < high


@pytest.mark.parametrize("both, changed, neither", [(80, 40, 80), (10, 60, 140), (0, 30, 100)])
def test_chance_is_called_a_difference_in_about_5_percent(both: int, changed: int, neither: int) -> None:
    flip = random.Random(0)
    significant = 0
    for _ in range(1000):
        gained = sum(flip.random() < 0.5 for _ in range(changed))
        _, low, high = difference(both, gained, changed - gained, neither)
        significant += low > 0 or high < 0
    assert 20 <= significant <= 80


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("gold", "too many positional arguments"),
        ("gold, answer, row", "missing a required argument: 'row'"),
        ("completions, **more", "too many positional arguments"),
        ("prompt, answer", "prompt is not"),
        ("answer, gold", "gold is not"),
        ("prompts, completions", "prompts is not"),
    ],
)
def test_function_with_other_parameters_is_refused(parameters: str, message: str, tmp_path: Path) -> None:
    """Arguments are positional, so a function that expects a prompt would silently judge the right answer."""
    file = tmp_path / "own.py"
    file.write_text(f"def own({parameters}):\n    return True\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=re.escape(f"own.py:own({parameters}): {message}")) as raised:
        find_metric(f"{file}:own")
    assert "(right answer, answer)" in raised.value.fix


@pytest.mark.parametrize("name", ["exact", "preference", "mean_reward"])
def test_function_with_the_name_of_a_metric_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(f"def {name}(gold, answer):\n    return True\n")
    with pytest.raises(RecipeError, match="a function with the name of a built-in metric"):
        find_metric(f"{file}:{name}")


def test_function_object_is_refused() -> None:
    with pytest.raises(RecipeError, match="a name or a function, not"):
        find_metric(test_function_object_is_refused)  # type: ignore[arg-type]


def test_user_function_is_a_metric(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def near(gold, answer):\n    return abs(float(gold) - float(answer or 0)) < 0.1\n")
    scores = score(f"{file}:near", ["1.0", "2.0"], ["1.05", "3"])
    assert scores.metric == "near" and scores.hits == (True, False) and scores.rates == {"near": 0.5}
    for name, message in ((f"{file}:far", "no such function"), (f"{tmp_path}/none.py:x", "no such file")):
        with pytest.raises(RecipeError, match=message):
            find_metric(name)
    file.write_text("1 / 0")
    with pytest.raises(RecipeError, match="ZeroDivisionError"):
        find_metric(f"{file}:near")


def test_user_file_is_run_again_only_if_it_changes(tmp_path: Path) -> None:
    file, log = tmp_path / "own.py", tmp_path / "log"
    text = f"with open({str(log)!r}, 'a') as f:\n    f.write('x')\ndef own(gold, answer):\n    return gold == answer\n"
    file.write_text(text)
    name = f"{file}:own"
    check_golds(name, ["x"], [("rows.jsonl", 1)])
    assert score(name, ["x"], ["x"]).hits == (True,) and log.read_text() == "x"
    file.write_text(text.replace("==", "!="))
    assert score(name, ["x"], ["x"]).hits == (False,) and log.read_text() == "xx"


def test_user_file_imports_modules_next_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "first_neighbour.py").write_text("WORD = 'yes'\n", encoding="utf-8")
    (tmp_path / "late_neighbour.py").write_text("def same(a, b):\n    return a == b\n", encoding="utf-8")
    (tmp_path / "json.py").write_text("raise SystemExit('not the module of that name')\n", encoding="utf-8")
    file = tmp_path / "own.py"
    body = "import json\nfrom first_neighbour import WORD\ndef own(gold, answer):\n    import late_neighbour\n"
    file.write_text(
        f"{body}    return late_neighbour.same(answer, json.loads('\"yes\"')) and WORD == 'yes'\n", encoding="utf-8"
    )
    assert find_metric(f"{file}:own").judge("yes", "yes") == {"own": True}


def test_broken_user_function_is_found_by_the_golds(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("import json\ndef same(gold, answer):\n    return json.loads(gold) == json.loads(answer)\n"
                    "def broken(gold, answer):\n    return gold.strp() == answer\n")  # fmt: skip
    check_golds(f"{file}:same", ['{"a": 1}'], [("rows.jsonl", 1)])
    assert score(f"{file}:same", ['{"a": 1}', "2"], ["not JSON", "2"]).rates == {"same": 0.5}
    with pytest.raises(DataError) as raised:
        check_golds(f"{file}:broken", ["x"], [("rows.jsonl", 7)])
    assert "strp" in str(raised.value.where[0].what) and raised.value.where[0].line == 7


@pytest.mark.parametrize(
    "how",
    ["ast.literal_eval(answer)", "ElementTree.fromstring(answer)", "yaml.safe_load(answer)", "exec('exit()')", "1 / 0"],
)
def test_answer_that_makes_the_function_fail_is_a_miss(how: str, tmp_path: Path) -> None:
    """Parsers raise other errors than ValueError, and an answer run as code may exit."""
    file = tmp_path / "own.py"
    file.write_text("import ast, yaml\nfrom xml.etree import ElementTree\n"
                    f"def own(gold, answer):\n    return gold == answer or bool({how})\n"
                    f"def bad(gold, answer):\n    answer = '[<: *'\n    return bool({how})\n")  # fmt: skip
    check_golds(f"{file}:own", ["x"], [("rows.jsonl", 7)])
    scores = score(f"{file}:own", ["x", "x"], ["[<: *", "x"])
    assert scores.hits == (False, True) and len(scores.errors) == 1 and scores.errors[0].endswith("for '[<: *'")
    failed = {"metric_errors": {"tuned": scores.failures}}
    [note] = describe_cut({"rows": 2, "metric": "own", **failed})
    assert note == f"own failed on 1 of 2 tuned answers, which count as misses: {scores.errors[0]}"
    with pytest.raises(DataError, match="1 rows cannot be scored"):
        check_golds(f"{file}:bad", ["x"], [("rows.jsonl", 7)])


@pytest.mark.parametrize(
    "line", ["import os; os.environ['NOT_SET_HERE']", "open('none.txt')", "assert False", "exit()"]
)
def test_user_file_that_fails_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(f"{line}\ndef own(gold, answer):\n    return True\n")
    with pytest.raises(RecipeError, match=r"own\.py:own: [A-Z]\w+: "):
        find_metric(f"{file}:own")


@pytest.mark.parametrize("value", ["0.5", "1.0", "'yes'", "None", "2", "[]"])
def test_function_that_returns_neither_hit_nor_miss_is_refused(value: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(f"def k(gold, answer):\n    return {value}\n"
                    f"def late(gold, answer):\n    return True if gold == answer else {value}\n")  # fmt: skip
    with pytest.raises(RecipeError) as raised:
        check_golds(f"{file}:k", ["x"], [("rows.jsonl", 7)])
    assert "True or False" in raised.value.fix
    assert f"k returns {ast.literal_eval(value)!r}" in raised.value.what and "rows.jsonl:7" in raised.value.what
    check_golds(f"{file}:k", ["x"], [("rows.jsonl", 7)], any_number=True)  # a reward
    check_golds(f"{file}:late", ["x"], [("rows.jsonl", 7)])
    with pytest.raises(RunError, match="for the answer 'y'"):
        score(f"{file}:late", ["x", "x"], ["x", "y"])


@pytest.mark.parametrize("value", ["True", "1", "np.bool_(True)", "np.int64(1)"])
def test_booleans_0_and_1_are_hits_and_misses(value: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(f"import numpy as np\ndef k(gold, answer):\n    return {value}\n")
    check_golds(f"{file}:k", ["x"], [("rows.jsonl", 7)])
    assert score(f"{file}:k", ["x"], ["y"]).hits == (True,)


def test_user_function_may_exit_or_raise_any_error(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("import sys\nclass Odd(Exception): pass\n"
                    "def ends(gold, answer):\n    if gold != answer: sys.exit(0)\n    return True\n"
                    "def odd(gold, answer):\n    if gold != answer: raise Odd('no')\n    return True\n"
                    "def worse(gold, answer):\n    raise Odd('no')\n")  # fmt: skip
    for name in ("ends", "odd"):  # an answer that it fails on is a miss
        assert score(f"{file}:{name}", ["x", "x"], ["x", "y"]).hits == (True, False)
    with pytest.raises(DataError, match="cannot be scored"):
        check_golds(f"{file}:worse", ["x"], [("rows.jsonl", 7)])
    for text, message in (("import sys; sys.exit(7)", "SystemExit: 7"), ("open('/none/there')", "FileNotFoundError")):
        file.write_text(text)
        with pytest.raises(RecipeError, match=message):
            find_metric(f"{file}:ends")


def test_pattern_that_takes_too_long_is_a_miss_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "MAX_SEARCH_S", 0.1)
    before = signal.getsignal(signal.SIGVTALRM)
    scores = score("regex", ["(a+)+b", "a+"], ["a" * 29, "a" * 29])
    assert scores.hits == (False, True)
    (record,) = caplog.records
    assert "'(a+)+b' takes more than 0.1 s" in record.getMessage()
    assert signal.getsignal(signal.SIGVTALRM) is before


def test_numbers_have_one_format_everywhere() -> None:
    values = {"perplexity": 16075.645, "loss": 0.0002255}
    assert [format_score(name, value) for name, value in values.items()] == ["16,076", "2.26e-4"]
    assert format_score("loss", 2.5) == "2.500" and format_score("loss", 0.0) == "0.000"
    shown = _format_scores({"metric": "exact", "tuned": values}, {})
    assert [score["sides"][0]["text"] for score in shown] == ["16,076", "2.26e-4"]


@pytest.mark.parametrize(
    ("rows", "verdict"), [(4, "better, but only 4 rows: +50.0 points"), (40, "better: +50.0 points")]
)
def test_verdict_on_few_rows_says_so(rows: int, verdict: str) -> None:
    difference = {"value": 0.5, "low": 0.1, "high": 0.9}
    assert describe_change({"rows": rows, "difference": difference, "metric": "exact"})[1].startswith(verdict)


@pytest.mark.parametrize(
    ("low", "verdict", "expected"),
    [(-0.1, "unclear", "no clear difference"), (0.01, "unclear", "not a fair test"), (0.01, "worse", "")],
)
def test_leaderboard_says_why_there_is_no_verdict(
    low: float, verdict: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = {"score": 0.5, "low": 0.4, "high": 0.6, "loss": None}
    best = {"run": "a", "behind": {"value": 0.0, "low": 0.0, "high": 0.0}, "verdict": "best", **sides}
    other = {"run": "b", "behind": {"value": 0.2, "low": low, "high": 0.4}, "verdict": verdict, **sides}
    print_leaderboard([best, other], "exact", Console(width=200))
    line = next(line for line in capsys.readouterr().out.splitlines() if " b " in line)
    assert (": " in line) == bool(expected) and expected in line
