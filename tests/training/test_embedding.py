"""Embeddings in the training loop, compared with sentence-transformers' loss and models."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModel

from strop.config.schema import TrainSection
from strop.data.types import Item, Triplet
from strop.engine.step import Step, step_for
from strop.engine.train.plain import PlainLoss
from strop.models.lora import add_lora, trainable_parameters
from strop.training.contrastive import EmbedCriterion
from tests.support import tiny, triplets
from tests.training.test_classification import make_base

FAMILIES = [("llama", False), ("llama", True), ("gpt_neox", False), ("qwen2", False), ("gpt2", True)]


def adapted(family: str, folder: Path, dropout: float = 0.0) -> tuple[Any, Any]:
    """Return a model with adapters, and transformers' model without an output head with the same weights."""
    base = make_base(family).float().requires_grad_(False)
    base.save_pretrained(folder)
    torch.manual_seed(0)
    lora = tiny.recipe().recipe.lora.model_copy(update={"dropout": dropout})
    ours = add_lora(base, lora, None, task="FEATURE_EXTRACTION")
    with torch.no_grad():
        for name, weight in trainable_parameters(ours).items():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    theirs = AutoModel.from_pretrained(folder)
    theirs = peft.get_peft_model(theirs, copy.deepcopy(ours.peft_config["default"]))
    prefix = f"base_model.model.{theirs.base_model.model.base_model_prefix}."
    state = peft.get_peft_model_state_dict(ours, save_embedding_layers=False)
    state = {key.replace(prefix, "base_model.model."): value for key, value in state.items()}
    loaded = peft.set_peft_model_state_dict(theirs, state)
    assert not loaded.unexpected_keys
    return ours, theirs.train()


class Encoder(torch.nn.Module):
    """transformers' model with sentence-transformers' pooling, as a loss of sentence-transformers calls it."""

    def __init__(self, model: Any, pooling: str, size: int) -> None:
        from sentence_transformers.sentence_transformer.modules import Pooling

        super().__init__()
        self.model, self.pooling = model, Pooling(size, "lasttoken" if pooling == "last" else "mean")

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens = self.model(**features).last_hidden_state
        result: dict[str, torch.Tensor] = self.pooling({**features, "token_embeddings": tokens})
        return result


def their_loss(model: Any, rows: list[Triplet], pooling: str, temperature: float) -> torch.Tensor:
    """Return sentence-transformers' MultipleNegativesRankingLoss on padded batches, one for each column."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    size = model.config.hidden_size
    loss = MultipleNegativesRankingLoss(Encoder(model, pooling, size), scale=1 / temperature)
    features = []
    for column in zip(*(row.examples for row in rows), strict=True):
        ids = torch.zeros(len(rows), max(map(len, column)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(column):
            ids[row, : len(example)] = torch.from_numpy(example.ids.astype(np.int64))
            mask[row, : len(example)] = 1
        features.append({"input_ids": ids, "attention_mask": mask})
    result: torch.Tensor = loss(features, torch.zeros(len(rows)))
    return result


def split(size: int, items: Any) -> list[list[int]]:
    return [list(range(begin, min(begin + size, len(items)))) for begin in range(0, len(items), size)]


def our_step(criterion: EmbedCriterion, step: Step, rows: list[Item], size: int) -> float:
    """Accumulate the gradients of one training step in micro-batches of `size` rows, and return its loss."""
    items = criterion.prepare(step, rows, 0, partial(split, size))
    total = 0.0
    for part in split(size, items):
        loss, _ = criterion.loss(step, [items[row] for row in part], 0.0)
        loss = loss / criterion.divisor(items)
        loss.backward()
        total += float(loss.detach())
    return total


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize(("family", "plain"), FAMILIES)
def test_loss_and_gradients_equal_those_of_sentence_transformers(
    family: str, plain: bool, negatives: int, pooling: str, tmp_path: Path
) -> None:
    pytest.importorskip("sentence_transformers")
    ours, theirs = adapted(family, tmp_path)
    rows = triplets.triplets(7, negatives=negatives)
    step = PlainLoss(ours.train(), "asked for by the test") if plain else step_for(ours.train())
    assert step.name == ("plain" if plain else "fast")
    criterion = EmbedCriterion(TrainSection(pooling=pooling, temperature=0.07))
    total = our_step(criterion, step, list(rows), 3)
    expected = their_loss(theirs, rows, pooling, 0.07)
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), abs=1e-5)
    by_name = {name.replace(".model.model.", ".model."): weight for name, weight in theirs.named_parameters()}
    prefix = f".{theirs.base_model.model.base_model_prefix}."
    compared = trainable_parameters(ours)
    assert len(compared) > 4
    for name, weight in compared.items():
        assert weight.grad is not None
        key = name.replace(f"base_model.model{prefix}", "base_model.model.")
        torch.testing.assert_close(weight.grad, by_name[key].grad, atol=1e-5, rtol=1e-4, msg=name)
