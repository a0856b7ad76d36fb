"""`strop serve`: load the models, choose the decoder, and run the server until a signal arrives."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from strop.engine.decode.cache import BLOCK_SIZE
from strop.engine.decode.decoder import CompiledDecoder, Decoder, kv_bytes_per_position, why_not_decoder
from strop.engine.decode.hf_fallback import HfDecoder, check_batching
from strop.engine.decode.sampling import Sampling
from strop.errors import InputError, RunError
from strop.machine.probe import probe
from strop.models.introspect import max_positions
from strop.serve.app import OPEN_PATHS, ServerState, create_app
from strop.serve.engine import Engine, Metrics, engine_thread
from strop.serve.models import Grammars, LoadedModels, load_models
from strop.serve.server import AccessRules, Address, Server

LONGEST_CONTEXT = 4096  # by default: the memory of a slot grows with its context
CLOSING_SECONDS = 5  # that running requests have after Ctrl-C
KEPT_SLOTS = 2  # whose positions the cache holds beyond the slots, for shared prefixes


def serve(
    names: Sequence[str], address: Address, *, slots: int, queue: int, context: int | None, max_body_bytes: int,
    device: str = "auto", dtype: str = "auto", quantization: str = "auto", force: bool = False,
    ready: Callable[[dict[str, Any]], None],
) -> int:  # fmt: skip
    """Serve models until a signal arrives, and return its number. ready: called when requests are accepted.

    Raises ModelError if the models cannot be served together, RunError if the engine failed.
    """
    thread = engine_thread()  # does all computation, from loading on
    future = thread.submit(
        _prepare, names, slots, context, device=device, dtype=dtype, quantization=quantization, force=force
    )
    try:
        prepared = future.result()
    except BaseException:
        thread.shutdown(wait=False, cancel_futures=True)
        address.socket.close()
        raise
    loaded, context = prepared.loaded, prepared.context
    base = _base(loaded.module)
    metrics = Metrics()
    vocabulary = int(base.get_output_embeddings().weight.shape[0])  # embeddings may be padded beyond the config's
    engine = Engine(
        prepared.decoder, slots=prepared.slots, queue=queue, metrics=metrics, thread=thread,
        on_failure=lambda: setattr(server, "should_exit", True),
    )  # fmt: skip
    state = ServerState(
        engine=engine, models=loaded.models, sampling=Sampling.from_generation_config(base.generation_config),
        grammars=Grammars(vocabulary), context=context, vocabulary=vocabulary, started=int(time.time()),
    )  # fmt: skip
    app = create_app(state, AccessRules(address.hosts, address.key, max_body_bytes, OPEN_PATHS), metrics)
    about = {
        "url": address.url, "models": list(loaded.models), "slots": prepared.slots, "context": context,
        "key": address.key is not None, "pid": os.getpid(), "notes": prepared.notes,
    }  # fmt: skip
    server = Server(app, lambda: ready(about), shutdown_timeout=CLOSING_SECONDS)
    server.run(sockets=[address.socket])
    if engine.failed:
        raise RunError("the engine failed while decoding", fix="see the traceback above, and please report it")
    return server.signal


@dataclass(frozen=True)
class _Prepared:
    loaded: LoadedModels
    decoder: Decoder
    slots: int  # lowered to what fits into memory
    context: int
    notes: list[str]


def _base(module: Any) -> Any:
    return module.get_base_model() if hasattr(module, "peft_config") else module


def _prepare(names: Sequence[str], slots: int, context: int | None, **options: Any) -> _Prepared:
    loaded = load_models(names, **options)
    base = _base(loaded.module)
    notes = [*loaded.notes, *Sampling.notes_on_ignored_settings(base.generation_config)]
    longest = max_positions(base) or LONGEST_CONTEXT
    if context is not None and context > longest:
        raise InputError(f"--context {context}: the model supports {longest} tokens", fix="give less")
    context = context or min(longest, LONGEST_CONTEXT)
    reason = why_not_decoder(loaded.module)
    fallback = HfDecoder(loaded.module, keep=KEPT_SLOTS * context) if reason else None
    if fallback:
        check_batching(fallback, loaded.module)
        notes.append(f"decodes with transformers' own forward, which is slower: {reason}")
    position_bytes = fallback.kv_bytes_per_position() if fallback else kv_bytes_per_position(loaded.module)
    slot_bytes = position_bytes * context
    max_slots = max(1, _free_bytes(next(base.parameters()).device) // 2 // slot_bytes)
    if max_slots < slots:
        notes.append(f"{max_slots} slots instead of {slots}: at {context} tokens each takes {slot_bytes:,} bytes")
        slots = max_slots
    decoder = fallback or CompiledDecoder(loaded.module, (slots + KEPT_SLOTS) * (context + BLOCK_SIZE))
    return _Prepared(loaded, decoder, slots, context, notes)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return probe().free_bytes
