"""A reward for JSON objects by slot, for `train.rewards` and `--metric`: benchmarks/slot_reward.py:share."""

from __future__ import annotations

import json
from typing import Any


def share(right: str, answer: str) -> float:
    """Return the share of slots with equal values among all slots of the right object and the answer; 0 for invalid
    JSON.
    """
    expected, result = _slots(right), _slots(answer)
    return len(expected & result) / max(1, len(expected | result))


def _slots(text: str) -> set[tuple[str, Any]]:
    try:
        value = json.loads(text)
    except ValueError:
        return set()
    return {(key, json.dumps(one)) for key, one in value.items()} if isinstance(value, dict) else set()
