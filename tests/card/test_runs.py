"""Whole runs on a card that is not there: they go to their end, and in a step the host waits for the card once."""

from __future__ import annotations

from typing import Any

from tests.card.conftest import Play


def assert_one_wait(played: dict[str, Any]) -> None:
    """Of a step: one read behind it, and nothing else that makes the host wait."""
    waits = [wait for wait in played["waits"] if not wait[0].startswith("free")]
    (read,) = waits
    assert read[1].startswith("training/loop.py") and read[2] == played["steps"], waits


def test_a_run_in_16_bit(card: Play) -> None:
    (run,) = card({"play": "train"})
    assert run["steps"] == 3
    assert_one_wait(run)
