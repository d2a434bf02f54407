"""Secrets in files are read anew: the first line is sent, every one is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem_router.api.api_keys import key_hash, read_secret
from tandem_router.config.secret_file import SecretFile
from tandem_router.errors import ConfigError
from tandem_router.testing.two_tiers import Scores, both


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 2.0
        return self.now


def test_a_changed_file_is_read_and_one_that_is_away_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old\n")
    secret = SecretFile(file, Clock())

    assert secret() == (b"old",)
    file.write_text("new\nold\n")
    assert secret() == (b"new", b"old")
    for broken in ("", "\n\n", "a\nb\nc\nd\ne\n"):
        file.write_text(broken)
        assert secret() == (b"new", b"old")
    file.unlink()
    assert secret() == (b"new", b"old")


def test_a_file_is_looked_at_once_a_second(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    secret = SecretFile(file, lambda: 5.0)
    file.write_text("new")

    assert secret() == (b"old",)


@pytest.mark.parametrize("text", ["", "short"])
def test_a_secret_of_hashes_that_is_too_short_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)

    with pytest.raises(ConfigError, match=r"lines|use at least 16"):
        read_secret(tmp_path / "key")


def test_a_secret_of_random_bytes_is_one_line(tmp_path: Path) -> None:
    secret = b"\xff" * 8 + b"\n" + b"\xfe" * 8
    (tmp_path / "key").write_bytes(secret)

    assert read_secret(tmp_path / "key") == secret


async def test_the_token_of_workers_changes_without_a_restart(
    run_router: Any, make_worker: Any
) -> None:
    tokens = [b"old"]
    table = await both(make_worker)
    options = {"predictor": Scores(0.5, 0.7), "peer_token": lambda: tuple(tokens)}

    async with run_router(table, **options) as (client, app):

        async def status(token: str) -> int:
            headers = {"x-tandem-peer-token": token}
            return int((await client.request("GET", "/admin/settings", None, headers)).status)

        answers = []
        for now in ([b"old"], [b"old", b"new"], [b"new", b"old"], [b"new"]):
            tokens[:] = now
            assert app.services.peer_token == now[0].decode()
            answers.append((await status("old"), await status("new")))

    assert answers == [(200, 401), (200, 200), (200, 200), (401, 200)]


async def test_the_secret_of_tenants_keys_changes_with_their_hashes(
    run_router: Any, make_worker: Any
) -> None:
    """Both secrets in the file, then the new hashes, then the old secret goes."""
    old, new = b"o" * 16, b"n" * 16
    secrets = [old]
    table = await both(make_worker)
    tenants = [{"name": "a", "key_hashes": [key_hash(old, "mine")]}]
    options = {"predictor": Scores(0.5, 0.7), "key_secret": lambda: tuple(secrets)}

    async with run_router(table, tenants=tenants, **options) as (_, app):
        assert app.keys.caller("mine") is not None
        secrets[:] = [new, old]
        assert app.keys.caller("mine").tenant.name == "a"
        hashed_anew = app.config.tenants[0].model_copy(
            update={"key_hashes": [key_hash(new, "mine")]}
        )
        app.keys.reconfigure([hashed_anew])
        secrets[:] = [new]
        assert app.keys.caller("mine").tenant.name == "a"
