"""The certificate by which a gateway knows the picker, read again when it changes.

A folder holds `tls.crt` (with its chain) and `tls.key`, as a Secret of type kubernetes.io/tls is
mounted; cert-manager renews those while the router runs.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

from tandem_router.errors import ConfigError

logger = logging.getLogger("tandem.router")

CERTIFICATE, KEY = "tls.crt", "tls.key"


class CertificateFolder:
    """The pair as it is in the folder.

    Raises ConfigError at the start where it cannot be used; one that cannot be used later leaves
    the pair that was there in force.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held = self._read()
        self._refused = self._held

    def credentials(self) -> Any:
        """What a gRPC server listens with: each handshake takes the newest pair."""
        import grpc

        def configuration() -> Any:
            key, chain = self._held
            return grpc.ssl_server_certificate_configuration([(key, chain)])

        def changed() -> Any:
            return configuration() if self.renewed() else None

        return grpc.dynamic_ssl_server_credentials(configuration(), changed)

    def renewed(self) -> bool:
        """Whether the folder holds another pair than before, which is in force from now on."""
        try:
            found = self._bytes()
            if found in (self._held, self._refused):
                return False
            self._refused = found
            self._held = self._read()
        except ConfigError as error:
            logger.warning("%s; the certificate before it stays in force", error)
            return False
        logger.info("%s holds another certificate, which gateways are shown now", self._folder)
        return True

    def _bytes(self) -> tuple[bytes, bytes]:
        try:
            return (self._folder / KEY).read_bytes(), (self._folder / CERTIFICATE).read_bytes()
        except OSError as error:
            text = f"--gateway-tls {self._folder}: {error.filename} cannot be read"
            raise ConfigError(f"{text}: {error.strerror}") from error

    def _read(self) -> tuple[bytes, bytes]:
        """The pair, which OpenSSL has found to belong together."""
        pair = self._bytes()
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self._folder / CERTIFICATE,
                self._folder / KEY,
                password="",  # else OpenSSL asks at the terminal for one of an encrypted key
            )
        except (ssl.SSLError, OSError, ValueError) as error:
            raise ConfigError(
                f"--gateway-tls {self._folder}: {CERTIFICATE} and {KEY} are no pair of a PEM "
                f"certificate and its key ({getattr(error, 'reason', None) or error}); give those "
                "of a Secret of type kubernetes.io/tls"
            ) from error
        return pair
