"""Observe, plan, apply, status: idempotent, repairing, explaining; on the in-memory store."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_operator.api import ApiError
from tandem_operator.local.store import Store
from tandem_operator.manifests import load_text
from tandem_operator.plan import Settings, plan_model, plan_router, revision_of
from tandem_operator.plan.objects import merge_patch
from tandem_operator.plan.status import LinkTest, first_blocker
from tandem_operator.reconcile import COST_ANNOTATION, Key, Reconciler, Result, contains, parse
from tandem_router.config import parse_config
from tandem_worker.config import WorkerConfig

sys.path.insert(0, str(Path(__file__).parent))
from objects_table import GOOD, model

Object = dict[str, Any]

SPLIT = model(
    '  prefill: {replicas: 1, usdPerHour: "0.5"}\n  decode: {replicas: 2, usdPerHour: "0.5"}\n'
)
NOW = "2026-01-01T00:00:00Z"
HIDDEN = (("image:///", "file:///in-an-image/"), ("file://./", "file:///beside-the-yaml/"))


def as_stored(text: str) -> list[Object]:
    """The objects as an apiserver keeps them: paths that local mode resolves stay as written."""
    for path, hidden in HIDDEN:
        text = text.replace(path, hidden)
    stored = json.dumps([manifest.obj for manifest in load_text(text)])
    for path, hidden in HIDDEN:
        stored = stored.replace(hidden, path)
    objects: list[Object] = json.loads(stored)
    return objects


class Cluster:
    """A store with a reconciler, and pods that a test makes ready."""

    def __init__(self, text: str = SPLIT, settings: Settings | None = None) -> None:
        self.store = Store()
        self.link = LinkTest(True, "tested")
        self.reconciler = Reconciler(
            api=self.store,
            settings=settings or Settings(),
            now=lambda: NOW,
            link_tester=self._link,
        )
        self.apply(text)

    async def _link(self, _: list[Object]) -> LinkTest:
        return self.link

    def apply(self, text: str) -> None:
        for obj in as_stored(text):
            metadata = {"namespace": "default", **obj["metadata"]}
            self.store.write({**obj, "metadata": metadata}, manager="user")

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


BOTH = """\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {name: s}
spec:
  weights: {source: "file:///models/s"}
  unified: {usdPerHour: "0.1"}
---
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {name: l}
spec:
  weights: {source: "file:///models/l"}
  prefill: {usdPerHour: "0.5"}
  decode: {usdPerHour: "0.5"}
---
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: r}
spec:
  tiers:
  - {name: small, modelRef: {name: s}}
  - {name: large, modelRef: {name: l}, maxShare: "0.5"}
  slo: {ttft: {target: 500ms}}
  budget: {usdPerHour: "2"}
"""


# Idempotence --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
async def test_a_second_pass_writes_nothing(name: str) -> None:
    cluster = Cluster(GOOD[name])

    await cluster.settle()
    before = cluster.store.num_writes
    await cluster.settle()

    assert cluster.store.num_writes == before


_ROLE = st.fixed_dictionaries(
    {"replicas": st.integers(1, 4), "gpus": st.sampled_from([0, 2, 4])},
    optional={
        "usdPerHour": st.sampled_from(["0.5", "3"]),
        "nodeSelector": st.just({"gpu": "h100"}),
        "podPatch": st.just({"spec": {"hostNetwork": True}}),
        "resources": st.just({"cpu": "2", "memory": "4Gi"}),
    },
)


@settings(max_examples=20, deadline=None)
@given(role=_ROLE, other=_ROLE, split=st.booleans(), pods=st.booleans())
async def test_any_model_settles_in_two_rounds_with_pods_or_without(
    role: Object, other: Object, split: bool, pods: bool
) -> None:
    roles = {"prefill": role, "decode": other} if split else {"unified": role}
    cluster = Cluster(_model_yaml(roles))
    await cluster.reconcile()
    if pods:
        cluster.start_pods()

    assert await cluster.settle() <= 3


def _model_yaml(roles: Mapping[str, Object]) -> str:
    lines = "".join(f"  {name}: {json.dumps(role)}\n" for name, role in roles.items())
    return model(lines)


# Repair -------------------------------------------------------------------------------------


async def test_a_deleted_or_edited_child_comes_back() -> None:
    cluster = Cluster()
    await cluster.settle()
    wanted = cluster.get("Deployment", "m-decode")["spec"]

    cluster.store.remove("Service", "default", "m-decode")
    cluster.store.change("Deployment", "default", "m-decode", {"spec": {"replicas": 9}})
    cluster.store.change(
        "Deployment", "default", "m-prefill", {"metadata": {"labels": {"tandem.dev/model": None}}}
    )
    await cluster.settle()

    assert cluster.get("Service", "m-decode")
    assert cluster.get("Deployment", "m-decode")["spec"] == wanted
    assert cluster.get("Deployment", "m-prefill")["metadata"]["labels"]["tandem.dev/model"] == "m"


async def test_children_of_a_dropped_role_go_away() -> None:
    cluster = Cluster()
    await cluster.settle()

    cluster.apply(model("  unified: {replicas: 1}\n"))
    await cluster.settle()

    assert cluster.names("Deployment") == ["m-unified"]
    assert cluster.names("WorkerPool") == ["m-unified"]


async def test_configuration_of_a_revision_lives_as_long_as_its_pods() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.start_pods()
    old = cluster.names("ConfigMap")

    cluster.apply(SPLIT + "  engine: {maxNumSeqs: 8}\n")
    await cluster.settle()
    both = cluster.names("ConfigMap")
    for pod in cluster.names("Pod"):
        cluster.store.remove("Pod", "default", pod)
    await cluster.settle()

    assert set(old) < set(both)
    assert set(cluster.names("ConfigMap")) == set(both) - set(old)


async def test_a_deleted_resource_takes_everything_with_it() -> None:
    cluster = Cluster(BOTH)
    await cluster.settle()

    for kind, name in (("Router", "r"), ("Model", "s"), ("Model", "l")):
        cluster.store.remove(kind, "default", name)
        await cluster.reconcile(kind, name)

    left = {o["kind"] for k in _ALL_KINDS for o in cluster.store.find(k)}
    assert left <= {"Event"}


_ALL_KINDS = (
    "Deployment Service ConfigMap Secret ServiceAccount WorkerPool PodDisruptionBudget "
    "NetworkPolicy Role RoleBinding Event"
).split()


class Failing(Store):
    """A store that refuses some writes, as an apiserver under stress does."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def _fail(self) -> None:
        if self._random.random() < 0.3:
            raise ApiError(self._random.choice([0, 409, 429, 500, 503]), "no")

    async def apply(self, obj: Object) -> Object:
        self._fail()
        return await super().apply(obj)

    async def create(self, obj: Object) -> Object | None:
        self._fail()
        return await super().create(obj)

    async def apply_status(self, obj: Object) -> Object:
        self._fail()
        return await super().apply_status(obj)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
async def test_failing_writes_delay_and_change_nothing(seed: int) -> None:
    calm, cluster = Cluster(), Cluster()
    await calm.settle()
    failing = Failing(seed)
    cluster.store = failing
    cluster.reconciler.api = failing
    cluster.apply(SPLIT)

    for _ in range(200):
        try:
            if (await cluster.reconcile()).writes == 0:
                break
        except ApiError:
            continue

    for kind in ("Deployment", "Service", "ConfigMap", "WorkerPool", "ServiceAccount"):
        assert cluster.names(kind) == calm.names(kind)
    assert cluster.get("Deployment", "m-decode")["spec"]["replicas"] == 2


# Replicas -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "given", "said"),
    [
        (
            9,
            4,
            "0 of 4 workers are ready; 9 were asked for, maxReplicas of unified in Model m is 4",
        ),
        (
            1,
            2,
            "0 of 2 workers are ready; 1 were asked for, minReplicas of unified in Model m is 2",
        ),
        (3, 3, "0 of 3 workers are ready"),
        (0, 0, "0 of 0 workers are ready"),
    ],
)
async def test_a_pool_stays_within_its_bounds_and_may_always_be_stopped(
    asked: int, given: int, said: str
) -> None:
    cluster = Cluster(model("  unified: {replicas: 2, minReplicas: 2, maxReplicas: 4}\n"))
    await cluster.settle()

    cluster.store.change("WorkerPool", "default", "m-unified", {"spec": {"replicas": asked}})
    await cluster.settle()

    assert cluster.get("Deployment", "m-unified")["spec"]["replicas"] == given
    assert cluster.condition("WorkerPool", "m-unified", "Ready")["message"] == said


async def test_a_scaled_pool_keeps_its_count() -> None:
    cluster = Cluster()
    await cluster.settle()

    cluster.store.change("WorkerPool", "default", "m-decode", {"spec": {"replicas": 5}})
    await cluster.settle()

    assert cluster.get("WorkerPool", "m-decode")["spec"]["replicas"] == 5
    last = cluster.get("WorkerPool", "m-decode")["status"]["lastScale"]
    assert (last["before"], last["after"], last["reason"]) == (2, 5, "set through /scale")
    assert cluster.get("Deployment", "m-decode")["spec"]["replicas"] == 5


async def test_a_count_changed_in_the_model_resets_the_pool_once() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.store.change("WorkerPool", "default", "m-decode", {"spec": {"replicas": 5}})

    cluster.apply(SPLIT.replace("decode: {replicas: 2", "decode: {replicas: 3"))
    await cluster.settle()
    assert cluster.get("Deployment", "m-decode")["spec"]["replicas"] == 3

    cluster.store.change("WorkerPool", "default", "m-decode", {"spec": {"replicas": 1}})
    await cluster.settle()
    assert cluster.get("Deployment", "m-decode")["spec"]["replicas"] == 1


async def test_before_a_pool_shrinks_its_pods_say_how_busy_they_are() -> None:
    cluster = Cluster(SPLIT.replace("decode: {replicas: 2", "decode: {replicas: 3"))
    await cluster.settle()
    cluster.start_pods()

    async def busy(pods: list[Object]) -> dict[str, int]:
        return {p["metadata"]["name"]: len(pods) - i for i, p in enumerate(pods)}

    cluster.reconciler.busy = busy
    await cluster.settle()
    calm = cluster.get("Pod", "m-decode-0")["metadata"].get("annotations")
    cluster.store.change("WorkerPool", "default", "m-decode", {"spec": {"replicas": 1}})
    await cluster.reconcile()

    costs = [
        cluster.get("Pod", f"m-decode-{i}")["metadata"]["annotations"][COST_ANNOTATION]
        for i in range(3)
    ]
    assert calm is None
    assert costs == ["3", "2", "1"]


# What is planned ----------------------------------------------------------------------------


def typed(text: str) -> Any:
    (obj,) = as_stored(text)
    resource, problem = parse(
        {**obj, "metadata": {"namespace": "default", "uid": "u", "name": "m"}}
    )
    assert problem is None
    return resource


def planned(text: str, settings: Settings | None = None) -> dict[tuple[str, str], Object]:
    plan = plan_model(typed(text), [], [], settings or Settings(), "token")
    return {(o["kind"], o["metadata"]["name"]): o for o in plan.apply}


def test_workers_parse_the_configuration_that_is_planned_for_them() -> None:
    objects = planned(SPLIT + "  engine: {kvCacheMemory: 128Mi, maxNumSeqs: 8}\n")
    texts = [o["data"]["config.json"] for (kind, _), o in objects.items() if kind == "ConfigMap"]

    configs = [WorkerConfig.parse(json.loads(text)) for text in texts]

    assert sorted(c.role for c in configs) == ["decode", "prefill"]
    assert {c.kv_cache_bytes for c in configs} == {128 * 2**20}
    assert len({c.revision for c in configs}) == 1


def test_both_roles_share_one_revision_and_any_change_makes_a_new_one() -> None:
    settings = Settings()
    base = revision_of(typed(SPLIT), settings)

    assert revision_of(typed(SPLIT), settings) == base
    assert revision_of(typed(SPLIT + "  engine: {maxNumSeqs: 8}\n"), settings) != base
    assert revision_of(typed(SPLIT), Settings(worker_image="other:1")) != base


def test_a_count_alone_restarts_nothing() -> None:
    more = SPLIT.replace("decode: {replicas: 2", "decode: {replicas: 3")

    assert revision_of(typed(more), Settings()) == revision_of(typed(SPLIT), Settings())


def test_pods_pass_the_restricted_security_standard() -> None:
    for (kind, _), obj in planned(SPLIT).items():
        if kind != "Deployment":
            continue
        spec = obj["spec"]["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_gpus_are_requested_and_limited() -> None:
    objects = planned(model("  unified: {gpus: 2, tensorParallel: 2}\n"))

    container = objects["Deployment", "m-unified"]["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert container["resources"]["requests"]["nvidia.com/gpu"] == "2"


@pytest.mark.parametrize(
    ("source", "argument", "volume"),
    [
        (
            "file:///a/b",
            "/var/lib/tandem/weights",
            {"hostPath": {"path": "/a/b", "type": "Directory"}},
        ),
        (
            "pvc://claim/a/b",
            "/var/lib/tandem/weights/a/b",
            {"persistentVolumeClaim": {"claimName": "claim"}},
        ),
        ("image:///opt/a/b", "/opt/a/b", None),
        ("hf://org/name@v1", None, {"emptyDir": {}}),
        ("s3://bucket/prefix", None, {"emptyDir": {}}),
    ],
)
def test_weights_are_mounted_from_where_they_are(
    source: str, argument: str | None, volume: Object | None
) -> None:
    objects = planned(model("  unified: {}\n").replace("file:///models/m", source))
    spec = objects["Deployment", "m-unified"]["spec"]["template"]["spec"]
    args = spec["containers"][0]["args"]
    found = next((v for v in spec["volumes"] if v["name"] == "weights"), None)
    mounted = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "weights"]

    given_path = args[args.index("--weights") + 1]
    assert found == (None if volume is None else {"name": "weights", **volume})
    assert len(mounted) == (0 if volume is None else 1)
    assert given_path == argument or given_path.startswith("/var/lib/tandem/weights/")
    assert ("initContainers" in spec) == (argument is None)


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ('pods "m-x" is forbidden: violates PodSecurity: hostPath volumes', "use image:///, pvc"),
        ('pods "m-x" is forbidden: exceeded quota: q', "raise the ResourceQuota"),
        ("admission webhook denied the request", "or what refuses them"),
    ],
)
async def test_pods_that_are_refused_are_told_with_a_next_step(message: str, advice: str) -> None:
    cluster = Cluster(BOTH)
    await cluster.settle()
    condition = {"type": "ReplicaFailure", "status": "True", "message": message}
    for name in ("s-unified", "r-router"):
        status = {"status": {"conditions": [condition]}}
        cluster.store.change("Deployment", "default", name, status)

    await cluster.settle()

    for kind, name in (("Model", "s"), ("Router", "r")):
        ready = cluster.condition(kind, name, "Ready")
        assert ready["reason"] == "PodsRefused"
        assert message in ready["message"]
        assert advice in ready["message"]


async def test_a_path_relative_to_a_yaml_file_is_refused_with_the_ways_out() -> None:
    """Local mode makes such paths absolute before; on a cluster there is no YAML file."""
    relative = BOTH.replace("file:///models/s", "file://./s")
    cluster = Cluster(relative + '  predictor: {type: Learned, artifact: "file://./p"}\n')

    await cluster.settle()

    for kind, name in (("Model", "s"), ("Router", "r")):
        conditions = cluster.get(kind, name)["status"]["conditions"]
        accepted = next(c for c in conditions if c["type"] == "Accepted")
        assert accepted["reason"] == "RelativePath"
        assert "image:///path in the image or pvc://claim/path" in accepted["message"]


def test_downloads_share_a_claim_where_one_is_asked_for() -> None:
    objects = planned(GOOD["hf with a cache"])

    assert objects["PersistentVolumeClaim", "m-weights"]["spec"]["resources"] == {
        "requests": {"storage": "80Gi"}
    }


def test_a_pod_patch_is_merged_last_and_by_name() -> None:
    patch = '{"spec": {"containers": [{"name": "worker", "env": [{"name": "A", "value": "1"}]}]}}'
    objects = planned(model(f"  unified: {{podPatch: {patch}}}\n"))

    container = objects["Deployment", "m-unified"]["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "A", "value": "1"} in container["env"]
    assert any(e["name"] == "POD_IP" for e in container["env"])
    assert container["args"][0] == "--config"


def test_patches_merge_maps_remove_nulls_and_replace_plain_lists() -> None:
    target = {"a": {"b": 1, "c": 2}, "l": [1, 2], "n": [{"name": "x", "v": 1}]}
    patch = {"a": {"b": None, "d": 3}, "l": [3], "n": [{"name": "x", "w": 2}, {"name": "y"}]}

    assert merge_patch(target, patch) == {
        "a": {"c": 2, "d": 3},
        "l": [3],
        "n": [{"name": "x", "v": 1, "w": 2}, {"name": "y"}],
    }


async def test_routers_parse_the_configuration_that_is_planned_for_them() -> None:
    cluster = Cluster(BOTH)
    await cluster.settle()
    (name,) = [n for n in cluster.names("ConfigMap") if n.startswith("r-router-")]

    config = parse_config(cluster.get("ConfigMap", name)["data"]["config.json"])

    assert [t.name for t in config.tiers] == ["small", "large"]
    assert config.fallback_tier == "large"
    assert config.tiers[1].max_share == 0.5
    assert config.tiers[0].usd_per_1m_output_tokens < config.tiers[1].usd_per_1m_output_tokens
    assert config.slo.ttft_ms == 500
    assert config.budget.usd_per_hour is None  # workers are the operator's to pay
    assert config.endpoints.type == "endpointslice"


async def test_routers_may_read_endpoint_slices_and_nothing_else() -> None:
    cluster = Cluster(BOTH)
    await cluster.settle()

    assert cluster.get("Role", "r-router")["rules"] == [
        {
            "apiGroups": ["discovery.k8s.io"],
            "resources": ["endpointslices"],
            "verbs": ["get", "list", "watch"],
        }
    ]


@pytest.mark.parametrize(
    ("predictor", "argument", "init"),
    [
        ('{type: Learned, artifact: "configmap://c"}', "/var/lib/tandem/predictor", False),
        ('{type: Learned, artifact: "file:///a"}', "/var/lib/tandem/predictor", False),
        (
            '{type: Learned, training: {data: "file:///d/x.jsonl.gz"}}',
            "/var/lib/tandem/predictor/artifact",
            True,
        ),
        ('{type: Learned, artifact: "image:///opt/p"}', "/opt/p", False),
        (
            '{type: Learned, training: {data: "image:///opt/x.jsonl.gz"}}',
            "/var/lib/tandem/predictor/artifact",
            True,
        ),
        ("{type: Length}", None, False),
    ],
)
async def test_a_router_gets_its_predictor(
    predictor: str, argument: str | None, init: bool
) -> None:
    cluster = Cluster(BOTH + f"  predictor: {predictor}\n")
    await cluster.settle()
    spec = cluster.get("Deployment", "r-router")["spec"]["template"]["spec"]
    args = spec["containers"][0]["args"]

    assert ("initContainers" in spec) == init
    if argument is None:
        assert "--predictor" not in args
    else:
        assert args[args.index("--predictor") + 1] == argument


@pytest.mark.parametrize(
    ("uri", "path", "volume"),
    [
        ("image:///opt/e", "/opt/e", None),
        ("file:///e", "/var/lib/tandem/embedding", {"hostPath": {"path": "/e"}}),
        (
            "pvc://claim/a/e",
            "/var/lib/tandem/embedding/a/e",
            {"persistentVolumeClaim": {"claimName": "claim"}},
        ),
    ],
)
async def test_a_router_gets_the_embedding_of_its_predictor(
    uri: str, path: str, volume: Object | None
) -> None:
    predictor = f'{{type: Learned, artifact: "configmap://c", embedding: "{uri}"}}'
    cluster = Cluster(BOTH + f"  predictor: {predictor}\n")
    await cluster.settle()
    spec = cluster.get("Deployment", "r-router")["spec"]["template"]["spec"]
    (name,) = [n for n in cluster.names("ConfigMap") if n.startswith("r-router-")]
    config = parse_config(cluster.get("ConfigMap", name)["data"]["config.json"])
    found = next((v for v in spec["volumes"] if v["name"] == "embedding"), None)
    mounts = [m["mountPath"] for m in spec["containers"][0]["volumeMounts"]]

    assert config.predictor.embedding == path
    assert found == (None if volume is None else {"name": "embedding", **volume})
    assert ("/var/lib/tandem/embedding" in mounts) == (volume is not None)


def test_a_missing_model_plans_nothing_and_says_so() -> None:
    manifests = load_text(BOTH)
    resource, _ = parse({**manifests[2].obj, "metadata": {"name": "r", "namespace": "default"}})

    plan = plan_router(resource, {}, [], Settings(), "token")

    assert plan.apply == []
    assert plan.problems[0].reason == "ModelMissing"


def test_live_objects_may_hold_more_than_was_planned() -> None:
    assert contains(
        {"a": {"b": 1, "c": 2}, "l": [{"x": 1, "y": 2}]}, {"a": {"b": 1}, "l": [{"x": 1}]}
    )
    assert not contains({"a": 1}, {"a": 2})
    assert not contains({"l": [1, 2]}, {"l": [1]})


# Status -------------------------------------------------------------------------------------


async def test_a_model_becomes_ready_when_each_role_has_a_worker_and_the_link_works() -> None:
    cluster = Cluster()
    await cluster.settle()
    assert cluster.condition("Model", "m", "Ready")["reason"] == "Starting"

    cluster.start_pods()
    await cluster.settle()

    status = cluster.get("Model", "m")["status"]
    assert cluster.condition("Model", "m", "Ready")["status"] == "True"
    assert status["ready"] == "3/3"
    assert status["usdPerHour"] == "1.5"
    assert status["observedGeneration"] == 1
    pool = cluster.get("WorkerPool", "m-decode")["status"]
    assert (pool["replicas"], pool["readyReplicas"]) == (2, 2)
    assert pool["selector"] == "tandem.dev/model=m,tandem.dev/role=decode"


async def test_a_broken_link_blocks_with_its_reason() -> None:
    cluster = Cluster()
    cluster.link = LinkTest(False, "checksums differ")
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()

    assert cluster.condition("Model", "m", "Ready")["reason"] == "KVLinkFailed"
    assert cluster.condition("Model", "m", "KVLinkReady")["message"] == "checksums differ"


def waiting(reason: str, message: str = "", *, restarts: int = 0, exit_code: int = 0) -> Object:
    state: Object = {"waiting": {"reason": reason, "message": message}}
    last = {"terminated": {"exitCode": exit_code, "message": message}} if exit_code else {}
    entry = {"name": "worker", "state": state, "lastState": last, "restartCount": restarts}
    return {"containerStatuses": [entry]}


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (
            {
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
                    }
                ]
            },
            "InsufficientGPU",
        ),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "taints"}]},
            "Unschedulable",
        ),
        (waiting("ImagePullBackOff", "no such image"), "ImagePull"),
        (waiting("ErrImagePull"), "ImagePull"),
        (waiting("FailedMount", "/m does not exist"), "VolumeMissing"),
        (waiting("CrashLoopBackOff", "bad config", restarts=3, exit_code=1), "EngineCrash"),
        (waiting("ContainerCreating"), "Starting"),
        (
            {
                "initContainerStatuses": [
                    {"name": "fetch-weights", "state": {"running": {}}, "restartCount": 0}
                ]
            },
            "WeightsDownload",
        ),
    ],
)
async def test_the_first_blocking_cause_is_shown(status: Object, reason: str) -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.start_pods(**status)
    await cluster.settle()

    ready = cluster.condition("Model", "m", "Ready")
    assert (ready["status"], ready["reason"]) == ("False", reason)
    assert ready["message"]


def test_the_most_basic_cause_of_several_is_first() -> None:
    def broken(name: str, status: Object) -> Object:
        return {"metadata": {"name": name}, "spec": {"containers": []}, "status": status}

    found = first_blocker(
        [
            broken("a", waiting("CrashLoopBackOff", exit_code=1)),
            broken("b", waiting("ImagePullBackOff")),
        ]
    )

    assert found is not None
    assert found.reason == "ImagePull"


async def test_transition_times_stay_while_the_status_stays() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.reconciler.now = lambda: "2026-02-02T00:00:00Z"
    cluster.start_pods()
    await cluster.settle()

    assert cluster.condition("Model", "m", "Accepted")["lastTransitionTime"] == NOW
    assert cluster.condition("Model", "m", "Ready")["lastTransitionTime"] == "2026-02-02T00:00:00Z"


async def test_a_router_is_ready_when_a_pod_and_a_tier_are() -> None:
    cluster = Cluster(BOTH)
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()

    assert cluster.condition("Router", "r", "Ready")["reason"] == "Serving"
    status = cluster.get("Router", "r")["status"]
    assert status["usdPerHour"] == "1.1"
    assert status["endpoint"] == "http://r-router.default.svc.cluster.local:8000"


@pytest.mark.parametrize(
    ("change", "condition", "reason", "fix"),
    [
        (
            ("modelRef: {name: s}", "modelRef: {name: x}"),
            "ModelsResolved",
            "ModelMissing",
            "create",
        ),
        (('unified: {usdPerHour: "0.1"}', "unified: {}"), "Accepted", "UnpricedRole", "usdPerHour"),
        (('usdPerHour: "2"}', 'usdPerHour: "0.5"}'), "WithinBudget", "OverSpend", "lower replicas"),
        (("{name: r}", "{name: small}"), "Accepted", "InvalidRouter", "ambiguous"),
    ],
)
async def test_problems_between_objects_are_conditions_with_the_fix(
    change: tuple[str, str], condition: str, reason: str, fix: str
) -> None:
    cluster = Cluster(BOTH.replace(*change))
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()

    name = "small" if reason == "InvalidRouter" else "r"
    found = cluster.condition("Router", name, condition)
    assert (found["status"], found["reason"]) == ("False", reason)
    assert fix in found["message"]


async def test_two_managed_routers_on_one_model_are_told() -> None:
    managed = BOTH + "  scaling: {mode: Managed}\n"
    cluster = Cluster(managed)
    cluster.apply(managed.split("---")[2].replace("{name: r}", "{name: r2}"))
    await cluster.settle()

    found = cluster.condition("Router", "r", "Accepted")
    assert found["reason"] == "TwoManagers"
    assert "r2" in found["message"]


async def test_a_field_that_slipped_past_the_schema_is_reported_on_the_object() -> None:
    cluster = Cluster()
    await cluster.settle()
    stored = cluster.store._objects["Model", "default", "m"]  # as an apiserver without pruning
    stored["spec"]["zebra"] = 1
    before = cluster.get("Deployment", "m-decode")

    await cluster.reconcile()

    assert "spec.zebra: unknown field" in cluster.condition("Model", "m", "Accepted")["message"]
    assert cluster.get("Deployment", "m-decode") == before


async def test_a_change_of_ready_is_an_event() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()

    reasons = [e["reason"] for e in cluster.store.find("Event")]
    assert reasons == ["Starting", "Serving"]
