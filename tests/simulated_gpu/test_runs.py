"""Whole runs on a card that is not there: they go to their end, and in a step the host waits for the card once."""

from __future__ import annotations

from typing import Any

from tests.simulated_gpu.conftest import Play

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
    "nf4, DoRA with dropout, norms in full": {
        **STREAMED, "lora.use_dora": True, "lora.dropout": 0.1, "lora.modules_to_save": ["norm"],
    },
    "an adapter on the head, dropout": {"lora.target_modules": ["q_proj", "lm_head"], "lora.dropout": 0.1},
    "without bf16": {"capability": [7, 5]},
    "inputs of layers in the host's memory": {
        **STREAMED, "train.gradient_checkpointing": "offload", "train.micro_batch_tokens": 64,
    },
    "stopped and resumed": {"resume": True, "train.deterministic": True},
}  # fmt: skip


FIRST_OF_THEIRS = {
    "nf4, one layer resident, computed again, micro-batches", "nf4 without double quantization, dropout", "int8, DoRA",
}  # fmt: skip


def assert_one_wait(run: dict[str, Any]) -> None:
    """Of a step: one read behind it, and nothing else that makes the host wait."""
    (read, *others) = [wait for wait in run["waits"] if not wait[0].startswith("free")]
    assert not others and read[1].startswith("training/loop.py") and read[2] == run["steps"], run["waits"]


OTHERS: dict[str, dict[str, Any]] = {
    "fails once": {"play": "train", **QUICK, **STREAMED, "fail_calls": [0]},
    "fails for the optimizer": {"play": "train", **QUICK, "fail_state": 3},
    "fails for its 8 bit": {"play": "train", **QUICK, "fail_state": 3, "train.optimizer": "adamw_8bit"},
    "fails with one row": {"play": "train", **QUICK, "fail_calls": [0, 1, 2], "train.micro_batch": 1},
    "fails often": {"play": "train", **QUICK, "fail_above": 60, "train.micro_batch_tokens": 512},
}


def test_runs_of_every_kind(card: Play) -> None:
    """And what is done with a run: it is evaluated, answers with room and without, and is served beside others."""
    runs = {**{kind: {"play": "train", **QUICK, **options} for kind, options in KINDS.items()}, **OTHERS}
    of = list(runs).index("fails once")
    uses = [
        {"play": "evaluate", "of": 0},
        {"play": "serve", "of": 0, "texts": 3},
        {"play": "merge", "of": 0},
        {"play": "newest_attention"},
        {"play": "answer", "of": of},
        {"play": "answer", "of": of, "memory_bytes": 2 * GIB},
    ]
    played = card(*runs.values(), *uses)
    for kind, run in zip(runs, played, strict=False):
        assert run["steps"] == 2, kind
        assert run["deterministic"] == runs[kind].get("train.deterministic", False), kind
        assert_one_wait(run)
    assert_offloaded(played[list(runs).index("inputs of layers in the host's memory")])
    fails(**{kind.replace(" ", "_"): run for kind, run in zip(runs, played, strict=False) if kind in OTHERS})
    evaluated, served, merged, newest, large, small = played[len(runs) :]
    assert newest == {"why": None, "switched": {"activate_flash_attention_impl": 1}}
    assert merged["files"] > 0 and not merged["asked"], "merging is the CPU's work"
    assert evaluated["rows"] == 24
    assert played[0]["emptied"] == 1, "of the holes that weights leave which were laid side by side"
    assert played[list(runs).index("fails once")]["emptied"] == 2
    quantized = [bool(run["quantized_there"]) for run in played[: len(runs)]]
    assert quantized == [kind in FIRST_OF_THEIRS for kind in runs], quantized  # the others find it done
    one_wait_a_pass(served)
    # A quantized model's layers are dequantized once where there is room, and stay packed where there is none.
    assert large["packed"] == 0 and small["packed"] == 14


def fails(fails_often: dict[str, Any], fails_with_one_row: dict[str, Any], **once: dict[str, Any]) -> None:
    """Once: the same is tried again. Again and again: smaller pieces; where there are none, less is kept."""
    for run in once.values():
        notes = [event["text"] for event in run["events"] if event["event"] == "note"]
        assert len([text for text in notes if "at the same size" in text]) == 1
        assert not [event for event in run["events"] if event["event"] == "shrink"]
    shrunk, kept = (
        [event["to"] for event in run["events"] if event["event"] == "shrink"]
        for run in (fails_often, fails_with_one_row)
    )
    assert shrunk and shrunk[-1].startswith("micro-batches of 64 tokens")
    assert kept == ["gradient checkpointing", "gradient checkpointing with the inputs of layers in host memory"]
    assert_offloaded(fails_with_one_row)


def assert_offloaded(run: dict[str, Any]) -> None:
    """Of two layers the first one's input goes and comes, and nothing waits for it."""
    lines = {
        (kind, line.partition(":")[0])
        for kind, line, _ in run["waits"]
        if line.startswith("engine/kernels/cuda/offload.py")
    }
    assert lines == {(f"free copy to the {where}", "engine/kernels/cuda/offload.py") for where in ("host", "card")}


def one_wait_a_pass(served: dict[str, Any]) -> None:
    """Three texts, of the base and of two adapters: a pass that writes waits for its logits."""
    assert served["tokens"] == 12
    waits = [(kind, line, number) for kind, line, number in served["waits"] if not kind.startswith("free")]
    passes = [number for _, line, number in waits if "engine/decode/batch.py" in line]
    reading = 6  # places, masks and what became of three prompts that are read together
    assert passes == [3] and sum(number for _, _, number in waits) <= 3 + reading, served["waits"]
