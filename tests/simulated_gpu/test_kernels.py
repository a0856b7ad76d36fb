"""Whole runs on a simulated GPU whose Triton kernels work: each is launched where it belongs, on tensors of the GPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from tests.simulated_gpu.conftest import Simulate
from tests.simulated_gpu.test_runs import NF4, QUICK, STREAMED, assert_one_wait

STEP = {"_norm", "_norm_backward", "_glu", "_glu_backward", "_rope", "_rope_backward", "_cross_entropy"}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_runs_launch_the_kernels_of_their_options(simulate: Simulate) -> None:
    kinds: list[tuple[dict[str, Any], set[str]]] = [
        (STREAMED, {"_four_bit"}),
        ({**NF4, "model.resident_layers": 1, "model.double_quantization": False}, {"_four_bit"}),
        ({"model.quantization": "int8", "model.resident_layers": 0}, {"_eight_bit"}),
        ({"lora.dropout": 0.1, "train.gradient_checkpointing": "on"}, {"_apply_masks", "_apply_masks_backward"}),
        ({"lora.use_dora": True}, {"_scale", "_scale_backward"}),
        (
            {"lora.use_dora": True, "lora.dropout": 0.1},
            {"_scale", "_scale_backward", "_apply_masks", "_apply_masks_backward"},
        ),
        ({"lora.modules_to_save": ["input_layernorm", "norm"]}, {"_scale_backward"}),
        (
            {"lora.target_modules": ["all-linear", "lm_head"], "lora.dropout": 0.1},
            {"_apply_masks", "_apply_masks_backward"},
        ),
        ({"capability": [7, 5]}, set()),
    ]
    runs = simulate(*({"scenario": "train", "kernels": True, **QUICK, **kind} for kind, _ in kinds))
    for run, (kind, more) in zip(runs, kinds, strict=True):
        assert run["steps"] == 2
        assert run["kernels"].keys() == STEP | more, kind
        assert_one_wait(run)
        assert not [event for event in run["events"] if "PyTorch's own operations" in str(event.get("text"))]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_runs_of_other_families_launch_their_kernels(simulate: Simulate) -> None:
    """Norms of heads and of values, windows, GELU, an interleaved rotary embedding, soft caps, sinks, mixtures.

    GPT-2 has the plain step. Attention with soft caps is made of matrix products, whose inputs PyTorch rotates. A
    mixture's two layers of experts, the model's modules, read how many tokens each expert has.
    """
    reads = {"models/experts.py"}
    kinds: dict[str, tuple[set[str], set[str]]] = {
        "qwen3": (STEP, set()), "gemma3_text": (STEP, set()), "glm": (STEP | {"_rope_only"}, set()),
        "gemma2": (STEP - {"_rope", "_rope_backward"}, set()), "gemma4_text": (STEP, set()),
        "gpt2": (set(), set()), "qwen3_moe": (STEP - {"_glu", "_glu_backward"}, reads),
        "gpt_oss": (STEP - {"_glu", "_glu_backward"}, reads),
    }  # fmt: skip
    runs = simulate(*({"scenario": "train", "kernels": True, "model": kind, **QUICK} for kind in kinds))
    for run, (kind, (kernels, waits)) in zip(runs, kinds.items(), strict=True):
        assert run["steps"] == 2, kind
        assert run["kernels"].keys() == kernels, kind
        of_experts = [wait for wait in run["waits"] if wait[1].partition(":")[0] in waits]
        assert sum(number for *_, number in of_experts) == (2 * run["steps"] if waits else 0), (kind, of_experts)
        assert_one_wait({**run, "waits": [wait for wait in run["waits"] if wait not in of_experts]})
