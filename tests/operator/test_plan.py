"""What is planned for a Model and a Router: pods, configuration, volumes, rights."""

from __future__ import annotations

import json
from typing import Any

import pytest

from objects_table import GOOD, model
from stored_cluster import BOTH, SPLIT, Cluster, as_stored
from tandem_operator.manifests import load_text
from tandem_operator.plan import Settings, plan_model, plan_router, revision_of
from tandem_operator.plan.decode import parse
from tandem_operator.plan.objects import Problem, merge_patch
from tandem_operator.resources.base import Object
from tandem_router.config import parse_config
from tandem_worker.config import WorkerConfig


def typed(text: str) -> Any:
    (obj,) = as_stored(text)
    resource = parse({**obj, "metadata": {"namespace": "default", "uid": "u", "name": "m"}})
    assert not isinstance(resource, Problem), resource
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
    objects = planned(model("  unified: {gpus: 1}\n"))

    container = objects["Deployment", "m-unified"]["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["resources"]["requests"]["nvidia.com/gpu"] == "1"


def test_a_cpu_worker_computes_on_the_cores_that_it_asks_for() -> None:
    def threads(role: str) -> int | None:
        objects = planned(model(f"  unified: {role}\n"))
        (config,) = [o for (kind, _), o in objects.items() if kind == "ConfigMap"]
        return json.loads(config["data"]["config.json"]).get("num_threads")

    assert threads("{resources: {cpu: '16'}}") == 16
    assert threads("{resources: {cpu: 500m}}") == 1
    assert threads("{resources: {cpu: '16'}, tensorParallel: 4}") == 4  # of each process
    assert threads("{gpus: 1, resources: {cpu: '16'}}") is None
    assert threads("{}") is None


def test_each_role_is_cut_into_its_own_number_of_processes() -> None:
    text = "  prefill: {tensorParallel: 4}\n  decode: {tensorParallel: 2}\n"
    objects = planned(model(text))

    configs = [json.loads(o["data"]["config.json"]) for (kind, _), o in objects.items()
               if kind == "ConfigMap"]  # fmt: skip
    assert {c["role"]: c["tensor_parallel"] for c in configs} == {"prefill": 4, "decode": 2}


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
            {"persistentVolumeClaim": {"claimName": "claim", "readOnly": True}},
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
        (
            'pods "m-x" is forbidden: no PriorityClass with name fast was found',
            "make PriorityClass fast, or name another one in priorityClassName",
        ),
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
        (
            '{type: Learned, artifact: "configmap://c/k"}',
            "/var/lib/tandem/copied-predictor/k",
            False,
        ),
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
    deployment = cluster.get("Deployment", "r-router")
    spec, revision = deployment["spec"]["template"]["spec"], deployment["metadata"]["labels"]
    name = f"r-router-{revision['tandem.dev/revision']}"
    config = json.loads(cluster.get("ConfigMap", name)["data"]["config.json"])

    assert ("initContainers" in spec) == init
    assert config["predictor"].get("artifact") == argument


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
    resource = parse({**manifests[2].obj, "metadata": {"name": "r", "namespace": "default"}})

    plan = plan_router(resource, {}, [], Settings(), "token")

    assert plan.apply == []
    assert plan.problems[0].reason == "ModelMissing"
