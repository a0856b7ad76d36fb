"""Whole runs on a card that is not there: they go to their end, and in a step the host waits for the card once."""

from __future__ import annotations

from typing import Any

from tests.card.conftest import Play

GIB = 1 << 30
QUICK = {"train.max_steps": 2, "train.save_steps": 2}
NF4 = {"model.quantization": "nf4"}
STREAMED = {"model.quantization": "nf4", "model.resident_layers": 0}
KINDS: dict[str, dict[str, Any]] = {
    "16 bit, evaluated": {"data.eval": "25%", "train.eval_steps": 1},
    "nf4, one layer resident, computed again, micro-batches": {
        "model.quantization": "nf4", "model.resident_layers": 1, "train.gradient_checkpointing": "on",
        "train.micro_batch_tokens": 64, "train.optimizer": "adamw_8bit",
    },
    "nf4 without double quantization, dropout": {
        **STREAMED, "model.double_quantization": False, "lora.dropout": 0.1, "train.optimizer": "paged_adamw_8bit",
    },
    "int8, DoRA": {"model.quantization": "int8", "model.resident_layers": 0, "lora.use_dora": True},
    "without bf16": {"capability": [7, 5]},
    "stopped and resumed": {"resume": True},
}  # fmt: skip


def assert_one_wait(run: dict[str, Any]) -> None:
    """Of a step: one read behind it, and nothing else that makes the host wait."""
    (read, *others) = [wait for wait in run["waits"] if not wait[0].startswith("free")]
    assert not others and read[1].startswith("training/loop.py") and read[2] == run["steps"], run["waits"]


def test_runs_of_every_kind(card: Play) -> None:
    for kind, run in zip(KINDS, card(*({"play": "train", **QUICK, **KINDS[kind]} for kind in KINDS)), strict=True):
        assert run["steps"] == 2, kind
        assert_one_wait(run)


def test_adapters_that_answer_together(card: Play) -> None:
    """Evaluated, and served beside another adapter and the base: a pass that writes waits once, for its logits."""
    _, evaluated, served = card(
        {"play": "train", **QUICK}, {"play": "evaluate", "of": 0}, {"play": "serve", "of": 0, "texts": 3}
    )
    assert evaluated["rows"] == 24 and served["tokens"] == 12
    waits = [(kind, line, number) for kind, line, number in served["waits"] if not kind.startswith("free")]
    passes = [number for _, line, number in waits if "engine/answers/batch.py" in line]
    reading = 6  # places, masks and what became of three prompts that are read together
    assert passes == [3] and sum(number for _, _, number in waits) <= 3 + reading, served["waits"]


def test_memory_that_runs_out_and_answers_where_it_was_trained(card: Play) -> None:
    """Once: the same is tried again. Again and again: smaller pieces, and the run goes on to its end. Behind it the
    model's layers are dequantized once where there is room, and stay packed where there is none."""
    once, often, large, small = card(
        {"play": "train", **QUICK, **STREAMED, "fail_calls": [0]},
        {"play": "train", **QUICK, "fail_above": 60, "train.micro_batch_tokens": 512},
        {"play": "answer", "of": 0},
        {"play": "answer", "of": 0, "memory_bytes": 2 * GIB},
    )
    notes = [event["text"] for event in once["events"] if event["event"] == "note"]
    assert any("tried again at the same size" in text for text in notes)
    assert not [event for event in once["events"] if event["event"] == "shrink"]
    shrunk = [event["to"] for event in often["events"] if event["event"] == "shrink"]
    assert shrunk and shrunk[-1].startswith("micro-batches of 64 tokens") and often["steps"] == 2
    assert large["packed"] == 0 and small["packed"] == 14
