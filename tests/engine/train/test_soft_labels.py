"""Labels that are distributions, in both training steps, compared with the definition of the cross entropy."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch

from strop.data.types import Example, SoftLabels
from strop.engine.step import step_for
from strop.engine.train.plain import PlainLoss
from tests.support.random_models import tiny_of

K = 6


def make_example(
    random: np.random.Generator, length: int, *, soft: bool, weight: float = 1, temperature: float = 1
) -> Example:
    ids = random.integers(1, 60, length).astype(np.int32)
    weights = np.where(np.arange(length) < 3, 0, 2.0).astype(np.float32)
    if not soft:
        return Example(ids, weights, "", 0)
    others = [random.permutation([x for x in range(60) if x != label])[: K - 1] for label in ids]
    soft_ids = np.column_stack([ids, others]).astype(np.int32)
    probs = random.random((length, K)).astype(np.float32)
    probs *= np.float32(0.8) / probs.sum(1, keepdims=True)
    probs[::2, 2:4] = -1  # these ids are among the others
    return Example(ids, weights, "", 0, soft=SoftLabels(soft_ids, probs, weight, temperature))


def by_definition(model: Any, examples: list[Example]) -> torch.Tensor:
    """Cross entropy, and the divergence from K ids and one that stands for all others."""
    total = torch.zeros(())
    for example in examples:
        logits = model(input_ids=torch.from_numpy(example.ids.astype(np.int64))[None]).logits[0]
        log_probs = torch.log_softmax(logits, -1)
        for token in np.flatnonzero(example.weights):
            row, weight = log_probs[token - 1], float(example.weights[token])
            share, temperature = (0.0, 1.0) if example.soft is None else (example.soft.weight, example.soft.temperature)
            total = total - (1 - share) * weight * row[int(example.ids[token])]
            if example.soft is None:
                continue
            row = torch.log_softmax(logits[token - 1] / temperature, -1)
            given = example.soft.probs[token] >= 0
            ids, probs = (torch.from_numpy(x[token][given]) for x in (example.soft.ids, example.soft.probs))
            ids = ids.long()
            others = torch.ones_like(row, dtype=torch.bool).index_fill(0, ids, False)
            model_probs = torch.cat([row[ids], row[others].logsumexp(0)[None]])
            target = torch.cat([probs, 1 - probs.sum(0, keepdim=True)])
            divergence = torch.nn.functional.kl_div(model_probs, target, reduction="sum")
            total = total + share * weight * temperature**2 * divergence
    return total


@pytest.mark.parametrize("kind", ["fast", "plain"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 has a soft cap on its logits
@pytest.mark.parametrize(("weight", "temperature"), [(1, 1), (0.4, 1), (0.4, 2.5)])
def test_soft_labels_have_the_loss_and_gradients_of_the_definition(
    family: str, kind: str, weight: float, temperature: float
) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny_of(family).float(), config).train()
    step = step_for(model) if kind == "fast" else PlainLoss(model)
    assert step.name == kind
    random = np.random.default_rng(0)
    examples = [
        make_example(random, length, soft=soft, weight=weight, temperature=temperature)
        for length, soft in ((9, False), (12, True), (7, False), (10, True))
    ]
    results = []
    for loss in (step.token_loss(examples), by_definition(model, examples)):
        loss.backward()
        results.append((float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for ours, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-7)


@pytest.mark.parametrize("kind", ["fast", "plain"])
@pytest.mark.parametrize("k", [8, 60])
def test_unchanged_model_has_no_loss_and_no_gradient(k: int, kind: str) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_of("llama").float(), peft.LoraConfig(r=4, target_modules="all-linear"))
    random = np.random.default_rng(0)
    ids = random.integers(1, 60, 12).astype(np.int32)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    probs = torch.softmax(logits, -1)
    labels = probs[torch.arange(11), torch.from_numpy(ids[1:]).long()]
    order = (
        probs[:-1].index_put((torch.arange(11), torch.from_numpy(ids[1:]).long()), labels + 1).argsort(descending=True)
    )
    chosen = torch.cat([order[:1], order])[:, :k]  # the label first
    soft = SoftLabels(chosen.numpy().astype(np.int32), torch.cat([probs[:1], probs[:-1]]).gather(1, chosen).numpy())
    weights = (np.arange(12) > 2).astype(np.float32)
    step = step_for(model.train()) if kind == "fast" else PlainLoss(model)
    loss = step.token_loss([Example(ids, weights, "", 0, soft=soft)])
    loss.backward()
    assert abs(float(loss.detach())) < 1e-5
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-5


def test_equal_rows_keep_their_soft_labels() -> None:
    """Rows share their common prefix, but not its soft labels."""
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_of("llama").float(), peft.LoraConfig(r=4, target_modules="all-linear")).train()
    step, example = step_for(model), make_example(np.random.default_rng(0), 60, soft=True)
    one, two = (float(step.token_loss([example] * number).detach()) for number in (1, 2))
    assert one == pytest.approx(float(by_definition(model, [example]).detach()), rel=1e-5) and two == pytest.approx(
        2 * one
    )
