"""Measure tokens/s of whole commands of strop and another tool, over one epoch minus one step.

    python benchmarks/whole_commands.py MODEL DATA.jsonl --bench FOLDER --baselines FOLDER [--peer "unsloth, grouped"]
        [--rounds 5] [--options "lora.dropout=0.05"] [--isa avx2] [--out RESULT.json]

MODEL: a folder. DATA: chat rows, the same as in FOLDER/data100 for the other tool (peers.py). Each command runs twice
per round, for an epoch and for one step. The time and tokens of the second (start, imports, loading, compiling) are
subtracted from the first. Prints the ratio of each round, their median, and its bootstrap interval over rounds. --isa:
limits both tools to these CPU instructions.
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
from typing import Any

import measured
import numpy as np
from peers import PEERS
from peers import run as peers_run

AS_PEERS = {  # the settings of their scripts
    "model.dtype": "bf16", "data.loss": "all", "data.max_length": 1024, "lora.r": 16, "lora.alpha": 32,
    "train.learning_rate": 2e-4, "train.batch_size": 4, "train.epochs": 1,
}  # fmt: skip
RESAMPLED = 10_000
HASWELL = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+avx,+f16c,+fma,+avx2,+bmi,+bmi2"
ISA = {  # for oneDNN, PyTorch, MKL and numba
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": HASWELL,
    },
    "avx2_vnni": {  # Intel's laptops from 2021 on
        "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": f"{HASWELL},+avxvnni",
    },
    "avx512_vnni": {  # Xeons and laptops of Ice Lake and Tiger Lake
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "ATEN_CPU_CAPABILITY": "avx512", "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "NUMBA_CPU_NAME": "icelake-server",
        "NUMBA_CPU_FEATURES": f"{HASWELL},+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd,+avx512vnni",
    },
}  # fmt: skip


def strop(options: argparse.Namespace, steps: int) -> tuple[int, float]:
    """Return the real tokens and the wall time of the whole command."""
    settings = {**AS_PEERS, **dict(word.split("=", 1) for word in options.options.split())}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "strop", "train", "--model", options.model, "--data", options.data]
        command += [*words, "--train.max_steps", str(steps), "--out", f"{folder}/run"]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        took = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        lines = (Path(folder) / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["tokens"] for event in map(json.loads, lines) if event["event"] == "step"][-1], took


def peer(options: argparse.Namespace, steps: int) -> tuple[int, float]:
    """Return the real tokens and the wall time of the other tool."""
    few = argparse.Namespace(**{**vars(options), "rows": 4 * steps, "batch": 4})
    result = peers_run(options.peer, few, 0)
    return round(result["tokens_per_s"] * result["seconds"]), result["wall_s"]


def rate(tool: Any, options: argparse.Namespace, steps: int) -> dict[str, float]:
    few, start = tool(options, 1)
    tokens, took = tool(options, steps)
    return {"tokens_per_s": (tokens - few) / (took - start), "start_s": start, "epoch_s": took}


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (RESAMPLED, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder")
    parser.add_argument("data", help="JSONL of chat rows")
    parser.add_argument("--bench", required=True, help="folder with one virtual environment a peer, and data100/")
    parser.add_argument("--baselines", required=True, help="folder with the peers' scripts")
    parser.add_argument("--peer", default="unsloth, grouped", choices=PEERS)
    parser.add_argument("--options", default="", help="more of strop's options, as name=value")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", choices=ISA, help="instructions that both tools may use at most")
    parser.add_argument("--out", help="write the result here as JSON")
    options = parser.parse_args()
    os.environ.update(ISA.get(options.isa, {}))
    steps = len(Path(options.data).read_text(encoding="utf-8").splitlines()) // 4
    for tool in (strop, peer):  # the first command fills the caches
        tool(options, 1)
    rounds = []
    for _ in range(options.rounds):
        result = {name: rate(tool, options, steps) for name, tool in (("strop", strop), (options.peer, peer))}
        ratio = result["strop"]["tokens_per_s"] / result[options.peer]["tokens_per_s"]
        rounds.append({**result, "ratio": ratio})
        print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    ratios = [one["ratio"] for one in rounds]
    result = {"ratio": statistics.median(ratios), "interval": interval(ratios), "rounds": rounds}
    print(json.dumps({name: result[name] for name in ("ratio", "interval")}))
    if options.out:
        packages = Path(options.bench, options.peer.partition(",")[0], "bin", "python")
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import measured, json"
        theirs = measured.child([str(packages), "-c", f"{code}; print(json.dumps(measured.versions()))"])
        measured.write(options.out, result, peer_versions=theirs)


if __name__ == "__main__":
    main()
