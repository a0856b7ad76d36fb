"""The report page: it shows every figure, leaves out missing ones, and is safe with any sample text."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from strop.evaluation.report import render, write_report
from tests.support.browser import DESK, PHONE, open_browser

ATTACK = "</pre><script>alert(1)</script><img src=x onerror=alert(2)><svg onload=alert(3)>&{{ 7 * 7 }}\ud800"


def steps(number: int) -> list[dict[str, Any]]:
    return [
        {
            "event": "step",
            "step": n,
            "loss": 2.0 / n,
            "learning_rate": 1e-3,
            "grad_norm": 0.5 + 0.1 * (n % 3),
            "tokens_per_s": 480.0,
        }
        for n in range(1, number + 1)
    ]


def full() -> dict[str, Any]:
    return {
        "run": "runs/demo-1",
        "steps": 297,
        "tokens": 140400,
        "supervised_tokens": 61000,
        "tokens_per_s": 471.2,
        "seconds": 298.2,
        "loss": {"first": 2.31, "last": 0.0213},
        "eval_loss": 0.0512,
        "data": {"read": 693, "used": 691, "truncated": 0, "split": 0, "dropped": 2, "by_reason": {"empty answer": 2}},
        "memory": {"predicted_peak_bytes": 1.5 * 2**30, "measured_peak_bytes": 1.25 * 2**30},
        "evaluation": {
            "rows": 176,
            "metric": "exact_json",
            "base": {"exact_json": 0.0, "valid_json": 0.0625, "loss": 1.92},
            "tuned": {"exact_json": 0.875, "valid_json": 1.0, "loss": 0.0512},
            "intervals": {"base": [0.0, 0.021], "tuned": [0.817, 0.916]},
            "difference": {"value": 0.875, "low": 0.81, "high": 0.916},
        },
        "samples": [
            {
                "prompt": "dim it",
                "gold": "a b c d",
                "base": "x",
                "tuned": "a b q d",
                "base_hit": False,
                "tuned_hit": False,
            }
        ],
        "recipe": [
            {"field": "lora.r", "value": 16, "origin": "default", "why": ""},
            {"field": "train.learning_rate", "value": 1e-3, "origin": "plan", "why": "small models take larger steps"},
        ],
        "lock": {"data": "ab" * 32, "versions": {"torch": "2.13.0"}},
        "machine": {"cores": 2, "memory_bytes": 8 * 2**30, "gpus": []},
    }


class Page(HTMLParser):
    """Tags and attributes of a page, and its text without markup."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_full_report_shows_every_figure(tmp_path: Path) -> None:
    events = [*steps(60), {"event": "eval", "step": 30, "loss": 0.3}, {"event": "eval", "step": 60, "loss": 0.2}]
    path = write_report(tmp_path, full(), [{"event": "rehearsal"}, *events, {"event": "skip", "step": 3}])
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    verdict = "Better: +87.5 points, 95 % interval +81.0 to +91.6: exact_json went from 0.0% to 87.5% on 176 rows."
    assert verdict in page.text
    for figure in (
        "297",
        "4 min 58 s",
        "140,400",
        "61,000",
        "471",
        "2.310 → 0.021",
        "1.50 GiB",
        "1.25 GiB",
        "81.7% to 91.6%",
    ):
        assert figure in page.text, figure
    for word in (
        "empty answer",
        "train.learning_rate",
        "small models take larger steps",
        "ab" * 32,
        "2.13.0",
        "8.00 GiB",
    ):
        assert word in page.text, word
    assert "1 skipped step" in page.text and "rehearsal" not in page.text
    assert page.tags.count("svg") == 5  # loss for wide and narrow screens, learning rate, gradient norm, tokens/s
    assert "evaluation" in page.text and "1 fields at their defaults" in page.text


@pytest.mark.parametrize(
    "word, low, high", [("Better", 0.01, 0.2), ("Worse", -0.2, -0.01), ("No clear difference", -0.2, 0.05)]
)
def test_verdict_follows_the_interval(word: str, low: float, high: float) -> None:
    report = full()
    report["evaluation"]["difference"] = {"value": (low + high) / 2, "low": low, "high": high}
    assert f"{word}: {100 * (low + high) / 2:+.1f} points" in Page(render(report, [])).text


def test_without_an_interval_there_is_no_verdict() -> None:
    report = full()
    del report["evaluation"]["difference"]
    text = Page(render(report, [])).text
    assert "exact_json went from 0.0% to 87.5% on 176 rows." in text and "Better" not in text


def test_sections_without_figures_are_left_out() -> None:
    page = Page(render({"run": "runs/x"}, []))
    assert "svg" not in page.tags and "table" not in page.tags
    for heading in (
        "Scores",
        "Training",
        "Before and after",
        "Data",
        "Memory",
        "Recipe",
        "Hashes",
        "Machine",
        "loss",
        "None",
    ):
        assert heading not in page.text.split("}")[-1], heading  # after the style sheet


def test_base_without_tuned_is_scored_without_a_verdict() -> None:
    report = full()
    del report["evaluation"]["tuned"], report["evaluation"]["difference"]
    page = Page(render(report, []))
    assert "0.0% to 2.1%" in page.text and "went from" not in page.text


def test_figures_that_are_not_finite_numbers_are_left_out() -> None:
    events = [
        {"event": "step", "step": n, "loss": value}
        for n, value in enumerate([math.nan, math.inf, None, "x", True, 0.5])
    ]
    report = {
        "run": "x",
        "seconds": math.nan,
        "tokens": None,
        "memory": {"predicted_peak_bytes": None},
        "eval_loss": None,
    }
    page = Page(render(report, events))
    assert "svg" not in page.tags and "nan" not in page.text and "GiB" not in page.text and "None" not in page.text


def test_repeated_step_counts_as_computed_last() -> None:
    once = [{"event": "step", "step": n, "loss": 1.0 / n} for n in range(1, 30)]
    repeated = [{"event": "step", "step": n, "loss": 9.0} for n in range(10, 30)] + once[9:]
    assert drawings(render({"run": "x"}, once)) == drawings(render({"run": "x"}, once + repeated))


def drawings(html: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)


def test_general_set_is_plotted_with_rates_only() -> None:
    part = {"rows": 9, "base": 0.5, "tuned": 0.4, "difference": {"value": -0.1, "low": -0.3, "high": 0.1}}
    general = {**part, "kinds": {"copying": part}, "intervals": {"base": [0.3, 0.7], "tuned": [0.2, 0.6]}}
    for metric, score, plotted in (("exact", 0.5, True), ("mean_reward", 4.5, False)):
        sides = {side: {metric: score} for side in ("base", "tuned")}
        intervals = {side: [0.9 * score, 1.1 * score] for side in sides}
        evaluation = {"rows": 9, "metric": metric, **sides, "difference": part["difference"], "notes": []}
        page = render({"evaluation": evaluation, "intervals": intervals, "general": general}, [])
        assert (f"{metric}, over the general set" in page) is plotted


CUT_TEXTS = """() => [...document.querySelectorAll('svg text')].filter(text => {
    const box = text.getBoundingClientRect(), plot = text.closest('svg').getBoundingClientRect()
    return box.width && (box.left < plot.left - 1 || box.right > plot.right + 1)
}).map(text => text.textContent)"""


def test_no_text_of_a_plot_is_cut(tmp_path: Path) -> None:
    part = {"rows": 9, "base": 0.5, "tuned": 0.4, "difference": {"value": -0.1, "low": -0.3, "high": 0.1}}
    intervals = {side: [0.3, 0.7] for side in ("base", "tuned")}
    scores = {"rows": 9, "metric": "exact", "base": {"exact": 0.5}, "tuned": {"exact": 0.5}, "notes": []}
    report = {
        "evaluation": {**scores, "difference": part["difference"]}, "intervals": intervals,
        "general": {**part, "kinds": {"copying": part}, "intervals": intervals},
    }  # fmt: skip
    path = write_report(tmp_path, report, steps(1000))
    with open_browser() as browser:
        for viewport in (DESK, PHONE):
            page = browser.new_context(viewport=viewport).new_page()
            page.goto(path.as_uri())
            assert page.get_by_text("general set", exact=True).is_visible() and page.evaluate(CUT_TEXTS) == []


def test_page_is_deterministic() -> None:
    assert render(full(), steps(60)) == render(full(), steps(60))


def test_sample_text_cannot_become_markup(tmp_path: Path) -> None:
    report = full()
    report["run"] = ATTACK
    report["data"]["by_reason"] = {ATTACK: 1}
    report["evaluation"]["base"][ATTACK] = report["evaluation"]["tuned"][ATTACK] = 0.5
    report["samples"] = [
        {"prompt": ATTACK, "gold": ATTACK, "base": ATTACK, "tuned": ATTACK + "!", "base_hit": True, "tuned_hit": False}
    ]
    report["recipe"] += [{"field": ATTACK, "value": ATTACK, "origin": ATTACK, "why": ATTACK}]
    report["lock"][ATTACK] = {ATTACK: ATTACK}
    html = write_report(tmp_path, report, [*steps(60), {"event": ATTACK}]).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "img", "iframe", "object", "link", "a", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("svg") == 5
    assert "&{{ 7 * 7 }}?" in page.text and "49" not in html.split("Before and after")[1].split("<h2>")[0]


def test_page_loads_nothing() -> None:
    html = render(full(), steps(60))
    page = Page(html)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes
    assert not [value for name, value in page.attributes if name in ("src", "srcset", "action", "data")]
    assert all(value.startswith("#") for name, value in page.attributes if name.endswith("href"))
    assert not re.findall(r"url\((?!['\"]?#)", html) and "@import" not in html
    links = set(re.findall(r"https?://[^\"' <]+", html))
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # XML namespaces, not fetched


def test_normal_events_and_empty_facts_are_left_out() -> None:
    text = Page(render(full(), [*steps(60), {"event": "samples", "step": 1, "samples": []}])).text
    assert "During the run" not in text and "gpus" not in text and "8.00 GiB" in text


def test_memory_of_the_steps_is_plotted_in_gib() -> None:
    events = [{**event, "resident_bytes": 3 << 30} for event in steps(60)]
    drawing = next(text for text in drawings(render(full(), events)) if "Process memory after each step, GiB" in text)
    labels = re.findall(r">([\d.]+)</text>", drawing)
    assert {"3", "3.0"} & set(labels), labels
    ticks = [label for label in labels if label in ("10", "20", "40")]
    assert ticks, "whole steps"


def test_plots_use_the_colours_of_the_page() -> None:
    for drawing in drawings(render(full(), steps(60))):
        assert "currentColor" in drawing and "var(--base)" in drawing and "#0102" not in drawing
        assert "#000000" not in drawing and "#ffffff" not in drawing and "<metadata" not in drawing
        assert "<text" in drawing  # text elements can be searched and read by screen readers


def test_rendering_does_not_import_pyplot_or_change_matplotlib_settings() -> None:
    code = """
import sys
import matplotlib
from strop.evaluation.report import render
matplotlib.rcParams["svg.fonttype"] = "path"
matplotlib.rcParams["font.size"] = 17.0
render({"run": "x"}, [{"event": "step", "step": n, "loss": 1.0} for n in range(9)])
assert (matplotlib.rcParams["svg.fonttype"], matplotlib.rcParams["font.size"]) == ("path", 17.0)
assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_differences_are_marked_only_in_similar_answers() -> None:
    html = render(full(), [])
    assert "a b <del>c</del><ins>q</ins> d" in html
    assert "<pre>x</pre>" in html


def test_long_samples_are_truncated_with_a_note() -> None:
    report = full()
    report["samples"] = [{"prompt": "p", "gold": "g", "base": "y" * 5000, "tuned": ""}] * 40
    text = Page(render(report, [])).text
    assert "(4,400 more characters)" in text and "y" * 601 not in text
    assert "(nothing)" in text and "answers to 12 of the 176 evaluated rows" in text


def test_report_of_a_short_run_names_what_it_shows(tmp_path: Path) -> None:
    report = full()
    report["data_report"] = {"held_out": 138}
    for side in ("base", "tuned"):
        report["evaluation"][side] |= {"tokens_per_s": 8.957, "stop_rate": 0.25}
    (tmp_path / "notes.json").write_text(json.dumps({"note": "first try", "tags": ["good", ATTACK[:20]]}))
    events = [{**event, "time": 1795935899.8 + event["step"]} for event in steps(12)]
    page = Page(write_report(tmp_path, report, events).read_text(encoding="utf-8"))
    assert "smoothed" not in page.text and "train, each step" in page.text  # it would be the same curve
    assert "held out for evaluation138" in re.sub(r"\s", " ", page.text)
    assert "answers that stopped" in page.text and "valid JSON" in page.text and "exact_json" in page.text
    assert not any(word in page.text for word in ("tokens_per_s", "8.957", "stop_rate", "valid_json"))
    assert "2026-11-2" in page.text and "first try" in page.text and "tags: good, " in page.text
    assert "smoothed" in render(report, steps(60))
    single = render(report, [*steps(1), {"event": "eval", "step": 1, "loss": 0.3}])
    assert single.count("<use ") > render(report, [*steps(2), {"event": "eval", "step": 1, "loss": 0.3}]).count("<use ")


def test_report_shows_planned_time_completions_and_cut_answers() -> None:
    report = full() | {"predicted_seconds": 42.0}
    report["evaluation"]["answers"] = {"max_tokens": 80, "references_cut": 0, "base_cut": 7, "tuned_cut": 0}
    report["samples"][0] |= {"base_cut": True, "tuned_cut": False}
    samples = [{"prompt": "pens", "reference": "office", "completion": "pen", "cut": True}]
    page = Page(render(report, [*steps(4), {"event": "samples", "step": 4, "samples": samples}]))
    text = re.sub(r"\s+", " ", page.text)
    assert "planned for these steps, on an idle machine42 s" in text
    assert "Sample completions during training, at step 4" in text and "pen … (cut at the limit)" in text
    assert "7 of 176 base answers were cut at 80 tokens" in text and "x … (cut at the limit)" in text
    assert text.count("cut at the limit") == 2
    assert "trained on" not in text
    text = Page(render(report | {"data_report": {"held_out": 138}}, [])).text
    assert "trained on553" in text and "held out for evaluation138" in text


def test_report_of_a_stopped_run_says_so(tmp_path: Path) -> None:
    events = [
        *({"event": "start", "time": 1.0, "steps": 14, "step": step} for step in (0, 4)),
        {"event": "stop", "time": 2.0, "step": 4, "why": "signal"},
        {"event": "resume", "time": 3.0, "step": 4},
        {"event": "stop", "time": 4.0, "step": 8, "why": "signal"},
    ]
    report = {"run": "runs/old", "steps": 8, "ended": "stop", "eval_seconds": 0.0, "seconds": 9.0}
    page = render(report, events, {"tags": ["red"]})
    assert "Stopped after step 8 of 14. Resume the run to finish it: strop resume runs/old" in page
    assert "evaluation and samples" not in page and "2 stops, 1 resume" in page and "tags: red" in page
    assert "Stopped after" not in render({**report, "ended": "steps", "steps": 14}, events)
    once = render({**report, "steps": 4}, events[:1] + events[2:3])
    assert "Stopped after step 4 of 14" in once and "During the run" not in once
    renamed = write_report(tmp_path / "new", report, events) if (tmp_path / "new").mkdir() is None else tmp_path
    assert "<h1>new</h1>" in renamed.read_text(encoding="utf-8")


def test_legend_names_only_marks_that_are_shown() -> None:
    report = full()
    equal = {"prompt": "a", "gold": "same", "base": "same", "tuned": "same", "base_hit": True, "tuned_hit": True}
    assert "<ins>not expected</ins>" in render(report, [])
    page = render({**report, "samples": [equal]}, [])
    assert "answers to 1 of the 176 evaluated rows</small>" in page and "not expected" not in page


def test_notes_of_the_evaluation_follow_its_verdict() -> None:
    report, notes = full(), ["1 of 176 rows repeat an earlier one", "runs/a: this run has not ended"]
    report["evaluation"]["notes"] = notes
    text = Page(render(report, [])).text
    assert text.index("Better: ") < text.index(f"{notes[0]}.") < text.index(f"{notes[1]}.") < text.index("Scores")


def test_report_has_the_units_and_words_of_the_page() -> None:
    report = full()
    report["memory"] = {"predicted_peak_bytes": 1.5 * 2**30, "measured_peak_bytes": 678 * 2**20}
    text = Page(render(report, [])).text
    assert "678 MiB" in text and "1.50 GiB" in text and "0.66 GiB" not in text and "origin" in text


SHOWN_TEXTS = """() => [...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width)
    .flatMap(svg => [...svg.querySelectorAll("text")].map(text =>
        parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width))"""


def test_all_texts_of_plots_have_one_readable_size_and_long_parts_are_folded(tmp_path: Path) -> None:
    report = full()
    report["samples"] = [{**report["samples"][0], "prompt": f"prompt {i}"} for i in range(9)]
    path = write_report(tmp_path, report, steps(60))
    with open_browser() as browser:
        for viewport, smallest in ((DESK, 13), (PHONE, 9)):
            page = browser.new_context(viewport=viewport).new_page()
            page.goto(path.as_uri())
            sizes = page.evaluate(SHOWN_TEXTS)
            assert len(sizes) > 20 and smallest < min(sizes) and max(sizes) < 1.25 * min(sizes)
            assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
            assert page.get_by_text("prompt 3").is_visible() and not page.get_by_text("prompt 4").is_visible()
            page.get_by_text("5 more rows").click()
            assert page.get_by_text("prompt 8").is_visible()
            assert not page.get_by_text("versions.torch").is_visible()
            page.get_by_text("Hashes and versions").click()
            assert page.get_by_text("versions.torch").is_visible()
