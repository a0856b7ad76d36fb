"""The loss of the plain step equals the model's loss, with padding and weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, LlamaConfig

from strop.engine.train import head
from strop.engine.train.plain import PlainLoss
from tests.support.random_models import example, tiny


@pytest.mark.parametrize("config", [LlamaConfig, Gemma2Config])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_equals_transformers(config: type, dtype: torch.dtype) -> None:
    model = tiny(config, final_logit_softcapping=3.0).to(dtype)
    examples = [example(9, 1, [0, 0, 1, 1, 0, 1, 1, 1, 0]), example(5, 2), example(2, 3)]
    expected = torch.zeros(())
    for one in examples:
        ids = torch.from_numpy(one.ids).long()[None]
        labels = ids.masked_fill(torch.from_numpy(one.weights)[None] == 0, -100)
        expected = expected + model(input_ids=ids, labels=labels, num_items_in_batch=1).loss
    loss = PlainLoss(model).token_loss(examples)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy_in_pieces_equals_all_rows_at_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(head, "PIECE_BYTES", 3 * 50 * dtype.itemsize)  # three rows at a time, of ten
    created = torch.randn(10, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) * 3
    labels, upstream = torch.arange(10) * 5, torch.linspace(-1, 2, 10, dtype=torch.float64)
    losses, gradients = [], []
    for loss in (head.CrossEntropy.apply, lambda x, y: F.cross_entropy(x.double(), y, reduction="none")):
        logits = created.clone().requires_grad_()
        losses.append(loss(logits, labels))
        losses[-1].backward(upstream.to(losses[-1].dtype))
        gradients.append(logits.grad)
    assert losses[0].dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_token_weights_scale_the_loss() -> None:
    model = tiny()
    loss = PlainLoss(model)
    parts = [loss.token_loss([example(4, 1, [0, *(1.0 if j == i else 0.0 for j in range(3))])]) for i in range(3)]
    together = loss.token_loss([example(4, 1, [0, 0.5, 2.0, 3.0])])
    torch.testing.assert_close(together, 0.5 * parts[0] + 2 * parts[1] + 3 * parts[2])


def test_unsupervised_batch_has_zero_loss_and_zero_gradients() -> None:
    model = tiny()
    loss = PlainLoss(model).token_loss([example(4, 1, [0.0] * 4)])
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_model_is_unchanged_after_the_loss() -> None:
    model = tiny()
    with torch.no_grad():
        PlainLoss(model).token_loss([example(4, 1)])
        assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 97)


@pytest.mark.filterwarnings("error::FutureWarning")  # users would see it
def test_checkpointing_recomputes_layers_without_a_warning() -> None:
    model, calls = tiny().train(), list[int]()
    step, gradients = PlainLoss(model), []
    # not the mlp: PyTorch ends a recomputation inside it, where the last tensor that the backward needs is made
    model.get_submodule("model.layers.0.self_attn").register_forward_hook(lambda *_: calls.append(1))
    for recomputes in (False, True):
        if recomputes:
            step.checkpoint()
        model.zero_grad()
        step.token_loss([example(6, 0)]).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    assert len(calls) == 3
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)
