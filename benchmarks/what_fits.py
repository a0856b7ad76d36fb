"""Print which models fit a CPU machine's memory, and how: the table of docs/streaming.md, from the plan alone.

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
ROWS, LENGTH = 1000, 1024


def main() -> None:
    print(f"| model | {' | '.join(f'{size} GB' for size in MEMORIES)} | disk, GB | hours for {ROWS:,} rows |")
    print(f"|---|{'---|' * len(MEMORIES)}---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            file = Path(folder, f"{model}.json")
            file.write_text(json.dumps(KNOWN[model]), encoding="utf-8")
            cells, rates = [], []
            for size in MEMORIES:
                options = {"model.dtype": "bf16", "model.device": "cpu", "data.max_length": LENGTH}
                plan = strop.plan(model=str(file), memory=size * 10**9, **options)
                is_streamed = plan.workload.base.streamed
                needed = plan.phases["train"].needed_bytes / 1e9
                cells.append(f"{'streamed' if is_streamed else 'in memory'}, {needed:.1f}" if plan.fits else "no")
                rates.append(plan.tokens_per_s)
            disk = f"{2 * plan.workload.base.parameters / 1e9:,.0f}" if "streamed" in str(cells) else ""
            hours = [ROWS * LENGTH / rate / 3600 for rate in rates]
            print(f"| {model} | {' | '.join(cells)} | {disk} | {hours[-1]:,.0f} |")


if __name__ == "__main__":
    main()
