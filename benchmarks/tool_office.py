"""The environment of environment.py: a calculator and a telephone list. The reward is 1 for the right answer through
the right tool."""

from __future__ import annotations

import re
from typing import Any

FIRST = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hanna", "Ivo", "June")
LAST = ("Abel", "Brook", "Cole", "Dent", "Ellis", "Frost")
NAMES = [f"{first} {last}" for last in LAST for first in FIRST]
NUMBERS = {name: 1000 + 137 * i % 8999 for i, name in enumerate(NAMES)}
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


class Office:
    """A calculator and a telephone list."""

    def reset(self, row: dict[str, Any]) -> None:
        """Forget earlier calls."""
        self.results: dict[str, str] = {}  # result of each call -> its tool

    def calculate(self, a: int, operation: str, b: int) -> str:
        """Compute with two whole numbers.

        Args:
            a: first number
            operation: one of + - *
            b: second number
        """
        return self._remember("calculate", OPERATIONS[operation](int(a), int(b)))

    def look_up(self, name: str) -> str:
        """Look up a telephone number.

        Args:
            name: first and last name
        """
        return self._remember("look_up", NUMBERS[name])

    def _remember(self, tool: str, result: int) -> str:
        self.results[str(result)] = tool
        return str(result)

    def reward(self, completion: str, row: dict[str, Any]) -> float:
        """Return 1 if the last turn has the right number, and the row's tool has returned it."""
        right = str(row["number"])
        is_said = right in re.findall(r"-?\d+", completion)
        return float(is_said and self.results.get(right) == row["tool"])
