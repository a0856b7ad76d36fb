"""`strop serve`: from the names of runs to a server that runs until it is told to stop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from strop.engine.decode.cache import BLOCK
from strop.engine.decode.decoder import CompiledDecoder, Decoder, position_bytes, why_not_decoder
from strop.engine.decode.hf_fallback import HfDecoder, prove
from strop.engine.decode.sampling import Sampling
from strop.errors import InputError, RunError
from strop.machine.probe import probe
from strop.models.introspect import max_positions
from strop.serve.address import Address, Server
from strop.serve.app import OPEN, Room, create_app
from strop.serve.engine import Engine, Metrics, engine_thread
from strop.serve.grammar import Grammars
from strop.serve.guard import AccessRules
from strop.serve.models import Loaded, load_models

LONGEST_CONTEXT = 4096  # unless asked for: a slot costs memory by its length
CLOSING_SECONDS = 5  # that running answers have after Ctrl-C


def serve(
    names: Sequence[str],
    address: Address,
    *,
    slots: int,
    queue: int,
    context: int | None,
    max_body_bytes: int,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "auto",
    force: bool = False,
    ready: Callable[[dict[str, Any]], None],
) -> int:
    """Serves until a signal comes; gives its number. `ready` is called when requests can come.

    Raises ModelError for models that cannot be served together, RunError where the server failed.
    """
    thread = engine_thread()  # all that computes is done there, from the first weight on
    prepared = thread.submit(
        _prepare, names, slots, context, device=device, dtype=dtype, quantization=quantization, force=force
    )
    try:
        loaded, decoder, slots, context, notes = prepared.result()
    except BaseException:
        thread.shutdown(wait=False, cancel_futures=True)
        address.socket.close()  # nobody will be answered there
        raise
    base = _base(loaded.module)
    metrics = Metrics()
    # of the text config's own vocabulary, which embeddings may be padded beyond
    vocabulary = int(base.get_output_embeddings().weight.shape[0])
    engine = Engine(
        decoder, slots=slots, queue=queue, metrics=metrics, thread=thread,
        on_failure=lambda: setattr(server, "should_exit", True),
    )  # fmt: skip
    room = Room(
        engine=engine, models=loaded.models, sampling=Sampling.own(base.generation_config),
        grammars=Grammars(vocabulary), context=context, vocabulary=vocabulary, started=int(time.time()),
    )  # fmt: skip
    app = create_app(room, AccessRules(address.hosts, address.key, max_body_bytes, OPEN), metrics)
    about = {
        "url": address.url, "models": list(loaded.models), "slots": slots, "context": context,
        "key": address.key is not None, "pid": os.getpid(), "notes": notes,
    }  # fmt: skip
    server = Server(app, lambda: ready(about), closing_s=CLOSING_SECONDS)
    server.run(sockets=[address.socket])
    if engine.failed:
        raise RunError("the engine failed while it answered", fix="see the traceback above, and please report it")
    return server.signal


def _base(module: Any) -> Any:
    return module.get_base_model() if hasattr(module, "peft_config") else module


def _prepare(
    names: Sequence[str], slots: int, context: int | None, **how: Any
) -> tuple[Loaded, Decoder, int, int, list[str]]:
    """The models, what reads and writes with them, slots and context that memory has room for, and notes."""
    loaded = load_models(names, **how)
    base = _base(loaded.module)
    notes = [*loaded.notes, *Sampling.notes_on_ignored_settings(base.generation_config)]
    longest = max_positions(base) or LONGEST_CONTEXT
    if context is not None and context > longest:
        raise InputError(f"--context {context}: the model was made for {longest} tokens", fix="choose less")
    context = context or min(longest, LONGEST_CONTEXT)
    reason = why_not_decoder(loaded.module)
    plain = HfDecoder(loaded.module, keep=2 * context) if reason else None
    if plain:
        prove(plain, loaded.module)
        notes.append(f"answers through transformers' own forward, which is slower: {reason}")
    position = plain.position_bytes() if plain else position_bytes(loaded.module)
    fitting = max(1, _free_bytes(next(base.parameters()).device) // 2 // (position * context))
    if fitting < slots:
        notes.append(f"{fitting} slots instead of {slots}: at {context} tokens each takes {position * context:,} bytes")
        slots = fitting
    decoder: Decoder = plain or CompiledDecoder(
        loaded.module, (slots + 2) * (context + BLOCK)
    )  # as much as 2 slots is kept
    return loaded, decoder, slots, context, notes


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return probe().free_bytes
