"""The server of the page: access rules, requests, streams and the process. Nothing is trained."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from strop.dash.app import MAX_BODY_BYTES, get_routes, post_routes, stem
from strop.dash.dashboard import Services
from tests.support.dash import TOKEN, Dash, evaluated, lines, make_run, run_dash, sample, session, step

HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m\"'&\ud800"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dash") / "runs"
    events = [*session(), *(step(number) for number in range(1, 41)), {"event": "note", "time": 1, "text": HOSTILE}]
    folder = make_run(place, "one", events, {"exit": 0, "ended": "steps"})
    evaluated(folder, [sample(number, False, number > 1, gold=HOSTILE) for number in range(4)])
    make_run(place, "two", events)
    make_run(place, "a run & 100%", events)
    (place / "linked").symlink_to(folder)
    (place.parent / "secret.jsonl").write_text("secret\n")
    return place


@pytest.fixture(scope="module")
def dash(root: Path) -> Iterator[Dash]:
    with run_dash(root, root.parent) as started:
        yield started
        assert started.stop() == 130


def addresses(root: Path) -> list[tuple[str, str]]:
    """Return the method and path of every route, for the run `two`."""
    room = Services(root, None)
    results: list[tuple[str, str]] = []
    for route in [*get_routes(room), *post_routes(room)]:
        path = str(route.path).replace("{name}", "two").replace("{id}", "20200101-000000-train-abcdef")  # type: ignore[attr-defined]
        results += [(method, path) for method in route.methods if method != "HEAD"]  # type: ignore[attr-defined]
    return results


def tree(root: Path) -> dict[str, Any]:
    return {str(file): file.read_bytes() for file in root.rglob("*") if file.is_file() and not file.is_symlink()}


def test_requests_without_the_token_are_refused(dash: Dash, root: Path) -> None:
    before, all_ = tree(root), addresses(root)
    assert len(all_) > 30
    for method, path in all_:
        body = {"json": {"confirm": "two", "options": {}}} if method == "POST" else {}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}, {"cookie": f"token={TOKEN}"}):
            answer = requests.request(method, f"{dash.url}{path}?token={TOKEN}", headers=headers, timeout=10, **body)
            assert answer.status_code == 401, (method, path)
            assert "runs" not in answer.text
    assert tree(root) == before


def test_pages_of_other_sites_are_refused(dash: Dash) -> None:
    host = dash.url.removeprefix("http://")
    for headers in (
        {"host": "evil.example"},
        {"host": host.partition(":")[0]},
        {"origin": "http://evil.example"},
        {"origin": "null"},
    ):
        assert dash.get("/api/runs", headers=headers).status_code == 403
        assert dash.post("/api/runs/two/delete", {"confirm": "two"}, headers=headers).status_code == 403
    answer = dash.get("/api/runs", headers={"origin": dash.url})
    assert answer.status_code == 200 and not [
        name for name in answer.headers if name.lower().startswith("access-control")
    ]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    form = dash.send("POST", "/api/runs/two/delete", data="confirm=two", headers={"content-type": "text/plain"})
    assert form.status_code == 415
    assert dash.send("OPTIONS", "/api/runs").status_code == 405
    assert dash.get("/api/runs/two/delete").status_code == 405  # GET requests change nothing


def test_paths_outside_the_folder_are_refused(dash: Dash) -> None:
    names = [
        "..",
        "%2e%2e",
        "..%2f..%2fetc",
        "%2fetc%2fpasswd",
        ".dash",
        "linked",
        "nope",
        "a%00b",
        "x" * 300,
        "..%5c..",
        "%0a",
    ]
    for name in names:
        for path in ("", "/history", "/log", "/contents", "/answers", "/ballot"):
            assert dash.get(f"/api/runs/{name}{path}").status_code in (400, 404), name
        for action, body in (("stop", {}), ("delete", {"confirm": name}), ("resume", {}), ("evaluate", {"data": "x"})):
            assert dash.post(f"/api/runs/{name}/{action}", body).status_code in (400, 404), (name, action)
    for name in ("../x", "/tmp/x", ".hidden", "..", "a/b"):
        answer = dash.post("/api/start", {"options": {"model.name": "demo"}, "name": name})
        assert answer.status_code == 404
    for path in ("/etc", "..", "../..", "/", "runs/../..", "~nosuchuser/x"):
        assert dash.get("/api/files", params={"path": path}).status_code == 400
    assert {entry["name"] for entry in dash.get("/api/files").json()["entries"]} == {"runs", "secret.jsonl"}
    assert "linked" not in {entry["name"] for entry in dash.get("/api/files?path=runs").json()["entries"]}
    for path in ("/../secret.jsonl", "/%2e%2e/secret.jsonl", "/static/../app.py", "/app.py", "/etc/passwd"):
        assert dash.get(path).status_code == 404


def test_links_inside_a_run_are_not_followed(dash: Dash, root: Path) -> None:
    folder = make_run(root, "trap", [])
    secret = root.parent / "secret.jsonl"
    for name in ("events.jsonl", "report.json", "answers.json", "votes.jsonl"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
    (folder / "checkpoints").symlink_to(root.parent)
    for path in ("", "/log", "/history", "/answers", "/contents"):
        answer = dash.get(f"/api/runs/trap{path}")
        assert answer.status_code == 200 and "secret" not in answer.text.replace("secret.jsonl", "")
    assert len(dash.get("/api/runs/trap/contents").json()["files"]) == 6


def test_invalid_bodies_are_refused(dash: Dash) -> None:
    assert dash.post("/api/plan", {"options": {"x": "y" * (MAX_BODY_BYTES + 1)}}).status_code == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(2 * MAX_BODY_BYTES // 65536):
            yield b"x" * 65536

    assert (
        dash.send("POST", "/api/plan", data=chunks(), headers={"content-type": "application/json"}).status_code == 413
    )
    odd = [b"", b"{", b"[]", b"null", b'{"options": {}, "options": {}}', b'{"a": NaN}', b"\xff", b"[" * 9000]
    odd += [b'{"options": 3}', b'{"options": {}, "more": 1}', b'{"options": {"x y": 1}}', b'{"options": {"out": "x"}}']
    odd += [b'{"options": {}, "memory": true}']
    for raw in odd:
        for path in ("/api/plan", "/api/start"):
            answer = dash.send("POST", path, data=raw, headers={"content-type": "application/json"})
            assert answer.status_code == 400 and answer.json()["error"]["message"], raw


def test_invalid_queries_are_refused(dash: Dash) -> None:
    for wrong in ("by=colour", "points=7", "points=x", "from=y", "more=1", "points=1e9", "points=nan", "to=inf"):
        assert dash.get(f"/api/runs/one/history?{wrong}").status_code == 400
    for wrong in ("filter=best", "order=x", "offset=x", "offset=nan", "more=1"):
        assert dash.get(f"/api/runs/one/answers?{wrong}").status_code == 400
    for wrong in ("", "?runs=one", "?runs=one,one", "?runs=one,nope"):
        assert dash.get(f"/api/compare{wrong}").status_code in (400, 404)
    assert dash.get("/api/jobs/20200101-000000-train-abcdef").status_code == 404
    assert dash.get("/api/jobs/..%2f..").status_code == 404


def test_run_name_comes_from_the_data() -> None:
    for name, called in {"a/b.jsonl": "b", "日本.jsonl": "run", "日本-v2.csv": "v2", "données.json": "donn-es"}.items():
        assert stem({"data.train": name}) == stem({"data": [name, "x"]}) == called
    assert stem({}) == "run"


def test_read_routes_return_the_run(dash: Dash, root: Path) -> None:
    listed = {row["name"]: row for row in dash.get("/api/runs").json()["runs"]}
    assert {"one", "two", "a run & 100%"} <= set(listed) and "linked" not in listed
    assert dash.get("/api/runs").json()["ignored"] == ["linked: a link"]
    one = dash.get("/api/runs/one").json()
    assert one["notes"] == [HOSTILE.replace("\ud800", "?")] and one["marks"][-1]["level"] == "warning"
    assert {"recipe", "machine", "memory", "checkpoints", "lock", "report", "jobs"} <= set(one)
    assert dash.get("/api/runs/a%20run%20%26%20100%25").json()["step"] == 40
    assert dash.get("/api/runs/one/duplicate").json()["options"]["lora.r"] == 4
    assert dash.get("/api/runs/one/duplicate").json()["name"] == "one-2"
    answers = dash.get("/api/runs/one/answers?filter=gained").json()
    assert answers["total"] == 2 and answers["rows"][0]["gold"].startswith("<script>")
    ballot = dash.get("/api/runs/one/ballot").json()
    voted = dash.post("/api/runs/one/vote", {"ballot": ballot["ballot"], "choice": "tie"}).json()
    assert voted["tally"]["ties"] == 1 and (root / "one" / "votes.jsonl").read_text().count("\n") == 1
    assert dash.post("/api/runs/one/vote", {"ballot": ballot["ballot"], "choice": "a"}).status_code == 409
    result = dash.get("/api/compare?runs=one,two").json()
    assert result["settings"] == [] and result["pairs"] == [] and result["unevaluated"]
    make_run(root, "c,d", [*session(), step(1)])
    result = dash.get("/api/compare", params={"runs": "one,c\\,d"}).json()
    assert [run["name"] for run in result["runs"]] == ["one", "c,d"]
    assert dash.get("/api/system?run=one").json()["process"] is None
    for name, action in (("one", "resume"), ("two", "stop"), ("two", "export")):
        body = {"kind": "merge", "out": "x"} if action == "export" else {}
        assert dash.post(f"/api/runs/{name}/{action}", body).status_code == 409
    assert dash.get("/api/chat").json()["state"] == "off"
    assert dash.post("/api/chat/v1/chat/completions", {"model": "x"}).status_code == 409


def test_stream_sends_appended_events(dash: Dash, root: Path) -> None:
    folder = make_run(root, "growing", [*session(), *(step(number) for number in range(1, 5))])
    stream = dash.events("/api/runs/growing/stream")
    assert next(stream)[0] == "run"
    name, curves = next(stream)
    assert name == "history" and curves["series"]["loss"]["x"] == [1, 2, 3, 4]
    with (folder / "events.jsonl").open("a") as file:
        file.write(
            lines(
                [
                    step(5),
                    {"event": "eval", "time": 1, "step": 5, "loss": 2.0},
                    {"event": "note", "time": 1, "text": "hm"},
                ]
            )
        )
    added = next(data for name, data in stream if name == "steps")
    assert [row["step"] for row in added["rows"]] == [5] and added["evals"][0]["loss"] == 2.0
    assert [mark["text"] for mark in added["marks"]] == ["hm"]
    back = {"event": "rollback", "time": 1, "step": 5, "to": 2, "why": "x"}
    with (folder / "events.jsonl").open("a") as file:
        file.write(lines([back, step(3, loss=9.0)]))
    again = next(data for name, data in stream if name == "history")
    assert again["series"]["loss"]["x"] == [1, 2, 3] and again["series"]["undone"]["x"] == [3, 4, 5]
    stream.close()
    assert dash.get("/api/runs/nope/stream").status_code == 404
    table = dash.events("/api/runs/stream")
    assert "growing" in {row["name"] for row in next(table)[1]["runs"]}
    make_run(root, "new", [*session(), step(1)])
    changed = next(
        data for name, data in table if name == "changed" and any(row["name"] == "new" for row in data["runs"])
    )
    assert changed["gone"] == []
    table.close()


def test_deletion_lists_files_and_needs_the_name(dash: Dash, root: Path) -> None:
    make_run(root, "old", [*session(), step(1)])
    contents = dash.get("/api/runs/old/contents").json()
    assert [file["path"] for file in contents["files"]] == ["events.jsonl", "lock.json", "recipe.yaml"]
    assert dash.post("/api/runs/old/delete", {"confirm": "olt"}).status_code == 400
    job = dash.post("/api/runs/old/delete", {"confirm": "old"}).json()
    assert job["command"] == "strop runs " + str(root) + " --delete old --yes"
    done = dash.wait(f"/api/jobs/{job['id']}", lambda job: job["state"] != "running")
    assert done["state"] == "done" and done["result"]["deleted"] and done["result"]["files"] == 3
    assert not (root / "old").exists() and (root / "one").exists()


def test_server_uses_little_memory_and_no_torch(dash: Dash) -> None:
    dash.get("/api/runs"), dash.get("/api/runs/one/history"), dash.get("/api/system")
    assert psutil.Process(dash.process.pid).memory_info().rss < 80e6
    heavy = ("torch", "transformers", "tokenizers", "matplotlib", "fastapi", "pydantic")
    code = f"import sys, strop.dash.app; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    maps = Path(f"/proc/{dash.process.pid}/maps")
    if maps.exists():
        assert "torch" not in maps.read_text()


def test_help_does_not_load_a_server() -> None:
    code = (
        "import sys, strop.cli.app; print([m for m in ('starlette', 'uvicorn', 'numpy', 'psutil') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_used_port_and_file_instead_of_folder_are_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = [
            sys.executable,
            "-m",
            "strop.cli",
            "dash",
            str(tmp_path),
            "--json",
            "--port",
            str(taken.getsockname()[1]),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "another program uses this port" in json.loads(done.stdout)["error"]["message"]
    (tmp_path / "file").write_text("")
    words = [sys.executable, "-m", "strop.cli", "dash", str(tmp_path / "file"), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and json.loads(done.stdout)["error"]["kind"] == "FolderError"


def test_ctrl_c_ends_open_streams_without_an_error(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with run_dash(root, root.parent) as own:
        streams = [own.get(path, stream=True) for path in ("/api/runs/stream", "/api/runs/two/stream")]
        assert all(next(stream.iter_lines()) for stream in streams)
        assert own.get("/api/schema").ok  # starts a worker
        assert own.stop() == 130
    shown = capfd.readouterr().err
    assert "stopped" in shown
    assert not any(word in shown for word in ("Traceback", "Exception", "Cancel", "rror"))
