"""A stand-in for the Hugging Face hub: the part of its API that uploads and downloads use.

Repositories are dictionaries of files. Large files are uploaded as LFS objects, as the hub asks
for safetensors, and small ones within the commit.
"""

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
from urllib.parse import urlsplit

import yaml

TOKEN = "hf_stand_in"


@dataclass
class Hub:
    """The repositories of a server, and the requests that it received.

    Attributes:
        files: (type, repository) -> file -> content.
        private: Whether each repository is private.
        objects: LFS objects by their SHA-256.
        commits: Messages of all commits.
        url: Address of the server.
    """

    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    private: dict[tuple[str, str], bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve an empty hub on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, value: Any, code: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, kind: str) -> None:
        self._send({"error": kind}, 404, X_Error_Code=kind)

    def _authorized(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._send({"error": "Invalid username or password."}, 401)
        return False

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---\n")[1]
            valid = isinstance(yaml.safe_load(front), dict)
            self._send({"errors": [] if valid else [{"message": "no mapping"}], "warnings": []})
            return
        if not self._authorized():
            return
        if path == "/api/repos/create":
            wanted = json.loads(body)
            owner = wanted.get("organization") or "user"
            key = (wanted.get("type", "model"), f"{owner}/{wanted['name']}")
            exists = key in self.hub.files
            self.hub.files.setdefault(key, {})
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.private.setdefault(key, private)
            self._send({"url": self._address(key), "name": key[1]}, 409 if exists else 200)
        elif match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/preupload/.+", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._send({"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
                for o in wanted
            ]
            self._send({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/commit/.+", path):
            self._commit((match[1], match[2]), body)
        else:
            self._missing("EntryNotFound")

    def _commit(self, key: tuple[str, str], body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif entry["key"] == "file":
                self.hub.files[key][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.files[key][value["path"]] = self.hub.objects[value["oid"]]
        oid = f"{len(self.hub.commits):040x}"
        url = f"{self._address(key)}/commit/{oid}"
        self._send({"success": True, "commitOid": oid, "commitUrl": url})

    def do_PUT(self) -> None:
        content = self._body()
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            self._send({"error": "checksum"}, 400)
            return
        self.hub.objects[oid] = content
        self._send({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        match = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            self._missing("EntryNotFound")
            return
        key = ("dataset" if match[1] else "model", match[2])
        if key not in self.hub.files:
            self._missing("RepoNotFound")
        elif match[4] not in self.hub.files[key]:
            self._missing("EntryNotFound")
        else:
            content = self.hub.files[key][match[4]]
            self._send(
                content,
                ETag=f'"{hashlib.sha256(content).hexdigest()}"',
                X_Repo_Commit=f"{len(self.hub.commits):040x}",
            )

    def _address(self, key: tuple[str, str]) -> str:
        return f"{self.hub.url}/{'datasets/' if key[0] == 'dataset' else ''}{key[1]}"
