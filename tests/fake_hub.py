"""A Hugging Face Hub on 127.0.0.1 that serves folders: the endpoints that huggingface_hub's snapshot_download calls."""

import json
import threading
import time
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
        self.downloads: list[str] = []
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
        headers = {"ETag": f'"{sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.command == "HEAD":
            return self.reply(200, body, headers)
        self.server.downloads.append(file.name)
        if file.name in self.server.failing:
            time.sleep(0.5)  # until the files that are fetched beside it are through
            return self.reply(503, b"out of order")
        self.reply(200, body, headers, self.server.cut.pop(file.name, None))

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
    body = file.read_bytes()
    return {"type": "file", "path": file.name, "size": len(body), "oid": sha256(body).hexdigest()}


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[FakeHub]:
    """Run a hub until the block ends."""
    with FakeHub(repositories) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
