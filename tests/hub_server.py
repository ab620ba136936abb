"""A Hugging Face Hub on this machine: a real HTTP server whose answers are those that huggingface_hub expects.

Large files (LFS) are redirected to another host name, as the Hub sends its readers to a CDN; small ones answer from
the Hub itself. Every request is kept, and every byte sent is counted.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".bin", ".ckpt")
TOKEN = "hf_good"
CURIOSITY = "/api/agent-harnesses"  # which huggingface_hub asks for on its own account


@dataclass(frozen=True, slots=True)
class File:
    content: bytes
    is_large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.git_id


@dataclass(slots=True)
class Repository:
    """Commits by id, branches by name."""

    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    host: str
    path: str
    range: str | None
    token: str | None


@dataclass(slots=True)
class Hub:
    """What it holds, how it misbehaves, and what was asked of it.

    `breaks` are files whose connection dies after so many bytes, once, and with `ends_with_break` every later request
    for the file is answered 500; `spoils` are files whose last byte comes wrong, `claims` files whose size is told
    wrong, and `ids` those whose checksum is; `sha` is told as every commit, and `status` answered to
    everything, if set.
    """

    port: int
    repositories: dict[str, Repository] = field(default_factory=dict)
    breaks: dict[str, int] = field(default_factory=dict)
    spoils: set[str] = field(default_factory=set)
    claims: dict[str, int] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    sha: str | None = None
    ends_with_break: bool = False
    refused: set[str] = field(default_factory=set)
    status: int | None = None
    requests: list[Request] = field(default_factory=list)
    num_sent: Counter[str] = field(default_factory=Counter)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def commit(self, name: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Makes the branch point to a new commit of exactly these files."""
        stored = {path: File(content, path.endswith(LARGE_SUFFIXES)) for path, content in files.items()}
        text = json.dumps([name, sorted((path, file.sha256) for path, file in stored.items())])
        commit = hashlib.sha1(text.encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository())
        repository.commits[commit] = stored
        repository.branches[branch] = commit
        return commit

    @property
    def sent(self) -> set[str]:
        """Names of all files that some bytes were asked of."""
        return set(self.num_sent)

    def forget(self) -> None:
        self.requests.clear()
        self.num_sent.clear()


def read_folder(folder: Path) -> dict[str, bytes]:
    """A folder's files, as `Hub.commit` takes them."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def serve_hub() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(server.server_address[1])
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def hub(self) -> Hub:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        return hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        if path == CURIOSITY:
            self._refuse(404)
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        host = self.headers.get("Host", "").partition(":")[0]
        self.hub.requests.append(Request(self.command, host, path, self.headers.get("Range"), token))
        if self.hub.status:
            self._refuse(self.hub.status)
        elif path.startswith("/api/models/"):
            self._describe(path.removeprefix("/api/models/"))
        elif path.startswith("/lfs/"):
            self._send_large(path.removeprefix("/lfs/"))
        else:
            self._resolve(path.removeprefix("/"), token)

    def _describe(self, path: str) -> None:
        name, _, revision = path.partition("/revision/")
        if (found := self._find(name, unquote(revision) or "main")) is None:
            return
        commit, files = found
        siblings = [self._describe_file(name, file) for name, file in files.items()]
        gated = "auto" if self.hub.repositories[name].is_gated else False
        info = {
            "_id": "1",
            "id": name,
            "sha": self.hub.sha or commit,
            "private": False,
            "gated": gated,
            "siblings": siblings,
        }
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _describe_file(self, name: str, file: File) -> dict[str, Any]:
        size = self.hub.claims.get(name, len(file.content))
        sha256, git_id = (self.hub.ids.get(name, true) for true in (file.sha256, file.git_id))
        lfs = {"lfs": {"sha256": sha256, "size": size, "pointerSize": 134}} if file.is_large else {}
        return {"rfilename": name, "size": size, "blobId": git_id} | lfs

    def _resolve(self, path: str, token: str | None) -> None:
        name, _, rest = path.partition("/resolve/")
        revision, _, file_name = rest.partition("/")
        if (found := self._find(name, unquote(revision))) is None:
            return
        commit, files = found
        if self.hub.repositories[name].is_gated and token != TOKEN:
            self._refuse(403 if token else 401, "GatedRepo", commit=commit)
        elif (file := files.get(unquote(file_name))) is None:
            self._refuse(404, "EntryNotFound", commit=commit)
        elif unquote(file_name) in self.hub.refused:
            self._refuse(500)
        elif file.is_large:
            linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            location = {"Location": f"http://localhost:{self.hub.port}/lfs/{name}/{commit}/{file_name}"}
            self._send(302, b"", {"X-Repo-Commit": commit} | linked | location)
        else:
            self._send_file(unquote(file_name), file, {"X-Repo-Commit": commit})

    def _send_large(self, path: str) -> None:
        owner, name, commit, file_name = path.split("/", 3)
        file_name = unquote(file_name)
        self._send_file(file_name, self.hub.repositories[f"{owner}/{name}"].commits[commit][file_name], {})

    def _find(self, name: str, revision: str) -> tuple[str, dict[str, File]] | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(401, "RepoNotFound", "Repository not found")  # 401, so that private ones can't be told apart
            return None
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit, repository.commits[commit]

    def _refuse(self, status: int, code: str | None = None, message: str = "", commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._send(status, b"", {key: value for key, value in headers.items() if value})

    def _send_file(self, name: str, file: File, headers: dict[str, str]) -> None:
        content = file.content[:-1] + bytes([file.content[-1] ^ 1]) if name in self.hub.spoils else file.content
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, content[start:], headers, name)

    def _send(self, status: int, body: bytes, headers: dict[str, str], name: str | None = None) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = self.hub.breaks.pop(name, None) if name else None
        if end is not None and self.hub.ends_with_break:
            self.hub.refused.add(str(name))
        if name:
            self.hub.num_sent[name] += len(body[:end])
        self.wfile.write(body[:end])
        self.close_connection = end is not None
