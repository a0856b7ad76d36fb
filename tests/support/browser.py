"""A real browser on a real `strop dash`: tabs that record their errors, and checks with axe-core."""

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
    """Start Chromium with playwright. Skips the test with the reason if one of them is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(PROGRAMS)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()


def at(dash: Dash, address: str) -> str:
    """Return the address of a screen with the token: at(dash, "/run/one")."""
    return f"{dash.url}/#token={TOKEN}&{address}"


@dataclass
class Watched:
    """A tab that records errors, failed requests and CSP violations."""

    page: Any
    faults: list[str] = field(default_factory=list)

    def check(self, where: str) -> None:
        """Check that nothing scrolls sideways after plots have been resized, and that there was no error."""
        assert not self.faults, f"{where}: {self.faults}"
        for _ in range(100):
            wider = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
            if wider <= 0:
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"{where}: {wider} pixels too wide: {self.page.evaluate(WIDEST)}")

    def axe(self, where: str) -> None:
        """Check that axe-core has no serious finding."""
        Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
        result = Axe().run(self.page).response["violations"]
        violations = [
            (one["id"], one["help"], [node["html"][:200] for node in one["nodes"][:3]])
            for one in result
            if one["impact"] in ("serious", "critical")
        ]
        assert not violations, f"{where}: {json.dumps(violations, indent=1)}"


WIDEST = """() => [...document.querySelectorAll("main *")]
  .filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
  .slice(0, 5).map((one) => one.outerHTML.slice(0, 160))"""


@contextmanager
def open_tab(browser: Any, dash: Dash, **options: Any) -> Iterator[Watched]:
    """Open a tab in a new context, and record requests to other origins, errors and CSP violations."""
    context = browser.new_context(viewport=DESK, **options)
    page = context.new_page()
    watched = Watched(page)
    page.on("pageerror", lambda error: watched.faults.append(f"error: {error}"))
    page.on("console", lambda message: watched.faults.append(message.text) if message.type == "error" else None)
    own = (dash.url, "blob:" + dash.url)
    page.on(
        "request",
        lambda request: None if request.url.startswith(own) else watched.faults.append(f"asked {request.url}"),
    )
    page.set_default_timeout(12_000)
    try:
        yield watched
    except BaseException:
        print("text of the page:", page.locator("body").inner_text()[:3000])  # pytest prints it for a failed test
        raise
    finally:
        context.close()
