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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem_router.config import TenantConfig
from tandem_router.config.secret_file import SecretFile
from tandem_router.errors import ApiError, ConfigError
from tandem_router.store.records import Key
from tandem_router.store.writer import Store


def key_hash(secret: bytes, key: str) -> str:
    return "hmac-sha256:" + hmac.new(secret, key.encode(), hashlib.sha256).hexdigest()


def read_secret(path: Path) -> bytes:
    """The secret of at least 16 bytes that new keys are hashed with. Raises ConfigError."""
    return SecretFile(path, least_bytes=16)()[0]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a tenant, and which of its keys."""

    tenant: TenantConfig
    key: str | None = None  # its id


class Authenticator:
    """Finds the tenant of a key; without configured tenants everybody is anonymous.

    Keys come from the configuration and, minted at run time, from the store; a key that either
    says is revoked works nowhere. secrets_now: of the configured hashes, read anew: new keys
    are hashed with the first, or with the store's own where there is none, and all are tried.
    """

    def __init__(
        self,
        tenants: Sequence[TenantConfig],
        secrets_now: Callable[[], Sequence[bytes]],
        store: Store,
        wall_clock: Callable[[], float],
    ) -> None:
        self._secrets = secrets_now
        self._store = store
        self._wall_clock = wall_clock
        self._tenants: dict[str, TenantConfig] = {}
        self._by_hash: dict[str, Key] = {}
        self.reconfigure(tenants)

    def reconfigure(self, tenants: Sequence[TenantConfig]) -> None:
        """Take other tenants. Raises ConfigError where their hashes have no secret."""
        if any(tenant.key_hashes for tenant in tenants) and not self._secrets():
            raise ConfigError("tenants have key hashes, so --key-secret-file is needed")
        self._tenants = {tenant.name: tenant for tenant in tenants}
        self.refresh()

    @property
    def required(self) -> bool:
        return bool(self._tenants)

    def listed(self) -> list[Key]:
        """All keys, configured and minted, by id; none of them is a key in itself."""
        return sorted(self._by_hash.values(), key=lambda key: (key.tenant, key.created, key.id))

    def refresh(self) -> None:
        """Look at the configured and the stored keys again."""
        configured = {
            entry: Key(key_id(entry), tenant.name, entry, 0.0)
            for tenant in self._tenants.values()
            for entry in tenant.key_hashes
        }
        stored = {key.hash: key for key in self._store.keys.values()}
        self._by_hash = {**configured, **stored}

    def mint(self, tenant: str, **limits: Any) -> tuple[str, Key]:
        """A new key and what is stored of it. Raises ApiError for an unknown tenant."""
        if tenant not in self._tenants:
            names = ", ".join(self._tenants) or "there are none"
            raise ApiError(404, f"there is no tenant {tenant[:100]!r}; tenants: {names}")
        secret = self._minting_secret()
        if secret is None:
            raise ApiError(
                503,
                f"no key can be minted while the store is away: {self._store.health.error}",
                type="service_unavailable",
                retry=True,
                retry_after_s=5.0,
            )
        text = "tdm-" + secrets.token_urlsafe(32)
        entry = key_hash(secret, text)
        return text, Key(key_id(entry), tenant, entry, self._wall_clock(), **limits)

    def _minting_secret(self) -> bytes | None:
        return next(iter(self._accepted()), None)

    def _accepted(self) -> Sequence[bytes]:
        """The secrets that a key may be hashed with: those of the file, or the store's own."""
        if given := self._secrets():
            return given
        return (self._store.secret.encode(),) if self._store.secret is not None else ()

    def caller(self, api_key: str | None) -> Caller | None:
        """Whose the key is; None where anybody may ask. Raises ApiError (401)."""
        if not self._tenants:
            return None
        if not api_key:
            raise ApiError(
                401,
                "no API key given; send `Authorization: Bearer <key>`",
                type="authentication_error",
                code="missing_api_key",
            )
        # The hash is keyed, so how long finding it takes says nothing about any key.
        hashes = [key_hash(secret, api_key) for secret in self._accepted()]
        found = next((self._by_hash[h] for h in hashes if h in self._by_hash), None)
        tenant = self._tenants.get(found.tenant) if found is not None else None
        if found is None or tenant is None:
            raise ApiError(
                401,
                "the API key is not known here",
                type="authentication_error",
                code="invalid_api_key",
            )
        if not found.works(self._wall_clock()):
            state = "was revoked" if found.revoked is not None else "has expired"
            raise ApiError(
                401,
                f"the API key {found.id} {state}; ask for another one",
                type="authentication_error",
                code="invalid_api_key",
            )
        return Caller(tenant, found.id)


def key_id(entry: str) -> str:
    """Short name of a key, by which it is listed and revoked."""
    return entry.rpartition(":")[2][:12]


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
