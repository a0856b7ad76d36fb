"""Access checks before routing: host, origin, API key, content type, body size and timeouts; error bodies.

Every web page that the user opens can send requests to a server on 127.0.0.1: with a form or fetch (stopped by the
checks of Origin and content type) and by DNS rebinding (stopped by the exact check of Host, see CVE-2024-28224). Needs
no torch.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import h11
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0  # from the start of a connection, or its last response, to the end of a request's headers
BODY_SECONDS = 30.0  # until a request's body has arrived
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Raised for a request that gets an error response in OpenAI's format."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = error_body(status, message, code=code, param=param)


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return the JSON body of an error response in OpenAI's format."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class AccessRules:
    """hosts: exact values of the Host header, with port. key: the API key; None if none is needed. open: paths that
    need no key, because they reveal nothing."""

    hosts: Collection[str]
    key: str | None
    max_body_bytes: int
    open: Collection[str] = ()


class HeaderTimeoutProtocol(H11Protocol):
    """Closes connections that do not send complete headers in time; a few hundred of them would block all others."""

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
        if self.conn.their_state is not h11.IDLE:  # the headers are complete, or the client has left
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Guard:
    """ASGI middleware that enforces AccessRules. on_response: called with path and status of each response."""

    def __init__(self, app: Any, rules: AccessRules, on_response: Callable[[str, int], None] | None = None) -> None:
        self._app, self._rules, self._on_response = app, rules, on_response

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"], *((name.encode(), value.encode()) for name, value in HEADERS.items())
                ]  # fmt: skip
                if self._on_response is not None:
                    self._on_response(scope["path"], message["status"])
            await send(message)

        error = self._check(scope)
        if error is not None:
            await _send_error(send_with_headers, *error)
            return
        await self._app(scope, self._limit(receive), send_with_headers)

    def _check(self, scope: Any) -> tuple[int, str] | None:
        """Return (status, message) of an error; None if the request is allowed."""
        fields = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        headers = dict(fields)
        host = headers.get("host", "").lower()
        if host not in self._rules.hosts or sum(name == "host" for name, _ in fields) != 1:
            return 403, "Host header not allowed (see --allow-host)"
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            return 403, "cross-origin requests are not allowed"
        if self._rules.key is not None and scope["path"] not in self._rules.open:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(key.encode("latin-1"), self._rules.key.encode())
            if scheme.lower() != "bearer" or not is_right:
                return 401, "missing or invalid API key (Authorization: Bearer KEY)"
        if scope["method"] == "POST":
            content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            if content_type != "application/json":
                return 415, "the content type must be application/json"
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length[:20]) > self._rules.max_body_bytes:
                return 413, _too_large(self._rules)
        return None

    def _limit(self, receive: Any) -> Any:
        """Wrap `receive` with a limit of the body's size and a timeout."""
        num_bytes, complete = 0, False
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def limited() -> Any:
            nonlocal num_bytes, complete
            timeout = None if complete else deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), timeout)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if num_bytes > self._rules.max_body_bytes:
                    raise HTTPException(413, _too_large(self._rules))
            return message

        return limited


def _too_large(rules: AccessRules) -> str:
    return f"the body is larger than {rules.max_body_bytes} bytes"


async def _send_error(send: Any, status: int, message: str) -> None:
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # the request's body may still be arriving
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
