"""The site builds without warnings, and can be read and searched without a network."""

from __future__ import annotations

import html
import inspect
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
from strop.config.options import COMMON
from strop.config.schema import option_fields
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


def first_results(page: Any, words: str) -> list[str]:
    """Type words into the search, and return the addresses of its results, best first."""
    for _ in range(6):  # text typed before the search is ready is lost
        page.fill("input[name=query]", "")
        page.locator("input[name=query]").press_sequentially(words)
        if _appears(page):
            break
    return list(page.locator(".md-search-result__link").evaluate_all("links => links.map((link) => link.href)"))


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
        result = first_results(page, words)
    assert any(found in link for link in result) and not any("/log/" in link for link in result) and not errors
    assert not [url for url in requested if not url.startswith(("file:", "data:", "about:", "blob:"))]


@pytest.mark.parametrize(
    ("words", "best"),
    [
        ("per_device_train_batch_size", "import"),
        ("micro_batch_size", "import"),
        ("lora_r", "import"),
        ("load_in_4bit", "quantization"),
        ("oom", "troubleshooting"),
        ("multi gpu", "scale"),
        ("dpo", "preferences"),
        ("grpo", "preferences"),
        ("uninstall", "install"),
        ("merge adapter", "after"),
        ("python evaluate result", "python"),
        ("batch generate", "python"),
        ("alpaca", "formats"),
        ("sharegpt", "formats"),
        ("early stopping", "howto"),
        ("structured output", "serve"),
        ("save model", "after"),
        ("truncation", "data"),
        ("mixture of datasets", "data"),
        ("huggingface token", "push"),
        ("hf token", "push"),
        ("crash", "howto"),
        ("delete run", "howto"),
        ("colab", "python"),
        ("overfitting", "howto"),
    ],
)
def test_best_result_of_a_search_is_the_page_on_it(site: Path, words: str, best: str) -> None:
    with open_browser() as browser:
        page = browser.new_page()
        page.goto((site / "tutorial.html").as_uri())
        assert f"/{best}.html" in first_results(page, words)[0]


def test_search_finds_the_row_of_an_option_and_no_wall_of_cells(site: Path) -> None:
    with open_browser() as browser:
        page = browser.new_page()
        page.goto((site / "tutorial.html").as_uri())
        links = first_results(page, "early stopping")
        found = page.locator(".md-search-result__article").all_inner_texts()
        assert any("recipe.html" in link and link.endswith("#train.early_stopping") for link in links)
        assert [text for text in found if text.startswith("early_stopping") and "Missing" not in text]
        first_results(page, "tensorboard")
        texts = page.locator(".md-search-result__article").all_inner_texts()
    assert texts and not [text for text in texts if text.count("yes") > 3]


@pytest.mark.parametrize("place", ["training", "adapter", "train.early_stopping", "other-options"])
def test_address_in_the_recipe_shows_its_place_and_marks_its_section(site: Path, place: str) -> None:
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"{(site / 'recipe.html').as_uri()}#{place}")
        page.wait_for_function("document.querySelectorAll('.md-nav__link--active').length > 2")
        top = page.evaluate(f"document.getElementById('{place}').getBoundingClientRect().top")
        active = page.locator(".md-nav__link--active").last.inner_text()
    expected = {"adapter": "Adapter", "other-options": "Other options"}.get(place, "Training")
    assert (48 < top < 160 or place == "other-options") and active.strip() == expected


def test_every_option_of_the_recipe_has_an_address(pages: dict[Path, str]) -> None:
    (recipe,) = (content for page, content in pages.items() if page.name == "recipe.html")
    assert all(f'id="{name}"' in recipe for name, _ in option_fields())


def test_guides_are_in_groups(site: Path) -> None:
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto((site / "howto.html").as_uri())
        names = page.locator(".md-nav--primary .md-nav__link:visible").all_inner_texts()
        bottom = page.get_by_text("When something fails").first.bounding_box()["y"]
    assert bottom < 900 and not [name for name in names if "GGUF" in name or "Fix a problem" in name]


def test_signature_of_train_lists_the_common_options(pages: dict[Path, str]) -> None:
    (api,) = (content for page, content in pages.items() if page.name == "api.html")
    section = api[api.index('id="strop.train"') : api.index('id="strop.resume"')]
    text = html.unescape(re.sub(r"<[^>]+>", "", section))
    listed = re.findall(r"^    (\w+):", text, re.M)
    assert listed[: len(COMMON) + 1] == ["recipe", *COMMON] and "epochs: float = 3" in text
    assert all(str(info.description) in text for name, info in option_fields() if name in ("out", "train.epochs"))


def test_heading_is_the_name_in_the_navigation_and_in_the_tab(site: Path, pages: dict[Path, str]) -> None:
    titles = []
    for page, content in pages.items():
        if page.parent == site and page.name != "404.html":
            (heading,) = re.findall(r"<h1[^>]*>(.*?)<a class=\"headerlink\"", content, re.S)
            (title,) = re.findall(r"<title>(.*?) - strop</title>", content)
            titles.append(title)
            if page.name != "index.html":
                name = re.search(
                    r'class="md-nav__link md-nav__link--active">\s*<span class="md-ellipsis">(.*?)</span>',
                    content,
                    re.S,
                )
                assert heading == title and name and name[1].strip() == title, page
    assert len(titles) == len(set(titles)) and "strop" not in titles


def test_no_page_shows_an_escape_of_a_table(pages: dict[Path, str]) -> None:
    assert not [page.name for page, content in pages.items() if "\\|" in content and "log" not in page.parts]


def test_reference_lists_every_command_and_public_name(pages: dict[Path, str]) -> None:
    text = {page.stem: content for page, content in pages.items()}
    assert all(f'id="strop-{name}"' in text["cli"] for name in (*COMMANDS, *GROUPS))
    assert "train.learning_rate" in text["recipe"] and "Peak learning rate" not in text["cli"]
    assert all(f'id="strop.{name}"' in text["api"] for name in (*strop.__all__, "Run", "Model", "Sampling", "Plan"))


def test_commands_are_shown_as_in_a_terminal(pages: dict[Path, str]) -> None:
    (cli,) = (content for page, content in pages.items() if page.name == "cli.html")
    shown = html.unescape(re.sub(r"<[^>]+>", "", cli))
    assert "\b" not in shown
    for line in (
        "strop check --model demo --data rows.jsonl",
        "strop chat runs/mine",
        "/base     answer without the adapter",
    ):
        assert line in shown.splitlines()
    for name in ("plan", "check", "train", "resume", "sweep"):
        section = cli[cli.index(f'id="strop-{name}"') :].partition("<h2")[0]
        assert section.count('href="recipe.html"') == 1


def test_names_in_signatures_of_the_api_are_explained(pages: dict[Path, str]) -> None:
    (api,) = (content for page, content in pages.items() if page.name == "api.html")
    headings = re.findall(r'<h\d[^>]*class="doc doc-heading">(.*?)</h\d>', api, re.S)
    assert not [heading for heading in headings if re.search(r"strop\.\w+\.\w+\.", re.sub(r"<[^>]+>", "", heading))]
    cells = {re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", api, re.S)}
    assert {*inspect.signature(strop.Sampling).parameters, "Rows", "Event", "AnswerProgress", "StepProgress"} <= cells
    text = re.sub(r"<[^>]+>", "", api)
    assert all(name in text for name in ("Merged", "Exported", "Pushed", "CheckReport", "Comparison"))
    assert re.search(r"^train\(\n    recipe", html.unescape(text), re.M), "signatures have an argument a line"


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tables_are_readable_on_a_phone(site: Path, scheme: str) -> None:
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
        for name in ("recipe", "formats", "import"):
            page.goto((site / f"{name}.html").as_uri())
            widths = page.evaluate(
                "[...document.querySelectorAll('[data-list] td:last-child')].map((td) => td.offsetWidth)"
            )
            assert min(widths) > 280 and page.locator(".table[data-wide]").count() == 0, name
        page.goto((site / "comparison.html").as_uri())
        hint = page.evaluate("getComputedStyle(document.querySelector('.table[data-wide]'), '::before').content")
        assert "Scroll sideways" in hint


def test_a_phone_gets_the_narrow_picture_and_buttons_hide_no_text(site: Path) -> None:
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.goto((site / "index.html").as_uri())
        page.locator("article img").first.scroll_into_view_if_needed()
        assert page.locator("article img").first.evaluate("image => image.currentSrc").endswith("dash-run-phone.png")
        button = page.locator("article .md-code__nav, article .md-clipboard").first
        assert button.evaluate("button => getComputedStyle(button).backgroundColor") != "rgba(0, 0, 0, 0)"


@pytest.mark.parametrize(("name", "fits"), [("comparison", True), ("models", False), ("recipe", True)])
def test_header_and_first_column_of_a_long_table_stay_in_view(site: Path, name: str, fits: bool) -> None:
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 700})
        page.goto((site / f"{name}.html").as_uri())
        head, first = page.evaluate(SCROLL_TABLE)
        assert page.locator(".table[data-wide]").count() == (0 if fits else 1)
    assert 0 <= head["top"] < 700 and 0 <= first["left"] < 700


# scroll to the middle of the longest table, and within it if it scrolls; return the places of its header and first cell
SCROLL_TABLE = """() => {
    const tables = [...document.querySelectorAll(".table table")];
    const table = tables.reduce((a, b) => (a.rows.length >= b.rows.length ? a : b));
    table.scrollTo(300, 2000);
    table.rows[Math.floor(table.rows.length / 2)].scrollIntoView({block: "center"});
    const row = table.rows[Math.floor(table.rows.length / 2)];
    return [table.rows[0].cells[0], row.cells[0]].map((cell) => cell.getBoundingClientRect().toJSON());
}"""
# code blocks that are wider than what is shown of them, and cannot be scrolled
CLIPPED_CODE = """[...document.querySelectorAll("pre > code")]
    .filter((code) => code.scrollWidth > code.clientWidth && getComputedStyle(code).overflowX !== "auto")
    .map((code) => code.textContent.slice(0, 60))"""
