"""Measure training on two processes against one, compare bytes sent with the plan, and simulate weak scaling.

python benchmarks/scale.py links               seconds of gloo's all-reduce by size, the source of the plan's constants
python benchmarks/scale.py pair --rounds 5     one process of two threads and two of one thread, in turn, on SmolLM2
python benchmarks/scale.py memory              total memory of the processes (Linux)
python benchmarks/scale.py simulate            the tables of docs/measured.md, computed from measured constants

The first three need an idle machine. --out FILE stores the result as JSON.
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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import measured

from strop import plan
from strop.distributed.assign import assign_balanced
from strop.planning.multi_device import (
    LOOPBACK,
    NETWORKS,
    NVLINK,
    Devices,
    Link,
    all_reduce_seconds,
    flags_seconds,
    gradient_bytes,
    ring_seconds,
)

SIZES = [4, 4096, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26]  # bytes
COUNTS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
SMOLLM2_TOKENS_PER_S = 778.0  # measured, 1 row of 1,024 tokens at a time on two cores (docs/plan.md, "Time")
ASKED = {
    "train.max_steps": 6, "train.batch_size": 8, "data.max_length": 512, "model.dtype": "bf16", "train.micro_batch": 4,
    "train.gradient_checkpointing": "off", "train.save_steps": 1000,
}  # fmt: skip


def measure_links(processes: int) -> list[dict[str, Any]]:
    """Return median seconds of an all-reduce over gloo by bytes, and the fitted bytes/s and seconds per hop (see
    `fit_link`).
    """
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = measured.child([*words, __file__, "worker"], {"OMP_NUM_THREADS": "1"})
    return [{"processes": processes, **one} for one in result]


def worker() -> None:
    """Run one rank of `links`."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    results = []
    for size in SIZES:
        buffer = torch.zeros(size // 4)
        times = []
        for _ in range(30 if size < 1 << 22 else 10):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(buffer)
            times.append(time.perf_counter() - started)
        results.append({"bytes": size, "seconds": statistics.median(times)})
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.destroy_process_group()


def fit_link(points: list[dict[str, Any]]) -> dict[str, float]:
    """Fit hop_s to the smallest sum and bytes_per_s to the largest: a ring of n has 2 (n - 1) steps of 1/n of the bytes
    each.
    """
    steps = 2 * (points[0]["processes"] - 1)
    hop = points[0]["seconds"] / steps
    last = points[-1]
    sent = steps / last["processes"] * last["bytes"]
    return {"hop_s": hop, "bytes_per_s": sent / (last["seconds"] - steps * hop)}


def rows_file(folder: Path) -> Path:
    """Write rows of about 500 tokens, joined from the demo's rows."""
    from importlib import resources

    lines = (resources.files("strop.demo") / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.dumps(json.loads(line), ensure_ascii=False) for line in lines]
    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for number in range(64):
            text = " ".join(texts[(number * 7 + at) % len(texts)] for at in range(40))[:1400]
            out.write(json.dumps({"prompt": f"{number}", "completion": text}) + "\n")
    return file


def words_of(folder: Path, name: str, processes: int, *more: str) -> list[str]:
    """Return the command of a short run on SmolLM2."""
    words = [sys.executable, "-m", "strop.cli", "train", "--json", "--model", "demo", "--data", str(rows_file(folder))]
    words += ["--device", "cpu", "--devices", str(processes), "--out", str(folder / name)]
    return [*words, *(word for field, value in ASKED.items() for word in (f"--{field}", str(value))), *more]


def run(folder: Path, name: str, processes: int, threads: int) -> dict[str, Any]:
    """Run it and return its report.json."""
    done = subprocess.run(
        words_of(folder, name, processes), capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    report: dict[str, Any] = json.loads((folder / name / "report.json").read_text(encoding="utf-8"))
    return report


def compare_pair(rounds: int) -> dict[str, Any]:
    """Compare two processes of one thread with one process of two threads, and the bytes sent with the plan."""
    result: dict[str, list[float]] = {"one": [], "two": [], "communication_s": [], "waiting_s": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(-1, rounds):  # the first of each compiles and is not counted
            one, two = run(folder, f"one-{number}", 1, 2), run(folder, f"two-{number}", 2, 1)
            if number < 0:
                continue
            result["one"].append(one["tokens_per_s"])
            result["two"].append(two["tokens_per_s"])
            for part in ("communication_s", "waiting_s"):
                result[part].append(two["devices"][part] / two["steps"])
    expected = plan(model="demo", devices=2, **{**ASKED, "model.device": "cpu"}).multi_device
    ratios = [two / one for one, two in zip(result["one"], result["two"], strict=True)]
    return {
        **result, "ratio": statistics.median(ratios), "ratios": ratios,
        "planned_communication_s": expected.link_times[0].seconds, "planned_sent_bytes": expected.sent_bytes,
    }  # fmt: skip


def memory() -> dict[str, Any]:
    """Measure runs with replicated and sharded bases: peak memory of all processes together, with shared pages counted
    once (proportional set size), and of rank 0 beyond that before loading, next to the plan.
    """
    import psutil

    cases = {
        "1 process": (1, ()),
        "2 processes, replicated": (2, ("--model.placement", "replicated")),
        "2 processes, sharded": (2, ("--model.placement", "sharded")),
        "2 processes, replicated, nf4": (2, ("--model.placement", "replicated", "--model.quantization", "nf4")),
        "2 processes, sharded, nf4": (2, ("--model.placement", "sharded", "--model.quantization", "nf4")),
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, (processes, more) in cases.items():
            out, most = f"run-{len(results)}", 0
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            with subprocess.Popen(
                words_of(folder, out, processes, *more), cwd=folder, env=env, stdout=-3, stderr=-3
            ) as process:
                while process.poll() is None:
                    most = max(most, sum(_pss(one) for one in _family(psutil.Process(process.pid))))
                    time.sleep(1)
            report = json.loads((folder / out / "report.json").read_text(encoding="utf-8"))
            peaks = {name: report["memory"][name] for name in ("predicted_peak_bytes", "measured_peak_bytes")}
            results[case] = {"pss_bytes": most, **peaks, **report["devices"].get("base", {})}
    return results


def _family(process: Any) -> Iterator[Any]:
    import psutil

    try:
        yield from [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return


def _pss(process: Any) -> int:
    import psutil

    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def simulate() -> str:
    """Compute weak scaling: the same number of rows per device on more devices. Prints two Markdown tables."""
    points = [
        _table(
            "SmolLM2-135M, two-core CPU machines with one process each, 4 rows of 1,024 tokens a device, 10 Gb/s",
            {"model": "demo", "model.device": "cpu", "memory": 16 << 30, "train.micro_batch": 1},
            replace(NETWORKS[0], hop_s=LOOPBACK.hop_s, start_s=0.0, bytes_per_s=min(1.25e9, LOOPBACK.bytes_per_s)),
            each=1,
            measured_tokens_per_s=SMOLLM2_TOKENS_PER_S,
        ),
        _table(
            "Llama-3.1-8B, r 16, 8 x H100 a node, 4 rows of 2,048 tokens a device, 400 Gb/s",
            {"model": str(_llama_8b()), "gpu": "H100 SXM", "data.max_length": 2048, "train.micro_batch": 1},
            NETWORKS[-1],
            each=8,
        ),
    ]
    return "\n".join(points)


def _llama_8b() -> Path:
    from strop.planning.tables import KNOWN

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(KNOWN["Llama-3.1-8B"]), encoding="utf-8")
    return folder / "config.json"


def _table(
    title: str, points: dict[str, Any], network: Link, *, each: int, measured_tokens_per_s: float | None = None
) -> str:
    """Return a table with terms in ms. dealing: time by which the busiest device exceeds the mean, for rows of
    different lengths dealt out by tokens. Efficiency: tokens/s per device relative to one device. NVLink is assumed
    within a node. measured_tokens_per_s: of one device, instead of the plan's.
    """
    single = plan(**points, **{"train.batch_size": 4})
    setting, tokens = single.workload, 4 * single.resolved.recipe.data.max_length
    compute = tokens / (measured_tokens_per_s or single.tokens_per_s)
    lines = [
        f"Simulated: {title}.", "",
        "| devices | computing | dealing | gradients: bytes | gradients: hops | flags | efficiency | tokens/s in all |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    first, over = 0.0, dict[str, int]()
    for count in COUNTS:
        devices = Devices(min(count, each), max(1, count // each))
        link = network if devices.nodes > 1 or each == 1 else NVLINK
        dealing = (_imbalance(count) - 1) * compute
        size = gradient_bytes(setting, devices)
        sent = all_reduce_seconds(size, devices, link, setting.compute.device) if count > 1 else 0.0
        hops = all_reduce_seconds(4, devices, link, setting.compute.device) if count > 1 else 0.0
        flags = flags_seconds(devices, link) if count > 1 else 0.0
        step = compute + dealing + sent + flags
        first = first or step
        terms = {"dealing": dealing, "gradients' bytes": sent - hops, "gradients' hops": hops, "flags": flags}
        for term, seconds in terms.items():
            if seconds > 0.05 * compute:
                over.setdefault(term, count)
        cells = [compute, dealing, sent - hops, hops, flags]
        lines.append(
            f"| {count:,} | " + " | ".join(f"{1e3 * cell:,.1f}" for cell in cells)
            + f" | {first / step:.1%} | {count * tokens / step:,.0f} |"
        )  # fmt: skip
    limits = [f"{term} from {count:,} devices on" for term, count in over.items()]
    lines += ["", "More than 5 % of the computing: " + ("; ".join(limits) if limits else "no term") + ".", ""]
    return "\n".join(lines)


def _imbalance(count: int) -> float:
    """Return the largest share over the mean for 4 rows per device, whose lengths are spread evenly between a quarter
    of the longest and the longest (strop.distributed.assign).
    """
    rows = 4 * count
    lengths = [0.25 + 0.75 * ((number * 0.6180339887) % 1) for number in range(rows)]
    shares = [sum(lengths[row] for row in share) for share in assign_balanced(lengths, count)]
    return max(shares) / (sum(shares) / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["links", "pair", "memory", "simulate", "worker"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.what == "worker":
        worker()
        return
    if args.what == "simulate":
        print(simulate())
        return
    if args.what == "links":
        sums = measure_links(args.processes)
        result: Any = {"sums": sums, "fitted": fit_link(sums)}
        result["planned_s"] = [ring_seconds(one["bytes"], Devices(args.processes), LOOPBACK) for one in sums]
    else:
        result = compare_pair(args.rounds) if args.what == "pair" else memory()
    print(json.dumps(result, indent=1))
    if args.out:
        measured.write(args.out, result)


if __name__ == "__main__":
    main()
