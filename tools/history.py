"""Compare benchmark results with earlier ones, and list those that became worse.

    python tools/history.py [OLD.json NEW.json] [--by 10]

Without files: compares the last two results of each benchmark in benchmarks/results. Lists rates that fell, and seconds
or bytes that rose, by more than --by percent. Exits with 1 if there are any from the same machine; results of different
machines are printed only.
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
COUNTS = ("clients", "seed", "length", "rows")  # these fields and the texts of a row identify it
LESS_IS_BETTER = re.compile(r"(seconds|bytes|(?<!per)(?<!cpu)_s)$")
MORE_IS_BETTER = re.compile(r"per_(cpu_)?s$")


def figures(found: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield (path, value) of each rate, time and size."""
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
    """Yield a line for each value that is in both and is worse in the second by more than the fraction `by`."""
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
    args = parser.parse_args()
    if len(args.files) not in (0, 2):
        parser.error("give two files, or none")
    regressed = False
    for old, new in [tuple(args.files)] if args.files else pairs():
        then, now = (json.loads(file.read_text(encoding="utf-8")) for file in (old, new))
        same = all(then["machine"].get(key) == now["machine"].get(key) is not None for key in ("cpu", "cores"))
        result = list(worse(then, now, args.by / 100))
        print(f"{old.name} -> {new.name}, {'the same machine' if same else 'two machines'}: {len(result)} worse")
        print("".join(f"  {line}\n" for line in result), end="")
        regressed |= same and bool(result)
    return int(regressed)


if __name__ == "__main__":
    sys.exit(main())
