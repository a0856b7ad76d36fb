"""Print which models fit the memory of CPU machines and GPUs, and how: the tables of docs/streaming.md, from the plan.

python benchmarks/what_fits.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import strop
from strop.planning.tables import KNOWN

MODELS = ("Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B", "Qwen3-14B", "Llama-3.1-70B")
MEMORIES = (4, 8, 16, 24, 64)  # GB
GPUS = {"RTX 4060": 8, "RTX 3060": 12, "RTX 4090": 24, "L40S": 48, "H100": 80}  # GB
ROWS, LENGTH = 1000, 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            Path(folder, f"{name}.json").write_text(json.dumps(KNOWN[name]), encoding="utf-8")
        print_cpus(Path(folder))
        print_gpus(Path(folder))


def print_cpus(folder: Path) -> None:
    print(f"| model | {' | '.join(f'{size} GB' for size in MEMORIES)} | disk, GB | hours for {ROWS:,} rows |")
    print(f"|---|{'---|' * len(MEMORIES)}---:|---:|")
    for model in MODELS:
        cells, rates = [], []
        for size in MEMORIES:
            options = {"model.dtype": "bf16", "model.device": "cpu", "data.max_length": LENGTH}
            plan = strop.plan(model=str(folder / f"{model}.json"), memory=size * 10**9, **options)
            is_streamed = plan.workload.base.streamed
            needed = plan.phases["train"].needed_bytes / 1e9
            cells.append(f"{'streamed' if is_streamed else 'in memory'}, {needed:.1f}" if plan.fits else "no")
            rates.append(plan.tokens_per_s)
        disk = f"{2 * plan.workload.base.parameters / 1e9:,.0f}" if "streamed" in str(cells) else ""
        hours = [ROWS * LENGTH / rate / 3600 for rate in rates]
        print(f"| {model} | {' | '.join(cells)} | {disk} | {hours[-1]:,.0f} |")


def print_gpus(folder: Path) -> None:
    """Print, for each model and GPU, how the base is kept and the minutes of ROWS rows."""
    print(f"\n| model | {' | '.join(f'{gpu}, {size} GB' for gpu, size in GPUS.items())} | host, GB |")
    print(f"|---|{'---|' * len(GPUS)}---:|")
    for model in MODELS:
        cells, host = [], 0
        for gpu in GPUS:
            plan = strop.plan(model=str(folder / f"{model}.json"), gpu=gpu, **{"data.max_length": LENGTH})
            base = plan.workload.base
            kind = "16 bit" if base.scheme == "none" else base.scheme
            minutes = ROWS * LENGTH / plan.tokens_per_s / 60
            cells.append(f"{kind}{', streamed' * base.streamed}, {minutes:,.0f}" if plan.fits else "no")
            host = max(host, plan.host_bytes * plan.fits)
        print(f"| {model} | {' | '.join(cells)} | {f'{host / 1e9:,.0f}' if host else ''} |")


if __name__ == "__main__":
    main()
