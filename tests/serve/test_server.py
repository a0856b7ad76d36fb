"""Connections without a complete request."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from strop.serve import server as http_server

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["method"] == "POST":  # answered before the body has arrived
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"no"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await asyncio.sleep(0.6)  # a response may take longer than the header timeout
    await send({"type": "http.response.body", "body": b"ok"})


def test_connection_without_complete_headers_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.3)

    async def closed_after(*sent: bytes, read: bytes = b"") -> float:
        """Return the seconds from the last piece sent, one each 0.1 s, to the end of the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in sent:
            writer.write(piece)
            await asyncio.sleep(0.1)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):  # closed while it is written to
            if read:
                await reader.readuntil(read)
                began = time.monotonic()
            await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return time.monotonic() - began

    async def measure() -> list[float]:
        nonlocal port
        config = uvicorn.Config(
            app, http=http_server.HeaderTimeoutProtocol, lifespan="off", log_config=None, timeout_keep_alive=5
        )
        config.load()
        loop, state = asyncio.get_running_loop(), ServerState()
        server = await loop.create_server(
            lambda: http_server.HeaderTimeoutProtocol(config=config, server_state=state, app_state={}), "127.0.0.1"
        )
        port = server.sockets[0].getsockname()[1]
        seconds = await asyncio.gather(
            closed_after(),
            closed_after(*[b"G", b"E", b"T", b" ", b"/"]),
            closed_after(HEAD),
            closed_after(HEAD + b"\r\n", read=b"ok"),
            closed_after(POST, *[b"x"] * 6, read=b"no"),
        )
        server.close()
        return list(seconds)

    port = 0
    empty, byte_by_byte, incomplete, answered, endless_body = asyncio.run(measure())
    assert empty < 2 and incomplete < 2 and answered < 2
    assert byte_by_byte < 0.1 and endless_body < 0.1  # closed before the last byte
