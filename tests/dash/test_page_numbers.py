"""Numbers that the page shows in several places, and the page on a phone, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strop.display.numbers import format_duration, format_figure, format_percent
from strop.evaluation.metrics import format_number
from tests.dash.test_page import facts_of, open_at, sleeping
from tests.dash.test_page_runs import claim
from tests.support.browser import DESK, PHONE, open_tab
from tests.support.dash import Dash, evaluated, make_run, run_dash, sample, session, step

FIGURES = [0, 1e-5, 1e-3, 4.67e-4, 0.0028, 0.001867, 0.0123, 0.05, 0.36778, 9.85231, 75, 999.9, 1234.6, 27285935.9]
DURATIONS = [0, 3.21, 9.96, 12.4, 59.7, 60, 126, 3599.9, 3600, 7384, 200_000]
# rows of a phone's screen whose controls are too small for a finger
SMALL = """() => [...document.querySelectorAll("button, .button, select, summary, input:not([type=checkbox])")]
  .filter((one) => one.checkVisibility() && !one.matches(".link, .entry") && !one.closest("thead"))
  .filter((one) => one.getBoundingClientRect().height < 39.5).map((one) => one.outerHTML.slice(0, 120))"""


def test_page_and_report_have_the_same_formats(browser: Any, dash: Dash) -> None:
    shares = [hits / rows for rows in (12, 16, 80, 176) for hits in range(rows + 1)]
    code = """async ([shares, figures, durations]) => {
      const { duration, figure, lossText, percent } = await import("/format.js");
      return [shares.map((one) => percent(one)), figures.map((one) => figure(one)), figures.map((one) => lossText(one)),
        durations.map(duration)];
    }"""
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, "/run/one", ".plot canvas")
        shown = tab.page.evaluate(code, [shares, FIGURES, DURATIONS])
    assert shown[0] == [format_percent(share) for share in shares]
    assert shown[1] == [format_figure(value) for value in FIGURES]
    assert shown[2] == [format_number("loss", value) for value in FIGURES]
    assert shown[3] == [format_duration(seconds) for seconds in DURATIONS]
    assert [format_figure(rate) for rate in (0.001, 4.67e-4, 0.0028)] == ["1e-3", "4.67e-4", "2.8e-3"]


def events_of(seconds: float = 10.0) -> list[dict[str, Any]]:
    """Return events of 4 steps, an evaluation with samples after the second, and saves between them."""
    at = 1000.0
    events = [*session(at, steps=20), {"event": "rehearsal", "time": at + 1, "done": False, "predicted_seconds": 20.0}]
    at += 1
    for number in (1, 2, 3, 4):
        at += seconds
        events.append(step(number, 20, time=at, epoch=0, tokens=40 * number))
        if number == 2:
            events.append({"event": "eval", "time": at + 5, "step": 2, "loss": 1.0, "seconds": 5.0})
            events.append({"event": "samples", "time": at + 12, "step": 2, "samples": []})
            events.append({"event": "save", "time": at + 15, "step": 2, "checkpoint": "step-000002", "seconds": 3.0})
            at += 15
    return events


def test_running_and_stopped_run_have_the_same_times_and_speed(browser: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path, "run", events_of())
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab, sleeping() as process:
        file = claim(folder, process.pid)
        open_at(tab, own, "/run/run", ".plot canvas")
        running = facts_of(tab)
        assert tab.page.locator(".progress .warn").inner_text().startswith("Slower than planned: 40 s instead of 4.0 s")
        file.unlink()
        report = {"exit": 6, "ended": "stop", "steps": 4, "seconds": 40.0, "eval_seconds": 12.0, "tokens_per_s": 4.0}
        (folder / "report.json").write_text(json.dumps({**report, "tokens": 160}), encoding="utf-8")
        open_at(tab, own, "/run/run", ".state:text-is('crashed')")
        stopped = facts_of(tab)
    for facts in (running, stopped):
        assert facts["training time"] == "40 s" and facts["evaluation and samples"] == "12 s"
        assert facts["planned for these steps, on an idle machine"] == "4.0 s" and facts["tokens/s, mean"] == "4"


def test_settings_of_a_renamed_run_name_its_folder(browser: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path, "run a", session(), {"exit": 6, "adapter_step": 4, "eval_loss": None, "recipe": []})
    events = events_of()
    events[1]["choices"].append({"field": "out", "value": "runs/old", "origin": "option", "why": ""})
    report = {"rows": {"read": 40, "used": 40, "dropped": 0}, "held_out": 5}
    events.insert(2, {"event": "data", "time": 1000.0, "report": report})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    for number in (2, 4):
        (folder / "checkpoints" / f"step-{number:06d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{number:06d}" / "state.json").write_text("{}")
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/run%20a/settings", "text=Checkpoints")
        text = tab.page.locator("main").inner_text()
        assert "runs/old" not in text and f"strop resume '{folder}'" in text
        facts = facts_of(tab)
        assert (facts["read"], facts["trained on"], facts["held out for evaluation"]) == ("40", "35", "5")
        assert tab.page.locator("li", has_text="step 4").inner_text().strip() == "step 4"  # never evaluated


def test_comparison_names_the_answers_that_were_cut_on_each_side(browser: Any, tmp_path: Path) -> None:
    for name, limit in (("a", 80), ("b", 10)):
        folder = make_run(tmp_path, name, events_of(), {"exit": 0})
        cut = {"max_tokens": limit, "references_cut": 0, "base_cut": 7, "tuned_cut": 0}
        evaluated(folder, [sample(n, False, n < 6) for n in range(12)], answers=cut)
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/compare?runs=a,b", "text=answer limit")
        assert "80 tokens; cut: 7 base, 0 tuned" in tab.page.locator("table").first.inner_text()


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run that has an adapter, and long answers of the base, of which one was cut."""
    root = tmp_path_factory.mktemp("answered")
    folder = make_run(root, "run", events_of(), {"exit": 6, "ended": "stop", "steps": 4})
    long = "a long answer. " * 30
    rows = [sample(n, False, True, base=long, base_cut=n == 0, tuned_cut=False) for n in range(4)]
    answers = {"max_tokens": 80, "references_cut": 0, "base_cut": 1, "tuned_cut": 0}
    difference = {"value": 1.0, "low": 0.4, "high": 1.0}
    evaluated(folder, rows, answers=answers, difference=difference)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    return root


def test_verdict_leads_to_the_answers_whose_long_texts_are_folded(browser: Any, answered: Path) -> None:
    with run_dash(answered) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/run", ".plot canvas")
        tab.page.get_by_role("link", name="See the answers").click()
        tab.page.wait_for_selector(".sample")
        texts = tab.page.locator(".sample .base pre")
        assert sum("(cut at the limit)" in text for text in tab.page.locator("pre").all_inner_texts()) == 1
        folded = texts.first.bounding_box()["height"]
        tab.page.get_by_role("button", name="Show all").first.click()
        assert texts.first.bounding_box()["height"] > folded
        assert "1 of 4 base answers were cut at 80 tokens" in tab.page.locator("main").inner_text()


@pytest.mark.parametrize("address", ["/run/run", "/run/run/answers", "/run/run/export", "/compare?runs=run", "/runs"])
def test_controls_are_large_enough_for_a_finger_on_a_phone(browser: Any, answered: Path, address: str) -> None:
    with run_dash(answered) as own, open_tab(browser, own, has_touch=True) as tab:
        tab.page.set_viewport_size(PHONE)
        open_at(tab, own, address, "h1")
        assert tab.page.evaluate(SMALL) == []
        tab.check(address)
        if address != "/run/run":
            return
        buttons = tab.page.locator(".actions.push > *")
        assert buttons.all_inner_texts() == ["Resume", "Duplicate", "Edit", "Chat", "Delete"]
        assert len({buttons.nth(index).bounding_box()["y"] for index in range(5)}) == 1
        assert not tab.page.get_by_text("Drag over a curve").is_visible()


def test_plan_is_above_the_form_on_a_phone(browser: Any, dash: Dash) -> None:
    options = json.dumps({"model.name": "tiny-model", "data.train": "rows.jsonl", "data.bad_rows": "drop"})
    with open_tab(browser, dash) as tab:
        for size, above in ((PHONE, True), (DESK, False)):
            tab.page.set_viewport_size(size)
            open_at(tab, dash, f"/new?options={options}", ".verdict.better")
            verdict, form = (tab.page.locator(part).first.bounding_box() for part in (".verdict", "fieldset"))
            assert (verdict["y"] + verdict["height"] <= form["y"]) is above
            tab.check("plan")
        assert "on an otherwise idle machine" in tab.page.locator(".startbar").inner_text()
        tab.page.locator("summary", has_text="More settings").click()
        labels = tab.page.locator(".others label").all_inner_texts()
        assert "Row format" in labels and not [text for text in labels if "." in text or "_" in text]
        empty = (
            "[...document.querySelectorAll('.others input, .others option')].map((one) => one.placeholder || one.text)"
        )
        texts = tab.page.evaluate(empty)
        assert "not set" in texts and not {"-", "{}", "default (-)"} & set(texts)


def test_no_chart_is_alone_in_its_row(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, "run", [{**event, "resident_bytes": 1 << 30} for event in events_of()])
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/run", ".plots canvas")
        tab.page.wait_for_selector(".plots .plot:nth-child(4)")
        boxes = [plot.bounding_box() for plot in tab.page.locator(".plots > .plot").all()]
        rows = [box["y"] for box in boxes]
        assert len(boxes) == 4 and sorted(map(rows.count, rows)) == [2, 2, 2, 2]


def test_forms_of_exports_are_level(browser: Any, answered: Path) -> None:
    with run_dash(answered) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/run/run/export", "button.main:text-is('Export')")
        assert len({box.bounding_box()["y"] for box in tab.page.locator("button.main:text-is('Export')").all()}) == 1


def test_base_alone_is_offered_for_a_chat_and_empty_screens_have_links(browser: Any, tmp_path: Path) -> None:
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        open_at(tab, own, "/runs", "text=No runs yet")
        tab.page.get_by_role("link", name="Start a run").click()
        tab.page.wait_for_selector("h1:text-is('New run')")
        open_at(tab, own, "/chat", "text=No run has an adapter to chat with yet")
        assert tab.page.get_by_role("link", name="Start a run").is_visible()
        make_run(tmp_path, "run", events_of())
        tab.page.wait_for_selector("select[aria-label=Run] option:text-is('tiny, the base alone')", state="attached")
        asked = []
        tab.page.route("**/api/chat/start", lambda route: (asked.append(route.request.post_data_json), route.abort()))
        tab.page.get_by_role("button", name="Start", exact=True).click()
        tab.page.wait_for_timeout(300)
        assert asked == [{"model": "tiny"}]
