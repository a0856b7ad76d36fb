"""Counter-based dropout: published values of the generator, and masks that do not depend on how a step is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from strop.data.types import Example
from strop.engine.step import step_for
from strop.engine.train.dropout import (
    LEVELS,
    CounterDropout,
    DropoutSpec,
    apply_masks,
    apply_masks_backward,
    keep_scale,
    philox,
    token_keys,
)
from strop.engine.train.eligibility import why_not_fast
from strop.engine.train.fast import FastLoss
from strop.engine.train.plain import PlainLoss
from tests.engine.train.test_fast import assert_same, some, step, with_prefix, with_prefixes
from tests.support.random_models import adapted

DROPOUT = {"lora_dropout": 0.25}


def dropping(lora: dict[str, Any] | None = None, **changes: Any) -> Any:
    return adapted(LlamaConfig, {**DROPOUT, **(lora or {})}, **changes).train()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_philox_equals_published_values(counter: Any, key: Any, expected: Any) -> None:
    """Known answers of the authors (Random123, kat_vectors, philox4x32 with 7 rounds)."""
    result = philox(tuple(torch.tensor(word) for word in counter), torch.tensor(key))
    assert tuple(int(word) for word in result) == expected


def test_masks_have_the_right_rate_and_are_independent() -> None:
    tokens = torch.from_numpy(token_keys(np.arange(400)))
    level = round(0.05 * LEVELS)
    masks = {}
    for seed, at, number in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        masked = apply_masks(torch.ones(400, 500), DropoutSpec(seed, at, tokens, (number,), (level,)))
        dropped = float((masked == 0).double().mean())
        assert dropped == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / masked.numel()) ** 0.5)  # four standard deviations
        masks[seed, at, number] = masked
    for axis in (0, 1):  # no row or column of the data is favoured
        shares = (masks[0, 0, 0] == 0).double().mean(axis)
        assert float(shares.std()) < 1.3 * (0.05 * 0.95 / masks[0, 0, 0].shape[axis]) ** 0.5
    kinds = list(masks.values())
    for i, one in enumerate(kinds):
        for other in kinds[i + 1 :]:  # independent: both dropped at one place in 400
            assert float(((one == 0) & (other == 0)).double().mean()) == pytest.approx(0.0025, abs=0.0006)


def test_gradient_passes_only_kept_elements() -> None:
    tokens = torch.from_numpy(token_keys(np.arange(5)))
    dropped = DropoutSpec(1, 2, tokens, (7, 8), (LEVELS // 2, 0))
    z = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    out, upstream = apply_masks(z, dropped), torch.randn(5, 22, dtype=torch.float64)
    (expected,) = torch.autograd.grad(out, z, upstream)
    torch.testing.assert_close(apply_masks_backward(upstream, dropped), expected)
    assert torch.equal(out[:, 11:], z)


def test_token_key_depends_on_the_prefix() -> None:
    one, other = token_keys(np.array([5, 6, 7, 8])), token_keys(np.array([5, 6, 9, 8]))
    assert (one[:2] == other[:2]).all() and (one[2:] != other[2:]).all()
    assert len({*one, *other, *token_keys(np.array([6, 5]))}) == 8


@pytest.mark.parametrize(
    "hide",
    [
        {},
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"use_dora": True},
        {"use_dora": True, "target_modules": ["k_proj", "o_proj", "up_proj"], "rank_pattern": {"up_proj": 1}},
    ],
)
def test_fast_equals_plain_with_the_same_masks(hide: dict[str, Any]) -> None:
    model = dropping(hide)
    for examples in (some(weighted=True), with_prefix(some(weighted=True)), with_prefixes(some(weighted=True))):
        expected = step(model, PlainLoss(model), examples)
        assert_same(step(model, FastLoss(model), examples), expected)
        assert_same(step(model, FastLoss(model, checkpoint_layers=1), examples), expected)
        assert_same(step(model, FastLoss(model, prefix_sharing=False), examples), expected)
    with torch.no_grad():
        whole = PlainLoss(model.eval()).token_loss(some())
    assert abs(whole - expected[0]) > 1e-3


@pytest.mark.parametrize("make", [PlainLoss, FastLoss])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_masks_do_not_depend_on_micro_batches(make: Any, checkpointing: bool) -> None:
    """Rows as a whole, one by one, in pairs and in reverse order give equal sums, padded, packed or with shared
    prefixes.
    """
    model, examples = dropping(), with_prefix(some(weighted=True))
    loss = make(model)
    if checkpointing and make is FastLoss:
        loss.checkpoint_layers = 2
    elif checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    whole = step(model, loss, examples)
    for cut in ([[0], [1], [2], [3]], [[0, 1], [2, 3]], [[3, 1, 0], [2]]):
        parts = [step(model, loss, [examples[row] for row in group]) for group in cut]
        added = sum(part[0] for part in parts), {n: sum(part[1][n] for part in parts) for n in whole[1]}
        assert_same(added, whole)


def test_masks_depend_on_step_and_seed_only() -> None:
    model = dropping()
    chosen = step_for(model)
    assert chosen.name == "fast"

    def value(seed: int, at: int) -> float:
        chosen.masks.begin(seed, at)
        return float(chosen.token_loss(some()).detach())

    result = {(seed, at): value(seed, at) for seed in (0, 1) for at in (0, 1)}
    assert len(set(result.values())) == 4
    assert all(value(*key) == first for key, first in result.items())


def test_evaluation_has_no_dropout() -> None:
    model, whole = dropping().eval(), adapted().eval()
    with torch.no_grad():
        for make in (PlainLoss, FastLoss):
            assert make(model).token_loss(some()) == make(whole).token_loss(some())


def test_dropout_preserves_the_mean() -> None:
    """Kept elements are scaled up, so the mean output of a linear layer over many masks is that without dropout."""
    model = dropping()
    masks = PlainLoss(model).masks
    module: Any = next(m for m in model.modules() if isinstance(m, CounterDropout))
    masks.token_keys = torch.from_numpy(token_keys(np.arange(6)))[None]
    x = torch.ones(1, 6, 40)
    total = torch.zeros_like(x)
    for at in range(400):
        masks.begin(0, at)
        total += module(x)
    assert float(total.mean() / 400) == pytest.approx(1.0, abs=0.01)
    torch.testing.assert_close(module(x).unique(), torch.tensor([0.0, 4 / 3]))
    assert keep_scale(LEVELS // 4) == pytest.approx(4 / 3)


def test_rows_that_are_not_tokens_use_pytorch_dropout() -> None:
    masks = PlainLoss(dropping()).masks
    module = CounterDropout(0.5, 3, masks)
    masks.token_keys = torch.zeros(2, 5, dtype=torch.long)
    torch.manual_seed(0)
    result = module(torch.ones(7, 64))  # an expert's share of the tokens
    torch.manual_seed(0)
    assert torch.equal(result, nn.functional.dropout(torch.ones(7, 64), 0.5))


def test_masks_do_not_depend_on_the_tensor_layout() -> None:
    """DeepSeek's kv_b_proj gets (B, 1, S, n) and OPT's layers get (B S, n). In the transposed layout (S, B, n), the
    rows differ.
    """
    masks = PlainLoss(dropping()).masks
    module = CounterDropout(0.5, 3, masks)
    masks.token_keys = torch.from_numpy(token_keys(np.arange(10))).view(2, 5)
    expected, ones = module(torch.ones(2, 5, 64)), torch.ones
    assert torch.equal(module(ones(2, 1, 5, 64)), expected.view(2, 1, 5, 64))
    assert torch.equal(module(ones(10, 64)), expected.view(10, 64))
    assert not torch.equal(module(ones(5, 2, 64)), expected.view(5, 2, 64))
    assert not torch.equal(module(ones(5, 2, 64)), module(ones(5, 2, 64)))  # PyTorch's dropout


def test_two_adapters_with_different_dropout_equal_the_plain_step() -> None:
    model = dropping()
    assert why_not_fast(model) is None
    model.add_adapter("second", type(model.peft_config["default"])(r=2, lora_alpha=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    for name, weight in model.named_parameters():
        if ".second." in name:
            nn.init.normal_(weight, std=0.3)
    model.train()
    assert_same(step(model, FastLoss(model), some()), step(model, PlainLoss(model), some()))


@pytest.mark.parametrize("dora", [{}, {"use_dora": True}])
@pytest.mark.parametrize("head_dim", [8, 32])  # 32: tiled attention, on CPUs that support it
def test_bf16_error_is_the_same_with_and_without_dropout(head_dim: int, dora: dict[str, Any]) -> None:
    errors = []
    for lora in (dora, DROPOUT | dora):
        model = adapted(LlamaConfig, lora, head_dim=head_dim, hidden_size=32, intermediate_size=64).train()
        model.get_base_model().to(torch.bfloat16)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float() * 0.2
        (_, fast), (_, plain) = (step(model, make(model), some()) for make in (FastLoss, PlainLoss))
        total = sum(float((fast[n] - plain[n]).square().sum()) for n in plain)
        errors.append((total / sum(float(grad.square().sum()) for grad in plain.values())) ** 0.5)
    assert errors[1] <= 2 * errors[0] + 1e-3


def test_rows_share_masks_up_to_their_first_difference() -> None:
    ids = np.arange(1, 13, dtype=np.int32)
    other = np.r_[ids[:6], ids[6:] + 20]
    rows = [Example(one, np.float32(np.arange(12) > 0), "f", 1) for one in (ids, other)]
    keys = [token_keys(row.ids) for row in rows]
    dropped = [DropoutSpec(0, 0, torch.from_numpy(key), (0,), (LEVELS // 2,)) for key in keys]
    one, two = (apply_masks(torch.ones(12, 64), d) for d in dropped)
    assert torch.equal(one[:6], two[:6])
    assert not any(torch.equal(one[i], two[i]) for i in range(6, 12))
    assert len({tuple(row.tolist()) for row in one}) == 12
