"""Data sets of the Hub, with a fake of its HTTP API."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from strop.data.reading.sources import choose_files, is_dataset
from strop.errors import DataError
from tests.support.hub_standin import Fault, serve


def test_files_of_a_hub_repository_are_chosen_or_ambiguity_refused() -> None:
    shards = [
        "README.md",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
    ]
    assert choose_files("o/n", shards, None) == shards[1:3]
    assert choose_files("o/n", ["README.md", "dataset_infos.json", "alpaca.json"], None) == ["alpaca.json"]
    assert choose_files("o/n", ["x.jsonl", "test.jsonl"], None) == ["x.jsonl"]
    assert choose_files("o/n", ["a/train.csv", "b/train.csv"], "b/*") == ["b/train.csv"]
    for names in (["a/train.csv", "b/train.csv"], ["one.json", "two.json"], ["load.py", "data.zip"], []):
        with pytest.raises(DataError, match=r"several data files|no file of a known type"):
            choose_files("o/n", names, None)
    with pytest.raises(DataError, match=r"has no file c\.csv"):
        choose_files("o/n", ["a.csv"], "c.csv")


def test_is_dataset_recognizes_hub_names() -> None:
    assert all(map(is_dataset, ["o/n", "o/n-1.2", "o/n@main", "o/n/a.csv", "o/n@v1/data/*.parquet"]))
    assert not any(map(is_dataset, ["n", "o/train.jsonl", "o/train.csv.gz", "./n", "/o/n", "../n", "tests/x", ""]))


FILES = {
    "README.md": b"# hello",
    "data/train.jsonl": b'{"text": "007"}\n{"text": "2024-01-31"}\n',
    "data/test.jsonl": b'{"text": "no"}\n',
}


SCRIPT = (
    "import sys; from strop.data.reading.sources import read_rows; from strop.errors import DataError\n"
    "try:\n  print([(r.file, r.line, r.value['text']) for r in read_rows(sys.argv[1], errors=[])])\n"
    "except DataError as error: print('refused:', *error.lines())"
)


@pytest.fixture
def hub_url() -> Iterator[str]:
    with serve("datasets", "o/n", FILES) as (address, _):
        yield address


def read(address: str, cache: Path, spec: str, offline: str = "0") -> str:
    """Read a spec in a process with this Hub address; return the rows or the refusal."""
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": offline}
    env["HF_HUB_DISABLE_PROGRESS_BARS"] = env["HF_HUB_DISABLE_XET"] = "1"
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", SCRIPT, spec], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hub_data_set_is_downloaded_and_then_read_from_the_cache(hub_url: str, tmp_path: Path) -> None:
    def run(spec: str, offline: str = "0") -> str:
        return read(hub_url, tmp_path, spec, offline)

    train = "[('o/n/data/train.jsonl', 1, '007'), ('o/n/data/train.jsonl', 2, '2024-01-31')]"
    assert run("o/n") == train
    assert run("o/n", offline="1") == train
    assert run("o/n/data/test*") == "[('o/n/data/test.jsonl', 1, 'no')]"
    assert run("o/other").startswith("refused: o/other: no such file, and the Hub says:")
    assert "the Hub cannot be reached" in run("o/other", offline="1")


def test_partly_downloaded_data_set_is_refused(tmp_path: Path) -> None:
    shards = {f"data/train-0000{number}-of-00002.jsonl": b'{"text": "%d"}\n' % number for number in range(2)}
    faults: dict[str, Fault] = {"train-00001": "silence"}
    with serve("datasets", "o/n", {**shards, "a[1].jsonl": b'{"text": "a"}\n'}, faults=faults) as (address, _):

        def run(spec: str, offline: str = "0") -> str:
            return read(address, tmp_path, spec, offline)

        assert "refused: o/n: the connection to" in (message := run("o/n")) and "broke" in message
        assert "refused: o/n: only 1 of its 2 files are cached" in run("o/n", offline="1")
        faults.update({"train-00001": "short"})
        assert "Consistency check failed" in (message := run("o/n")) and "try again" in message
        assert "refused: o/n: only 1 of its 2 files are cached" in run("o/n", offline="1")
        faults.clear()
        whole = [(f"o/n/{name}", 1, str(number)) for number, name in enumerate(shards)]
        assert run("o/n") == run("o/n", offline="1") == run("o/n/data/*", offline="1") == str(whole)
        assert run("o/n/a[1].jsonl") == "[('o/n/a[1].jsonl', 1, 'a')]"


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({"/api/": 500}, "the Hub returned 500 Fix: wait a little"),
        ({"/api/": 401}, "the Hub says: Client error '401 Unauthorized'"),
        ({"/api/": "page"}, "the Hub cannot be reached (JSONDecodeError)"),
        ({"/resolve/": 403}, "the Hub returned 403"),
    ],
    ids=str,
)
def test_errors_of_the_hub_are_reported(faults: dict[str, Fault], expected: str, tmp_path: Path) -> None:
    with serve("datasets", "o/n", FILES, faults=faults) as (address, _):
        assert expected in read(address, tmp_path, "o/n")


def test_gated_data_set_names_the_page_of_its_terms(tmp_path: Path) -> None:
    with serve("datasets", "o/n", FILES, gated=True) as (address, _):
        assert f"o/n: gated: you have to accept its terms Fix: open {address}/datasets/o/n" in read(
            address, tmp_path, "o/n"
        )
