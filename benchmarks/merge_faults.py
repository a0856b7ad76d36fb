"""Wrong merges, made on purpose, against the limits of `strop merge`.

    python benchmarks/merge_faults.py RUN [--dtype bf16 --positions 2048] [--out RESULT.json]

Each fault is merged in memory as `strop merge` would (the same rounding), and measured against the adapter on its base,
both computing in fp32. Prints the table of docs/after.md; what is beyond its limit is bold.
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
from strop.exporting.merge import Trained
from strop.exporting.parity import LIMITS, Parity
from strop.models.adapters import adapter_folder, base_source
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


def merged(source: Source, change: Any, fault: Fault, dtype: torch.dtype) -> Any:
    """The merged model in fp32, its weights rounded to the type."""
    model, kept = load_base(source, torch.float32, "cpu"), stored_dtype(source)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            base = weight.to(kept)
            wanted = change(name, base)
            if wanted is not base:
                wanted = fault(name, wanted, base.float())
            weight.copy_(merge.rounded(name, wanted, base, dtype))
    return model


def line(name: str, found: Parity) -> str:
    """A row of the table."""
    faults = " ".join(found.faults)
    assert found.effect is not None
    cells = {
        "mean KL": f"{found.kl_mean:.1e}",
        "clear flips": str(found.clear_flips),
        "effect": f"{found.effect.value:.1%}",
        "loss": f"{found.loss_difference:+.1e}",
    }
    bold = [f"**{value}**" if key in faults else value for key, value in cells.items()]
    return " | ".join(["", name, *bold, "yes" if found.passed else "**no**", ""]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--dtype", choices=list(LIMITS), default="bf16")
    parser.add_argument("--positions", type=int, default=parity.POSITIONS)
    parser.add_argument("--out")
    options = parser.parse_args()
    prepare_process()
    parity.POSITIONS = options.positions
    folder = adapter_folder(options.run)
    assert folder is not None
    source, trained = base_source(folder), Trained.read(folder)
    assert trained.scheme == "none", "give a run on a 16-bit base"
    rows, change = merge.rows_to_measure(options.run, folder, source, None), merge.changes(source, folder)
    results = {}
    with parity.measuring(partial(merge.tuned_model, source, folder, trained), rows) as measure:
        for name, fault in FAULTS.items():
            found = measure(partial(merged, source, change, fault, DTYPES[options.dtype]), LIMITS[options.dtype])
            results[name] = found.as_json()
            print(line(name, found), flush=True)
    if options.out:
        measured.write(options.out, results, dtype=options.dtype)


if __name__ == "__main__":
    main()
