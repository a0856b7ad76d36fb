"""A dozen families of the walk (tests/model/walk.py), and that its page is about every class there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.model.walk import PAGE, walk
from tests.support import tiny_families

FAMILIES = (
    "gpt2", "gpt_neox", "mpt", "falcon_h1", "gemma3n_text", "deepseek_v2", "phimoe", "glm4_moe", "llama4_text",
    "qwen3_next", "lfm3", "olmo2",
)  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_planned_trained_merged_and_trained_in_4_bit(kind: str, tmp_path: Path) -> None:
    found = walk(kind, tmp_path, leave_out=["merge bf16"])
    if kind == "gpt2":  # its layers are Conv1D, which stay in 16 bit
        assert found.pop("nf4").startswith(("ok", "refused"))
    assert {name: result for name, result in found.items() if not result.startswith("ok")} == {}
    assert {"plan", "train", "answer", "merge fp32"} <= set(found)


def test_the_page_names_every_class_or_the_version_it_was_made_with() -> None:
    text = PAGE.read_text(encoding="utf-8")
    made_with = text.partition("transformers ")[2].partition(" ")[0]
    assert made_with
    if made_with == transformers.__version__:
        rows = {line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")}
        assert set(tiny_families.text_types()) <= rows
        assert "FAULT" not in text
