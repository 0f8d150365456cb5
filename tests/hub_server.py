"""A server that speaks as much of the Hugging Face hub's API as its client asks for, on this machine alone.

Everything lies in a folder: ``repos/KIND/NAMESPACE/NAME.json`` (branches and commits) and ``blobs/OID``. An upload is
seen only when its commit has come through, as on the hub itself.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_localTestTokenOfNobody"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>model|dataset)s/{REPO}"
PLAIN = rf"/(?P<prefix>datasets/)?{REPO}"


class HubServer(ThreadingHTTPServer):
    """The hub. ``drop`` is asked of every request (method, path): whether to break off in the middle of its body."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.lock = threading.RLock()
        self.requests: list[tuple[str, str]] = []
        self.connections: list[tuple[socket.socket, Any]] = []
        self.drop: Callable[[str, str], bool] = lambda method, path: False
        (folder / "blobs").mkdir(parents=True)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def description(self, kind: str, repo: str) -> Path:
        return self.folder / "repos" / kind / f"{repo}.json"

    def files(self, repo: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """What a revision holds; empty of an empty repository."""
        content = json.loads(self.description(kind, repo).read_text())
        commit = content["commits"][content["branches"].get(revision, revision)]
        return {name: (self.folder / "blobs" / each["oid"]).read_bytes() for name, each in commit["files"].items()}

    def commits(self, repo: str, kind: str = "model") -> int:
        """How many commits there are, the empty first one included."""
        return len(json.loads(self.description(kind, repo).read_text())["commits"])

    def get_request(self) -> tuple[socket.socket, Any]:
        self.connections.append(super().get_request())
        return self.connections[-1]

    def stop(self) -> None:
        """Be gone, for those too who are connected."""
        self.shutdown()
        self.server_close()
        for connection, _ in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no fault of the server's."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        self.chunked = self.headers.get("Transfer-Encoding") == "chunked"
        if self.server.drop(self.command, path):
            if self.command != "GET":
                self.rfile.read(length // 2)
                return self.break_off()
            self.breaks_off = True
        self.body = self.chunks() if self.chunked else self.rfile.read(length)
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command == method:
                with self.server.lock:
                    return getattr(self, name)(**match.groupdict())
        self.send(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = respond
    breaks_off = False

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def break_off(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.breaks_off:
            self.wfile.write(data[: len(data) // 2])
            return self.break_off()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str = "") -> None:
        self.send(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def may_write(self) -> bool:
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not allowed:
            self.refuse(401, "Unauthorized")
        return allowed

    def load(self, kind: str, repo: str) -> dict[str, Any] | None:
        path = self.server.description(kind, repo)
        content = json.loads(path.read_text()) if path.exists() else None
        if content is None or (content["private"] and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self.refuse(404, "RepoNotFound")
            return None
        return content

    def save(self, kind: str, repo: str, content: dict[str, Any]) -> None:
        path = self.server.description(kind, repo)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    def keep(self, data: bytes, oid: str = "") -> str:
        oid = oid or hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        (self.server.folder / "blobs" / oid).write_bytes(data)
        return oid

    def create(self) -> None:
        if not self.may_write():
            return
        asked = json.loads(self.body)
        kind, repo = asked.get("type", "model"), f"{asked['organization'] or 'nobody'}/{asked['name']}"
        url = f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        if self.server.description(kind, repo).exists():
            return self.send(409, {"error": "exists", "url": url})
        first = hashlib.sha1(repo.encode()).hexdigest()
        private = asked.get("private", False) or asked.get("visibility") == "private"
        content = {"private": private, "branches": {"main": first}, "commits": {first: {"files": {}}}}
        self.save(kind, repo, content)
        self.send(200, {"url": url})

    def validate(self) -> None:
        text = json.loads(self.body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            assert front is not None and isinstance(yaml.safe_load(front[1]), dict)
        except (yaml.YAMLError, AssertionError) as error:
            return self.send(400, {"errors": [{"message": str(error)}], "warnings": []})
        self.send(200, {"errors": [], "warnings": []})

    def branch(self, kind: str, repo: str, name: str) -> None:
        if self.may_write() and (content := self.load(kind, repo)) is not None:
            if name in content["branches"]:
                return self.send(409, {"error": "exists"})
            content["branches"][name] = content["branches"]["main"]
            self.save(kind, repo, content)
            self.send(200, {})

    def commit_of(self, kind: str, repo: str, revision: str) -> tuple[str, dict[str, Any]] | None:
        content = self.load(kind, repo)
        if content is None:
            return None
        sha = content["branches"].get(revision, revision)
        if sha not in content["commits"]:
            self.refuse(404, "RevisionNotFound")
            return None
        return sha, content["commits"][sha]["files"]

    def info(self, kind: str, repo: str, revision: str | None = None) -> None:
        if (found := self.commit_of(kind, repo, revision or "main")) is not None:
            siblings = [{"rfilename": name} for name in found[1]]
            self.send(200, {"id": repo, "sha": found[0], "private": False, "siblings": siblings, "tags": []})

    def tree(self, kind: str, repo: str, revision: str) -> None:
        if (found := self.commit_of(kind, repo, revision)) is None:
            return
        entries: list[dict[str, Any]] = []
        for name, each in found[1].items():
            entry = {"type": "file", "path": name, "size": each["size"], "oid": each["oid"]}
            if each["lfs"]:
                entry["lfs"] = {"oid": each["oid"], "size": each["size"], "pointerSize": 130}
            entries.append(entry)
        self.send(200, entries)

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        if not self.may_write() or (found := self.commit_of(kind, repo, revision)) is None:
            return
        files = []
        for each in json.loads(self.body)["files"]:
            mode = "lfs" if each["path"].endswith((".safetensors", ".png")) else "regular"
            old = found[1].get(each["path"], {}).get("oid")
            files.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": old})
        self.send(200, {"files": files})

    def batch(self, prefix: str | None, repo: str) -> None:
        if not self.may_write():
            return
        objects = []
        for each in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/storage/{each['oid']}"},
                "verify": {"href": f"{self.server.url}/verify/{each['oid']}"},
            }
            there = (self.server.folder / "blobs" / each["oid"]).exists()
            objects.append({**each, **({} if there else {"actions": actions})})
        self.send(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "digest")
        self.keep(self.body, oid)
        self.send(200, {})

    def verify(self, oid: str) -> None:
        size = (self.server.folder / "blobs" / oid).stat().st_size
        self.send(200 if json.loads(self.body)["size"] == size else 400, {})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        if not self.may_write() or (content := self.load(kind, repo)) is None:
            return
        parent = content["branches"].get(revision)
        if parent is None:
            return self.refuse(404, "RevisionNotFound")
        files = dict(content["commits"][parent]["files"])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = {"oid": self.keep(data), "size": len(data), "lfs": False}
            elif item["key"] == "lfsFile":
                if not (self.server.folder / "blobs" / value["oid"]).exists():
                    return self.refuse(400, "missing blob")
                files[value["path"]] = {"oid": value["oid"], "size": value["size"], "lfs": True}
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = hashlib.sha1(self.body + parent.encode()).hexdigest()
        content["commits"][sha] = {"files": files}
        content["branches"][revision] = sha
        self.save(kind, repo, content)
        prefix = "datasets/" if kind == "dataset" else ""
        self.send(200, {"commitUrl": f"{self.server.url}/{prefix}{repo}/commit/{sha}", "commitOid": sha})

    def resolve(self, prefix: str | None, repo: str, revision: str, path: str) -> None:
        found = self.commit_of("dataset" if prefix else "model", repo, revision)
        if found is None:
            return
        if path not in found[1]:
            return self.refuse(404, "EntryNotFound")
        each = found[1][path]
        headers = {"ETag": f'"{each["oid"]}"', "X-Repo-Commit": found[0], "Accept-Ranges": "bytes"}
        if each["lfs"]:
            headers |= {"X-Linked-Etag": f'"{each["oid"]}"', "X-Linked-Size": str(each["size"])}
        data = (self.server.folder / "blobs" / each["oid"]).read_bytes()
        begin = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self.send(206 if begin else 200, data[begin:], headers)


ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", rf"{API}/branch/(?P<name>.+)", "branch"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"{API}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)", "tree"),
    ("GET", API, "info"),
    ("POST", rf"{PLAIN}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/storage/(?P<oid>\w+)", "store"),
    ("POST", r"/verify/(?P<oid>\w+)", "verify"),
    ("HEAD", rf"{PLAIN}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"{PLAIN}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


def use_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """Start a hub in ``folder``, for this process and those it starts, with empty caches beside it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _cache_assets, _http

    server, home = HubServer(folder / "hub"), folder / "hf"
    settings = {
        "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    # The client has read its environment when it was imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(home / "assets"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(
        _http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    )  # between tries
    return server
