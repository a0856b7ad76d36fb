"""Start a server in another process, on a tiny random model with two adapters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from peft import LoraConfig, get_peft_model

from strop.models.adapters import save_adapter
from strop.models.load import load_base
from strop.models.source import fingerprint, locate
from tests.support.families import tokenizer

CHAT = "/v1/chat/completions"
SYSTEM = "be bold"  # system prompt of the training rows of the adapter `bold`


def save_adapters(
    root: Path, base: Path, adapter_tokenizer: Any = None, *, std: float = 0.3, **lora: Any
) -> list[Path]:
    """Save two random adapters of a base, `calm` and `bold`, with the tiny tokenizer by default."""
    source, folders = locate(str(base)), []
    for seed, (name, system) in enumerate({"calm": None, "bold": SYSTEM}.items()):
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora})
        model = get_peft_model(load_base(source, torch.float32, "cpu"), config)
        for key, weight in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(weight, std=std)
        identity = {"base": {"name": source.name, "fingerprint": fingerprint(source)}, "system": system}
        save_adapter(model, adapter_tokenizer or tokenizer("chatml"), root / name, identity)
        folders.append(root / name)
    return folders


@dataclass
class Server:
    process: subprocess.Popen[str]
    about: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.about["url"])

    def post(self, path: str, body: Any, **options: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=60, **options)

    def chat(self, text: str = "hello there", model: str = "calm", **fields: Any) -> requests.Response:
        return self.post(CHAT, {"model": model, "messages": [{"role": "user", "content": text}], **fields})

    def metric(self, name: str) -> float:
        lines = requests.get(self.url + "/metrics", timeout=10).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def wait_idle(self) -> None:
        for _ in range(100):
            if self.metric("strop_active") == 0:
                return
            time.sleep(0.05)
        raise AssertionError("a slot is still in use")

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def serving(*arguments: str | Path) -> Iterator[Server]:
    command = [
        sys.executable,
        "-m",
        "strop.cli",
        "serve",
        *map(str, arguments),
        "--port",
        "0",
        "--dtype",
        "fp32",
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the server ended with {process.wait()}"
        yield Server(process, json.loads(line))
    finally:
        process.kill()
        process.communicate()  # also closes its pipe
