"""A hub on this machine: repositories in memory, and the part of the protocol that huggingface_hub uses to push and download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"  # any other token may do nothing


@dataclass
class StubHub:
    """What the hub holds: files by ``(repository, commit)``, commits by ``(repository, branch)``."""

    address: str = ""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)

    def add(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        """Adds a commit and returns its hash."""
        before = self.files.get((repo, self.branches.get((repo, branch), "")), {})
        commit = hashlib.sha1(json.dumps([repo, branch, len(self.files)]).encode()).hexdigest()
        self.files[repo, commit] = {**before, **files}
        self.branches[repo, branch] = commit
        return commit

    def pushed(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch."""
        return self.files[repo, self.branches[repo, branch]]


class _Handler(BaseHTTPRequestHandler):
    hub: StubHub

    def _send(self, status: int, value: Any = None, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refused(self, repo: str, revision: str | None = None) -> str | None:
        """The commit of a revision, or None if the request was refused."""
        if repo == "me/gated":
            self._send(403, X_Error_Code="GatedRepo")
        elif repo not in {name for name, _ in self.hub.branches}:
            self._send(404, X_Error_Code="RepoNotFound")
        else:
            commit = self.hub.branches.get((repo, revision or "main"), revision or "")
            if (repo, commit) in self.hub.files:
                return commit
            self._send(404, X_Error_Code="RevisionNotFound")
        return None

    def do_GET(self) -> None:
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(?:\?.*)?", self.path):
            if commit := self._refused(*found.groups()):
                names = self.hub.files[found[1], commit]
                self._send(200, {"id": found[1], "sha": commit, "siblings": [{"rfilename": n} for n in names]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+)(?:\?.*)?", self.path):
            if commit := self._refused(*found.groups()):
                held = self.hub.files[found[1], commit].items()
                files = [
                    {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in held
                ]
                self._send(200, files)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
            if commit := self._refused(found[1], found[2]):
                body = self.hub.files[found[1], commit].get(found[3])
                if body is None:
                    self._send(404, X_Error_Code="EntryNotFound")
                else:
                    self._send(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=commit)
        else:
            self._send(404)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["authorization"] != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials"})
        if self.path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "me":
                return self._send(403, {"error": "no rights"})
            if (repo, "main") in self.hub.branches:
                return self._send(409, {"error": "exists", "url": f"{self.hub.address}/{repo}"})
            self.hub.private[repo] = bool(asked.get("private"))
            self.hub.add(repo, "main", {".gitattributes": b""})
            return self._send(200, {"url": f"{self.hub.address}/{repo}"})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/?]+)(?:\?.*)?", self.path)
        assert found, self.path
        repo, what, branch = found.groups()
        if what == "branch":
            self.hub.branches[repo, branch] = self.hub.branches[repo, "main"]
            return self._send(200)
        if what == "preupload":
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._send(200, {"files": modes})
        lines = [json.loads(line)["value"] for line in body.splitlines() if json.loads(line)["key"] == "file"]
        commit = self.hub.add(repo, branch, {each["path"]: base64.b64decode(each["content"]) for each in lines})
        return self._send(
            200, {"commitUrl": f"{self.hub.address}/{repo}/commit/{commit}", "commitOid": commit, "success": True}
        )

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def serving_hub() -> Iterator[StubHub]:
    """Runs a hub during the block."""
    hub = StubHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
