"""A stand-in for the part of the Hub's HTTP API that downloads and uploads files, on the loopback address."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote

COMMIT = "c" * 40
TOKEN = "hf_standin"
# A status; no response; a page that is not JSON; a truncated file.
Fault = int | Literal["silence", "page", "short"]


@contextmanager
def serve(
    kind: str, name: str, files: Mapping[str, bytes], *, gated: bool = False, faults: Mapping[str, Fault] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield (address, requested paths) of a server with one repository.

    kind: datasets or models. gated: requires access. faults: errors for paths that contain a text, as long as they are
    set.
    """
    requests: list[str] = []
    resolve = f"/datasets/{name}/resolve/" if kind == "datasets" else f"/{name}/resolve/"

    class Hub(BaseHTTPRequestHandler):
        def _answer(self, body: bool) -> None:
            requests.append(self.path)
            path, content, headers, is_entry = self.path.split("?")[0], b"", {}, False
            if path in (f"/api/{kind}/{name}", f"/api/{kind}/{name}/revision/main"):
                names = [{"rfilename": file} for file in files]
                content = json.dumps({"id": name, "sha": COMMIT, "siblings": names}).encode()
            elif path.startswith(f"/api/{kind}/{name}/tree/"):
                tree = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in files]
                content = json.dumps(tree).encode()
            elif path.startswith(resolve):
                file = unquote(path.removeprefix(resolve).partition("/")[2])
                content, is_entry = files.get(file, b""), True
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:40]}"', "X-Repo-Commit": COMMIT}
            fault = next((wrong for text, wrong in (faults or {}).items() if text in path), None)
            if fault == "silence":
                return
            if fault == "page":
                content = b"<html>Log in to this network</html>"
            elif fault == "short" and body:
                content = content[:-1]
            if isinstance(fault, int):
                self.send_response(fault)
            elif gated and path.startswith(resolve):
                content = b""
                self.send_response(403)
                self.send_header("X-Error-Code", "GatedRepo")
            else:
                self.send_response(200 if content else 404)
            if not content and not gated and not fault:
                missing = (
                    "EntryNotFound"
                    if is_entry
                    else "RevisionNotFound"
                    if path.startswith(f"/api/{kind}/{name}/revision/")
                    else "RepoNotFound"
                )
                self.send_header("X-Error-Code", missing)
            for header, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(header, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *_: Any) -> None:
            pass

    with _running(Hub) as address:
        yield address, requests


@dataclass
class Shelf:
    """Uploads to a server: files and privacy of each repository, large files by sha256, and commit messages.

    lose: name of a file whose bytes the server corrupts without an error.
    """

    address: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    large_names: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    lose: str = ""
    down_after: str = ""  # the first path that contains this ends the connection


@contextmanager
def upload_server() -> Iterator[Shelf]:
    """Run a server with one account, `me`, which may write to its repositories with the token TOKEN."""
    shelf = Shelf()

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self, value: Any, status: int = 200, code: str = "", said: str = "") -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if code:
                self.send_header("X-Error-Code", code)
            if said:
                self.send_header("X-Error-Message", said)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _any(self) -> None:
            path, body = self.path.split("?")[0], self._body()
            if shelf.down_after and shelf.down_after in path:
                self.close_connection = True
                return None
            if path.startswith("/large/"):  # the address for large files, which gets no token
                shelf.large[path.rpartition("/")[2]] = body
                return self._reply({})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._reply({}, 401, said="Invalid user token.")
            if path == "/api/whoami-v2":
                return self._reply({"name": "me", "type": "user"})
            if path == "/api/validate-yaml":
                return self._reply({"errors": [], "warnings": []})
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                return self._batch(json.loads(body))
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                return self._file(shelf.repos.get(match[1], {}).get(match[2]))
            match = re.match(r"/api/models/([^/]+/[^/]+)(?:/(\w[\w-]*))?", path)
            if match is None or match[1] not in shelf.repos:
                return self._reply({}, 404, "RepoNotFound", "Repository not found")
            return self._of_repository(match[1], match[2], body)

        do_GET = do_POST = do_PUT = do_HEAD = _any

        def _create(self, fields: dict[str, Any]) -> None:
            name = f"{fields.get('organization') or 'me'}/{fields['name']}"
            if not name.startswith("me/"):
                return self._reply({}, 403, said="You don't have the rights to create a model under this namespace")
            shelf.repos.setdefault(name, {})
            shelf.private[name] = fields.get("visibility") == "private" or fields.get("private") is True
            return self._reply({"url": f"{shelf.address}/{name}", "name": name})

        def _file(self, content: bytes | None) -> None:
            if content is None:
                return self._reply({}, 404, "RepoNotFound", "Repository not found")
            self.send_response(200)
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:40]}"', "X-Repo-Commit": COMMIT}
            for header, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
            return None

        def _batch(self, fields: dict[str, Any]) -> None:
            objects = [
                {**one, "actions": {"upload": {"href": f"{shelf.address}/large/{one['oid']}", "header": {}}}}
                for one in fields["objects"]
            ]
            return self._reply({"transfer": "basic", "objects": objects})

        def _of_repository(self, name: str, what: str | None, body: bytes) -> None:
            files = shelf.repos[name]
            if what is None or what == "revision":
                about = {"id": name, "sha": COMMIT, "private": shelf.private[name]}
                return self._reply({**about, "siblings": [{"rfilename": file} for file in files]})
            if what == "preupload":
                fields = json.loads(body)["files"]
                modes = [(one["path"], "lfs" if one["path"].endswith(".safetensors") else "regular") for one in fields]
                return self._reply(
                    {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]}
                )
            if what == "commit":
                self._commit(files, [json.loads(line) for line in body.splitlines() if line])
                return self._reply(
                    {"success": True, "commitOid": COMMIT, "commitUrl": f"{shelf.address}/{name}/commit/{COMMIT}"}
                )
            if what == "paths-info":
                paths = _paths(body)
                return self._reply([_entry(path, files[path], shelf) for path in paths if path in files])
            return self._reply({}, 404, "EntryNotFound")

        def _commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    shelf.commits.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = shelf.large[value["oid"]]
                    shelf.large_names.add(value["path"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            if shelf.lose in files:
                files[shelf.lose] = b"x" + files[shelf.lose][1:]

        def log_message(self, *_: Any) -> None:
            pass

    with _running(Hub) as address:
        shelf.address = address
        yield shelf


def _paths(body: bytes) -> list[str]:
    """Return the paths of a paths-info request, which newer clients send as JSON and older ones as a form."""
    from urllib.parse import parse_qs

    try:
        return list(json.loads(body)["paths"])
    except ValueError:
        return parse_qs(body.decode())["paths"]


def _entry(path: str, content: bytes, shelf: Shelf) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git}
    if path in shelf.large_names:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def _running(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
