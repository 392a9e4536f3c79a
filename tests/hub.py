"""A small hub: enough of the protocol for the real hub client to list and download repositories from folders."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves {"owner/name": folder} as models, and their files as those of data sets too; `downloads` lists fetches."""

    def __init__(self, repositories: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.downloads: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[:1] == ["datasets"]:
            parts = parts[1:]
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.server.repositories.get(name)
        if folder is None:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif is_api:
            self._send(200, json.dumps(_listing(name, folder, rest)).encode(), {}, body)
        else:
            self._file(folder, name, "/".join(rest[2:]), body)

    def _file(self, folder: Path, name: str, path: str, body: bool) -> None:
        file = folder / path
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
            return
        content = file.read_bytes()
        if body:
            self.server.downloads.append(f"{name}/{path}")
        etag = hashlib.sha1(content).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


def _listing(name: str, folder: Path, rest: list[str]) -> object:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if rest[:1] == ["tree"]:
        return [
            {
                "type": "file",
                "path": file.relative_to(folder).as_posix(),
                "size": file.stat().st_size,
                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            }
            for file in files
        ]
    siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
    return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
