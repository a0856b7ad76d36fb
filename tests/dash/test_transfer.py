"""Downloads from a run, and uploads into the data folder."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from strop.dash import app
from strop.dash.transfer import Upload, data_file_name, download
from strop.errors import FolderError, InputError
from strop.runs.folder import RunFolder
from tests.support.dash import TOKEN, Dash, make_run, run_dash, session, step

ROWS = b'{"text": "a"}\n'


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("transfer") / "runs"
    folder = make_run(place, "one", [*session(), step(1)], {"exit": 0})
    make_run(place, "two", [*session(), step(1)])
    (folder / "report.html").write_text("<p>report")
    (folder / "adapter" / "sub").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "sub" / "weights").write_bytes(bytes(range(256)) * 9000)
    (place.parent / "secret").write_text("secret")
    (folder / "adapter" / "link").symlink_to(place.parent / "secret")
    return place


@pytest.fixture(scope="module")
def dash(root: Path) -> Iterator[Dash]:
    with run_dash(root, root.parent) as started:
        yield started


def send(dash: Dash, name: str, body: Any = ROWS, **headers: str) -> requests.Response:
    headers = {"content-type": "application/octet-stream", **headers}
    return dash.send("POST", "/api/upload", params={"name": name}, data=body, headers=headers)


def test_adapter_report_and_recipe_are_downloaded(dash: Dash, root: Path) -> None:
    answer = dash.get("/api/runs/one/download/adapter")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == ["adapter/adapter_config.json", "adapter/sub/weights"]  # not the link
        weights = root / "one" / "adapter" / "sub" / "weights"
        assert archive.read("adapter/sub/weights") == weights.read_bytes()
    report = dash.get("/api/runs/one/download/report")
    assert report.text == "<p>report" and report.headers["content-type"] == "application/octet-stream"
    assert dash.get("/api/runs/two/download/recipe").content == (root / "two" / "recipe.yaml").read_bytes()


def test_missing_files_and_links_are_not_downloaded(dash: Dash, root: Path, tmp_path: Path) -> None:
    for path in (
        "two/download/adapter",
        "two/download/report",
        "one/download/lock.json",
        "one/download/..%2flock.json",
    ):
        assert dash.get(f"/api/runs/{path}").status_code == 404, path
    folder = RunFolder(make_run(tmp_path, "linked", []))
    folder.adapter.symlink_to(root / "one" / "adapter")
    folder.page.symlink_to(root.parent / "secret")
    for kind in ("adapter", "report"):
        with pytest.raises(FolderError):
            download(folder, kind)


def test_upload_is_stored_next_to_the_runs_and_never_overwrites(dash: Dash, root: Path) -> None:
    assert send(dash, "rows.jsonl").json() == {"path": "data/rows.jsonl", "bytes": len(ROWS)}
    assert send(dash, "../../rows.jsonl", b"other").json()["path"] == "data/rows-2.jsonl"
    assert send(dash, "rows.jsonl", b"other").json()["path"] == "data/rows-2.jsonl"  # the file that has this content
    assert send(dash, "rows.jsonl").json()["path"] == "data/rows.jsonl"
    assert send(dash, "C:\\files\\my rows.jsonl.gz", iter([b"a", b"b"])).json()["path"] == "data/my-rows.jsonl.gz"
    folder = root.parent / "data"
    assert (folder / "rows.jsonl").read_bytes() == ROWS and (folder / "rows-2.jsonl").read_bytes() == b"other"
    listed = dash.get("/api/files", params={"path": "data"}).json()["entries"]
    assert {entry["name"] for entry in listed} == {"rows.jsonl", "rows-2.jsonl", "my-rows.jsonl.gz"}
    assert len(list(folder.iterdir())) == 3  # no temporary file


def test_invalid_uploads_are_refused(dash: Dash, root: Path) -> None:
    before = sorted(root.parent.rglob("*"))
    for name in ("", "..", "run.py", ".jsonl", "rows.jsonl/", "a\0.exe", "x" * 300):
        assert send(dash, name).status_code == 400, name
    assert send(dash, "empty.jsonl", b"").status_code == 400
    for headers in ({"content-type": "application/json"}, {"content-type": "text/plain"}):
        assert send(dash, "a.jsonl", **headers).status_code == 415
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
        assert send(dash, "a.jsonl", **headers).status_code == 403
    assert send(dash, "a.jsonl", authorization="Bearer wrong").status_code == 401
    too_long = {"content-length": str(app.MAX_UPLOAD_BYTES + 1)}
    answer = requests.Request("POST", f"{dash.url}/api/upload?name=a.jsonl", data=b"x").prepare()
    answer.headers.update({"authorization": f"Bearer {TOKEN}", "content-type": "application/octet-stream", **too_long})
    assert requests.Session().send(answer, timeout=30).status_code == 413
    plan = dash.send("POST", "/api/plan", data=b"{}", headers={"content-type": "application/octet-stream"})
    assert plan.status_code == 415
    assert sorted(root.parent.rglob("*")) == before


def test_names_are_sanitized() -> None:
    names = {
        "données 日本.CSV": "données-日本.CSV", "a/b\\c.json": "c.json", "<img src=x>.txt": "img-src-x-.txt",
        ".hidden.jsonl": "hidden.jsonl", f"{'x' * 300}.jsonl": f"{'x' * 54}.jsonl", "\u202ea.csv": "a.csv",
    }  # fmt: skip
    assert {name: data_file_name(name) for name in names} == names


def test_interrupted_upload_leaves_no_file(tmp_path: Path) -> None:
    upload = Upload(tmp_path / "data", "rows.jsonl")
    with pytest.raises(RuntimeError), upload.receive():
        upload.write(ROWS)
        raise RuntimeError("the client has gone")
    assert not list((tmp_path / "data").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "data")
    with pytest.raises(FolderError), Upload(tmp_path / "link", "rows.jsonl").receive():
        pass
    with pytest.raises(InputError):
        Upload(tmp_path, "rows.exe")
