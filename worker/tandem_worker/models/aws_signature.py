"""AWS Signature Version 4 of a request to S3 that has no body. Pure."""

from __future__ import annotations

import hashlib
import hmac
import urllib.parse
from datetime import datetime

from tandem_worker.models.aws_credentials import Keys

EMPTY = hashlib.sha256(b"").hexdigest()


def signed_headers(
    keys: Keys, region: str, method: str, url: str, canonical_query: str, now: datetime
) -> dict[str, str]:
    """The headers that sign a request, `host` among them.

    Args:
        url: without a query; its path is sent as it is written.
        canonical_query: quoted pairs, sorted, as they are sent.
        now: in UTC.
    """
    parts = urllib.parse.urlsplit(url)
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    signed = {"host": parts.netloc, "x-amz-content-sha256": EMPTY, "x-amz-date": stamp}
    if keys.session:
        signed["x-amz-security-token"] = keys.session
    names = ";".join(sorted(signed))
    lines = [f"{name}:{signed[name]}" for name in sorted(signed)]
    canonical = "\n".join([method, parts.path, canonical_query, *lines, "", names, EMPTY])
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}"
    signing = f"AWS4{keys.secret}".encode()
    for part in scope.split("/"):
        signing = hmac.digest(signing, part.encode(), "sha256")
    signature = hmac.digest(signing, text.encode(), "sha256").hex()
    signed["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={keys.key}/{scope}, SignedHeaders={names}, "
        f"Signature={signature}"
    )
    return signed
