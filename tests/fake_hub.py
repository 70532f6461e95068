"""A Hugging Face Hub on 127.0.0.1 that serves folders, with the protocol that huggingface_hub 2.4.0 speaks.

GET  /api/models/ID[/revision/REV]      commit and file names
GET  /api/models/ID/tree/REV            entries in pages, the next one in the Link header
HEAD /ID/resolve/REV/FILE               a small file: 307 to the resolve cache of the same host, with its git checksum
                                        a large file: 302 to another host, with X-Linked-Etag (SHA-256), X-Linked-Size and
                                        the headers of Xet
GET  of both targets                    the contents; 206 for a Range
Errors carry X-Error-Code and X-Error-Message.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_FILES = ("*.safetensors", "*.bin", "tokenizer.model")  # what .gitattributes gives to LFS
ENTRIES_A_PAGE = 3
Headers = dict[str, str]


class Refusal(NamedTuple):
    """An answer instead of the one asked for."""

    status: int
    code: str = ""
    message: str = ""
    headers: Headers = {}  # noqa: RUF012 (never changed)


class FakeHub(ThreadingHTTPServer):
    """Serves `repositories` (id -> folder).

    Args:
        requests: every request as "METHOD /path", and `downloads` the file names whose contents were asked for.
        revisions: the branches, tags and commits that are known.
        refusals: a repository or file name -> how it is refused; with a token, `refused_token` comes first.
        cut: the connection is lost after that many bytes of this file, once; `damaged`: files that arrive with other bytes.
        silent: substrings of paths that are never answered.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.revisions = {"main", COMMIT}
        self.requests: list[str] = []
        self.downloads: list[str] = []
        self.refusals: dict[str, Refusal] = {}
        self.refused_token: Refusal | None = None
        self.cut: dict[str, int] = {}
        self.damaged: set[str] = set()
        self.silent: set[str] = set()
        self.ended = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """Another host than `endpoint`, as the storage of large files is."""
        return f"http://localhost:{self.server_port}/storage"


class Handler(BaseHTTPRequestHandler):
    """One request. `server` is a FakeHub."""

    server: Any
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.server.requests.append(f"{self.command} {self.path}")
        if any(mark in self.path for mark in self.server.silent):
            self.server.ended.wait(60)
            return
        match parts:
            case ["api", "models", owner, name, *rest]:
                self.answer_api(f"{owner}/{name}", rest)
            case ["api", "resolve-cache", "models", owner, name, _, *path] | ["storage", owner, name, *path]:
                self.send_contents(self.server.repositories[f"{owner}/{name}"] / "/".join(path))
            case [owner, name, "resolve", revision, *path]:
                self.resolve(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self.refuse(Refusal(404))

    do_HEAD = do_GET

    def refused(self, *names: str) -> bool:
        """Answer with the refusal of one of these names, where there is one."""
        has_token = "Authorization" in self.headers
        refusal = self.server.refused_token if has_token else None
        refusal = refusal or next((found for name in names if (found := self.server.refusals.get(name))), None)
        if refusal is None and names[0] not in self.server.repositories:
            refusal = Refusal(404 if has_token else 401, "RepoNotFound", "Repository not found")
        if refusal is not None:
            self.refuse(refusal)
        return refusal is not None

    def answer_api(self, repository: str, rest: list[str]) -> None:
        if self.refused(repository):
            return
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in self.server.revisions:
            return self.refuse(Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}"))
        folder = self.server.repositories[repository]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if rest[:1] == ["tree"]:
            return self.send_tree(repository, folder, files)
        siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
        self.send_json({"_id": "0", "id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "tags": []})

    def send_tree(self, repository: str, folder: Path, files: list[Path]) -> None:
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        end = start + ENTRIES_A_PAGE
        following = f"{self.server.endpoint}/api/models/{repository}/tree/{COMMIT}?recursive=true&cursor={end}"
        link = {"Link": f'<{following}>; rel="next"'} if end < len(files) else {}
        self.send_json([entry(folder, file) for file in files[start:end]], link)

    def resolve(self, repository: str, revision: str, path: str) -> None:
        if self.refused(repository, path):
            return
        file = self.server.repositories[repository] / path
        if revision not in self.server.revisions:
            return self.refuse(Refusal(404, "RevisionNotFound"))
        common = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not file.is_file():
            return self.refuse(Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": COMMIT}))
        if not is_large(file):
            target = {"Location": f"/api/resolve-cache/models/{repository}/{COMMIT}/{path}"}
            return self.reply(307, b"Temporary Redirect", {**common, **target})
        xet = f"{self.server.endpoint}/api/models/{repository}/xet-read-token/{COMMIT}"
        target = {
            "Location": f"{self.server.storage}/{repository}/{path}",
            "X-Linked-Etag": f'"{sha256(file.read_bytes()).hexdigest()}"',
            "X-Linked-Size": str(file.stat().st_size),
            "X-Xet-Hash": sha256(b"xet" + file.read_bytes()).hexdigest(),
            "Link": f'<{xet}>; rel="xet-auth"',
        }
        self.reply(302, b"Found", {**common, **target})

    def send_contents(self, file: Path) -> None:
        body = file.read_bytes()
        checksum = sha256(body).hexdigest() if is_large(file) else git_checksum(body)
        headers = {"ETag": f'"{checksum}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "GET":
            self.server.downloads.append(file.name)
        if (refusal := self.server.refusals.get(f"contents of {file.name}")) is not None:
            time.sleep(0.5)  # until the files that are fetched beside it are through
            return self.refuse(refusal)
        if file.name in self.server.damaged:
            body = bytes([body[0] ^ 1]) + body[1:]
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        ranged = {"Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"} if "Range" in self.headers else {}
        self.reply(206 if ranged else 200, body[first:], {**headers, **ranged}, self.server.cut.pop(file.name, None))

    def send_json(self, content: Any, headers: Headers | None = None) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, refusal: Refusal) -> None:
        named = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message, "X-Request-Id": "Root=1-fake"}
        body = json.dumps({"error": refusal.message}).encode() if refusal.message else b""
        headers = {name: value for name, value in named.items() if value} | {"Content-Type": "application/json"}
        self.reply(refusal.status, body, headers | refusal.headers)

    def reply(self, status: int, body: bytes, headers: Headers, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        self.close_connection = self.close_connection or cut is not None

    def log_message(self, *_: object) -> None:
        """Keep the test's output quiet."""


def is_large(file: Path) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in LARGE_FILES)


def git_checksum(body: bytes) -> str:
    return sha1(f"blob {len(body)}\0".encode() + body).hexdigest()


def entry(folder: Path, file: Path) -> dict[str, Any]:
    """A file as the tree endpoint lists it."""
    body = file.read_bytes()
    shown = {"type": "file", "oid": git_checksum(body), "size": len(body), "path": file.relative_to(folder).as_posix()}
    if not is_large(file):
        return shown
    large = {"oid": sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return {**shown, "lfs": large, "xetHash": sha256(b"xet" + body).hexdigest()}


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[FakeHub]:
    """Run a hub until the block ends."""
    with FakeHub(repositories) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.ended.set()
        hub.shutdown()
