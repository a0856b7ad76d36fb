"""Measure the seconds from the command to the first step, by part, for the first run on a machine and for later ones.

    python benchmarks/start.py MODEL DATA.jsonl [--rounds 5] [--out RESULT.json]

The first run starts with empty caches: no compiled kernels, no copies of weights and no measurements of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measured

UNTIL = {"libraries": "machine", "model and data": "start", "first step": "step"}  # each part ends with this event


def start(options: argparse.Namespace, caches: str) -> dict[str, float]:
    """Return the seconds of each part, and of the start and end of the step, from the command on."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "strop", "train", "--model", options.model, "--data", options.data]
        command += ["--train.max_steps", "1", "--out", str(out)]
        about = {**os.environ, "NUMBA_CACHE_DIR": f"{caches}/numba", "STROP_CACHE": f"{caches}/strop"}
        begun = time.time()
        subprocess.run(command, env=about, capture_output=True, check=True)
        events = [json.loads(line) for line in (out / "events.jsonl").read_text("utf-8").splitlines()]
    ends = {name: next(event["time"] for event in events if event["event"] == last) for name, last in UNTIL.items()}
    times = [begun, *ends.values()]
    parts = {name: after - before for name, before, after in zip(ends, times[:-1], times[1:], strict=True)}
    return {**parts, "begins": times[-2] - begun, "ends": times[-1] - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as caches:
        first = start(options, caches)
        rounds = [start(options, caches) for _ in range(options.rounds)]
    later = {name: statistics.median(one[name] for one in rounds) for name in first}
    result = {"first": first, "later": later, "rounds": rounds}
    print(json.dumps(result, indent=1))
    if options.out:
        measured.write(options.out, result)


if __name__ == "__main__":
    main()
