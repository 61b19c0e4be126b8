# SPDX-License-Identifier: Apache-2.0
"""A file server on the loopback, with the faults that servers have, that can also pass for a Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class FileServer(ThreadingHTTPServer):
    """`files` by path, such as "lora/adapter_config.json". Everything may be changed while it serves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.commit = "c" * 40
        """Of the hub's repositories; their main branch points there."""
        self.tags = True
        self.lengths = True
        self.status = 0
        """What every request is answered with; 0: what is right."""
        self.cut: dict[str, int] = {}
        """Paths of which only so many bytes are sent before the connection is closed."""
        self.garbled: set[str] = set()
        """Paths that arrive with another last byte."""
        self.log: list[str] = []

    def downloads(self, name: str = "adapter_model.safetensors") -> int:
        return sum(line.startswith("GET") and line.endswith(name) for line in self.log)

    def repository(self, owner_and_name: str) -> bytes | None:
        """A hub's answer about a repository, whose files are those below its name."""
        siblings = []
        for path, data in self.files.items():
            if path.startswith(owner_and_name + "/"):
                lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
                about = {
                    "rfilename": path.removeprefix(owner_and_name + "/"),
                    "size": len(data),
                    "blobId": str(len(data)),
                }
                siblings.append(about | ({"lfs": lfs} if path.endswith(".safetensors") else {}))
        return (
            json.dumps({"id": owner_and_name, "sha": self.commit, "siblings": siblings}).encode() if siblings else None
        )


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        self.server.log.append(f"{self.command} {path}")
        parts = path.split("/")
        headers = {}
        if parts[:2] == ["api", "models"]:
            known = parts[4:] in ([], ["revision", "main"], ["revision", self.server.commit])
            data = self.server.repository("/".join(parts[2:4])) if known else None
            headers["X-Error-Code"] = "RepoNotFound" if known else "RevisionNotFound"
        elif parts[2:3] == ["resolve"]:
            path = "/".join(parts[:2] + parts[4:])
            data = self.server.files.get(path) if parts[3] == self.server.commit else None
            headers["X-Repo-Commit"] = self.server.commit
        else:
            data = self.server.files.get(path)
        if data is None or self.server.status:
            self.send_response(self.server.status or 404)
            self.send_header("Content-Length", "0")
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            return
        self.send_response(200)
        if self.server.tags:
            headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        if self.server.lengths:
            headers["Content-Length"] = str(len(data))
        else:
            headers["Connection"] = "close"
        headers.pop("X-Error-Code", None)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            if path in self.server.garbled:
                data = data[:-1] + bytes([data[-1] ^ 1])
            self.wfile.write(data[: self.server.cut.get(path, len(data))])
            self.close_connection = path in self.server.cut or not self.server.lengths

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve_files() -> Iterator[FileServer]:
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
