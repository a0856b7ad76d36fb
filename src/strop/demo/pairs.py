"""Pairs out of the demo's rows: the right JSON against a near miss.
`python -m strop.demo.pairs PAIRS.jsonl HELD_OUT.jsonl`

Each row gets one wrong answer of a kind that small models make: another value in a slot, a slot left out, one too many,
another intent, or the right JSON with prose around it. Which one is decided by the seed and the row.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strop.demo import data_files

KINDS = ("wrong slot", "missing slot", "extra slot", "wrong intent", "prose")
PROSE = ("Sure! Here is the JSON: {}", "{} Let me know if you need anything else.", "The answer is {}.")


def near_miss(
    kind: str, right: Mapping[str, str], others: Sequence[Mapping[str, str]], draw: random.Random
) -> str | None:
    """A wrong answer of this kind in the place of a right one; None where the row has none. others: right answers of
    other rows, whose values are taken."""
    slots = [name for name in right if name != "intent"]
    wrong = dict(right)
    if kind == "prose":
        return draw.choice(PROSE).format(_line(right))
    if kind == "wrong intent":
        wrong["intent"] = draw.choice(sorted({other["intent"] for other in others} - {right["intent"]}))
    elif kind == "extra slot":
        name, value = draw.choice(sorted({(n, v) for other in others for n, v in other.items() if n not in right}))
        wrong[name] = value
    elif not slots:
        return None
    elif kind == "missing slot":
        del wrong[draw.choice(slots)]
    else:
        name = draw.choice(slots)
        values = sorted({other[name] for other in others if name in other} - {right[name]})
        if not values:
            return None
        wrong[name] = draw.choice(values)
    return _line(wrong)


def pairs(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """A pair for each of the demo's rows: {prompt, chosen, rejected}, messages and texts, and the kind of miss."""
    draw, right = random.Random(seed), [json.loads(row["messages"][-1]["content"]) for row in rows]
    found = []
    for row, answer in zip(rows, right, strict=True):
        order = draw.sample(KINDS, len(KINDS))
        kind, miss = next((kind, miss) for kind in order if (miss := near_miss(kind, answer, right, draw)) is not None)
        said = {"prompt": row["messages"][:-1], "chosen": [row["messages"][-1]]}
        found.append({**said, "rejected": [{"role": "assistant", "content": miss}], "kind": kind})
    return found


def write(train: Path, held_out: Path, seed: int = 0) -> None:
    """Both of the demo's files as pairs."""
    for source, out in zip(data_files(), (train, held_out), strict=True):
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        made = [json.dumps(pair, ensure_ascii=False) for pair in pairs(rows, seed)]
        out.write_text("\n".join(made) + "\n", encoding="utf-8")


def _line(answer: Mapping[str, str]) -> str:
    return json.dumps(answer, ensure_ascii=False)


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]]
    if len(files) != 2 or any(file.exists() for file in files):
        sys.exit("error: give the names of two new files: python -m strop.demo.pairs PAIRS.jsonl HELD_OUT.jsonl")
    write(files[0], files[1])
