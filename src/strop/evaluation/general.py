"""Measure what training broke: base and tuned model on a small general set, with the change and its interval.

general.jsonl has 126 rows of six kinds (arithmetic, copying, facts, instructions, plain text where nothing else is
asked for, memory of earlier turns), each with a regular expression that a good answer matches. The set is small: it
shows a model that has lost an ability, not one that has become two points worse.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from strop.data.types import Message
from strop.distributed.devices import ALONE, Devices
from strop.evaluation.compare import Advance, generate_answers
from strop.evaluation.metrics import paired_difference, wilson
from strop.models.adapters import Model

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Row:
    """A question of the general set. pattern: a regular expression that a good answer matches."""

    kind: str
    messages: tuple[Message, ...]
    pattern: str


def rows() -> list[Row]:
    """Return the general set."""
    text = (files(__package__) / "general.jsonl").read_text(encoding="utf-8")
    parsed = [json.loads(line) for line in text.splitlines()]
    return [
        Row(row["kind"], tuple(Message(turn["role"], turn["content"]) for turn in row["messages"]), row["pattern"])
        for row in parsed
    ]


def compare_general(model: Model, advance: Advance | None = None, devices: Devices = ALONE) -> dict[str, Any]:
    """Return the shares of good answers of base and tuned model, over all rows and by kind.

    The model must have an adapter. The result is {rows, base, tuned, intervals, difference, kinds: {kind: {rows, base,
    tuned, difference}}, lost: [{prompt, base, tuned}]}.
    """
    asked = rows()
    prompts = [model.renderer.prompt(list(row.messages)) for row in asked]
    answers = generate_answers(
        model, prompts, devices, max_new_tokens=MAX_NEW_TOKENS, both=True,
        advance=advance and (lambda done: advance("general, base and tuned", done, 2 * len(asked))),
    )  # fmt: skip
    texts = [answer.text for answer in answers]
    texts_by_side = {"base": texts[: len(asked)], "tuned": texts[len(asked) :]}
    hits = {
        side: [bool(re.search(row.pattern, text)) for row, text in zip(asked, side_texts, strict=True)]
        for side, side_texts in texts_by_side.items()
    }
    kinds = {}
    for kind in dict.fromkeys(row.kind for row in asked):
        places = [place for place, row in enumerate(asked) if row.kind == kind]
        shares = {side: sum(hits[side][place] for place in places) / len(places) for side in hits}
        change = paired_difference(*([hits[side][place] for place in places] for side in ("base", "tuned")))
        kinds[kind] = {"rows": len(places), **shares, "difference": asdict(change)}
    lost = [place for place in range(len(asked)) if hits["base"][place] and not hits["tuned"][place]]
    return {
        "rows": len(asked),
        **{side: sum(side_hits) / len(asked) for side, side_hits in hits.items()},
        "intervals": {side: list(wilson(sum(side_hits), len(asked))) for side, side_hits in hits.items()},
        "difference": asdict(paired_difference(hits["base"], hits["tuned"])),
        "kinds": kinds,
        "lost": [
            {"prompt": asked[place].messages[-1].content, **{side: texts_by_side[side][place] for side in hits}}
            for place in lost
        ],
    }
