"""Worker processes that plan or read data for the server, which stays small; one JSON object per line in and out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from strop.dash.jobs import TOKEN_VARIABLE
from strop.errors import InputError, RunError, StropError, Where
from strop.runs.child_env import safe_path_env

IDLE_S = 600.0
LONGEST_LINE = 256 << 20


def main() -> None:
    """Serve plans and rows until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keep output printed by libraries out of the protocol
    from strop.dash.previews import DataReader, Planner, schema  # which the server, importing this module, must not

    methods: dict[str, Callable[..., Any]] = {"plan": Planner().plan, "schema": schema, "rows": DataReader().rows}
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
        answers.write(text + "\n")
        answers.flush()


class Worker:
    """The server's side of a worker: started on first use, ended when idle. Requests are sent one at a time."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._idle: asyncio.TimerHandle | None = None

    async def ask(self, method: str, **parameters: Any) -> Any:
        """Return the result of a method. Raises InputError as the CLI does, RunError if the worker failed."""
        async with self._lock:
            if self._idle is not None:
                self._idle.cancel()
            process = self._process
            if process is None or process.returncode is not None:
                process = self._process = await self._start()
            assert process.stdin is not None and process.stdout is not None
            line = json.dumps({"method": method, "parameters": parameters}) + "\n"
            try:
                process.stdin.write(line.encode())
                await process.stdin.drain()
                answer = await process.stdout.readline()
            except (ConnectionError, ValueError):  # it has ended, or its answer is too long
                answer = b""
            except asyncio.CancelledError:  # otherwise the next request would read this answer
                self.end()
                raise
            if not answer.endswith(b"\n"):
                self.end()
                raise RunError(f"the {self._kind} worker has ended", fix="ask again; the terminal says why")
            self._idle = asyncio.get_running_loop().call_later(IDLE_S, self.end)
        result = json.loads(answer)
        if "error" in result:
            error = result["error"]
            kind: type[StropError] = InputError if result["exit"] == InputError.exit_code else RunError
            raise kind(error["message"], fix=error["fix"], where=[Where(**place) for place in error["where"]])
        return result["result"]

    async def _start(self) -> asyncio.subprocess.Process:
        own = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "strop.dash.worker", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, limit=LONGEST_LINE, env={**own, **safe_path_env()},
        )  # fmt: skip

    def end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._process = None


if __name__ == "__main__":
    main()
