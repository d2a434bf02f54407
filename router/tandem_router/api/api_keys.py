"""API keys: random, stored as keyed hashes, compared in constant time.

`python -m tandem_router.api.api_keys --key-secret-file FILE` prints a new key and its hash; the
hash goes into the configuration, the key to the tenant, and neither can be turned into the other
without the secret.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem_router.config import TenantConfig
from tandem_router.errors import ApiError, ConfigError


def key_hash(secret: bytes, key: str) -> str:
    return "hmac-sha256:" + hmac.new(secret, key.encode(), hashlib.sha256).hexdigest()


def read_secret(path: Path) -> bytes:
    """A secret of at least 16 bytes. Raises ConfigError."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(secret) < 16:
        raise ConfigError(f"{path}: the secret has {len(secret)} bytes; use at least 16")
    return secret


class Authenticator:
    """Finds the tenant of a key; without configured tenants everybody is anonymous."""

    def __init__(self, tenants: Sequence[TenantConfig], secret: bytes | None) -> None:
        self._hashes = [(entry, tenant) for tenant in tenants for entry in tenant.key_hashes]
        self._secret = secret
        self._required = bool(tenants)
        if self._hashes and secret is None:
            raise ConfigError("tenants have key hashes, so --key-secret-file is needed")

    def tenant(self, api_key: str | None) -> TenantConfig | None:
        """The key's tenant; None where anybody may ask. Raises ApiError (401)."""
        if not self._required:
            return None
        if not api_key:
            raise ApiError(
                401,
                "no API key given; send `Authorization: Bearer <key>`",
                type="authentication_error",
                code="missing_api_key",
            )
        presented = key_hash(self._secret or b"", api_key)
        found = None
        # Every entry is compared, so that timing says nothing about which one matched.
        for entry, tenant in self._hashes:
            if hmac.compare_digest(entry, presented):
                found = tenant
        if found is None:
            raise ApiError(
                401,
                "the API key is not known here",
                type="authentication_error",
                code="invalid_api_key",
            )
        return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tandem_router.api.api_keys",
        description="Make an API key and its keyed hash.",
    )
    parser.add_argument(
        "--key-secret-file",
        type=Path,
        required=True,
        help="file with the secret; made when it does not exist",
    )
    args = parser.parse_args(argv)
    path: Path = args.key_secret_file
    try:
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32) + "\n")
        secret = read_secret(path)
    except (OSError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    key = "tdm-" + secrets.token_urlsafe(32)
    print(f"key   {key}")
    print(f"hash  {key_hash(secret, key)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
