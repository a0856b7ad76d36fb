"""The tool that finds regressions among kept results."""

from __future__ import annotations

from typing import Any

import pytest

from tests import ROOT
from tests.support.scripts import script

HISTORY = script(ROOT / "tools" / "history.py")


def result(rate: float, seconds: float, size: int, clients: int = 1) -> dict[str, Any]:
    row = {
        "server": "strop",
        "clients": clients,
        "tokens_per_s": rate,
        "seconds": seconds,
        "peak_bytes": size,
        "loss": 9,
    }
    return {"results": {"all": [row]}}


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (result(95, 1.05, 105), []),
        (result(200, 0.1, 10), []),
        (result(80, 1, 100), ["all / strop 1 / tokens_per_s: 100 -> 80"]),
        (result(100, 2, 100), ["all / strop 1 / seconds: 1 -> 2"]),
        (result(100, 1, 130), ["all / strop 1 / peak_bytes: 100 -> 130"]),
        (result(1, 9, 900, clients=2), []),  # another row
    ],
)
def test_worse_results_are_listed(now: dict[str, Any], expected: list[str]) -> None:
    assert list(HISTORY.worse(result(100, 1, 100), now, 0.1)) == expected


def test_stored_results_can_be_read() -> None:
    result = list(HISTORY.pairs())
    assert result and all(old.name < new.name for old, new in result)
