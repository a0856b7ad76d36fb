"""The evaluation of a classifier on the page and in its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from strop.dash.runs import evaluation_score
from strop.evaluation.classes import _list_classes, predict, score_classes
from strop.evaluation.report import write_report
from tests.support.browser import PHONE, at, open_tab
from tests.support.dash import make_run, run_dash, session
from tests.support.texts import NAMES


def evaluation() -> dict[str, Any]:
    """Return an evaluation of 40 texts, of which 4 are classified wrongly."""
    labels = np.arange(40) % 3
    guessed = np.where(np.arange(40) % 10 == 0, (labels + 1) % 3, labels)
    probabilities = np.full((40, 3), 0.1)
    probabilities[np.arange(40), guessed] = 0.8
    targets, predicted = np.eye(3, dtype=bool)[labels], predict(probabilities, several=False)
    scores = score_classes(probabilities, targets, several=False)
    return {
        "rows": 40, "metric": "accuracy", "tuned": scores, "baseline": {**scores, "accuracy": 0.7}, "train_rows": 0,
        "baseline_name": "TF-IDF", "baseline_difference": {"value": 0.2, "low": 0.1, "high": 0.3}, "notes": [],
        "classes": list(_list_classes(predicted, targets, NAMES)), "several_labels": False,
        "confusion": (targets.T.astype(int) @ predicted.astype(int)).tolist(),
    }  # fmt: skip


def make_evaluated(root: Path) -> Path:
    report = {"evaluation": evaluation(), "intervals": {"tuned": [0.77, 0.96], "baseline": [0.55, 0.82]}}
    folder = make_run(root, "texts", session(), report)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    samples = [
        {"place": f"t:{n}", "prompt": f"text {n}", "gold": NAMES[n % 3], "tuned": NAMES[(n + (n % 10 == 0)) % 3],
         "tuned_hit": n % 10 != 0}
        for n in range(40)
    ]  # fmt: skip
    (folder / "answers.json").write_text(json.dumps({"metric": "accuracy", "samples": samples}))
    return folder


def test_screen_shows_classes_confusion_and_baseline(browser: Any, tmp_path: Path) -> None:
    make_evaluated(tmp_path / "runs")
    with run_dash(tmp_path / "runs") as dash, open_tab(browser, dash) as tab:
        tab.page.goto(at(dash, "/run/texts/answers"))
        tab.page.wait_for_selector("table.confusion")
        text = tab.page.inner_text("main")
        assert "better: +20.0 points" in text and "baseline" in text and "gained" not in text.split("Classes")[0]
        cells = tab.page.locator("table.confusion tbody td").all_inner_texts()
        assert cells == [str(x or "") for row in evaluation()["confusion"] for x in row]
        assert tab.page.locator("table.classes tbody tr").count() == 3
        assert "Vote blind" not in text
        options = tab.page.locator("select[aria-label='Which rows'] option").all_inner_texts()
        assert options == ["all rows", "tuned wrong", "tuned right"]
        tab.page.select_option("select[aria-label='Which rows']", "wrong")
        tab.page.wait_for_function("() => document.querySelectorAll('.sample').length === 4")
        for size in (None, PHONE):
            if size:
                tab.page.set_viewport_size(size)
            tab.check("a classifier")
            tab.axe("a classifier")


def test_report_and_score_show_the_same(tmp_path: Path) -> None:
    folder = make_evaluated(tmp_path / "runs")
    report = json.loads((folder / "report.json").read_text())
    page = write_report(folder, report, []).read_text()
    assert "Compared with TF-IDF: better: +20.0 points" in page and "macro F1" in page
    for count in {x for row in report["evaluation"]["confusion"] for x in row if x}:
        assert f">{count}</td>" in page
    assert page.count('class="right"') == 3 and page.count('class="wrong"') == 6
    score = evaluation_score(report)
    assert score is not None and score["verdict"] == "better" and score["value"] == 0.9
