"""Downloads a model's files into a folder: `python -m tandem_worker.models.download URI FOLDER`.

hf://org/name[@revision] comes from the Hugging Face hub (HF_TOKEN, HF_ENDPOINT), s3://bucket/prefix
from an S3 service (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION,
AWS_ENDPOINT_URL). Files arrive under another name and are renamed when whole; a file that is there
with the right size is kept, so a second pod on the same claim, or a restart, goes on where the
first one was. Only the standard library, because it runs before anything else in the pod.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 4 * 2**20
ATTEMPTS = 5
TIMEOUT_S = 60.0
MAX_LISTING_BYTES = 64 * 2**20

# What a worker reads; the hub also holds other formats of the same weights.
SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".model")

Open = Callable[[urllib.request.Request], IO[bytes]]


class WeightsError(Exception):
    """The weights cannot be had; the message says what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch: its name below the folder, its size in bytes when known, its request."""

    name: str
    size: int | None
    request: urllib.request.Request


def _open(request: urllib.request.Request) -> IO[bytes]:
    response: IO[bytes] = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    return response


def _safe(name: str) -> str:
    """The name, refused when it would leave the folder."""
    parts = name.split("/")
    if not name or name.startswith("/") or "\\" in name or any(p in ("", ".", "..") for p in parts):
        raise WeightsError(f"file name {name!r} leaves the folder; the source is not to be trusted")
    return name


def hub_files(reference: str, env: Mapping[str, str], open_url: Open) -> list[RemoteFile]:
    """The files of hf://org/name[@revision].

    Raises WeightsError when the repository cannot be listed or holds no safetensors.
    """
    name, _, revision = reference.partition("@")
    revision = urllib.parse.quote(revision or "main", safe="")
    endpoint = env.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = env.get("HF_TOKEN", "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}

    def request(path: str) -> urllib.request.Request:
        return urllib.request.Request(f"{endpoint}/{path}", headers=headers)

    listing = request(f"api/models/{urllib.parse.quote(name)}/tree/{revision}?recursive=true")
    found: list[dict[str, Any]] = json.loads(_read(listing, open_url, f"hf://{reference}"))
    files = []
    for entry in found:
        if entry.get("type") != "file" or not str(entry.get("path", "")).endswith(SUFFIXES):
            continue
        path = _safe(str(entry["path"]))
        target = f"{urllib.parse.quote(name)}/resolve/{revision}/{urllib.parse.quote(path)}"
        files.append(RemoteFile(path, int(entry["size"]), request(target)))
    return _checked(files, f"hf://{reference}")


def s3_files(reference: str, env: Mapping[str, str], open_url: Open) -> list[RemoteFile]:
    """The files of s3://bucket/prefix.

    Raises WeightsError when the bucket cannot be listed or holds no safetensors there.
    """
    bucket, _, prefix = reference.partition("/")
    prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
    region = env.get("AWS_REGION", "us-east-1")
    endpoint = env.get("AWS_ENDPOINT_URL", f"https://s3.{region}.amazonaws.com").rstrip("/")
    files: list[RemoteFile] = []
    token = ""
    while True:
        query = {"list-type": "2", "prefix": prefix}
        if token:
            query["continuation-token"] = token
        listing = _signed(f"{endpoint}/{bucket}", query, env, region)
        root = ET.fromstring(_read(listing, open_url, f"s3://{reference}"))
        space = root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""
        for entry in root.iter(f"{space}Contents"):
            key = entry.findtext(f"{space}Key") or ""
            size = int(entry.findtext(f"{space}Size") or 0)
            if key.endswith("/") or not key.endswith(SUFFIXES):
                continue
            url = f"{endpoint}/{bucket}/{urllib.parse.quote(key)}"
            files.append(
                RemoteFile(_safe(key.removeprefix(prefix)), size, _signed(url, {}, env, region))
            )
        token = root.findtext(f"{space}NextContinuationToken") or ""
        if not token:
            return _checked(files, f"s3://{reference}")


def _checked(files: list[RemoteFile], source: str) -> list[RemoteFile]:
    if not any(f.name.endswith(".safetensors") for f in files):
        raise WeightsError(f"{source} holds no .safetensors file; name a folder in that format")
    return files


def _signed(
    url: str, query: Mapping[str, str], env: Mapping[str, str], region: str
) -> urllib.request.Request:
    """A GET request signed with AWS Signature Version 4; unsigned without credentials."""
    pairs = sorted(
        (urllib.parse.quote(k, safe=""), urllib.parse.quote(v, safe="")) for k, v in query.items()
    )
    canonical_query = "&".join(f"{k}={v}" for k, v in pairs)
    full = f"{url}?{canonical_query}" if canonical_query else url
    key, secret = env.get("AWS_ACCESS_KEY_ID"), env.get("AWS_SECRET_ACCESS_KEY")
    if not key or not secret:
        return urllib.request.Request(full)
    parts = urllib.parse.urlsplit(url)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    empty = hashlib.sha256(b"").hexdigest()
    headers = {"host": parts.netloc, "x-amz-content-sha256": empty, "x-amz-date": stamp}
    if session := env.get("AWS_SESSION_TOKEN"):
        headers["x-amz-security-token"] = session
    names = ";".join(sorted(headers))
    canonical = "\n".join(
        [
            "GET",
            parts.path,
            canonical_query,
            *(f"{n}:{headers[n]}" for n in sorted(headers)),
            "",
            names,
            empty,
        ]
    )
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}"
    signing = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        signing = hmac.digest(signing, part.encode(), "sha256")
    signature = hmac.digest(signing, text.encode(), "sha256").hex()
    headers["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return urllib.request.Request(full, headers=headers)


def _read(request: urllib.request.Request, open_url: Open, source: str) -> bytes:
    try:
        with open_url(request) as response:
            return response.read(MAX_LISTING_BYTES)
    except urllib.error.HTTPError as error:
        hint = {
            401: "give a token in weights.secretRef",
            403: "give a token or key with access in weights.secretRef",
            404: "check the name and revision",
        }.get(error.code, "try again later")
        raise WeightsError(f"{source}: HTTP {error.code}; {hint}") from error
    except (urllib.error.URLError, OSError) as error:
        raise WeightsError(f"{source}: no connection ({error}); check the network") from error


def fetch(
    files: Sequence[RemoteFile],
    folder: Path,
    open_url: Open,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Bring all files into the folder; whole ones are kept, broken ones tried again.

    Raises WeightsError when a file still fails after several attempts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files, 1):
        target = folder / file.name
        if target.exists() and file.size in (None, target.stat().st_size):
            say(f"{number}/{len(files)} {file.name}: there already")
            continue
        for attempt in range(1, ATTEMPTS + 1):
            try:
                size = _fetch_one(file, target, open_url)
                say(f"{number}/{len(files)} {file.name}: {size / 1e6:.1f} MB")
                break
            except (OSError, ValueError) as error:
                if attempt == ATTEMPTS:
                    raise WeightsError(f"{file.name}: {error}; gave up after {attempt}") from error
                say(f"{file.name}: {error}; trying again")
                sleep(float(2**attempt))


def _fetch_one(file: RemoteFile, target: Path, open_url: Open) -> int:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two pods may share the claim: each writes its own part file, the rename is atomic.
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    size = 0
    try:
        with open_url(file.request) as response, part.open("wb") as out:
            while chunk := response.read(CHUNK_BYTES):
                out.write(chunk)
                size += len(chunk)
        if file.size is not None and size != file.size:
            raise ValueError(f"{size} bytes arrived instead of {file.size}")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return size


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch URI into FOLDER; the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if len(args) != 2:
        sys.stderr.write("usage: python -m tandem_worker.models.download URI FOLDER\n")
        return 2
    uri, folder = args[0], Path(args[1])
    scheme, _, reference = uri.partition("://")
    listers = {"hf": hub_files, "s3": s3_files}
    if scheme not in listers:
        sys.stderr.write(f"{uri}: cannot be downloaded; use hf:// or s3://\n")
        return 2
    try:
        files = listers[scheme](reference, os.environ, _open)
        fetch(files, folder, _open, lambda text: print(text, flush=True))
    except WeightsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
