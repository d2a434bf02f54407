"""Downloads of weights, from hubs and buckets that fail, lie and attack (all on this machine)."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tandem_worker.errors import ModelError
from tandem_worker.models.download import download, main
from tandem_worker.models.fetching import LOCK, WeightsError
from tandem_worker.models.identity import MANIFEST, identify

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
            name = url.path.rpartition("/")[2]
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
        entries = [self.entry(name) for name in self.files]
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


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving(FakeHub()) as hub:
        yield hub


def get(hub: FakeHub, folder: Path, uri: str = "hf://org/name", **options: Any) -> list[str]:
    """Download; what was said."""
    said: list[str] = []
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret"}
    download(uri, folder, env, said.append, sleep=lambda _: None, **options)
    return said


def present(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in (LOCK, MANIFEST)}


def test_what_a_worker_reads_is_fetched_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    hub.files |= {
        "README.md": b"x",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": safetensors(5),
        "onnx/model.safetensors": safetensors(5),
        "merges.txt": b"x",
    }

    get(hub, tmp_path)

    assert present(tmp_path) == FILES
    assert len(hub.gets("model.safetensors")) == 1


def test_a_reference_is_resolved_to_a_commit_and_read_at_it(hub: FakeHub, tmp_path: Path) -> None:
    get(hub, tmp_path, "hf://org/name@v1")

    paths = [path for _, path, _ in hub.requests]
    assert paths[0] == "/api/models/org/name/revision/v1"
    assert all(COMMIT in path for path in paths[1:])
    assert identify(tmp_path).commit == COMMIT


def test_a_finished_folder_is_kept_even_if_the_name_has_moved_on(
    hub: FakeHub, tmp_path: Path
) -> None:
    get(hub, tmp_path)
    first = identify(tmp_path)
    hub.requests.clear()
    hub.commit = "d" * 40
    hub.files["model.safetensors"] = safetensors(1000, fill=2)

    said = get(hub, tmp_path)

    assert hub.requests == []
    assert "there already" in said[0]
    assert identify(tmp_path) == first


def test_a_pod_without_the_folder_gets_the_pinned_commit(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit = "d" * 40

    get(hub, tmp_path, pinned_commit=COMMIT)

    assert identify(tmp_path).commit == COMMIT
    assert not any("/revision/" in path for _, path, _ in hub.requests)


def test_the_identity_is_of_the_content_however_it_came(hub: FakeHub, tmp_path: Path) -> None:
    get(hub, tmp_path / "a")
    for name, body in FILES.items():
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / name).write_bytes(body)

    by_hand = identify(tmp_path / "b")

    assert by_hand.digest == identify(tmp_path / "a").digest
    (tmp_path / "b" / "config.json").write_bytes(CONFIG.replace(b"8", b"9"))
    assert identify(tmp_path / "b").digest != by_hand.digest


def test_a_file_changed_behind_the_manifest_is_noticed_and_fetched_again(
    hub: FakeHub, tmp_path: Path
) -> None:
    get(hub, tmp_path)
    good = identify(tmp_path).digest
    (tmp_path / "model.safetensors").write_bytes(safetensors(1000, fill=9))

    assert identify(tmp_path).digest != good

    get(hub, tmp_path)
    assert identify(tmp_path).digest == good
    assert len(hub.gets("tokenizer.json")) == 1


def test_all_pages_of_a_listing_are_read(hub: FakeHub, tmp_path: Path) -> None:
    hub.page_size = 1

    get(hub, tmp_path)

    assert present(tmp_path) == FILES


def _cut(hub: FakeHub, name: str, *lengths: int) -> None:
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


def test_a_cut_download_goes_on_where_it_was_cut(hub: FakeHub, tmp_path: Path) -> None:
    _cut(hub, "model.safetensors", 300, 200)

    get(hub, tmp_path)

    assert present(tmp_path) == FILES
    ranges = [headers.get("range") for headers in hub.gets("model.safetensors")]
    assert ranges == [None, "bytes=300-", "bytes=500-"]


def test_a_killed_download_goes_on_in_the_next_pod(hub: FakeHub, tmp_path: Path) -> None:
    _cut(hub, "model.safetensors", 300, 0, 0, 0, 0)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        get(hub, tmp_path)
    hub.requests.clear()

    get(hub, tmp_path)

    assert [h.get("range") for h in hub.gets("model.safetensors")] == ["bytes=300-"]
    assert present(tmp_path) == FILES


COLLIDING = """
import os, sys
os.getpid = lambda: 1  # every container's first process
from tandem_worker.models.download import main
raise SystemExit(main(sys.argv[1:]))
"""


def test_two_pods_on_one_claim_leave_whole_files(hub: FakeHub, tmp_path: Path) -> None:
    """Their part files once collided: zeros in the file, exit status 0."""
    body = hub.files["model.safetensors"] = safetensors(24 * 2**20)
    second = threading.Event()
    first_is_at_two_thirds = threading.Event()

    def rule(request: BaseHTTPRequestHandler) -> Answer | None:
        if request.command != "GET" or not request.path.endswith("/model.safetensors"):
            return None
        if len(hub.gets("model.safetensors")) == 1:
            request.send_response(200)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body[: 16 * 2**20])
            first_is_at_two_thirds.set()
            second.wait(3.0)  # with one writer there is no second
            request.wfile.write(body[16 * 2**20 :])
            request.close_connection = True
            return None
        second.set()
        return None

    hub.rules.append(rule)
    env = {**os.environ, "HF_ENDPOINT": hub.url}
    command = [sys.executable, "-c", COLLIDING, "hf://org/name", str(tmp_path)]

    pods = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)]
    assert first_is_at_two_thirds.wait(60)
    pods.append(
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    )
    said = [pod.communicate(timeout=60)[0].decode() for pod in pods]

    assert [pod.returncode for pod in pods] == [0, 0], said
    assert (tmp_path / "model.safetensors").read_bytes() == body
    assert "another pod is writing" in said[1]
    assert len(hub.gets("model.safetensors")) == 1


# -- a hostile mirror ------------------------------------------------------------------------------


def test_the_token_goes_to_its_host_alone(hub: FakeHub, tmp_path: Path) -> None:
    with serving(FakeHub()) as elsewhere:

        def away(request: BaseHTTPRequestHandler) -> Answer | None:
            if "/resolve/" in request.path:
                return 302, {"Location": elsewhere.url + request.path}, b""
            return None

        hub.rules.append(away)

        get(hub, tmp_path)

        assert present(tmp_path) == FILES
        assert elsewhere.requests
        assert all(h.get("authorization") == "Bearer secret" for _, _, h in hub.requests)
        assert not any("authorization" in h for _, _, h in elsewhere.requests)


def test_the_token_does_not_follow_a_listing_to_another_host(hub: FakeHub, tmp_path: Path) -> None:
    with serving(FakeHub()) as elsewhere:

        def away(request: BaseHTTPRequestHandler) -> Answer | None:
            if "/tree/" not in request.path:
                return None
            page = json.dumps([hub.entry("config.json")]).encode()
            link = f'<{elsewhere.url}{request.path}>; rel="next"'
            return 200, {"Link": link}, page

        hub.rules.append(away)

        get(hub, tmp_path)

        assert elsewhere.requests
        assert not any("authorization" in h for _, _, h in elsewhere.requests)


def test_content_of_another_hash_is_never_kept(hub: FakeHub, tmp_path: Path) -> None:
    wrong = safetensors(1000, fill=7)

    def lie(request: BaseHTTPRequestHandler) -> Answer | None:
        if request.path.endswith("/model.safetensors"):
            return 200, {}, wrong
        return None

    hub.rules.append(lie)

    with pytest.raises(WeightsError, match=r"model.safetensors: what arrived has sha256 hash"):
        get(hub, tmp_path)

    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / MANIFEST).exists()


def test_a_small_file_of_another_hash_is_never_kept(hub: FakeHub, tmp_path: Path) -> None:
    hub.rules.append(
        lambda r: (200, {}, b"{ }"[:2] + b"") if r.path.endswith("/tokenizer.json") else None
    )
    hub.files["tokenizer.json"] = b"[]"

    with pytest.raises(WeightsError, match="git hash"):
        get(hub, tmp_path)


@pytest.mark.parametrize("length", [10, 100_000])
def test_a_file_of_another_size_is_never_kept(hub: FakeHub, tmp_path: Path, length: int) -> None:
    body = b"x" * length
    hub.rules.append(lambda r: (200, {}, body) if r.path.endswith("/model.safetensors") else None)

    with pytest.raises(WeightsError, match="bytes arrived"):
        get(hub, tmp_path)

    assert not (tmp_path / "model.safetensors").exists()
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 2000


def test_names_that_leave_the_folder_are_not_even_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    hub.files |= {"../outside.json": b"x", "/etc/x.json": b"x", "a/../../config.json": b"x"}

    get(hub, folder)

    assert present(folder) == FILES
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", 7])
def test_an_index_that_names_files_elsewhere_is_refused(
    hub: FakeHub, tmp_path: Path, shard: object
) -> None:
    index = json.dumps({"weight_map": {"x": shard}}).encode()
    hub.files["model.safetensors.index.json"] = index

    with pytest.raises(ModelError, match="must be a plain file name"):
        get(hub, tmp_path)


def test_a_listing_without_end_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    page = json.dumps([hub.entry("config.json")] * 5000).encode()

    def endless(request: BaseHTTPRequestHandler) -> Answer | None:
        if "/tree/" not in request.path:
            return None
        return 200, {"Link": f'<{hub.url}{request.path}>; rel="next"'}, page

    hub.rules.append(endless)

    with pytest.raises(WeightsError, match="lists more than 20000 files"):
        get(hub, tmp_path)


def test_a_page_without_end_is_refused(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem_worker.models.hub.MAX_LISTING_BYTES", 2**20)
    body = b" " * 2**21 + b"[]"
    hub.rules.append(lambda r: (200, {}, body) if "/tree/" in r.path else None)

    with pytest.raises(WeightsError, match="exceeds"):
        get(hub, tmp_path)


def test_redirects_in_a_circle_end(hub: FakeHub, tmp_path: Path) -> None:
    hub.rules.append(lambda r: (302, {"Location": r.path}, b"") if "/resolve/" in r.path else None)

    with pytest.raises(WeightsError, match="redirect"):
        get(hub, tmp_path)


@pytest.mark.parametrize("body", [b"[]", b"null", b"<html>", b'{"sha": 7}', b'{"id": "x"}', b"["])
def test_a_hub_that_is_none_is_told(hub: FakeHub, tmp_path: Path, body: bytes) -> None:
    hub.rules.append(lambda r: (200, {}, body) if r.path.startswith("/api") else None)

    with pytest.raises(WeightsError, match="hub"):
        get(hub, tmp_path)


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "give a token"), (403, "accept the"), (404, "check the name")]
)
def test_a_refusal_says_what_to_do(hub: FakeHub, tmp_path: Path, status: int, hint: str) -> None:
    hub.rules.append(lambda r: (status, {}, b""))

    with pytest.raises(WeightsError, match=hint):
        get(hub, tmp_path)


# -- what no worker runs is refused before the weights travel --------------------------------------


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["model-q4.gguf"], "holds GGUF"),
        (["pytorch_model.bin"], r"PyTorch pickles \(\.bin\)"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter alone"),
        (["consolidated.safetensors", "params.json"], "but neither model.safetensors nor"),
        (["model.safetensors", "tokenizer.model", "config.json"], "tokenizer.model is the slow"),
        (["model.safetensors", "params.json", "tokenizer.json"], "params.json is Meta's"),
        ([], r"holds no \.safetensors file"),
    ],
)
def test_other_formats_are_named_before_anything_is_fetched(
    hub: FakeHub, tmp_path: Path, names: list[str], sentence: str
) -> None:
    hub.files = dict.fromkeys(names, b"{}")

    with pytest.raises(ModelError, match=sentence):
        get(hub, tmp_path)

    assert not any("/resolve/" in path for _, path, _ in hub.requests)


def test_an_unknown_architecture_is_told_before_its_weights_travel(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.files["config.json"] = CONFIG.replace(b"llama", b"mamba")

    with pytest.raises(ModelError, match="model_type='mamba'"):
        get(hub, tmp_path)

    assert hub.gets("model.safetensors") == []


def test_a_full_disk_is_told_before_it_is_full(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)

    with pytest.raises(WeightsError, match=r"enlarge weights\.cache\.size"):
        get(hub, tmp_path)


def test_a_wrong_call_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([]) == 2
    assert main(["ftp://x", str(tmp_path / "x")]) == 1

    assert "use hf:// or s3://" in capsys.readouterr().err


# -- S3 --------------------------------------------------------------------------------------------


class FakeBucket(FakeHub):
    """`bucket/m/`: the same files behind S3's protocol."""

    def answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        url = urlsplit(path)
        query = parse_qs(url.query)
        if "list-type" in query:
            names = list(self.files)
            at = int(query.get("continuation-token", ["0"])[0])
            entries = "".join(
                f"<Contents><Key>m/{n}</Key><Size>{len(self.files[n])}</Size>"
                f'<ETag>"{hashlib.md5(self.files[n]).hexdigest()}"</ETag></Contents>'
                for n in names[at : at + 1]
            )
            more = (
                f"<NextContinuationToken>{at + 1}</NextContinuationToken>"
                if at + 1 < len(names)
                else ""
            )
            space = "http://s3.amazonaws.com/doc/2006-03-01/"
            text = f'<ListBucketResult xmlns="{space}">{entries}{more}</ListBucketResult>'
            return 200, {}, text.encode()
        return super().answer(path.replace("/bucket/m/", "/org/name/resolve/x/"), headers)


def get_s3(bucket: FakeBucket, folder: Path) -> None:
    env = {
        "AWS_ENDPOINT_URL": bucket.url,
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_SESSION_TOKEN": "session",
    }
    download("s3://bucket/m", folder, env, lambda _: None, sleep=lambda _: None)


@pytest.fixture
def bucket() -> Iterator[FakeBucket]:
    with serving(FakeBucket()) as bucket:
        assert isinstance(bucket, FakeBucket)
        yield bucket


def test_s3_is_listed_page_by_page_and_requests_are_signed(
    bucket: FakeBucket, tmp_path: Path
) -> None:
    bucket.files |= {"readme.md": b"x", "sub/config.json": b"x"}
    _cut(bucket, "model.safetensors", 300)

    get_s3(bucket, tmp_path)

    assert present(tmp_path) == FILES
    signatures = [headers.get("authorization", "") for _, _, headers in bucket.requests]
    assert all(s.startswith("AWS4-HMAC-SHA256 Credential=k/") for s in signatures)
    assert [h.get("range") for h in bucket.gets("model.safetensors")] == [None, "bytes=300-"]


def test_s3_content_of_another_md5_is_never_kept(bucket: FakeBucket, tmp_path: Path) -> None:
    wrong = safetensors(1000, fill=7)
    bucket.rules.append(
        lambda r: (
            (200, {}, wrong)
            if r.command == "GET" and r.path.endswith("/model.safetensors")
            else None
        )
    )

    with pytest.raises(WeightsError, match="md5 hash"):
        get_s3(bucket, tmp_path)


def test_keys_do_not_follow_a_redirect(bucket: FakeBucket, tmp_path: Path) -> None:
    with serving(FakeHub()) as elsewhere:
        bucket.rules.append(lambda r: (307, {"Location": elsewhere.url + r.path}, b""))

        with pytest.raises(WeightsError, match="another region"):
            get_s3(bucket, tmp_path)

        assert elsewhere.requests == []


def test_an_s3_listing_of_one_page_forever_is_refused(bucket: FakeBucket, tmp_path: Path) -> None:
    body = (
        b"<R><Contents><Key>m/x</Key><Size>1</Size></Contents>"
        b"<NextContinuationToken>n</NextContinuationToken></R>"
    )
    bucket.rules.append(lambda r: (200, {}, body) if "list-type" in r.path else None)

    with pytest.raises(WeightsError, match="the same page twice"):
        get_s3(bucket, tmp_path)
