"""As much of the Hub as publishing and loading need, over real HTTP on this machine, with failures on demand.

Repositories live in memory: commits of whole trees, tags, and large files by their SHA-256. Only the token `TOKEN` may
write, or read what is private.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

TOKEN = "hf_right"


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Commit:
    oid: str
    summary: str
    files: dict[str, bytes]
    large: set[str]  # names of those that came as large files


@dataclass
class Repo:
    private: bool
    commits: list[Commit]
    tags: dict[str, str] = field(default_factory=dict)  # by name: the commit

    def at(self, revision: str) -> Commit | None:
        oid = self.commits[-1].oid if revision == "main" else self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)


@dataclass
class Failure:
    """The next `times` requests that match are not served: with a status, or the line is cut in the middle."""

    request: str  # a regular expression over "METHOD /path"
    status: int | None  # None: cut
    times: int = 1
    message: str = "the Hub is tired"


class FakeHub:
    """The server; `endpoint` is where it listens."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        hub = self

        class Bound(Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> None:
        self.repos[name] = Repo(private, [Commit("0" * 40, "initial commit", dict(files), set())])

    def commit(self, name: str, summary: str, files: dict[str, bytes], large: set[str]) -> Commit:
        repo = self.repos[name]
        oid = hashlib.sha1(f"{name}{len(repo.commits)}".encode()).hexdigest()
        repo.commits.append(Commit(oid, summary, files, large))
        return repo.commits[-1]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, a token that it takes, and a cache that is empty."""
    server = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("prunezoo.core.upload.PAUSE", 0.01)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    yield server
    server.close()


class Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.serve(b"")

    def do_HEAD(self) -> None:
        self.serve(b"")

    def do_POST(self) -> None:
        self.serve(self.body())

    def do_PUT(self) -> None:
        self.serve(None)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def serve(self, body: bytes | None) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.state.requests.append(request)
        for failure in self.state.failures:
            if failure.times and re.search(failure.request, request):
                failure.times -= 1
                if failure.status is None:  # hang up with the upload half read
                    if body is None:
                        self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
                    self.close_connection = True
                    self.connection.shutdown(2)
                    return
                if body is None:
                    self.body()
                self.answer(failure.status, {"error": failure.message})
                return
        self.route(path, self.body() if body is None else body)

    def route(self, path: str, body: bytes) -> None:
        may_write = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if match := re.fullmatch(r"/upload/(\w+)", path):
            self.state.large[match[1]] = body
            self.answer(200, {})
            return
        if path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
            return
        if self.command == "POST" and not may_write:
            self.answer(401, {"error": "Invalid username or password."})
            return
        if path == "/api/repos/create":
            self.create(json.loads(body))
            return
        parts = re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(/.*)?", path)
        repo = self.state.repos.get(parts[1]) if parts else None
        if parts is None or repo is None or (repo.private and not may_write):
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        self.serve_repo(parts[1], repo, parts[2] or "", body)

    def serve_repo(self, name: str, repo: Repo, rest: str, body: bytes) -> None:
        host = self.state.endpoint
        if rest == "" or rest.startswith("/revision/"):
            commit = repo.at(rest.removeprefix("/revision/") or "main")
            assert commit is not None
            siblings = [sibling(commit, file) for file in commit.files]
            self.answer(200, {"id": name, "sha": commit.oid, "private": repo.private, "siblings": siblings})
        elif rest == "/refs":
            tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": oid} for t, oid in repo.tags.items()]
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commits[-1].oid}
            self.answer(200, {"branches": [branch], "tags": tags, "converts": []})
        elif match := re.fullmatch(r"/tag/(.+)", rest):
            tag = json.loads(body)["tag"]
            if tag in repo.tags:
                self.answer(409, {"error": "Tag exists"})
                return
            commit = repo.at(match[1])
            assert commit is not None
            repo.tags[tag] = commit.oid
            self.answer(201, {})
        elif rest.startswith("/preupload/"):
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            answer = [{"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")]} for f in files]
            self.answer(200, {"files": [{**one, "shouldIgnore": False} for one in answer]})
        elif rest == "/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            answer = [
                {**one, "actions": {"upload": {"href": f"{host}/upload/{one['oid']}"}}}
                if one["oid"] not in self.state.large
                else one
                for one in objects
            ]
            self.answer(200, {"transfer": "basic", "objects": answer})
        elif rest.startswith("/commit/"):
            lines = [json.loads(line) for line in body.splitlines()]
            files, large = dict(repo.commits[-1].files), set(repo.commits[-1].large)
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.state.large[value["oid"]]
                    large.add(value["path"])
            summary = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            commit = self.state.commit(name, summary, files, large)
            url = f"{host}/{name}/commit/{commit.oid}"
            self.answer(200, {"commitOid": commit.oid, "commitUrl": url, "success": True})
        elif match := re.fullmatch(r"/resolve/([^/]+)/(.+)", rest):
            self.resolve(repo.at(match[1]), match[2])
        else:
            self.answer(404, {"error": f"no such call: {rest}"})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "others":
            self.answer(403, {"error": 'You don\'t have the rights to create a model under the namespace "others".'})
        elif name in self.state.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.state.endpoint}/{name}"})
        else:
            self.state.add(
                name, {".gitattributes": b"*.safetensors filter=lfs\n"}, asked.get("visibility") == "private"
            )
            self.answer(200, {"url": f"{self.state.endpoint}/{name}", "name": name})

    def resolve(self, commit: Commit | None, file: str) -> None:
        if commit is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif file not in commit.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid}
            self.answer(404, {"error": "Entry not found"}, headers)
        else:
            data = commit.files[file]
            self.send_response(200)
            self.send_header("ETag", f'"{git_hash(data)}"')
            self.send_header("X-Repo-Commit", commit.oid)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    def answer(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        payload = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        if status >= 400 and isinstance(value, dict):
            self.send_header("X-Error-Message", value["error"])
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)


def sibling(commit: Commit, file: str) -> dict[str, Any]:
    data = commit.files[file]
    facts: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": git_hash(data)}
    if file in commit.large:
        facts["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return facts
