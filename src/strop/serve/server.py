"""HTTP server: access checks, error bodies, and the address. Does not import torch.

Any web page in the user's browser can send requests to a server on 127.0.0.1: with a form or fetch (rejected by the
Origin and content type checks), or by DNS rebinding (rejected by the Host check, see CVE-2024-28224).
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import h11
import psutil
import uvicorn
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from strop.errors import InputError

HEAD_SECONDS = 15.0  # time to send the headers, from the start of the connection or the previous response
BODY_SECONDS = 30.0  # time to send the body
CLOSE_SECONDS = 2  # time that an endpoint has to end after its connection is closed, when the server stops
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Raised to respond with an error in OpenAI's format."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = error_body(status, message, code=code, param=param)


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return the JSON body of an error response in OpenAI's format."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class AccessRules:
    """Requirements of every request."""

    hosts: Collection[str]  # accepted values of the Host header, with port
    key: str | None  # the API key; None: not required
    max_body_bytes: int
    open_paths: Collection[str] = ()  # paths that need no key
    upload_bytes: Mapping[str, int] = field(default_factory=dict)  # maximum size of uploaded files, by path


class HeaderTimeoutProtocol(H11Protocol):
    """Closes connections that do not send complete headers in time, so that they cannot block all others.

    uvicorn discards the rest of a body whose request was answered early, such as a wrong key. If the connection were
    closed at once, a client that is still sending would get a reset in place of the response. The time for the next
    headers includes that for this rest.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _update_timer(self) -> None:
        answered_early = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        if self.conn.their_state is not h11.IDLE and not answered_early:  # in a request, or disconnected
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Guard:
    """ASGI middleware that enforces AccessRules. on_response: called with the path and status of each response."""

    def __init__(self, app: Any, rules: AccessRules, on_response: Callable[[str, int], None] | None = None) -> None:
        self._app, self._rules, self._on_response = app, rules, on_response

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *SECURITY_HEADERS]
                if self._on_response is not None:
                    self._on_response(scope["path"], message["status"])
            await send(message)

        if error := self._check(scope):
            await _send_error(send_with_headers, *error)
        else:
            await self._app(scope, self._limit(receive, scope["path"]), send_with_headers)

    def _check(self, scope: Any) -> tuple[int, str] | None:
        """Return (status, message) of an error; None if the request is allowed."""
        header_list = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        headers = dict(header_list)
        host = headers.get("host", "").lower()
        if host not in self._rules.hosts or sum(name == "host" for name, _ in header_list) != 1:
            return 403, "Host header not allowed (see --allow-host)"
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            return 403, "cross-origin requests are not allowed"
        if self._rules.key is not None and scope["path"] not in self._rules.open_paths:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            is_correct = hmac.compare_digest(key.encode("latin-1"), self._rules.key.encode())
            if scheme.lower() != "bearer" or not is_correct:
                return 401, "missing or invalid API key (Authorization: Bearer KEY)"
        if scope["method"] == "POST":
            content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            is_upload = scope["path"] in self._rules.upload_bytes
            expected = "application/octet-stream" if is_upload else "application/json"  # neither can be sent by a form
            if content_type != expected:
                return 415, f"the content type must be {expected}"
            length, max_bytes = headers.get("content-length", "0"), self._max_bytes(scope["path"])
            if length.isdigit() and int(length[:20]) > max_bytes:
                return 413, f"the body is larger than {max_bytes} bytes"
        return None

    def _max_bytes(self, path: str) -> int:
        return self._rules.upload_bytes.get(path, self._rules.max_body_bytes)

    def _limit(self, receive: Any, path: str) -> Any:
        """Wrap `receive` to limit the size of the body and the time that it, or each part of an upload, takes."""
        num_bytes, complete, max_bytes = 0, False, self._max_bytes(path)
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def limited() -> Any:
            nonlocal num_bytes, complete, deadline
            timeout = None if complete else deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), timeout)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if num_bytes > max_bytes:
                    raise HTTPException(413, f"the body is larger than {max_bytes} bytes")
                if path in self._rules.upload_bytes:
                    deadline = asyncio.get_running_loop().time() + BODY_SECONDS
            return message

        return limited


async def _send_error(send: Any, status: int, message: str) -> None:
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# --- address and process -------------------------------------------------------------------------------------------

KEY_VARIABLE = "STROP_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Address:
    """A bound socket, and the API key and Host headers that its server accepts."""

    host: str
    port: int
    key: str | None  # the API key; None: not required
    hosts: frozenset[str]  # accepted values of the Host header
    socket: socket.socket

    @property
    def url(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{'127.0.0.1' if name in ('0.0.0.0', '[::]') else name}:{self.port}"


def open_address(host: str, port: int, key: str | None, more_hosts: Sequence[str]) -> Address:
    """Bind a port, or any free port if it is 0.

    key: API key, by default the variable STROP_API_KEY. more_hosts: additional names of this machine. Raises InputError
    if the port cannot be bound, the key is invalid, or other machines could connect without a key.
    """
    key = key if key is not None else os.environ.get(KEY_VARIABLE) or None
    if key is not None and (not key or not key.isascii() or any(character.isspace() for character in key)):
        raise InputError("--api-key: must be ASCII without spaces", fix="for example: openssl rand -hex 24")
    if host not in LOOPBACK and key is None:
        fix = f"set {KEY_VARIABLE} (openssl rand -hex 24), or leave --host out"
        raise InputError(f"--host {host}: other machines could use this server without a key", fix=fix)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()  # with SO_REUSEADDR, another server could bind the same port until this one listens
    except (OSError, OverflowError) as error:
        bound.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            fix = f"give another one, such as --port {port + 1}, or --port 0 for any free one"
            raise InputError(f"--port {port}: another program uses this port", fix=fix) from None
        raise InputError(f"--host {host} --port {port}: cannot be bound: {error}", fix="use others") from None
    port = bound.getsockname()[1]
    names = {*LOOPBACK, host, *more_hosts}
    if host in ("0.0.0.0", "::"):
        interfaces = psutil.net_if_addrs().values()
        names |= {address.address.partition("%")[0] for addresses in interfaces for address in addresses}
    names = {f"[{name}]" if ":" in name and not name.startswith("[") else name.lower() for name in names}
    # browsers omit the port if it is 80; a proxy for the names in `more_hosts` may listen on another port
    without_port = {name.lower() for name in more_hosts} | (names if port == 80 else set())
    return Address(host, port, key, frozenset(without_port | {f"{name}:{port}" for name in names}), bound)


@contextmanager
def signal_handler(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM with `handler` until the `with` block ends."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


class Server(uvicorn.Server):
    """uvicorn with a timeout for headers; `signal` is the signal that stopped it.

    on_ready: called when the server accepts requests. shutdown_timeout: seconds that requests have to finish after a
    signal.
    """

    def __init__(self, app: Any, on_ready: Callable[[], None], *, shutdown_timeout: int) -> None:
        config = uvicorn.Config(
            app, http=HeaderTimeoutProtocol, ws="none", lifespan="on", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=15, limit_concurrency=512,
            timeout_graceful_shutdown=shutdown_timeout + CLOSE_SECONDS,
        )  # fmt: skip
        super().__init__(config)
        self._on_ready, self._shutdown_timeout, self.signal = on_ready, shutdown_timeout, 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.get_running_loop().call_later(self._shutdown_timeout, self._close_connections)
        await super().shutdown(sockets)
        closing.cancel()

    def _close_connections(self) -> None:
        """End responses that are still being sent, as if their clients had disconnected: streams may never end."""
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return signal_handler(self.handle_exit)  # uvicorn's method raises the signals again after the shutdown

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.signal = sig
        super().handle_exit(sig, frame)
        if self.force_exit:  # Ctrl-C twice aborts requests, which is not logged as an error
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def exit_code(number: int) -> int:
    """Return the exit code after a signal: 130 for SIGINT (Ctrl-C), else 0."""
    return 130 if number == signal.SIGINT else 0
