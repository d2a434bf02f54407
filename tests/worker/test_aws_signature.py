"""Requests to S3 are signed as AWS says: held against the examples that its manual publishes.

"Signature Calculations for the Authorization Header: Transferring Payload in a Single Chunk",
Amazon S3 API Reference, sig-v4-header-based-auth.html.
"""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tandem_worker.models.aws_credentials import Keys
from tandem_worker.models.aws_signature import signed_headers

KEYS = Keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
URL = "https://examplebucket.s3.amazonaws.com/"
THEN = datetime(2013, 5, 24, tzinfo=UTC)


@pytest.mark.parametrize(
    ("query", "signature"),
    [
        ("lifecycle=", "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        ("max-keys=2&prefix=J", "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    ],
    ids=["get bucket lifecycle", "list objects"],
)
def test_a_request_is_signed_as_in_the_manual(query: str, signature: str) -> None:
    headers = signed_headers(KEYS, "us-east-1", "GET", URL, query, THEN)

    assert headers["authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
        f"SignedHeaders=host;x-amz-content-sha256;x-amz-date, Signature={signature}"
    )
