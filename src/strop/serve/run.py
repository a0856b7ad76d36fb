"""`strop serve`: load the models, choose the decoder, and run the server until a signal arrives."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from strop.engine.decode.cache import BLOCK_SIZE
from strop.engine.decode.decoder import CompiledDecoder, Decoder, kv_bytes_per_position, why_decoder_unsupported
from strop.engine.decode.hf_fallback import HfDecoder, check_batching
from strop.engine.decode.sampling import Sampling
from strop.errors import InputError, ModelError, RunError
from strop.machine.probe import probe
from strop.models.adapter_config import AdapterKind, adapter_folder, adapter_kind
from strop.models.introspect import max_positions
from strop.serve.app import OPEN_PATHS, ServerState, create_app
from strop.serve.classifier import CLASSIFY
from strop.serve.embedder import EMBED
from strop.serve.engine import Engine, Metrics, create_engine_thread
from strop.serve.models import Grammars, LoadedModels, load_models
from strop.serve.server import AccessRules, Address, Server
from strop.serve.text_models import TextRoute, serve_texts

ROUTES: dict[AdapterKind, TextRoute] = {"classifier": CLASSIFY, "embedder": EMBED}
DEFAULT_MAX_CONTEXT = 4096  # limits the memory per slot
SHUTDOWN_SECONDS = 5  # time that running requests have to finish after Ctrl-C
EXTRA_CACHE_SLOTS = 2  # the cache is larger than the slots need by this many, for shared prefixes


def serve(
    names: Sequence[str], address: Address, *, slots: int, queue: int, context: int | None, max_body_bytes: int,
    device: str = "auto", dtype: str = "auto", quantization: str = "auto", force: bool = False,
    on_ready: Callable[[dict[str, Any]], None],
) -> int:  # fmt: skip
    """Serve models until a signal arrives, and return its number.

    on_ready: called with the fields of `strop serve --json` when requests are accepted. Raises ModelError if the models
    cannot be served together, RunError if the engine failed.
    """
    options = {"device": device, "dtype": dtype, "quantization": quantization, "force": force}
    for name in names:
        route = ROUTES.get(adapter_kind(folder)) if (folder := adapter_folder(name)) else None
        if route is not None and len(names) > 1:
            raise ModelError(f"{name}: {route.what} is served by itself", fix="give one run")
        if route is not None:
            return serve_texts(
                name, route, address, queue=queue, max_body_bytes=max_body_bytes, options=options, on_ready=on_ready
            )
    thread = create_engine_thread()  # loads the models and runs them
    try:
        loaded, decoder, slots, context, notes = thread.submit(_prepare, names, slots, context, **options).result()
    except BaseException:
        thread.shutdown(wait=False, cancel_futures=True)
        address.socket.close()
        raise
    base = _get_base(loaded.module)
    metrics = Metrics()
    vocabulary = int(base.get_output_embeddings().weight.shape[0])  # may be padded beyond the config's vocab_size
    engine = Engine(
        decoder, slots=slots, queue=queue, metrics=metrics, thread=thread,
        on_failure=lambda: setattr(server, "should_exit", True),
    )  # fmt: skip
    state = ServerState(
        engine=engine, models=loaded.models, sampling=Sampling.from_generation_config(base.generation_config),
        grammars=Grammars(vocabulary), context=context, vocabulary=vocabulary, started=int(time.time()),
    )  # fmt: skip
    app = create_app(state, AccessRules(address.hosts, address.key, max_body_bytes, OPEN_PATHS), metrics)
    info = {
        "url": address.url, "models": list(loaded.models), "slots": slots, "context": context,
        "dtype": loaded.dtype, "key": address.key is not None, "pid": os.getpid(), "notes": notes,
    }  # fmt: skip
    server = Server(app, lambda: on_ready(info), shutdown_timeout=SHUTDOWN_SECONDS)
    server.run(sockets=[address.socket])
    if engine.failed:
        raise RunError("the engine failed while decoding", fix="see the traceback above, and please report it")
    return server.signal


def _get_base(module: Any) -> Any:
    return module.get_base_model() if hasattr(module, "peft_config") else module


def _prepare(
    names: Sequence[str], slots: int, context: int | None, **options: Any
) -> tuple[LoadedModels, Decoder, int, int, list[str]]:
    """Return the models, their decoder, the number of slots that fit into memory, the context length, and notes."""
    loaded = load_models(names, **options)
    base = _get_base(loaded.module)
    notes = [*loaded.notes, *Sampling.notes_on_ignored_settings(base.generation_config)]
    if (sampling := Sampling.from_generation_config(base.generation_config)) != Sampling():
        notes.append(f"requests without sampling parameters: {sampling.describe()}, by the model's generation config")
    max_context = max_positions(base) or DEFAULT_MAX_CONTEXT
    if context is not None and context > max_context:
        raise InputError(f"--context {context}: the model supports {max_context} tokens", fix="give less")
    if context is None and max_context > DEFAULT_MAX_CONTEXT:
        notes.append(f"the context is {DEFAULT_MAX_CONTEXT:,} of the model's {max_context:,} tokens; --context sets it")
    context = context or min(max_context, DEFAULT_MAX_CONTEXT)
    reason = why_decoder_unsupported(loaded.module)
    fallback = HfDecoder(loaded.module, keep=EXTRA_CACHE_SLOTS * context) if reason else None
    if fallback:
        check_batching(fallback, loaded.module)
        notes.append(f"decodes with the slower forward method of transformers: {reason}")
    position_bytes = fallback.kv_bytes_per_position() if fallback else kv_bytes_per_position(loaded.module)
    slot_bytes = position_bytes * context
    max_slots = max(1, _free_bytes(next(base.parameters()).device) // 2 // slot_bytes)
    if max_slots < slots:
        notes.append(f"{max_slots} slots instead of {slots}: at {context} tokens each takes {slot_bytes:,} bytes")
        slots = max_slots
    decoder = fallback or CompiledDecoder(loaded.module, (slots + EXTRA_CACHE_SLOTS) * (context + BLOCK_SIZE))
    return loaded, decoder, slots, context, notes


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return probe().free_bytes
