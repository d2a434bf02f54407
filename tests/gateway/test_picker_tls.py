"""The certificate that a gateway is shown: checked at the start, renewed while it serves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from certificates import write_pair
from tandem_router.api.app import RouterApp
from tandem_router.config import RouterConfig
from tandem_router.errors import ConfigError
from tandem_router.gateway import messages
from tandem_router.gateway.certificate import CertificateFolder
from tandem_router.gateway.server import serving
from tandem_router.testing.two_tiers import CONFIG


async def healthy(port: int, trusted: bytes) -> bool:
    """Whether a gateway that trusts this certificate gets an answer."""
    credentials = grpc.ssl_channel_credentials(trusted)
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
        check = channel.unary_unary(
            f"/{messages.HEALTH_SERVICE}/Check",
            request_serializer=messages.HealthCheckRequest.SerializeToString,
            response_deserializer=messages.HealthCheckResponse.FromString,
        )
        try:
            answer = await check(messages.HealthCheckRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:  # no handshake
                raise
            return False
    return bool(answer.status == messages.SERVING)


async def test_each_handshake_takes_the_newest_pair_that_can_be_used(tmp_path: Path) -> None:
    first = write_pair(tmp_path, "first")
    limits = SimpleNamespace(max_body_bytes=1024)
    front: Any = SimpleNamespace(services=SimpleNamespace(config=SimpleNamespace(limits=limits)))
    folder = CertificateFolder(tmp_path)
    async with serving(front, "127.0.0.1", 0, lambda: True, 0.0, folder) as port:
        assert await healthy(port, first)

        second = write_pair(tmp_path, "second")
        assert await healthy(port, second)
        assert not await healthy(port, first)

        (tmp_path / "tls.crt").write_text("half a certificate")
        assert await healthy(port, second)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tls.key", None, "tls.key cannot be read: No such file"),
        ("tls.crt", "nothing of the kind", "are no pair of a PEM certificate and its key"),
        ("tls.key", "another", "are no pair of a PEM certificate and its key"),
    ],
)
def test_a_folder_without_a_pair_is_refused_at_the_start(
    tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    write_pair(tmp_path, "x")
    if content is None:
        (tmp_path / name).unlink()
    elif content == "another":
        write_pair(tmp_path / "other", "y")
        (tmp_path / "other" / name).rename(tmp_path / name)
    else:
        (tmp_path / name).write_text(content)

    with pytest.raises(ConfigError, match=said):
        CertificateFolder(tmp_path)


def test_a_certificate_without_the_port_that_shows_it_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "x")
    table = tmp_path / "endpoints.json"
    table.write_text('{"tiers": {}}')

    with pytest.raises(ConfigError, match="set gateway_port, too"):
        RouterApp(RouterConfig.model_validate(CONFIG), endpoints_path=table, gateway_tls=tmp_path)
