"""The site builds without warnings, and can be read and searched without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import strop
from strop.cli.app import COMMANDS, GROUPS
from tests import ROOT
from tests.support.browser import open_browser

pytest.importorskip("mkdocs", reason="mkdocs is not installed")
pytest.importorskip("material", reason="mkdocs-material is not installed")

# Elements whose address a browser fetches to show a page; links (a) are not fetched.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}


class Fetched(HTMLParser):
    """Parser that collects in `found` the addresses that a browser fetches for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if attributes.get("rel") != "canonical" and (address := attributes.get(FETCHED.get(tag, ""))):
            self.found.append(address)


def fetched(page: str) -> list[str]:
    parser = Fetched()
    parser.feed(page)
    return parser.found


def elsewhere(addresses: list[str]) -> list[str]:
    return [address for address in addresses if address.startswith(("http:", "https:", "//"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the site, built as in `make site`."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> Iterator[dict[Path, str]]:
    yield {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}


def test_site_has_every_page(site: Path, pages: dict[Path, str]) -> None:
    addresses = {str(page.relative_to(site).with_suffix("")) for page in pages}
    written = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in (ROOT / "docs").rglob("*.md")}
    assert {"index", "contributing", "cli"} | {
        name.removesuffix("README") + "index" * name.endswith("README") for name in written
    } <= addresses


def test_site_fetches_nothing_from_other_origins(site: Path, pages: dict[Path, str]) -> None:
    fetched_by_page = {page: fetched(text) for page, text in pages.items()}
    assert all(addresses for addresses in fetched_by_page.values())
    for page, addresses in fetched_by_page.items():
        assert not elsewhere(addresses), page
        for address in addresses:
            if page.name != "404.html":  # its addresses begin at the server's root
                assert (page.parent / address.partition("#")[0].partition("?")[0]).exists(), (page, address)
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert "url(http" not in text and "url(//" not in text and "@import" not in text, sheet


def test_remote_scripts_and_fonts_are_detected() -> None:
    page = '<a href="https://x.org">x</a><script src="https://x.org/a.js"></script><link rel="icon" href="//f.org/f">'
    assert elsewhere(fetched(page)) == ["https://x.org/a.js", "//f.org/f"]


def _appears(page: Any) -> bool:
    from playwright.sync_api import TimeoutError

    try:
        page.wait_for_selector(".md-search-result__link", state="attached", timeout=15_000)
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("bitsandbytes", "quantization.html"),
        ("overlong", "recipe.html"),
        ("early_stopping", "recipe.html"),
        ("bad_rows", "recipe.html"),
        ("longer than data.max_length", "troubleshooting.html"),
        ("no chat template", "troubleshooting.html"),
        ("--max-length", "recipe.html"),
        ("No space left on device", "troubleshooting.html"),
    ],
)
def test_search_works_on_pages_opened_as_files(site: Path, words: str, found: str) -> None:
    with open_browser() as browser:
        page, requested, errors = browser.new_page(), [], []
        page.on("request", lambda request: requested.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((site / "tutorial.html").as_uri())
        for _ in range(6):  # text typed before the search is ready is lost
            page.fill("input[name=query]", "")
            page.locator("input[name=query]").press_sequentially(words)
            if _appears(page):
                break
        result = page.locator(".md-search-result__link").evaluate_all("links => links.map((link) => link.href)")
    assert any(found in link for link in result) and not any("/log/" in link for link in result) and not errors
    assert not [url for url in requested if not url.startswith(("file:", "data:", "about:", "blob:"))]


def test_no_page_shows_an_escape_of_a_table(pages: dict[Path, str]) -> None:
    assert not [page.name for page, content in pages.items() if "\\|" in content and "log" not in page.parts]


def test_reference_lists_every_command_and_public_name(pages: dict[Path, str]) -> None:
    text = {page.stem: content for page, content in pages.items()}
    assert all(f'id="strop-{name}"' in text["cli"] for name in (*COMMANDS, *GROUPS))
    assert "--train.learning_rate" in text["cli"] and "[default: 16]" in text["cli"]
    assert all(f'id="strop.{name}"' in text["api"] for name in strop.__all__)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_the_screen_and_follow_the_colour_scheme(site: Path, width: int, scheme: str) -> None:
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        for name in ("index", "tutorial", "cli", "api", "recipe", "comparison"):
            page.goto((site / f"{name}.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            clipped = page.evaluate(CLIPPED_CODE)
            assert clipped == [], name
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert brightness > 200 if scheme == "light" else brightness < 80


# code blocks that are wider than what is shown of them, and cannot be scrolled
CLIPPED_CODE = """[...document.querySelectorAll("pre > code")]
    .filter((code) => code.scrollWidth > code.clientWidth && getComputedStyle(code).overflowX !== "auto")
    .map((code) => code.textContent.slice(0, 60))"""
