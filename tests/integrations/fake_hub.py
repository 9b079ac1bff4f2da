"""A model hub on this machine that keeps what is committed: as much of the protocol as an upload speaks."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FIXED = {
    "/api/whoami-v2": {"type": "user", "name": "me", "orgs": []},
    "/api/validate-yaml": {"errors": [], "warnings": []},
}


@dataclass
class FakeHub:
    """Repositories by id (private or not), the files of each, and the answer to whoever asks."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    status: int = 200  # of every answer


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Yield a hub that answers until the block ends."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def _answer(self, body: bytes) -> None:
            status, content = (hub.status, {"error": "no"}) if hub.status != 200 else answer(hub, self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(hub: FakeHub, path: str, body: bytes) -> tuple[int, Any]:
    """Return status and content of one answer."""
    path = path.partition("?")[0]
    repo = re.match(r"/api/models/([^/]+/[^/]+)", path)
    name = repo[1] if repo else ""
    if path in FIXED:
        return 200, FIXED[path]
    if path == "/api/repos/create":
        asked = json.loads(body)
        made = f"{asked.get('organization') or 'me'}/{asked['name']}"
        hub.private.setdefault(made, bool(asked.get("private") or asked.get("visibility") == "private"))
        return 200, {"url": f"{hub.url}/{made}", "name": made, "id": made}
    if name not in hub.private:
        return 404, {"error": "Repository not found"}
    if "/preupload/" in path:
        files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
        return 200, {"files": files}
    if "/commit/" in path:
        lines = [json.loads(line) for line in body.splitlines() if line]
        kept = {
            one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"
        }
        hub.files.setdefault(name, {}).update(kept)
        return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}"}
    return 200, {"id": name, "private": hub.private[name], "sha": "0" * 40, "siblings": [], "tags": []}
