"""Chat with base and tuned through a child `strop serve`, whose key only this server knows."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import secrets
import socket
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from strop.dash.files import join_names, read_bytes, split_names
from strop.dash.http import Busy
from strop.dash.jobs import Jobs
from strop.errors import RunError
from strop.serve.server import KEY_VARIABLE

TIMEOUT_S = 600.0  # seconds; a long answer on a slow CPU
GONE = {
    "kind": "Killed", "message": "the chat server ended without being stopped from here",
    "fix": "start it again; if memory ran out, close other programs first", "where": [],
}  # fmt: skip


class ChatServer:
    """At most one `strop serve`, because models take much memory. Its state is that of its job."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._own: str | None = None

    def start(self, names: list[str]) -> dict[str, Any]:
        """Start `strop serve` with these names, and stop the previous server."""
        self.stop()
        key = secrets.token_urlsafe(24)
        job = self._jobs.start("serve", ["serve", *names, "--port=0"], join_names(names), {KEY_VARIABLE: key})
        self._own = job["id"]
        file = self._jobs.folder(job["id"]) / "key"
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(key)
        return self.about()

    def stop(self) -> dict[str, Any]:
        for job in self._jobs.running("serve"):
            self._jobs.stop(job["id"])
        return self.about()

    def close(self) -> None:
        """Stop the server if this process started it."""
        if self._own is not None:
            self._jobs.stop(self._own)

    def about(self) -> dict[str, Any]:
        """Return the state (off, starting, ready, failed) and the models."""
        last = next((job for job in self._jobs.all() if job["kind"] == "serve"), None)
        result: dict[str, Any] = {"state": "off", "models": [], "names": [], "error": None, "log": "", "job": None}
        if last is None:
            return result
        about = self._jobs.about(last["id"])
        ready = about["result"] if about["error"] is None else None
        result |= {
            "job": last["id"],
            "names": split_names(str(about["run"] or "")),
            "log": self._jobs.log(last["id"])[0][-4000:],
        }
        if about["state"] == "running":
            about_models = {"models": ready["models"], "context": ready.get("context")} if ready else {}
            return {**result, "state": "ready" if ready else "starting", **about_models}
        if about["asked"] is None:
            return {**result, "state": "failed", "error": about["error"] or GONE}
        return result

    def where(self) -> tuple[str, int, str]:
        """Return host, port and key of the server. Raises Busy if none is ready."""
        about = self.about()
        if about["state"] != "ready":
            raise Busy(f"no model is being served: {about['state']}", fix="start one first")
        url = urlsplit(str(self._jobs.about(about["job"])["result"]["url"]))
        key = read_bytes(self._jobs.folder(about["job"]) / "key", 0, 200).decode()
        return str(url.hostname), int(url.port or 80), key


async def forward(
    where: tuple[str, int, str], method: str, path: str, body: bytes
) -> tuple[int, str, AsyncIterator[bytes]]:
    """Forward a request; return status, content type and body. Raises RunError if the server does not respond."""
    host, port, key = where
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    try:
        await asyncio.to_thread(connection.request, method, path, body or None, headers)
        response = await asyncio.to_thread(connection.getresponse)
    except OSError as error:
        connection.close()
        raise RunError(f"the chat server does not respond: {error}", fix="see its log") from None

    async def parts() -> AsyncIterator[bytes]:
        try:
            while part := await asyncio.to_thread(response.read1, 1 << 16):
                yield part
        except (OSError, http.client.HTTPException):  # the response was cut off; the reader sees it end early
            return
        finally:  # stops generation when the reader disconnects
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()

    return response.status, response.getheader("content-type") or "application/json", parts()
