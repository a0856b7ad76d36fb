"""Start `strop dash` in a separate process, and create run folders in the trainer's format without training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

TOKEN = "a-token-of-the-tests"
RECIPE = {"model.name": "tiny", "data.train": "rows.jsonl", "train.objective": "sft", "lora.r": 4, "seed": 0}


@dataclass
class Dash:
    process: subprocess.Popen[str]
    url: str

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.send("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        return self.send("POST", path, json={} if body is None else body, **options)

    def send(self, method: str, path: str, **options: Any) -> requests.Response:
        headers = {"authorization": f"Bearer {TOKEN}", **options.pop("headers", {})}
        return requests.request(method, self.url + path, headers=headers, timeout=120, **options)

    def wait(self, path: str, until: Callable[[Any], Any], seconds: float = 120) -> Any:
        """Return the response of an address once it has the expected content."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            result = self.get(path).json()
            if until(result):
                return result
            time.sleep(0.2)
        raise AssertionError(f"{path} is still {json.dumps(result)[:2000]}")

    def events(self, path: str) -> Iterator[tuple[str, Any]]:
        """Yield (name, data) of a stream until it ends or the caller stops."""
        with self.get(path, stream=True) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            name = ""
            for line in answer.iter_lines(chunk_size=1):
                if line.startswith(b"event: "):
                    name = line[7:].decode()
                elif line.startswith(b"data: "):
                    yield name, json.loads(line[6:])

    def stop(self) -> int:
        """Send SIGINT to the server and its children of the same process group, as a terminal does for Ctrl-C."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        for pid in (self.process.pid, *(child.pid for child in children)):
            if os.getpgid(pid) == os.getpgid(self.process.pid):
                os.kill(pid, signal.SIGINT)
        return self.process.wait(30)


@contextmanager
def run_dash(folder: Path, cwd: Path | None = None, *, port: int = 0, token: str = TOKEN) -> Iterator[Dash]:
    ((cwd or Path()) / folder).mkdir(exist_ok=True)
    command = [sys.executable, "-m", "strop.cli", "dash", str(folder), "--port", str(port), "--json"]
    environment = {**os.environ, "STROP_DASH_TOKEN": token, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=cwd)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the server ended with {process.wait()}"
        about = json.loads(line)
        assert about["url"].endswith(f"/#token={token}")
        yield Dash(process, about["url"].partition("/#")[0])
    finally:
        process.kill()
        process.communicate()  # closes its pipe too


def step(number: int, steps: int = 100, *, time: float | None = None, **fields: Any) -> dict[str, Any]:
    """Return the event of a step as the training loop writes it."""
    at = 1000.0 + number if time is None else time
    return {
        "event": "step", "time": at, "step": number, "steps": steps, "epoch": (number - 1) // 50,
        "loss": 5.0 - number / steps, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens": 100 * number,
        "tokens_per_s": 100.0, "seconds_left": float(steps - number), **fields,
    }  # fmt: skip


def session(first: float = 1000.0, *, start: int = 0, steps: int = 100) -> list[dict[str, Any]]:
    """Return the events that a trainer writes before its first step."""
    choices = [{"field": name, "value": value, "origin": "option", "why": ""} for name, value in RECIPE.items()]
    begun: list[dict[str, Any]] = [
        {"event": "machine", "time": first, "lines": ["a machine"]},
        {"event": "recipe", "time": first, "choices": choices},
    ]
    if start:
        begun.append({"event": "resume", "time": first, "step": start, "checkpoint": f"step-{start:06d}"})
    return [*begun, {"event": "start", "time": first, "steps": steps, "step": start, "engine": "fast", "why": ""}]


def lines(events: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


def make_run(root: Path, name: str, events: list[dict[str, Any]], report: dict[str, Any] | None = None) -> Path:
    """Create a run folder."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("model: {name: tiny}\n", encoding="utf-8")
    lock = {"base": {"name": "tiny", "fingerprint": "f"}, "data": "d", "values": RECIPE, "seed": 0}
    (folder / "lock.json").write_text(json.dumps(lock), encoding="utf-8")
    (folder / "events.jsonl").write_text(lines(events), encoding="utf-8")
    if report is not None:
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


def sample(number: int, base_hit: bool, tuned_hit: bool, **fields: Any) -> dict[str, Any]:
    """Return a row of an evaluation with both answers."""
    right = f"it is {number}"
    return {
        "place": f"held.jsonl:{number}", "prompt": f"what is {number}", "gold": right,
        "base": right if base_hit else "no idea", "tuned": right if tuned_hit else f"it was {number}",
        "base_hit": base_hit, "tuned_hit": tuned_hit, **fields,
    }  # fmt: skip


def evaluated(folder: Path, samples: list[dict[str, Any]], **fields: Any) -> None:
    """Add an evaluation to a run."""
    file = folder / "report.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    shares = {side: sum(row[f"{side}_hit"] for row in samples) / len(samples) for side in ("base", "tuned")}
    report["evaluation"] = {"metric": "exact", "rows": len(samples), **fields} | {
        side: {"exact": share, "loss": 1.0} for side, share in shares.items()
    }
    (folder / "answers.json").write_text(json.dumps({"metric": "exact", "samples": samples}), encoding="utf-8")
    file.write_text(json.dumps(report), encoding="utf-8")
