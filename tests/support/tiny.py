"""Tiny random models, and jobs on them that run in seconds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from strop.config.load import Resolved, resolve
from strop.data.types import Example
from strop.engine.train.plain import PlainLoss
from strop.models.lora import add_lora, trainable_parameters
from strop.runs.events import EventLog
from strop.runs.folder import RunFolder
from strop.testing import tiny_rows as write_rows
from strop.training.optim import make_optimizer
from strop.training.state import Job, Progress, TrainState
from tests.support.families import tokenizer

__all__ = ["config", "examples", "job", "model", "move_from_reference", "recipe", "save_tiny", "write_rows"]


def config(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": len(tokenizer("chatml")), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


def model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    built = LlamaForCausalLM(config(**changes)).eval().requires_grad_(False)
    for weight in built.parameters():  # larger than the default initialisation, so that predictions differ
        if weight.dim() == 2:
            weight.mul_(4)
    return built


def save_tiny(folder: Path, **changes: Any) -> Path:
    model(**changes).save_pretrained(folder)
    tokenizer("chatml").save_pretrained(folder)
    return folder


def examples(number: int, seed: int = 0, longest: int = 24) -> list[Example]:
    """Return random rows of various lengths with random loss masks."""
    random = np.random.default_rng(seed)
    rows = []
    for line in range(number):
        length = int(random.integers(4, longest))
        ids = random.integers(5, len(tokenizer("chatml")), length).astype(np.int32)
        weights = (random.random(length) < 0.6).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        rows.append(Example(ids, weights, "random", line + 1))
    return rows


def recipe(**options: Any) -> Resolved:
    settings = {
        "model": "unused", "data": "unused", "model.dtype": "fp32", "lora.r": 4, "lora.alpha": 8,
        "train.learning_rate": 1e-3, "train.warmup": 0, "train.batch_size": 8, "train.micro_batch": 8,
        "train.lr_scheduler": "constant", "train.gradient_checkpointing": "off",
    }  # fmt: skip
    return resolve(None, {**settings, **options})


def job(folder: Path, train: list[Example], held_out: list[Example] | None = None, **options: Any) -> Job:
    """Return a job on a new tiny model with nonzero B. The folder need not exist."""
    chosen = recipe(**{"model.device": "cpu", **options}).recipe
    base = model()
    torch.manual_seed(chosen.seed)
    tuned = add_lora(
        base, chosen.lora, copy.deepcopy(tokenizer("chatml")), outputs=int(chosen.train.objective == "reward")
    )
    weights = trainable_parameters(tuned)
    with torch.no_grad():
        for name, weight in weights.items():
            if "lora_B" in name:
                weight.normal_(0, 0.02)
    folder.mkdir(parents=True, exist_ok=True)
    state = TrainState(weights, make_optimizer(weights, chosen.train), Progress())
    step = PlainLoss(tuned, "asked for by the test")
    return Job(chosen, RunFolder(folder), tuned, step, train, held_out, state, EventLog(folder / "events.jsonl"))


def move_from_reference(job_: Job) -> Job:
    """Take some steps away from the reference, so that all terms of a loss are nonzero."""
    with torch.no_grad():
        for name, weight in job_.state.weights.items():
            if "lora_B" in name:
                torch.manual_seed(len(name))
                weight.add_(torch.randn_like(weight) * 0.05)
    return job_
