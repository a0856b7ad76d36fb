"""Runs on the card that is not there: python -m tests.card.play LIBRARY FOLDER [{"play": name, ...}, ...] prints what
came of each, as JSON."""

from __future__ import annotations

from tests.card import fake  # first: before torch

# isort: split

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import strop
from strop.training import loop
from tests.support.tiny import save_tiny, write_rows

CARD = fake.Card()
FOLDER = Path(sys.argv[2])


def train(**options: Any) -> dict[str, Any]:
    """A run of a tiny model to its end; the waits inside its steps, by kind and line."""
    base, rows = FOLDER / "tiny", FOLDER / "rows.jsonl"
    if not base.is_dir():
        save_tiny(base)
        write_rows(rows, 24)
    given = {
        "model": str(base), "data": str(rows), "out": str(FOLDER / f"run-{len(list(FOLDER.iterdir()))}"),
        "model.device": "cuda", "train.max_steps": 3, "train.batch_size": 8, "lora.r": 4, "train.save_steps": 2,
    }  # fmt: skip
    own_step = loop.step

    def step(*arguments: Any) -> Any:
        CARD.stage = "step"
        try:
            return own_step(*arguments)
        finally:
            CARD.stage = ""

    loop.step = step
    CARD.waits.clear()
    try:
        with CARD.present():
            run = strop.train(**{**given, **options})
    finally:
        loop.step = own_step
    waits = [[kind, line, number] for (stage, kind, line), number in CARD.waits.items() if stage == "step"]
    return {"folder": str(run.folder), "steps": run.report["steps"], "waits": waits}


PLAYS: dict[str, Callable[..., dict[str, Any]]] = {"train": train}


def main() -> None:
    fake.install(tuple(json.loads(os.environ.get("STROP_CARD", "[9, 0]"))))
    found = []
    for asked in json.loads(sys.argv[3]):
        try:
            found.append(PLAYS[asked.pop("play")](**asked))
        except BaseException as error:
            found.append({"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()})
    print(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
