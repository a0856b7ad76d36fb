"""Connections that bring no request."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from strop.serve import guard

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await asyncio.sleep(0.6)  # an answer may take longer than a head
    await send({"type": "http.response.body", "body": b"ok"})


def test_a_connection_without_a_whole_head_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HEAD_SECONDS", 0.3)

    async def closed_after(*sent: bytes, read: bytes = b"") -> float:
        """Seconds from the last of what is sent, a piece each 0.1 s, to the end of the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in sent:
            writer.write(piece)
            await asyncio.sleep(0.1)
        if read:
            await reader.readuntil(read)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):  # it ended while it was being written to
            await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return time.monotonic() - began

    async def all_kinds() -> list[float]:
        nonlocal port
        config = uvicorn.Config(app, http=guard.Door, lifespan="off", log_config=None, timeout_keep_alive=5)
        config.load()
        loop, state = asyncio.get_running_loop(), ServerState()
        made = await loop.create_server(
            lambda: guard.Door(config=config, server_state=state, app_state={}), "127.0.0.1"
        )
        port = made.sockets[0].getsockname()[1]
        found = await asyncio.gather(
            closed_after(),
            closed_after(*[b"G", b"E", b"T", b" ", b"/"]),
            closed_after(HEAD),
            closed_after(HEAD + b"\r\n", read=b"ok"),
        )
        made.close()
        return list(found)

    port = 0
    bare, drop_by_drop, half, answered = asyncio.run(all_kinds())
    assert bare < 2 and half < 2 and answered < 2
    assert drop_by_drop < 0.1  # it had ended already
