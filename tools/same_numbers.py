"""Check that a change keeps the losses and adapters of 20 steps on SmolLM2 in six configurations bit-identical.

    .venv/bin/python tools/same_numbers.py --out before.json       # on the commit before
    .venv/bin/python tools/same_numbers.py --against before.json   # on the commit after; exits with 1 if anything
differs

Results are valid for one machine, because its instructions and number of threads decide the last bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from strop.demo import data_files

STEPS = 20
NEW = ["--lora.new_tokens", "<|extra|>"]  # rows of the embedding are trained: the plain step
WAYS: dict[str, list[str]] = {
    "bf16 fast": ["--model.dtype", "bf16"],
    "bf16 plain": ["--model.dtype", "bf16", *NEW],
    "nf4 fast": ["--model.dtype", "bf16", "--model.quantization", "nf4"],
    "nf4 plain": ["--model.dtype", "bf16", "--model.quantization", "nf4", *NEW],
    "fp32 fast": ["--model.dtype", "fp32"],
    "bf16 dropout": ["--model.dtype", "bf16", "--lora.dropout", "0.05"],
}


def numbers(options: list[str], folder: Path) -> dict[str, Any]:
    """Return the losses of all steps, and the SHA-256 of the adapter's weights."""
    command = [sys.executable, "-m", "strop.cli", "train", "--model", "demo", "--data", str(data_files()[0])]
    command += ["--out", str(folder), "--train.max_steps", str(STEPS), "--train.log_steps", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return {
        "losses": [event["loss"] for event in events if event["event"] == "step"],
        "adapter": hashlib.sha256(weights).hexdigest(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers here")
    parser.add_argument("--against", type=Path, help="compare with the numbers of this file")
    parser.add_argument("--only", default="", help="ways whose name holds this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asked_for = {name: way for name, way in WAYS.items() if options.only in name}
        result = {name: numbers(way, Path(folder) / name.replace(" ", "-")) for name, way in asked_for.items()}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    before = json.loads(options.against.read_text(encoding="utf-8")) if options.against else {}
    wrong = 0
    for name, now in result.items():
        same = before.get(name) == now
        wrong += not same
        verdict = "" if not before else "   equal to the bit" if same else f"   DIFFERS: {before.get(name)}"
        print(
            f"{name:<11} loss {now['losses'][0]:.6f} to {now['losses'][-1]:.6f}, adapter {now['adapter'][:12]}{verdict}"
        )
    return 1 if before and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
