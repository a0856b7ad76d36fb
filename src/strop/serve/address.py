"""The address that a server listens on, the host names that it answers to, and the server process. Needs no torch."""

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
from strop.serve.guard import HeaderTimeoutProtocol

KEY_VARIABLE = "STROP_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Address:
    """A bound socket. hosts: accepted values of the Host header. key: the API key; None if none is needed."""

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
    """Bind a port.

    Args:
        host: address to listen on.
        port: 0 for any free port.
        key: API key; None for the value of STROP_API_KEY.
        more_hosts: further host names that clients may use.

    Raises InputError if the port cannot be bound, the key is invalid, or other machines could connect without a key.
    """
    key = key if key is not None else os.environ.get(KEY_VARIABLE) or None
    if key is not None and (not key or not key.isascii() or any(character.isspace() for character in key)):
        raise InputError("--api-key: must be ASCII without spaces", fix="for example: openssl rand -hex 24")
    if host not in LOOPBACK and key is None:
        raise InputError(
            f"--host {host}: other machines could use this server without a key",
            fix=f"set {KEY_VARIABLE} (openssl rand -hex 24), or leave --host out",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()  # with SO_REUSEADDR, a second server could bind until this one listens
    except (OSError, OverflowError) as error:
        bound.close()
        raise InputError(
            f"--host {host} --port {port}: cannot be bound: {error}", fix="choose another --port"
        ) from None
    port = bound.getsockname()[1]
    names = {*LOOPBACK, host, *more_hosts}
    if host in ("0.0.0.0", "::"):
        interfaces = psutil.net_if_addrs().values()
        names |= {address.address.partition("%")[0] for addresses in interfaces for address in addresses}
    names = {f"[{name}]" if ":" in name and not name.startswith("[") else name.lower() for name in names}
    # without a port: names given by the user, because a proxy may listen on another port, and all names on port 80
    without_port = {name.lower() for name in more_hosts} | (names if port == 80 else set())
    return Address(host, port, key, frozenset(without_port | {f"{name}:{port}" for name in names}), bound)


class Server(uvicorn.Server):
    """uvicorn with a timeout for headers, and without re-raising signals.

    ready: called once the server accepts requests. closing_s: seconds that running requests have after a signal.
    """

    def __init__(self, app: Any, ready: Callable[[], None], *, closing_s: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=HeaderTimeoutProtocol,
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
        """Handle signals as uvicorn does, but do not raise them again after the shutdown."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.signal = sig
        super().handle_exit(sig, frame)
        if self.force_exit:  # Ctrl-C twice: requests are cut off on purpose, so no error is logged
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def exit_code(number: int) -> int:
    """Return the exit code after a signal: 130 after Ctrl-C, 0 after SIGTERM."""
    return 130 if number == signal.SIGINT else 0
