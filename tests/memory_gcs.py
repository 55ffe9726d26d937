"""Google Cloud Storage in memory, for tests in one process: nothing leaves it.

Two clients meet in one dict. etils' epath asks fsspec for "gcs", which is `MemoryGcs` here.
tensorstore, which writes the arrays of a checkpoint, speaks the JSON API of GCS to a server on
localhost.
"""

import hashlib
import json
import sys
import types
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

import fsspec
from etils import epath
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class MemoryGcs(MemoryFileSystem):
    """gs://bucket/name is "/bucket/name" of the store."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs:/").removeprefix("gcs:/"))


class Api(BaseHTTPRequestHandler):
    """What tensorstore asks for: read, write, list and delete objects.

    It reads again only what has changed, and writes only what nobody else has written meanwhile: by
    the generation of an object, a number that changes with its content.
    """

    protocol_version = "HTTP/1.1"
    lock = Lock()

    def do_GET(self):
        bucket, name, query = self.asked()
        if name is None:
            prefix = f"/{bucket}/"
            names = sorted(key for key in MemoryGcs.store if key.startswith(prefix))
            items = [about(bucket, key.removeprefix(prefix)) for key in names]
            return self.answer(
                {"items": [x for x in items if x["name"].startswith(query.get("prefix", ""))]}
            )
        path = f"/{bucket}/{name}"
        if path not in MemoryGcs.store:
            return self.answer({"error": {"code": 404}}, status=404)
        if query.get("ifGenerationNotMatch") == generation(path):
            return self.answer(b"", status=304)
        if query.get("alt") != "media":
            return self.answer(about(bucket, name))
        content, status = MemoryGcs.store[path].getvalue(), 200
        headers = {"x-goog-generation": generation(path)}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.answer(content, status=status, headers=headers)

    def do_POST(self):
        bucket, _, query = self.asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        path = f"/{bucket}/{query['name']}"
        with self.lock:
            if query.get("ifGenerationMatch", generation(path)) != generation(path):
                return self.answer({"error": {"code": 412}}, status=412)
            MemoryGcs.store[path] = MemoryFile(None, path, content)
            self.answer(about(bucket, query["name"]))

    def do_DELETE(self):
        bucket, name, query = self.asked()
        path = f"/{bucket}/{name}"
        with self.lock:
            if query.get("ifGenerationMatch", generation(path)) != generation(path):
                return self.answer({"error": {"code": 412}}, status=412)
            found = MemoryGcs.store.pop(path, None)
        self.answer(b"", status=204 if found else 404)

    def asked(self) -> tuple[str, str | None, dict[str, str]]:
        """Returns the bucket, the object's name if there is one, and the query."""
        url = urllib.parse.urlsplit(self.path)
        _, _, in_bucket = url.path.partition("/b/")
        bucket, _, name = in_bucket.partition("/o")
        name = urllib.parse.unquote(name.removeprefix("/")) or None
        return bucket, name, dict(urllib.parse.parse_qsl(url.query))

    def answer(self, content, *, status: int = 200, headers: dict | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args): ...


def generation(path: str) -> str:
    """Returns a positive number of the object's content, "0" where there is none."""
    if path not in MemoryGcs.store:
        return "0"
    digest = hashlib.sha256(MemoryGcs.store[path].getvalue()).digest()
    return str(1 + int.from_bytes(digest[:7], "big"))


def about(bucket: str, name: str) -> dict[str, str]:
    path = f"/{bucket}/{name}"
    size = str(len(MemoryGcs.store[path].getvalue()))
    return {"name": name, "bucket": bucket, "generation": generation(path), "size": size}


def serve(monkeypatch) -> epath.Path:
    """Returns an empty bucket, there until the test ends."""
    MemoryGcs.store.clear()
    MemoryGcs.pseudo_dirs[:] = [""]
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, MemoryGcs, clobber=True)
    # orbax asks Google's client whether the bucket has real folders; this one has none.
    storage = types.SimpleNamespace(
        Client=lambda: types.SimpleNamespace(get_bucket=lambda name: types.SimpleNamespace())
    )
    monkeypatch.setitem(sys.modules, "google.cloud", types.SimpleNamespace(storage=storage))
    monkeypatch.setitem(sys.modules, "google.cloud.storage", storage)
    server = ThreadingHTTPServer(("localhost", 0), Api)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # so that none is looked for
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{server.server_port}")
    return epath.Path("gs://bucket")
