"""The server's side of a worker: started when first asked, ended after a while of quiet."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from typing import Any

from strop.dash.jobs import TOKEN_VARIABLE
from strop.errors import InputError, RunError, StropError, Where
from strop.runs.child_env import safe_path_env

IDLE_S = 600.0
LONGEST_LINE = 256 << 20


class Child:
    """One worker; requests go to it one after the other."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._idle: asyncio.TimerHandle | None = None

    async def ask(self, method: str, **parameters: Any) -> Any:
        """The method's result. Raises InputError as the CLI would, RunError where the worker failed."""
        async with self._turn:
            if self._idle is not None:
                self._idle.cancel()
            process = self._process
            if process is None or process.returncode is not None:
                process = self._process = await self._start()
            assert process.stdin is not None and process.stdout is not None
            line = json.dumps({"method": method, "parameters": parameters}) + "\n"
            answer = b""
            try:
                process.stdin.write(line.encode())
                await process.stdin.drain()
                answer = await process.stdout.readline()
            except (ConnectionError, ValueError):  # it has ended, or said more than a page can show
                pass
            except asyncio.CancelledError:  # its answer would be taken for the next one's
                self.end()
                raise
            if not answer.endswith(b"\n"):
                self.end()
                raise RunError(f"the {self._kind} worker has ended", fix="ask again; the terminal says why")
            self._idle = asyncio.get_running_loop().call_later(IDLE_S, self.end)
        told = json.loads(answer)
        if "error" in told:
            raise _error(told)
        return told["result"]

    async def _start(self) -> asyncio.subprocess.Process:
        own = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "strop.dash.worker", self._kind, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, limit=LONGEST_LINE, env={**own, **safe_path_env()},
        )  # fmt: skip

    def end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._process = None


def _error(told: dict[str, Any]) -> StropError:
    error = told["error"]
    kind: type[StropError] = InputError if told["exit"] == InputError.exit_code else RunError
    return kind(error["message"], fix=error["fix"], where=[Where(**place) for place in error["where"]])
