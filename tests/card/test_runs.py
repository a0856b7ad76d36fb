"""Whole runs on a card that is not there: they go to their end, and in a step the host waits for the card once."""

from __future__ import annotations

from typing import Any

from tests.card.conftest import Play

NF4, STREAMED = {"model.quantization": "nf4"}, {"model.quantization": "nf4", "model.resident_layers": 0}
GIB = 1 << 30


def assert_one_wait(run: dict[str, Any]) -> None:
    """Of a step: one read behind it, and nothing else that makes the host wait."""
    waits = [wait for wait in run["waits"] if not wait[0].startswith("free")]
    (read,) = waits
    assert read[1].startswith("training/loop.py") and read[2] == run["steps"], waits


def test_runs_of_every_kind(card: Play) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        STREAMED,
        {**NF4, "model.resident_layers": 1},
        {**STREAMED, "model.double_quantization": False},
        {"model.quantization": "int8", "model.resident_layers": 0},
        {"lora.dropout": 0.1},
        {"lora.use_dora": True},
        {"train.gradient_checkpointing": "on", "train.micro_batch_tokens": 64},
        {"train.optimizer": "adamw_8bit"},
        {"train.optimizer": "paged_adamw_8bit"},
        {"capability": [7, 5]},
    ]
    for run in card(*({"play": "train", **kind} for kind in kinds)):
        assert run["steps"] == 3
        assert_one_wait(run)


def test_memory_that_runs_out(card: Play) -> None:
    """Once: the same is tried again. Again and again: smaller pieces, and the run goes on to its end."""
    once, often = card(
        {"play": "train", "fail_calls": [0]}, {"play": "train", "fail_above": 60, "train.micro_batch_tokens": 512}
    )
    notes = [event["text"] for event in once["events"] if event["event"] == "note"]
    assert any("tried again at the same size" in text for text in notes)
    assert not [event for event in once["events"] if event["event"] == "shrink"]
    shrunk = [event["to"] for event in often["events"] if event["event"] == "shrink"]
    assert shrunk and shrunk[-1].startswith("micro-batches of 64 tokens") and often["steps"] == 3


def test_a_quantized_run_answers_where_it_was_trained(card: Play) -> None:
    """Its layers are dequantized once where there is room, and stay packed where there is none."""
    _, large, small = card(
        {"play": "train", **STREAMED},
        {"play": "answer", "of": 0},
        {"play": "answer", "of": 0, "memory_bytes": 2 * GIB},
    )
    assert large["packed"] == 0 and small["packed"] == 14
