"""Compare learning of small LoRA updates in bf16: strop's step, which rounds base and adapter once, peft's, and fp32.

    python benchmarks/young_adapters.py --data ROWS.jsonl [--model FOLDER] [--rates 2e-4,1e-3] [--out RESULT.json]

All use the same initial adapters and the same 25 steps of 4 rows (`train_step.py`, whose tool `plain` is transformers
and peft). Prints the mean loss of the steps, and the loss of the sixth. Does not need an idle machine. --model: a
folder with a tokenizer; by default the demo model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import measured

from strop.models.load import weights_folder
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer

HOW = {
    "strop, fp32": ("fast", "fp32"), "strop, fp32 in 8-bit integers": ("integers", "fp32"),
    "strop, bf16": ("fast", "bf16"), "peft, bf16": ("plain", "bf16"),
}  # fmt: skip
TOLD = "mean_loss", "sixth_loss"


def demo_model(folder: Path) -> Path:
    """Return a folder with the demo model's weights and tokenizer."""
    source = locate("demo")
    load_tokenizer(source).save_pretrained(folder)
    for file in weights_folder(source).iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model")
    parser.add_argument("--rates", default="2e-4,1e-3")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--out")
    args = parser.parse_args()
    step, result = Path(__file__).with_name("train_step.py"), dict[str, dict[str, dict[str, float]]]()
    with tempfile.TemporaryDirectory() as temp:
        model = args.model or demo_model(Path(temp))
        words = [sys.executable, step, "--model", model, "--data", args.data, "--rows", args.rows]
        for rate in args.rates.split(","):
            for name, (tool, dtype) in HOW.items():
                one = measured.child([str(word) for word in (*words, "--dtype", dtype, "--rate", rate, "--run", tool)])
                result.setdefault(name, {})[rate] = {what: one[what] for what in TOLD}
                print(f"{name} from {rate}: {one['mean_loss']:.3f} ({one['sixth_loss']:.2f})", flush=True)
                if args.out:
                    measured.write(args.out, result)


if __name__ == "__main__":
    main()
