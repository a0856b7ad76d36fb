"""The form of a new run in a real browser: what its fields show is what is planned and started."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.dash.test_page import NEW, hold, open_at
from tests.support.browser import PHONE, Watched, at, open_tab
from tests.support.dash import Dash, run_dash

WHOLE, SUMMARY = ".bars .phase >> nth=4", ".startbar span"


def type_text(tab: Watched, label: str, text: str) -> None:
    """Replace the text of a field by keys, as a person does."""
    tab.page.get_by_label(label, exact=True).click()
    tab.page.keyboard.press("Control+A")
    tab.page.keyboard.press("Delete")
    tab.page.keyboard.type(text)


@pytest.mark.parametrize(
    ("label", "wrong"),
    [
        ("Epochs", "0"), ("Rank, exact", "0"), ("Memory limit", "lots"), ("Run name", "a/b"), ("Columns", "text"),
        ("Evaluation rows", "none.jsonl"),
    ],
)  # fmt: skip
def test_text_that_is_removed_at_once_is_not_planned(browser: Any, dash: Dash, label: str, wrong: str) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={NEW}", WHOLE)
        tab.page.locator("details.others > summary").click()
        type_text(tab, label, wrong)
        tab.page.wait_for_selector(f"{SUMMARY}:text('Fix: ')")
        type_text(tab, label, "")
        type_text(tab, "Maximum steps", "5")  # at once, in another field
        tab.page.wait_for_selector(f"{SUMMARY}:text('It fits')")
        assert tab.page.locator("p.problem").count() == 0
        tab.page.wait_for_selector("code:text('--train.max_steps=5')")
        tab.page.reload()
        tab.page.wait_for_selector(f"{SUMMARY}:text('It fits')")
        assert tab.page.get_by_label("Maximum steps").input_value() == "5"
        assert tab.page.get_by_label("Epochs").input_value() == ""
        assert tab.page.locator("p.problem").count() == 0


def test_changed_values_are_not_started_before_their_plan_is_shown(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={NEW}", WHOLE)
        start = tab.page.get_by_role("button", name="Start", exact=True)
        assert start.is_enabled()
        held = hold(tab, "plan")
        tab.page.get_by_label("Invalid rows").select_option("refuse")
        tab.page.wait_for_selector(f"{SUMMARY}:text('Planning…')")
        assert start.is_disabled()
        for way in held:
            way.continue_()
        tab.page.wait_for_selector(f"{SUMMARY}:text('Fix: Training rows')")
        assert start.is_disabled()


def test_start_takes_the_first_click_once_typed_values_are_planned(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={NEW}", WHOLE)
        held = hold(tab, "start")
        type_text(tab, "Run name", "first")
        tab.page.wait_for_selector("code:text('--out=runs/first')")
        with tab.page.expect_request("**/api/start") as sent:
            tab.page.get_by_role("button", name="Start", exact=True).click()  # leaves the field
        assert sent.value.post_data_json["name"] == "first" and len(held) == 1


def test_start_waits_for_rows_that_are_measured(browser: Any, dash: Dash) -> None:
    measuring = {"known": False, "number": None, "measuring": True, "why": "the rows are being read"}
    with open_tab(browser, dash) as tab:
        tab.page.route("**/api/plan", lambda way: way.fulfill(json=way.fetch().json() | {"rows": measuring}))
        open_at(tab, dash, f"/new?options={NEW}", f"{SUMMARY}:text-is('Measuring the rows…')")
        assert tab.page.get_by_role("button", name="Start", exact=True).is_disabled()
        tab.page.unroute("**/api/plan")
        tab.page.wait_for_selector(f"{SUMMARY}:text('It fits')")
        assert tab.page.get_by_role("button", name="Start", exact=True).is_enabled()


def test_hint_leads_to_a_field_in_more_settings(browser: Any, dash: Dash, dashboard: Path) -> None:
    rows = "".join(json.dumps({"text": f"text {n}", "label": "ab"[n % 2]}) + "\n" for n in range(60))
    (dashboard / "labels.jsonl").write_text(rows, encoding="utf-8")
    options = {"model.name": "tiny-model", "data.train": "labels.jsonl"}
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={quote(json.dumps(options))}", f"{SUMMARY}:text('Fix: Training rows')")
        folded, field = tab.page.locator("details.others"), tab.page.get_by_label("Columns", exact=True)
        assert re.fullmatch(r"More settings \(\d+\)", folded.locator("summary").inner_text()) and not field.is_visible()
        tab.page.get_by_label("Find a setting").evaluate("(find) => { find.value = 'seed'; }")
        tab.page.get_by_label("Find a setting").dispatch_event("input")
        tab.page.locator(".verdict").get_by_role("button", name="Columns").first.click()
        assert field.is_visible() and field.evaluate("(field) => field === document.activeElement")
        tab.axe("a hint")
        tab.page.keyboard.type("prompt=ticket,completion=label")
        tab.page.wait_for_selector("li:has-text(\"labels.jsonl:1 and 59 more: no column 'ticket'\")")
        tab.page.reload()
        tab.page.wait_for_selector(f"{SUMMARY}:text('Fix: Training rows')")
        assert re.fullmatch(r"More settings \(\d+, 1 set\)", folded.locator("summary").inner_text())
        assert field.input_value() and field.is_visible()
        tab.page.set_viewport_size(PHONE)
        tab.faults.clear()  # the browser reports the refused requests
        tab.check("a hint")


def test_column_names_that_fit_are_entered_by_a_button(browser: Any, dash: Dash, dashboard: Path) -> None:
    rows = "question,label\n" + "".join(f"what is {n},{n}\n" for n in range(9))
    (dashboard / "rows.csv").write_text(rows, encoding="utf-8")
    options = quote(json.dumps({"model.name": "tiny-model", "data.train": "rows.csv"}))
    with open_tab(browser, dash) as tab:
        for address, done in (("/data", ".tokens >> nth=3"), ("/new", f"{SUMMARY}:text('It fits')")):
            open_at(tab, dash, f"{address}?options={options}", "p.problem:has-text('no format has the columns')")
            main = tab.page.locator("main").inner_text()
            assert "--" not in main and (address == "/new" or main.count("no format has") == 1)
            tab.page.locator("p.problem").get_by_role("button", name="Use these columns").click()
            tab.page.wait_for_selector(done)
            assert tab.page.locator("p.problem").count() == 0
            field = tab.page.locator("[data-option='data.columns']")
            assert field.is_visible() and field.input_value() == "prompt=question,completion=label"
            tab.faults.clear()  # the browser reports the refused requests
            tab.axe("columns")
            tab.check("columns")


def test_form_is_kept_until_it_is_cleared_or_its_run_starts(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        link = tab.page.get_by_role("navigation").get_by_role("link", name="New run", exact=True)
        open_at(tab, dash, f"/new?options={NEW}", WHOLE)
        type_text(tab, "Memory limit", "8GB")
        type_text(tab, "Run name", "mine")
        type_text(tab, "Epochs", "7")
        tab.page.wait_for_selector("code:text('--train.epochs=7')")
        tab.page.get_by_role("link", name="Data", exact=True).click()
        tab.page.wait_for_selector(".tokens .stop >> nth=3")
        assert tab.page.get_by_label("Rows", exact=True).input_value() == "rows.jsonl"
        type_text(tab, "Maximum row length in tokens", "77")
        tab.page.get_by_role("link", name="Plan a run with this data").click()
        tab.page.wait_for_selector("code:text('--out=runs/mine')")
        tab.page.get_by_role("link", name="Runs", exact=True).click()
        tab.page.wait_for_selector("tbody .state")
        link.click()
        tab.page.wait_for_selector("code:text('--data.max_length=77')")
        values = {"Epochs": "7", "Memory limit": "8GB", "Run name": "mine", "Maximum row length in tokens, exact": "77"}
        assert {label: tab.page.get_by_label(label, exact=True).input_value() for label in values} == values
        tab.page.get_by_role("button", name="Clear the form").click()
        for _ in range(2):
            tab.page.wait_for_selector("text=Choose a model. The plan reads only its config")
            assert tab.page.get_by_label("Training rows", exact=True).input_value() == ""
            tab.page.get_by_role("link", name="Data", exact=True).click()
            tab.page.wait_for_selector("text=Choose a data file.")
            assert not tab.page.get_by_role("link", name="Plan a run with this data").is_visible()
            link.click()
        tab.check("cleared")


@pytest.mark.parametrize(
    ("word", "label"),
    [
        ("lora_r", "Rank"), ("per_device_train_batch_size", "Effective batch size in rows"), ("lr", "Learning rate"),
        ("load_in_4bit", "Base quantization"), ("effective batch", "Effective batch size in rows"),
        ("output_dir", "Run name"), ("context length", "Maximum row length in tokens"),
        ("gradient accumulation", "Effective batch size in rows"),
    ],
)  # fmt: skip
def test_settings_are_found_by_names_of_other_tools(browser: Any, dash: Dash, word: str, label: str) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={NEW}", WHOLE)
        tab.page.locator("details.others > summary").click()
        tab.page.get_by_label("Find a setting").fill(word)
        tab.page.locator("details.others").get_by_role("button", name=label).click()
        assert tab.page.evaluate("document.activeElement.closest('.field').querySelector('label').textContent") == label
        for name in ("packing", "flash attention", "neftune", "group_by_length", "torch_compile", "resume"):
            tab.page.get_by_label("Find a setting").fill(name)
            assert tab.page.locator(".others > p").inner_text().startswith(f"{name}: ")
        tab.page.get_by_label("Find a setting").fill("adamw_8bit")
        assert tab.page.get_by_label("Optimizer", exact=True).is_visible()
        tab.page.get_by_label("Find a setting").fill("no such thing")
        assert tab.page.get_by_text("No setting matches.").is_visible()
        tab.page.get_by_label("Find a setting").fill("")
        assert not tab.page.get_by_text("No setting matches.").is_visible()
        tab.axe("search")
        tab.check("search")


def test_example_is_shown_at_the_field_it_is_for(browser: Any, dash: Dash) -> None:
    options = {"model.name": "tiny-model", "lora.r": "x", "train.epochs": "0", "train.max_steps": "ten"}
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={quote(json.dumps(options))}", f"{SUMMARY}:text('Fix: ')")
        rank, epochs, steps = tab.page.locator("p.problem").all_inner_texts()
        assert "must be above 0 (got" in epochs
        assert "for example 16" in rank and "for example 3" in epochs and "for example" not in steps
        assert "Peak memory by phase" not in tab.page.locator("main").inner_text()  # nothing is shown of it


def test_durations_are_read_as_people_write_them(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={NEW}", WHOLE)
        type_text(tab, "Maximum time", "30 min")
        tab.page.wait_for_selector("code:text('--train.max_time=30 min')")
        tab.page.wait_for_selector(f"{SUMMARY}:text('It fits')")
        for share, purpose in (("150%", "train on"), ("0%", "evaluate on")):
            type_text(tab, "Evaluation rows", share)
            tab.page.wait_for_selector(f"p.problem:has-text('{share} leaves no rows to {purpose}')")


def test_name_of_another_run_is_refused_while_it_is_typed(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={NEW}", WHOLE)
        type_text(tab, "Run name", "one")
        tab.page.wait_for_selector("p.problem:has-text('a run with this name exists')")
        assert tab.page.locator(SUMMARY).inner_text() == "Fix: Run name"
        assert tab.page.get_by_role("button", name="Start", exact=True).is_disabled()


def test_fields_that_are_not_set_show_what_the_plan_chose(browser: Any, dash: Dash) -> None:
    chosen = [("data.overlong", "split"), ("train.learning_rate", 0.002), ("data.max_length", 512)]
    items = [{"field": field, "value": value, "origin": "plan", "why": ""} for field, value in chosen]
    with open_tab(browser, dash) as tab:
        tab.page.route("**/api/plan", lambda way: way.fulfill(json=way.fetch().json() | {"recipe": items}))
        open_at(tab, dash, f"/new?options={NEW}", f"{SUMMARY}:text('It fits')")
        assert tab.page.get_by_label("Longer rows").locator("option").first.inner_text() == "chosen (split)"
        assert tab.page.get_by_label("Learning rate", exact=True).get_attribute("placeholder") == "chosen (2e-3)"
        assert tab.page.get_by_label("Maximum row length in tokens, exact").input_value() == "512"


def test_unknown_address_and_lost_server_offer_a_way_on(browser: Any, tmp_path: Path) -> None:
    with run_dash(tmp_path) as own, open_tab(browser, own) as tab:
        tab.page.goto(at(own, "/foo"))
        tab.page.wait_for_selector("text=There is no page at #/foo.")
        tab.page.get_by_role("link", name="Back to the runs").click()
        tab.page.wait_for_selector("text=No runs yet")
        own.stop()
        tab.page.get_by_role("link", name="Machine").click()
        tab.page.wait_for_selector("text=The server does not respond.")
        tab.page.get_by_role("link", name="Runs", exact=True).click()
        tab.page.wait_for_selector("nav [aria-current]:text-is('Runs')")
        tab.page.wait_for_selector("text=The server does not respond.")
        with run_dash(tmp_path, port=int(own.url.rpartition(":")[2])):
            tab.page.get_by_role("button", name="Try again").click()
            tab.page.wait_for_selector("text=No runs yet")


def test_link_takes_the_text_of_a_field_that_was_not_left(browser: Any, dash: Dash) -> None:
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/data?options={NEW}", ".tokens .stop >> nth=3")
        type_text(tab, "Maximum row length in tokens", "77")
        tab.page.get_by_role("link", name="Plan a run with this data").click()  # at once
        tab.page.wait_for_selector("code:text('--data.max_length=77')")
        assert tab.page.get_by_label("Maximum row length in tokens, exact").input_value() == "77"
        type_text(tab, "Maximum row length in tokens, exact", "66")
        tab.page.get_by_role("link", name="Inspect the data").click()
        tab.page.wait_for_selector(".tokens .stop >> nth=3")
        assert tab.page.get_by_label("Maximum row length in tokens", exact=True).input_value() == "66"


def test_placeholder_of_a_column_map_has_no_button(browser: Any, dash: Dash) -> None:
    options = quote(json.dumps({"model.name": "tiny-model", "data.train": "rows.jsonl", "data.columns": "garbage"}))
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/data?options={options}", "p.problem:has-text('not a map')")
        assert tab.page.get_by_role("button", name="Use these columns").count() == 0
        tab.faults.clear()  # the browser reports the refused request


def test_hints_on_evaluation_rows_are_in_the_words_of_the_field(browser: Any, dash: Dash) -> None:
    options = quote(json.dumps({"model.name": "tiny-model", "data.train": "rows.jsonl", "data.bad_rows": "drop"}))
    with open_tab(browser, dash) as tab:
        open_at(tab, dash, f"/new?options={options}", f"{SUMMARY}:text('It fits')")
        rows = tab.page.get_by_label("Evaluation rows", exact=True)
        for text, hint in (("held-ou.jsonl", "Use held-out.jsonl"), ("5", "write a share with %, such as 5%")):
            rows.fill(text)
            rows.press("Enter")
            problem = tab.page.locator(f"p.problem:has-text('{hint}')")
            problem.wait_for()
            assert "--" not in problem.inner_text() and "Hub" not in problem.inner_text()
            if text != "5":
                problem.get_by_role("button").click()
                tab.page.wait_for_selector(f"{SUMMARY}:text('It fits')")
                assert rows.input_value() == "held-out.jsonl"
        tab.faults.clear()  # the browser reports the refused requests


def test_types_that_need_llama_cpp_are_disabled_without_it(browser: Any, dash: Dash) -> None:
    hello = dash.get("/api/hello").json()
    with open_tab(browser, dash) as tab:
        tab.page.route("**/api/hello", lambda way: way.fulfill(json=hello))
        for installed in (True, False):
            hello["has_llama_cpp"] = installed
            open_at(tab, dash, "/run/one/export", ".form >> nth=2")
            tab.page.reload()
            tab.page.wait_for_selector(".form >> nth=2")
            form = tab.page.locator(".form:has(h2:text-is('GGUF file'))")
            disabled = form.locator("option:disabled").evaluate_all("(items) => items.map((item) => item.value)")
            assert disabled == ([] if installed else ["q6_k", "q5_k_m", "q4_k_m"])
            assert ("pip install llama-cpp-python" in form.inner_text()) is not installed
