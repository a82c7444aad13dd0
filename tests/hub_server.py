"""A small Hub on 127.0.0.1: model info, files, redirects to a store on another host name, and ways to fail.

    with FakeHub() as hub:
        hub.add("org/model", {"config.json": b"{}", "model.safetensors": b"..."})
        hub.fail["head"] = 500

Large files (by suffix) are answered as git-LFS files are: HEAD and GET redirect to `http://localhost:<port>/store/`,
which is another host than the endpoint `http://127.0.0.1:<port>`. The store understands Range.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf", ".h5", ".onnx", ".msgpack")


class FakeHub:
    """The server and what it holds.

    Attributes:
        fail: kind of request ("info", "head", "get", "store") -> how it fails: an HTTP status, "hang" (no answer),
            "close" (connection closed), "truncate" (half of the body), "corrupt" (a byte changed), "html" (a page);
            for "head" also "dead redirect", "wrong etag", "wrong size", "no etag", "no commit", "wrong commit".
        codes: kind -> X-Error-Code, as the Hub sends with 4xx.
        times: kind -> how often it still fails (for ever if it is not there).
        log: (method, path, has an Authorization header) of every request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[tuple[str, str], str] = {}
        self.fail: dict[str, Any] = {}
        self.codes: dict[str, str] = {}
        self.times: dict[str, int] = {}
        self.log: list[tuple[str, str, bool]] = []
        self.released = threading.Event()

    def __enter__(self) -> FakeHub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Add a commit and let `revision` point to it. Returns its hash."""
        text = repr(sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items()))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        self.refs[repo, revision] = commit
        return commit

    def paths(self, method: str) -> list[str]:
        """Paths that were asked for with this method."""
        return [path for verb, path, _ in self.log if verb == method]

    def failing(self, kind: str) -> Any:
        """How a request of this kind is to fail now, None if it is not."""
        if kind not in self.fail or self.times.get(kind) == 0:
            return None
        if kind in self.times:
            self.times[kind] -= 1
        return self.fail[kind]


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Nothing on the console."""

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.log.append((self.command, path, "Authorization" in self.headers))
            if path.startswith("/api/models/"):
                self._info(path.removeprefix("/api/models/"))
            elif path.startswith("/store/"):
                self._store(path.removeprefix("/store/"))
            else:
                self._resolve(*path[1:].split("/resolve/", 1))

        def _failed(self, kind: str) -> Any:
            how = hub.failing(kind)
            if how == "hang":
                hub.released.wait(20)
            if how in ("hang", "close"):
                self.close_connection = True
                return "done"
            if isinstance(how, int):
                headers = {"X-Error-Code": hub.codes[kind]} if kind in hub.codes else {}
                self._send(how, b"", headers)
                return "done"
            if how == "html":
                self._send(200, b"<html>please log in</html>", {})
                return "done"
            return how

        def _info(self, rest: str) -> None:
            if self._failed("info") == "done":
                return
            repo, _, revision = rest.partition("/revision/")
            if repo not in hub.repos:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            commit = hub.refs.get((repo, revision or "main"), revision)
            if commit not in hub.repos[repo]:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            files = [self._entry(name, data) for name, data in hub.repos[repo][commit].items()]
            body = {"id": repo, "modelId": repo, "sha": commit, "siblings": files, "private": False, "tags": []}
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def _entry(self, name: str, data: bytes) -> dict[str, Any]:
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _git_hash(data)}
            if name.endswith(LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            return entry

        def _resolve(self, repo: str, rest: str) -> None:
            kind = self.command.lower()
            how = self._failed(kind)
            if how == "done":
                return
            commit, _, name = rest.partition("/")
            data = hub.repos[repo][commit][name]
            large = name.endswith(LARGE)
            etag = hashlib.sha256(data).hexdigest() if large else _git_hash(data)
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
            if large:
                headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
                headers["Location"] = f"http://localhost:{hub.port}/store/{repo}/{commit}/{name}?Signature=secret"
            if how == "dead redirect":
                headers["Location"] = "http://localhost:1/x"
            if how == "wrong etag":
                headers["ETag"] = headers["X-Linked-ETag"] = f'"{"0" * len(etag)}"'
            if how == "wrong size":
                headers["X-Linked-Size"] = str(len(data) + 10)
            if how == "no etag":
                headers = {k: v for k, v in headers.items() if "etag" not in k.lower()}
            if how == "no commit":
                del headers["X-Repo-Commit"]
            if how == "wrong commit":
                headers["X-Repo-Commit"] = "f" * 40
            self._send(302 if "Location" in headers else 200, b"" if large else data, headers, how)

        def _store(self, rest: str) -> None:
            how = self._failed("store")
            if how == "done":
                return
            org, name, commit, file = rest.split("/", 3)
            data = hub.repos[f"{org}/{name}"][commit][file]
            begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
            headers = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if "Range" in self.headers else {}
            self._send(206 if headers else 200, data[begin:], headers, how)

        def _send(self, status: int, body: bytes, headers: dict[str, str], how: Any = None) -> None:
            if how == "corrupt":
                body = body[:-1] + bytes([body[-1] ^ 1])
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if how == "truncate":
                body = body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)

    return Handler


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
