"""Data sets of the Hub, against a stand-in for its HTTP API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from strop.data import hub
from strop.errors import DataError


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


class _Hub(BaseHTTPRequestHandler):
    """The part of the Hub's HTTP API that reading a data set needs."""

    commit = "c" * 40
    files = {  # noqa: RUF012
        "README.md": b"# hello",
        "data/train.jsonl": b'{"text": "007"}\n{"text": "2024-01-31"}\n',
        "data/test.jsonl": b'{"text": "no"}\n',
    }

    def _answer(self, body: bool) -> None:
        content, headers = b"", {}
        if self.path.startswith("/api/datasets/o/n/revision/") or self.path == "/api/datasets/o/n":
            names = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "o/n", "sha": self.commit, "siblings": names}).encode()
        elif self.path.startswith("/datasets/o/n/resolve/main/"):
            content = self.files[self.path.split("/main/")[1].split("?")[0]]
            headers = {"ETag": f'"{hash(content) & 0xFFFF:x}"', "X-Repo-Commit": self.commit}
        self.send_response(200 if content else 404)
        if not content:
            self.send_header("X-Error-Code", "RepoNotFound")
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_data_set_is_fetched_and_then_served_from_the_cache(hub_url: str, tmp_path: Path) -> None:
    script = (
        "import sys; from strop.data.sources import read_rows; from strop.errors import DataError\n"
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
