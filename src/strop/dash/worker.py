"""Worker processes that make plans and read data, so that the server uses little memory.

A worker reads a request and writes a response, both as one JSON object per line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from strop.dash.jobs import TOKEN_VARIABLE
from strop.errors import InputError, Location, RunError, StropError
from strop.runs.child_env import safe_path_env

IDLE_S = 600.0
MAX_LINE_BYTES = 256 << 20


def main() -> None:
    """Answer requests until the input ends."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keep output printed by libraries out of the protocol
    from strop.api import check_inputs  # these are not imported by the server, to save memory
    from strop.dash.previews import DataReader, Planner, schema

    reader = DataReader()
    methods: dict[str, Callable[..., Any]] = {
        "plan": Planner().plan, "schema": schema, "rows": reader.rows, "held_out": reader.held_out,
        "check_inputs": check_inputs,
    }  # fmt: skip
    for line in sys.stdin:
        request = json.loads(line)
        result: dict[str, Any]
        try:
            result = {"result": methods[request["method"]](**request["parameters"])}
        except StropError as error:
            result = {"error": error.as_json(), "exit": error.exit_code}
        except Exception as error:  # a bug in strop or a library must not end the worker
            details = {"kind": "InternalError", "message": f"{type(error).__name__}: {error}", "where": []}
            result = {"error": {**details, "fix": "please report it"}, "exit": 1}
        text = json.dumps(result, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")
        try:
            output.write(text + "\n")
            output.flush()
        except BrokenPipeError:  # the server was killed
            os._exit(1)


class Worker:
    """Client of a worker process, which starts on first use and ends when idle. Sends one request at a time."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._idle_timer: asyncio.TimerHandle | None = None

    async def call(self, method: str, **parameters: Any) -> Any:
        """Call a method and return its result. Raises InputError for invalid options, RunError for other errors."""
        async with self._lock:
            if self._idle_timer is not None:
                self._idle_timer.cancel()
            process = self._process
            if process is None or process.returncode is not None:
                process = self._process = await self._start()
            assert process.stdin is not None and process.stdout is not None
            line = json.dumps({"method": method, "parameters": parameters}) + "\n"
            try:
                process.stdin.write(line.encode())
                await process.stdin.drain()
                response = await process.stdout.readline()
            except (ConnectionError, ValueError):  # the worker has ended, or its response is too long
                response = b""
            except asyncio.CancelledError:  # otherwise the next request would read this response
                self.stop()
                raise
            if not response.endswith(b"\n"):
                self.stop()
                raise RunError(f"the {self._kind} worker has ended", fix="try again; the terminal shows the reason")
            self._idle_timer = asyncio.get_running_loop().call_later(IDLE_S, self.stop)
        result = json.loads(response)
        if "error" in result:
            error = result["error"]
            kind: type[StropError] = InputError if result["exit"] == InputError.exit_code else RunError
            raise kind(error["message"], fix=error["fix"], where=[Location(**place) for place in error["where"]])
        return result["result"]

    async def _start(self) -> asyncio.subprocess.Process:
        inherited = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "strop.dash.worker", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, limit=MAX_LINE_BYTES, env={**inherited, **safe_path_env()},
            start_new_session=True,  # Ctrl-C in the terminal is for the server, which ends the worker
        )  # fmt: skip

    def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._process = None


if __name__ == "__main__":
    main()
