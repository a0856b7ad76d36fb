"""Run other tools on the same rows for train_step.py: the command of each, its environment, and how its output is read.

The scripts are in a folder of baselines (--baselines: unsloth_sft.py, trl_sft.py, litgpt.sh, llamafactory.sh,
torchtune.sh), which read BENCH (one virtual environment per tool, and data100/) and BASE (the model's folder).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """Another tool. command: arguments with {bench}, {base}, {baselines}. read: parses (tokens, seconds, mean loss)."""

    command: tuple[str, ...]
    read: Callable[[str, int], tuple[float, float, float]]
    log: str = ""  # the file under BENCH with the output, if the script prints only the end


def _result_line(output: str, tokens: int) -> tuple[float, float, float]:
    line = re.findall(r"RESULT .*", output)[-1]
    values = dict(re.findall(r"(\w+)=([\d.]+)", line))
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", output)]
    return float(values["real"]), float(values["sum_step_s"]), _mean(losses)


def _json_line(output: str, tokens: int) -> tuple[float, float, float]:
    values = json.loads(output.strip().splitlines()[-1])
    return values["tokens"], values["seconds"], values["loss"]


def _litgpt(output: str, tokens: int) -> tuple[float, float, float]:
    times = [float(ms) / 1000 for ms in re.findall(r"iter time: ([\d.]+) ms", output)]
    return tokens, sum(times), _mean([float(loss) for loss in re.findall(r"loss train: ([\d.]+)", output)])


def _llamafactory(output: str, tokens: int) -> tuple[float, float, float]:
    seconds = float(re.findall(r"'train_runtime': '([\d.]+)'", output)[-1])
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", output)]
    return tokens, seconds, _mean(losses)


def _torchtune(output: str, tokens: int) -> tuple[float, float, float]:
    """Read the last three lines of the log: loss, and answer tokens/s (it trains on answers only)."""
    lines = [line for line in output.splitlines() if "tokens_per_second_per_gpu" in line]
    rates = [float(re.findall(r"tokens_per_second_per_gpu:([\d.]+)", line)[0]) for line in lines]
    losses = [float(re.findall(r"loss:([\d.]+)", line)[0]) for line in lines]
    rate = statistics.median(rates)
    return rate, 1.0, _mean(losses)


def _mean(losses: list[float]) -> float:
    return statistics.mean(losses) if losses else float("nan")


PEERS = {
    "unsloth, grouped": Peer(
        ("{bench}/unsloth/bin/python", "{baselines}/unsloth_sft.py", "bf16", "grouped"), _result_line
    ),
    "unsloth, fp32, grouped": Peer(
        ("{bench}/unsloth/bin/python", "{baselines}/unsloth_sft.py", "fp32", "grouped"), _result_line
    ),
    "unsloth": Peer(("{bench}/unsloth/bin/python", "{baselines}/unsloth_sft.py", "bf16"), _result_line),
    "trl, tuned": Peer(("{bench}/trl/bin/python", "{baselines}/trl_sft.py", "bf16", "grouped"), _result_line),
    "trl, defaults": Peer(
        (
            "{bench}/trl/bin/python",
            f"{HERE}/trl_defaults.py",
            "{base}",
            "{bench}/data100/train.jsonl",
            "{bench}/out",
        ),
        _json_line,
    ),
    "unsloth, 4 bit": Peer(
        ("{bench}/unsloth/bin/python", "{baselines}/unsloth_sft.py", "bf16", "grouped", "load4bit"), _result_line
    ),
    "trl, 4 bit": Peer(
        (
            "{bench}/trl/bin/python",
            f"{HERE}/trl_defaults.py",
            "{base}",
            "{bench}/data100/train.jsonl",
            "{bench}/out",
            "4bit",
        ),
        _json_line,
    ),
    "unsloth, rows": Peer(
        ("{bench}/unsloth/bin/python", f"{HERE}/unsloth_rows.py", "{base}", "{data}", "{bench}/out", "{batch}"),
        _json_line,
    ),
    "unsloth, packing": Peer(
        ("{bench}/unsloth/bin/python", f"{HERE}/unsloth_rows.py", "{base}", "{data}", "{bench}/out", "1", "packing"),
        _json_line,
    ),
    "torchtune": Peer(("bash", "{baselines}/torchtune.sh", "bf16"), _torchtune),
    "litgpt": Peer(("bash", "{baselines}/litgpt.sh", "bf16"), _litgpt, "logs/litgpt_bf16.log"),
    "llama-factory": Peer(("bash", "{baselines}/llamafactory.sh", "bf16"), _llamafactory, "logs/llamafactory_bf16.log"),
}


def run(name: str, options: argparse.Namespace, tokens: int) -> dict[str, float]:
    """Train one epoch with another tool. tokens: real tokens of the rows, for a tool that does not count them."""
    peer, bench, base = PEERS[name], options.bench, options.model
    places = {
        "bench": bench, "base": base, "baselines": options.baselines, "data": options.data, "batch": str(options.batch)
    }  # fmt: skip
    quiet = {"QUIET": "1", "STEPS": str(options.rows // 4), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [word.format(**places) for word in peer.command],
            env={
                **os.environ,
                **quiet,
                "BENCH": bench,
                "BASE": base,
                "HF_HOME": f"{bench}/hfhome",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            cwd=bench,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        log.seek(0)
        output = log.read()
    if peer.log:
        output = Path(bench, peer.log).read_text(encoding="utf-8")
    if status:
        raise RuntimeError(f"{name} failed:\n{output[-3000:]}")
    real, seconds, loss = peer.read(output, tokens)
    return {
        "tokens_per_s": real / seconds,
        "seconds": seconds,
        "wall_s": wall,
        "mean_loss": loss,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }
