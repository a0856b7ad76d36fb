"""What benchmarks kept, beside what they kept before: figures that became worse.

    python tools/history.py [OLD.json NEW.json] [--by 10]

Without files: of each benchmark in benchmarks/results that has several dates, the last beside the one before. A rate
that fell, or seconds or bytes that rose, by more than --by percent is listed. Exits with 1 where one was, on the same
machine; figures of two machines are shown, and prove nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
DATED = re.compile(r"(.+)_(\d{4}-\d{2}-\d{2})")
COUNTS = ("clients", "seed", "length", "rows")  # with the texts of a row: which one it is
LESS_IS_BETTER = re.compile(r"(seconds|bytes|(?<!per)(?<!cpu)_s)$")
MORE_IS_BETTER = re.compile(r"per_(cpu_)?s$")


def figures(found: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """(place, number) of each rate, time and size."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from figures(value, (*at, key))
    elif isinstance(found, list):
        for one in (one for one in found if isinstance(one, dict)):
            which = (str(value) for key, value in one.items() if isinstance(value, str) or key in COUNTS)
            yield from figures(one, (*at, " ".join(which)))
    elif isinstance(found, int | float) and (MORE_IS_BETTER.search(at[-1]) or LESS_IS_BETTER.search(at[-1])):
        yield at, float(found)


def worse(old: dict[str, Any], new: dict[str, Any], by: float) -> Iterator[str]:
    """A line for each figure that both have, and that is worse in the second by more than `by` (a share)."""
    before = dict(figures(old["results"]))
    for at, now in figures(new["results"]):
        then = before.get(at)
        if not then or not now:
            continue
        change = now / then if LESS_IS_BETTER.search(at[-1]) else then / now
        if change > 1 + by:
            yield f"{' / '.join(filter(None, at))}: {then:,.4g} -> {now:,.4g}"


def pairs() -> Iterator[tuple[Path, Path]]:
    dates = defaultdict(list)
    for file in sorted(RESULTS.glob("*.json")):
        if match := DATED.fullmatch(file.stem):
            dates[match[1]].append(file)
    return ((files[-2], files[-1]) for files in dates.values() if len(files) > 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="OLD.json NEW.json")
    parser.add_argument("--by", type=float, default=10.0, help="percent")
    given = parser.parse_args()
    if len(given.files) not in (0, 2):
        parser.error("give two files, or none")
    regressed = False
    for old, new in [tuple(given.files)] if given.files else pairs():
        then, now = (json.loads(file.read_text(encoding="utf-8")) for file in (old, new))
        same = all(then["machine"].get(key) == now["machine"].get(key) is not None for key in ("cpu", "cores"))
        found = list(worse(then, now, given.by / 100))
        print(f"{old.name} -> {new.name}, {'the same machine' if same else 'two machines'}: {len(found)} worse")
        print("".join(f"  {line}\n" for line in found), end="")
        regressed |= same and bool(found)
    return int(regressed)


if __name__ == "__main__":
    sys.exit(main())
