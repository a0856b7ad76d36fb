"""What is in the cache folder, and what `strop cache` deletes of it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

import strop
from strop.data.store import Writer
from strop.runs.cache import KINDS, OTHER, list_entries, select_entries
from tests.support import tiny_families
from tests.support.runs import QUICK, run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(file: Path, size: int, days: float = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(size))
    then = time.time() - days * 86400
    for path in (file, file.parent):
        os.utime(path, (then, then))


def test_cache_of_a_streamed_run_is_listed_and_made_again(
    cache: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    tiny_families.save("llama", base)
    words = ["train", "--model", base, "--data", rows_file, *QUICK, "--model.placement", "streamed"]
    code, _, err = run(*words, "--out", tmp_path / "one", capsys=capsys)
    assert code == 0, err
    listed = json.loads(run("cache", "--json", capsys=capsys)[1])
    kinds = {kind["kind"]: kind for kind in listed["kinds"]}
    stored = [file.stat().st_size for file in (cache / "layers").rglob("*.bin")]
    assert kinds["layers"]["entries"] == 1 and kinds["layers"]["bytes"] >= sum(stored) > 0
    assert listed["bytes"] == sum(
        file.stat().st_size for file in cache.rglob("*") if file.is_file() and file.suffix != ".lock"
    )
    assert set(kinds) <= {*KINDS, OTHER}

    code, out, _ = run("cache", "--delete", "layers", capsys=capsys)
    assert code == 0 and "would delete 1 entries" in out and any((cache / "layers").iterdir())
    deleted = json.loads(run("cache", "--delete", "layers", "--yes", "--json", capsys=capsys)[1])
    assert deleted["deleted"] and deleted["bytes"] == kinds["layers"]["bytes"]
    assert not any((cache / "layers").iterdir())
    assert run(*words, "--out", tmp_path / "two", capsys=capsys)[0] == 0
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert adapters[0] == adapters[1]


def test_rows_given_in_python_are_deleted_only_by_name(
    cache: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [{"prompt": "2 + 3", "completion": "5"}] * 4
    strop.train(model=tiny_folder, data=rows, out=tmp_path / "run", train={"max_steps": 1}, progress=False)
    assert run("cache", "--delete", "all", "--yes", capsys=capsys)[0] == 0
    assert [entry.kind for entry in list_entries() if entry.kind != OTHER] == ["rows"]
    strop.resume(tmp_path / "run", progress=False)
    assert run("cache", "--delete", "rows", "--yes", capsys=capsys)[0] == 0
    assert not any((cache / "rows").iterdir())


def test_only_what_was_not_used_is_deleted(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(cache / "layers" / "old" / "a.bin", 3_000_000, days=40)
    write(cache / "layers" / "new" / "a.bin", 2_000_000, days=2)
    write(cache / "gguf" / "old" / "a.bin", 1_000_000, days=40)
    assert run("cache", "--delete", "layers", "--unused", "30", "--yes", capsys=capsys)[0] == 0
    assert [entry.path.name for entry in list_entries()] == ["old", "new"]  # of gguf, of layers
    out = run("cache", capsys=capsys)[1]
    assert "1.0 MB" in out and "40 days ago" in out and "2.0 MB" in out and "2 days ago" in out


def test_entry_that_a_process_is_writing_is_left_alone(cache: Path) -> None:
    write(cache / "layers" / "key" / "nf4" / "a.bin", 10)
    assert [entry.kind for entry in select_entries(list_entries(), ["all"])] == ["layers"]
    with FileLock(cache / "layers" / "key" / ".nf4.lock"):
        assert not list_entries()
    writer = Writer(cache / "data" / "rows")
    assert [entry.kind for entry in list_entries()] == ["layers"]
    writer.discard()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--delete", "layer"], "--delete layer: no such kind (did you mean layers?)"),
        (["--yes"], "--yes and --unused: have no effect without --delete KIND"),
    ],
)
def test_wrong_options_are_explained(
    words: list[str], message: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("cache", *words, capsys=capsys)
    assert code == 2 and message in err
