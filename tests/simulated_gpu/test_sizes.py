"""One step of a model: its kernels per layer, and at full size its peak memory next to the plan."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simulated_gpu.conftest import Simulate

# A layer, forward and backward, of one micro-batch; Triton kernels count as one each.
MOST_KERNELS = {"none": 57, "nf4": 71}
FULL_SIZE: list[dict[str, Any]] = [
    {"shape": "1b"},
    {"shape": "8b", "scheme": "nf4"},
    {"shape": "8b", "checkpointed": 32},
    {"shape": "1b", "scheme": "nf4", "tokens": 16384, "checkpointed": 6},
    {"shape": "8b", "scheme": "nf4", "tokens": 32768, "offload": True},
    {"shape": "8b", "tokens": 8192, "checkpointed": 32, "streamed": True},
    {"shape": "70b", "scheme": "nf4", "tokens": 2048, "checkpointed": 51, "streamed": True},
    {"shape": "gemma-2-2b", "scheme": "nf4"},
    {"shape": "gemma-2-2b", "scheme": "nf4", "checkpointed": 26, "documents": 8},
]


@pytest.mark.slow
def test_kernels_per_layer_and_peak_memory_match_the_plan(simulate: Simulate) -> None:
    layers = [{"shape": "tiny", "scheme": scheme, "tokens": 64, "layers": n} for scheme in MOST_KERNELS for n in (3, 4)]
    outcomes = simulate(*({"scenario": "step", **case} for case in [*layers, *FULL_SIZE]))
    for most, few, more in zip(MOST_KERNELS.values(), outcomes[0:4:2], outcomes[1:4:2], strict=True):
        per_layer = {name: number - few["kernels"].get(name, 0) for name, number in more["kernels"].items()}
        assert sum(per_layer.values()) <= most, per_layer
    for case, outcome in zip(FULL_SIZE, outcomes[4:], strict=True):
        error = outcome["planned_over_base"] / outcome["over_base"] - 1
        assert abs(error) <= 0.1, (case, f"{error:+.1%}", outcome)
        assert abs(outcome["planned_base"] / outcome["base"] - 1) <= 0.01, (case, outcome)
