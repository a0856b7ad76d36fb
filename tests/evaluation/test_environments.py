"""Environments: what is a tool, how `reset` is called, errors and timeouts of tools, and rewards."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strop.data.rendering.tool_calls import Call, InvalidCall
from strop.data.types import Example, Message, Prompt
from strop.errors import RecipeError, RunError
from strop.evaluation.calls import CallError
from strop.evaluation.environments import End, Environment, Start, load_environment
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
    return turn(environment, environment.take(1)[0], *calls)


def turn(environment: Environment, used: Any, *calls: Any) -> list[tuple[str, bool]]:
    result = environment.start_turn(used, calls).result()
    return list(zip(result.texts, result.failed, strict=True))


def reset(environment: Environment, used: Any, row: Any, messages: list[Message], seed: int = 0) -> list[Message]:
    return environment.reset([Start(used, row, messages, seed, "rows.jsonl:7")])[0]


def reward(environment: Environment, used: Any, completion: str = "", row: Any = {}) -> dict[str, float]:  # noqa: B006
    return environment.rewards([End(used, completion, [], row, "f:1")])[0]


def is_done(environment: Environment, used: Any) -> bool | CallError:
    return environment.start_turn(used, []).result().done


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


TOGETHER = '''
import asyncio
import threading

started, lock, all_in = [], threading.Lock(), threading.Event()


def enter(x):
    with lock:
        started.append(x)
        if len(started) == 4:
            all_in.set()


class Sync:
    def __init__(self):
        self.thread = threading.get_ident()

    def _meet(self, x=0):
        assert threading.get_ident() == self.thread
        enter(x)
        assert all_in.wait(20)
        return x

    def reset(self, seed):
        self._meet(seed)
        return f" {seed}"

    def tool(self, x: int) -> int:
        """Wait for the others.

        Args:
            x: a number
        """
        return self._meet(x)

    def reward(self, row):
        return self._meet(row["x"])

    def done(self):
        return self._meet()


class Async:
    async def _meet(self, x=0):
        enter(x)
        while not all_in.is_set():
            await asyncio.sleep(0.001)
        return x

    async def reset(self, seed):
        return f" {await self._meet(seed)}"

    async def tool(self, x: int) -> int:
        """Wait for the others.

        Args:
            x: a number
        """
        return await self._meet(x)

    async def reward(self, row):
        return await self._meet(row["x"])

    async def done(self):
        return await self._meet()
'''


@pytest.mark.parametrize("kind", ["Sync", "Async"])
def test_members_of_all_traces_run_at_the_same_time(kind: str, tmp_path: Path) -> None:
    environment = load(tmp_path, TOGETHER, kind, timeout=20)
    taken = environment.take(4)

    def meet_again() -> None:
        shared = type(taken[0])._meet.__globals__
        shared["started"].clear()
        shared["all_in"].clear()

    user = [Message("user", "go")]
    starts = [Start(used, {}, user, seed, f"f:{seed}") for seed, used in enumerate(taken)]
    assert [messages[0].content for messages in environment.reset(starts)] == ["go 0", "go 1", "go 2", "go 3"]
    meet_again()
    running = [environment.start_turn(used, [Call("tool", {"x": x})], reads_done=False) for x, used in enumerate(taken)]
    assert [x.result().texts for x in running] == [("0",), ("1",), ("2",), ("3",)]
    meet_again()
    running = [environment.start_turn(used, []) for used in taken]
    assert [x.result().done for x in running] == [False] * 4
    meet_again()
    ends = [End(used, "", [], {"x": x}, f"f:{x}") for x, used in enumerate(taken)]
    assert environment.rewards(ends) == [{kind: float(x)} for x in range(4)]


LATE = '''
import time


class Late:
    def reset(self):
        self.calls = 0

    def loop(self) -> str:
        """Loop."""
        while True:
            pass

    def stubborn(self) -> str:
        """Catch what ends the call."""
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                return "ended"

    def sleep(self) -> str:
        """Sleep, which Python cannot interrupt."""
        time.sleep(3)
        return "late"

    def count(self) -> int:
        """Count."""
        self.calls += 1
        return self.calls
'''


def test_late_call_is_ended_and_its_object_is_not_reused(tmp_path: Path) -> None:
    environment = load(tmp_path, LATE, "Late", timeout=0.2)
    [used] = environment.take(1)
    reset(environment, used, {}, [Message("user", "a")])
    started = time.monotonic()
    calls = [Call(name, {}) for name in ("loop", "count", "stubborn", "count", "sleep", "count")]
    late = ("error: takes more than 0.2 s", True)
    assert turn(environment, used, *calls) == [late, ("1", False), late, ("2", False), late, ("3", False)]
    assert time.monotonic() - started < 2.5  # the thread that sleeps is not waited for
    environment.give_back(used)
    assert environment.take(1)[0] is not used
    assert threading.active_count() < 70


def test_reset_gets_row_and_seed_and_objects_are_reused(tmp_path: Path) -> None:
    environment = load(tmp_path)
    [first] = environment.take(1)
    messages = [Message("user", "buy tea")]
    assert reset(environment, first, {"price": 3}, messages, 11) == messages
    assert (first.row, first.seed) == ({"price": 3}, 11)
    [second] = environment.take(1)
    environment.give_back(first)
    assert environment.take(1)[0] is first and second is not first


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
    [used] = environment.take(1)
    reset(environment, used, {"price": 3, "prompt": "buy"}, [Message("user", "buy")], 5)
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
    changed = reset(environment, environment.take(1)[0], {}, messages)
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
        reset(environment, environment.take(1)[0], {}, [Message("user", "a")])
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
    [used] = environment.take(1)
    assert reset(environment, used, {}, [Message("user", "a")]) == [Message("user", "a")]
    assert turn(environment, used, Call("add", {"a": 1, "b": 2})) == [("3", False)]
    assert reward(environment, used) == {} and is_done(environment, used) is False


def test_reward_and_done_are_attributes_properties_or_methods(tmp_path: Path) -> None:
    environment = load(tmp_path)
    [used] = environment.take(1)
    reset(environment, used, {}, [])
    assert reward(environment, used) == {"Shop.sold": 1.0, "Shop.left": 0.5}
    used.done = True
    assert is_done(environment, used)
    kind = type(used)
    del used.reward, used.done
    kind.reward = property(lambda self: 2)
    assert reward(environment, used) == {"Shop": 2.0}
    kind.reward = lambda self, completion, row: len(completion) + row["n"]
    kind.done = lambda self: 1
    assert reward(environment, used, "abc", {"n": 2}) == {"Shop": 5.0} and is_done(environment, used)
    kind.reward = lambda self: float("nan")
    with pytest.raises(RunError, match="reward: row f:1: returns nan"):
        reward(environment, used)
    kind.reward = lambda self: 1 / 0
    with pytest.raises(RunError, match="reward: row f:1: ZeroDivisionError"):
        reward(environment, used)


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
    [used] = environment.take(1)
    call = Call("pop", {"items": ["a", "b"]})
    results = turn(environment, used, call, *(Call(name, {}) for name in ("cancel", "broken", "fail", "half")))
    assert call.arguments == {"items": ["a", "b"]}  # the tool changed a copy
    assert [failed for _, failed in results] == [False, True, True, True, False]
    assert results[0][0] == "b" and results[4][0] == "?" and "CancelledError" in results[1][0]
    slots = load(tmp_path, ODD, "Slots")
    assert is_done(slots, slots.take(1)[0]) is False


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
