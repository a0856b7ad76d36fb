"""What a young adapter learns in bf16: strop's step, which rounds base and adapter once, beside peft's and fp32.

    python benchmarks/young_adapters.py --data ROWS.jsonl [--model FOLDER] [--rates 2e-4,1e-3] [--out RESULT.json]

The same first adapters and the same 25 steps of 4 rows for all (`train_step.py`, whose tool `plain` is transformers and
peft); the mean loss of the steps. Needs no quiet machine. --model: default: the demo's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import measured

from strop.model.facts import locate
from strop.model.load import weights_folder

HOW = {"strop, fp32": ("fast", "fp32"), "strop, bf16": ("fast", "bf16"), "peft, bf16": ("plain", "bf16")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", help="a model folder with its tokenizer")
    parser.add_argument("--rates", default="2e-4,1e-3")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--out")
    given = parser.parse_args()
    model, step = given.model or str(weights_folder(locate("demo"))), Path(__file__).with_name("train_step.py")
    found: dict[str, dict[str, float]] = {}
    for rate in given.rates.split(","):
        for name, (tool, dtype) in HOW.items():
            words = [
                "--model",
                model,
                "--data",
                given.data,
                "--rows",
                str(given.rows),
                "--dtype",
                dtype,
                "--rate",
                rate,
            ]
            one = measured.child([sys.executable, str(step), *words, "--run", tool])
            found.setdefault(name, {})[rate] = one["mean_loss"]
            print(f"{name} from {rate}: {one['mean_loss']:.3f}", flush=True)
            if given.out:
                measured.write(given.out, found)


if __name__ == "__main__":
    main()
