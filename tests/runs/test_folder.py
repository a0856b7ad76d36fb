"""Run folders and cache folders after killed processes, full disks and concurrent writers."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from strop.errors import FolderError
from strop.runs.events import EventLog, read_events
from strop.runs.folder import build_once, check_new_output, create_run_folder, exclusive_output, new_folder, read_json


def test_leftovers_of_a_killed_process_in_the_cache_are_removed(tmp_path: Path) -> None:
    """A half-quantized base can take gigabytes."""
    (tmp_path / "nf4.tmp-99999").mkdir()
    (tmp_path / "nf4.tmp-99999" / "model-00001.safetensors").write_bytes(bytes(9))
    (tmp_path / "int8.tmp-99999").mkdir()  # another process may still write this

    def build(folder: Path) -> None:
        with new_folder(folder) as temp:
            (temp / "x").write_text("x")

    build_once(tmp_path / "nf4", lambda folder: (folder / "x").is_file(), build)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".nf4.lock", "int8.tmp-99999", "nf4"]


def test_exclusive_output_refuses_concurrent_writers_and_existing_files(tmp_path: Path) -> None:
    out = tmp_path / "new" / "model.gguf"
    with exclusive_output(out):
        with pytest.raises(FolderError, match="another process is writing it"), exclusive_output(out):
            pass
        out.write_text("made")
    with pytest.raises(FolderError, match="already exists"), exclusive_output(out):
        pass
    out.unlink()
    with exclusive_output(out):
        pass
    assert not list(out.parent.iterdir()) or os.name != "posix"


@pytest.mark.skipif(os.name != "posix", reason="the lock file remains on Windows")
def test_exclusive_output_removes_only_its_own_leftovers(tmp_path: Path) -> None:
    for name in ("out.tmp-99999", "out.tmp-mine", "out.old-1", "other.tmp-1"):
        (tmp_path / name).mkdir()
    with exclusive_output(tmp_path / "out"):  # no process was killed: these belong to the user
        assert len(list(tmp_path.glob("*.*"))) == 5
    (tmp_path / ".out.lock").touch()
    with exclusive_output(tmp_path / "out"):
        pass
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other.tmp-1", "out.old-1", "out.tmp-mine"]


def test_full_disk_keeps_existing_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_damaged_json_reads_as_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert read_json(tmp_path / "x.json") == {} == read_json(tmp_path / "none.json")


def _create_and_claim(seed: int, paths: list[Path], barrier: Any, outcomes: Any) -> None:
    delays = random.Random(seed)
    for path in paths:
        barrier.wait()
        time.sleep(delays.random() * 0.003)
        try:
            with create_run_folder(path).claim():
                barrier.wait()
            outcomes.put("claimed")
        except FolderError:
            outcomes.put("refused")
            barrier.wait()
        except BaseException as error:
            outcomes.put(repr(error))
            barrier.wait()


def test_of_two_processes_that_start_in_one_folder_one_is_refused(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    paths, barrier, outcomes = [tmp_path / str(n) for n in range(500)], context.Barrier(2), context.SimpleQueue()
    workers = [context.Process(target=_create_and_claim, args=(seed, paths, barrier, outcomes)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    counts = Counter(outcomes.get() for _ in range(2 * len(paths)))
    for worker in workers:
        worker.join()
    assert counts == {"claimed": len(paths), "refused": len(paths)}


def test_existing_output_suggests_a_free_name(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    for name in ("m.gguf", "m-2.gguf"):
        (tmp_path / name).write_text("")
    with pytest.raises(FolderError) as raised:
        check_new_output(out)
    assert raised.value.fix == f"give another name, such as --out {tmp_path / 'm-3.gguf'}"
    assert str(raised.value).endswith(f'such as out="{tmp_path / "m-3.gguf"}"')
