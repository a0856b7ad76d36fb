"""Talking to base and tuned: `strop serve` as a child, with a key that only this server has; requests are passed on."""

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

from strop.dash.files import joined, parted, read_bytes
from strop.dash.http import Busy
from strop.dash.jobs import Jobs
from strop.errors import RunError
from strop.serve.address import KEY_VARIABLE

TIMEOUT_S = 600.0  # a long answer on a slow CPU
GONE = {
    "kind": "Killed", "message": "the server of models has ended, and was not stopped from here",
    "fix": "start it again; if memory ran out, end other programs before", "where": [],
}  # fmt: skip


class Talk:
    """At most one server of models: a model takes much memory. Its state is its job's, whoever started it."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._own: str | None = None

    def start(self, names: list[str]) -> dict[str, Any]:
        """names: as `strop serve` takes them. The server before, if any, is ended."""
        self.stop()
        key = secrets.token_urlsafe(24)
        job = self._jobs.start("serve", ["serve", *names, "--port=0"], joined(names), {KEY_VARIABLE: key})
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
        """Ends the server that was started here; that of another page on the same folder goes on."""
        if self._own is not None:
            self._jobs.stop(self._own)

    def about(self) -> dict[str, Any]:
        """off, starting, ready or failed; which models there are."""
        last = next((job for job in self._jobs.all() if job["kind"] == "serve"), None)
        told: dict[str, Any] = {"state": "off", "models": [], "names": [], "error": None, "log": "", "job": None}
        if last is None:
            return told
        about = self._jobs.about(last["id"])
        ready = about["result"] if about["error"] is None else None
        told |= {
            "job": last["id"],
            "names": parted(str(about["run"] or "")),
            "log": self._jobs.log(last["id"])[0][-4000:],
        }
        if about["state"] == "running":
            about_models = {"models": ready["models"], "context": ready.get("context")} if ready else {}
            return {**told, "state": "ready" if ready else "starting", **about_models}
        if about["asked"] is None:
            return {**told, "state": "failed", "error": about["error"] or GONE}
        return told

    def where(self) -> tuple[str, int, str]:
        """Host, port and key of the server. Raises Busy where there is none."""
        about = self.about()
        if about["state"] != "ready":
            raise Busy(f"no model is being served: {about['state']}", fix="start one first")
        url = urlsplit(str(self._jobs.about(about["job"])["result"]["url"]))
        key = read_bytes(self._jobs.folder(about["job"]) / "key", 0, 200).decode()
        return str(url.hostname), int(url.port or 80), key


async def pass_on(
    where: tuple[str, int, str], method: str, path: str, body: bytes
) -> tuple[int, str, AsyncIterator[bytes]]:
    """Status, content type and body of what the server of models answers. Raises RunError where it does not."""
    host, port, key = where
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    try:
        await asyncio.to_thread(connection.request, method, path, body or None, headers)
        response = await asyncio.to_thread(connection.getresponse)
    except OSError as error:
        connection.close()
        raise RunError(f"the model's server does not answer: {error}", fix="see its log") from None

    async def parts() -> AsyncIterator[bytes]:
        try:
            while part := await asyncio.to_thread(response.read1, 1 << 16):
                yield part
        except (OSError, http.client.HTTPException):  # it ended in the middle; the reader sees an answer without end
            return
        finally:  # the model stops writing when its reader is gone
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()

    return response.status, response.getheader("content-type") or "application/json", parts()
