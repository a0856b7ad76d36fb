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
    "stopped and resumed": {"resume": True, "train.deterministic": True},
}  # fmt: skip


def assert_one_wait(run: dict[str, Any]) -> None:
    """Of a step: one read behind it, and nothing else that makes the host wait."""
    (read, *others) = [wait for wait in run["waits"] if not wait[0].startswith("free")]
    assert not others and read[1].startswith("training/loop.py") and read[2] == run["steps"], run["waits"]


OTHERS: dict[str, dict[str, Any]] = {
    "fails once": {"play": "train", **QUICK, **STREAMED, "fail_calls": [0]},
    "fails often": {"play": "train", **QUICK, "fail_above": 60, "train.micro_batch_tokens": 512},
}


def test_runs_of_every_kind(card: Play) -> None:
    """And what is done with a run: it is evaluated, answers with room and without, and is served beside others."""
    runs = {**{kind: {"play": "train", **QUICK, **options} for kind, options in KINDS.items()}, **OTHERS}
    of = list(runs).index("fails once")
    uses = [
        {"play": "evaluate", "of": 0},
        {"play": "serve", "of": 0, "texts": 3},
        {"play": "answer", "of": of},
        {"play": "answer", "of": of, "memory_bytes": 2 * GIB},
    ]
    played = card(*runs.values(), *uses)
    for kind, run in zip(runs, played, strict=False):
        assert run["steps"] == 2, kind
        assert run["deterministic"] == runs[kind].get("train.deterministic", False), kind
        assert_one_wait(run)
    fails(**{kind.replace(" ", "_"): run for kind, run in zip(runs, played, strict=False) if kind in OTHERS})
    evaluated, served, large, small = played[len(runs) :]
    assert evaluated["rows"] == 24
    one_wait_a_pass(served)
    # A quantized model's layers are dequantized once where there is room, and stay packed where there is none.
    assert large["packed"] == 0 and small["packed"] == 14


def fails(fails_once: dict[str, Any], fails_often: dict[str, Any]) -> None:
    """Once: the same is tried again. Again and again: smaller pieces."""
    notes = [event["text"] for event in fails_once["events"] if event["event"] == "note"]
    assert any("tried again at the same size" in text for text in notes)
    assert not [event for event in fails_once["events"] if event["event"] == "shrink"]
    shrunk = [event["to"] for event in fails_often["events"] if event["event"] == "shrink"]
    assert shrunk and shrunk[-1].startswith("micro-batches of 64 tokens")


def one_wait_a_pass(served: dict[str, Any]) -> None:
    """Three texts, of the base and of two adapters: a pass that writes waits for its logits."""
    assert served["tokens"] == 12
    waits = [(kind, line, number) for kind, line, number in served["waits"] if not kind.startswith("free")]
    passes = [number for _, line, number in waits if "engine/answers/batch.py" in line]
    reading = 6  # places, masks and what became of three prompts that are read together
    assert passes == [3] and sum(number for _, _, number in waits) <= 3 + reading, served["waits"]
