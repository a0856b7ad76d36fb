"""Prefixes that rows share, in the micro-batches of a plan and in those of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.config.load import resolve
from strop.config.schema import Recipe
from strop.engine.train.packing import pack
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from strop.objectives.table import prepare_rows
from strop.planning.microbatch import first_steps, measure_rows, with_kept_rows
from strop.training.state import batch_stream


def recipe_of(model: Path, file: Path, **options: Any) -> Recipe:
    return resolve(None, {"model": str(model), "data": str(file), "train.batch_size": 8, **options}).recipe


def test_prefixes_are_counted_once_for_the_rows_that_share_them(tiny_folder: Path, tmp_path: Path) -> None:
    """Rows of two prompts: each prompt is a document of the micro-batch, and the first of its tokens."""
    prompts = [
        "You are a careful clerk who writes the order down. " * 3,
        "Translate what you read into plain words. " * 3,
    ]
    rows = [
        {"messages": [{"role": "system", "content": prompts[i % 2]}, {"role": "user", "content": f"number {i}"},
                      {"role": "assistant", "content": "yes"}]} for i in range(40)
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = recipe_of(tiny_folder, file)
    sizes = measure_rows(recipe)
    assert {number for number, _ in sizes.prefixes} == {0, 1} and min(length for _, length in sizes.prefixes) > 20
    ((batch,), *_) = first_steps(recipe, sizes, packed=True)
    prepared = prepare_rows(recipe, load_tokenizer(locate(str(tiny_folder))))
    examples = [prepared.train[i] for i in next(iter(batch_stream(recipe, 40))).rows]
    packed = pack(examples, prefix_sharing=True, device=torch.device("cpu"))
    assert batch.prefixes == 2 and batch.num_sequences == 8
    assert batch.tokens == pytest.approx(len(packed.ids), rel=0.02), "rows of a batch may share a few tokens more"
    keep = with_kept_rows(sizes, recipe_of(tiny_folder, file, **{"train.keep": 0.5}))
    assert len(keep.prefixes) == len(keep) and keep.prefixes[-1] == (-1, 0)
