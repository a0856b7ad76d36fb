"""Several devices: two processes against one, what is sent against the plan, and weak scaling, simulated.

python benchmarks/scale.py links               seconds of gloo's sum by size; the plan's constants come from it
python benchmarks/scale.py pair --rounds 5     one process of two threads and two of one, in turn, on SmolLM2
python benchmarks/scale.py memory              what the processes hold in all (Linux)
python benchmarks/scale.py simulate            the tables of docs/scale.md: no run, arithmetic on measured constants

The first three need a machine that does nothing else. --out FILE keeps a result as JSON.
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
    flags_seconds,
    gradient_bytes,
    ring_seconds,
    sum_seconds,
)

SIZES = [4, 4096, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26]  # bytes
COUNTS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
SMOLLM2_TOKENS_PER_S = 778.0  # measured, 1 row of 1,024 tokens at a time on two cores (docs/plan.md, "Time")
ASKED = {
    "train.max_steps": 6, "train.batch_size": 8, "data.max_length": 512, "model.dtype": "bf16", "train.micro_batch": 4,
    "train.gradient_checkpointing": "off", "train.save_steps": 1000,
}  # fmt: skip


def links(processes: int) -> list[dict[str, Any]]:
    """Median seconds of a sum over gloo, by bytes; and bytes/s and seconds a hop that explain them (see `fitted`)."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    found = measured.child([*words, __file__, "worker"], {"OMP_NUM_THREADS": "1"})
    return [{"processes": processes, **one} for one in found]


def worker() -> None:
    """One rank of `links`."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = []
    for size in SIZES:
        buffer = torch.zeros(size // 4)
        times = []
        for _ in range(30 if size < 1 << 22 else 10):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(buffer)
            times.append(time.perf_counter() - started)
        found.append({"bytes": size, "seconds": statistics.median(times)})
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def fitted(found: list[dict[str, Any]]) -> dict[str, float]:
    """hop_s by the smallest sum, bytes_per_s by the largest: a ring of n has 2 (n - 1) steps, each an n-th of it."""
    steps = 2 * (found[0]["processes"] - 1)
    hop = found[0]["seconds"] / steps
    last = found[-1]
    sent = steps / last["processes"] * last["bytes"]
    return {"hop_s": hop, "bytes_per_s": sent / (last["seconds"] - steps * hop)}


def rows_file(folder: Path) -> Path:
    """Rows of about 500 tokens: the demo's own, laid together."""
    from importlib import resources

    lines = (resources.files("strop.demo") / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.dumps(json.loads(line), ensure_ascii=False) for line in lines]
    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for number in range(64):
            said = " ".join(texts[(number * 7 + at) % len(texts)] for at in range(40))[:1400]
            out.write(json.dumps({"prompt": f"{number}", "completion": said}) + "\n")
    return file


def words_of(folder: Path, name: str, processes: int, *more: str) -> list[str]:
    """The command of a short run on SmolLM2."""
    words = [sys.executable, "-m", "strop.cli", "train", "--json", "--model", "demo", "--data", str(rows_file(folder))]
    words += ["--device", "cpu", "--devices", str(processes), "--out", str(folder / name)]
    return [*words, *(word for field, value in ASKED.items() for word in (f"--{field}", str(value))), *more]


def run(folder: Path, name: str, processes: int, threads: int) -> dict[str, Any]:
    """Its report.json."""
    done = subprocess.run(
        words_of(folder, name, processes), capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    report: dict[str, Any] = json.loads((folder / name / "report.json").read_text(encoding="utf-8"))
    return report


def pair(rounds: int) -> dict[str, Any]:
    """Two processes of one thread against one process of two threads, in turn; and what is sent against the plan."""
    found: dict[str, list[float]] = {"one": [], "two": [], "communication_s": [], "waiting_s": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(-1, rounds):  # the first of each compiles, and does not count
            one, two = run(folder, f"one-{number}", 1, 2), run(folder, f"two-{number}", 2, 1)
            if number < 0:
                continue
            found["one"].append(one["tokens_per_s"])
            found["two"].append(two["tokens_per_s"])
            for part in ("communication_s", "waiting_s"):
                found[part].append(two["devices"][part] / two["steps"])
    expected = plan(model="demo", devices=2, **{**ASKED, "model.device": "cpu"}).multi_device
    ratios = [two / one for one, two in zip(found["one"], found["two"], strict=True)]
    return {
        **found, "ratio": statistics.median(ratios), "ratios": ratios,
        "planned_communication_s": expected.link_times[0].seconds, "planned_sent_bytes": expected.sent_bytes,
    }  # fmt: skip


def memory() -> dict[str, Any]:
    """Of runs with whole bases and with shares: greatest memory of all processes together, shared pages counted once
    (proportional set size); and of rank 0 above what it had before the model loads, beside what the plan says."""
    import psutil

    cases = {
        "1 process": (1, ()),
        "2 processes, replicated": (2, ("--model.placement", "replicated")),
        "2 processes, sharded": (2, ("--model.placement", "sharded")),
        "2 processes, replicated, nf4": (2, ("--model.placement", "replicated", "--model.quantization", "nf4")),
        "2 processes, sharded, nf4": (2, ("--model.placement", "sharded", "--model.quantization", "nf4")),
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, (processes, more) in cases.items():
            out, most = f"run-{len(found)}", 0
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            with subprocess.Popen(
                words_of(folder, out, processes, *more), cwd=folder, env=env, stdout=-3, stderr=-3
            ) as process:
                while process.poll() is None:
                    most = max(most, sum(_pss(one) for one in _family(psutil.Process(process.pid))))
                    time.sleep(1)
            report = json.loads((folder / out / "report.json").read_text(encoding="utf-8"))
            kept = {name: report["memory"][name] for name in ("predicted_peak_bytes", "measured_peak_bytes")}
            found[case] = {"pss_bytes": most, **kept, **report["devices"].get("base", {})}
    return found


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
    """Weak scaling on paper: as many rows for each device, more devices. Two tables in Markdown."""
    told = [
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
    return "\n".join(told)


def _llama_8b() -> Path:
    from strop.planning.tables import KNOWN

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(KNOWN["Llama-3.1-8B"]), encoding="utf-8")
    return folder / "config.json"


def _table(
    title: str, asked: dict[str, Any], network: Link, *, each: int, measured_tokens_per_s: float | None = None
) -> str:
    """Terms in ms. dealing: how much longer the busiest device computes than the mean, of ragged rows dealt out by
    tokens. Efficiency: tokens/s a device against one device alone. Inside a node of cards: NVLink.
    measured_tokens_per_s: of one device, in place of the plan's."""
    single = plan(**asked, **{"train.batch_size": 4})
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
        sent = sum_seconds(size, devices, link, setting.compute.device) if count > 1 else 0.0
        hops = sum_seconds(4, devices, link, setting.compute.device) if count > 1 else 0.0
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
    said = [f"{term} from {count:,} devices on" for term, count in over.items()]
    lines += ["", "More than 5 % of the computing: " + ("; ".join(said) if said else "no term") + ".", ""]
    return "\n".join(lines)


def _imbalance(count: int) -> float:
    """Greatest share over the mean, of 4 rows a device whose lengths are spread evenly from a quarter to all of the
    longest (strop.distributed.assign)."""
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
    given = parser.parse_args()
    if given.what == "worker":
        worker()
        return
    if given.what == "simulate":
        print(simulate())
        return
    if given.what == "links":
        sums = links(given.processes)
        found: Any = {"sums": sums, "fitted": fitted(sums)}
        found["planned_s"] = [ring_seconds(one["bytes"], Devices(given.processes), LOOPBACK) for one in sums]
    else:
        found = pair(given.rounds) if given.what == "pair" else memory()
    print(json.dumps(found, indent=1))
    if given.out:
        measured.write(given.out, found)


if __name__ == "__main__":
    main()
