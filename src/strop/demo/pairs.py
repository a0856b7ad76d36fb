"""Preference pairs from the demo's rows: the right JSON is chosen, a typical mistake is rejected.

`python -m strop.demo.pairs PAIRS.jsonl HELD_OUT.jsonl` writes both files.

The rejected answer has one mistake that small models make, chosen by the seed: a wrong slot value, a missing slot, an
extra slot, a wrong intent, or prose around the right JSON.
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


def make_mistake(
    kind: str, right: Mapping[str, str], answers: Sequence[Mapping[str, str]], rng: random.Random
) -> str | None:
    """Return an answer with a mistake of this kind, or None if the kind does not apply to the right answer.

    answers: the right answers of all rows, from which wrong intents and slot values are taken.
    """
    slots = [name for name in right if name != "intent"]
    wrong = dict(right)
    if kind == "prose":
        return rng.choice(PROSE).format(_to_json(right))
    if kind == "wrong intent":
        wrong["intent"] = rng.choice(sorted({answer["intent"] for answer in answers} - {right["intent"]}))
    elif kind == "extra slot":
        name, value = rng.choice(sorted({(n, v) for answer in answers for n, v in answer.items() if n not in right}))
        wrong[name] = value
    elif not slots:
        return None
    elif kind == "missing slot":
        del wrong[rng.choice(slots)]
    else:
        name = rng.choice(slots)
        values = sorted({answer[name] for answer in answers if name in answer} - {right[name]})
        if not values:
            return None
        wrong[name] = rng.choice(values)
    return _to_json(wrong)


def make_pairs(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Return one pair per row: `prompt`, `chosen` and `rejected` as lists of messages, and the `kind` of mistake."""
    rng, answers = random.Random(seed), [json.loads(row["messages"][-1]["content"]) for row in rows]
    pairs = []
    for row, right in zip(rows, answers, strict=True):
        mistakes = ((kind, make_mistake(kind, right, answers, rng)) for kind in rng.sample(KINDS, len(KINDS)))
        kind, wrong = next((kind, wrong) for kind, wrong in mistakes if wrong is not None)
        pair = {"prompt": row["messages"][:-1], "chosen": [row["messages"][-1]]}
        pairs.append({**pair, "rejected": [{"role": "assistant", "content": wrong}], "kind": kind})
    return pairs


def write_pairs(train: Path, held_out: Path, seed: int = 0) -> None:
    """Write the demo's training rows and held-out rows as pairs."""
    for source, out in zip(data_files(), (train, held_out), strict=True):
        with source.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        lines = [json.dumps(pair, ensure_ascii=False) for pair in make_pairs(rows, seed)]
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _to_json(answer: Mapping[str, str]) -> str:
    return json.dumps(answer, ensure_ascii=False)


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]]
    if len(files) != 2 or any(file.exists() for file in files):
        sys.exit("error: give the names of two new files: python -m strop.demo.pairs PAIRS.jsonl HELD_OUT.jsonl")
    write_pairs(files[0], files[1])
