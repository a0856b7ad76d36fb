"""FLOPs and bytes of a step, counted on the simulated GPU, and the estimate computed from them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest

from tests import ROOT
from tests.simulated_gpu.conftest import Simulate
from tests.support.scripts import script

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

X = 8 * 16 * 2  # bytes of x, bf16
KNOWN = {  # bytes of each operation
    "product": {"mm": X + X + 8 * 8 * 2},
    "sum": {"add": X + 16 * 2 + X},  # a repeated row counts once
    "in place": {"mul_": 2 * X},
    "overwritten": {"copy_": 2 * X},
    "picked": {"zeros": 3 * 8, "embedding": 3 * 8 + 2 * 3 * 16 * 2},  # three rows of the table
    "view": {},
    "many": {"_foreach_mul_": 2 * (X + 4 * 2)},
    "norm": {"_norm": X + 16 * 2 + X, "_norm_backward": 3 * X + 16 * 2},
    "loss": {"zeros": 8 * 8 + 8 * 4, "_cross_entropy": 3 * X + 8 * 8 + 2 * 8 * 4},
}


def test_bytes_and_flops_match_formulas(simulate: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The FLOPs of a step are those of the planner's formula."""
    from strop.config.load import resolve
    from strop.models.families.shape import ModelShape
    from strop.planning.activations import MicroBatch
    from strop.planning.time import count_flops
    from strop.planning.workload import Workload

    names = [*KNOWN, "flash"]
    steps: list[dict[str, Any]] = [
        {"shape": "1b", "layers": 2, "tokens": 512, "documents": documents, "scheme": scheme}
        for documents, scheme in ((1, "none"), (2, "none"), (1, "nf4"))
    ]
    scenarios = [
        *({"scenario": "moved_by", "operation": one} for one in names),
        *({"scenario": "moved", **one} for one in steps),
    ]
    outcomes: list[list[dict[str, Any]]] = simulate(*scenarios)  # type: ignore[assignment]
    for (name, bytes), operations in zip(KNOWN.items(), outcomes, strict=False):
        moved: Counter[str] = Counter()
        for operation in operations:
            moved[operation["operation"]] += operation["bytes"] * operation["launches"]
        assert moved == bytes, name
    assert outcomes[0][0]["flops"] == 2 * 8 * 8 * 16
    assert outcomes[len(KNOWN)][0]["flops"] == 4 * (2 * 4 * 5 / 2) * 2 * 8  # two documents of 4, two heads of 8

    whole, halves, packed = outcomes[len(names) :]
    config = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    options = {"model.name": "m", "data.train": "d", "model.device": "cuda", "model.dtype": "bf16", "lora.r": 16}
    recipe = resolve(None, {**options, "train.gradient_checkpointing": "off"}).recipe
    planned = count_flops(
        Workload.from_recipe(recipe, ModelShape.from_config(config)), MicroBatch.rows([512], more=False)
    )
    by_part: Counter[str] = Counter()
    for operation in whole:
        by_part[operation["part"]] += operation["flops"] * operation["launches"]
    assert by_part["products"] == pytest.approx(planned.frozen, rel=0.01)
    assert by_part["head"] == pytest.approx(planned.head, rel=0.01)
    assert planned.adapters <= by_part["adapters"] <= 2 * planned.adapters  # zeros around B's parts

    def total(operations: list[dict[str, Any]], part: str, what: str) -> float:
        return sum(
            float(operation[what]) * operation["launches"] for operation in operations if operation["part"] == part
        )

    assert total(halves, "attention", "flops") == pytest.approx(total(whole, "attention", "flops") / 2, rel=0.01)
    # nf4: half a byte and 1/64 of a byte are read, 16 bits written; not for the first layer's q, k and v.
    weights = 2 * (2048 * (2048 + 1024) + 2048 * 2048 + 3 * 2048 * 8192)
    passed = 2 * weights - 2048 * (2048 + 1024)
    assert total(packed, "dequantization", "bytes") == pytest.approx(passed * (2 + 1 / 2 + 1 / 64), rel=0.01)
    assert_estimate(monkeypatch, whole)


def assert_estimate(monkeypatch: pytest.MonkeyPatch, operations: list[dict[str, Any]]) -> None:
    """Check the table, and the verdict on a goal: bound by the host, missed by the GPU, reached."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = script(ROOT / "benchmarks" / "card_estimate.py")
    slow = benchmark.Case("RTX 4090", "1b", "none", 512, 1, 10**6, "others 7")
    estimated = benchmark.estimate(slow, operations)
    seconds = [  # one second each: of attention, of matmuls, and of memory
        {"part": part, "operation": part, "flops": flops, "bytes": bytes, "launches": 2}
        for part, flops, bytes in (("attention", 49.56e12, 1), ("products", 70e12, 1), ("adapters", 1, 504e9))
    ]
    estimate = benchmark.estimate(slow, seconds)
    assert [estimate["parts"][operation["part"]]["ms"] for operation in seconds] == pytest.approx([1000] * 3)
    assert estimated["device_ms"] == pytest.approx(sum(part["ms"] for part in estimated["parts"].values()))
    assert estimated["bound"] == "device" and estimated["largest"] in ("products", "head")
    assert estimated["tokens_per_s"] == pytest.approx(512e3 / estimated["device_ms"], rel=0.01)
    line = benchmark.table([estimated]).splitlines()[2]
    assert line.count("|") == 14 and f"{estimated['tokens_per_s']:,} | 1,000,000 | others 7" in line
    assert "too long for 1,000,000" in benchmark.verdict(estimated)
    assert "is reached" in benchmark.verdict(benchmark.estimate(replace(slow, goal=10), operations))
    idle = [{**operation, "flops": 0.0, "bytes": 0.0} for operation in operations]
    idle_estimate = benchmark.estimate(slow, idle)
    (file,) = (ROOT / "benchmarks" / "results").glob("card_estimate_*.json")
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved["kind"] == "estimate: no card has run"
    assert benchmark.table(saved["results"]) in (ROOT / "docs" / "cards.md").read_text(encoding="utf-8")
    assert idle_estimate["bound"] == "host" and "must launch faster" in benchmark.verdict(idle_estimate)
