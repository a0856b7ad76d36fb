"""What a killed process leaves, and two that make the same thing at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from strop.errors import FolderError
from strop.runs.events import EventLog, read_events
from strop.runs.folder import build_once, exclusive_output, new_folder, read_json


def test_what_a_killed_process_left_in_the_cache_is_removed(tmp_path: Path) -> None:
    """Gigabytes, of a base that was being quantized."""
    (tmp_path / "nf4.tmp-99999").mkdir()
    (tmp_path / "nf4.tmp-99999" / "model-00001.safetensors").write_bytes(bytes(9))
    (tmp_path / "int8.tmp-99999").mkdir()  # another process may be making that

    def make(folder: Path) -> None:
        with new_folder(folder) as temp:
            (temp / "x").write_text("x")

    build_once(tmp_path / "nf4", lambda folder: (folder / "x").is_file(), make)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".nf4.lock", "int8.tmp-99999", "nf4"]


def test_one_process_makes_a_name(tmp_path: Path) -> None:
    out = tmp_path / "new" / "model.gguf"
    with exclusive_output(out):
        with pytest.raises(FolderError, match="another process is making it"), exclusive_output(out):
            pass
        out.write_text("made")
    with pytest.raises(FolderError, match="is there already"), exclusive_output(out):
        pass
    out.unlink()
    with exclusive_output(out):
        pass
    assert not list(out.parent.iterdir()) or os.name != "posix"


@pytest.mark.skipif(os.name != "posix", reason="the lock stays there")
def test_what_a_killed_process_left_of_a_name_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("out.tmp-99999", "out.tmp-mine", "out.old-1", "other.tmp-1"):
        (tmp_path / name).mkdir()
    with exclusive_output(tmp_path / "out"):  # nobody was killed: these are the user's own
        assert len(list(tmp_path.glob("*.*"))) == 5
    (tmp_path / ".out.lock").touch()
    with exclusive_output(tmp_path / "out"):
        pass
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other.tmp-1", "out.old-1", "out.tmp-mine"]


def test_a_full_disk_takes_no_event_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "events.jsonl"
    EventLog(file).emit("save", step=1)
    with file.open("a") as more:
        more.write('{"event": "st')

    def full(self: Path, data: bytes) -> int:
        self.open("wb").close()
        raise OSError(errno.ENOSPC, "full", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    EventLog(file)
    assert [event["event"] for event in read_events(file)] == ["save"] and file.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("text", ["", "{", "[]", "\0\0\0", "[" * 100_000])
def test_a_damaged_file_holds_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert read_json(tmp_path / "x.json") == {} == read_json(tmp_path / "none.json")
