"""The form of a new run in a real browser: what its fields show is what is planned and started."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dash.test_page import NEW, hold, open_at
from tests.support.browser import Watched, open_tab
from tests.support.dash import Dash

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
        ("Epochs", "0"), ("Rank, exact", "0"), ("Memory limit", "lots"), ("Run name", "a/b"), ("data.columns", "text"),
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
