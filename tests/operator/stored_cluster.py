"""A store with a reconciler, and YAML to put into it: what tests of reconciling begin with."""

from __future__ import annotations

import json
from typing import Any

from objects_table import model
from tandem_operator.local.store import Store
from tandem_operator.manifests import load_text
from tandem_operator.plan import Settings
from tandem_operator.plan.model_status import LinkTest, Measured, WorkerReports
from tandem_operator.reconcile.reconciler import Reconciler
from tandem_operator.reconcile.requeue import Key, Result
from tandem_operator.resources.base import Object

NOW = "2026-01-01T00:00:00Z"
HIDDEN = (("image:///", "file:///in-an-image/"), ("file://./", "file:///beside-the-yaml/"))

SPLIT = model(
    '  prefill: {replicas: 1, usdPerHour: "0.5"}\n  decode: {replicas: 2, usdPerHour: "0.5"}\n'
)


def pair(small: str, large: str, router: str = "") -> str:
    """Models `s` and `l` with these lines of their specs, and Router `r` over both."""
    return f"""\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {{name: s}}
spec:
  weights: {{source: "file:///models/s"}}
{small}---
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {{name: l}}
spec:
  weights: {{source: "file:///models/l"}}
{large}---
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {{name: r}}
spec:
  tiers:
  - {{name: small, modelRef: {{name: s}}}}
  - {{name: large, modelRef: {{name: l}}, maxShare: "0.5"}}
{router}"""


BOTH = pair(
    '  unified: {usdPerHour: "0.1"}\n',
    '  prefill: {usdPerHour: "0.5"}\n  decode: {usdPerHour: "0.5"}\n',
    '  slo: {ttft: {target: 500ms}}\n  budget: {usdPerHour: "2"}\n',
)


def as_stored(text: str) -> list[Object]:
    """The objects as an apiserver keeps them: paths that local mode resolves stay as written."""
    for path, hidden in HIDDEN:
        text = text.replace(path, hidden)
    stored = json.dumps([manifest.obj for manifest in load_text(text)])
    for path, hidden in HIDDEN:
        stored = stored.replace(hidden, path)
    objects: list[Object] = json.loads(stored)
    return objects


def write(store: Store, text: str) -> None:
    """Put objects into a store as a user would."""
    for obj in as_stored(text):
        metadata = {"namespace": "default", **obj["metadata"]}
        store.write({**obj, "metadata": metadata}, manager="user")


class Cluster:
    """A store with a reconciler, and pods that a test makes ready."""

    def __init__(self, text: str = SPLIT, settings: Settings | None = None) -> None:
        self.store = Store()
        self.link = LinkTest(True, "tested")
        self.weights: dict[str, dict[str, str]] = {}
        self.measured: dict[str, Measured] = {}
        self.reconciler = Reconciler(
            api=self.store,
            settings=settings or Settings(),
            now=lambda: NOW,
            link_tester=self._link,
            reports=self._reports,
        )
        self.apply(text)

    async def _link(self, _: list[Object]) -> LinkTest:
        return self.link

    async def _reports(self, pods: list[Object]) -> WorkerReports:
        names = {pod["metadata"]["name"] for pod in pods}
        return WorkerReports(
            {name: w for name, w in self.weights.items() if name in names},
            measured={name: m for name, m in self.measured.items() if name in names},
        )

    def apply(self, text: str) -> None:
        write(self.store, text)

    async def reconcile(self, kind: str = "Model", name: str = "m") -> Result:
        return await self.reconciler.reconcile(Key(kind, "default", name))

    async def settle(self) -> int:
        """Reconcile all until nothing is written; the number of rounds."""
        for rounds in range(1, 10):
            writes = 0
            for kind in ("Model", "Router", "AutoscalingPolicy"):
                for obj in self.store.find(kind):
                    writes += (await self.reconcile(kind, obj["metadata"]["name"])).writes
            if writes == 0:
                return rounds
        raise AssertionError("does not settle")

    def get(self, kind: str, name: str) -> Object:
        found = self.store.read(kind, "default", name)
        assert found is not None, f"{kind} {name}"
        return found

    def names(self, kind: str) -> list[str]:
        return sorted(o["metadata"]["name"] for o in self.store.find(kind))

    def start_pods(self, **status: Any) -> None:
        """A ready pod for each replica of each Deployment, as controllers would make them."""
        for deployment in self.store.find("Deployment"):
            template = deployment["spec"]["template"]
            for i in range(deployment["spec"]["replicas"]):
                self.store.write(
                    {
                        "apiVersion": "v1",
                        "kind": "Pod",
                        "metadata": {
                            "name": f"{deployment['metadata']['name']}-{i}",
                            "namespace": "default",
                            "labels": template["metadata"]["labels"],
                        },
                        "spec": template["spec"],
                        "status": status
                        or {
                            "podIP": f"127.9.0.{i + 2}",
                            "conditions": [{"type": "Ready", "status": "True"}],
                        },
                    },
                    manager="kubelet",
                )

    def condition(self, kind: str, name: str, condition: str) -> Object:
        conditions = self.get(kind, name)["status"]["conditions"]
        return next(c for c in conditions if c["type"] == condition)
