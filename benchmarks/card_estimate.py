"""Estimate tokens/s of a training step on several GPUs from operations counted on a simulated one; nothing is measured.

    python benchmarks/card_estimate.py [--only TEXT] [--out benchmarks/results/card_estimate_DATE.json]

Each case's step (forward, backward, clipping, AdamW; one micro-batch, r 16 on all linear layers, loss on every token)
runs at full size on the simulated GPU of tests/simulated_gpu, which counts the FLOPs, bytes and launches of each
operation. An operation takes the larger of its FLOPs at the GPU's usable rate and its bytes at the GPU's bandwidth. The
step takes the larger of the sum over its operations and the host's time to launch them. CARDS holds the assumed rates
and their sources. Takes a minute and needs a C++ compiler and Triton, but no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measured

from strop.planning.machines import find_spec
from strop.planning.time import LAUNCH_S
from strop.runs.folder import cache_folder

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("products", "attention", "head", "adapters", "element-wise", "dequantization", "optimizer")


@dataclass(frozen=True)
class Usable:
    """Usable FLOP/s, and bytes/s of the memory, of a GPU. The memory's bandwidth is that of the data sheet."""

    card: str
    products: float
    attention: float
    why: str

    @property
    def bandwidth(self) -> float:
        return find_spec(self.card).bandwidth_gbs * 1e9


def usable(card: str, why: str, attention: float = 1.0) -> Usable:
    """Return the rates with which `strop plan` computes. attention: its speed relative to flash attention 2."""
    rate = find_spec(card).rate_of("bf16")
    return Usable(card, rate.flops, attention * rate.attention_flops, why)


CARDS = {
    "H100": usable(
        "H100 SXM",
        "600 of 989 TFLOP/s for large products; flash attention 2 reaches 35 % of the data sheet (arXiv:2407.08608)",
    ),
    "H100, FA3": usable(
        "H100 SXM",
        "with flash attention 3 installed: 1.5 times as fast as 2, its authors' least figure (arXiv:2407.08608)", 1.5,
    ),
    "RTX 4090": usable(
        "RTX 4090",
        "140 of 165 TFLOP/s for large products; flash attention 2 reaches 50 to 73 % (arXiv:2307.08691): 60 % here",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An estimated step. goal: tokens/s to reach. others: published results for similar cases."""

    card: str
    shape: str
    scheme: str
    tokens: int
    documents: int = 1
    goal: int | None = None
    others: str = ""

    @property
    def name(self) -> str:
        rows = f"{self.documents} x {self.tokens // self.documents:,}" if self.documents > 1 else f"{self.tokens:,}"
        return f"{self.shape.upper()} {'bf16' if self.scheme == 'none' else self.scheme}, {rows} tokens, {self.card}"


CASES = [
    Case("H100", "8b", "none", 4096, 1, 16_000, "NeMo AutoModel 12,500"),
    Case("H100, FA3", "8b", "none", 4096, 1, 16_000),
    Case("H100", "8b", "none", 8192, 2),
    Case("RTX 4090", "8b", "nf4", 2048, 1, 4_000, "Unsloth about 2,600, torchtune 2,400"),
    Case("RTX 4090", "8b", "nf4", 4096, 2, 4_000),
    Case("H100", "1b", "none", 8192, 1, 90_000),
    Case("H100", "1b", "none", 8192, 4, 90_000),
    Case("H100, FA3", "1b", "none", 8192, 1, 90_000),
    Case("H100, FA3", "1b", "none", 8192, 4, 90_000),
    Case("H100", "1b", "none", 2048),
    Case("RTX 4090", "1b", "none", 8192),
]


def count_operations(cases: Sequence[Case]) -> list[list[dict[str, Any]]]:
    """Return the operations of each case. Raises RuntimeError where a step does not run."""
    sys.path.append(str(ROOT))
    from tests.simulated_gpu.build import library

    simulated_gpu = library(cache_folder() / "card")
    steps = {(case.shape, case.scheme, case.tokens, case.documents): case for case in cases}
    fields = ("shape", "scheme", "tokens", "documents")
    scenarios = [{"scenario": "moved", **dict(zip(fields, key, strict=True))} for key in steps]
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable,
            "-m",
            "tests.simulated_gpu.simulate",
            str(simulated_gpu),
            folder,
            json.dumps(scenarios),
        ]
        result = measured.child(words, {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "STROP_CACHE": folder})
    for one in result:
        if isinstance(one, dict):
            raise RuntimeError(one["trace"])
    of = dict(zip(steps, result, strict=True))
    return [of[case.shape, case.scheme, case.tokens, case.documents] for case in cases]


def estimate(case: Case, operations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return milliseconds by part and of the host, the largest part, and what the goal would require."""
    rates = CARDS[case.card]
    parts: dict[str, dict[str, Any]] = {
        name: {"ms": 0.0, "tflop": 0.0, "gb": 0.0, "launches": 0, "operations_ms": Counter()} for name in NAMES
    }
    for one in operations:
        rate = rates.attention if one["part"] == "attention" else rates.products
        seconds = max(one["flops"] / rate, one["bytes"] / rates.bandwidth)
        part, number = parts[one["part"]], one["launches"]
        part["ms"] += 1e3 * seconds * number
        part["operations_ms"][one["operation"]] += 1e3 * seconds * number
        part["tflop"] += one["flops"] * number / 1e12
        part["gb"] += one["bytes"] * number / 1e9
        part["launches"] += number
    for part in parts.values():
        longest = part["operations_ms"].most_common(4)
        part["operations_ms"] = {name: round(ms, 2) for name, ms in longest if ms >= 0.01}
    device = sum(part["ms"] for part in parts.values())
    launches = sum(part["launches"] for part in parts.values())
    host = 1e3 * LAUNCH_S * launches
    step = max(device, host)
    estimate_ = {
        "case": case.name, **asdict(case), "tokens_per_s": round(1e3 * case.tokens / step), "step_ms": step,
        "device_ms": device, "host_ms": host, "bound": "host" if host > device else "device",
        "launches": launches, "largest": max(NAMES, key=lambda name: parts[name]["ms"]), "parts": parts,
    }  # fmt: skip
    if case.goal is not None:
        estimate_["over_goal_ms"] = step - 1e3 * case.tokens / case.goal
    return estimate_


def verdict(result: dict[str, Any]) -> str:
    """Describe whether the goal is reached and, if not, what would have to become faster."""
    if result["goal"] is None:
        return ""
    over, goal = result["over_goal_ms"], f"{result['goal']:,}"
    if over <= 0:
        return f"{result['case']}: {result['tokens_per_s']:,} tokens/s, the goal of {goal} is reached"
    if result["bound"] == "host":
        return f"{result['case']}: the host must launch faster by {over:.0f} ms for {goal} tokens/s"
    parts = {name: part["ms"] for name, part in result["parts"].items()}
    tokens, flop = result["tokens"], result["parts"]["products"]["tflop"]
    enough = [f"{name} ({ms:.0f} ms)" for name, ms in parts.items() if name != "products" and ms >= over]
    alone = f"it would be reached without {' or without '.join(enough)}" if enough else "no other part is as long"
    left = 1e3 * tokens / result["goal"] - (result["device_ms"] - parts["products"])
    rate = f"{1e3 * flop / left:,.0f} TFLOP/s" if left > 0 else "no time at all"
    return (
        f"{result['case']}: {result['tokens_per_s']:,} tokens/s, {over:.0f} ms too long for {goal}. The products alone "
        f"would give {1e3 * tokens / parts['products']:,.0f}; {alone}. "
        f"With all other parts as they are, products would need {rate}"
    )


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| estimate, ms a step | " + " | ".join(NAMES) + " | launches | host | tokens/s | goal | others |",
        "|---|" + "---:|" * (len(NAMES) + 4) + "---|",
    ]
    for one in results:
        parts = [
            f"**{one['parts'][name]['ms']:.1f}**" if name == one["largest"] else f"{one['parts'][name]['ms']:.1f}"
            for name in NAMES
        ]
        goal = f"{one['goal']:,}" if one["goal"] else ""
        last = [f"{one['launches']:,}", f"{one['host_ms']:.1f}", f"{one['tokens_per_s']:,}", goal, one["others"]]
        lines.append("| " + " | ".join([one["case"], *parts, *last]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases with this text in their names")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case.name]
    results = [estimate(case, operations) for case, operations in zip(cases, count_operations(cases), strict=True)]
    print("Estimates from counted FLOPs, bytes and launches. No card has run.\n")
    print(table(results), "\n")
    for line in filter(None, map(verdict, results)):
        print(line)
    if options.out:
        gpus = {name: {**asdict(rates), "bandwidth": rates.bandwidth} for name, rates in CARDS.items()}
        measured.write(options.out, results, kind="estimate: no card has run", cards=gpus, launch_s=LAUNCH_S)


if __name__ == "__main__":
    main()
