"""A token is changed while everybody uses it, and nobody is ever refused."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_operator.local.store import Store
from tandem_operator.plan.objects import PEER_SECRET, peer_secret
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.reconcile.pod_client import peer_token
from tandem_operator.reconcile.rotation import ASKED, LOOK_S, STEP_S, TokenRotation, next_step


class Cluster:
    """One namespace's Secret, and a clock."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.store = Store()
        self.store.add(peer_secret("ns", "old"))
        self.rotation = TokenRotation(self.store, lambda: self.now)

    def ask(self, value: str) -> None:
        self.store.change(
            "Secret", "ns", PEER_SECRET, {"metadata": {"annotations": {ASKED: value}}}
        )

    @property
    def lines(self) -> tuple[str, ...]:
        secret = self.store.read("Secret", "ns", PEER_SECRET)
        assert secret is not None
        return tuple(base64.b64decode(secret["data"]["token"]).decode().split())

    async def run(self, seconds: float) -> list[tuple[str, ...]]:
        """What the Secret held, in order, while passes came every ten seconds."""
        held = [self.lines]
        for _ in range(int(seconds // 10)):
            self.now += 10
            await self.rotation.step("ns")
            if self.lines != held[-1]:
                held.append(self.lines)
        return held


async def test_without_being_asked_nothing_changes() -> None:
    assert await Cluster().run(3600) == [("old",)]


async def test_the_new_token_is_accepted_then_sent_then_alone() -> None:
    cluster = Cluster()
    cluster.ask("today")

    first, added, sent, alone = await cluster.run(3 * (STEP_S + LOOK_S))

    new = alone[0]
    assert (first, added, sent) == (("old",), ("old", new), (new, "old"))
    assert await peer_token(cluster.store, "ns") == new
    assert await cluster.run(3600) == [(new,)]  # once for each time that it is asked
    cluster.ask("tomorrow")
    assert len(await cluster.run(3 * (STEP_S + LOOK_S))) == 4


@given(st.lists(st.floats(0, STEP_S), min_size=2, max_size=6))
async def test_no_pod_sends_what_another_refuses_however_late_its_file_is(
    lags: list[float],
) -> None:
    """Pods see the Secret as it was up to a step ago, each with a lag of its own."""
    cluster = Cluster()
    cluster.ask("today")
    history = [(cluster.now, cluster.lines)]
    for _ in range(int(4 * STEP_S // 10)):
        cluster.now += 10
        await cluster.rotation.step("ns")
        history.append((cluster.now, cluster.lines))
        seen = [
            next(lines for at, lines in reversed(history) if at <= max(cluster.now - lag, 1e6))
            for lag in lags
        ]
        for sender in seen:
            assert all(sender[0] in receiver for receiver in seen)
    assert len(cluster.lines) == 1


async def test_a_token_written_by_hand_in_between_ends_the_rotation() -> None:
    cluster = Cluster()
    cluster.ask("today")
    await cluster.run(LOOK_S)
    by_hand = {"data": {"token": base64.b64encode(b"mine").decode()}}
    cluster.store.change("Secret", "ns", PEER_SECRET, by_hand)

    assert (await cluster.run(3 * STEP_S))[-1] == ("mine",)


async def test_a_secret_that_changed_meanwhile_is_read_again() -> None:
    cluster = Cluster()
    cluster.ask("today")
    stale = cluster.store.read("Secret", "ns", PEER_SECRET)
    assert stale is not None
    cluster.ask("now")
    with pytest.raises(ApiError, match="has changed"):
        await cluster.store.patch_secret("ns", PEER_SECRET, {"metadata": stale["metadata"]})


def test_a_secret_without_a_token_is_left_alone() -> None:
    assert next_step([], {ASKED: "x"}, 0.0, "new") is None
