"""A reward for JSON objects, slot by slot: for `train.rewards` and `--metric`, as benchmarks/slot_reward.py:share."""

from __future__ import annotations

import json
from typing import Any


def share(right: str, answer: str) -> float:
    """Of all slots of the right object and the answer, the share that both have with the same value; 0 for no JSON."""
    expected, found = _slots(right), _slots(answer)
    return len(expected & found) / max(1, len(expected | found))


def _slots(text: str) -> set[tuple[str, Any]]:
    try:
        value = json.loads(text)
    except ValueError:
        return set()
    return {(key, json.dumps(one)) for key, one in value.items()} if isinstance(value, dict) else set()
