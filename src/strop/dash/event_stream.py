"""What changes, as server-sent events: files are looked at again and again, as long as somebody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from strop.dash.dashboard import Desk, Seen
from strop.dash.http import event
from strop.dash.runs import aged
from strop.errors import StropError

LOOK_S = 1.0
TABLE_S = 3.0
SYSTEM_S = 2.0
QUIET_S = 15.0  # a comment then, so that a lost connection is noticed
MOVING = (
    "heartbeat", "updated", "step", "loss", "eval_loss", "tokens", "tokens_per_s", "seconds_left", "sparkline", "epoch",
    "bytes",
)  # fmt: skip

Ask = Callable[..., Awaitable[Any]]


async def table(desk: Desk, ask: Ask) -> AsyncIterator[bytes]:
    """All runs, then those that changed."""
    sent: dict[str, dict[str, Any]] = {}
    quiet = 0.0
    while True:
        rows = await ask(desk.runs)  # nothing but the dates of files, where nothing has changed
        now = {row["name"]: row for row in rows}
        if not sent and quiet == 0.0:
            yield event("runs", {"runs": [aged(row) for row in rows]})
        else:
            changed = [aged(row) for name, row in now.items() if sent.get(name) != row]
            gone = [name for name in sent if name not in now]
            if changed or gone:
                yield event("changed", {"runs": changed, "gone": gone})
                quiet = 0.0
        sent = now
        quiet += TABLE_S
        if quiet > QUIET_S:
            yield b": .\n\n"
            quiet = TABLE_S
        await asyncio.sleep(TABLE_S)


async def run(desk: Desk, ask: Ask, name: str, by: str, points: int) -> AsyncIterator[bytes]:
    """One run: what it is, its curves, then what is added to them; the machine."""
    seen: Seen | None = None
    before: Any = None
    looked = SYSTEM_S
    while True:
        try:
            now = await ask(_about, desk, name)
            if now != before:
                yield event("run", await ask(desk.detail, name))
                before = now
            kind, news, seen = await ask(desk.news, name, by, points, seen)
            if news is not None:
                yield event(kind, news)
            looked += LOOK_S
            if looked >= SYSTEM_S:
                yield event("system", await ask(desk.look, name))
                looked = 0.0
        except StropError as error:
            yield event("gone", {"error": error.as_json()})
            return
        await asyncio.sleep(LOOK_S)


def _about(desk: Desk, name: str) -> Any:
    """What the page shows besides the curves; steps alone are no reason to send it all again."""
    row = desk.row(name)
    jobs = [(job["id"], job["state"]) for job in desk.jobs_of(name)]
    saves = desk.history(name).num_saves
    return {key: value for key, value in row.items() if key not in MOVING}, saves, jobs


async def job(desk: Desk, ask: Ask, name: str) -> AsyncIterator[bytes]:
    """One job and what it writes, up to its end."""
    before: Any = None
    place, quiet = None, 0.0
    while True:
        about = await ask(desk.jobs.about, name)
        text, place = await ask(desk.jobs.log, name, place)
        quiet = 0.0 if text or about != before else quiet + LOOK_S
        if text:
            yield event("log", {"text": text})
        if about != before:
            yield event("job", about)
            before = about
        if quiet >= QUIET_S:
            yield b": .\n\n"
            quiet = 0.0
        if about["state"] != "running":
            return
        await asyncio.sleep(LOOK_S)
