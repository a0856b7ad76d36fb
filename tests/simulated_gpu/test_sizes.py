"""One step of a model: its kernels a layer, and at full size its peak of memory, beside the plan."""

from __future__ import annotations

from typing import Any

from tests.simulated_gpu.conftest import Play

# A layer, forward and backward, of one micro-batch; strop's own kernels count as one each.
MOST_KERNELS = {"none": 57, "nf4": 71}
FULL_SIZE: list[dict[str, Any]] = [
    {"shape": "1b"},
    {"shape": "8b", "scheme": "nf4"},
    {"shape": "8b", "checkpointed": 32},
    {"shape": "1b", "scheme": "nf4", "tokens": 16384, "checkpointed": 6},
    {"shape": "8b", "scheme": "nf4", "tokens": 32768, "offload": True},
]


def test_kernels_a_layer_and_peaks_of_full_size_models(card: Play) -> None:
    layers = [{"shape": "tiny", "scheme": scheme, "tokens": 64, "layers": n} for scheme in MOST_KERNELS for n in (3, 4)]
    found = card(*({"play": "step", **case} for case in [*layers, *FULL_SIZE]))
    for most, few, more in zip(MOST_KERNELS.values(), found[0:4:2], found[1:4:2], strict=True):
        a_layer = {name: number - few["kernels"].get(name, 0) for name, number in more["kernels"].items()}
        assert sum(a_layer.values()) <= most, a_layer
    for case, one in zip(FULL_SIZE, found[4:], strict=True):
        off = one["planned_over_base"] / one["over_base"] - 1
        assert abs(off) <= 0.1, (case, f"{off:+.1%}", one)
        assert abs(one["planned_base"] / one["base"] - 1) <= 0.01, (case, one)
