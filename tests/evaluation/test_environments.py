"""Environments: what is a tool, how `reset` is called, errors and timeouts of tools, and rewards."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strop.data.rendering.tool_calls import Call, InvalidCall
from strop.data.types import Example, Message, Prompt
from strop.errors import RecipeError, RunError
from strop.evaluation.environments import Environment, load_environment
from strop.evaluation.rewards import Candidate, parse_rewards

SHOP = '''
import asyncio
import time


class Base:
    def price(self, item: str) -> int:
        """Return the price of an item.

        Args:
            item: name of the item
        """
        return {"tea": 3, "cup": 5}[item]


class Shop(Base):
    made = 0

    def __init__(self):
        Shop.made += 1

    def reset(self, row, seed):
        self.row, self.seed, self.done, self.reward = row, seed, False, {"sold": 1, "left": 0.5}

    async def wait(self, seconds: float, value: str = "done") -> str:
        """Wait.

        Args:
            seconds: how long
            value: what to return
        """
        await asyncio.sleep(seconds)
        return value

    def block(self) -> str:
        """Block for a while."""
        time.sleep(5)
        return "late"

    def stock(self) -> dict:
        """Return the stock."""
        return {"tea": [1, 2.5], "cup": None}

    def leave(self) -> str:
        """End the process."""
        raise SystemExit(3)

    @staticmethod
    def greet() -> str:
        """Greet."""
        return "hello"

    def _hidden(self):
        pass

    def close(self):
        pass
'''


def load(folder: Path, code: str = SHOP, name: str = "Shop", timeout: float = 5.0) -> Environment:
    file = folder / "shop.py"
    file.write_text(code, encoding="utf-8")
    return load_environment(f"{file}:{name}", timeout)


def prompt(*messages: dict[str, Any], gold: str | None = None) -> Prompt:
    example = Example(np.zeros(1, np.int32), np.zeros(1, np.float32), "rows.jsonl", 7)
    return Prompt((example,), gold=gold, messages=messages or ({"role": "user", "content": "buy tea"},))


def call(environment: Environment, *calls: Any) -> list[tuple[str, bool]]:
    used = environment.take()
    return environment.call_tools([(used, each) for each in calls])


def test_public_methods_are_tools_with_schemas(tmp_path: Path) -> None:
    environment = load(tmp_path)
    assert list(environment.schemas) == ["price", "wait", "block", "stock", "leave", "greet"]
    assert environment.schemas["wait"] == {
        "type": "function",
        "function": {
            "name": "wait", "description": "Wait.",
            "parameters": {
                "type": "object",
                "properties": {
                    "seconds": {"type": "number", "description": "how long"},
                    "value": {"type": "string", "description": "what to return"},
                },
                "required": ["seconds"],
            },
        },
    }  # fmt: skip


def test_results_and_errors_become_texts_for_the_model(tmp_path: Path) -> None:
    environment = load(tmp_path)
    results = call(
        environment, Call("price", {"item": "tea"}), Call("stock", {}), Call("greet", {}),
        Call("price", {"item": "sofa"}), Call("price", {"thing": "tea"}), Call("prise", {"item": "tea"}),
        Call("reset", {"row": {}}), Call("leave", {}),
        InvalidCall("the call is not valid JSON"),
    )  # fmt: skip
    tools = "price, wait, block, stock, leave, greet"
    assert results == [
        ("3", False), ('{"tea": [1, 2.5], "cup": null}', False), ("hello", False), ("error: KeyError: 'sofa'", True),
        ("error: price: missing a required argument: 'item'", True),
        (f"error: there is no tool prise (did you mean price?); the tools are {tools}", True),
        (f"error: there is no tool reset (did you mean greet?); the tools are {tools}", True),
        ("error: SystemExit: 3", True),
        ("error: the call is not valid JSON", True),
    ]  # fmt: skip


def test_tools_have_the_time_limit_of_rewards(tmp_path: Path) -> None:
    environment = load(tmp_path, timeout=0.2)
    results = call(environment, Call("block", {}), Call("wait", {"seconds": 9}), Call("wait", {"seconds": 0}))
    late = ("error: takes more than 0.2 s", True)
    assert results == [late, late, ("done", False)]


def test_async_tools_run_at_the_same_time(tmp_path: Path) -> None:
    environment = load(tmp_path, timeout=5)
    seen: list[int] = []
    most = 0

    async def wait(self: Any, seconds: float) -> str:
        nonlocal most
        seen.append(1)
        most = max(most, len(seen))
        await asyncio.sleep(seconds)
        seen.pop()
        return "done"

    used = environment.take()
    type(used).wait = wait
    assert environment.call_tools([(used, Call("wait", {"seconds": 0.01}))] * 4) == [("done", False)] * 4
    assert most == 4


def test_reset_gets_row_and_seed_and_objects_are_reused(tmp_path: Path) -> None:
    environment = load(tmp_path)
    first = environment.take()
    messages = [Message("user", "buy tea")]
    assert environment.reset(first, {"price": 3}, messages, 11, "rows.jsonl:7") == messages
    assert (first.row, first.seed) == ({"price": 3}, 11)
    second = environment.take()
    environment.give_back(first)
    assert environment.take() is first and second is not first


@pytest.mark.parametrize(("signature", "given"), [
    ("self, **kwargs", {"kwargs": {"price": 3, "prompt": "buy"}}),  # as in TRL
    ("self, price, **rest", {"price": 3, "rest": {"prompt": "buy"}}),
    ("self, price, seed=0", {"price": 3, "seed": 5}),
    ("self", {}),
    ("self, row, **rest", {"row": {"price": 3, "prompt": "buy"}, "rest": {"price": 3, "prompt": "buy"}}),
])  # fmt: skip
def test_reset_gets_what_it_names(tmp_path: Path, signature: str, given: dict[str, Any]) -> None:
    body = f"    def reset({signature}):\n        self.given = {{k: v for k, v in locals().items() if k != 'self'}}\n"
    tool = '    def look(self) -> str:\n        """Look."""\n        return "x"\n'
    environment = load(tmp_path, f"class Shop:\n{body}{tool}")
    used = environment.take()
    environment.reset(used, {"price": 3, "prompt": "buy"}, [Message("user", "buy")], 5, "rows.jsonl:7")
    assert used.given == given


@pytest.mark.parametrize(("returned", "texts"), [
    ("None", ["be brief", "buy tea"]),
    ("' It is Monday.'", ["be brief", "buy tea It is Monday."]),
    ("[{'role': 'user', 'content': 'hello'}]", ["hello"]),
])  # fmt: skip
def test_reset_may_return_a_text_or_messages(tmp_path: Path, returned: str, texts: list[str]) -> None:
    tool = '    def look(self) -> str:\n        """Look."""\n        return "x"\n'
    environment = load(tmp_path, f"class Shop:\n    def reset(self):\n        return {returned}\n{tool}")
    messages = [Message("system", "be brief"), Message("user", "buy tea")]
    changed = environment.reset(environment.take(), {}, messages, 0, "rows.jsonl:7")
    assert [message.content for message in changed] == texts and messages[1].content == "buy tea"


@pytest.mark.parametrize(("body", "message"), [
    ("def reset(self, colour):\n        pass", "reset: row rows.jsonl:7: missing a required argument: 'colour'"),
    ("def reset(self):\n        raise KeyError('x')", "reset: row rows.jsonl:7: KeyError: 'x'"),
    ("def reset(self):\n        return 3", "reset: row rows.jsonl:7: returns messages is a number, not a list"),
    ("def reset(self):\n        return [{'role': 'assistant', 'content': 'a'}]", "the last message is not the user's"),
])  # fmt: skip
def test_failing_reset_names_the_row(tmp_path: Path, body: str, message: str) -> None:
    tool = '    def look(self) -> str:\n        """Look."""\n        return "x"\n'
    environment = load(tmp_path, f"class Shop:\n    {body}\n{tool}")
    with pytest.raises(RunError) as failed:
        environment.reset(environment.take(), {}, [Message("user", "a")], 0, "rows.jsonl:7")
    assert message in failed.value.what and failed.value.fix


@pytest.mark.parametrize(("code", "name", "message"), [
    ("x = 1", "Shop", "no such function in the file"),
    ("class Shop:\n    def look(self) -> str:\n        '''Look.'''\n", "Shop", "it has no method reset"),
    ("class Shop:\n    def reset(self): ...\n", "Shop", "no public method, so it has no tool"),
    (
        "class Shop:\n    def reset(self): ...\n    def look(self, a):\n        '''Look.'''\n", "Shop",
        "shop.py:3: environment {file}:Shop: the tool look: Argument a is missing a type hint",
    ),
    ("class Shop:\n    def reset(self): ...\n    def look(self):\n        pass\n", "Shop", "it has no docstring"),
    ("class Shop:\n    def __init__(self, x): ...\n    def reset(self): ...\n    def f(self):\n        'F.'\n", "Shop",
     "missing 1 required positional argument"),
    ("def add(a: int) -> int:\n    '''Add.'''\n", "add", "no description for the argument 'a'"),
    ("import nothing_here", "Shop", "ModuleNotFoundError"),
])  # fmt: skip
def test_class_that_cannot_be_an_environment_is_refused(tmp_path: Path, code: str, name: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load(tmp_path, code, name)
    assert message.format(file=tmp_path / "shop.py") in refused.value.what and refused.value.fix


@pytest.mark.parametrize("spec", ["Shop", "shop.txt:Shop", "shop.py:", "nowhere.py:Shop"])
def test_spec_without_file_and_class_is_refused(spec: str) -> None:
    with pytest.raises(RecipeError, match="environment"):
        load_environment(spec, 1.0)


def test_functions_are_an_environment_without_state(tmp_path: Path) -> None:
    docs = "    '''Add.\n\n    Args:\n        a: one\n        b: two\n    '''\n"
    code = f"def add(a: int, b: int) -> int:\n{docs}    return a + b\n"
    environment = load(tmp_path, f"{code}def other() -> str:\n    '''Other.'''\n    return 'x'\n", "add,other")
    assert list(environment.schemas) == ["add", "other"]
    used = environment.take()
    assert environment.reset(used, {}, [Message("user", "a")], 0, "f:1") == [Message("user", "a")]
    assert environment.call_tools([(used, Call("add", {"a": 1, "b": 2}))]) == [("3", False)]
    assert environment.reward(used, "", [], {}, "f:1") == {} and not environment.is_done(used, "f:1")


def test_reward_and_done_are_attributes_properties_or_methods(tmp_path: Path) -> None:
    environment = load(tmp_path)
    used = environment.take()
    environment.reset(used, {}, [], 0, "f:1")
    assert environment.reward(used, "", [], {}, "f:1") == {"Shop.sold": 1.0, "Shop.left": 0.5}
    used.done = True
    assert environment.is_done(used, "f:1")
    kind = type(used)
    del used.reward, used.done
    kind.reward = property(lambda self: 2)
    assert environment.reward(used, "", [], {}, "f:1") == {"Shop": 2.0}
    kind.reward = lambda self, completion, row: len(completion) + row["n"]
    kind.done = lambda self: 1
    assert environment.reward(used, "abc", [], {"n": 2}, "f:1") == {"Shop": 5.0} and environment.is_done(used, "f:1")
    kind.reward = lambda self: float("nan")
    with pytest.raises(RunError, match="reward: row f:1: returns nan"):
        environment.reward(used, "", [], {}, "f:1")
    kind.reward = lambda self: 1 / 0
    with pytest.raises(RunError, match="reward: row f:1: ZeroDivisionError"):
        environment.reward(used, "", [], {}, "f:1")


@pytest.mark.parametrize(("parameters", "result", "expected"), [
    ("completion, row, messages, environment", "len(messages) + environment + row['n']", [6.0, 16.0]),
    ("completions, rows, messages, environments", "[len(m) + e for m, e in zip(messages, environments)]", [3.0, 13.0]),
    ("environments, **kwargs", "environments", [1.0, 11.0]),  # as in TRL
])  # fmt: skip
def test_reward_functions_get_messages_and_environment(
    tmp_path: Path, parameters: str, result: str, expected: list[float]
) -> None:
    (tmp_path / "own.py").write_text(f"def own({parameters}):\n    return {result}\n", encoding="utf-8")
    (reward,) = parse_rewards(f"{tmp_path / 'own.py'}:own")
    assert reward.reads_traces and reward.reads_rows
    rows = {("rows.jsonl", 7): {"n": 3}}
    candidates = [Candidate("a", prompt(), [{}, {}], environment) for environment in (1, 11)]
    parts = reward.compute(candidates, rows, 5.0)
    assert [part["own"] for part in parts] == expected


ODD = '''
import asyncio
from dataclasses import dataclass
from enum import Enum


class Odd:
    def reset(self, row):
        pass

    def pop(self, items: list[str]) -> str:
        """Take an item.

        Args:
            items: all
        """
        return items.pop()

    async def cancel(self) -> str:
        """Cancel."""
        raise asyncio.CancelledError

    def broken(self):
        """Return an object without a text."""
        return Broken()

    def fail(self) -> str:
        """Fail with an exception without a text."""
        raise NoText

    def half(self) -> str:
        """Return half of a character."""
        return "\\ud83d"


class Broken:
    def __str__(self):
        raise ValueError("no")


class NoText(Exception):
    def __str__(self):
        raise ValueError("no")


@dataclass(slots=True)
class Slots:
    n: int = 0

    def reset(self, row):
        self.n = 0

    def tool(self) -> int:
        """Count."""
        return self.n


def decorated(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def plain() -> str:
    """Return a text."""
    return "yes"


def many(*numbers: int) -> int:
    """Add.

    Args:
        numbers: all
    """
    return sum(numbers)


class Colour(Enum):
    RED = "red"


def paint(colour: Colour) -> str:
    """Paint.

    Args:
        colour: which
    """
    return "painted"


def done() -> str:
    """End."""
    return "done"
'''


def test_odd_tools_are_errors_in_the_trace(tmp_path: Path) -> None:
    environment = load(tmp_path, ODD, "Odd")
    used = environment.take()
    call = Call("pop", {"items": ["a", "b"]})
    results = environment.call_tools(
        [(used, call), *((used, Call(name, {})) for name in ("cancel", "broken", "fail", "half"))]
    )
    assert call.arguments == {"items": ["a", "b"]}  # the tool changed a copy
    assert [failed for _, failed in results] == [False, True, True, True, False]
    assert results[0][0] == "b" and results[4][0] == "?" and "CancelledError" in results[1][0]
    slots = load(tmp_path, ODD, "Slots")
    assert not slots.is_done(slots.take(), "rows.jsonl:1")


@pytest.mark.parametrize(("name", "message"), [
    ("many", "the parameter numbers cannot be given by name"), ("paint", "is an Enum"),
    ("done", "done is not a name of a tool"),
])  # fmt: skip
def test_tools_that_no_call_can_reach_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, ODD, name)


def test_rewards_with_a_default_get_the_environment(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "def f(completion, row, environment=None):\n    return float(environment == 'seen')\n", encoding="utf-8"
    )
    [reward] = parse_rewards(f"{tmp_path}/reward.py:f")
    assert reward.parameters == ("environment",)
