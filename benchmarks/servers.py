"""The servers that `benchmarks/serve.py` measures: how to start and stop them, and the bytes they read per token."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measured
import psutil
import requests
from gguf import GGUFReader

from strop.models.source import read_safetensors_header, weight_files
from strop.planning.memory import BLOCK, NESTED

HERE = Path(__file__).parent
START_SECONDS = 600  # vLLM compiles the model at its first start

STROP = "{python} -m strop.cli serve {model} --host 127.0.0.1 --port {port} --slots {slots} --context {context}"
LLAMA = "{python} {here}/llama_server.py {model} --port {port} --slots {slots} --context {context} --threads {threads}"
TRANSFORMERS = (
    "{python} {bin}/transformers serve {model} --host 127.0.0.1 --port {port} --device cpu --continuous-batching"
    " --cb-block-size 32 --cb-num-blocks {blocks}"  # the default is half of the memory
)
VLLM = (
    "{python} -m vllm.entrypoints.openai.api_server --model {model} --host 127.0.0.1 --port {port}"
    " --max-num-seqs {slots} --max-model-len {context}"
)
VLLM_ENVIRONMENT = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
HELD = (("fp32", "fp32", "none"), ("bf16", "bf16", "none"), ("int8", "bf16", "int8"), ("nf4", "bf16", "nf4"))
LONG_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Server:
    """A server to measure. command: with {port}, {slots}, {context}, {threads} and the keys of `places`.

    packages: whose versions are recorded. weight_bytes: read per token. busy: the metric that counts running requests.
    body: additional fields of requests.
    """

    name: str
    command: str
    places: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    weight_bytes: int | None = None
    busy: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        """Return the command, the CPU, and the versions in the server's environment."""
        python = self.places.get("python", sys.executable)
        code = "import sys, json; sys.path.insert(0, sys.argv[1]); import measured; "
        code += "print(json.dumps([measured.machine(), measured.versions(sys.argv[2:])]))"
        machine, versions = measured.child([python, "-c", code, str(HERE), *self.packages])
        command = " ".join(Path(word).name if os.path.isabs(word) else word for word in shlex.split(self.command))
        return {"command": command, "cpu": machine["cpu"], "python": machine["python"], "versions": versions}


class Failed(Exception):
    """Raised with the last output of a server that did not start, or ended."""


@dataclass(frozen=True)
class Running:
    """A running server. body: fields of every request, with the model's name."""

    url: str
    pid: int
    start_s: float
    body: Mapping[str, Any]
    busy_metric: str | None

    def processes(self) -> list[psutil.Process]:
        """Return the server's process and its descendants."""
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]

    def resident_bytes(self) -> int:
        return sum(one.memory_info().rss for one in self.processes())

    def others_seconds(self) -> float:
        """Return the CPU time so far that neither the server nor this process used."""
        spent = psutil.cpu_times()
        idle = spent.idle + getattr(spent, "iowait", 0.0)
        guests = getattr(spent, "guest", 0.0) + getattr(spent, "guest_nice", 0.0)  # already counted as user time
        ours = sum(sum(one.cpu_times()[:2]) for one in self.processes()) + time.process_time()
        return sum(spent) - idle - guests - ours

    def busy(self) -> float | None:
        """Return the number of running requests by the server's metrics, or None if it has no such metric."""
        if self.busy_metric is None:
            return None
        text = requests.get(f"{self.url}/metrics", timeout=30).text
        return sum(float(value) for value in re.findall(rf"^{self.busy_metric}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def strop_servers(model: str) -> list[Server]:
    """Return strop by the quantization of its weights; in 4 and 8 bit, other tensors are in bf16."""
    packages = ("strop", "torch", "transformers", "bitsandbytes")
    results = []
    for name, dtype, scheme in HELD:
        command = f"{STROP} --dtype {dtype}" + (f" --quantization {scheme}" if scheme != "none" else "")
        places, read = {"python": sys.executable, "model": model}, weight_bytes(Path(model), dtype, scheme)
        results.append(Server(f"strop {name}", command, places, packages, read, "strop_active"))
    return results


def llama_servers(python: str, files: list[str]) -> list[Server]:
    return [
        Server(
            f"llama.cpp {Path(file).stem}", LLAMA, {"python": python, "model": file, "here": str(HERE)},
            ("xllamacpp",), gguf_bytes(file), "llamacpp:requests_processing",
            {"repeat_penalty": 1.0},  # the default of llama_cpp.server, 1.1, changes greedy answers
        )
        for file in files
    ]  # fmt: skip


def transformers_serve(python: str, model: str) -> list[Server]:
    """Return transformers with continuous batching; without, it answers one request at a time."""
    places = {"python": python, "bin": str(Path(python).parent), "model": model}
    packages = ("transformers", "torch")
    return [
        Server(
            f"transformers {dtype}", f"{TRANSFORMERS} --dtype {LONG_NAMES[dtype]}", places, packages,
            weight_bytes(Path(model), dtype, "none"), body={"model": model},
        )
        for dtype in LONG_NAMES
    ]  # fmt: skip


def vllm_servers(python: str, model: str) -> list[Server]:
    places = {"python": python, "model": model}
    return [
        Server(
            f"vllm {dtype}", f"{VLLM} --dtype {LONG_NAMES[dtype]}", places, ("vllm-cpu", "vllm", "torch"),
            weight_bytes(Path(model), dtype, "none"), "vllm:num_requests_running", environment=VLLM_ENVIRONMENT,
        )
        for dtype in LONG_NAMES
    ]  # fmt: skip


def weight_bytes(folder: Path, dtype: str, scheme: str) -> int:
    """Return the weight bytes of a model folder read per token: all but an embedding that is not also the head."""
    shapes = {
        name: entry["shape"] for file in weight_files(folder) for name, entry in read_safetensors_header(file).items()
    }
    element, total = 4 if dtype == "fp32" else 2, 0.0
    for name, shape in shapes.items():
        weights = shape[0] * (shape[1] if len(shape) == 2 else 1)
        table = "embed_tokens" in name
        if table and "lm_head.weight" in shapes:
            continue
        if scheme == "none" or len(shape) == 1 or table or "lm_head" in name:
            total += weights * element
        elif scheme == "int8":
            total += weights + 4 * shape[0]
        else:  # 4 bits, an 8-bit constant per block, and an fp32 constant per block of these
            total += weights * (1 / 2 + 1 / BLOCK + 4 / BLOCK / NESTED)
    return round(total)


def gguf_bytes(file: str) -> int:
    """Return the weight bytes of a GGUF file read per token."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    return sum(size for name, size in sizes.items() if name != "token_embd.weight" or "output.weight" not in sizes)


@contextmanager
def run_server(server: Server, *, slots: int, context: int, threads: int) -> Iterator[Running]:
    """Start a server, wait until it answers, and stop it at the end. Raises Failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = {"port": port, "slots": slots, "context": context, "threads": threads, "blocks": slots * context // 32}
    words = [word.format(**sizes, **server.places) for word in shlex.split(server.command)]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
    environment = {**os.environ, **quiet, **server.environment}
    if server.places.get("python", sys.executable) != sys.executable:
        environment.pop("PYTHONPATH", None)  # PYTHONPATH is for this process only
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        began, url = time.perf_counter(), f"http://127.0.0.1:{port}"
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not (listed := _listed(url)):
                if process.poll() is not None or time.perf_counter() - began > START_SECONDS:
                    log.seek(0)
                    raise Failed(f"{server.name} did not start:\n{log.read()[-1500:]}")
                time.sleep(0.2)
            body = {"model": listed[0]["id"], "temperature": 0, "stream": True, **server.body}
            yield Running(url, process.pid, time.perf_counter() - began, body, server.busy)
        finally:
            stop_process(process)


def _listed(url: str) -> list[dict[str, Any]]:
    """Return the models of a server, or none while it starts."""
    try:
        return list(requests.get(f"{url}/v1/models", timeout=5).json()["data"])
    except (requests.RequestException, ValueError, KeyError):
        return []


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and its descendants."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
    for one in started:
        if one.is_running():
            one.kill()
