"""`strop serve --engine vllm`: start vLLM's server, and check its log-probabilities.

vLLM is installed in a separate environment. The parity check compares the log-probabilities of fixed rows in vLLM and
in strop, because greedy completions differ by chance if two tokens are almost equally likely. As a control, vLLM's
tuned model is also compared with the base model. Rows with images are sent as messages, so that vLLM expands them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
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
from strop.data.rendering.render import Renderer
from strop.data.store import request_message
from strop.data.types import Ids, Indices
from strop.engine.decode.generate import generation_stop_ids
from strop.engine.decode.model import load
from strop.engine.device import pick_device, pick_generation_dtype
from strop.errors import ModelError, ParityError, RunError
from strop.evaluation.general import load_questions
from strop.exporting.parity import compute_in_fp32
from strop.machine.processes import end_session, end_with_parent
from strop.models.adapter_config import (
    adapter_folder,
    adapts_image_encoder,
    check_adapter_kind,
    read_adapter_config,
    read_identity,
    refuse_on_16_bit_base,
)
from strop.models.adapters import check_adapter_base, check_adapter_weights, locate_base, locate_tokenizer
from strop.models.load import stored_dtype_name, weights_folder
from strop.models.source import Source, locate, read_config
from strop.models.tokenizer import config_folder, load_tokenizer
from strop.models.vllm import DTYPE_NAMES, find_vllm_python, max_lora_rank, query_vllm, vllm_environment
from strop.objectives.table import prepare_rows
from strop.runs.folder import RunFolder, cache_folder, is_run
from strop.serve.models import BASE, check_names
from strop.serve.run import DEFAULT_MAX_CONTEXT
from strop.serve.server import KEY_VARIABLE, Address, signal_handler

GENERATION_CONFIG = "generation_config.json"
MAX_START_SECONDS = 900.0  # compiling for a GPU takes minutes
NUM_ROWS, MAX_TEXT_TOKENS = 12, 256  # for the parity check of each model
LIMITS = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}  # maximum of ParityResult.mean by dtype


@dataclass(frozen=True)
class _Row:
    """A row of the parity check: the request for it, its token ids (n,), and the positions that are compared."""

    path: str
    body: dict[str, Any]
    ids: Ids
    compared: Indices


@dataclass(frozen=True)
class ParityResult:
    """Absolute differences between log-probabilities of tokens in vLLM and in strop, in nats."""

    model: str
    tokens: int
    mean: float
    max: float
    control: float | None  # mean difference between vLLM's tuned model and strop's base model; None for a base model
    limit: float  # of the mean

    @property
    def passed(self) -> bool:
        # a control below twice the limit means that training changed the model too little to tell it from the base
        closer_than_base = self.control is None or self.control < 2 * self.limit or self.mean < self.control / 2
        return self.mean <= self.limit and closer_than_base

    def raise_if_failed(self) -> None:
        if not self.passed:
            what = (
                f"{self.model}: vLLM's log-probabilities differ from strop's by {self.mean:.2g} nats per token on "
                f"average (limit {self.limit:g}; difference from the base {self.control})"
            )
            raise ParityError(what, fix="please report it")


def lora_module_argument(name: str, folder: Path) -> str:
    """Return an argument of --lora-modules as JSON, because in name=path the name cannot contain "=" or a comma."""
    return json.dumps({"name": name, "path": str(folder.resolve())})


def serve_vllm(
    names: Sequence[str], address: Address, *, python: str | None, slots: int, context: int | None, device: str,
    dtype: str, on_ready: Callable[[dict[str, Any]], None],
) -> int:  # fmt: skip
    """Start vLLM, check its parity, run until a signal arrives, and return the signal's number.

    on_ready: called with the fields of `strop serve --json` when requests are accepted. Raises InputError for invalid
    arguments, RunError if vLLM does not start, ParityError if its log-probabilities differ from strop's.
    """
    program, ids = find_vllm_python(python), check_names(names)
    folders = [adapter_folder(name) for name in names]
    source = locate(names[0]) if folders[0] is None else locate_base(folders[0])
    adapters = {model: folder for model, folder in zip(ids, folders, strict=True) if folder is not None}
    ranks = [_check_adapter(folder, source) for folder in adapters.values()]
    renderers = [Renderer(load_tokenizer(_locate_model_tokenizer(name))) for name in names]
    if len({renderer.fingerprint for renderer in renderers}) > 1:
        what = "the runs have different tokenizers or templates, and vLLM supports only one"
        raise ModelError(what, fix="serve one of them")
    weights = weights_folder(source)
    config = read_config(weights)
    context = context or min(int(config.get("max_position_embeddings", DEFAULT_MAX_CONTEXT)), DEFAULT_MAX_CONTEXT)
    vllm = query_vllm(program, config["architectures"][0], lora=folders[0] is not None)
    notes: list[str] = []
    if dtype == "auto":
        trained = read_identity(folders[0] or weights).get("dtype")
        dtype, notes = pick_generation_dtype(pick_device(device), trained, config["model_type"])
    references = {model: _compute_reference(name, context) for model, name in zip(ids, names, strict=True)}
    with tempfile.TemporaryDirectory() as generation_folder, tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        # the template may end turns with a token other than eos, and some models have more stop tokens
        stop_ids = list(renderers[0].end_ids)
        if (weights / GENERATION_CONFIG).is_file():
            stop_ids += generation_stop_ids(GenerationConfig.from_pretrained(weights))
        Path(generation_folder, GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": stop_ids}), encoding="utf-8")
        command = [
            program, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights),
            "--tokenizer", str(config_folder(_locate_model_tokenizer(names[0]))),
            "--generation-config", generation_folder, "--served-model-name", BASE if adapters else ids[0],
            "--host", address.host, "--port", str(address.port), "--dtype", DTYPE_NAMES[dtype],
            "--max-num-seqs", str(slots), "--max-model-len", str(context), "--allowed-origins", "[]",
            *([] if vllm["cuda"] else ["--enforce-eager"]),
        ]  # fmt: skip
        if adapters:
            command += ["--enable-lora", "--max-lora-rank", str(max(ranks)), "--max-loras", str(len(adapters))]
            command += ["--lora-modules", *(lora_module_argument(*item) for item in adapters.items())]
        key = {"VLLM_API_KEY": address.key} if address.key else {}
        address.socket.close()  # vLLM binds the port
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**vllm_environment(KEY_VARIABLE), **key},
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )
        try:
            start = time.monotonic()
            _wait_for_health(process, address, log)
            start_s = time.monotonic() - start
            results = [_compare(address, model, *references[model], LIMITS[dtype]) for model in ids]
            for result in results:
                result.raise_if_failed()
            models = [*adapters, BASE] if adapters else ids
            on_ready({
                "url": address.url, "models": models, "engine": f"vllm {vllm['version']}", "start_s": start_s,
                "parity": [{**asdict(result), "passed": result.passed} for result in results],
                "key": address.key is not None, "pid": os.getpid(), "dtype": dtype, "notes": notes,
            })  # fmt: skip
            return _wait_for_signal(process, log)
        finally:
            end_session(process, force=False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            end_session(process, force=True)  # vLLM's engine is a separate process


def _wait_for_signal(process: subprocess.Popen[Any], log: Any) -> int:
    """Wait for SIGINT or SIGTERM and return its number. Raises RunError if vLLM ends."""
    signals: list[int] = []
    with signal_handler(lambda number, _: signals.append(number)):
        while not signals:
            _raise_if_ended(process, log)
            time.sleep(0.2)
    return signals[0]


def _raise_if_ended(process: subprocess.Popen[Any], log: Any) -> None:
    if process.poll() is not None:
        raise RunError(f"vLLM ended with {process.returncode}: {_find_error_line(log)}")


def _locate_model_tokenizer(name: str) -> Source:
    folder = adapter_folder(name)
    return locate(name) if folder is None else locate_tokenizer(folder, locate_base(folder))


def _check_adapter(folder: Path, source: Source) -> int:
    """Check that vLLM can serve an adapter on this base, and return the adapter's rank."""
    check_adapter_base(folder, source)
    check_adapter_weights(folder)
    check_adapter_kind(folder, "text")
    refuse_on_16_bit_base(folder, "vLLM")
    if adapts_image_encoder(folder):
        what = f"{folder}: vLLM does not support adapters in the image encoder"
        raise ModelError(what, fix="`strop merge` it, and serve the merged folder")
    return max_lora_rank(read_adapter_config(folder), str(folder), "`strop merge` it, and serve the merged folder")


def _select_rows(name: str, renderer: Renderer, context: int) -> list[_Row]:
    """Return rows for the parity check: evaluation or training rows of a run, else questions of the general set.

    Texts are cut, and rows with images are left out if they are longer than the context.
    """
    rows = _select_run_rows(Path(name), renderer, context) if is_run(Path(name)) else []
    max_tokens = min(MAX_TEXT_TOKENS, context - 1)
    return rows or [_text_row(renderer.prompt(row.messages)[:max_tokens]) for row in load_questions()[:NUM_ROWS]]


def _select_run_rows(run: Path, renderer: Renderer, context: int) -> list[_Row]:
    recipe = read_resolved(RunFolder(run).recipe).recipe
    prepared = prepare_rows(recipe, renderer.tokenizer, cache=cache_folder() / "data")
    used: Any = prepared.train_conversations if prepared.eval_conversations is None else prepared.eval_conversations
    rows = list[_Row]()
    for side in (side for conversation in used[:NUM_ROWS] for side in conversation.sides):
        for example in prepared.renderer.render(side):
            if not side.has_images:
                rows.append(_text_row(example.ids[: min(MAX_TEXT_TOKENS, context - 1)]))
            elif len(example) < context:
                body = {
                    "messages": [request_message(turn) for turn in side.messages], "add_generation_prompt": False,
                    "chat_template_kwargs": prepared.renderer.options_for(side.messages),
                    **({"tools": list(side.tools)} if side.tools else {}),
                }  # fmt: skip
                compared = example.weights[1:].nonzero()[0] + 1
                rows.append(_Row("/v1/chat/completions", body, example.ids, compared))
        if len(rows) >= NUM_ROWS or sum(len(row.ids) for row in rows) >= NUM_ROWS * MAX_TEXT_TOKENS:
            break
    return rows


def _text_row(ids: Ids) -> _Row:
    return _Row("/v1/completions", {"prompt": ids.tolist()}, ids, np.arange(1, len(ids)))


def _compute_reference(name: str, context: int) -> tuple[list[_Row], list[list[float]], list[list[float]] | None]:
    """Return rows and their log-probabilities in strop with the adapter and, if there is an adapter, without it.

    They are computed in fp32 from unquantized weights, which vLLM uses too, on the CPU, because vLLM needs the GPU's
    memory. The weights stay in the dtype in which they are stored.
    """
    folder = adapter_folder(name)
    source = locate(name) if folder is None else locate_base(folder)
    model = load(name, device="cpu", dtype=stored_dtype_name(source), quantization="none")
    compute_in_fp32(model.module)
    rows = _select_rows(name, model.renderer, context)
    tuned = [_compute_logprobs(model.module, row) for row in rows]
    if not model.is_tuned:
        return rows, tuned, None
    with model.base():
        return rows, tuned, [_compute_logprobs(model.module, row) for row in rows]


def _compute_logprobs(module: Any, row: _Row) -> list[float]:
    input_ids = torch.from_numpy(row.ids.astype(np.int64))[None].to(next(module.parameters()).device)
    compared = torch.from_numpy(row.compared)
    with torch.inference_mode():
        distributions = module(input_ids=input_ids, use_cache=False).logits[0, compared - 1].float().log_softmax(-1)
    logprobs: list[float] = distributions.gather(1, input_ids[0, compared, None])[:, 0].tolist()
    return logprobs


def _compare(
    address: Address, model: str, rows: list[_Row], tuned: list[list[float]], base: list[list[float]] | None,
    limit: float,
) -> ParityResult:  # fmt: skip
    vllm = np.concatenate([_request_logprobs(address, model, row) for row in rows])
    difference = np.abs(vllm - np.concatenate(tuned))
    control = None if base is None else float(np.abs(vllm - np.concatenate(base)).mean())
    mean = float(difference.mean())
    mean = mean if math.isfinite(mean) else math.inf
    return ParityResult(model, len(vllm), mean, float(difference.max()), control, limit)


def _request_logprobs(address: Address, model: str, row: _Row) -> list[float]:
    """Return the log-probabilities of the compared tokens. Raises ParityError if vLLM has other tokens there."""
    body = {"model": model, **row.body, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    response = _request(address, row.path, body)
    entries = response.get("prompt_logprobs") or response["choices"][0]["prompt_logprobs"]
    try:
        return [float(entries[i][str(row.ids[i])]["logprob"]) for i in row.compared.tolist()]
    except (IndexError, KeyError):
        what = f"{model}: vLLM renders {len(entries)} tokens of a row with {len(row.ids)} differently"
        raise ParityError(what, fix="use strop's own engine, without vLLM") from None


def _request(address: Address, path: str, body: dict[str, Any] | None = None) -> Any:
    """Return vLLM's JSON response. Raises RunError if it responds with an error or not at all.

    Requests without a body only poll whether vLLM has started. They do not contain the API key, because until then
    another program may listen on the port.
    """
    headers = {"Content-Type": "application/json"}
    if address.key and body is not None:
        headers["Authorization"] = f"Bearer {address.key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address.url + path, data, headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as response:
            content = response.read()
        return json.loads(content) if content else None
    except json.JSONDecodeError:
        raise RunError(f"vLLM responds to {path} with text that is not JSON: {content[:300]!r}") from None
    except urllib.error.HTTPError as error:
        text = error.read(2000).decode(errors="replace")
        raise RunError(f"vLLM responds to {path} with {error.code}: {text[:300]}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RunError(f"vLLM does not respond to {path}: {error}") from None


def _wait_for_health(process: subprocess.Popen[Any], address: Address, log: Any) -> None:
    """Wait until vLLM accepts requests. Raises RunError if it ends or takes too long."""
    deadline = time.monotonic() + MAX_START_SECONDS
    while time.monotonic() < deadline:
        _raise_if_ended(process, log)
        with contextlib.suppress(RunError):
            _request(address, "/health")
            return
        time.sleep(0.5)
    raise RunError(f"vLLM did not start within {MAX_START_SECONDS:.0f} seconds: {_find_error_line(log)}")


def _find_error_line(log: Any) -> str:
    """Return the last line of a log that contains "Error", or else the last line."""
    log.seek(0)
    lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return str((errors or lines or ["no output"])[-1][-600:])
