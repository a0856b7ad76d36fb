"""Mark tests that only `make test-all` runs, where a faster test covers most of what they cover."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], core: Collection[Any]) -> list[Any]:
    """Return the values of a parameter, of which those that are not in `core` are slow."""
    return [value if value in core else pytest.param(value, marks=pytest.mark.slow) for value in values]
