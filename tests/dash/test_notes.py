"""Notes, tags and new names of runs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from strop.dash.dashboard import Dashboard
from strop.dash.jobs import Busy
from strop.dash.notes import read_notes
from strop.errors import FolderError, InputError
from strop.runs.folder import RunFolder, write_json
from tests.support.dash import make_run, session, step

HOSTILE = "<b>bold</b>\n\u202e"


@pytest.fixture
def dashboard(tmp_path: Path) -> Dashboard:
    for name in ("one", "two"):
        make_run(tmp_path / "runs", name, [*session(), step(1)], {"exit": 0, "ended": "steps"})
    return Dashboard(tmp_path / "runs")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def test_notes_and_tags_are_stored_in_the_run_folder(dashboard: Dashboard) -> None:
    assert (dashboard.row("one")["note"], dashboard.row("one")["tags"]) == ("", [])
    result = dashboard.set_notes("one", HOSTILE, [" good ", "", "to do", "good", 3])
    assert result == {"note": HOSTILE, "tags": ["good", "to do"]}
    row = dashboard.row("one")
    assert (row["note"], row["tags"], row["state"]) == (HOSTILE, ["good", "to do"], "finished")
    assert json.loads((dashboard.root / "one" / "notes.json").read_text(encoding="utf-8")) == result
    assert Dashboard(dashboard.root).row("one") == row


def test_invalid_notes_are_refused(dashboard: Dashboard) -> None:
    for note, tags in (("x" * 10_001, []), ("", ["x" * 41]), ("", ["a\nb"]), ("", [str(n) for n in range(21)])):
        with pytest.raises(InputError):
            dashboard.set_notes("one", note, tags)
    with pytest.raises(FolderError):
        dashboard.set_notes("three", "", [])
    assert not (dashboard.root / "one" / "notes.json").exists()


def test_damaged_notes_are_empty(dashboard: Dashboard) -> None:
    file = dashboard.root / "one" / "notes.json"
    for text in ("[", "[]", '{"note": 3, "tags": "x"}', '{"tags": [1, {}]}'):
        file.write_text(text)
        assert read_notes(file.parent) == {"note": "", "tags": []}
    file.unlink()
    secret = dashboard.root.parent / "secret"
    secret.write_text('{"note": "secret"}')
    file.symlink_to(secret)
    assert dashboard.row("one")["note"] == ""
    dashboard.set_notes("one", "new", [])
    assert secret.read_text() == '{"note": "secret"}' and not file.is_symlink()


def test_rename_moves_the_folder_and_its_jobs(dashboard: Dashboard) -> None:
    before = {file.name: file.read_bytes() for file in (dashboard.root / "one").iterdir()}
    job = dashboard.jobs.start("evaluate", ["--version"], "one")["id"]
    while dashboard.jobs.status(job)["state"] == "running":
        pass
    dashboard.set_notes("one", "note", [])
    assert dashboard.rename("one", "new name") == {"name": "new name"}
    after = {file.name: file.read_bytes() for file in (dashboard.root / "new name").iterdir()}
    assert set(after) - set(before) <= {"notes.json", ".claim.lock"} and after.items() >= before.items()
    assert {row["name"] for row in dashboard.runs()} == {"new name", "two"}
    assert dashboard.row("new name")["note"] == "note" and dashboard.row("new name")["state"] == "finished"
    assert [job["id"] for job in dashboard.detail("new name")["jobs"]] == [job]
    with pytest.raises(FolderError):
        dashboard.row("one")


def test_report_of_a_renamed_run_has_its_new_name(dashboard: Dashboard) -> None:
    folder = RunFolder(dashboard.root / "one")
    recipe = [{"field": "out", "value": "runs/one", "origin": "option", "why": ""}]
    write_json(folder.report, {**folder.read_report(), "run": "runs/one", "recipe": recipe})
    folder.page.write_text("<h1>one</h1> runs/one", encoding="utf-8")
    dashboard.rename("one", "renamed")
    page = b"".join(dashboard.download("renamed", "report")).decode()
    assert "<h1>renamed</h1>" in page and "runs/one" not in page and str(dashboard.root / "renamed") in page


@pytest.mark.parametrize("name", ["two", "one", "", ".x", "../x", "a/b", "a\nb", "x" * 300])
def test_names_that_are_taken_or_invalid_are_refused(dashboard: Dashboard, name: str) -> None:
    with pytest.raises(FolderError):
        dashboard.rename("one", name)
    assert {row["name"] for row in dashboard.runs()} == {"one", "two"}


def test_name_of_a_run_that_failed_to_start_is_taken(dashboard: Dashboard) -> None:
    job = dashboard.jobs.start("train", ["train", "--model=none", "--data=none"], "failed")["id"]
    with pytest.raises(FolderError, match="failed: a run with this name exists"):  # it starts
        dashboard.rename("one", "failed")
    while dashboard.jobs.status(job)["state"] == "running":
        pass
    with pytest.raises(FolderError, match="failed: a run with this name exists"):
        dashboard.rename("one", "failed")
    assert {row["name"] for row in dashboard.runs()} == {"failed", "one", "two"}


def test_the_name_is_reported_as_taken_and_nothing_is_saved(
    dashboard: Dashboard, sleeper: subprocess.Popen[bytes]
) -> None:
    claim = {"pid": sleeper.pid, "started": psutil.Process(sleeper.pid).create_time()}
    (dashboard.root / "two" / "claim.json").write_text(json.dumps(claim))
    with pytest.raises(FolderError, match="two: a run with this name exists"):
        dashboard.set_notes("one", "note", ["tag"], "two")
    assert dashboard.row("one")["note"] == ""
    with pytest.raises(InputError, match="tags: invalid"):
        dashboard.set_notes("one", "note", ["x" * 41], "new")
    assert dashboard.row("one")["tags"] == []
    assert dashboard.set_notes("one", "note", ["tag"], "new") == {"note": "note", "tags": ["tag"]}
    assert dashboard.row("new")["note"] == "note"


def test_run_that_is_loaded_for_a_chat_is_not_renamed(dashboard: Dashboard, sleeper: subprocess.Popen[bytes]) -> None:
    job = dashboard.root / ".dash" / "jobs" / "20260101-000000-serve-abcdef"
    job.mkdir(parents=True)
    about = {"id": job.name, "kind": "serve", "run": str(dashboard.root / "one"), "words": [], "pid": sleeper.pid}
    (job / "job.json").write_text(json.dumps({**about, "born": psutil.Process(sleeper.pid).create_time()}))
    with pytest.raises(Busy, match="one is loaded for a chat"):
        dashboard.rename("one", "new")
    assert dashboard.rename("two", "new") == {"name": "new"}


@pytest.mark.parametrize(
    ("kind", "what", "screen"),
    [("evaluate", "one: its evaluation is running", "Answers"), ("merge", "one: it is being exported", "Export")],
)
def test_run_in_use_is_neither_renamed_nor_deleted_and_the_reason_is_named(
    kind: str, what: str, screen: str, dashboard: Dashboard, sleeper: subprocess.Popen[bytes]
) -> None:
    job = dashboard.root / ".dash" / "jobs" / f"20260101-000000-{kind}-abcdef"
    job.mkdir(parents=True)
    about = {"id": job.name, "kind": kind, "run": "one", "words": [], "started": 1.0, "pid": sleeper.pid}
    (job / "job.json").write_text(json.dumps({**about, "born": psutil.Process(sleeper.pid).create_time()}))
    for change in (lambda: dashboard.rename("one", "new"), lambda: dashboard.delete("one", "one")):
        with pytest.raises(Busy) as raised:
            change()
        assert raised.value.what == what and raised.value.fix.endswith(f"stop it on the run's {screen} screen")


def test_run_in_use_is_not_renamed(dashboard: Dashboard, sleeper: subprocess.Popen[bytes]) -> None:
    claim = {"pid": sleeper.pid, "started": psutil.Process(sleeper.pid).create_time()}
    (dashboard.root / "one" / "claim.json").write_text(json.dumps(claim))
    with pytest.raises(Busy):
        dashboard.rename("one", "new")
    (dashboard.root / "one" / "claim.json").unlink()
    with RunFolder(dashboard.root / "one").claim(), pytest.raises(FolderError):
        dashboard.rename("one", "new")
    assert (dashboard.root / "one").is_dir() and not (dashboard.root / "new").exists()
