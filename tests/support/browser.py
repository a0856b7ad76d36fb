"""A real browser over a real `strop dash`: pages that remember their faults, and what axe-core says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.dash import TOKEN, Dash

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextmanager
def open_browser() -> Iterator[Any]:
    """Chromium, driven by playwright. Skips, with the reason, where one of them is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(PROGRAMS)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()


def at(dash: Dash, address: str) -> str:
    """The address of a screen, with the token: at(dash, "/run/one")."""
    return f"{dash.url}/#token={TOKEN}&{address}"


@dataclass
class Watched:
    """A tab that remembers what went wrong in it."""

    page: Any
    faults: list[str] = field(default_factory=list)

    def check(self, where: str) -> None:
        """Nothing to scroll sideways once plots have been drawn at the window's size, no error so far."""
        assert not self.faults, f"{where}: {self.faults}"
        for _ in range(100):
            wider = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
            if wider <= 0:
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"{where}: {wider} pixels too wide: {self.page.evaluate(WIDEST)}")

    def axe(self, where: str) -> None:
        """No serious finding of axe-core."""
        Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
        found = Axe().run(self.page).response["violations"]
        told = [
            (one["id"], one["help"], [node["html"][:200] for node in one["nodes"][:3]])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert not told, f"{where}: {json.dumps(told, indent=1)}"


WIDEST = """() => [...document.querySelectorAll("main *")]
  .filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
  .slice(0, 5).map((one) => one.outerHTML.slice(0, 160))"""


@contextmanager
def open_tab(browser: Any, dash: Dash, **options: Any) -> Iterator[Watched]:
    """A fresh tab: nothing is kept from others. Requests to elsewhere, errors and refusals of the CSP are faults."""
    context = browser.new_context(viewport=DESK, **options)
    page = context.new_page()
    watched = Watched(page)
    page.on("pageerror", lambda error: watched.faults.append(f"error: {error}"))
    page.on("console", lambda said: watched.faults.append(said.text) if said.type == "error" else None)
    own = (dash.url, "blob:" + dash.url)
    page.on("request", lambda asked: None if asked.url.startswith(own) else watched.faults.append(f"asked {asked.url}"))
    page.set_default_timeout(12_000)
    try:
        yield watched
    except BaseException:
        print("the page said:", page.locator("body").inner_text()[:3000])  # pytest shows it with the failure
        raise
    finally:
        context.close()
