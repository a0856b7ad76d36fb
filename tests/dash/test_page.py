"""The page in a real browser: each screen, wide and narrow, light and dark, with hostile text in every field."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import psutil
import pytest
from PIL import Image

import strop
from tests.dash.conftest import HOSTILE, HOSTILE_NAME
from tests.support.browser import DESK, PHONE, Watched, at, open_tab
from tests.support.dash import TOKEN, Dash, evaluated, make_run, run_dash, sample, session, step

STATIC = Path(strop.__file__).parent / "dash" / "static"
NEW = quote(json.dumps({"model.name": "tiny-model", "data.train": "rows.jsonl", "data.bad_rows": "drop", "lora.r": 4}))
STRANGE = quote(HOSTILE_NAME, safe="")
# address -> text on the complete screen
SCREENS = {
    "/runs": "tbody .state",
    "/run/one": ".plot canvas >> nth=3",
    "/run/one/answers": ".sample >> nth=5",
    "/run/one/answers?blind=1": ".vote article",
    "/run/one/settings": "table >> nth=0",
    "/run/one/export": ".form >> nth=2",
    "/run/one/log": "text=Events",
    f"/new?options={NEW}": ".bars .phase >> nth=4",
    f"/data?options={NEW}": ".tokens .stop >> nth=3",
    "/compare?runs=one,broken": ".plot canvas",
    "/chat": "text=No model is loaded",
    "/machine": "dl.facts",
}


@contextmanager
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that stands for a run, and kill it afterwards."""
    process = subprocess.Popen(["sleep", "600"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def open_at(tab: Watched, dash: Dash, address: str, whole: str) -> None:
    tab.page.goto(at(dash, address))
    is_whole(tab, whole)


def is_whole(tab: Watched, sign: str) -> None:
    tab.page.wait_for_selector(sign)
    tab.page.wait_for_selector(".screen:not([aria-busy])")


def hold(tab: Watched, *paths: str) -> list[Any]:
    """Return a list to which requests of these paths are added instead of being sent."""
    held: list[Any] = []
    for path in paths:
        tab.page.route(f"**/api/{path}", lambda way: held.append(way))
    return held


def facts_of(tab: Watched) -> dict[str, str]:
    """Return the values of the tiles by name."""
    result: dict[str, str] = tab.page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.facts div')].map((one) => "
        "[one.querySelector('dt').textContent, one.querySelector('dd').innerText]))"
    )
    return result


@pytest.mark.parametrize("address", SCREENS)
def test_each_screen_on_desk_and_phone_in_light_and_dark(
    browser: Any, dash: Dash, address: str, tmp_path: Path
) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, address, SCREENS[address])
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            for scheme in ("light", "dark"):
                tab.page.emulate_media(color_scheme=scheme)
                tab.page.wait_for_timeout(50)  # a plot is redrawn
                tab.check(f"{address} at {size['width']}, {scheme}")
                if (size, scheme) in ((DESK, "light"), (PHONE, "dark")):
                    tab.axe(f"{address} at {size['width']}, {scheme}")
            assert "`" not in tab.page.locator("main").inner_text()  # code has its own font
        before = tab.page.evaluate("location.hash"), tab.page.title()
        tab.page.reload()  # the page restores its state from the address
        is_whole(tab, SCREENS[address])
        assert (tab.page.evaluate("location.hash"), tab.page.title()) == before
        assert TOKEN not in tab.page.url
        tab.check(f"{address}, again")


@pytest.mark.parametrize("part", ["", "/answers", "/answers?blind=1", "/settings", "/export", "/log"])
def test_markup_in_a_run_stays_text(browser: Any, dash: Dash, part: str) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/run/{STRANGE}{part}", "h1")
        if part != "/answers?blind=1" and part != "/export":
            tab.page.wait_for_selector(f"text={'onerror'} >> nth=0")
        assert tab.page.title().endswith("· strop") and "owned" not in tab.page.title()
        assert tab.page.locator("main img, main b:text-is('bold'), main script").count() == 0
        assert tab.page.locator("h1").text_content() == HOSTILE_NAME
        tab.page.set_viewport_size(PHONE)
        tab.check(part)


def test_samples_are_shown_by_step(browser: Any, tmp_path: Path) -> None:
    def sampled(number: int) -> dict[str, Any]:
        row = {"prompt": "two\nlines", "reference": HOSTILE, "completion": f"completion {number} {HOSTILE}"}
        return {"event": "samples", "time": 1, "step": number, "samples": [row, row]}

    def first_row() -> list[str]:
        result: list[str] = tab.page.locator(".samples tbody tr").first.locator("td").all_text_contents()
        return result

    make_run(tmp_path, "none", [*session(), step(1), step(2)])
    folder = make_run(tmp_path, "one", [*session(), step(1), step(2), sampled(2), step(3), sampled(3)])
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/none", ".plot canvas")
        assert not tab.page.locator(".samples").is_visible()  # nothing is shown of a run without samples
        open_at(tab, own, "/run/one", ".samples tbody td")
        assert first_row() == ["two\nlines", HOSTILE, f"completion 3 {HOSTILE}"]
        chooser = tab.page.get_by_label("Step of the samples")
        assert chooser.locator("option").all_text_contents() == ["step 3", "step 2"]
        with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(step(4)) + "\n" + json.dumps(sampled(4)) + "\n")
        tab.page.wait_for_selector("text=completion 4")  # the newest step is followed
        chooser.select_option("2")
        tab.page.wait_for_selector("text=completion 2")
        assert "sample=2" in tab.page.url
        tab.page.reload()
        tab.page.wait_for_selector("text=completion 2")
        assert tab.page.locator("main img").count() == 0
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            tab.axe(f"samples at {size['width']}")
            tab.check("samples")


def test_markup_in_lists_stays_text(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, "/runs", f"text={HOSTILE_NAME[:20]}")
        assert tab.page.locator("main img").count() == 0
        tab.page.click(f"text={HOSTILE_NAME[:20]}")
        tab.page.wait_for_selector(".plot canvas")
        assert tab.page.locator("h1").text_content() == HOSTILE_NAME
        open_at(tab, dash, f"/compare?runs=one,{STRANGE}", ".plot canvas")
        tab.page.wait_for_selector("table code")
        open_at(tab, dash, f"/data?order=long&options={NEW}", f".tokens:has-text({json.dumps('onerror')})")
        assert tab.page.locator("main img").count() == 0
        shown = tab.page.locator(".tokens:has-text('onerror')").first.text_content()
        assert HOSTILE in shown.replace("\u21b5\n", "\n")
        tab.check("lists")


def test_the_table_of_runs_is_sorted_filtered_and_saved(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, "/runs", "table .spark")

        def names() -> list[str]:
            result: list[str] = tab.page.locator("tbody th").all_text_contents()
            return result

        tab.page.click("thead >> text=run")
        assert names() == sorted(names(), key=str.lower) and len(names()) == 3
        tab.page.click("thead >> text=run")
        assert names()[0] == "one"
        tab.page.fill("input[type=search]", "crashed bro")
        assert names() == ["broken"]
        tab.page.reload()
        tab.page.wait_for_selector("tbody th")
        assert names() == ["broken"]
        tab.page.fill("input[type=search]", "")
        with tab.page.expect_download() as saved:
            tab.page.click("text=Save CSV")
        lines = Path(saved.value.path()).read_text(encoding="utf-8").splitlines()
        assert lines[0].endswith("method,seconds,bytes,started")
        assert re.search(r",20\d\d-\d\d-\d\dT[\d:.]+Z$", lines[1])
        assert (
            lines[0].startswith("run,tags,state,steps,train loss,eval loss,score,metric,caveat,model")
            and len(lines) == 4
        )
        assert "exact" in tab.page.locator("td[data-name=score]").first.inner_text()  # the metric
        tab.page.set_viewport_size({"width": 390, "height": 800})
        for row in tab.page.locator("tbody tr").all():  # two lines, and one for a caveat of its score
            assert row.bounding_box()["height"] < (100 if row.locator(".warn").count() else 80)
            right = tab.page.evaluate("innerWidth")
            assert all(part.bounding_box()["x"] < right - 30 for part in row.locator("th, td:visible").all())
        tab.check("runs")


def test_score_on_training_rows_is_marked_everywhere(browser: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = make_run(tmp_path, name, [*session(), step(1), step(2)], {"exit": 0})
        evaluated(folder, [sample(number, False, True) for number in range(6)], train_rows=3 if name == "one" else 0)
    caveat = "3 of 6 rows trained on"
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            open_at(tab, own, "/runs", "tbody tr >> nth=1")
            assert tab.page.locator(f"td[data-name=score]:has-text('{caveat}'):visible").count() == 1
            tab.axe(f"caveat at {size['width']}")
            tab.check("runs")
            open_at(tab, own, "/compare?runs=one,two", ".plot canvas")
            assert tab.page.locator(f"td[data-name=score]:has-text('{caveat}'):visible").count() == 1
            verdict = tab.page.locator(".verdict").first.inner_text()
            assert "score equal" in verdict and f"No test of what it learned: one: {caveat}." in verdict
            tab.check("compare")
        for address, place in (("/runs", 0), ("/compare?runs=one,two", 0)):
            open_at(tab, own, address, "tbody tr >> nth=1")
            with tab.page.expect_download() as saved:
                tab.page.get_by_role("button", name="Save CSV").nth(place).click()
            lines = Path(saved.value.path()).read_text(encoding="utf-8").splitlines()
            assert "caveat" in lines[0] and sum(caveat in line for line in lines) == 1


def test_notes_of_an_evaluation_are_shown_on_answers_and_compare(browser: Any, tmp_path: Path) -> None:
    note = "1 of 6 rows repeat an earlier one"
    for name in ("one", "two"):
        folder = make_run(tmp_path, name, [*session(), step(1), step(2)], {"exit": 0})
        evaluated(folder, [sample(max(number, 1), False, True) for number in range(6)], notes=[note])
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/one/answers", ".sample >> nth=5")
        assert tab.page.locator(".warn", has_text=f"{note}.").is_visible()
        open_at(tab, own, "/compare?runs=one,two", ".plot canvas")
        assert tab.page.locator("p.warn", has_text="repeat").inner_text() in (
            f"one, two: {note}.",
            f"two, one: {note}.",
        )
        tab.check("notes")


def test_runs_with_a_comma_in_their_names_are_compared(browser: Any, tmp_path: Path) -> None:
    for name in ("one", "c,d", ",", "d"):
        make_run(tmp_path, name, [*session(), step(1), step(2)])
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/runs", "table .spark")
        for name in ("one", "c,d", ","):
            tab.page.get_by_label(f"Compare {name}", exact=True).check()
        tab.page.reload()
        tab.page.get_by_role("button", name="Compare 3").click()
        for _ in range(2):
            tab.page.wait_for_selector(".plot canvas")
            assert tab.page.locator("summary").first.text_content() == "one, c,d, ,"
            tab.page.reload()
        tab.check("commas")


def test_finished_run_shows_total_epochs_and_mean_rate(browser: Any, dash: Dash, dashboard: Path) -> None:
    report = json.loads((dashboard / "runs" / "one" / "report.json").read_text(encoding="utf-8"))
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, "/run/one", ".plot canvas")
        facts = facts_of(tab)
        assert facts["epoch"] == "4 of 4"
        assert facts["tokens/s, mean"].replace(",", "") == str(round(report["tokens_per_s"]))


def save_csv(tab: Watched) -> list[list[str]]:
    """Return the cells of the first plot's CSV file."""
    plot = tab.page.locator(".plot").first
    plot.locator("summary").click()
    with tab.page.expect_download() as saved:
        plot.get_by_role("button", name="CSV", exact=True).click()
    text = Path(saved.value.path()).read_text(encoding="utf-8")
    return list(csv.reader(text.splitlines()))


def test_smoothed_curve_is_the_same_at_every_zoom(browser: Any, tmp_path: Path) -> None:
    losses = [3.0 / n + 0.2 * (n % 3) for n in range(1, 41)]
    make_run(tmp_path, "run", [*session(), *(step(n, loss=loss) for n, loss in enumerate(losses, 1))])
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/run", ".plot canvas")
        head, *rows = save_csv(tab)
        column = next(index for index, name in enumerate(head) if "smoothed" in name)
        whole = {row[0]: row[column] for row in rows}
        open_at(tab, own, "/run/run?range=20~30", ".plot canvas")
        _, *rows = save_csv(tab)
        zoomed = {row[0]: row[column] for row in rows}
        total = weight = 0.0
        for n, loss in enumerate(losses, 1):  # independent of the page
            total, weight = 0.6 * total + loss, 0.6 * weight + 1
            assert float(whole[str(n)]) == pytest.approx(total / weight, rel=1e-3)
    assert {"20", "30"} <= zoomed.keys() and "19" not in zoomed
    assert all(float(value) == pytest.approx(float(whole[name]), rel=1e-3) for name, value in zoomed.items())


def test_findings_and_the_step_of_the_kept_adapter_are_shown(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", [*session(), *(step(n) for n in range(1, 5))])
    text = "overfitting: the evaluation loss rose from 0.022 (step 2, kept) to 0.027 (step 4)"
    report = {"exit": 0, "ended": "steps", "steps": 4, "eval_loss": 0.022, "adapter_step": 2, "diagnosis": [text]}
    (run / "report.json").write_text(json.dumps(report), encoding="utf-8")
    (run / "adapter").mkdir(exist_ok=True)
    (run / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/run", ".plot canvas")
        assert tab.page.locator(".verdict", has_text="overfitting").text_content() == text
        assert facts_of(tab)["evaluation loss, best step 2"] == "0.022"


def test_runs_beyond_the_most_that_are_compared_are_named_as_left_out(browser: Any, tmp_path: Path) -> None:
    names = [f"run{n}" for n in range(8)]
    for name in names:
        make_run(tmp_path, name, [*session(), step(1), step(2)])
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, f"/compare?runs={','.join(names)}", ".plot canvas")
        assert tab.page.get_by_text("6 of 8 runs are shown, the most that fit.").is_visible()


def test_log_shows_the_events_around_a_damaged_line(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", [*session(), step(1)])
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write("null\n7\n" + json.dumps(step(2)) + "\n")
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/run/log", "pre[aria-label='Events']")
        text = tab.page.locator("pre[aria-label='Events']").text_content()
        assert "1 of 100" in text and "2 of 100" in text and "Invalid" not in text
        tab.check("a damaged line")


def test_data_screen_shows_rows_of_texts_that_match(browser: Any, dash: Dash, dashboard: Path) -> None:
    rows = [{"anchor": f"question {n}", "positive": f"answer {n}", "negative": "other"} for n in range(12)]
    (dashboard / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {**json.loads(unquote(NEW)), "data.train": str(dashboard / "pairs.jsonl")}
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/data?options={quote(json.dumps(options))}", "text=no format has the columns")
        tab.page.select_option("[data-option='train.objective']", "embed")
        tab.page.wait_for_selector(".tokens >> nth=9")
        assert "question 3" in tab.page.inner_text("main") and "answer 3" in tab.page.inner_text("main")


def test_data_screen_shows_classification_rows(browser: Any, dash: Dash, dashboard: Path, tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(12)]
    (dashboard / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {**json.loads(unquote(NEW)), "data.train": str(dashboard / "texts.jsonl")}
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/data?options={quote(json.dumps(options))}", "text=no format has the columns")
        tab.page.select_option("[data-option='train.objective']", "classify")
        tab.page.wait_for_selector(".tokens >> nth=9")
        assert "text 3" in tab.page.inner_text("main")


def test_data_screen_shows_pictures_next_to_tokens(
    browser: Any, dash: Dash, dashboard: Path, seeing_folder: Path
) -> None:
    for number in range(3):
        Image.new("RGB", (300, 200), (80 * number, 100, 50)).save(dashboard / f"picture{number}.png")
    rows = [{"prompt": "Which colour?", "completion": "green", "image": f"picture{n}.png"} for n in range(3)]
    (dashboard / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {
        **json.loads(unquote(NEW)),
        "model.name": str(seeing_folder),
        "data.train": str(dashboard / "pictures.jsonl"),
    }
    with open_tab(browser, dash) as tab:
        tab.page.goto(at(dash, f"/data?options={quote(json.dumps(options))}"))
        tab.page.wait_for_selector(".pictures img >> nth=2", timeout=90_000)  # the image processor imports torch
        tab.page.wait_for_selector(".screen:not([aria-busy])")
        widths = tab.page.evaluate("[...document.querySelectorAll('.pictures img')].map((image) => image.naturalWidth)")
        assert widths == [192] * 3
        assert "[image 300x200, 20 tokens]" in tab.page.inner_text("main")
        if folder := os.environ.get("STROP_PICTURES"):
            tab.page.screenshot(path=f"{folder}/images.png")


def test_smoothing_is_a_choice_in_the_address(browser: Any, dash: Dash) -> None:
    def values_of(curve: str) -> str:
        description: str = tab.page.locator(".plot .canvas").first.get_attribute("aria-label")
        return description.partition(f"training, {curve}: ")[2].partition(". ")[0]

    with open_tab(browser, dash) as tab:
        open_at(tab, dash, "/run/one", ".plot canvas")
        slider = tab.page.get_by_label("Smoothing")
        assert slider.get_attribute("aria-valuetext") == "0.6" and values_of("smoothed") != values_of("each step") != ""
        slider.focus()
        tab.page.keyboard.press("Home")
        assert slider.get_attribute("aria-valuetext") == "off" and values_of("smoothed") == values_of("each step")
        tab.page.keyboard.press("End")
        strong = values_of("smoothed")
        assert "smooth=0.999" in tab.page.url and strong != values_of("each step")
        tab.page.reload()
        tab.page.wait_for_selector(".plot canvas")
        assert values_of("smoothed") == strong
        open_at(tab, dash, "/compare?runs=one,broken&smooth=0.9", ".plot canvas")
        assert tab.page.get_by_label("Smoothing").get_attribute("aria-valuetext") == "0.9"
        tab.check("smoothing")


def report_steps(folder: Path) -> list[str]:
    """Return the lines of a run's steps."""
    return [line for line in (folder / "events.jsonl").read_text().splitlines() if '"event": "step"' in line]


def count_pixels(tab: Watched, colour: str) -> int:
    """Return the number of pixels of the first plot that have a colour of look.css."""
    number: int = tab.page.locator(".plot canvas").first.evaluate(
        """(canvas, name) => {
            const probe = document.body.appendChild(document.createElement("p"));
            probe.style.color = `var(--${name})`;
            const wanted = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
            probe.remove();
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            let found = 0;
            for (let at = 0; at < data.length; at += 4)
                found += wanted.every((part, index) => Math.abs(part - data[at + index]) < 3) && data[at + 3] > 200;
            return found;
        }""",
        colour,
    )
    return number


def test_single_value_is_drawn_as_a_dot(browser: Any, tmp_path: Path) -> None:
    evaluated = {"event": "eval", "time": 1100, "step": 1, "loss": 0.5}
    make_run(tmp_path, "one", [*session(), step(1), evaluated])
    make_run(tmp_path, "two", [*session(), step(1)])
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/one", ".plot canvas")
        assert count_pixels(tab, "base") > 10 and count_pixels(tab, "tuned") > 10
        tab.page.get_by_role("button", name="log", exact=True).first.click()
        assert count_pixels(tab, "base") > 10
        open_at(tab, own, "/compare?runs=one,two", ".plot canvas")
        plot = tab.page.locator(".plot:has(.title:text-is('Evaluation loss'))")
        assert "0.5" in plot.locator(".legend").inner_text()
        tab.page.locator(".plot").first.evaluate("(first) => first.remove()")
        colour = plot.locator(".entry i").first.get_attribute("style").partition("--")[2].partition(")")[0]
        assert count_pixels(tab, colour) > 10
        with tab.page.expect_download() as saved:
            plot.locator("summary").click()
            plot.get_by_role("button", name="SVG", exact=True).click()
        assert "<circle" in Path(saved.value.path()).read_text(encoding="utf-8")
        tab.check("single values")


def test_plot_supports_keyboard_zoom_and_saving(browser: Any, dash: Dash, dashboard: Path) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, "/run/one", ".plot canvas")
        plot = tab.page.locator(".plot").first
        plot.locator(".canvas").focus()
        tab.page.keyboard.press("Home")
        assert plot.locator(".where").text_content() == "step 1"
        tab.page.keyboard.press("ArrowRight")
        assert plot.locator(".where").text_content() == "step 2"
        assert "training, smoothed: first" in plot.locator(".canvas").get_attribute("aria-label")
        for kind, head in (("CSV", "step,"), ("SVG", "<svg"), ("PNG", "\x89PNG")):
            plot.locator("summary").click()
            with tab.page.expect_download() as saved:
                plot.get_by_role("button", name=kind, exact=True).click()
            assert Path(saved.value.path()).read_bytes().decode("latin-1").startswith(head)
        box = plot.locator(".u-over").bounding_box()
        tab.page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 50)
        tab.page.mouse.down()
        tab.page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 60, steps=4)
        tab.page.mouse.up()
        tab.page.wait_for_selector(".back:visible")
        low, high = map(float, unquote(tab.page.url).partition("range=")[2].split("~"))
        last = len(report_steps(dashboard / "runs" / "one"))
        assert 0.25 * last < low < 0.4 * last and 0.55 * last < high < 0.7 * last  # every plot has the dragged range
        for _ in range(2):
            tab.page.wait_for_timeout(500)  # the curves of the range arrive
            descriptions = [one.get_attribute("aria-label") for one in tab.page.locator(".plot .canvas:visible").all()]
            assert len(descriptions) == tab.page.locator(".plot").count() and all(
                "first" in one for one in descriptions
            )
            tab.page.reload()
            tab.page.wait_for_selector(".back:visible")
        open_at(tab, dash, "/run/one?range=2.2~2.8", ".plot .empty:text-is('Nothing in this range.')")
        tab.page.locator(".back:visible").first.click()
        assert "range=" not in tab.page.url
        for by in ("epoch", "tokens", "time"):
            tab.page.get_by_role("button", name=by, exact=True).click()
            tab.page.wait_for_function(
                "(words) => document.querySelector('.plot .canvas').ariaLabel.startsWith(words)", arg=f"Loss by {by}"
            )
        tab.check("plots")


def test_name_tags_and_note_are_edited_and_tags_filter_the_table(browser: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_run(tmp_path, name, [*session(), step(1), step(2)], {"exit": 0})
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/one/settings", "h1:text-is('one')")
        tab.page.get_by_role("button", name="Edit", exact=True).click()
        tab.page.get_by_label("Name", exact=True).fill("two")
        tab.page.get_by_label("Tags").fill(f"good, {HOSTILE[:20]}")
        tab.page.get_by_label("Note").fill(HOSTILE)
        tab.axe("edit")
        tab.page.get_by_role("button", name="Save", exact=True).click()
        tab.page.wait_for_selector("dialog .verdict.error:has-text('exists')")
        assert own.get("/api/runs/one").json()["tags"] == []  # nothing was saved
        tab.faults.clear()  # the browser reports the refused request
        tab.page.get_by_label("Name", exact=True).fill("a new & name")
        tab.page.get_by_role("button", name="Save", exact=True).click()
        tab.page.wait_for_selector("h1:text-is('a new & name')")
        assert tab.page.url.endswith("#/run/a%20new%20%26%20name/settings")
        assert tab.page.locator("main .tag").all_text_contents()[:2] == ["good", HOSTILE[:20]]
        assert tab.page.locator(".note").text_content() == HOSTILE
        tab.page.set_viewport_size(PHONE)
        tab.check("edited")
        tab.page.set_viewport_size(DESK)
        open_at(tab, own, "/runs", "tbody tr >> nth=1")
        tab.page.get_by_role("button", name="good", exact=True).click()
        assert tab.page.locator("tbody th a").all_text_contents() == ["a new & name"]
        assert "filter=good" in tab.page.url and tab.page.locator("main img").count() == 0
        tab.axe("tags")
        tab.check("tags")


def test_adapter_report_and_recipe_are_downloaded(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, "/run/one/export", ".form >> nth=2")
        for button, name, start in (
            ("Adapter (zip", "one adapter.zip", b"pk"),
            ("Report (HTML)", "one report.html", b"<!doctype html>"),
            ("Recipe (YAML)", "one recipe.yaml", b"model:"),
        ):
            with tab.page.expect_download() as saved:
                tab.page.get_by_role("button", name=button).click()
            assert saved.value.suggested_filename == name
            assert Path(saved.value.path()).read_bytes().lower().startswith(start)
        tab.check("downloads")


def test_types_of_exports_have_sizes(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        weights = dash.get("/api/runs/one").json()["parameters"]["all"]
        open_at(tab, dash, "/run/one/export", ".form >> nth=2")
        types = tab.page.locator(".form:has(h2:text-is('GGUF file'))").get_by_label("Data type")
        texts = types.locator("option").all_inner_texts()
        assert texts[0] == f"f32, about {round(weights * 4 / 1024)} KiB" and texts[-1].startswith("q4_k_m, about ")
        assert types.input_value() == "q8_0"


def test_uploaded_file_is_selected(browser: Any, dash: Dash, dashboard: Path) -> None:
    rows = {"name": "my rows.jsonl", "mimeType": "", "buffer": (dashboard / "rows.jsonl").read_bytes()}
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={quote(json.dumps({'model.name': 'tiny-model'}))}", ".bars .phase >> nth=4")
        with tab.page.expect_file_chooser() as chooser:
            tab.page.get_by_role("button", name="Upload: Training rows").click()
        chooser.value.set_files(rows)
        tab.page.wait_for_selector("code:text('--data.train=data/my-rows.jsonl')")
        assert tab.page.get_by_label("Training rows", exact=True).input_value() == "data/my-rows.jsonl"
        assert (dashboard / "data" / "my-rows.jsonl").read_bytes() == rows["buffer"]
        tab.page.get_by_role("link", name="Inspect the data").click()
        tab.page.wait_for_selector(".tokens .stop >> nth=2")
        with tab.page.expect_file_chooser() as chooser:
            tab.page.get_by_role("button", name="Upload: Rows").click()
        chooser.value.set_files(rows)
        tab.page.wait_for_selector("#notice:has-text('Uploaded to data/my-rows.jsonl.')")  # it is there already
        tab.page.set_viewport_size(PHONE)
        tab.check("upload")
        with tab.page.expect_file_chooser() as chooser:
            tab.page.get_by_role("button", name="Upload: Rows").click()
        chooser.value.set_files({**rows, "name": "run.exe"})
        problem = tab.page.locator(".field [role=alert]:has-text('Not uploaded: run.exe: not a data file')")
        problem.wait_for()
        assert tab.page.get_by_label("Rows", exact=True).input_value() == "data/my-rows.jsonl"  # as before


def test_errors_of_the_plan_are_shown_at_their_fields_and_hide_the_plan(browser: Any, dash: Dash) -> None:
    def problem(label: str) -> str:
        """Return the text of the error that a control refers to."""
        control = tab.page.get_by_label(label, exact=True)
        described = (control.get_attribute("aria-describedby") or "").split()
        shown = [tab.page.locator(f"#{name}.problem") for name in described]
        texts: list[str] = [element.inner_text() for element in shown if element.count()]
        assert bool(texts) == (control.get_attribute("aria-invalid") == "true")
        return "\n".join(texts)

    def enter(label: str, text: str) -> None:
        control = tab.page.get_by_label(label, exact=True)
        control.fill(text)
        control.press("Enter")

    whole, summary = ".bars .phase >> nth=4", ".startbar span"
    with open_tab(browser, dash) as tab:
        for size in (DESK, PHONE):
            open_at(tab, dash, f"/new?options={NEW}", whole)
            tab.page.set_viewport_size(size)
            enter("Epochs", "many")
            enter("Rank, exact", "-3")
            tab.page.wait_for_selector(f"{summary}:has-text('Fix: Rank, Epochs')")
            tab.page.locator(summary).get_by_role("button", name="Epochs").click()
            assert tab.page.get_by_label("Epochs", exact=True).evaluate("(field) => field === document.activeElement")
            assert "must be a number" in problem("Epochs") and "must be" in problem("Rank, exact")
            assert not tab.page.locator(".bars, .command").first.is_visible()  # a plan of other values
            assert tab.page.get_by_role("button", name="Start", exact=True).is_disabled()
            tab.axe(f"errors at {size['width']}")
            enter("Epochs", "2")
            enter("Rank, exact", "8")
            tab.page.wait_for_selector(whole)
            assert not problem("Epochs") and not problem("Rank, exact")
            enter("Training rows", "no-rows.jsonl")
            tab.page.wait_for_selector(f"{summary}:has-text('Fix: Training rows')")
            assert "no-rows.jsonl: no such file" in problem("Training rows")
            enter("Training rows", "rows.jsonl")
            tab.page.get_by_label("Invalid rows").select_option("refuse")
            tab.page.wait_for_selector(f"{summary}:has-text('Fix: Training rows')")
            tab.page.wait_for_selector("p.problem:has-text('rows.jsonl:25: ')")
            assert "Invalid rows: drop" in problem("Training rows")
            prose = "(box) => box.innerText.replaceAll(box.querySelector('code').innerText, '')"  # without the command
            assert "--" not in tab.page.locator("main .verdict").first.evaluate(prose)
            assert tab.page.get_by_role("button", name="Start", exact=True).is_disabled()
            tab.page.get_by_label("Invalid rows").select_option("drop")
            tab.page.wait_for_selector(f"{summary}:text('It fits')")
            enter("Memory limit", "lots")
            tab.page.wait_for_selector(f"{summary}:has-text('Fix: Memory limit')")
            enter("Memory limit", "")
            enter("Run name", "a/b")
            tab.page.wait_for_selector(f"{summary}:has-text('Fix: Run name')")
            assert "not a name for a run" in problem("Run name")
            tab.faults.clear()  # the browser reports the refused requests
            tab.check("errors")


def test_typed_values_are_planned_before_the_field_is_left(browser: Any, dash: Dash) -> None:
    summary = ".startbar span"
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={NEW}", ".bars .phase >> nth=4")
        start = tab.page.get_by_role("button", name="Start", exact=True)
        for label, wrong, right in (
            ("Rank, exact", "abc", "40"),
            ("Maximum steps", "-3", "4"),
            ("Run name", "a/b", "c"),
        ):
            field = tab.page.get_by_label(label, exact=True)
            field.focus()
            for text, shown in ((wrong, "Fix: "), (right, "It fits")):
                tab.page.keyboard.press("Control+A")
                tab.page.keyboard.type(text)
                tab.page.wait_for_selector(f"{summary}:text('{shown}')")
                assert start.is_disabled() == (text == wrong)
                assert field.evaluate("(field) => field === document.activeElement && field.value") == text
        tab.page.wait_for_selector("code:text('--lora.r=40')")
        open_at(tab, dash, f"/data?options={NEW}", ".tokens .stop >> nth=3")
        tab.page.get_by_label("Rows", exact=True).focus()
        tab.page.keyboard.press("End")
        tab.page.keyboard.type("x")
        tab.page.wait_for_selector("p.problem:text('rows.jsonlx: no such file')")
        tab.faults.clear()  # the browser reports the refused requests


def test_plan_that_does_not_fit_offers_what_fits(browser: Any, dash: Dash) -> None:
    options = {
        "model.name": "tiny-model",
        "data.train": "rows.jsonl",
        "data.bad_rows": "drop",
        "lora.r": 512,
        "model.dtype": "bf16",
    }
    address = f"/new?options={quote(json.dumps({**options, 'data.max_length': 1024}))}&memory="
    with open_tab(browser, dash) as tab:
        start, apply = (tab.page.get_by_role("button", name=name) for name in ("Start", "Apply all"))
        open_at(tab, dash, f"{address}740MB", "main p.warn:has-text('What is needed: a memory limit of')")
        assert start.is_disabled() and apply.count() == 0
        tab.check("nothing fits")
        open_at(tab, dash, f"{address}860MB", "h3:text('Changes that make it fit')")
        assert start.is_disabled() and apply.count() == 1
        apply.click()
        tab.page.wait_for_selector(".startbar span:text('fits')")
        assert start.is_enabled()
        tab.check("changes")


SHOWN = {"Epochs": "3", "Seed": "0", "Maximum time": "not set"}  # defaults of fields without a control of choices


def test_page_has_the_verdict_and_the_choices_of_the_plan(browser: Any, dash: Dash) -> None:
    options = {"model.name": "tiny-model", "data.train": "rows.jsonl", "data.bad_rows": "drop", "model.dtype": "bf16"}
    address = f"/new?options={quote(json.dumps(options))}&memory="
    with open_tab(browser, dash) as tab:
        start, verdict = tab.page.get_by_role("button", name="Start"), tab.page.locator("main .verdict").first
        summary = tab.page.locator(".startbar span")
        open_at(tab, dash, f"{address}600MB", ".startbar span:text('Training does not fit')")
        assert start.is_disabled() and "worse" in verdict.get_attribute("class")
        assert "training does not fit: " in verdict.inner_text() and tab.page.locator(".phase .sum.bad").count()
        open_at(tab, dash, f"{address}300MB", "main p.warn:has-text('What is needed: a memory limit of')")
        assert "No change to these settings" not in tab.page.locator("main").inner_text()
        open_at(tab, dash, f"{address}8GB", ".startbar span:text('It fits')")
        shown = {label: tab.page.get_by_label(label, exact=True).get_attribute("placeholder") for label in SHOWN}
        assert shown == SHOWN
        assert start.is_enabled() and "better" in verdict.get_attribute("class")
        assert "on an otherwise idle machine" in verdict.inner_text() and "It fits" in summary.inner_text()
        assert tab.page.locator(".phase .sum.bad").count() == 0
        rate = tab.page.get_by_label("Learning rate", exact=True).get_attribute("placeholder")
        assert rate.startswith("chosen (") and "default" in tab.page.get_by_label("Longer rows").inner_text()
        assert "Code of the libraries and compiled kernels" in tab.page.locator("main").inner_html()
        tab.check("verdict")


def test_new_run_shows_its_form_while_the_plan_is_made(browser: Any, dash: Dash) -> None:
    for size in (DESK, PHONE):
        with open_tab(browser, dash) as tab:
            tab.page.set_viewport_size(size)
            open_at(tab, dash, "/machine", "dl.facts")
            held = hold(tab, "schema", "plan")
            tab.page.goto(f"{dash.url}/#/new?options={NEW}")
            tab.page.wait_for_selector("p.loading:visible")  # not a blank page
            tab.check("loading")
            held.pop().continue_()
            tab.page.get_by_label("Training rows", exact=True).wait_for()
            tab.page.wait_for_selector("text=Planning…")
            tab.check("planning")
            held.pop().continue_()
            tab.page.wait_for_selector(".bars .phase >> nth=4")


def test_rows_field_of_the_data_screen_is_wide(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/data?options={NEW}", ".tokens .stop >> nth=3")
        for size, least in ((DESK, 300), (PHONE, 120)):
            tab.page.set_viewport_size(size)
            assert tab.page.get_by_label("Rows", exact=True).bounding_box()["width"] > least
            tab.check("data")


def test_refused_data_is_reported_on_the_data_screen(browser: Any, dash: Dash) -> None:
    options = quote(json.dumps({"model.name": "tiny-model", "data.train": "rows.jsonl"}))
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/data?options={options}", "text=A run would be refused: 1 of 26 training rows")
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            tab.check("refused")
            rows = tab.page.get_by_label("Rows", exact=True)
            rows.fill("none.jsonl")
            rows.press("Enter")
            tab.page.wait_for_selector("p.problem:text('none.jsonl: no such file')")
            assert rows.get_attribute("aria-invalid") == "true"
            rows.fill("rows.jsonl")
            rows.press("Enter")
            tab.page.wait_for_selector("text=A run would be refused: 1 of 26 training rows")
            assert tab.page.locator("p.problem").count() == 0
            tab.faults.clear()  # the browser reports the refused request


def test_rows_of_another_objective_are_refused_in_one_box(browser: Any, dash: Dash, dashboard: Path) -> None:
    (dashboard / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3, encoding="utf-8")
    options = {"model.name": "tiny-model", "data.train": "pairs.jsonl", "train.objective": "classify"}
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={quote(json.dumps(options))}", "text=A run would be refused")
        boxes = tab.page.locator(".verdict")
        assert boxes.count() == 1 and "Objective: dpo" in boxes.inner_text() and "fits" not in boxes.inner_text()
        tab.check("refused")


def test_several_files_are_chosen_one_after_another(browser: Any, dash: Dash) -> None:
    options = {"model.name": "tiny-model", "data.bad_rows": "drop", "data.eval": "20%"}
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={quote(json.dumps(options))}", "text=/(It|Training) fits/")
        add = tab.page.get_by_role("button", name="Add another file: Training rows")
        assert add.is_hidden()
        for number, name in enumerate(("rows.jsonl", "held-out.jsonl")):
            (add if number else tab.page.get_by_role("button", name="Choose: Training rows")).click()
            tab.page.locator("dialog").get_by_role("button", name=name, exact=True).click()
        assert tab.page.get_by_label("Training rows", exact=True).input_value() == '["rows.jsonl","held-out.jsonl"]'
        tab.page.wait_for_selector(".command:has-text('held-out.jsonl')")
        train, held_out = map(int, re.findall(r"([0-9]+) rows? to", tab.page.locator(".verdict").inner_text()))
        assert train + held_out == 35 and held_out
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            tab.check("files")
        tab.axe("files")


def test_rows_are_shown_without_a_model(browser: Any, dash: Dash) -> None:
    options = quote(json.dumps({"data.train": "rows.jsonl", "data.bad_rows": "drop"}))
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/data?options={options}", ".tokens .stop >> nth=3")
        assert "without one, those of demo" in tab.page.locator("main").inner_text()


def test_evaluation_and_export_show_errors_at_their_fields(browser: Any, dash: Dash, dashboard: Path) -> None:
    (dashboard / "taken").mkdir(exist_ok=True)
    (dashboard / "taken" / "file").write_text("x", encoding="utf-8")
    jobs = dash.get("/api/jobs").json()
    with open_tab(browser, dash) as tab:
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            open_at(tab, dash, "/run/one/answers", ".sample >> nth=5")
            tab.page.locator("summary:text-is('Evaluate again')").click()
            file = tab.page.get_by_label("File of held-out rows", exact=True)
            assert file.input_value() == str(dashboard / "held-out.jsonl")  # the evaluation rows of the recipe
            file.fill("")
            tab.page.get_by_role("button", name="Evaluate", exact=True).click()
            tab.page.wait_for_selector("p.problem:text('no file is chosen')")
            tab.faults.clear()  # the browser reports the refused requests
            with tab.page.expect_file_chooser() as chooser:
                tab.page.get_by_role("button", name="Upload: File of held-out rows").click()
            name = f"held-{size['width']}.jsonl"
            chooser.value.set_files({"name": name, "mimeType": "", "buffer": b"{}"})
            tab.page.wait_for_selector(f"#notice:has-text('Uploaded to data/{name}.')")
            assert file.input_value() == f"data/{name}"
            file.fill("none.jsonl")
            tab.page.get_by_role("button", name="Evaluate", exact=True).click()
            tab.page.wait_for_selector("p.problem:text('none.jsonl: no such file')")
            assert file.get_attribute("aria-invalid") == "true"
            tab.faults.clear()
            tab.check("evaluate")
            file.fill("held-ou.jsonl")
            assert tab.page.locator("p.problem").count() == 0  # an error is of the value that it was shown for
            tab.page.get_by_role("button", name="Evaluate", exact=True).click()
            tab.page.locator("p.problem").get_by_role("button", name="Use held-out.jsonl").click()
            assert file.input_value() == "held-out.jsonl" and tab.page.locator("p.problem").count() == 0
            tab.faults.clear()
            length = tab.page.get_by_label("Maximum answer length in tokens", exact=True)
            for text in ("-5", "1.5"):
                length.fill(text)
                tab.page.get_by_role("button", name="Evaluate", exact=True).click()
                problem = tab.page.locator("p.problem")
                assert problem.inner_text() == "must be a whole number of at least 1"
                assert length.get_attribute("aria-invalid") == "true"
            length.fill("6")
            assert problem.count() == 0
            open_at(tab, dash, "/run/one/export", ".form >> nth=2")
            out = tab.page.locator(".form:has(h2:text-is('Merged model'))").get_by_label("Output path")
            out.fill("taken")
            tab.page.get_by_role("button", name="Export: Merged model").click()
            problem = tab.page.locator("p.problem:text('taken: already exists')")
            problem.wait_for()
            assert out.get_attribute("aria-invalid") == "true"
            problem.get_by_role("button", name="Use taken-2").click()
            assert out.input_value() == "taken-2" and problem.count() == 0
            out = tab.page.locator(".form:has(h2:text-is('GGUF file'))").get_by_label("Output path")
            out.fill("new/tuned")
            tab.page.get_by_role("button", name="Export: GGUF file").click()
            tab.page.wait_for_selector("p.problem:text('new/tuned: the name must end in .gguf')")
            tab.page.get_by_role("button", name="Use new/tuned.gguf").click()
            assert out.input_value() == "new/tuned.gguf"
            out.fill("rows.jsonl/tuned.gguf")
            tab.page.get_by_role("button", name="Export: GGUF file").click()
            tab.page.wait_for_selector("p.problem:text('rows.jsonl is a file')")
            tab.faults.clear()
            tab.axe(f"export at {size['width']}")
            tab.check("export")
    assert dash.get("/api/jobs").json() == jobs  # none has started


def test_rows_held_out_by_a_share_are_offered_for_the_evaluation(browser: Any, dashboard: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dashboard, tmp_path / "copy")
    file = folder / "runs" / "one" / "events.jsonl"
    recipe = {"data.eval": "20%", "data.train": "rows.jsonl", "model.name": "tiny-model"}
    events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for choice in next(event for event in events if event["event"] == "recipe")["choices"]:
        choice["value"] = recipe.get(choice["field"], choice["value"])
    file.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    with run_dash(Path("runs"), folder) as own, open_tab(browser, own) as tab:
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            open_at(tab, own, "/run/one/answers", ".sample >> nth=5")
            tab.page.locator("summary:text-is('Evaluate again')").click()
            tab.page.get_by_role("button", name="Use the 20% of rows that were held out").click()
            tab.page.wait_for_selector("#notice:has-text('rows to data/one-held-out')")
            field = tab.page.get_by_label("File of held-out rows", exact=True)
            tab.page.wait_for_function("field => field.value", arg=field.element_handle())
            path = field.input_value()
            copied = (folder / path).read_text(encoding="utf-8").splitlines()
            data = {"options": {**recipe, "data.bad_rows": "drop"}, "part": "eval", "count": 100}
            expected = [row["line"] for row in own.post("/api/data", data).json()["rows"]]
            rows = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
            assert copied == [rows[line - 1] for line in expected] and len(copied) > 2
            tab.check("held out")


def test_run_that_fails_before_its_first_step_shows_its_error(browser: Any, tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    options = {"model.name": str(tiny_folder), "data.train": "rows.jsonl", "lora.r": 4}
    with run_dash(Path("runs"), tmp_path) as own, open_tab(browser, own) as tab:
        tab.page.set_default_timeout(120_000)  # the run imports torch
        assert own.post("/api/start", {"options": options, "name": "bad"}).status_code == 200
        open_at(tab, own, "/run/bad", "h1:text-is('bad')")
        tab.page.wait_for_selector(".verdict.error:has-text('rows.jsonl:1')")
        tab.page.reload()
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            tab.page.wait_for_selector(".verdict.error:has-text('rows.jsonl:1')")
            tab.axe(f"failed at {size['width']}")
            tab.check("failed")
        open_at(tab, own, "/runs", "tr:has(.state.failed):has-text('training rows')")
        tab.check("list of runs")
        tab.page.get_by_role("link", name="bad").click()
        tab.page.get_by_role("button", name="Duplicate").click()
        tab.page.wait_for_selector("h1:text-is('New run')")
        assert tab.page.get_by_label("Training rows", exact=True).input_value() == "rows.jsonl"
        assert tab.page.get_by_label("Rank, exact").input_value() == "4"
        assert tab.page.get_by_label("Run name").input_value() == "bad-2"
        open_at(tab, own, "/run/bad", "h1:text-is('bad')")
        tab.page.get_by_role("button", name="Delete").click()
        tab.page.get_by_label("Type the run's name").fill("bad")
        tab.page.get_by_role("button", name="Delete run").click()
        tab.page.wait_for_selector("text=No runs yet")
        assert own.get("/api/jobs").json()["jobs"] == []
        tab.check("deleted")


def add_job(root: Path, kind: str, run: str, pid: int, log: str = "") -> Path:
    """Add a running job of the page, and return the file of its output."""
    job = root / ".dash" / "jobs" / f"20260101-000000-{kind}-abcdef"
    job.mkdir(parents=True)
    about = {"id": job.name, "kind": kind, "run": run, "words": [kind], "started": time.time(), "pid": pid}
    (job / "job.json").write_text(json.dumps({**about, "born": psutil.Process(pid).create_time()}))
    (job / "out").touch()
    (job / "log").write_text(log)
    return job / "log"


def test_silent_work_of_a_run_is_described(browser: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one", session())
    with sleeping() as sleeper, run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        born = psutil.Process(sleeper.pid).create_time()
        (folder / "claim.json").write_text(json.dumps({"pid": sleeper.pid, "started": born}))
        log = add_job(tmp_path, "train", "one", sleeper.pid, "still    compiling kernels (3 s)\n")
        open_at(tab, own, "/run/one", ".progress:has-text('compiling kernels (')")  # the page counts on
        log.write_text("still    compiling kernels (3 s)\nstill    reading rows (1 s)\n")
        tab.page.wait_for_selector(".progress:has-text('reading rows (')")
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            tab.check("silent work")
        tab.page.get_by_role("button", name="Stop and save").click()
        assert tab.page.get_by_role("button", name="Stopping…").is_disabled()
        sleeper.wait(20)
        tab.page.wait_for_selector(".state.crashed")
        assert tab.page.get_by_role("button", name="Stopping…").count() == 0


def test_resume_that_loads_is_running_and_not_offered_again(browser: Any, tmp_path: Path) -> None:
    stop = {"event": "stop", "time": 1, "step": 2, "why": "signal"}
    make_run(tmp_path, "one", [*session(), step(1), step(2), stop])
    with sleeping() as sleeper, run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/one", "text=on request, after saving")
        assert tab.page.get_by_role("button", name="Resume", exact=True).is_enabled()
        add_job(tmp_path, "resume", "one", sleeper.pid, "still    loading the libraries (3 s)\n")
        tab.page.wait_for_selector(".progress:has-text('loading the libraries (')")
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            assert tab.page.locator("h1 + .line").inner_text().split() == ["running", "preparing"]
            for name in ("Resume", "Delete"):
                assert tab.page.get_by_role("button", name=name, exact=True).count() == 0
            tab.check("resume")
        assert own.post("/api/runs/one/delete", {"confirm": "one"}).status_code == 409
        open_at(tab, own, "/runs", ".state.running")


def test_events_are_listed_once_while_a_run_is_followed(browser: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one", [*session(), step(1)])
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/one", ".plot canvas")
        later = [{"event": "start", "time": 2000, "step": 1, "steps": 9, "engine": "fast"}, step(2)]
        stop = {"event": "stop", "time": 3000, "step": 2, "why": "signal"}
        for events in (later, [stop]):
            with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(event) + "\n" for event in events))
            tab.page.wait_for_selector(f".marks .kind:text-is('{events[0]['event']}')")
            tab.page.wait_for_timeout(2500)  # both kinds of updates arrive
        kinds = tab.page.locator(".marks .kind").all_text_contents()
        assert kinds == ["stop", "start", "start"]
        tab.check("events")


def test_demo_is_offered_as_a_model_and_a_job_that_was_stopped_is_no_error(browser: Any, tmp_path: Path) -> None:
    for name in ("runs", "cache/inner", "models/tiny"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "cache" / "rows.jsonl").write_text("{}", encoding="utf-8")
    with sleeping() as sleeper, run_dash(Path("runs"), tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/new", "h1:text-is('New run')")
        for kind, folder in (("Training rows", "cache/"), ("Model", "models/")):
            tab.page.get_by_role("button", name=f"Choose: {kind}").click()
            tab.page.wait_for_selector("dialog li")
            names = tab.page.locator("dialog li button").all_inner_texts()
            assert names == [*(["demo"] if kind == "Model" else []), folder]
            assert tab.page.locator("dialog code").count() == 0  # the line above is prose
            if kind != "Model":
                tab.page.get_by_role("button", name="Cancel").click()
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            assert tab.page.locator("dialog").bounding_box()["width"] > 0.7 * min(400, size["width"])
            tab.axe("choose")
        tab.page.get_by_role("button", name="demo", exact=True).click()
        assert tab.page.get_by_label("Model", exact=True).input_value() == "demo"
        log = add_job(tmp_path / "runs", "doctor", "", sleeper.pid)
        open_at(tab, own, "/machine", ".job .state.running")
        assert tab.page.locator("text=No jobs yet").count() == 0
        error = {"kind": "Stopped", "message": "stopped after step 2", "fix": "strop resume runs/one", "where": []}
        log.with_name("out").write_text(json.dumps({"error": error}))
        sleeper.kill()
        sleeper.wait()
        tab.page.wait_for_selector(".job .state.stopped")
        assert tab.page.locator(".job .error").count() == 0 and "resume" not in tab.page.locator("main").inner_text()
        tab.check("jobs")


def test_colours_of_memory_stay_when_parts_appear(browser: Any, dash: Dash) -> None:
    def colours() -> dict[str, str]:
        result: dict[str, str] = tab.page.evaluate(
            "Object.fromEntries([...document.querySelectorAll('.bars .key span:has(i)')]"
            ".map((one) => [one.innerText, one.querySelector('i').className]))"
        )
        return result

    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={NEW}", ".bars .phase >> nth=4")
        few = colours()
        tab.page.get_by_label("Rank, exact", exact=True).fill("512")
        tab.page.wait_for_selector("code:text('--lora.r=512')")
        many = colours()
        assert len(many) > len(few) > 1 and {name: many[name] for name in few} == few


def test_comparison_shows_raw_losses_behind_the_smoothed_ones(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, "/compare?runs=one,broken&smooth=0.9", ".plot canvas")
        plot = tab.page.locator(".plot").first
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            assert plot.locator(".legend .entry:visible").count() == 2  # raw curves have no entry
            tab.check("compare")

        def columns() -> list[list[str]]:
            plot.locator("summary").click()
            with tab.page.expect_download() as saved:
                plot.get_by_role("button", name="CSV", exact=True).click()
            return [line.split(",") for line in Path(saved.value.path()).read_text(encoding="utf-8").splitlines()]

        head, *rows = columns()
        assert head == ["step", '"one', ' each step"', '"broken', ' each step"', "one", "broken"]
        assert rows[3][1] != rows[3][3]

        def pixels() -> str:
            result: str = plot.locator("canvas").evaluate("(canvas) => canvas.toDataURL()")
            return result

        shown = pixels()
        plot.locator(".legend .entry:visible").first.click()
        tab.page.wait_for_timeout(100)
        hidden = pixels()
        assert hidden != shown
        with tab.page.expect_download() as saved:
            plot.locator("summary").click()
            plot.get_by_role("button", name="SVG", exact=True).click()
        assert (
            Path(saved.value.path()).read_text(encoding="utf-8").count("<polyline") == 2
        )  # both curves of the other run


def test_run_in_a_chat_is_not_renamed_and_the_reason_is_shown(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, "one", [*session(), step(1), step(2)], {"exit": 0})
    with sleeping() as sleeper, run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        add_job(tmp_path, "serve", str(tmp_path / "one"), sleeper.pid)
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            open_at(tab, own, "/run/one", "h1:text-is('one')")
            tab.page.get_by_role("button", name="Edit", exact=True).click()
            tab.page.get_by_label("Name", exact=True).fill("two")
            tab.page.get_by_role("button", name="Save", exact=True).click()
            tab.page.wait_for_selector("dialog .verdict.error:has-text('unload the model on the Chat screen')")
            tab.page.get_by_role("button", name="Cancel").click()
        sleeper.kill()
        sleeper.wait()
        tab.page.get_by_role("button", name="Edit", exact=True).click()
        tab.page.get_by_label("Name", exact=True).fill("two")
        tab.page.get_by_role("button", name="Save", exact=True).click()
        tab.page.wait_for_selector("h1:text-is('two')")


def test_dialog_closes_with_its_page_and_enter_deletes(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, "one", [*session(), step(1)], {"exit": 0})
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/runs", "text=one")
        tab.page.get_by_role("link", name="one").click()
        for name in ("Edit", "Delete"):
            tab.page.get_by_role("button", name=name, exact=True).click()
            tab.page.wait_for_selector("dialog[open]")
            tab.page.go_back()
            tab.page.wait_for_selector("h1:text-is('Runs')")
            assert tab.page.locator("dialog").count() == 0
            tab.page.go_forward()
        tab.page.get_by_role("button", name="Delete", exact=True).click()
        tab.page.get_by_label("Type the run's name").fill("on")
        tab.page.keyboard.press("Enter")
        assert tab.page.locator("dialog[open]").count() == 1
        tab.page.keyboard.type("e")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector("text=No runs yet")
        tab.faults[:] = [fault for fault in tab.faults if "404" not in fault]  # of a request sent before the deletion
        tab.check("deleted with Enter")


def test_running_evaluation_is_open_and_enter_starts_one(browser: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one", [*session(), step(1)], {"exit": 0})
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "adapter_model.safetensors").touch()
    evaluated(folder, [sample(number, False, True) for number in range(3)])
    with sleeping() as sleeper, run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/one/answers", "summary:text-is('Evaluate again')")
        assert not tab.page.locator("details:has-text('Evaluate again')").first.evaluate("element => element.open")
        tab.page.get_by_text("Evaluate again", exact=True).click()
        tab.page.get_by_label("File of held-out rows", exact=True).fill("nowhere.jsonl")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector("text=no such file")
        add_job(tmp_path, "evaluate", "one", sleeper.pid)
        tab.page.reload()
        tab.page.wait_for_selector(".job .state.running:visible")


def test_chat_lists_runs_that_finish_or_are_renamed_while_it_is_open(browser: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path, "one", [*session(), step(1)], {"exit": 0})
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/chat", "text=No run has an adapter to chat with yet")
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text("{}")
        (folder / "report.json").write_text('{"exit": 0, "steps": 1}')
        tab.page.wait_for_selector("select[aria-label=Run] option:text-is('one')", state="attached")
        assert own.post("/api/runs/one/rename", {"to": "two"}).status_code == 200
        tab.page.wait_for_selector("select[aria-label=Run] option:text-is('two')", state="attached")
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            tab.check("chat")


def test_axis_of_steps_has_integer_ticks(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        tab.page.add_init_script("""
            const draw = CanvasRenderingContext2D.prototype.fillText;
            window.drawn = [];
            CanvasRenderingContext2D.prototype.fillText = function (text, ...more) {
                window.drawn.push([text, this.textAlign]);
                return draw.call(this, text, ...more);
            };""")
        open_at(tab, dash, "/run/one?range=2~9", ".plot canvas")
        ticks = tab.page.evaluate("drawn.filter(([, align]) => align === 'center').map(([text]) => text)")
        assert ticks and all(text.isdigit() for text in ticks)


def test_start_is_visible_while_the_form_is_scrolled(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={NEW}", ".bars .phase >> nth=4")
        for size in (DESK, PHONE):
            tab.page.set_viewport_size(size)
            for part in ("0", "document.body.scrollHeight"):
                tab.page.evaluate(f"scrollTo(0, {part})")
                box = tab.page.get_by_role("button", name="Start", exact=True).bounding_box()
                assert 0 < box["y"] < size["height"] - box["height"]
        assert tab.page.locator(".startbar").inner_text().startswith("It fits")


def test_memory_of_a_live_run_is_compared_with_the_plan(browser: Any, tmp_path: Path) -> None:
    mib = 1 << 20
    tried = {"event": "rehearsal", "time": 1, "done": False, "predicted_bytes": 719 * mib, "resident_bytes": 4 * mib}
    steps = [step(number, resident_bytes=number * 100 * mib) for number in (1, 2)]
    folder = make_run(tmp_path, "one", [*session(), {**tried, "usable_bytes": 9 << 30}, *steps])
    with sleeping() as sleeper, run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        claim = {"pid": sleeper.pid, "started": psutil.Process(sleeper.pid).create_time()}
        (folder / "claim.json").write_text(json.dumps(claim))
        rss = psutil.Process(sleeper.pid).memory_info().rss
        busy = {"time": 1, "cpu": 1.0, "memory": {"used": 96, "total": 100}, "gpus": [], "disk": {"free": 1 << 30}}
        process = {"pid": sleeper.pid, "rss": 500 * mib, "library_bytes": 96 * mib, "cpu": 7.0}
        assert own.get("/api/system?run=one").json()["process"]["rss"] == rss
        lines = f"event: system\ndata: {json.dumps({**busy, 'process': process})}\n\n"
        open_at(tab, own, "/run/one", ".phase:has-text('CPU')")
        tab.page.route("**/stream*", lambda way: way.fulfill(content_type="text/event-stream", body=lines))
        tab.page.get_by_role("button", name="tokens", exact=True).click()  # opens the stream again
        tab.page.wait_for_selector("text=uses 500 MiB of memory, of which 100 MiB for Python and its libraries")
        memory = {
            row.locator("span").first.inner_text(): row.locator(".sum").inner_text()
            for row in tab.page.locator(".card:has(h3:text-is('Training memory')) .phase").all()
        }
        assert memory == {"planned": "719 MiB", "now": "400 MiB"}
        curve = tab.page.locator(".plot:has(.title:text-is('Process memory after each step'))")
        assert "200 MiB" in curve.locator(".legend").inner_text()
        assert tab.page.locator(".plot:has(.title:text-is('Tokens/s'))").count() == 1
        over = tab.page.locator(".phase:has(.over) span:first-child").all_inner_texts()
        assert over == ["memory"]  # a busy CPU is normal
        with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(step(3, resident_bytes=300 * mib)) + "\n")
        tab.page.unroute("**/stream*")
        open_at(
            tab,
            own,
            "/run/one",
            ".plot:has(.title:text-is('Process memory after each step')) b:text-is('300 MiB')",
        )
        tab.page.set_viewport_size(PHONE)
        tab.check("memory")


def test_live_run_is_followed_and_lost_server_is_shown(browser: Any, dashboard: Path) -> None:
    events = dashboard / "runs" / "broken" / "events.jsonl"
    old = events.read_text(encoding="utf-8")
    last = [json.loads(line) for line in old.splitlines() if '"event": "step"' in line][-1]
    with run_dash(Path("runs"), dashboard) as own, open_tab(browser, own) as tab, open_tab(browser, own) as other:
        for one in (tab, other):
            open_at(one, own, "/run/broken", ".plot canvas")
            assert one.page.locator(".state.crashed").count() == 1
            one.page.wait_for_selector(f"text=Step {last['step']} of")
        more = {**last, "step": last["step"] + 1, "loss": 123.456}
        with events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(more) + "\n")
        for one in (tab, other):
            one.page.wait_for_selector(f"text=Step {last['step'] + 1} of")
            one.page.wait_for_selector(".legend b:has-text('123.456')")
            assert facts_of(one)["training loss"] == "123.456"  # the last loss, not a smoothed one
            assert "skip" in one.page.locator(".marks").text_content()
            one.check("two tabs")
        own.process.kill()
        tab.page.wait_for_selector("text=Connection lost")
        assert tab.page.locator(".plot canvas").count()  # existing text is kept
    events.write_text(old, encoding="utf-8")


def test_theme_is_remembered(browser: Any, dash: Dash) -> None:
    def paper() -> str:
        result: str = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return result

    with open_tab(browser, dash, color_scheme="light") as tab:
        open_at(tab, dash, "/run/one", ".plot canvas")
        light = paper()
        for theme, scheme, is_dark in (("dark", "light", True), ("light", "dark", False), ("auto", "dark", True)):
            tab.page.get_by_label("Theme").select_option(theme)
            tab.page.emulate_media(color_scheme=scheme)
            for _ in range(2):
                assert (paper() != light) == is_dark
                tab.axe(f"{theme} theme, {scheme} system")
                tab.page.reload()
                tab.page.wait_for_selector(".plot canvas")
                assert tab.page.get_by_label("Theme").input_value() == theme
        tab.page.set_viewport_size(PHONE)
        assert tab.page.get_by_label("Theme").is_visible()
        tab.check("themes")


def test_earlier_addresses_lead_to_the_renamed_screens(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, "/talk?run=one", "h1:text-is('Chat')")
        assert tab.page.url.endswith("#/chat?run=one")
        open_at(tab, dash, f"/run/{STRANGE}/take", ".form >> nth=2")
        assert tab.page.url.endswith(f"#/run/{STRANGE}/export")
        tab.check("earlier addresses")


def test_page_without_the_token_shows_nothing(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        tab.page.goto(dash.url + "/#/run/one")
        tab.page.wait_for_selector("text=Sign in")
        assert "rows.jsonl" not in tab.page.content()
        tab.page.fill("input", f"{dash.url}/#token={TOKEN}")
        tab.page.click("text=Open >> nth=-1")
        tab.page.wait_for_selector(".plot canvas")
        assert [fault for fault in tab.faults if "401" not in fault] == []


def test_restarted_server_asks_open_tabs_for_the_new_token(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, "one", [*session(), step(1), step(2)], {"exit": 0})
    for address, whole in (
        ("/runs", "tbody th"),
        ("/run/one", ".plot canvas"),
        ("/chat", "text=No run has an adapter"),
    ):
        with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
            open_at(tab, own, address, whole)
            own.stop()
            tab.page.wait_for_timeout(1000)
            with run_dash(tmp_path, port=int(own.url.rpartition(":")[2]), token="another") as restarted:
                tab.page.wait_for_selector("h1:text-is('Sign in')")
                tab.page.wait_for_selector("text=The token of this browser is not valid")
                tab.page.wait_for_timeout(300)
                assert tab.page.locator("#link").inner_text() == "" and tab.page.locator(".error").count() == 0
                tab.page.get_by_label("Token").fill(f"{restarted.url}/#token=another")
                tab.page.get_by_role("button", name="Open").click()
                tab.page.wait_for_selector(whole)


def test_content_security_policy_blocks_inline_code(browser: Any, dash: Dash) -> None:
    """Inline scripts and styles in the markup have no effect."""
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, "/runs", "table .spark")
        done = tab.page.evaluate("""() => {
            const box = document.createElement("div");
            box.innerHTML = "<img src='data:,x' onerror='window.owned = 1'><p style='position:fixed'>x</p>";
            document.body.append(box);
            const script = document.createElement("script");
            script.textContent = "window.owned = 2";
            document.body.append(script);
            const style = getComputedStyle(box.querySelector("p"));
            return new Promise((end) => setTimeout(() => end([window.owned ?? 0, style.position]), 300));
        }""")
        assert done == [0, "static"]
        assert any("Content Security Policy" in fault for fault in tab.faults)


def test_chat_sends_the_system_prompt_of_each_model(browser: Any, dash: Dash) -> None:
    now: dict[str, Any] = {"state": "ready", "names": ["sysrun"], "error": None}
    tuned: dict[str, Any] = {"id": "sysrun", "system": "be bold"}
    received: dict[str, Any] = {}

    def answer(way: Any) -> None:
        body = way.request.post_data_json
        received[body["model"]] = [(message["role"], message["content"]) for message in body["messages"]]
        way.fulfill(content_type="text/event-stream", body="data: [DONE]\n\n")

    def ask() -> tuple[dict[str, Any], str]:
        received.clear()
        tab.page.get_by_label("Your message").fill("hi")
        tab.page.keyboard.press("Enter")
        answers = "document.querySelectorAll('.chat p:not(.user, .soft, .waiting)')"
        tab.page.wait_for_function(f"() => {answers}.length === 2")
        return dict(received), tab.page.get_by_label("System prompt").get_attribute("placeholder")

    with open_tab(browser, dash) as tab:
        tab.page.route("**/api/chat", lambda way: way.fulfill(json=now))
        tab.page.route("**/api/chat/v1/models", lambda way: way.fulfill(json={"data": [tuned, {"id": "base"}]}))
        tab.page.route("**/api/chat/v1/chat/completions", answer)
        open_at(tab, dash, "/chat", ".chat >> nth=1")
        user = ("user", "hi")
        assert ask() == ({"base": [("system", "be bold"), user], "sysrun": [user]}, "be bold")
        now["names"], tuned = ["plain"], {"id": "plain", "system": None}  # "Load this model"
        tab.page.wait_for_selector("[aria-label='Answers of plain']")
        assert ask() == ({"base": [user], "plain": [user]}, "that of the chat template, if it has one")
        tab.page.locator("details > summary").click()
        tab.page.get_by_label("System prompt").fill("be brief")
        tab.page.get_by_role("button", name="New chat").click()
        assert ask()[0] == {name: [("system", "be brief"), user] for name in ("base", "plain")}
        tab.check("chat")


def test_chat_shows_an_error_once_and_keeps_the_message(browser: Any, dash: Dash) -> None:
    asked = []

    def refuse(way: Any) -> None:
        asked.append(way.request.post_data_json)
        way.fulfill(status=400, json={"error": {"message": "the server is full"}})

    with open_tab(browser, dash) as tab:
        ready = {"state": "ready", "names": ["one"], "error": None}
        tab.page.route("**/api/chat", lambda way: way.fulfill(json=ready))
        tab.page.route("**/api/chat/v1/models", lambda way: way.fulfill(json={"data": [{"id": "one"}, {"id": "base"}]}))
        tab.page.route("**/api/chat/v1/chat/completions", refuse)
        open_at(tab, dash, "/chat", ".chat >> nth=1")
        box = tab.page.get_by_label("Your message")
        tab.page.locator("details > summary").click()
        temperature = tab.page.get_by_label("Temperature", exact=True)
        temperature.fill("-1")
        box.fill("hi")
        box.press("Enter")
        assert tab.page.locator(".field p.problem").inner_text() == "must be a number from 0 to 2"
        assert temperature.get_attribute("aria-invalid") == "true" and box.input_value() == "hi" and not asked
        tab.check("chat")
        temperature.fill("0.75")
        assert tab.page.locator("p.problem").count() == 0
        box.press("Enter")
        tab.page.wait_for_selector("[role=alert]:has-text('the server is full')")
        assert tab.page.locator("text=the server is full").count() == 1 and box.input_value() == "hi"
        assert [body["temperature"] for body in asked] == [0.75, 0.75]
        assert tab.page.locator(".chat .user").count() == 0
        tab.faults.clear()  # the browser reports the refused requests
        tab.check("chat")


def test_chat_stays_while_another_screen_is_shown(browser: Any, dash: Dash) -> None:
    now: dict[str, Any] = {"state": "starting", "names": ["runs/one"], "activity": None, "error": None}
    now["started"] = time.time()
    with open_tab(browser, dash) as tab:
        tab.page.route("**/api/chat", lambda way: way.fulfill(json=now))
        tab.page.route("**/api/chat/v1/models", lambda way: way.fulfill(json={"data": [{"id": "one"}, {"id": "base"}]}))
        held = hold(tab, "chat/v1/chat/completions")
        open_at(tab, dash, "/chat?run=one", "text=/loading the models .[0-9]+/")
        shown = tab.page.locator("[role=status] p").inner_text()
        tab.page.wait_for_function(
            "(shown) => document.querySelector('[role=status] p').innerText !== shown", arg=shown
        )
        now["state"] = "ready"
        assert tab.page.get_by_role("button", name="Load this model").is_disabled()
        tab.page.get_by_label("Run", exact=True).select_option(HOSTILE_NAME)
        assert tab.page.get_by_role("button", name="Load this model").is_enabled()
        tab.page.wait_for_selector(".chat >> nth=1")
        tab.page.get_by_label("Your message").fill("hi")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector(".chat .waiting >> nth=1")
        tab.page.get_by_role("link", name="Data", exact=True).click()
        tab.page.wait_for_selector("h1:text-is('Data')")
        for way in held:  # the answers arrive while another screen is shown
            event = {"choices": [{"delta": {"content": f"answer of {way.request.post_data_json['model']}"}}]}
            way.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")
        tab.page.get_by_role("link", name="Chat", exact=True).click()
        for reloads in (True, False):
            for model in ("one", "base"):
                tab.page.wait_for_selector(f".chat:has-text('hi'):has-text('answer of {model}')")
            for size in (DESK, PHONE):
                tab.page.set_viewport_size(size)
                tab.check("chat")
            if reloads:
                tab.page.reload()
        tab.page.get_by_label("Your message").fill("and you?")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector(".chat .waiting >> nth=1")
        said = [message["content"] for message in held[-1].request.post_data_json["messages"]]
        assert len(said) == 3 and said[0] == "hi" and said[1].startswith("answer of") and said[2] == "and you?"
        tab.page.keyboard.press("Escape")
        tab.page.get_by_role("button", name="New chat").click()
        tab.page.reload()
        tab.page.wait_for_selector("text=Answers of one appear here.")
        assert tab.page.locator(".chat .user").count() == 0


def test_run_without_an_adapter_says_what_to_do(browser: Any, tmp_path: Path) -> None:
    stop = {"event": "stop", "time": 1, "step": 2, "why": "signal"}
    make_run(tmp_path, "one", [*session(), step(1), step(2), stop])
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        for part in ("answers", "export"):
            open_at(tab, own, f"/run/one/{part}", "text=Resume the run to finish it.")
            tab.check(part)


def test_uplot_files_have_the_published_checksums() -> None:
    folder = STATIC / "uplot"
    sums = re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", (folder / "NOTE.md").read_text(encoding="utf-8"), re.M)
    assert {name for name, _ in sums} == {file.name for file in folder.iterdir()} - {"NOTE.md", "LICENSE"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected for name, expected in sums)


def test_scripts_do_not_parse_markup() -> None:
    """An attacker may choose the text of rows and answers, so it only becomes text nodes (`dom.js`)."""
    ways = r"(inner|outer|insertAdjacent)HTML|document\.write|parseFromString|ContextualFragment|\beval\(|Function\("
    scripts = [file for file in STATIC.rglob("*.js") if file.parent.name != "uplot"]
    texts = {file.name: file.read_text(encoding="utf-8") for file in scripts}
    assert len(texts) > 15 and not [name for name, text in texts.items() if re.search(ways, text)]
    assert not re.search(r" style=|<style|<script>| on\w+=", (STATIC / "index.html").read_text(encoding="utf-8"))


def test_export_types_equal_those_of_the_commands() -> None:
    from strop.exporting import llama_cpp, parity

    text = (STATIC / "screens" / "export.js").read_text(encoding="utf-8")
    types = re.search(r"GGUF_TYPES = (\[.*?\]);", text)
    bits = re.search(r"BITS = \{(.*?)\}", text)
    assert bits and set(re.findall(r"(\w+):", bits[1])) == {*llama_cpp.LIMITS, *parity.LIMITS}
    assert types and json.loads(types[1]) == list(llama_cpp.LIMITS)
    assert set(re.findall(r'"([bf]p?f?\d+)"', text.replace(types[1], ""))) == set(parity.LIMITS)
