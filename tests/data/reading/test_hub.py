"""Data sets of the Hub, against a stand-in for its HTTP API."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from strop.data.reading import hub
from strop.errors import DataError
from tests.support.hub_standin import serve


def test_which_files_of_a_hub_repository_are_read() -> None:
    shards = [
        "README.md",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
    ]
    assert hub.choose("o/n", shards, None) == shards[1:3]
    assert hub.choose("o/n", ["README.md", "dataset_infos.json", "alpaca.json"], None) == ["alpaca.json"]
    assert hub.choose("o/n", ["x.jsonl", "test.jsonl"], None) == ["x.jsonl"]
    assert hub.choose("o/n", ["a/train.csv", "b/train.csv"], "b/*") == ["b/train.csv"]
    for names in (["a/train.csv", "b/train.csv"], ["one.json", "two.json"], ["load.py", "data.zip"], []):
        with pytest.raises(DataError, match=r"several data files|no file of a known type"):
            hub.choose("o/n", names, None)
    with pytest.raises(DataError, match=r"has no file c\.csv"):
        hub.choose("o/n", ["a.csv"], "c.csv")


def test_what_has_the_form_of_a_hub_name() -> None:
    assert all(map(hub.is_dataset, ["o/n", "o/n-1.2", "o/n@main", "o/n/a.csv", "o/n@v1/data/*.parquet"]))
    assert not any(map(hub.is_dataset, ["n", "o/train.jsonl", "o/train.csv.gz", "./n", "/o/n", "../n", "tests/x", ""]))


FILES = {
    "README.md": b"# hello",
    "data/train.jsonl": b'{"text": "007"}\n{"text": "2024-01-31"}\n',
    "data/test.jsonl": b'{"text": "no"}\n',
}


@pytest.fixture
def hub_url() -> Iterator[str]:
    with serve("datasets", "o/n", FILES) as (address, _):
        yield address


def test_a_hub_data_set_is_fetched_and_then_served_from_the_cache(hub_url: str, tmp_path: Path) -> None:
    script = (
        "import sys; from strop.data.reading.sources import read_rows; from strop.errors import DataError\n"
        "try:\n  print([(r.file, r.line, r.value['text']) for r in read_rows(sys.argv[1], bad=[])])\n"
        "except DataError as error: print('refused:', *error.lines())"
    )

    def run(spec: str, **extra: str) -> str:
        env = {**os.environ, "HF_ENDPOINT": hub_url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", **extra}
        env["HF_HUB_DISABLE_PROGRESS_BARS"] = env["HF_HUB_DISABLE_XET"] = "1"
        env.pop("HF_HUB_CACHE", None)
        done = subprocess.run([sys.executable, "-c", script, spec], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    train = "[('o/n/data/train.jsonl', 1, '007'), ('o/n/data/train.jsonl', 2, '2024-01-31')]"
    assert run("o/n") == train
    assert run("o/n", HF_HUB_OFFLINE="1") == train
    assert run("o/n/data/test*") == "[('o/n/data/test.jsonl', 1, 'no')]"
    assert run("o/other").startswith("refused: o/other: no such file here, and the Hub says:")
    assert "the Hub cannot be reached" in run("o/other", HF_HUB_OFFLINE="1")
