"""Two releases and one namespace: the second stands still, says so once, and takes over later."""

from __future__ import annotations

from typing import Any

from stored_cluster import NOW, SPLIT, write
from tandem_operator.local.store import Store
from tandem_operator.plan import Settings
from tandem_operator.reconcile.namespace_claim import CLAIM, NamespaceClaims, Release
from tandem_operator.reconcile.reconciler import Reconciler
from tandem_operator.reconcile.requeue import Key, Result

Object = dict[str, Any]
ONE, TWO = Release("a", "one"), Release("b", "two")


class Two:
    """One store, two reconcilers, and which releases run."""

    def __init__(self) -> None:
        self.store = Store()
        self.running = {ONE, TWO}
        self.by = {release: self._reconciler(release) for release in (ONE, TWO)}
        write(self.store, SPLIT)

    def _reconciler(self, release: Release) -> Reconciler:
        claims = NamespaceClaims(self.store, release, self._runs)
        settings = Settings(worker_image=f"{release.name}:1")
        return Reconciler(api=self.store, settings=settings, now=lambda: NOW, claims=claims)

    async def _runs(self, release: Release) -> bool:
        return release in self.running

    async def passes(self, release: Release, times: int = 2) -> Result:
        for _ in range(times):
            result = await self.by[release].reconcile(Key("Model", "default", "m"))
        return result

    def claim(self) -> Object | None:
        return self.store.read("ConfigMap", "default", CLAIM)

    def image(self) -> str:
        found = self.store.read("Deployment", "default", "m-decode")
        assert found is not None
        image: str = found["spec"]["template"]["spec"]["containers"][0]["image"]
        return image

    def events(self, reason: str) -> list[str]:
        return [e["message"] for e in self.store.find("Event") if e["reason"] == reason]


async def test_the_second_release_writes_nothing_and_says_once_whose_namespace_it_is() -> None:
    two = Two()
    await two.passes(ONE)
    before = list(two.store.find("Deployment"))

    result = await two.passes(TWO, times=3)

    assert result.writes == 0
    assert result.again_s == 30.0
    assert two.store.find("Deployment") == before
    assert two.image() == "one:1"
    (said,) = two.events("OtherRelease")
    assert said.startswith(
        "release one in namespace a looks after this namespace, so release two in namespace b "
        "leaves it alone; uninstall one of them, or give them different watchNamespaces."
    )
    assert (await two.passes(ONE)).writes == 0


async def test_a_release_that_is_gone_leaves_its_namespaces_to_the_next() -> None:
    two = Two()
    await two.passes(ONE)
    two.running.discard(ONE)

    await two.passes(TWO)

    claim = two.claim()
    assert claim is not None
    assert claim["data"] == {"namespace": "b", "release": "two"}
    assert two.image() == "two:1"


async def test_a_namespace_is_given_back_with_its_last_resource() -> None:
    two = Two()
    await two.passes(ONE)
    two.store.remove("Model", "default", "m")

    await two.passes(TWO, times=1)
    assert two.claim() is not None
    await two.passes(ONE, times=1)
    assert two.claim() is None


async def test_a_claim_without_a_release_in_it_is_nobodys() -> None:
    two = Two()
    body = {"apiVersion": "v1", "kind": "ConfigMap", "data": {"mine": "x"}}
    two.store.write({**body, "metadata": {"name": CLAIM, "namespace": "default"}}, manager="user")

    await two.passes(ONE)

    assert two.image() == "one:1"
