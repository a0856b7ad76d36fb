"""The demo data: properties of the shipped files, and that the generator reproduces them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from strop.demo import data_files
from tests import ROOT
from tests.support.scripts import script

GENERATOR = ROOT / "tools" / "make_demo_data.py"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return script(GENERATOR)


def rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Return (command, answer) of each row."""
    parsed = []
    for line in path.read_text(encoding="utf-8").splitlines():
        system, user, assistant = json.loads(line)["messages"]
        assert [system["role"], user["role"], assistant["role"]] == ["system", "user", "assistant"]
        parsed.append((user["content"], json.loads(assistant["content"])))
    return parsed


TRAIN, HELDOUT = (rows(path) for path in data_files())


def skeleton(command: str, gold: dict[str, str]) -> str:
    """Return the command with each slot value replaced by the slot's name, longest first."""
    for slot, value in sorted(gold.items(), key=lambda pair: -len(pair[1])):
        if slot != "intent":
            command = command.replace(value, f"<{slot}>")
    return command


def test_generator_reproduces_the_shipped_files(generator: ModuleType) -> None:
    for path, (_, commands) in zip(data_files(), generator.make().items(), strict=True):
        assert path.read_bytes() == "".join(command.line() for command in commands).encode()


def test_rows_depend_on_the_seed(generator: ModuleType) -> None:
    assert generator.make(1) != generator.make(2)


def test_splits_are_large_and_balanced() -> None:
    assert 640 <= len(TRAIN) <= 700 and len(HELDOUT) >= 160
    for split in (TRAIN, HELDOUT):
        intents = Counter(gold["intent"] for _, gold in split)
        assert len(intents) >= 6 and len(set(intents.values())) == 1  # balanced
        assert len({slot for _, gold in split for slot in gold} - {"intent"}) >= 15


def test_commands_are_unique_across_both_files() -> None:
    commands = [command.casefold() for command, _ in TRAIN + HELDOUT]
    assert len(set(commands)) == len(commands)


@pytest.mark.parametrize("command, gold", TRAIN + HELDOUT)
def test_slot_values_are_copied_from_the_command_in_fixed_order(
    generator: ModuleType, command: str, gold: dict[str, str]
) -> None:
    keys = ["intent", *generator.intents()[gold["intent"]].keys]
    assert list(gold) == [key for key in keys if key in gold] and len(gold) > 1
    for slot, value in gold.items():
        if slot != "intent":
            # whole words only
            assert re.search(rf"(?<!\w){re.escape(value)}(?!\w)", command), (slot, value)


def test_held_out_phrasings_are_not_in_training(generator: ModuleType) -> None:
    for name, intent in generator.intents().items():
        seen, heldout = (
            {phrase.replace("=", "").removeprefix("~") for phrase in intent.phrases[split]}
            for split in ("train", "heldout")
        )
        assert len(heldout) >= 3 and not seen & heldout, name
        assert not [(a, b) for a in seen for b in heldout if b.startswith(a) or b.endswith(a)], name
    assert not {skeleton(*row) for row in TRAIN} & {skeleton(*row) for row in HELDOUT}


@pytest.mark.parametrize("slot", ["task", "message", "person", "title", "item", "track", "artist", "purpose", "origin"])
def test_open_slots_have_values_that_training_lacks(generator: ModuleType, slot: str) -> None:
    assert len(set(generator.OPEN[slot])) >= 60
    seen = {gold[slot] for _, gold in TRAIN if slot in gold}
    values = [gold[slot] for _, gold in HELDOUT if slot in gold]
    new = sum(value not in seen for value in values)
    assert new / len(values) >= 0.2


def test_rows_are_short(generator: ModuleType) -> None:
    for command, gold in TRAIN + HELDOUT:
        assert len(command) + len(json.dumps(gold)) <= generator.MAX_CHARACTERS


def test_free_text_ends_the_command(generator: ModuleType) -> None:
    for commands in generator.make().values():
        for command in commands:
            if command.phrase.endswith(generator.FREE_END):
                last = command.phrase[command.phrase.rindex("{") + 1 : -1]
                assert command.user.endswith(command.gold[last])
