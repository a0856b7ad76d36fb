"""The door: who may ask, and how much. Before any routing, and around every answer.

A server on 127.0.0.1 is reachable from every web page its user opens: by a form or a fetch (answered by the checks of
Origin and content type) and by DNS rebinding (answered by the exact check of Host, as after CVE-2024-28224).
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

from strop.serve.guard import error_body

HEAD_SECONDS = 15.0  # from a connection's start, or its last answer, to the end of a request's headers
BODY_SECONDS = 30.0  # a request must have arrived by then
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


@dataclass(frozen=True)
class AccessRules:
    """hosts: exact values of the Host header, with port. key: None where none is asked for. open: paths that need no
    key, since they tell nothing."""

    hosts: Collection[str]
    key: str | None
    max_body_bytes: int
    open: Collection[str] = ()


class Door(H11Protocol):
    """Closes connections that bring no whole head of a request in time: a few hundred would lock everyone out."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # their request is here, or they are gone
            self._stop_watching()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Guard:
    """ASGI middleware. answered: called with path and status of each answer."""

    def __init__(self, app: Any, rules: AccessRules, answered: Callable[[str, int], None] | None = None) -> None:
        self._app, self._rules, self._answered = app, rules, answered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"], *((name.encode(), value.encode()) for name, value in HEADERS.items())
                ]  # fmt: skip
                if self._answered is not None:
                    self._answered(scope["path"], message["status"])
            await send(message)

        refused = self._refuses(scope)
        if refused is not None:
            await _error(answer, *refused)
            return
        await self._app(scope, self._limited(receive), answer)

    def _refuses(self, scope: Any) -> tuple[int, str] | None:
        """(status, why), or None for a request that may come in."""
        fields = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        headers = dict(fields)
        host = headers.get("host", "").lower()
        if host not in self._rules.hosts or sum(name == "host" for name, _ in fields) != 1:
            return 403, "this server does not answer to that Host (see --allow-host)"
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            return 403, "requests from other sites' pages are refused"
        if self._rules.key is not None and scope["path"] not in self._rules.open:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.encode("latin-1"), self._rules.key.encode())
            if scheme.lower() != "bearer" or not right:
                return 401, "no API key, or not the right one (Authorization: Bearer KEY)"
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return 415, "the content type must be application/json"
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length[:20]) > self._rules.max_body_bytes:
                return 413, _too_large(self._rules)
        return None

    def _limited(self, receive: Any) -> Any:
        """`receive` that counts the body's bytes, and waits for them only so long."""
        arrived, whole = 0, False
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def limited() -> Any:
            nonlocal arrived, whole
            left = None if whole else deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), left)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
            if message["type"] == "http.request":
                arrived += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if arrived > self._rules.max_body_bytes:
                    raise HTTPException(413, _too_large(self._rules))
            return message

        return limited


def _too_large(rules: AccessRules) -> str:
    return f"the body is larger than {rules.max_body_bytes} bytes"


async def _error(send: Any, status: int, why: str) -> None:
    body = json.dumps(error_body(status, why)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # the body may still be on its way
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
