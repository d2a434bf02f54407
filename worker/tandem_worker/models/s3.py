"""An S3 bucket as a source of weights, signed with AWS Signature Version 4.

S3 has no commits; what a file is verified by is what the service says of it: a SHA-256 or MD5
where it keeps one of the whole object, else its size alone. Redirects are not followed: they would
carry the signature and the session token to another host.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping

import httpx

from tandem_worker.models.aws_credentials import Credentials
from tandem_worker.models.aws_signature import signed_headers
from tandem_worker.models.fetching import BrokenTransferError, RemoteFile, WeightsError
from tandem_worker.models.files import POOLING

TIMEOUT_S = 60.0
MAX_FILES = 20_000
MAX_PAGE_BYTES = 8 * 2**20
_HINTS = {
    301: "the bucket is in another region; set AWS_REGION",
    307: "the bucket is in another region; set AWS_REGION",
    400: "check AWS_REGION and the bucket's name",
    401: "give keys in weights.secretRef",
    403: "give keys with access in weights.secretRef (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), "
    "or let the role of the pod's ServiceAccount read the bucket",
    404: "check the bucket and the prefix",
}
_MD5 = re.compile(r"[0-9a-f]{32}")


class S3:
    """The files directly below one prefix of a bucket.

    Args:
        reference: ``bucket/prefix``.
        env: AWS_REGION, AWS_ENDPOINT_URL, and what `Credentials` reads.
    """

    commit = ""

    def __init__(self, reference: str, env: Mapping[str, str]) -> None:
        bucket, _, prefix = reference.partition("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._region = env.get("AWS_REGION") or "us-east-1"
        service = env.get("AWS_ENDPOINT_URL") or f"https://s3.{self._region}.amazonaws.com"
        self._bucket = f"{service.rstrip('/')}/{bucket}"
        self._what = f"s3://{reference}"
        self._http = httpx.Client(follow_redirects=False, timeout=TIMEOUT_S)
        self._credentials = Credentials(env, self._http)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def resolve(self, commit: str = "") -> None:
        """Nothing to do: S3 has no commits."""

    def listing(self) -> dict[str, RemoteFile]:
        """The files directly below the prefix, by name; all pages of the listing.

        Raises:
            WeightsError: the listing fails or does not end.
        """
        files: dict[str, RemoteFile] = {}
        token, seen = "", 0
        while True:
            query = {"list-type": "2", "prefix": self._prefix}
            if token:
                query["continuation-token"] = token
            root = self._page(query)
            space = root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""
            for entry in root.iter(f"{space}Contents"):
                seen += 1
                key = entry.findtext(f"{space}Key") or ""
                name = key.removeprefix(self._prefix)
                if key.startswith(self._prefix) and name and ("/" not in name or name == POOLING):
                    size = entry.findtext(f"{space}Size") or ""
                    etag = (entry.findtext(f"{space}ETag") or "").strip('"')
                    files[name] = self._file(name, size, etag)
            following = root.findtext(f"{space}NextContinuationToken") or ""
            if not following:
                return files
            if following == token or seen > MAX_FILES:
                raise WeightsError(
                    f"{self._what} lists more than {MAX_FILES} files or the same page twice; "
                    "name a folder that holds one model"
                )
            token = following

    def _file(self, name: str, size: str, etag: str) -> RemoteFile:
        if not size.isascii() or not size.isdigit():
            raise WeightsError(f"{self._what}: {name!r} is listed with size {size!r}")
        return RemoteFile(name, int(size), "md5", "", version=etag)

    @contextlib.contextmanager
    def open(self, file: RemoteFile, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """See :class:`tandem_worker.models.fetching.Source`."""
        url, headers = self._signed(f"/{urllib.parse.quote(self._prefix + file.name)}", {})
        if offset:
            headers["range"] = f"bytes={offset}-"
        if file.version:  # another object under this name since it was listed: 412
            headers["if-match"] = f'"{file.version}"'
        try:
            with self._http.stream("GET", url, headers=headers) as response:
                status = response.status_code
                if status == 412:
                    raise WeightsError(f"{self._what}: {file.name} changed while it was fetched")
                if status in _HINTS:
                    raise WeightsError(
                        f"{self._what}: {file.name}: HTTP {status}; {_HINTS[status]}"
                    )
                if status not in (200, 206):
                    raise BrokenTransferError(f"HTTP {status}")
                if status == 206:
                    found = response.headers.get("content-range", "")
                    if not found.startswith(f"bytes {offset}-"):
                        raise BrokenTransferError("the server answered with another range")
                yield (offset if status == 206 else 0), response.iter_raw()
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise BrokenTransferError(str(error) or type(error).__name__) from error

    def verified_by(self, file: RemoteFile) -> RemoteFile:
        """The file with the hash that the service vouches for, if any.

        An ETag is the content's MD5 unless the object came in parts or is encrypted with a key of
        the key service.
        """
        url, headers = self._signed(f"/{urllib.parse.quote(self._prefix + file.name)}", {}, "HEAD")
        headers["x-amz-checksum-mode"] = "ENABLED"
        try:
            response = self._http.head(url, headers=headers)
        except httpx.HTTPError:
            return file
        if response.status_code != 200:
            return file
        own = response.headers.get("x-amz-checksum-sha256", "")
        if own and response.headers.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT":
            with contextlib.suppress(ValueError):
                digest = _from_base64(own)
                return RemoteFile(file.name, file.size, "sha256", digest, file.version)
        encryption = response.headers.get("x-amz-server-side-encryption", "")
        if _MD5.fullmatch(file.version) and not encryption.startswith("aws:kms"):
            return RemoteFile(file.name, file.size, "md5", file.version, file.version)
        return file

    def _page(self, query: Mapping[str, str]) -> ET.Element:
        url, headers = self._signed("", query)
        try:
            with self._http.stream("GET", url, headers=headers) as response:
                if response.status_code != 200:
                    hint = _HINTS.get(response.status_code, "try again later")
                    raise WeightsError(f"{self._what}: HTTP {response.status_code}; {hint}")
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > MAX_PAGE_BYTES:
                        raise WeightsError(f"{self._what}: a page of the listing does not end")
        except httpx.HTTPError as error:
            raise WeightsError(
                f"{self._what}: no connection ({error}); check the network"
            ) from error
        if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
            raise WeightsError(f"{self._what}: the listing is no S3 service's")
        try:
            return ET.fromstring(bytes(body))
        except ET.ParseError as error:
            raise WeightsError(f"{self._what}: the listing is not XML: {error}") from error

    def _signed(
        self, path: str, query: Mapping[str, str], method: str = "GET"
    ) -> tuple[str, dict[str, str]]:
        """URL and headers of a signed request; unsigned without credentials."""
        url = self._bucket + path
        pairs = sorted(
            (urllib.parse.quote(k, safe=""), urllib.parse.quote(v, safe=""))
            for k, v in query.items()
        )
        canonical_query = "&".join(f"{k}={v}" for k, v in pairs)
        full = f"{url}?{canonical_query}" if canonical_query else url
        headers = {"accept-encoding": "identity"}
        if (keys := self._credentials.current()) is None:
            return full, headers
        now = datetime.datetime.now(datetime.UTC)
        return full, headers | signed_headers(keys, self._region, method, url, canonical_query, now)


def _from_base64(text: str) -> str:
    import base64
    import binascii

    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
    if len(raw) != 32:
        raise ValueError("a SHA-256 has 32 bytes")
    return raw.hex()
