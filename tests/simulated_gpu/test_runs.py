"""Whole runs on a simulated GPU: they complete, and in a step the host waits for the GPU once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.simulated_gpu.conftest import Simulate

GIB = 1 << 30
QUICK = {"train.max_steps": 2, "train.save_steps": 2}
NF4 = {"model.quantization": "nf4"}
STREAMED = {"model.quantization": "nf4", "model.resident_layers": 0}
KINDS: dict[str, dict[str, Any]] = {
    "16 bit, evaluated": {"data.eval": "25%", "train.eval_steps": 1},
    "nf4, one layer resident, checkpointing, micro-batches": {
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
    "inputs of layers in host memory": {
        **STREAMED, "train.gradient_checkpointing": "offload", "train.micro_batch_tokens": 64,
    },
    "layers in host memory": {"model.placement": "streamed", "data.eval": "25%", "train.eval_steps": 1},
    "nf4 layers and their inputs in host memory": {
        **NF4, "model.placement": "streamed", "train.gradient_checkpointing": "offload", "train.micro_batch_tokens": 64,
    },
    "layers of another family in host memory": {"model": "gpt2", "model.placement": "streamed"},
    "all weights, in bf16": {"train.method": "full", "lora.r": 16, "train.gradient_checkpointing": 1},
    "stopped and resumed": {"resume": True, "train.deterministic": True},
}  # fmt: skip


FIRST_OF_THEIR_SCHEME = {
    "nf4, one layer resident, checkpointing, micro-batches", "nf4 without double quantization, dropout", "int8, DoRA",
}  # fmt: skip


def assert_one_wait(run: dict[str, Any]) -> None:
    """Check that one read after each step is all that makes the host wait."""
    (read, *others) = [wait for wait in run["waits"] if not wait[0].startswith("free")]
    assert not others and read[1].startswith("training/loop.py") and read[2] == run["steps"], run["waits"]


OTHERS: dict[str, dict[str, Any]] = {
    "fails once": {"scenario": "train", **QUICK, **STREAMED, "fail_calls": [0]},
    "fails for the optimizer": {"scenario": "train", **QUICK, "fail_state": 3},
    "fails for its 8 bit": {"scenario": "train", **QUICK, "fail_state": 3, "train.optimizer": "adamw_8bit"},
    "fails with one row": {"scenario": "train", **QUICK, "fail_calls": [0, 1, 2], "train.micro_batch": 1},
    "fails with resident layers": {
        "scenario": "train",
        **QUICK,
        **NF4,
        "model.resident_layers": 2,
        "fail_calls": [0, 1],
    },
    "fails often": {"scenario": "train", **QUICK, "fail_above": 60, "train.micro_batch_tokens": 512},
}


def test_runs_complete_and_wait_once_a_step(simulate: Simulate) -> None:
    """Runs with all options complete; then they are evaluated, generate with much and little memory, and are served."""
    runs = {**{kind: {"scenario": "train", **QUICK, **options} for kind, options in KINDS.items()}, **OTHERS}
    of = list(runs).index("fails once")
    uses = [
        {"scenario": "evaluate", "of": 0},
        {"scenario": "serve", "of": 0, "texts": 3},
        {"scenario": "merge", "of": 0},
        {"scenario": "newest_attention"},
        {"scenario": "answer", "of": of},
        {"scenario": "answer", "of": of, "memory_bytes": 2 * GIB},
        {"scenario": "answer", "of": list(runs).index("layers in host memory"), "memory_bytes": GIB + 1000},
    ]
    outcomes = simulate(*runs.values(), *uses)
    for kind, run in zip(runs, outcomes, strict=False):
        assert run["steps"] == 2, kind
        assert run["deterministic"] == runs[kind].get("train.deterministic", False), kind
        if kind != "fails with resident layers":  # which quantizes its weights again
            assert_one_wait(run)
    for kind in ("inputs of layers in host memory", "nf4 layers and their inputs in host memory"):
        assert_offloaded(outcomes[list(runs).index(kind)])
    for kind in (kind for kind, options in KINDS.items() if options.get("model.placement") == "streamed"):
        assert_copied_ahead(outcomes[list(runs).index(kind)])
    old = Path(outcomes[list(runs).index("without bf16")]["folder"])
    assert "dtype: fp16" in (old / "recipe.yaml").read_text(encoding="utf-8")
    assert_failures_are_handled(
        **{kind.replace(" ", "_"): run for kind, run in zip(runs, outcomes, strict=False) if kind in OTHERS}
    )
    evaluated, served, merged, newest, large, small, short = outcomes[len(runs) :]
    assert newest == {"why": None, "switched": {"activate_flash_attention_impl": 1}}
    copies = {kind for kind, line in merged["asked"] if "exporting/parity.py" in line}  # models, tokens and logits
    assert merged["files"] > 0 and copies == {"copy to the GPU", "copy to the host"}
    assert evaluated["rows"] == 24
    # to free the holes left by weights that were joined, after a step that failed, and before the adapter is written
    assert outcomes[0]["emptied"] == 2
    assert outcomes[list(runs).index("fails once")]["emptied"] == 3
    quantized = [bool(run["quantized_there"]) for run in outcomes[: len(runs)]]
    assert quantized == [kind in FIRST_OF_THEIR_SCHEME for kind in runs], "the others find the quantized copy"
    assert_one_wait_a_pass(served)
    # A quantized model is dequantized once if memory allows, and stays quantized if not.
    assert large["packed"] == 0 and small["packed"] == 14
    assert ["is copied to the GPU for each token" in note for note in short["notes"]] == [True]


# Objectives, and the files that wait in addition, once a micro-batch: for KTO's estimate of the divergence, and for the
# vectors of all texts of the batch.
OBJECTIVES = {
    **dict.fromkeys(("dpo", "ipo", "simpo", "orpo", "reward", "classify")), "kto": "training/criteria.py",
    "embed": "training/contrastive.py",
}  # fmt: skip


@pytest.mark.slow
def test_objectives_wait_once_a_step(simulate: Simulate) -> None:
    """Masks, weights and references are not read from the GPU. Only the first update compares the weights."""
    outcomes = simulate(*({"scenario": "train", **QUICK, "train.objective": objective} for objective in OBJECTIVES))
    for (objective, line), run in zip(OBJECTIVES.items(), outcomes, strict=True):
        waits = [wait for wait in run["waits"] if not wait[0].startswith("free")]
        waits = [wait for wait in waits if "training/guard.py" not in wait[1]]
        *others, (_, read, number) = sorted(waits, key=lambda wait: wait[1].startswith("training/loop.py"))
        assert read.startswith("training/loop.py") and number == run["steps"], (objective, waits)
        assert [(wait[1].partition(":")[0], wait[2]) for wait in others] == ([(line, 2)] if line else []), objective


def assert_failures_are_handled(
    fails_often: dict[str, Any], fails_with_one_row: dict[str, Any], fails_with_resident_layers: dict[str, Any],
    **once: dict[str, Any],
) -> None:  # fmt: skip
    """Check that a first failure is retried; repeated ones lead to smaller micro-batches, then to less memory."""
    for run in once.values():
        steps = [event for event in run["events"] if event["event"] == "step"]
        assert all("allocated_bytes" in event and "resident_bytes" not in event for event in steps)
        notes = [event["text"] for event in run["events"] if event["event"] == "note"]
        assert len([text for text in notes if "at the same size" in text]) == 1
        assert not [event for event in run["events"] if event["event"] == "shrink"]
    shrunk, saved, quantized = (
        [event["to"] for event in run["events"] if event["event"] == "shrink"]
        for run in (fails_often, fails_with_one_row, fails_with_resident_layers)
    )
    assert quantized == ["dequantizing weights when they are needed"]
    assert shrunk and shrunk[-1].startswith("micro-batches of 64 tokens")
    assert saved == ["gradient checkpointing", "gradient checkpointing with the inputs of layers in host memory"]
    assert_offloaded(fails_with_one_row)


def assert_offloaded(run: dict[str, Any]) -> None:
    """Check that the first of two layers' inputs is copied to the host and back, and that nothing waits for it."""
    lines = {
        (kind, line.partition(":")[0])
        for kind, line, _ in run["waits"]
        if line.startswith("engine/kernels/cuda/offload.py")
    }
    assert lines == {(f"free copy to the {where}", "engine/kernels/cuda/offload.py") for where in ("host", "GPU")}


def assert_copied_ahead(run: dict[str, Any]) -> None:
    """Check that layers are copied from pinned memory, which nothing waits for."""
    copies = {kind for kind, line, _ in run["waits"] if line.startswith("models/host_layers.py")}
    assert copies == {"free copy to the GPU"}


def assert_one_wait_a_pass(served: dict[str, Any]) -> None:
    """Check three texts, of the base and two adapters: a decoding pass waits for its logits."""
    assert served["tokens"] == 12
    waits = [(kind, line, number) for kind, line, number in served["waits"] if not kind.startswith("free")]
    passes = [number for _, line, number in waits if "engine/decode/batch.py" in line]
    reading = 6  # positions, masks and results of three prompts that are prefilled together
    assert passes == [3] and sum(number for _, _, number in waits) <= 3 + reading, served["waits"]
