"""Progress and results in a notebook, executed in a real Jupyter kernel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from strop.display.notebook import NotebookDisplay, is_notebook
from strop.display.plots import plot_loss

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")


def execute(folder: Path, *cells: str, allow_errors: bool = False) -> list[list[dict[str, Any]]]:
    """Run cells in a new kernel, and return the outputs of each."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    options = {"timeout": 300, "kernel_name": "python3", "allow_errors": allow_errors}
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **options)
    client.execute()
    return [cell["outputs"] for cell in notebook.cells]


def shown_html(outputs: list[dict[str, Any]]) -> str:
    return "".join(output["data"].get("text/html", "") for output in outputs if "data" in output)


def test_run_shows_steps_and_loss_curve(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    train = (
        f"import strop\nrun = strop.train(model={str(tiny_folder)!r}, data={str(rows_file)!r}, out='run', "
        "train={'max_steps': 4, 'batch_size': 4}, lora={'r': 2})\nrun"
    )
    show = "strop.plan(model='demo')"
    quiet = train.replace("out='run'", "out='quiet', progress=False").removesuffix("\nrun")
    check = f"strop.check(model={str(tiny_folder)!r}, data={str(rows_file)!r})"
    evaluate = f"strop.evaluate(run, {str(rows_file)!r}, max_new_tokens=4)"
    trained, planned, silent, checked, evaluated = execute(tmp_path, train, show, quiet, check, evaluate)
    progress, result = shown_html(trained[:1]), shown_html(trained[-1:])
    assert "done" in progress and "<svg" in progress
    assert "adapter" in result and re.search(r'<td style="text-align:left">4</td>', result)
    assert all(len(outputs) == 1 for outputs in (planned, checked))  # shown once
    assert "peak memory in MiB" in shown_html(planned) and not silent
    table = shown_html(planned)
    assert re.search(r"<th [^>]*>train</th>", table) and re.search(r'<td style="text-align:right">[\d,]+</td>', table)
    assert "24 rows read" in shown_html(checked)
    assert "<div>" not in shown_html(evaluated[:1]) and "not a fair test, because" in shown_html(
        evaluated
    )  # no progress


def test_evaluation_is_shown_and_the_bar_stays() -> None:
    display = NotebookDisplay("loading")
    try:
        display.on_event({"event": "start", "step": 0, "steps": 8})
        step = {"event": "step", "step": 4, "steps": 8, "loss": 1.0, "tokens_per_s": 9.0, "seconds_left": 62.0}
        display.on_event(step)
        display.show_activity("sampling: 1 of 4 completions")
        assert "<b>sampling: 1 of 4 completions</b>" in display._render() and "4/8" in display._render()
        display.on_event({"event": "samples", "step": 4})
        assert "<b>training</b>" in display._render() and "1 min 2 s" in display._render()
    finally:
        display.close("done")


def test_terminal_without_a_kernel_is_not_a_notebook() -> None:
    assert not is_notebook()


def test_loss_plot_has_a_dot_for_each_evaluation() -> None:
    losses = {float(step): 1 / step for step in range(1, 1000)}
    assert plot_loss({1.0: 1.0}, {}, 6, 2) is None
    plots = [plot_loss(losses, evaluated, 6, 2) for evaluated in ({}, {500.0: 0.2, 999.0: 0.1})]
    # the legend has a dot too
    assert [len(re.findall("<use [^>]*stroke: var\\(--tuned\\)", str(plot))) for plot in plots] == [0, 3]
    assert "nan" not in str(plots[1])


def test_clock_runs_without_events(tmp_path: Path) -> None:
    start = "import IPython, time\nfrom strop.display.notebook import NotebookDisplay"
    waits = "display = NotebookDisplay('waiting')\ntime.sleep(3.5)"
    [_, outputs] = execute(tmp_path, start, waits)
    assert re.search(r"waiting</b> \([23] s\)", shown_html(outputs))


def test_error_is_shown_without_a_traceback(tmp_path: Path) -> None:
    [outputs] = execute(tmp_path, "import strop\nstrop.check(data='nope.jsonl')", allow_errors=True)
    shown = "\n".join(outputs[-1]["traceback"])
    assert "nope.jsonl: no such file" in shown and shown.startswith("strop DataError") and len(shown.splitlines()) < 4
