"""A hub on this machine that speaks as much of the protocol as is used, well or badly."""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tandem_worker.models.download import download
from tandem_worker.models.fetching import LOCK
from tandem_worker.models.identity import MANIFEST

COMMIT = "c0ffee" + "0" * 34
CONFIG = json.dumps(
    {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
).encode()


def safetensors(num_bytes: int, fill: int = 1) -> bytes:
    header = json.dumps(
        {"x": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}
    )
    return struct.pack("<Q", len(header)) + header.encode() + bytes([fill]) * num_bytes


FILES: dict[str, bytes] = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "model.safetensors": safetensors(1000),
}
Answer = tuple[int, Mapping[str, str], bytes]
Rule = Callable[[BaseHTTPRequestHandler], Answer | None]


class FakeHub:
    """Speaks as much of the hub's protocol as is used; `rules` answer first where they want to."""

    def __init__(self, files: Mapping[str, bytes] = FILES) -> None:
        self.files = dict(files)
        self.lfs = {name for name in self.files if name.endswith((".safetensors", ".bin"))}
        self.commit = COMMIT
        self.page_size = 1000
        self.rules: list[Rule] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                headers = {key.lower(): value for key, value in self.headers.items()}
                hub.requests.append((self.command, self.path, headers))
                answer = next((a for rule in hub.rules if (a := rule(self)) is not None), None)
                if answer is None:
                    answer = hub.answer(self.path, headers)
                status, extra, body = answer
                self.send_response(status)
                extra = {"Content-Length": str(len(body)), **extra}
                for key, value in extra.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
                if int(extra["Content-Length"]) != len(body):
                    self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        url = urlsplit(path)
        if url.path.startswith("/api/models/org/name/tree/"):
            return self.tree(url.path, parse_qs(url.query))
        if url.path.startswith("/api/models/org/name"):
            return 200, {}, json.dumps({"id": "org/name", "sha": self.commit}).encode()
        if url.path.startswith("/org/name/resolve/"):
            name = url.path.removeprefix("/org/name/resolve/").partition("/")[2]
            if name not in self.files:
                return 404, {}, b""
            body = self.files[name]
            if given := headers.get("range"):
                start = int(given.removeprefix("bytes=").rstrip("-"))
                rest = f"bytes {start}-{len(body) - 1}/{len(body)}"
                return 206, {"Content-Range": rest}, body[start:]
            return 200, {}, body
        return 404, {}, b""

    def tree(self, path: str, query: Mapping[str, list[str]]) -> Answer:
        inside = path.removeprefix("/api/models/org/name/tree/").partition("/")[2]
        entries = [self.entry(n) for n in self.files if n.rpartition("/")[0] == inside]
        folders = {n.partition("/")[0] for n in self.files if "/" in n and not inside}
        entries += [{"type": "directory", "path": name, "oid": "0" * 40} for name in folders]
        at = int(query.get("cursor", ["0"])[0])
        page = entries[at : at + self.page_size]
        links = {}
        if at + self.page_size < len(entries):
            links["Link"] = f'<{self.url}{path}?cursor={at + self.page_size}>; rel="next"'
        return 200, links, json.dumps(page).encode()

    def entry(self, name: str) -> dict[str, Any]:
        body = self.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(body), "oid": blob}
        if name in self.lfs:
            sha256 = hashlib.sha256(body).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(body), "pointerSize": 128}
        return entry

    def gets(self, name: str) -> list[dict[str, str]]:
        return [h for m, path, h in self.requests if m == "GET" and path.endswith(f"/{name}")]


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def get(hub: FakeHub, folder: Path, uri: str = "hf://org/name", **options: Any) -> list[str]:
    """Download; what was said."""
    said: list[str] = []
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret"}
    download(uri, folder, env, said.append, sleep=lambda _: None, **options)
    return said


def present(folder: Path) -> dict[str, bytes]:
    """The files directly in a folder."""
    files = (p for p in folder.iterdir() if p.is_file() and p.name not in (LOCK, MANIFEST))
    return {p.name: p.read_bytes() for p in files}


def cut(hub: FakeHub, name: str, *lengths: int) -> None:
    """The first answers for a file end early."""
    left = list(lengths)

    def rule(request: BaseHTTPRequestHandler) -> Answer | None:
        if request.command == "GET" and request.path.endswith(f"/{name}") and left:
            status, headers, body = hub.answer(
                request.path, {k.lower(): v for k, v in request.headers.items()}
            )
            announced = {**headers, "Content-Length": str(len(body))}
            return status, announced, body[: left.pop(0)]
        return None

    hub.rules.append(rule)
