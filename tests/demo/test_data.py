"""The demo data: what the generator promises, checked on the files that are shipped."""

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
    """(command, gold) of each row."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        system, user, assistant = json.loads(line)["messages"]
        assert [system["role"], user["role"], assistant["role"]] == ["system", "user", "assistant"]
        found.append((user["content"], json.loads(assistant["content"])))
    return found


TRAIN, HELDOUT = (rows(path) for path in data_files())


def skeleton(command: str, gold: dict[str, str]) -> str:
    """The command with each slot value replaced by the slot's name, longest first."""
    for slot, value in sorted(gold.items(), key=lambda pair: -len(pair[1])):
        if slot != "intent":
            command = command.replace(value, f"<{slot}>")
    return command


def test_the_shipped_files_are_what_the_generator_writes(generator: ModuleType) -> None:
    for path, (_, commands) in zip(data_files(), generator.make().items(), strict=True):
        assert path.read_bytes() == "".join(command.line() for command in commands).encode()


def test_another_seed_gives_other_rows(generator: ModuleType) -> None:
    assert generator.make(1) != generator.make(2)


def test_size_and_variety() -> None:
    assert 640 <= len(TRAIN) <= 700 and len(HELDOUT) >= 160
    for split in (TRAIN, HELDOUT):
        intents = Counter(gold["intent"] for _, gold in split)
        assert len(intents) >= 6 and len(set(intents.values())) == 1  # as many rows of every intent
        assert len({slot for _, gold in split for slot in gold} - {"intent"}) >= 15


def test_no_row_twice_in_or_across_the_files() -> None:
    commands = [command.casefold() for command, _ in TRAIN + HELDOUT]
    assert len(set(commands)) == len(commands)


@pytest.mark.parametrize("command, gold", TRAIN + HELDOUT)
def test_slots_are_copied_words_in_a_fixed_order(generator: ModuleType, command: str, gold: dict[str, str]) -> None:
    keys = ["intent", *generator.intents()[gold["intent"]].keys]
    assert list(gold) == [key for key in keys if key in gold] and len(gold) > 1
    for slot, value in gold.items():
        if slot != "intent":
            # As whole words, so that the value is what was said and not a part of it.
            assert re.search(rf"(?<!\w){re.escape(value)}(?!\w)", command), (slot, value)


def test_heldout_phrasings_are_in_no_training_row(generator: ModuleType) -> None:
    for name, intent in generator.intents().items():
        seen, heldout = (
            {phrase.replace("=", "").removeprefix("~") for phrase in intent.phrases[split]}
            for split in ("train", "heldout")
        )
        assert len(heldout) >= 3 and not seen & heldout, name
        assert not [(a, b) for a in seen for b in heldout if b.startswith(a) or b.endswith(a)], name
    assert not {skeleton(*row) for row in TRAIN} & {skeleton(*row) for row in HELDOUT}


@pytest.mark.parametrize("slot", ["task", "message", "person", "title", "item", "track", "artist", "purpose", "origin"])
def test_open_slots_hold_values_that_training_never_shows(generator: ModuleType, slot: str) -> None:
    assert len(set(generator.OPEN[slot])) >= 60
    seen = {gold[slot] for _, gold in TRAIN if slot in gold}
    values = [gold[slot] for _, gold in HELDOUT if slot in gold]
    new = sum(value not in seen for value in values)
    assert new / len(values) >= 0.2


def test_rows_are_short(generator: ModuleType) -> None:
    for command, gold in TRAIN + HELDOUT:
        assert len(command) + len(json.dumps(gold)) <= generator.MAX_CHARACTERS


def test_nothing_follows_a_free_text_at_the_end(generator: ModuleType) -> None:
    for commands in generator.make().values():
        for command in commands:
            if command.phrase.endswith(generator.FREE_END):
                last = command.phrase[command.phrase.rindex("{") + 1 : -1]
                assert command.user.endswith(command.gold[last])
