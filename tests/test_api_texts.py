"""What a Python program shows: summaries of runs, errors with fixes in Python's words, notes and help."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

import strop
from strop.display.notebook import run_summary
from strop.engine.decode.model import Model
from strop.errors import StropError
from strop.evaluation.run import rank_models
from tests import ROOT

REPORT: dict[str, Any] = {
    "steps": 8, "tokens": 900, "tokens_per_s": 7.5, "seconds": 120.0, "eval_seconds": 151.2, "save_seconds": 0.2,
    "loss": {"first": 2.7861, "last": 0.004}, "eval_loss": 0.4148, "adapter": "runs/sums/adapter", "adapter_step": 4,
    "diagnosis": ["overfitting: the evaluation loss rose", "not learning: see with `strop check` what is trained on"],
}  # fmt: skip
CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
ROWS = [{"prompt": f"what is {n}", "completion": f"it is {n}"} for n in range(4)]


def raised(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(StropError) as error:
        call(*args, **options)
    return str(error.value)


def test_summary_names_the_step_of_the_adapter_and_each_finding(
    tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = strop.train(model=tiny_folder, data=rows_file, eval=rows_file, out=out, r=2, max_steps=2, progress=False)
    kept = run.report["adapter_step"]
    for shown in (str(run), run._repr_html_()):
        assert f"(weights of step {kept} of 2)" in shown and f"at step {kept}, the lowest" in shown
    report = json.loads((out / "report.json").read_text()) | {"diagnosis": REPORT["diagnosis"]}
    (out / "report.json").write_text(json.dumps(report))
    assert str(run).count("\nfinding") == 2 and "`strop.check`" in str(run)
    assert run._repr_html_().count(">finding</td>") == 2 and "<th>" not in run._repr_html_()


def test_summary_of_other_reports() -> None:
    rows = dict(run_summary(Path("runs/sums"), REPORT, True))
    assert rows["eval loss"] == "0.4148 at step 4, the lowest"
    assert rows["adapter"] == "runs/sums/adapter (weights of step 4 of 8)"
    assert rows["time"] == "120 s, evaluation and samples 151 s"
    assert rows["loss"] == "2.7861 in the first step, 0.0040 in the last one"
    old = {"loss": {"first": None, "last": None}, "eval_loss": None, "diagnosis": [], "adapter_step": None}
    rows = dict(run_summary(Path("runs/sums"), REPORT | old, False))
    assert rows["steps"] == "8; stopped: strop.resume('runs/sums') continues it"
    assert rows["adapter"] == "runs/sums/adapter" and "eval loss" not in rows and "finding" not in rows


@pytest.mark.parametrize(
    ("rows", "what", "fix"),
    [
        ([CONVERSATION, CONVERSATION], "row 1 is a list, not a dict", '[{"messages": messages} for messages in rows]'),
        ([("a", "b"), ("c", "d")], "row 1 is a tuple", '[{"prompt": a, "completion": b} for a, b in rows]'),
        ([["a", "b", "c"]], "row 1 is a list", '[{"prompt": "hi", "completion": "yo"}]'),
        (["what is 3", "it is 3"], "'what is 3' is not a file, and a row is a dict", '[{"text": "..."}]'),
        (CONVERSATION, "role, content", '{"messages": [{"role": ..., "content": ...}, ...]}'),
    ],
)
def test_rows_in_other_forms_get_their_fix(rows: Any, what: str, fix: str, tiny_folder: Path) -> None:
    for text in (raised(strop.check, model=tiny_folder, data=rows), raised(strop.evaluate, tiny_folder, rows)):
        assert what in text and fix in text and "columns=" not in text


def test_files_without_a_suffix_are_not_rows(tiny_folder: Path, rows_file: Path) -> None:
    plain = rows_file.rename(rows_file.with_suffix(""))
    assert "unknown file type" in raised(strop.check, model=tiny_folder, data=[plain])
    assert "rows.jsonl: no such file" in raised(strop.check, model=tiny_folder, data=["rows.jsonl@2"])


def test_files_that_cannot_be_read_have_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"there is no data file in {tmp_path}" in raised(strop.check, data="nope.jsonl")
    assert "\nFix: give the path" in raised(strop.check, data="missing/nope.jsonl")
    Path("fake.parquet").write_text("no Parquet")
    assert "\nFix: write or copy the file again" in raised(strop.check, data="fake.parquet")


def test_metric_that_accepts_no_right_answer_gets_a_note(adapter_folders: list[Path]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 2, "progress": False}
    result = strop.evaluate(adapter_folders[0], ROWS, metric=lambda right, answer: False, **options)
    assert "lambda accepts none of the 4 right answers as an answer" in str(result)
    for metric in (lambda right, answer: right.endswith("1"), "exact"):
        assert "accepts none" not in str(strop.evaluate(adapter_folders[0], ROWS, metric=metric, **options))


def test_list_of_metrics_is_explained(tiny_folder: Path) -> None:
    text = raised(strop.evaluate, tiny_folder, ROWS, metric=["exact", "contains"])
    assert text == "metric: one metric, not a list of them\nFix: evaluate once with each metric"


def test_each_error_class_is_public_and_on_the_page() -> None:
    def tree(parent: type) -> set[str]:
        return {parent.__name__}.union(*map(tree, parent.__subclasses__()))

    page = (ROOT / "docs/api.md").read_text()
    for name in (name for name in tree(StropError) if getattr(strop.errors, name, None)):
        assert getattr(strop, name) is getattr(strop.errors, name) and f"::: strop.{name}\n" in page


@pytest.mark.parametrize(("name", "near"), [("DataEror", "DataError"), ("ValueError", None), ("TokenizerError", None)])
def test_wrong_error_classes_are_not_guessed(name: str, near: str | None) -> None:
    with pytest.raises(AttributeError) as error:
        getattr(strop, name)
    assert re.findall(r"strop\.(\w+)\?", str(error.value)) == [near] * (near is not None)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"lora": {"r": 2}, "rank": 3},
            'lora.r: given twice, as lora={"r": ...} and as rank\nFix: leave out one of them',
        ),
        ({"lr": 1e-4, "learning_rate": 1e-3}, "given twice, as lr and as learning_rate"),
        ({"foobar": 1}, "foobar: unknown key\nFix: see `help(strop.train)` for all keys"),
        ({"show": "two"}, "check: show is 'two'\nFix: give a whole number, such as show=2"),
        ({"show": -1}, "check: show is -1"),
    ],
)
def test_options_of_check_get_a_fix_in_python(options: dict[str, Any], text: str) -> None:
    assert text in raised(strop.check, data=ROWS, **options)


def test_unknown_gpu_names_a_few_that_are_known() -> None:
    text = raised(strop.plan, model="demo", gpu="RTX 9999")
    assert "RTX 5090" in text and len(text) < 300


def test_help_shows_defaults_types_and_all_fields() -> None:
    import inspect

    from strop.config.names import full_name
    from strop.config.options import COMMON, Options
    from strop.config.schema import option_fields

    fields = dict(option_fields())
    for name, default in COMMON.items():
        if name not in ("model", "data", "lora", "train"):  # required, and sections
            assert default == fields[full_name(name)].default, name
    signature = str(inspect.signature(strop.train))
    assert "Ellipsis" not in signature and "epochs: 'float' = 3.0" in signature and "model: 'PathLike'" in signature
    text = inspect.getdoc(strop.train) or ""
    assert all(re.search(rf"\b{name}\b", text) for name in Options.__annotations__)


@pytest.mark.parametrize(
    ("setting", "meant"),
    [("max_length", "max_new_tokens"), ("do_sample", "temperature"), ("max_new_token", "max_new_tokens")],
)
def test_settings_of_other_libraries_are_translated(setting: str, meant: str, adapter_folders: list[Path]) -> None:
    model = strop.load(adapter_folders[0], progress=False)
    assert f"(did you mean {meant}?)" in raised(model.generate, "hi", **{setting: 8})


def test_long_generation_reports_its_progress(
    adapter_folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = strop.load(adapter_folders[0], progress=False)
    answer = Model.answer

    def wait(self: Model, prompts: Any, **options: Any) -> Any:
        answers = answer(self, prompts, **options)
        time.sleep(1.5)
        return answers

    monkeypatch.setattr(Model, "answer", wait)
    monkeypatch.setattr("strop.display.progress.LOG_SECONDS", 0.2)
    monkeypatch.setattr("strop.display.terminal.STILL_SECONDS", 0.0)
    capsys.readouterr()
    model.generate(["what is 3", "what is 4"], max_new_tokens=2)
    model.chat("what is 3", max_new_tokens=2)
    shown = capsys.readouterr().err
    assert "still    generating answers: 2 of 2" in shown and "still    generating the answer" in shown
    model.generate("what is 3", max_new_tokens=2, progress=False)
    model.chat("what is 3", max_new_tokens=2, on_text=lambda text: None)
    assert "still" not in capsys.readouterr().err


def test_wrong_answers_are_printed_first(adapter_folders: list[Path]) -> None:
    def ends_with_3(right: str, answer: str) -> bool:
        return right != "it is 3"

    result = strop.evaluate(adapter_folders[0], ROWS, metric=ends_with_3, max_new_tokens=2, progress=False)
    assert re.findall(r"(?m)^right +(.+)", str(result))[0] == "it is 3"


def test_callback_that_raises_names_the_way_to_continue(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: Any) -> None:
        if event["event"] == "step":
            raise ValueError("mine")

    options: dict[str, Any] = {"out": tmp_path / "run", "r": 2, "max_steps": 2, "progress": False}
    with pytest.raises(ValueError, match="mine"):
        strop.train(model=tiny_folder, data=rows_file, callback=fail, **options)
    what = f"the callback raised ValueError; strop.resume({str(tmp_path / 'run')!r}) continues the run after step 0"
    assert what in caplog.text
    assert strop.resume(tmp_path / "run", progress=False).report["steps"] == 2


def test_merge_begins_with_a_verdict(adapter_folders: list[Path], rows_file: Path, tmp_path: Path) -> None:
    merged = strop.merge(adapter_folders[0], tmp_path / "merged", data=rows_file, dtype="fp32", progress=False)
    assert "parity   predicts like the adapter on its base, within the limits" in str(merged).splitlines()


def test_command_in_a_notebook_stores_no_spinner(tmp_path: Path) -> None:
    """`!strop` has a pseudo-terminal, and an environment that asks for colours."""
    import os
    import pty
    import subprocess
    import sys

    code = "import time; from strop.display.terminal import status_line\nwith status_line('waiting'): time.sleep(0.3)"
    shown = {}
    for name, extra in (("terminal", {}), ("cell", {"JPY_PARENT_PID": "1", "FORCE_COLOR": "1"})):
        parent, child = pty.openpty()
        environment = {key: value for key, value in os.environ.items() if key != "JPY_PARENT_PID"}
        process = subprocess.Popen(
            [sys.executable, "-c", code], stderr=child, env=environment | {"TERM": "xterm"} | extra
        )
        os.close(child)
        assert process.wait(60) == 0
        try:
            shown[name] = os.read(parent, 10**6)
        except OSError:  # nothing was written
            shown[name] = b""
        os.close(parent)
    assert b"waiting" in shown["terminal"] and shown["cell"] == b""


def test_gap_to_the_best_is_positive_and_the_best_has_none() -> None:
    results = [
        {
            "run": name, "metric": "exact", "intervals": {"tuned": [0.0, 1.0]},
            "tuned": {"exact": hits / 20, "loss": 1.0},
            "samples": [{"tuned": "", "tuned_hit": row < hits} for row in range(20)],
        }
        for name, hits in (("bad", 2), ("good", 18), ("near", 17))
    ]  # fmt: skip
    best, near, bad = rank_models(results)
    assert best["behind"] == {"value": 0, "low": 0, "high": 0} and best["verdict"] == "best"
    assert near["behind"]["value"] == pytest.approx(0.05) and near["verdict"] == "unclear"
    assert bad["behind"]["value"] == pytest.approx(0.8) and bad["behind"]["low"] > 0 and bad["verdict"] == "worse"


def test_help_of_a_model_shows_no_internals() -> None:
    import pydoc

    text = pydoc.render_doc(strop.Model, renderer=pydoc.plaintext).partition("Data descriptors")[0]
    assert "_lock" not in text and "renderer" not in text and "`strop.load` returns" in text
