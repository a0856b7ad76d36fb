"""Rewards: the forms of user-defined functions, their results, errors and time limits."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from strop.data.types import Example, Prompt
from strop.errors import DataError, RecipeError, RunError
from strop.evaluation.rewards import Candidate, check_rewards, compute_rewards, hash_rewards, parse_rewards

ROWS = {("rows.jsonl", line): {"topic": f"t{line}"} for line in range(1, 5)}


def prompt(line: int, gold: str | None = "yes") -> Prompt:
    example = Example(np.zeros(3, np.int32), np.zeros(3, np.float32), "rows.jsonl", line)
    return Prompt((example,), gold=gold, messages=({"role": "user", "content": f"question {line}"},))


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate(text, prompt(line)) for line, text in enumerate(texts, 1)]


def write(folder: Path, text: str) -> str:
    (folder / "own.py").write_text(text, encoding="utf-8")
    return f"{folder / 'own.py'}:own"


def totals(spec: str, *texts: str, timeout: float = 20.0) -> list[float]:
    return [reward.total for reward in compute_rewards(parse_rewards(spec), candidates(*texts), ROWS, timeout)]


@pytest.mark.parametrize("given", ["exact_json, contains=0.2", ["exact_json", "contains=0.2"]])
def test_rewards_are_parsed_from_a_list_or_from_commas(given: str | list[str]) -> None:
    assert [(reward.name, reward.weight) for reward in parse_rewards(given)] == [("exact_json", 1), ("contains", 0.2)]


@pytest.mark.parametrize("given", ["exact=x", "exact,exact", "choice", "exact,"])
def test_invalid_rewards_are_refused(given: str) -> None:
    with pytest.raises(RecipeError):
        parse_rewards(given)


@pytest.mark.parametrize(
    "text",
    [
        "def own(completion, row): return (completion == row['answer']) + 10 * int(row['topic'][1:])",
        "def own(text, row, scale=10): return (text == row['answer']) + scale * int(row['topic'][1:])",
        "async def own(completion, row): return (completion == row['answer']) + 10 * int(row['topic'][1:])",
        "def own(completions, rows):\n"
        "    pairs = zip(completions, rows)\n"
        "    return [(text == row['answer']) + 10 * int(row['topic'][1:]) for text, row in pairs]",
        "import numpy as np\n"
        "def own(completions, rows):\n"
        "    pairs = zip(completions, rows)\n"
        "    return np.array([(text == row['answer']) + 10 * int(row['topic'][1:]) for text, row in pairs])",
        "import functools\n"
        "async def own(completion, row): return (completion == row['answer']) + 10 * int(row['topic'][1:])\n"
        "own = (lambda f: functools.wraps(f)(lambda *args: f(*args)))(own)",
        "class Own:\n"
        "    async def __call__(self, completion, row):\n"
        "        return {'right': completion == row['answer'], 'topic': 10 * int(row['topic'][1:])}\n"
        "own = Own()",
    ],
)
def test_all_forms_see_the_row(text: str, tmp_path: Path) -> None:
    assert totals(write(tmp_path, text), "yes", "no", "yes") == [11, 20, 31]


@pytest.mark.parametrize("names", ["gold, answer", "right, completion", "Expected, text, tolerance=1"])
def test_right_answer_comes_first_where_the_first_name_says_so(names: str, tmp_path: Path) -> None:
    first, second = (name.strip() for name in names.split(",")[:2])
    spec = write(tmp_path, f"def own({names}): return ({first} == 'yes') + 2 * ({second} == 'yes')")
    assert totals(spec, "yes", "no") == [3, 1]


@pytest.mark.parametrize(
    "text",
    [
        *("def own(row, completion): return 1", "def own(completion): return 1", "def own(prompts, rows, x): return 1"),
        *("def own(a, b): return 1", "def own(text, r): return 1", "def own(answer, right_answer): return 1"),
        *("def own(text): return 1", "from operator import eq as own", "def own(text='', r=None): return 1"),
    ],
)
def test_other_signatures_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_rewards(write(tmp_path, text))
    assert "f(completion, row), f(completions, rows)" in raised.value.fix


def test_row_has_the_prompt_unless_a_column_has_its_name(tmp_path: Path) -> None:
    spec = write(
        tmp_path, "def own(completion, row): return [sorted(row), row['prompt'], row['answer']].index(completion)"
    )
    (reward,) = parse_rewards(spec)
    rows: list[dict[str, object]] = []
    reward = type(reward)(spec, 1.0, "own", "row", function=lambda text, row: rows.append(row) or 1.0)
    reward.compute(candidates("a", "b"), {("rows.jsonl", 1): {"prompt": "column", "n": 1}}, 20.0)
    messages = [[{"role": "user", "content": f"question {line}"}] for line in (1, 2)]
    assert rows == [
        {"prompt": "column", "n": 1, "answer": "yes", "messages": messages[0]},
        {"prompt": "question 2", "answer": "yes", "messages": messages[1]},
    ]


def test_calls_of_an_async_function_run_at_the_same_time_in_one_loop(tmp_path: Path) -> None:
    """Each call waits until all three have begun. A client of an earlier step still works."""
    spec = write(
        tmp_path,
        "import asyncio\n"
        "begun, lock = [], asyncio.Lock()\n"
        "async def own(completion, row):\n"
        "    begun.append(completion)\n"
        "    while len(begun) % 3: await asyncio.sleep(0.001)\n"
        "    async with lock: await asyncio.sleep(0)\n"
        "    return len(begun)\n",
    )

    async def in_a_notebook() -> list[float]:
        return totals(spec, "a", "b", "c")

    assert totals(spec, "a", "b", "c") == [3, 3, 3]
    assert asyncio.run(in_a_notebook()) == [6, 6, 6]
    assert len([thread for thread in threading.enumerate() if thread.name == "rewards"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def own(completion, row): raise KeyError('colour')",
            "row rows.jsonl:1: KeyError: 'colour' (for the answer 'a')",
        ),
        ("def own(completion, row): return float('nan')", "row rows.jsonl:1: returns nan"),
        ("def own(completion, row): return '1.0'", "row rows.jsonl:1: returns '1.0'"),
        ("def own(completion, row): return None", "row rows.jsonl:1: returns None"),
        ("def own(completion, row): return {}", "row rows.jsonl:1: returns {}"),
        ("def own(completion, row): return {'a': 1, 'b': 'x'}", "row rows.jsonl:1: returns 'x' for own.b"),
        ("def own(completion, row): return {completion: 1}", "returns own.b, and own.a before"),
        ("def own(completion, row): return 10**400", "row rows.jsonl:1: returns 1000"),
        ("def own(completion, row): raise TimeoutError('my server')", "row rows.jsonl:1: TimeoutError: my server"),
        ("async def own(completion, row): raise TimeoutError('my server')", "TimeoutError: my server"),
        ("import sys\nasync def own(completion, row): sys.exit(7)", "row rows.jsonl:1: SystemExit: 7"),
        ("async def own(completion, row): raise KeyboardInterrupt", "row rows.jsonl:1: SystemExit"),
        ("def own(completions, rows): return 1", "returns 1 for 2 completions"),
        ("def own(completions, rows): return [1]", "returns [1] for 2 completions"),
        ("async def own(completion, row): raise ValueError('no')", "row rows.jsonl:1: ValueError: no"),
        ("import sys\ndef own(gold, answer): sys.exit(0)", "row rows.jsonl:1: SystemExit: 0"),
    ],
)
def test_errors_name_the_row(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RunError) as raised:
        totals(write(tmp_path, text), "a", "b")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "import time\ndef own(completion, row): time.sleep(20)",
        "import time\ndef own(completion, row):\n    try: time.sleep(20)\n    except Exception: return 1",
        "import time\ndef own(completions, rows): time.sleep(20)",
        "import asyncio\nasync def own(completion, row): await asyncio.sleep(20)",
        "import time\nasync def own(completion, row): time.sleep(0.2)",
        "import asyncio\nasync def own(completion, row):\n"
        "    try: await asyncio.sleep(20)\n    except asyncio.CancelledError: return 1",
    ],
)
def test_slow_calls_end_with_an_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"row rows\.jsonl:1: takes more than 0.05 s") as raised:
        totals(write(tmp_path, text), "a", timeout=0.05)
    assert "--train.reward_timeout" in raised.value.fix


def test_parts_have_the_names_of_rewards_and_dicts(tmp_path: Path) -> None:
    spec = write(tmp_path, "def own(completion, row): return {'short': 0.5, 'polite': 0.25}")
    (rewarded,) = compute_rewards(parse_rewards(f"exact,{spec}=2"), candidates("yes"), ROWS, 20.0)
    assert rewarded.total == 2.5 and rewarded.parts == {"exact": 1, "own.short": 0.5, "own.polite": 0.25}


def test_fix_names_the_function_that_fails_on_right_answers(tmp_path: Path) -> None:
    spec = write(tmp_path, "def own(gold, answer): return {}[gold]")
    with pytest.raises(DataError, match="1 rows") as raised:
        check_rewards(parse_rewards(spec), [prompt(1), prompt(2, None)], ROWS, 20.0)
    assert "fix own" in raised.value.fix and "(right answer, answer)" in raised.value.fix


def test_function_of_the_row_is_called_for_the_first_row_before_training(tmp_path: Path) -> None:
    spec = write(tmp_path, "def own(completion, row): return row['colour']")
    with pytest.raises(RecipeError, match=r"rows\.jsonl:1: KeyError: 'colour'"):
        check_rewards(parse_rewards(spec), [prompt(1), prompt(2, None)], ROWS, 20.0)


def test_hash_depends_on_file_and_columns(tmp_path: Path) -> None:
    spec = write(tmp_path, "def own(completion, row): return 1")
    rewards = parse_rewards(spec)
    assert hash_rewards(parse_rewards("exact"), {}) is None
    first, other = hash_rewards(rewards, ROWS), hash_rewards(rewards, {("rows.jsonl", 1): {"topic": "x"}})
    moved = hash_rewards(rewards, {("elsewhere.jsonl", line): row for (_, line), row in ROWS.items()})
    assert first and re.fullmatch("[0-9a-f]{64}", first) and first != other and first == moved
    write(tmp_path, "def own(completion, row): return 2")
    assert hash_rewards(rewards, ROWS) != first


def test_names_of_parts_stay_the_same_from_step_to_step(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        "seen = []\ndef own(completion, row):\n    seen.append(1)\n    return {'a' if len(seen) < 3 else 'b': 1}",
    )
    rewards = parse_rewards(spec)
    compute_rewards(rewards, candidates("x", "y"), ROWS, 20.0)
    with pytest.raises(RunError, match=r"returns own\.b, and own\.a before"):
        compute_rewards(rewards, candidates("x"), ROWS, 20.0)


def test_changed_row_does_not_reach_other_completions(tmp_path: Path) -> None:
    """Otherwise the rewards of a resumed run would differ."""
    rows = {("rows.jsonl", line): {"tags": ["a"]} for line in (1, 2)}
    spec = write(
        tmp_path,
        "def own(completion, row):\n    row['tags'].append('b')\n    row['messages'][0]['content'] += '!'\n"
        "    return len(row['tags']) + len(row['messages'][0]['content'])",
    )
    rewards, prompts = parse_rewards(spec), [Candidate("x", prompt(1)), Candidate("y", prompt(1))]
    results = [[r.total for r in compute_rewards(rewards, prompts, rows, 20.0)] for _ in range(2)]
    assert results == [[13, 13], [13, 13]] and rows["rows.jsonl", 1] == {"tags": ["a"]}
