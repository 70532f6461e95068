"""A Hugging Face Hub on 127.0.0.1 that serves folders: the endpoints that huggingface_hub's snapshot_download calls."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves `repositories` (repo_id -> folder) and records `downloads`, the file names whose contents were asked for.

    A name in `failing` is answered with an error; one in `cut` loses the connection after that many bytes, once.
    """

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.downloads: list[tuple[str, str | None]] = []
        self.failing: set[str] = set()
        self.cut: dict[str, int] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request. `server` is a FakeHub."""

    server: Any

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).removeprefix("/api/models").strip("/")
        owner, name, action, _, *rest = [*path.split("/"), "", "", ""]
        folder = self.server.repositories.get(f"{owner}/{name}")
        file = "/".join(part for part in rest if part)
        if folder is None:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif action == "revision":
            self.reply(200, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []}).encode())
        elif action == "tree":
            self.reply(200, json.dumps([entry(path) for path in sorted(folder.iterdir())]).encode())
        else:
            self.send_file(folder / file)

    do_HEAD = do_GET

    def send_file(self, file: Path) -> None:
        body = file.read_bytes()
        headers = {"ETag": f'"{sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self.reply(200, body, headers)
        asked = self.headers.get("Range")
        self.server.downloads.append((file.name, asked))
        if file.name in self.server.failing:
            return self.reply(503, b"out of order")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.reply(206 if asked else 200, body[start:], headers, self.server.cut.pop(file.name, None))

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])

    def log_message(self, *_: object) -> None:
        """Keep the test's output quiet."""


def entry(file: Path) -> dict[str, Any]:
    """A file as the tree endpoint lists it."""
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": sha256(file.read_bytes()).hexdigest()}


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[FakeHub]:
    """Run a hub until the block ends."""
    with FakeHub(repositories) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
