"""A model that is not causal is refused before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

import strop
from strop.errors import ModelError
from strop.training.dry_run import check_causal
from tests.models.walk import QUICK
from tests.support import tiny
from tests.support.families import tokenizer


def bert(folder: Path, **changes: bool) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertLMHeadModel(BertConfig(vocab_size=len(tokenizer("chatml")), **sizes, **changes))
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "LayerNorm" not in name:
            weight.data.mul_(8)
    model.save_pretrained(folder)
    tokenizer("chatml").save_pretrained(folder)
    return folder


def test_bert_is_refused_unless_it_is_a_decoder(tmp_path: Path) -> None:
    """BERT's usual config has no is_decoder, so each token sees the one that it should predict."""
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 4)
    with pytest.raises(ModelError, match="bert: its tokens attend to later tokens"):
        strop.train(model=bert(tmp_path / "both", is_decoder=False), data=rows, out=tmp_path / "a", **QUICK)
    built = strop.train(model=bert(tmp_path / "one", is_decoder=True), data=rows, out=tmp_path / "b", **QUICK)
    assert built.report["loss"]["last"] > 0


def test_a_small_bert_is_refused_by_its_config(tmp_path: Path) -> None:
    """Later tokens hardly affect earlier ones with the initial weights, so only the config shows it.

    The plan refuses it too.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(vocab_size=len(tokenizer("chatml")), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer("chatml").save_pretrained(tmp_path / "bert")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 4)
    result = strop.plan(model=tmp_path / "bert", data=rows, memory=8 << 30, **QUICK)
    assert result.refused == "bert: its tokens attend to later tokens, so it cannot be trained to predict them"
    with pytest.raises(ModelError, match="bert: its tokens attend to later tokens"):
        strop.train(model=tmp_path / "bert", data=rows, out=tmp_path / "run", **QUICK)


def test_check_causal_restores_train_mode_and_leaves_no_gradients(tmp_path: Path) -> None:
    job = tiny.job(tmp_path, tiny.examples(4))
    assert job.step.name == "plain"
    check_causal(job, tiny.examples(4))
    assert job.model.training
    assert all(weight.grad is None for weight in job.state.weights.values())
