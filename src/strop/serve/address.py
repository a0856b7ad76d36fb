"""Where a server listens, by which names it answers, and how it runs until a signal comes; no torch."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import uvicorn

from strop.errors import InputError
from strop.serve.guard import Door

KEY_VARIABLE = "STROP_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


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


class Server(uvicorn.Server):
    """uvicorn behind the door. ready: called once requests can come. closing_s: time of running answers at the end."""

    def __init__(self, app: Any, ready: Callable[[], None], *, closing_s: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Door,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=closing_s,
                limit_concurrency=512,
            )
        )
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
