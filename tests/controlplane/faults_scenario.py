"""Operators on a bad day, run inside the cluster's network: prints what happened as JSON.

usage: faults_scenario.py {converge,leader} PKI SEED
Each scenario starts operators as processes behind `ApiProxy`, disturbs them, and reports counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

from apiproxy import ApiProxy, Faults, Write
from tandem_operator.kube.client import KubeApi, connect, path
from tandem_operator.manifests import load_text
from tandem_operator.plan import Settings, plan_model, plan_router
from tandem_operator.plan.decode import parse
from tandem_operator.plan.objects import MANAGED, PEER_SECRET, REVISION_LABEL
from tandem_operator.reconcile.children import OBSERVED_KINDS
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.reconcile.drift import needs_apply, stamp
from tandem_operator.resources import Model
from tandem_operator.resources.base import Object

FAULTS_PER_LIFE = 12  # of one operator process
# kopf asks for more before it watches, which leaves fewer faults to writes and events.
KINDS_PER_LIFE = 4
SERVER = "https://10.77.0.1:6443"
CLUSTERS_OWN = {("ServiceAccount", "default"), ("ConfigMap", "kube-root-ca.crt")}
NOWHERE = '{nodeSelector: {nowhere: "true"}'

# Pods fit on no node, so that nothing but objects is made.
PAIR = f"""\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {{name: s}}
spec:
  weights: {{source: "pvc://claim/s"}}
  unified: {NOWHERE}, replicas: 2}}
---
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {{name: l}}
spec:
  weights: {{source: "pvc://claim/l"}}
  prefill: {NOWHERE}, replicas: 1}}
  decode: {NOWHERE}, replicas: 2}}
---
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {{name: r}}
spec:
  tiers:
  - {{name: small, modelRef: {{name: s}}}}
  - {{name: large, modelRef: {{name: l}}}}
  podPatch: {{spec: {{nodeSelector: {{nowhere: "true"}}}}}}
"""
CHANGED = PAIR.replace(
    f"prefill: {NOWHERE}, replicas: 1}}\n  decode: {NOWHERE}, replicas: 2}}",
    f"unified: {NOWHERE}, replicas: 3}}",
)


class Operator:
    """`python -m tandem_operator` behind a proxy of its own."""

    def __init__(self, proxy: ApiProxy, folder: Path, namespace: str, *arguments: str) -> None:
        self.proxy = proxy
        self.log = folder / f"{proxy.name}.log"
        self._kubeconfig = folder / f"{proxy.name}.kubeconfig"
        self._kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "c", "cluster": {"server": proxy.url}}],
                    "users": [{"name": "u", "user": {}}],
                    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                    "current-context": "x",
                }
            )
        )
        self._arguments = ("--namespace", namespace, "--port", "0", *arguments)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = {**os.environ, "POD_NAME": self.proxy.name, "POD_IP": "127.0.0.1"}
        command = [sys.executable, "-m", "tandem_operator", "--kubeconfig", str(self._kubeconfig)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*command, *self._arguments],
                env=env,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    async def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None


def tls(pki: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
    return context


class User:
    """What people do to the cluster, through the front door."""

    def __init__(self, api: KubeApi, namespace: str) -> None:
        self.api = api
        self.namespace = namespace

    async def apply(self, text: str) -> None:
        for manifest in load_text(text):
            metadata = {**manifest.obj["metadata"], "namespace": self.namespace}
            obj = {**manifest.obj, "metadata": metadata}
            target = path(obj["kind"], self.namespace, metadata["name"])
            query = {"fieldManager": "user", "force": "true"}
            await self.api.write("PATCH", target, query, obj, "application/apply-patch+yaml")

    async def patch(self, kind: str, name: str, body: Object) -> None:
        target = path(kind, self.namespace, name)
        with contextlib.suppress(ApiError):  # not there yet, or gone again
            await self.api.write("PATCH", target, {}, body, "application/merge-patch+json")

    async def damage(self, rng: random.Random) -> None:
        """One of the things that people and controllers do to a child of the Router or a Model."""
        kind, name = rng.choice(
            [
                ("Service", "s-unified"),
                ("Deployment", "s-unified"),
                ("Deployment", "r-router"),
                ("WorkerPool", "s-unified"),
                ("Role", "r-router"),
                ("NetworkPolicy", "s-worker"),
                ("PodDisruptionBudget", "r-router"),
                ("ServiceAccount", "s-worker"),
            ]
        )
        how = rng.choice(["delete", "labels", "edit"])
        if how == "delete":
            await self.api.delete(kind, self.namespace, name)
        elif how == "labels":
            labels = dict.fromkeys([*MANAGED, "tandem.dev/model", "tandem.dev/router"])
            await self.patch(kind, name, {"metadata": {"labels": labels}})
        elif kind == "Deployment":
            await self.patch(kind, name, {"spec": {"replicas": 9}})
        elif kind == "Service":
            await self.patch(kind, name, {"spec": {"selector": {"somebody": "else"}}})
        elif kind == "Role":
            await self.patch(kind, name, {"rules": []})


async def planned(api: KubeApi, namespace: str) -> dict[tuple[str, str], Object]:
    """Every object that should exist for what the user asked for."""
    settings = Settings()
    objects: list[Object] = []
    models = {}
    for obj in await api.select("Model", namespace):
        model = parse(obj)
        assert isinstance(model, Model), model
        models[obj["metadata"]["name"]] = model
        pools = await api.select("WorkerPool", namespace)
        objects += plan_model(model, pools, [], settings, "").apply
    for obj in await api.select("Router", namespace):
        objects += plan_router(parse(obj), models, [], settings, "").apply
    return {(o["kind"], o["metadata"]["name"]): stamp(o) for o in objects}


async def differences(api: KubeApi, namespace: str) -> list[str]:
    """What the cluster has otherwise than planned: lost, other, doubled, without its one owner."""
    wanted = await planned(api, namespace)
    found: list[str] = []
    live: dict[tuple[str, str], Object] = {}
    # The configuration of a revision lives as long as its pods.
    running = {_revision(pod) for pod in await api.select("Pod", namespace)} - {None}
    for kind in OBSERVED_KINDS:
        for obj in await api.select(kind, namespace):
            key = kind, obj["metadata"]["name"]
            live[key] = obj
            if key not in {*wanted, *CLUSTERS_OWN} and _revision(obj) not in running:
                found.append(f"too many: {key}")
    for key, obj in wanted.items():
        if needs_apply(live.get(key), obj):
            found.append(f"{'other' if key in live else 'lost'}: {key}")
        owners = live.get(key, {}).get("metadata", {}).get("ownerReferences") or []
        if len(owners) != 1:
            found.append(f"{len(owners)} owners: {key}")
    for key, obj in live.items():
        pods = obj["spec"].get("replicas") if key[0] == "Deployment" else None
        pool = live.get(("WorkerPool", key[1]))
        if pods is not None and pool is not None and pods != pool["spec"]["replicas"]:
            found.append(f"{key} has {pods} replicas, its pool {pool['spec']['replicas']}")
    if await api.get("Secret", namespace, PEER_SECRET) is None:
        found.append("lost: Secret")
    return found


def _revision(obj: Object) -> str | None:
    labels = obj["metadata"].get("labels") or {}
    return labels.get(REVISION_LABEL)


async def until(check: Callable[[], Awaitable[bool]], timeout_s: float) -> float:
    """Seconds until the check holds; the timeout where it never did."""
    began = time.monotonic()
    while time.monotonic() - began < timeout_s:
        if await check():
            return time.monotonic() - began
        await asyncio.sleep(0.2)
    return timeout_s


@contextlib.asynccontextmanager
async def setting(
    pki: Path, seed: int, names: Iterable[str]
) -> AsyncIterator[tuple[User, Faults, list[ApiProxy], list[Write], Path]]:
    """A namespace of its own, a direct client, and a proxy for each operator."""
    api = KubeApi(await connect(str(pki / "admin.kubeconfig")))
    namespace = f"faults-{seed}-{os.getpid()}"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
    await api.write("POST", "/api/v1/namespaces", {}, body)
    faults, writes = Faults(seed), list[Write]()
    proxies = [ApiProxy(name, SERVER, tls(pki), faults, writes) for name in names]
    for proxy in proxies:
        await proxy.start()
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield User(api, namespace), faults, proxies, writes, Path(folder)
        finally:
            for proxy in proxies:
                await proxy.close()
            await api.write("DELETE", f"/api/v1/namespaces/{namespace}", {}, None)
            await api.close()


async def converge(pki: Path, seed: int) -> Object:
    """Faults, damage, a change of the Model and three kills of the operator; then quiet."""
    rng = random.Random(seed)
    async with setting(pki, seed, ["operator"]) as (user, faults, proxies, writes, folder):
        operator = Operator(proxies[0], folder, user.namespace, "--resync-seconds", "2")
        try:
            faults.rate = 0.2
            operator.start()
            num_kills = 0
            for text in (PAIR, CHANGED, CHANGED):
                await user.apply(text)
                enough = faults.counts.total() + FAULTS_PER_LIFE
                kinds = KINDS_PER_LIFE * (num_kills + 1)

                async def bad_enough(enough: int = enough, kinds: int = kinds) -> bool:
                    await user.damage(rng)
                    return faults.counts.total() >= enough and len(faults.counts) >= kinds

                await until(bad_enough, 20.0)
                operator.kill()
                operator.start()
                num_kills += 1
            faults.rate = 0.0

            async def good() -> bool:
                return not await differences(user.api, user.namespace)

            took_s = await until(good, 40.0)
            left = await differences(user.api, user.namespace)
            await asyncio.sleep(1.0)
            before = len(writes)
            await asyncio.sleep(3.0)
            late = [f"{w.method} {w.path} {w.status}" for w in writes[before:]]

            # Deleted while nobody looks: owner references alone take everything along.
            operator.kill()
            for kind, name in (("Router", "r"), ("Model", "s"), ("Model", "l")):
                await user.api.delete(kind, user.namespace, name)

            async def gone() -> bool:
                return not await remaining(user)

            await until(gone, 60.0)  # the garbage collector's pace, not ours
            return {
                "faults": dict(faults.counts),
                "num_writes": len(writes),
                "num_kills": num_kills,
                "converged_s": round(took_s, 2),
                "differences": left,
                "late_writes": late,
                "remaining": await remaining(user),
                "log": operator.log.read_text(errors="replace")[-2000:] if left or late else "",
            }
        finally:
            operator.kill()


async def remaining(user: User) -> list[str]:
    """Children that outlived their owners."""
    return [
        f"{kind}/{obj['metadata']['name']}"
        for kind in OBSERVED_KINDS
        for obj in await user.api.select(kind, user.namespace, MANAGED)
    ]


LEASE_S = 3.0  # as short as a loaded machine allows


async def leader(pki: Path, seed: int) -> Object:
    """Two replicas with steady work; the leader is killed, stopped for too long, told to end."""
    rng = random.Random(seed)
    async with setting(pki, seed, ["a", "b"]) as (user, _, proxies, writes, folder):
        lease = ("--lease-namespace", user.namespace, "--lease-seconds", str(LEASE_S))
        replicas = {
            p.name: Operator(p, folder, user.namespace, "--resync-seconds", "2", *lease)
            for p in proxies
        }

        lease_path = path("Lease", user.namespace, "tandem-operator")

        def work() -> list[Write]:
            return [w for w in writes if "/leases" not in w.path and w.status < 300]

        async def disturb() -> None:
            while True:
                await user.damage(rng)
                await asyncio.sleep(0.1)

        async def taken_over(before: str) -> float:
            async def other_writes() -> bool:
                return bool(work()) and work()[-1].by != before

            return await until(other_writes, 20.0)

        for replica in replicas.values():
            replica.start()
        await user.apply(PAIR)
        disturbing = asyncio.create_task(disturb())
        handovers: dict[str, float] = {}
        ended: list[bool] = []
        try:
            await taken_over("nobody")
            await asyncio.sleep(1.0)
            for how in ("killed", "stopped", "ended"):
                first = replicas[work()[-1].by]
                if how == "killed":
                    first.kill()
                elif how == "stopped":
                    first.signal(signal.SIGSTOP)
                else:
                    first.signal(signal.SIGTERM)
                handovers[how] = round(await taken_over(first.proxy.name), 2)
                if how == "stopped":
                    # It wakes up in the middle of its work, while the other one leads.
                    first.signal(signal.SIGCONT)
                await until(first.ended, 20.0)
                ended.append(await first.ended())
                first.kill()
                asked = first.proxy.requests[lease_path]
                first.start()

                async def stands_by(proxy: ApiProxy = first.proxy, asked: int = asked) -> bool:
                    return proxy.requests[lease_path] > asked

                await until(stands_by, 20.0)
            await asyncio.sleep(1.0)
        finally:
            disturbing.cancel()
            await asyncio.gather(disturbing, return_exceptions=True)
            await user.api.settle(5.0)
            for replica in replicas.values():
                replica.signal(signal.SIGCONT)
                replica.kill()
        # In the order in which they set out: what is under way when its sender is stopped may take
        # effect late, no client can prevent that; but nobody may set out once another one has.
        authors = [w.by for w in sorted(work(), key=lambda w: w.began)]
        return {
            "handovers_s": handovers,
            "holders": [name for name, _ in itertools.groupby(authors)],
            "num_writes": len(authors),
            "ended": ended,
            "logs": {n: r.log.read_text(errors="replace")[-800:] for n, r in replicas.items()},
        }


async def main(scenario: str, pki: Path, seed: int) -> None:
    print(json.dumps(await {"converge": converge, "leader": leader}[scenario](pki, seed)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
