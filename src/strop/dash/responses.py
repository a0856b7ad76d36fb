"""What the routes share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from starlette.responses import Response, StreamingResponse

from strop.dash.chat import Talk
from strop.dash.dashboard import Desk
from strop.dash.worker_process import Child


class Room:
    """The desk and the one thread that uses it, so that nothing need be locked; the workers; the server of models."""

    def __init__(self, root: Path, opened: str | None) -> None:
        self.desk = Desk(root)
        self.opened = opened
        self.planner, self.data = Child("plan"), Child("data")
        self.talk = Talk(self.desk.jobs)
        self._reader = ThreadPoolExecutor(1, "strop-dash-reader")

    async def ask(self, make: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What `make` gives, in the reader's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, partial(make, *arguments, **named))

    def close(self) -> None:
        """Ends the workers and the server of models; runs and exports go on."""
        self.planner.end()
        self.data.end()
        self.talk.close()
        self._reader.shutdown(cancel_futures=True)


def stream(events: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(events, media_type="text/event-stream")
