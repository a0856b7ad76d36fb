"""`strop serve --engine vllm`: vLLM's own server on the same base and adapters, measured to be the same models.

vLLM lives in an environment of its own. What it makes of a text is compared with what strop makes of it: log
probabilities of given tokens (greedy answers say little where two words are near alike), with the base as a control.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from strop.config.load import read_resolved
from strop.data.prepare import prepare
from strop.data.rendering.render import Renderer
from strop.data.types import Ids
from strop.engine.decode.generate import generation_stop_ids
from strop.engine.decode.model import load
from strop.engine.device import pick_device, pick_dtype
from strop.errors import ModelError, ParityError, RunError
from strop.evaluation.general import rows as general_rows
from strop.models.adapter_config import read_adapter_config
from strop.models.adapters import (
    adapter_folder,
    base_source,
    check_adapter_base,
    check_adapter_kind,
    check_adapter_weights,
    tokenizer_source,
)
from strop.models.load import weights_folder
from strop.models.source import Source, locate, read_config
from strop.models.tokenizer import config_folder, load_tokenizer
from strop.models.vllm import DTYPE_NAMES, find_vllm_python, max_lora_rank, query_vllm, vllm_environment
from strop.objectives.table import learning_of
from strop.runs.folder import RunFolder, cache_folder, is_run
from strop.serve.address import KEY_VARIABLE, Address
from strop.serve.models import BASE, check_names
from strop.serve.run import LONGEST_CONTEXT

OWN = "generation_config.json"
START_SECONDS = 900.0  # compiling for a GPU takes minutes
TEXTS, TEXT_TOKENS = 12, 256  # compared, of each model
LIMITS = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}  # mean |difference| of a token's log probability, in nats


@dataclass(frozen=True)
class Same:
    """One model, here and there. difference: mean and largest |difference| of a token's log probability, in nats;
    control: the mean between vLLM's tuned model and strop's base, which must be larger where training did something."""

    model: str
    tokens: int
    mean: float
    max: float
    control: float | None
    limit: float

    @property
    def passed(self) -> bool:
        told_apart = self.control is None or self.control < 2 * self.limit or self.mean < self.control / 2
        return self.mean <= self.limit and told_apart


def lora_module(name: str, folder: Path) -> str:
    """An adapter for --lora-modules: as JSON, since name=path breaks at a name's own = or comma."""
    return json.dumps({"name": name, "path": str(folder.resolve())})


def serve_vllm(
    names: Sequence[str],
    address: Address,
    *,
    python: str | None,
    slots: int,
    context: int | None,
    device: str,
    dtype: str,
    ready: Callable[[dict[str, Any]], None],
) -> int:
    """Starts vLLM, measures it, and stays until it is told to end. Gives the signal's number.

    Raises InputError before anything is loaded, RunError where vLLM does not start, ParityError where it answers as
    another model would.
    """
    program, ids = find_vllm_python(python), check_names(names)
    folders = [adapter_folder(name) for name in names]
    first = folders[0]
    source = locate(names[0]) if first is None else base_source(first)
    adapters = {own: folder for own, folder in zip(ids, folders, strict=True) if folder is not None}
    ranks = [_fitting_rank(folder, source) for folder in adapters.values()]
    renderers = [Renderer(load_tokenizer(_with_own_tokenizer(name))) for name in names]
    if len({renderer.fingerprint for renderer in renderers}) > 1:
        raise ModelError("these runs have different tokenizers or templates; vLLM takes one", fix="serve one of them")
    weights = weights_folder(source)
    config = read_config(weights)
    architecture, longest = config["architectures"][0], int(config.get("max_position_embeddings", LONGEST_CONTEXT))
    context = context or min(longest, LONGEST_CONTEXT)
    found = query_vllm(program, architecture, lora=first is not None)
    dtype = pick_dtype(pick_device(device))[0] if dtype == "auto" else dtype
    longest = min(TEXT_TOKENS, context - 1)
    rows = {own: _texts(name, renderers[0], longest) for own, name in zip(ids, names, strict=True)}
    ours = {own: _reference(name, rows[own]) for own, name in zip(ids, names, strict=True)}
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as log:
        # the template may end turns with another than the eos token, and some models name more
        own = generation_stop_ids(GenerationConfig.from_pretrained(weights)) if (weights / OWN).is_file() else ()
        ends = {"eos_token_id": [*renderers[0].ends, *own]}
        Path(scratch, OWN).write_text(json.dumps(ends), encoding="utf-8")
        command = [
            program, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights),
            "--tokenizer", str(config_folder(_with_own_tokenizer(names[0]))), "--generation-config", scratch,
            "--served-model-name", BASE if adapters else ids[0], "--host", address.host, "--port", str(address.port),
            "--dtype", DTYPE_NAMES[dtype], "--max-num-seqs", str(slots), "--allowed-origins", "[]",
            "--max-model-len", str(context),
            *([] if found["cuda"] else ["--enforce-eager"]),
        ]  # fmt: skip
        if adapters:
            command += ["--enable-lora", "--max-lora-rank", str(max(ranks)), "--max-loras", str(len(adapters))]
            command += ["--lora-modules", *(lora_module(own, folder) for own, folder in adapters.items())]
        key = {"VLLM_API_KEY": address.key} if address.key else {}
        address.socket.close()  # vLLM binds it itself
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**vllm_environment(KEY_VARIABLE), **key}, start_new_session=True
        )
        try:
            started = time.monotonic()
            _wait_for_health(process, address, log)
            start_s = time.monotonic() - started
            same = [_compare(address, own, rows[own], *ours[own], LIMITS[dtype]) for own in ids]
            for one in same:
                if not one.passed:
                    what = (
                        f"mean difference {one.mean:.2g} nats a token (limit {one.limit:g}), to the base {one.control}"
                    )
                    raise ParityError(
                        f"{one.model}: vLLM does not answer as strop does: {what}", fix="please report it"
                    )
            models = [*adapters, BASE] if adapters else ids
            ready({
                "url": address.url, "models": models, "engine": f"vllm {found['version']}", "start_s": start_s,
                "parity": [{**asdict(one), "passed": one.passed} for one in same],
                "key": address.key is not None, "pid": os.getpid(), "notes": [],
            })  # fmt: skip
            return _until_told(process, log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its engine is a process of its own


def _until_told(process: subprocess.Popen[Any], log: Any) -> int:
    """Waits for a signal, and gives its number. Raises RunError where vLLM ends by itself."""
    told: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: told.append(got)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while not told:
            if process.poll() is not None:
                raise RunError(f"vLLM ended with {process.returncode}: {_tail(log)}")
            time.sleep(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return told[0]


def _with_own_tokenizer(name: str) -> Source:
    folder = adapter_folder(name)
    return locate(name) if folder is None else tokenizer_source(folder, base_source(folder))


def _fitting_rank(folder: Path, source: Source) -> int:
    check_adapter_base(folder, source)
    check_adapter_weights(folder)
    check_adapter_kind(folder, scores=False)
    return max_lora_rank(read_adapter_config(folder), str(folder), "`strop merge` it, and serve the merged folder")


def _texts(name: str, renderer: Renderer, longest: int) -> list[Ids]:
    """Texts to compare on, as ids: a run's own rows, else the general set's questions."""
    if is_run(Path(name)):
        recipe = read_resolved(RunFolder(Path(name)).recipe).recipe
        learning = learning_of(recipe.train)
        prepared = prepare(recipe.data, renderer.tokenizer, cache=cache_folder() / "data", learning=learning)
        rows: Any = prepared.eval if prepared.eval is not None else prepared.train
        return [rows[row].ids[:longest] for row in range(min(len(rows), TEXTS))]
    return [renderer.prompt(row.messages)[:longest] for row in general_rows()[:TEXTS]]


def _reference(name: str, rows: list[Ids]) -> tuple[list[list[float]], list[list[float]] | None]:
    """Log probabilities of the rows' tokens but the first: of the model in fp32, and of its base; on 16-bit weights, as
    vLLM has them, whatever the adapter was trained on. On the CPU: a GPU's memory is vLLM's."""
    model = load(name, device="cpu", dtype="fp32", quantization="none")
    tuned = [_logs(model.module, ids) for ids in rows]
    if model.adapter is None:
        return tuned, None
    with model.base():
        return tuned, [_logs(model.module, ids) for ids in rows]


def _logs(module: Any, ids: Ids) -> list[float]:
    text = torch.from_numpy(ids.astype(np.int64))[None].to(next(module.parameters()).device)
    with torch.inference_mode():
        logs = module(input_ids=text, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    found: list[float] = logs.gather(1, text[0, 1:, None])[:, 0].tolist()
    return found


def _compare(
    address: Address,
    model: str,
    rows: list[Ids],
    tuned: list[list[float]],
    base: list[list[float]] | None,
    limit: float,
) -> Same:
    theirs = [_their_logs(address, model, ids) for ids in rows]
    flat = np.concatenate([np.array(row) for row in theirs])
    apart = np.abs(flat - np.concatenate([np.array(row) for row in tuned]))
    control = None
    if base is not None:
        control = float(np.abs(flat - np.concatenate([np.array(row) for row in base])).mean())
    mean = float(apart.mean())
    return Same(model, len(flat), mean if math.isfinite(mean) else math.inf, float(apart.max()), control, limit)


def _their_logs(address: Address, model: str, ids: Ids) -> list[float]:
    body = {"model": model, "prompt": ids.tolist(), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    told = _ask(address, "/v1/completions", body)["choices"][0]["prompt_logprobs"]
    return [float(one[str(token)]["logprob"]) for one, token in zip(told[1:], ids[1:].tolist(), strict=True)]


def _ask(address: Address, path: str, body: dict[str, Any] | None = None) -> Any:
    """What vLLM answers. The key goes with a body only: before that, another program may be at the port. Raises
    RunError where it answers with an error, or not at all."""
    headers = {"Content-Type": "application/json"}
    if address.key and body is not None:
        headers["Authorization"] = f"Bearer {address.key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address.url + path, data, headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as answer:
            content = answer.read()
        return json.loads(content) if content else None
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode(errors="replace")
        raise RunError(f"vLLM answers {path} with {error.code}: {said[:300]}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RunError(f"vLLM does not answer {path}: {error}") from None


def _wait_for_health(process: subprocess.Popen[Any], address: Address, log: Any) -> None:
    """Raises RunError where vLLM ends, or takes too long."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RunError(f"vLLM ended with {process.returncode}: {_tail(log)}")
        with contextlib.suppress(RunError):
            _ask(address, "/health")
            return
        time.sleep(0.5)
    raise RunError(f"vLLM did not start within {START_SECONDS:.0f} seconds: {_tail(log)}")


def _tail(log: Any) -> str:
    """The last line of its log that says what was wrong."""
    log.seek(0)
    lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    faults = [line for line in lines if "Error" in line]
    return str((faults or lines or ["it said nothing"])[-1][-600:])
