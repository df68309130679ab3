"""A Hugging Face hub of one process: repositories in memory, with the parts of its interface that we use.

Files are uploaded as "regular" ones, in the commit itself, so neither LFS nor xet is needed.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a1b2c3d4e5f6g7h8i9"


class FakeHub:
    """`repositories`: id -> {file: bytes}. A path that matches one of `broken` is answered with that status."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.gated: set[str] = set()  # refused, as for who has not accepted a licence
        self.broken: dict[str, int] = {}
        self.requests: list[str] = []
        self.address = ""

    def environment(self, cache: str) -> dict[str, str]:
        """For a process that is to use it."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": TOKEN, "HF_HOME": cache, "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    state = FakeHub()
    handler = type("Handler", (_Handler,), {"state": state})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeHub

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, status in self.state.broken.items():
            if fnmatch.fnmatch(path, pattern):
                return self._send(status, {"error": "it is broken"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.endswith("validate-yaml"):
            return self._send(401, {"error": "Invalid username or password."})
        for pattern, answer in _ROUTES:
            if (found := re.fullmatch(pattern, path)) is not None:
                return answer(self, body, *found.groups())
        return self._send(404, {"error": f"{path} is not part of the fake"})

    do_GET = do_HEAD = do_POST = _answer

    def _who(self, _: bytes) -> None:
        self._send(200, {"name": "tester", "type": "user", "orgs": []})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        url = {"url": f"{self.state.address}/{repo}", "name": repo, "id": repo}
        if repo in self.state.repositories:
            return self._send(409, {"error": "You already created this model repo", **url})
        self.state.repositories[repo] = {".gitattributes": b""}
        self.state.private[repo] = bool(asked.get("private") or asked.get("visibility") == "private")
        return self._send(200, url)

    def _validate(self, body: bytes) -> None:
        asked = json.loads(body)
        assert asked["content"].startswith("---\n")
        self._send(200, {"warnings": [], "errors": []})

    def _preupload(self, body: bytes, repo: str) -> None:
        files = json.loads(body)["files"]
        known = self.state.repositories[repo]
        self._send(200, {"files": [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False,
             **({"oid": _git_hash(known[file["path"]])} if file["path"] in known else {})} for file in files]})

    def _commit(self, body: bytes, repo: str) -> None:
        files = self.state.repositories[repo]
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = _revision(files)
        self._send(200, {"commitOid": sha, "commitUrl": f"{self.state.address}/{repo}/commit/{sha}", "success": True})

    def _tree(self, _: bytes, repo: str) -> None:
        if self._is_there(repo):
            self._send(200, [{"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
                             for path, data in self.state.repositories[repo].items()])

    def _info(self, _: bytes, repo: str) -> None:
        if self._is_there(repo):
            files = self.state.repositories[repo]
            self._send(200, {"id": repo, "modelId": repo, "sha": _revision(files), "private": self.state.private[repo],
                             "siblings": [{"rfilename": path} for path in files], "tags": [], "downloads": 0})

    def _resolve(self, _: bytes, repo: str, path: str) -> None:
        if not self._is_there(repo):
            return None
        files = self.state.repositories[repo]
        if repo in self.state.gated:
            return self._send(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo", "X-Error-Message":
                                                        f"Access to model {repo} is restricted."})
        if path not in files:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        return self._send(200, files[path], {"ETag": f'"{_git_hash(files[path])}"', "X-Repo-Commit": _revision(files)})

    def _is_there(self, repo: str) -> bool:
        if repo not in self.state.repositories:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repo in self.state.repositories

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


_REPO = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, Any]] = [
    (r"/api/whoami-v2", _Handler._who),
    (r"/api/repos/create", _Handler._create),
    (r"/api/validate-yaml", _Handler._validate),
    (rf"/api/models/{_REPO}/preupload/main", _Handler._preupload),
    (rf"/api/models/{_REPO}/commit/main", _Handler._commit),
    (rf"/api/models/{_REPO}/tree/[^/]+", _Handler._tree),
    (rf"/api/models/{_REPO}(?:/revision/[^/]+)?", _Handler._info),
    (rf"/{_REPO}/resolve/[^/]+/(.+)", _Handler._resolve),
]


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


def _revision(files: dict[str, bytes]) -> str:
    listed = "".join(f"{path} {_git_hash(data)}\n" for path, data in sorted(files.items()))
    return hashlib.sha1(listed.encode()).hexdigest()
