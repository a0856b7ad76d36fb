"""`strop check`: rows that are repeated by a weight, files of several formats, and `--fix`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.support import tiny
from tests.support.runs import run


def test_fix_reports_the_cleaned_copy(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(Path("rows.jsonl"), 5)
    rows.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    code, out, err = run("check", "--model", tiny_folder, "--data", rows, "--fix", "clean.jsonl", capsys=capsys)
    assert code == 0 and "wrote clean.jsonl: 5 rows, 1 dropped (see clean.jsonl.changes.jsonl)" in out
    assert f"next     strop train --model {tiny_folder} --data clean.jsonl" in err


def test_command_after_fix_trains_on_the_copy_as_on_the_rows(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"q": "a", "a": "b c"}\n{"q": "d", "a": "e"}\n', encoding="utf-8")
    words = ["check", "--model", tiny_folder, "--data", "rows.jsonl@2", "--data.columns", "prompt=q,completion=a"]
    code, out, err = run(*words, "--data.loss", "all", "--fix", "clean.jsonl", "--json", capsys=capsys)
    assert code == 0 and "wrote clean.jsonl: 4 rows, 0 dropped" in err  # two rows, twice as their weight asks
    command = shlex.split(" ".join(err.partition("next ")[2].split()))
    assert command == shlex.split(f"strop train --model {tiny_folder} --data.loss all --data clean.jsonl")
    code, again, _ = run("check", *command[2:], "--json", capsys=capsys)
    assert code == 0 and json.loads(again)["tokens"] == json.loads(out)["tokens"]
    data = {"train": "rows.jsonl", "columns": {"prompt": "q", "completion": "a"}}
    Path("r.yaml").write_text(yaml.safe_dump({"model": {"name": str(tiny_folder)}, "data": data}), encoding="utf-8")
    code, _, err = run("check", "r.yaml", "--fix", "other.jsonl", capsys=capsys)
    command = shlex.split(" ".join(err.partition("next ")[2].split()))
    assert command == shlex.split("strop train r.yaml --data.columns none --data other.jsonl")
    assert run("check", *command[2:], capsys=capsys)[0] == 0


def test_fix_does_not_suggest_itself(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(Path("rows.jsonl"), 5)
    rows.write_text(rows.read_text() + '{"prompt": "a"}\n')
    words = ["check", "--model", tiny_folder, "--data", rows]
    code, out, _ = run(*words, capsys=capsys)
    assert code == 2 and "--fix clean.jsonl" in " ".join(out.split())
    code, out, err = run(*words, "--fix", "clean.jsonl", capsys=capsys)
    assert code == 0 and "1 of 6 training rows cannot be used" in out and "Fix:" not in out + err
    assert "wrote clean.jsonl: 5 rows, 1 dropped" in out and "--data clean.jsonl" in err


@pytest.mark.parametrize(
    ("words", "good", "bad"),
    [
        ("--objective dpo", {"prompt": "p", "chosen": "a", "rejected": "b"}, {"chosen": ""}),
        ("--objective kto", {"prompt": "p", "completion": "a", "label": True}, {"label": "maybe"}),
        ("--objective simpo", {"prompt": "p", "responses": ["a", "b"], "scores": [2, 1]}, {"scores": [1, 1]}),
        ("--objective grpo --train.rewards exact", {"prompt": "p", "completion": "a"}, {"prompt": 1}),
        ("--objective classify --train.labels x --train.labels y", {"text": "p", "label": "x"}, {"label": "z"}),
        ("--data.columns prompt=q,completion=a", {"q": "p", "a": "a"}, {"a": ""}),
    ],
)  # fmt: skip
def test_command_that_an_error_suggests_leads_to_training(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: str, good: dict[str, object], bad: dict[str, object],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, good | bad)), encoding="utf-8")
    code, _, err = run("train", tiny_folder, "--data", "rows.jsonl", *words.split(), capsys=capsys)
    command = re.search("`strop check (.*?)`", " ".join(err.split()))
    assert code == 2 and command is not None, err
    code, out, err = run("check", *shlex.split(command[1]), capsys=capsys)
    kept = f"{words} " if "columns" not in words else ""
    assert code == 0 and "wrote clean.jsonl: 1 rows, 1 dropped" in out, err
    assert f"next strop train --model {tiny_folder} {kept}--data clean.jsonl" in " ".join(err.split())


def test_fix_refuses_existing_paths(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 5)
    for out in (Path("."), tmp_path, rows):
        code, _, err = run("check", "--model", tiny_folder, "--data", rows, "--fix", out, capsys=capsys)
        assert code == 2 and f"error: {out}" in err


def test_copy_without_rows_is_not_written(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": ""}\n' * 3, encoding="utf-8")
    code, _, err = run("check", "--model", tiny_folder, "--data", "rows.jsonl", "--fix", "clean.jsonl", capsys=capsys)
    assert code == 2 and "no row is usable, so clean.jsonl was not written" in err and "next" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_row_that_a_weight_repeats_is_shown_once_and_no_duplicate(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a long path would be cut
    rows = tiny.write_rows(Path("rows.jsonl"), 5)
    words = ["check", "--model", tiny_folder, "--data"]
    code, out, _ = run(*words, f"{rows}@3", "--show", "2", capsys=capsys)
    assert code == 0 and "15 rows read" in out and "repeat an earlier" not in out
    assert [out.count(f"rows.jsonl:{line}  ") for line in (1, 2, 3)] == [1, 1, 0]
    rows.write_text(2 * rows.read_text())
    report = json.loads(run(*words, f"{rows}@3", "--json", capsys=capsys)[1])
    assert report["duplicates"]["within"] == 5 and "5 training rows repeat an earlier one" in report["warnings"]


@pytest.mark.parametrize(
    ("objective", "row", "parts"),
    [
        ("dpo", {"prompt": "p", "chosen": "a", "rejected": "b"}, [", chosen", ", rejected"]),
        ("kto", {"prompt": "p", "chosen": "a", "rejected": "b"}, [", labelled good", ", labelled bad"]),
        ("embed", {"anchor": "a", "positive": "b", "negatives": ["c", "d"]},
         [", anchor", ", positive", ", negative", ", negative"]),
        ("classify", {"text": "a b", "label": "spam"}, [", class spam"]),
        ("classify", {"text": "a b", "label": ["x", "y"]}, [", class x, y"]),
        ("sft", {"prompt": "p", "completion": "a"}, [""]),
    ],
)  # fmt: skip
def test_rows_that_are_shown_say_what_they_are(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    objective: str, row: dict[str, object], parts: list[str],
) -> None:  # fmt: skip
    other = {**row, "text": "c d", "label": ["z"] if isinstance(row.get("label"), list) else "ham"}
    rows = tmp_path / "rows.jsonl"
    lines = map(json.dumps, (row, other if objective == "classify" else row))
    rows.write_text("\n".join(lines), encoding="utf-8")
    words = ["check", "--model", tiny_folder, "--data", f"{rows}@2", "--objective", objective, "--show", len(parts)]
    out = run(*words, capsys=capsys)[1]
    assert re.findall(r"rows\.jsonl:\d+ +\d+ tokens, \d+ supervised(.*?) ?[─-]*\n", out) == parts, out


def test_file_without_a_format_next_to_others_is_not_read_with_options_for_all(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, table = tiny.write_rows(tmp_path / "rows.jsonl", 5), tmp_path / "qa.csv"
    table.write_text("question,answer,notes\nwhat is 3,three,easy\n", encoding="utf-8")
    alone = "Fix: --data.format question-answer (without notes)"
    assert alone in run("check", "--model", tiny_folder, "--data", table, capsys=capsys)[2]
    err = run("check", "--model", tiny_folder, "--data", rows, "--data", table, capsys=capsys)[2]
    assert alone not in err and "Fix: rename or remove columns of this file" in " ".join(err.split())


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_output_names_the_format_the_tokenizer_and_the_default_system_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    formats = {
        "alpaca": '{"instruction": "a", "output": "b"}',
        "prompt-completion": '{"prompt": "a", "completion": "b"}',
        "text": '{"text": "a b c d"}',
    }
    for name, line in formats.items():
        out = run("check", write_lines(tmp_path / f"{name}.jsonl", line, line), capsys=capsys)[1]
        shown = " ".join(out.split())
        assert f"format {name}, with the tokenizer of demo" in shown
        has_prompt = "rows without a system prompt get the template's: You are a helpful AI assistant named" in shown
        assert has_prompt == (name != "text")


def test_default_system_prompt_is_not_named_if_all_rows_have_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system, user, assistant = (f'{{"role": "{role}", "content": "a"}}' for role in ("system", "user", "assistant"))
    rows = [f'{{"messages": [{system}, {user}, {assistant}]}}', f'{{"messages": [{user}, {assistant}]}}']
    for lines, expected in ((rows[:1] * 2, False), (rows, True)):
        out = run("check", write_lines(tmp_path / "rows.jsonl", *lines), capsys=capsys)[1]
        assert ("rows without a system prompt get" in " ".join(out.split())) == expected


def test_lines_that_cannot_be_read_are_named_before_missing_completions(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = '{"prompt": "a", "completion": "b"},', '{"prompt": "a", "comp', '{"prompt": "a"}'
    words = ["check", "--model", tiny_folder, "--data", write_lines(Path("rows.jsonl"), *lines)]
    code, out, _ = run(*words, capsys=capsys)
    assert code == 2 and "rows.jsonl:3: no completion to train on\n" in out and "after the last answer" not in out
    *_, error, fix = out.splitlines()
    assert error.startswith("error: 2 of 3 training rows cannot be read; of the others, rows.jsonl: prompts without")
    assert fix.startswith("Fix: first correct the rows that cannot be read; rows with answers: {")
    write_lines(Path("rows.jsonl"), '{"prompt": "a"}', '{"prompt": "a", "completion": "b"}')
    err = run(*words, capsys=capsys)[2]
    assert err == (
        "error: rows.jsonl:1: no completion, which row 2 has\n"
        "Fix: give each row a completion, or remove the rows without one\n"
    )


def test_rows_that_a_run_refuses_end_with_an_error_and_a_fix(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("rows.jsonl"), '{"prompt": "a", "completion": ""}', '{"prompt": "a", "completion": "b"}')
    code, out, _ = run("check", "--model", tiny_folder, "--data", "rows.jsonl", capsys=capsys)
    assert code == 2 and "error: 1 of 2 training rows cannot be used\nFix: correct them" in out


def test_rows_with_the_same_error_share_a_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": f"{n}", "completion": "" if n % 2 else "yes", **({"prompt": 3} if n == 4 else {})} for n in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run("check", "--model", tiny_folder, "--data", tmp_path / "rows.jsonl", capsys=capsys)[1]
    lines = [line.split("rows.jsonl:")[1] for line in out.splitlines() if line.startswith("  /")]
    assert lines[0].startswith("2, 4, 6, 8, 10, 12, 14, 16, 18, 20 and 2 more: an assistant message is empty")
    assert lines[1].startswith("5: ") and len(lines) == 2


def test_objective_shows_a_row_that_it_learns_from(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", '{"prompt": "a", "completion": "b"}')
    words = ["check", "--model", tiny_folder, "--data", rows, "--objective"]
    row = '{"prompt": "hi", "chosen": "yo", "rejected": "no"}'
    assert f"Fix: --objective sft, or rows such as {row}\n" in run(*words, "dpo", capsys=capsys)[1]
    assert '"label": true}\n' in run(*words, "kto", capsys=capsys)[1]


def test_columns_of_a_table_lead_to_a_call_that_works(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("rows.csv"), "note,category", "lunch,food")
    words = ["check", "--model", tiny_folder, "--data", "rows.csv"]
    option = "--data.columns prompt=note,completion=category"
    assert f"Fix: {option} (if category is the answer to note)\n" in run(*words, capsys=capsys)[2]
    code, _, err = run(*words, *option.split(), capsys=capsys)
    assert code == 0 and f"strop train --model {tiny_folder} --data rows.csv {option}\n" in err
    write_lines(Path("rows.csv"), "category,note", "food,lunch")
    assert f"Fix: {option} (if" in run(*words, capsys=capsys)[2]


def test_missing_file_lists_the_nearest_names_first_and_counts_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [*(f"{letter}.jsonl" for letter in "abcdefghijklm"), "train.jsonl"]:
        Path(name).write_text("")
    err = run("check", "my-train-rows.jsonl", capsys=capsys)[2]
    assert "Fix: the data files there are train.jsonl, " in err and err.endswith(", and 4 more\n")


def test_row_without_an_answer_is_reported_with_the_other_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    rows = [good, good.replace("assistant", "asistant"), good[:-2], '{"prompt": "a"}', good]
    Path("bad.jsonl").write_text("\n".join(rows) + "\n")
    code, out, _ = run("check", "bad.jsonl", capsys=capsys)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 2 and [line[:12] for line in lines if line.startswith("bad.jsonl:")] == [
        "bad.jsonl:2:", "bad.jsonl:3:", "bad.jsonl:4:"
    ]  # fmt: skip
    assert "bad.jsonl:4: no answer, which other rows of the file have" in lines and "two formats" not in out


def test_file_without_rows_and_missing_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty.jsonl", "log.txt", "train.log"):
        Path(name).write_text("")
    assert "error: empty.jsonl: no rows: it is empty" in run("check", "empty.jsonl", capsys=capsys)[2]
    assert "Fix: the data files there are empty.jsonl\n" in run("check", "rows.jsonl", capsys=capsys)[2]
    err = run("check", "emty.jsonl", capsys=capsys)[2]
    assert err == "error: emty.jsonl: no such file (did you mean empty.jsonl?)\nFix: use empty.jsonl\n"


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ('{"prompt": "a", "completion": {"team": 1}}', [], "completion is an object: write it as a text (json.dumps)"),
        ("{'prompt': 'a', 'completion': 'b'}", [], "not single ones (of a Python dict: write it with json.dumps)"),
        ('{"prompt": "a", "completion": "b"}', ["--max-length", "2"], "Fix: --max-length "),
        ('{"prompt": "a", "completion": "b"}', ["--max-length", "2", "--data.overlong", "drop"], "Fix: --max-length "),
    ],
)
def test_advice_for_rows_of_which_none_can_be_used(
    row: str, options: list[str], expected: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 3)
    words = ["check", "--model", tiny_folder, "--data", tmp_path / "rows.jsonl", *options]
    code, out, _ = run(*words, capsys=capsys)
    assert code == 2 and expected in " ".join(out.split()) and "--data.overlong drop" not in out
