"""Downloads of weights from mirrors that lie, attack and never end."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from hub_kit import FILES, Answer, FakeHub, get, present, safetensors, serving
from tandem_worker.errors import ModelError
from tandem_worker.models.fetching import WeightsError
from tandem_worker.models.identity import MANIFEST


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
