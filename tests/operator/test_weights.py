"""Downloads of weights, against scripted servers."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import IO

import pytest

from tandem_worker.models.download import WeightsError, fetch, hub_files, main, s3_files

TREE = [
    {"type": "file", "path": "config.json", "size": 2},
    {"type": "file", "path": "model.safetensors", "size": 5},
    {"type": "file", "path": "pytorch_model.bin", "size": 9},
    {"type": "directory", "path": "sub"},
]


class Web:
    """Answers by URL; records the requests; a list is a sequence of answers."""

    def __init__(self, pages: dict[str, object]) -> None:
        self.pages = pages
        self.requests: list[urllib.request.Request] = []

    def __call__(self, request: urllib.request.Request) -> IO[bytes]:
        self.requests.append(request)
        page = self.pages[request.full_url]
        if isinstance(page, list):
            page = page.pop(0)
        if isinstance(page, int):
            raise urllib.error.HTTPError(request.full_url, page, "no", Message(), None)
        assert isinstance(page, bytes)
        return io.BytesIO(page)


HUB = "https://huggingface.co"
LISTING = f"{HUB}/api/models/org/name/tree/v1?recursive=true"


def web(**extra: object) -> Web:
    return Web(
        {
            LISTING: json.dumps(TREE).encode(),
            f"{HUB}/org/name/resolve/v1/config.json": b"{}",
            f"{HUB}/org/name/resolve/v1/model.safetensors": extra.get("weights", b"12345"),
        }
    )


def test_the_files_that_a_worker_reads_are_fetched_from_the_hub(tmp_path: Path) -> None:
    server = web()

    fetch(hub_files("org/name@v1", {"HF_TOKEN": "t"}, server), tmp_path, server, lambda _: None)

    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"12345",
    }
    assert all(r.get_header("Authorization") == "Bearer t" for r in server.requests)


def test_a_second_run_fetches_nothing(tmp_path: Path) -> None:
    first, second = web(), web()
    fetch(hub_files("org/name@v1", {}, first), tmp_path, first, lambda _: None)

    fetch(hub_files("org/name@v1", {}, second), tmp_path, second, lambda _: None)

    assert [r.full_url for r in second.requests] == [LISTING]


def test_a_cut_download_is_tried_again_and_never_left_half(tmp_path: Path) -> None:
    server = web(weights=[b"123", 503, b"12345"])
    pauses: list[float] = []

    fetch(hub_files("org/name@v1", {}, server), tmp_path, server, lambda _: None, pauses.append)

    assert (tmp_path / "model.safetensors").read_bytes() == b"12345"
    assert pauses == [2.0, 4.0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_download_that_never_works_says_so(tmp_path: Path) -> None:
    server = web(weights=[b"1"] * 5)

    with pytest.raises(WeightsError, match="1 bytes arrived instead of 5"):
        fetch(
            hub_files("org/name@v1", {}, server), tmp_path, server, lambda _: None, lambda _: None
        )
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "give a token"), (404, "check the name"), (500, "try again later")]
)
def test_a_refused_listing_says_what_to_do(status: int, hint: str) -> None:
    with pytest.raises(WeightsError, match=hint):
        hub_files("org/name@v1", {}, Web({LISTING: status}))


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", "a//x.json", "a/../../x.json"])
def test_a_file_name_that_leaves_the_folder_is_refused(name: str) -> None:
    listing = json.dumps([{"type": "file", "path": name, "size": 1}]).encode()

    with pytest.raises(WeightsError, match="leaves the folder"):
        hub_files("org/name@v1", {}, Web({LISTING: listing}))


def test_a_repository_without_safetensors_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"holds no \.safetensors"):
        hub_files("org/name@v1", {}, Web({LISTING: b"[]"}))


def _s3_page(keys: list[str], token: str = "") -> bytes:
    entries = "".join(f"<Contents><Key>{k}</Key><Size>5</Size></Contents>" for k in keys)
    more = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    return f'<ListBucketResult xmlns="{space}">{entries}{more}</ListBucketResult>'.encode()


def test_s3_is_listed_page_by_page_and_requests_are_signed(tmp_path: Path) -> None:
    env = {
        "AWS_ENDPOINT_URL": "http://s3.local",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
    }
    base = "http://s3.local/bucket?list-type=2&prefix=m%2F"
    server = Web(
        {
            base: _s3_page(["m/a.safetensors", "m/"], token="n x"),
            "http://s3.local/bucket?continuation-token=n%20x&list-type=2&prefix=m%2F": _s3_page(
                ["m/sub/config.json", "m/readme.md"]
            ),
            "http://s3.local/bucket/m/a.safetensors": b"12345",
            "http://s3.local/bucket/m/sub/config.json": b"12345",
        }
    )

    fetch(s3_files("bucket/m", env, server), tmp_path, server, lambda _: None)

    assert (tmp_path / "sub" / "config.json").exists()
    signatures = [r.get_header("Authorization") or "" for r in server.requests]
    assert all(s.startswith("AWS4-HMAC-SHA256 Credential=k/") for s in signatures)


def test_a_wrong_call_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([]) == 2
    assert main(["ftp://x", str(tmp_path / "x")]) == 2

    assert "use hf:// or s3://" in capsys.readouterr().err
