"""A dozen families of tests/models/walk.py, and that docs/models.md lists every class."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import strop
from strop.errors import ModelError, RunError
from strop.models.upstream_errors import convert_model_errors
from tests.models.walk import PAGE, QUICK, walk
from tests.support import seeing, tiny_families
from tests.support.slow import slow_except
from tests.support.tiny import write_rows

FAMILIES = (
    "gpt2", "gpt_neox", "mpt", "falcon_h1", "gemma3n_text", "deepseek_v2", "phimoe", "glm4_moe", "llama4_text",
    "qwen3_next", "lfm3", "olmo2",
)  # fmt: skip


@pytest.mark.parametrize("kind", slow_except(FAMILIES, ("gpt2", "deepseek_v2")))
def test_family_is_planned_trained_merged_and_trained_in_4_bit(kind: str, tmp_path: Path) -> None:
    if kind not in tiny_families.text_types():
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    results = walk(kind, tmp_path)
    if kind == "gpt2":  # its layers are Conv1D, which stay in 16 bit
        assert results.pop("nf4").endswith("has no linear weights to quantize")
    assert {name: result for name, result in results.items() if not result.startswith("ok")} == {}
    assert {"plan", "train", "answer", "merge bf16", "merge fp32"} <= set(results)


def test_transformers_error_is_attributed_to_transformers(tmp_path: Path) -> None:
    """X-MOD fails without a language id. Errors from strop's code pass unchanged."""
    tiny_families.save("xmod", tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    with pytest.raises(RunError, match=r"transformers \S+ fails on a model of type xmod: .*modeling_xmod.py"):
        strop.train(model=tmp_path / "base", data=rows, out=tmp_path / "run", **QUICK)
    with pytest.raises(ValueError, match="ours"), convert_model_errors("xmod"):
        raise ValueError("ours")


def test_base_without_linear_weights_is_not_quantized(tmp_path: Path) -> None:
    tiny_families.save("gpt2", tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    with pytest.raises(ModelError, match="no linear weights to quantize"):
        strop.train(
            model=tmp_path / "base", data=rows, out=tmp_path / "run", **{**QUICK, "model.quantization": "nf4"}
        )  # fmt: skip


def test_page_lists_every_class_of_its_transformers_version() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.endswith(seeing.table())
    made_with = text.partition("transformers ")[2].partition(" ")[0]
    assert made_with
    if made_with == transformers.__version__:
        rows = {line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")}
        assert set(tiny_families.text_types()) <= rows
        assert "FAULT" not in text
