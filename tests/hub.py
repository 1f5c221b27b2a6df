"""The Hugging Face hub on loopback: a real HTTP server that answers as the hub does, and misbehaves when told to.

    with Hub() as hub:
        hub.add("org/name", "model.safetensors", b"...")
        hub.misbehave("model.safetensors", "drop", at=1000)
        os.environ["HF_ENDPOINT"] = hub.url

Large (LFS) files redirect to a CDN with a signed address, on another port and so another host to a client; small ones
redirect to a path on the same host. Every request is in `hub.requests`.
"""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

CHUNK = 64 * 1024
COMMIT = "c0ffee" + "0" * 34
SIGNATURE = "X-Signature=do-not-keep-me"

Fault = Literal["drop", "stall", "slow", "short", "wrong", "html", "ignore-range", "new-etag", "status"]


@dataclass(frozen=True)
class Seen:
    """One request as it arrived. `host` is `hub` or `cdn`; header names are lower case."""

    method: str
    host: str
    path: str
    headers: dict[str, str]


@dataclass(frozen=True)
class HubFile:
    """A file of a repository."""

    data: bytes
    lfs: bool
    gated: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        """What the hub calls the file: its sha256, or for small ones the hash that git gives it."""
        if self.lfs:
            return self.sha256
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data, usedforsecurity=False).hexdigest()


@dataclass
class Trouble:
    """What goes wrong with a path, and how many more times (None: always)."""

    fault: Fault
    times: int | None
    host: str
    options: dict[str, Any]


@dataclass
class Hub:
    """The two servers. `url` goes into `HF_ENDPOINT`; `tokens` maps known tokens to gated repositories they open."""

    files: dict[tuple[str, str, str], HubFile] = field(default_factory=dict)
    tokens: dict[str, set[str]] = field(default_factory=dict)
    requests: list[Seen] = field(default_factory=list)
    troubles: dict[str, list[Trouble]] = field(default_factory=dict)

    def __enter__(self) -> Hub:
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._servers = {name: _Server(self, name) for name in ("hub", "cdn")}
        self.url, self.cdn_url = (f"http://127.0.0.1:{self._servers[name].server_port}" for name in ("hub", "cdn"))
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def add(
        self, repo: str, path: str, data: bytes, *, revision: str = "main", lfs: bool = True, gated: bool = False
    ) -> str:
        """Publish a file. Returns its sha256."""
        file = HubFile(data, lfs, gated)
        self.files[repo, revision, path] = file
        return file.sha256

    def allow(self, token: str, *repos: str) -> None:
        """Make `token` known, with access to these gated repositories."""
        self.tokens.setdefault(token, set()).update(repos)

    def misbehave(self, path: str, fault: Fault, *, times: int | None = 1, **options: Any) -> None:
        """Let the next `times` answers for files named `path` (`*`: any) go wrong.

        `drop`, `stall`: after `at` bytes. `short`: only `at` bytes, and says so. `slow`: `rate` bytes a second.
        `status`: answer `code` with `headers`, by `host` (`hub` or `cdn`). The others need no option.
        """
        host = options.pop("host", "hub" if fault == "status" else "cdn")
        self.troubles.setdefault(path, []).append(Trouble(fault, times, host, options))

    def gets(self, host: str = "cdn") -> list[Seen]:
        """The GET requests that `host` saw."""
        return [seen for seen in self.requests if seen.host == host and seen.method == "GET"]

    def trouble(self, path: str, host: str) -> Trouble | None:
        """The trouble due for this answer, used up by one."""
        with self._lock:
            for trouble in self.troubles.get(path, []) + self.troubles.get("*", []):
                if trouble.host == host and trouble.times != 0:
                    trouble.times = None if trouble.times is None else trouble.times - 1
                    return trouble
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.name = hub, name

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.hub.requests.append(Seen(self.command, self.server.name, self.path, headers))
        self._resolve() if self.server.name == "hub" else self._cdn()

    def _resolve(self) -> None:
        """`/{repo}/resolve/{revision}/{path}`, or the place that small files redirect to."""
        url = unquote(urlsplit(self.path).path)
        if url == "/":
            return self._say(200, b"<html>", {"Content-Type": "text/html"})
        match = re.fullmatch(r"(?P<cache>/api/resolve-cache/models)?/([^/]+/[^/]+)/(?:resolve/)?([^/]+)/(.+)", url)
        if not match:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        repo, revision, path = match[2], match[3], match[4]
        trouble = self.server.hub.trouble(path, "hub")
        if trouble and trouble.fault == "status":
            return self._say(trouble.options["code"], b"oops", trouble.options.get("headers", {}))
        file = self.server.hub.files.get((repo, revision, path))
        if file is None:
            return self._missing(repo, revision)
        if self._denied(repo, file.gated):
            return None
        if match["cache"]:
            return self._body(file, path, trouble)
        size = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))} if file.lfs else {}
        cdn = f"{self.server.hub.cdn_url}/repos/{quote(repo)}/{quote(revision)}/{quote(path)}?{SIGNATURE}"
        where = cdn if file.lfs else f"/api/resolve-cache/models/{quote(repo)}/{quote(revision)}/{quote(path)}"
        self._say(302 if file.lfs else 307, b"", {"Location": where, "X-Repo-Commit": COMMIT, **size})

    def _missing(self, repo: str, revision: str) -> None:
        known = [key for key in self.server.hub.files if key[0] == repo]
        if not known:
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        if all(key[1] != revision for key in known):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        self._refuse(404, "EntryNotFound", "Entry not found")

    def _denied(self, repo: str, gated: bool) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.hub.tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif gated and not token:
            self._refuse(401, "GatedRepo", f"Access to model {repo} is restricted.")
        elif gated and repo not in self.server.hub.tokens[token]:
            self._refuse(403, "GatedRepo", f"Access to model {repo} is restricted and you are not in the list.")
        else:
            return False
        return True

    def _cdn(self) -> None:
        parts = unquote(urlsplit(self.path).path).split("/", 5)
        repo, revision, path = "/".join(parts[2:4]), parts[4], parts[5]
        if SIGNATURE not in self.path:
            return self._say(403, b"no signature", {})
        self._body(self.server.hub.files[repo, revision, path], path, self.server.hub.trouble(path, "cdn"))

    def _body(self, file: HubFile, path: str, trouble: Trouble | None) -> None:
        """The bytes asked for by `Range`, with `If-Range` honoured, and with whatever is to go wrong."""
        fault, options = (trouble.fault, trouble.options) if trouble else (None, {})
        if fault == "status":
            return self._say(options["code"], b"oops", options.get("headers", {}))
        if fault == "html":
            return self._say(200, b"<!DOCTYPE html><html>Sign in to the network</html>", {"Content-Type": "text/html"})
        data = bytes(byte ^ 0xFF for byte in file.data) if fault == "wrong" else file.data
        etag = f'"{file.etag}{"-new" if fault == "new-etag" else ""}"'
        start = self._start(etag) if fault != "ignore-range" else 0
        if start and start >= len(data):
            return self._say(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        body = data[start : options["at"]] if fault == "short" else data[start:]
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._say(206 if start else 200, b"", headers, length=len(body))
        if self.command == "GET":
            self._send(body, fault, options)

    def _start(self, etag: str) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match and self.headers.get("If-Range", etag) == etag else 0

    def _send(self, body: bytes, fault: str | None, options: dict[str, Any]) -> None:
        stop = options["at"] if fault in ("drop", "stall") else len(body)
        for place in range(0, stop, CHUNK):
            self.wfile.write(body[place : min(place + CHUNK, stop)])
            if fault == "slow" and self.server.hub.closing.wait(CHUNK / options["rate"]):
                return
        if fault == "stall":
            self.server.hub.closing.wait(60)
        if stop < len(body):
            self.close_connection = True

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._say(status, message.encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _say(self, status: int, body: bytes, headers: dict[str, str], *, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
