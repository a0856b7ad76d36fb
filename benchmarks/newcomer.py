"""From a clone to a tuned model's answers, as the README says: `make demo` with nothing installed and nothing cached.

    python benchmarks/newcomer.py [--out benchmarks/results/newcomer_DATE.json] [--python python3.11]

Seconds in all and by part, the longest time without a sign of life (a byte on the terminal, which is a pseudo one), and
what the run's report says: score with its interval, seconds of training, memory predicted and measured.
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


def watched(command: list[str], folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Runs a command on a terminal of its own. Raises RuntimeError with its last words where it fails."""
    here, there = pty.openpty()
    began = last = time.monotonic()
    silent, silent_after, words = 0.0, "", b""
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, **env}, stdin=there, stdout=there, stderr=there)
    os.close(there)
    while True:
        try:
            part = os.read(here, 1 << 16)
        except OSError:  # its last writer has gone
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
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        clone, env = Path(name) / "strop", {"STROP_CACHE": f"{name}/cache", "TERM": "xterm"}
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        parts = {
            "install": watched(["make", f"PYTHON={given.python}", ".venv/installed"], clone, env),
            "demo": watched(["make", f"PYTHON={given.python}", "demo"], clone, env),
        }
        report = json.loads((clone / "runs" / "demo-1" / "report.json").read_text(encoding="utf-8"))
    memory = {key: report["memory"][key] for key in ("predicted_peak_bytes", "measured_peak_bytes")}
    found = {
        "seconds": sum(part["seconds"] for part in parts.values()),
        "parts": parts,
        "training_s": report["seconds"],
        "tokens_per_s": report["tokens_per_s"],
        "memory": memory,
        "evaluation": {name: value for name, value in report["evaluation"].items() if name != "changed"},
        "intervals": report["intervals"],
    }
    print(json.dumps(found, indent=1))
    if given.out:
        write(given.out, found)


if __name__ == "__main__":
    main()
