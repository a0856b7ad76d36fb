"""What a step computes and moves, counted on the card that is not there, and the estimate that is made of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest

from tests import ROOT
from tests.simulated_gpu.conftest import Play
from tests.support.scripts import script

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

X = 8 * 16 * 2  # bytes of x, bf16
KNOWN = {  # bytes of each operation
    "product": {"mm": X + X + 8 * 8 * 2},
    "sum": {"add": X + 16 * 2 + X},  # one row is there once, however often it is repeated
    "in place": {"mul_": 2 * X},
    "overwritten": {"copy_": 2 * X},
    "picked": {"zeros": 3 * 8, "embedding": 3 * 8 + 2 * 3 * 16 * 2},  # three rows of the table
    "view": {},
    "many": {"_foreach_mul_": 2 * (X + 4 * 2)},
    "norm": {"_norm": X + 16 * 2 + X, "_norm_backward": 3 * X + 16 * 2},
    "loss": {"zeros": 8 * 8 + 8 * 4, "_cross_entropy": 3 * X + 8 * 8 + 2 * 8 * 4},
}


def test_bytes_and_flops_of_known_operations_and_of_a_step(card: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """The FLOPs of a step are those of strop's own formula for it."""
    from strop.config.load import resolve
    from strop.models.families.shape import ModelShape
    from strop.planning.activations import MicroBatch
    from strop.planning.time import flops
    from strop.planning.workload import Workload

    wanted = [*KNOWN, "flash"]
    steps: list[dict[str, Any]] = [
        {"shape": "1b", "layers": 2, "tokens": 512, "documents": documents, "scheme": scheme}
        for documents, scheme in ((1, "none"), (2, "none"), (1, "nf4"))
    ]
    plays = [*({"play": "moved_by", "operation": one} for one in wanted), *({"play": "moved", **one} for one in steps)]
    found: list[list[dict[str, Any]]] = card(*plays)  # type: ignore[assignment]
    for (name, bytes), told in zip(KNOWN.items(), found, strict=False):
        moved: Counter[str] = Counter()
        for one in told:
            moved[one["operation"]] += one["bytes"] * one["launches"]
        assert moved == bytes, name
    assert found[0][0]["flops"] == 2 * 8 * 8 * 16
    assert found[len(KNOWN)][0]["flops"] == 4 * (2 * 4 * 5 / 2) * 2 * 8  # two documents of 4, two heads of 8

    whole, halves, packed = found[len(wanted) :]
    config = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    given = {"model.name": "m", "data.train": "d", "model.device": "cuda", "model.dtype": "bf16", "lora.r": 16}
    recipe = resolve(None, {**given, "train.gradient_checkpointing": "off"}).recipe
    told = flops(Workload.from_recipe(recipe, ModelShape.from_config(config)), MicroBatch.rows([512], more=False))
    by_part: Counter[str] = Counter()
    for one in whole:
        by_part[one["part"]] += one["flops"] * one["launches"]
    assert by_part["products"] == pytest.approx(told.frozen, rel=0.01)
    assert by_part["head"] == pytest.approx(told.head, rel=0.01)
    assert told.adapters <= by_part["adapters"] <= 2 * told.adapters  # zeros around B's parts

    def of(told: list[dict[str, Any]], part: str, what: str) -> float:
        return sum(float(one[what]) * one["launches"] for one in told if one["part"] == part)

    assert of(halves, "attention", "flops") == pytest.approx(of(whole, "attention", "flops") / 2, rel=0.01)
    # nf4: read, half a byte and 1/64 of a byte, and written in 16 bit; not behind the first layer's q, k and v.
    weights = 2 * (2048 * (2048 + 1024) + 2048 * 2048 + 3 * 2048 * 8192)
    passed = 2 * weights - 2048 * (2048 + 1024)
    assert of(packed, "dequantization", "bytes") == pytest.approx(passed * (2 + 1 / 2 + 1 / 64), rel=0.01)
    estimated(monkeypatch, whole)


def estimated(monkeypatch: pytest.MonkeyPatch, operations: list[dict[str, Any]]) -> None:
    """The table, and what is said of a goal: bound by the host, missed by the card, reached."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = script(ROOT / "benchmarks" / "card_estimate.py")
    slow = benchmark.Case("RTX 4090", "1b", "none", 512, 1, 10**6, "others 7")
    found = benchmark.estimate(slow, operations)
    seconds = [  # one each: of attention, of products, and of memory
        {"part": part, "operation": part, "flops": flops, "bytes": bytes, "launches": 2}
        for part, flops, bytes in (("attention", 49.56e12, 1), ("products", 70e12, 1), ("adapters", 1, 504e9))
    ]
    told = benchmark.estimate(slow, seconds)
    assert [told["parts"][one["part"]]["ms"] for one in seconds] == pytest.approx([1000] * 3)
    assert found["device_ms"] == pytest.approx(sum(part["ms"] for part in found["parts"].values()))
    assert found["bound"] == "device" and found["largest"] in ("products", "head")
    assert found["tokens_per_s"] == pytest.approx(512e3 / found["device_ms"], rel=0.01)
    line = benchmark.table([found]).splitlines()[2]
    assert line.count("|") == 14 and f"{found['tokens_per_s']:,} | 1,000,000 | others 7" in line
    assert "too long for 1,000,000" in benchmark.verdict(found)
    assert "is reached" in benchmark.verdict(benchmark.estimate(replace(slow, goal=10), operations))
    idle = [{**one, "flops": 0.0, "bytes": 0.0} for one in operations]
    waits = benchmark.estimate(slow, idle)
    (kept,) = (ROOT / "benchmarks" / "results").glob("card_estimate_*.json")
    told = json.loads(kept.read_text(encoding="utf-8"))
    assert told["kind"] == "estimate: no card has run"
    assert benchmark.table(told["results"]) in (ROOT / "docs" / "cards.md").read_text(encoding="utf-8")
    assert waits["bound"] == "host" and "must launch faster" in benchmark.verdict(waits)
