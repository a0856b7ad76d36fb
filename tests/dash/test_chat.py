"""Requests forwarded to the chat server, and what happens when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from strop.dash.jobs import ChatServer, Jobs, forward
from strop.errors import RunError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def test_disconnect_stops_the_generation() -> None:
    requests: list[bytes] = []
    gone = asyncio.Event()

    async def model(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(2))
        writer.write(HEAD + b"6\r\ndata: \r\n")
        await writer.drain()
        with contextlib.suppress(ConnectionError):
            await reader.read()  # until the connection is closed
        gone.set()
        writer.close()

    async def story() -> tuple[int, str, bytes]:
        server = await asyncio.start_server(model, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        status, kind, parts = await forward(("127.0.0.1", port, "the-key"), "POST", "/v1/x", b"{}")
        first = await anext(parts)
        await parts.aclose()  # type: ignore[attr-defined]
        await asyncio.wait_for(gone.wait(), 10)
        server.close()
        return status, kind, first

    assert asyncio.run(story()) == (200, "text/event-stream", b"data: ")
    assert b"authorization: Bearer the-key" in requests[0].lower().replace(b"bearer", b"Bearer") and requests[
        0
    ].endswith(b"{}")


@pytest.mark.parametrize("killed", [True, False])
def test_server_that_ends_by_itself_has_failed(killed: bool, tmp_path: Path) -> None:
    folder = tmp_path / ".dash" / "jobs" / "20260101-000000-serve-abcdef"
    folder.mkdir(parents=True)
    (folder / "out").write_text('{"url": "http://127.0.0.1:9", "models": ["one", "base"]}')
    (folder / "log").write_text("serving  http://127.0.0.1:9\n")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        about = {"id": folder.name, "kind": "serve", "run": "runs/c\\,d", "pid": child.pid, "started": 1.0}
        (folder / "job.json").write_text(json.dumps({**about, "born": psutil.Process(child.pid).create_time()}))
        chat = ChatServer(Jobs(tmp_path))
        assert chat.status()["state"] == "ready" and chat.status()["names"] == ["runs/c,d"]
        child.kill() if killed else chat.stop()
    result = chat.status()
    assert result["state"] == ChatServer(Jobs(tmp_path)).status()["state"] == ("failed" if killed else "off")
    assert not killed or "without being stopped" in result["error"]["message"]


def test_unreachable_server_raises() -> None:
    with pytest.raises(RunError, match="does not respond"):
        asyncio.run(forward(("127.0.0.1", 9, "key"), "GET", "/v1/models", b""))
