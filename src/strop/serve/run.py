"""`strop serve`: from the names of runs to a server that runs until it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import uvicorn

from strop.engine.answers.cache import BLOCK
from strop.engine.answers.decoder import Decoder, Reads, position_bytes
from strop.engine.answers.fits import unanswerable
from strop.engine.answers.text import Sampling
from strop.errors import InputError, RunError
from strop.machine.probe import probe
from strop.serve.app import Room, create_app
from strop.serve.decoder import PlainDecoder
from strop.serve.engine import Engine, engine_thread
from strop.serve.grammar import Grammars
from strop.serve.guard import Door, Rules
from strop.serve.metrics import Metrics
from strop.serve.models import Loaded, load_models

KEY_VARIABLE = "STROP_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LONGEST_CONTEXT = 4096  # unless asked for: a slot costs memory by its length
CLOSING_SECONDS = 5  # that running answers have after Ctrl-C


@dataclass(frozen=True)
class Address:
    """Where a server listens, and by which names it answers."""

    host: str
    port: int
    key: str | None
    hosts: frozenset[str]
    socket: socket.socket

    @property
    def url(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{'127.0.0.1' if name in ('0.0.0.0', '[::]') else name}:{self.port}"


def open_address(host: str, port: int, key: str | None, more_hosts: Sequence[str]) -> Address:
    """Binds the port. Raises InputError where it is taken, or others could reach it without a key."""
    key = key if key is not None else os.environ.get(KEY_VARIABLE) or None
    if key is not None and (not key or not key.isascii() or any(sign.isspace() for sign in key)):
        raise InputError("--api-key: must be plain characters without blanks", fix="for example: openssl rand -hex 24")
    if host not in LOOPBACK and key is None:
        raise InputError(
            f"--host {host}: others could use this server without a key",
            fix=f"set {KEY_VARIABLE} (openssl rand -hex 24), or leave --host out",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()  # at once: two that only bind do not see each other
    except (OSError, OverflowError) as error:
        bound.close()
        raise InputError(
            f"--host {host} --port {port}: cannot be bound: {error}", fix="choose another --port"
        ) from None
    port = bound.getsockname()[1]
    names = {*LOOPBACK, host, *more_hosts}
    if host in ("0.0.0.0", "::"):
        names |= {address.address.partition("%")[0] for found in psutil.net_if_addrs().values() for address in found}
    whole = {f"[{name}]" if ":" in name and not name.startswith("[") else name.lower() for name in names}
    given = {name.lower() for name in more_hosts} | (whole if port == 80 else set())  # a proxy's port is another
    return Address(host, port, key, frozenset(given | {f"{name}:{port}" for name in whole}), bound)


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
    app = create_app(room, Rules(address.hosts, address.key, max_body_bytes), metrics)
    about = {
        "url": address.url, "models": list(loaded.models), "slots": slots, "context": context,
        "key": address.key is not None, "pid": os.getpid(), "notes": notes,
    }  # fmt: skip
    options = uvicorn.Config(
        app,
        http=Door,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        limit_concurrency=512,
    )
    server = _Server(options, lambda: ready(about))
    server.run(sockets=[address.socket])
    if engine.failed:
        raise RunError("the engine failed while it answered", fix="see the traceback above, and please report it")
    return server.signal


def _base(module: Any) -> Any:
    return module.get_base_model() if hasattr(module, "peft_config") else module


def _prepare(
    names: Sequence[str], slots: int, context: int | None, **how: Any
) -> tuple[Loaded, Reads, int, int, list[str]]:
    """The models, what reads and writes with them, slots and context that memory has room for, and notes."""
    loaded = load_models(names, **how)
    base = _base(loaded.module)
    notes = list(loaded.notes)
    longest = int(getattr(base.config.get_text_config(), "max_position_embeddings", LONGEST_CONTEXT))
    if context is not None and context > longest:
        raise InputError(f"--context {context}: the model was made for {longest} tokens", fix="choose less")
    context = context or min(longest, LONGEST_CONTEXT)
    reason = unanswerable(loaded.module)
    plain = PlainDecoder(loaded.module, keep=2 * context) if reason else None
    if reason:
        notes.append(f"answers through transformers' own forward, which is slower: {reason}")
    position = plain.position_bytes() if plain else position_bytes(loaded.module)
    fitting = max(1, _free_bytes(next(base.parameters()).device) // 2 // (position * context))
    if fitting < slots:
        notes.append(f"{fitting} slots instead of {slots}: at {context} tokens each takes {position * context:,} bytes")
        slots = fitting
    decoder: Reads = plain or Decoder(loaded.module, (slots + 2) * (context + BLOCK))  # as much as 2 slots is kept
    return loaded, decoder, slots, context, notes


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready
        self.signal = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, which raises the signals again when all is closed; here they have had their effect."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.signal = sig
        super().handle_exit(sig, frame)
        if self.force_exit:  # Ctrl-C twice: what is cut off then is meant
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def exit_code(number: int) -> int:
    """A service that is told to end did what it was asked; Ctrl-C ends as everywhere."""
    return 130 if number == signal.SIGINT else 0


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return probe().free_bytes
