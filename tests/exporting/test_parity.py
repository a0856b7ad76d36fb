"""Comparing two models: near ties are no flips, small samples decide nothing, and wrong merges are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import strop
from strop.data.types import Example
from strop.errors import ModelError, ParityError
from strop.exporting import merge as module
from strop.exporting.merge import merge
from strop.exporting.parity import LIMITS, Limit, Parity, compare
from strop.exporting.tables import print_parity
from tests.support import tiny

BF16 = LIMITS["bf16"]


class Fixed:
    """A model with one distribution for all positions of a row, chosen by the row's line."""

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        self.rows = rows

    def log_probabilities(self, example: Example) -> Tensor:
        return torch.tensor(self.rows[example.line]).log().repeat(len(example) - 1, 1)


def row(line: int, length: int) -> Example:
    ids = np.full(length, line, np.int32)
    return Example(ids, np.ones(length, np.float32), "f", line)


def compare_fixed(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], lengths: Sequence[int]
) -> Parity:
    examples = [row(line, length) for line, length in enumerate(lengths)]
    return compare(lambda: Fixed(first), lambda: Fixed(second), examples, Limit(0.1, BF16.agreement))


def test_flip_of_a_near_tie_is_not_clear() -> None:
    tie, swapped = [0.42, 0.40, 0.18], [0.40, 0.42, 0.18]
    parity = compare_fixed([tie], [swapped], [40])
    assert parity.top1_agreement == 0 and parity.clear_flips == 0 and parity.passed
    assert parity.agreement.value == 1 and parity.effect is None


def test_clear_flips_are_refused_with_a_fix() -> None:
    clear, swapped = [0.8, 0.15, 0.05], [0.15, 0.8, 0.05]
    parity = compare_fixed([clear], [swapped], [40])
    assert parity.clear_flips == parity.positions == 39
    with pytest.raises(ParityError, match="39 clear flips in 39 positions") as few:
        parity.check("m")
    assert "--data FILE" in few.value.fix
    with pytest.raises(ParityError) as many:
        compare_fixed([clear], [swapped], [1040]).check("m")
    assert "--data" not in many.value.fix


def test_two_clear_flips_in_129_positions_are_not_significant() -> None:
    """The interval of 127 in 129 reaches above the limit; that of 1,270 in 1,290 does not."""
    same, clear, swapped = [0.9, 0.06, 0.04], [0.75, 0.2, 0.05], [0.2, 0.75, 0.05]
    few = compare_fixed([same, clear], [same, swapped], [128, 3])
    assert few.clear_flips == 2 and few.positions == 129 and few.agreement.value < BF16.agreement
    assert not [violation for violation in few.violations if "flip" in violation]
    few_text = "as 129 positions are few, their 95 % interval is compared: 0.4% to 5.5%"
    assert few_text in few.describe_limits() and few.as_json()["limits"] == few.describe_limits()
    out = StringIO()
    print_parity(few, Console(file=out, width=300))
    assert "clear flips in at most 0.5% of the positions (as 129 positions are few" in out.getvalue()
    many = compare_fixed([same, clear], [same, swapped], [1271, 21])
    assert "few" not in many.describe_limits()
    assert many.clear_flips == 20 and [violation for violation in many.violations if "flip" in violation]


def test_near_tie_follows_pinskers_inequality() -> None:
    """No distribution within KL k of another swaps tokens that are further apart than sqrt(2 k)."""
    rng = np.random.default_rng(0)
    swaps = 0
    for _ in range(4000):
        p = rng.dirichlet(np.ones(4))
        q = p * np.exp(rng.normal(0, 0.4, 4))
        q /= q.sum()
        k = float((p * np.log(p / q)).sum())
        if p.argmax() != q.argmax():
            swaps += 1
            assert p.max() - p[q.argmax()] <= Limit(k, 1.0).near_tie + 1e-12
    assert swaps > 300 and BF16.near_tie == pytest.approx(math.sqrt(2 * BF16.kl_mean))


def test_kl_divergence_has_no_rounding_error_of_fp32() -> None:
    """Two models whose log-probabilities differ by 1e-5 have a divergence of some 1e-11, where fp32 resolves 1e-8."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(3, 2.0))
    q = p * np.exp(rng.normal(0, 1e-5, 3))
    q /= q.sum()
    kl = float((p * np.log(p / q)).sum())
    assert 0 < kl < 1e-9
    assert compare_fixed([p.tolist()], [q.tolist()], [40]).kl_mean == pytest.approx(kl, abs=2e-12)


def test_tokens_that_one_model_excludes_do_not_make_the_divergence_nan() -> None:
    class Extreme(Fixed):
        def log_probabilities(self, example: Example) -> Tensor:
            return torch.tensor(self.rows[example.line]).repeat(len(example) - 1, 1)

    half = math.log(0.5)
    first, second = [[half, half, -900.0]], [[half, half, -60.0]]
    parity = compare(lambda: Extreme(first), lambda: Extreme(second), [row(0, 9)], Limit(0.1, BF16.agreement))
    assert 0 <= parity.kl_mean < 1e-12


def test_nan_is_refused() -> None:
    assert not compare_fixed([[0.5, 0.3, 0.2]], [[math.nan] * 3], [9]).passed


Merge = Callable[[str, Tensor], Tensor]


def with_fault(fault: str, merge_tensor: Merge) -> Merge:
    """Return a function that merges each tensor incorrectly."""
    other_base = dict(tiny.model(seed=1, tie_word_embeddings=False).named_parameters())

    def merge_wrong(name: str, weight: Tensor) -> Tensor:
        merged = merge_tensor(name, weight)
        if fault == "another base" and name in other_base and merged is not weight:
            return merged + (other_base[name] - weight)
        if merged is weight:
            return weight
        if fault.startswith("alpha"):
            return weight + float(fault.split()[1]) * (merged - weight)
        left_out = {"one layer left out": "layers.1.", "one kind left out": "o_proj", "head dropped": "lm_head"}
        return weight if fault in left_out and left_out[fault] in name else merged

    return merge_wrong


FAULTS = ["none", "alpha 1.1", "alpha 0.9", "alpha 0", "one layer left out", "one kind left out", "another base"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an adapter briefly, also on a head that is not tied."""
    folder = tmp_path_factory.mktemp("parity")
    tiny.model(tie_word_embeddings=False).save_pretrained(folder / "base")
    tiny.tokenizer("chatml").save_pretrained(folder / "base")
    return train(folder / "base", folder)


def train(base: Path, folder: Path) -> Path:
    rows = tiny.write_rows(folder / "rows.jsonl", 60)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    options: dict[str, Any] = {"train.max_steps": 8, "lora.r": 4, "model.dtype": "fp32", "train.learning_rate": 0.01}
    options["lora.target_modules"] = modules
    return strop.train(model=str(base), data=str(rows), out=folder / "run", **options).folder


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("measure", [True, False])
def test_adapter_on_a_tied_head_is_refused(tiny_folder: Path, tmp_path: Path, measure: bool) -> None:
    folder = train(tiny_folder, tmp_path)
    with pytest.raises(ModelError, match="lm_head shares its weight"):
        merge(str(folder), tmp_path / "merged", measure=measure)
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp16"])
@pytest.mark.parametrize("fault", [*FAULTS, "head dropped"])
def test_wrong_merges_are_refused(
    run: Path, tmp_path: Path, fault: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_merger = module.load_merger
    monkeypatch.setattr(module, "load_merger", lambda *args: with_fault(fault, load_merger(*args)))
    if fault == "none":
        parity = merge(str(run), tmp_path / "merged", dtype=dtype).parity
        assert parity is not None and parity.effect is not None
        assert abs(parity.effect.value - 1) < 0.01 and parity.effect.low < parity.effect.value < parity.effect.high
        return
    with pytest.raises(ParityError, match="not the same model"):
        merge(str(run), tmp_path / "merged", dtype=dtype)
    assert not list(tmp_path.glob("merged*"))
