"""Downloads of weights from a bucket: signed, page by page, and no key for anybody else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from hub_kit import FILES, Answer, FakeHub, cut, present, safetensors, serving
from tandem_worker.models.download import download
from tandem_worker.models.fetching import WeightsError


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
    pooling = {"1_Pooling/config.json": b"{}"}
    bucket.files |= {"readme.md": b"x", "sub/config.json": b"x", **pooling}
    cut(bucket, "model.safetensors", 300)

    get_s3(bucket, tmp_path)

    assert present(tmp_path) == FILES
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["1_Pooling"]
    assert (tmp_path / "1_Pooling" / "config.json").read_bytes() == b"{}"
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
