"""Check wrong merges against the limits of `strop merge`.

    python benchmarks/merge_faults.py RUN [--dtype bf16 --positions 2048] [--out RESULT.json]

Each wrong merge is made in memory with the rounding of `strop merge`, and compared with the adapter on its base, both
computing in fp32. Prints the table of docs/measured.md, with figures beyond their limits in bold.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import measured
import torch
from torch import Tensor

from strop.engine.device import prepare_process
from strop.exporting import merge, parity
from strop.exporting.merge import TunedModel
from strop.exporting.parity import LIMITS, Parity
from strop.models.load import DTYPES, load_base, stored_dtype
from strop.models.source import Source

FAULTS = {
    "none": lambda name, wanted, base: wanted,
    "alpha 3 % too large": lambda name, wanted, base: base + 1.03 * (wanted - base),
    "alpha 10 % too large": lambda name, wanted, base: base + 1.1 * (wanted - base),
    "alpha 10 % too small": lambda name, wanted, base: base + 0.9 * (wanted - base),
    **{
        f"layer {number} left out": (
            lambda name, wanted, base, part=f"layers.{number}.": base if part in name else wanted
        )
        for number in (0, 5, 10, 20)
    },
    "o_proj left out": lambda name, wanted, base: base if "o_proj" in name else wanted,
    "another base (1 % noise)": lambda name, wanted, base: wanted + 0.01 * base.std() * torch.randn(base.shape),
    "no adapter at all": lambda name, wanted, base: base,
}
Fault = Callable[[str, Tensor, Tensor], Tensor]


def load_merged(source: Source, merge_tensor: Any, fault: Fault, dtype: torch.dtype) -> Any:
    """Return the merged model in fp32, with weights rounded to the type."""
    model, base_dtype = load_base(source, torch.float32, "cpu"), stored_dtype(source)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            base = weight.to(base_dtype)
            merged = merge_tensor(name, base)
            if merged is not base:
                merged = fault(name, merged, base.float())
            weight.copy_(merge.round_weight(name, merged, base, dtype))
    return model


def format_row(name: str, result: Parity) -> str:
    violations = " ".join(result.violations)
    assert result.effect is not None
    cells = {
        "mean KL": f"{result.kl_mean:.1e}",
        "clear flips": str(result.clear_flips),
        "effect": f"{result.effect.value:.1%}",
        "loss": f"{result.loss_difference:+.1e}",
    }
    bold = [f"**{value}**" if key in violations else value for key, value in cells.items()]
    return " | ".join(["", name, *bold, "yes" if result.passed else "**no**", ""]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--dtype", choices=list(LIMITS), default="bf16")
    parser.add_argument("--positions", type=int, default=parity.POSITIONS)
    parser.add_argument("--out")
    options = parser.parse_args()
    prepare_process()
    parity.POSITIONS = options.positions
    tuned = TunedModel.open(options.run).load_rows(None, choose_base=False)
    assert tuned.folder is not None
    assert tuned.storage.scheme == "none", "give a run on a 16-bit base"
    merge_tensor = merge.load_merger(tuned.source, tuned.folder)
    results = {}
    with parity.measure_against(tuned.load, tuned.examples) as measure:
        for name, fault in FAULTS.items():
            load = partial(load_merged, tuned.source, merge_tensor, fault, DTYPES[options.dtype])
            result = measure(load, LIMITS[options.dtype])
            results[name] = result.as_json()
            print(format_row(name, result), flush=True)
    if options.out:
        measured.write(options.out, results, dtype=options.dtype)


if __name__ == "__main__":
    main()
