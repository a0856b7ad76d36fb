"""A stand-in for the part of the Hub's HTTP API that fetching files needs, on the loopback address."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


@contextmanager
def serve(kind: str, name: str, files: Mapping[str, bytes], *, gated: bool = False) -> Iterator[tuple[str, list[str]]]:
    """(address, paths asked for) of a server with one repository. kind: datasets or models. gated: it gives none."""
    asked: list[str] = []
    resolve = f"/datasets/{name}/resolve/" if kind == "datasets" else f"/{name}/resolve/"

    class Hub(BaseHTTPRequestHandler):
        def _answer(self, body: bool) -> None:
            asked.append(self.path)
            path, content, headers = self.path.split("?")[0], b"", {}
            if path in (f"/api/{kind}/{name}", f"/api/{kind}/{name}/revision/main"):
                names = [{"rfilename": file} for file in files]
                content = json.dumps({"id": name, "sha": COMMIT, "siblings": names}).encode()
            elif path.startswith(f"/api/{kind}/{name}/tree/"):
                tree = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in files]
                content = json.dumps(tree).encode()
            elif path.startswith(resolve):
                content = files[path.removeprefix(resolve).partition("/")[2]]
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:40]}"', "X-Repo-Commit": COMMIT}
            if gated and path.startswith(resolve):
                content = b""
                self.send_response(403)
                self.send_header("X-Error-Code", "GatedRepo")
            else:
                self.send_response(200 if content else 404)
            if not content and not gated:
                self.send_header("X-Error-Code", "RepoNotFound")
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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
