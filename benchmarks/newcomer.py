"""Measure the README's way from a clone to a tuned model's answers: `make demo` with empty caches and no packages.

    python benchmarks/newcomer.py [--out benchmarks/results/newcomer_DATE.json] [--python python3.11]

Prints the seconds in total and by part, the longest time without output on a pseudo-terminal, and from the run's
report: score with its interval, seconds of training, and predicted and measured memory.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import write

ROOT = Path(__file__).parents[1]


def run_in_terminal(command: list[str], folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Run a command in a pseudo-terminal. Raises RuntimeError with its last output if it fails."""
    here, there = pty.openpty()
    began = last = time.monotonic()
    silent, silent_after, words = 0.0, "", b""
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, **env}, stdin=there, stdout=there, stderr=there)
    os.close(there)
    while True:
        try:
            part = os.read(here, 1 << 16)
        except OSError:  # all writers have closed it
            part = b""
        now = time.monotonic()
        if now - last > silent:
            silent, silent_after = now - last, words[-300:].decode(errors="replace")
        last = now
        if not part:
            break
        words = (words + part)[-4000:]
    os.close(here)
    if process.wait():
        raise RuntimeError(f"{' '.join(command)}:\n{words.decode(errors='replace')}")
    return {"seconds": time.monotonic() - began, "longest_silence_s": silent, "silent_after": silent_after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        clone, env = Path(name) / "strop", {"STROP_CACHE": f"{name}/cache", "TERM": "xterm"}
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        parts = {
            "install": run_in_terminal(["make", f"PYTHON={args.python}", ".venv/installed"], clone, env),
            "demo": run_in_terminal(["make", f"PYTHON={args.python}", "demo"], clone, env),
        }
        report = json.loads((clone / "runs" / "demo-1" / "report.json").read_text(encoding="utf-8"))
    memory = {key: report["memory"][key] for key in ("predicted_peak_bytes", "measured_peak_bytes")}
    result = {
        "seconds": sum(part["seconds"] for part in parts.values()),
        "parts": parts,
        "training_s": report["seconds"],
        "tokens_per_s": report["tokens_per_s"],
        "memory": memory,
        "evaluation": {name: value for name, value in report["evaluation"].items() if name != "changed"},
        "intervals": report["intervals"],
    }
    print(json.dumps(result, indent=1))
    if args.out:
        write(args.out, result)


if __name__ == "__main__":
    main()
