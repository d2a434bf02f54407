"""What an installation does not allow is refused with its rule, and nothing is made of it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stored_cluster import BOTH, Cluster
from tandem_operator import plan
from tandem_operator.plan import Settings
from tandem_operator.plan.permissions import refusals, secrets_of
from tandem_operator.plan.router_config import router_config
from tandem_operator.resources import Model, Router
from tandem_operator.resources.allow_list import AllowList
from tandem_operator.resources.base import Object
from tandem_operator.resources.rules import violations

CLOSED = Settings(allow=AllowList(), own_namespace="tandem-system")


def a_model(patch: Object | None = None, namespace: str = "team", **spec: Any) -> Model:
    role = {"podPatch": patch} if patch else {}
    return Model.model_validate(
        {
            "metadata": {"name": "m", "namespace": namespace, "uid": "u"},
            "spec": {"weights": {"source": "hf://a/b"}, "unified": role, **spec},
        }
    )


def a_router(**spec: Any) -> Router:
    external = {"url": "https://api.example.com/v1", "model": "x", "apiKeySecretRef": KEY}
    return Router.model_validate(
        {
            "metadata": {"name": "r", "namespace": "team", "uid": "u"},
            "spec": {"tiers": [{"name": "large", "external": {**external, **PRICES}}], **spec},
        }
    )


KEY = {"name": "db-password", "key": "value"}
PRICES = {"usdPer1MInputTokens": "1", "usdPer1MOutputTokens": "1"}


def said(resource: Model | Router, allow: AllowList | None = None, **secrets: Any) -> list[str]:
    settings = Settings(allow=allow or AllowList(), own_namespace="tandem-system")
    return [f"{p.reason}: {p.message}" for p in refusals(resource, settings, secrets)]


@pytest.mark.parametrize("flag", ["trust-remote-code", "trust_remote_code", "trust-rem"])
def test_code_that_comes_with_weights_runs_where_the_installation_lets_it(flag: str) -> None:
    def asking(value: str) -> Model:
        return a_model(image="tandem/worker:0.1.0", engine={"type": "VLLM", "args": {flag: value}})

    refused = said(asking("true"))

    assert [text.split(":")[0] for text in refused] == ["CodeNotAllowed"]
    assert "set allow.remoteCode=true in the chart" in refused[0]
    assert said(asking("false")) == []
    assert said(asking("true"), AllowList(remote_code=True)) == []


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("config", "/data/flags.yaml"),
        ("conf", "/data/flags.yaml"),
        ("kv_transfer_config", '{"kv_connector": "X", "kv_connector_module_path": "evil"}'),
        ("compilation-config", '{"backend": "evil.module"}'),
        ("compilation_config.backend", "evil.module"),
        ("distributed-executor-backend", "evil.Executor"),
        ("structured-outputs-config", '{"reasoning_parser_plugin": "/data/x.py"}'),
        ("load-format", "pt"),
    ],
)
def test_flags_that_name_code_by_their_value_are_refused(flag: str, value: str) -> None:
    def asking(args: dict[str, str]) -> Model:
        return a_model(image="tandem/worker:0.1.0", engine={"type": "OpenAI", "args": args})

    assert [text.split(":")[0] for text in said(asking({flag: value}))] == ["CodeNotAllowed"]
    harmless = {"compilation-config": '{"cudagraph_mode": "FULL"}', "load-format": "safetensors"}
    assert said(asking({**harmless, "distributed-executor-backend": "mp"})) == []


def test_a_class_of_the_clusters_own_pods_is_refused() -> None:
    (text,) = said(a_model(unified={"priorityClassName": "system-cluster-critical"}))

    assert text.startswith("FieldNotAllowed: spec.unified.priorityClassName")
    assert said(a_model(unified={"priorityClassName": "batch"})) == []


def test_a_misspelt_field_of_a_pod_is_told_what_it_may_mean() -> None:
    (text,) = said(a_model(unified={"podPatch": {"spec": {"containrs": []}}}))

    assert text == (
        "FieldNotAllowed: spec.unified.podPatch.spec.containrs: no field of a pod; did you mean "
        "containers? Else remove it, or set allow.podFields={containrs} in the chart"
    )


def test_an_amount_that_is_none_is_told_with_its_place() -> None:
    limits = {"memory": "lots", "cpu": 2, "example.com/nic": "1", "ephemeral-storage": "1e3"}
    worker = {"name": "worker", "resources": {"limits": limits}}

    (text,) = said(a_model(unified={"podPatch": {"spec": {"containers": [worker]}}}))

    assert text == (
        "Invalid: spec.unified.podPatch.spec.containers[0].resources.limits.memory: 'lots' is not "
        "a quantity; write 500m, 4, 4Gi or the like"
    )


@pytest.mark.parametrize("flag", ["worker-cls", "middleware", "tool_parser_plugin", "scheduler-c"])
def test_no_engine_type_is_a_way_around_flags_that_load_code(flag: str) -> None:
    def asking(flag: str) -> Model:
        return a_model(image="tandem/worker:0.1.0", engine={"type": "OpenAI", "args": {flag: "x"}})

    assert [text.split(":")[0] for text in said(asking(flag))] == ["CodeNotAllowed"]
    assert said(asking("model-path")) == []


def container(**fields: Any) -> Object:
    return {"spec": {"containers": [{"name": "worker", **fields}]}}


MOUNT = {"name": "x", "mountPath": "/opt/tandem/lib"}
ESCAPES = {
    "another account": ({"spec": {"serviceAccountName": "admin"}}, "serviceAccounts={admin}"),
    "its old name": ({"spec": {"serviceAccount": "admin"}}, "allow.serviceAccounts={admin}"),
    "the node's network": ({"spec": {"hostNetwork": True}}, "allow.podFields={hostNetwork}"),
    "the node's processes": ({"spec": {"hostPID": True}}, "allow.podFields={hostPID}"),
    "a node by name": ({"spec": {"nodeName": "control-plane"}}, "allow.podFields={nodeName}"),
    "a token": ({"spec": {"automountServiceAccountToken": True}}, "automountServiceAccountToken"),
    "a looser pod": ({"spec": {"securityContext": None}}, "allow.podFields={securityContext}"),
    "privilege": (container(securityContext={"privileged": True}), "{securityContext}"),
    "another command": (container(command=["sh"]), "allow.podFields={command}"),
    "other arguments": (container(args=["--trust-remote-code"]), "allow.podFields={args}"),
    "a command as hook": (container(lifecycle={}), "allow.podFields={lifecycle}"),
    "a command as probe": (container(livenessProbe={"exec": {}}), "{livenessProbe}"),
    "another image": (container(image="evil/x:1"), "allow.images={evil/x:1}"),
    "a sidecar": ({"spec": {"containers": [{"name": "x"}]}}, "allow.podFields={sidecars}"),
    "a first step": ({"spec": {"initContainers": [{"name": "x"}]}}, "{sidecars}"),
    "the node's files": (
        {"spec": {"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}},
        "allow.volumes={hostPath}",
    ),
    "any account's token": (
        {"spec": {"volumes": [{"name": "x", "projected": {"sources": []}}]}},
        "allow.volumes={projected}",
    ),
    "code in a variable": (container(env=[{"name": "LD_PRELOAD", "value": "/x"}]), "{LD_PRELOAD}"),
    "code in a character set": (
        container(env=[{"name": "GCONV_PATH", "value": "/data"}]),
        "{GCONV_PATH}",
    ),
    "code in a cipher": (
        container(env=[{"name": "OPENSSL_CONF", "value": "/data/x"}]),
        "{OPENSSL_CONF}",
    ),
    "a port of the node": (
        container(ports=[{"containerPort": 8100, "hostPort": 443}]),
        "allow.podFields={hostPort}",
    ),
    "an address of the node": (
        container(ports=[{"containerPort": 8100, "hostIP": "127.0.0.1"}]),
        "allow.podFields={hostIP}",
    ),
    "a node that asks others": (
        container(readinessProbe={"httpGet": {"host": "10.0.0.1", "port": 80}}),
        "{readinessProbe}",
    ),
    "variables by the dozen": (container(envFrom=[{"configMapRef": {"name": "x"}}]), "{envFrom}"),
    "code in a volume": (container(volumeMounts=[MOUNT]), "allow.podFields={volumeMounts}"),
    "a mount that climbs": (
        container(volumeMounts=[{"name": "x", "mountPath": "/tmp/../opt"}]),
        "allow.podFields={volumeMounts}",
    ),
    "another's Service": ({"metadata": {"labels": {"app": "bank"}}}, "allow.podFields={labels}"),
    "another's network": ({"metadata": {"annotations": {"cni": "host"}}}, "{annotations}"),
    "a plugin as a variable": (
        container(env=[{"name": "NCCL_NET_PLUGIN", "value": "/data/x.so"}]),
        "{NCCL_NET_PLUGIN}",
    ),
    "a debugger's library": (
        container(env=[{"name": "CUDA_INJECTION64_PATH", "value": "/data/x.so"}]),
        "{CUDA_INJECTION64_PATH}",
    ),
    "a factory of log handlers": (
        container(env=[{"name": "VLLM_LOGGING_CONFIG_PATH", "value": "/data/x"}]),
        "{VLLM_LOGGING_CONFIG_PATH}",
    ),
    "every GPU of the node": (
        container(env=[{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]),
        "{NVIDIA_VISIBLE_DEVICES}",
    ),
    "kernels compiled elsewhere": (
        container(volumeMounts=[{"name": "x", "mountPath": "/var/cache/tandem/triton"}]),
        "allow.podFields={volumeMounts}",
    ),
    "the folder above them": (
        container(volumeMounts=[{"name": "x", "mountPath": "/var/cache"}]),
        "allow.podFields={volumeMounts}",
    ),
    "eviction of everybody else": (
        {"spec": {"priorityClassName": "system-node-critical"}},
        "allow.podFields={priorityClassName}",
    ),
    "a debugger's container": (
        {"spec": {"ephemeralContainers": [{"name": "worker"}]}},
        "{ephemeralContainers}",
    ),
    "processes of all containers": ({"spec": {"shareProcessNamespace": True}}, "shareProcess"),
    "another's name": ({"spec": {"hostAliases": [{"ip": "10.0.0.1"}]}}, "{hostAliases}"),
    "another resolver": ({"spec": {"dnsConfig": {"nameservers": ["10.0.0.1"]}}}, "{dnsConfig}"),
    "the kernel's settings": ({"spec": {"sysctls": []}}, "{sysctls}"),
    "an unmasked proc": (container(securityContext={"procMount": "Unmasked"}), "{securityContext}"),
    "a driver's volume": (
        {"spec": {"volumes": [{"name": "x", "csi": {"driver": "secrets-store.csi.k8s.io"}}]}},
        "allow.volumes={csi}",
    ),
    "a block of a disk": (container(volumeDevices=[{"devicePath": "/dev/x"}]), "{volumeDevices}"),
    "a directive of the merge": (container(**{"$patch": "replace"}), "{$patch}"),
    "a configuration of one's own": (
        {"spec": {"volumes": [{"name": "config", "configMap": {"name": "mine"}}]}},
        "allow.podFields={volumes}",
    ),
    "kernels of a claim": (
        {"spec": {"volumes": [{"name": "scratch", "persistentVolumeClaim": {"claimName": "x"}}]}},
        "allow.podFields={volumes}",
    ),
    "kernels of a copied disk": (
        {"spec": {"volumes": [{"name": "scratch", "ephemeral": {"volumeClaimTemplate": {}}}]}},
        "allow.podFields={volumes}",
    ),
    "another file of keys": (
        {"spec": {"volumes": [{"name": "keys-0a1b2c3d4e", "configMap": {"name": "mine"}}]}},
        "allow.podFields={volumes}",
    ),
    "what a compiler finds in its folder": (
        {
            "spec": {
                "volumes": [{"name": "x", "persistentVolumeClaim": {"claimName": "x"}}],
                "containers": [
                    {
                        "name": "worker",
                        "volumeMounts": [{"name": "x", "mountPath": "/tmp/torchinductor_root"}],
                    }
                ],
            }
        },
        "allow.podFields={volumeMounts}",
    ),
    "another folder for it": (container(env=[{"name": "TMPDIR", "value": "/data"}]), "{TMPDIR}"),
    "an apiserver of one's own": (
        container(env=[{"name": "KUBERNETES_SERVICE_HOST", "value": "evil.example"}]),
        "{KUBERNETES_SERVICE_HOST}",
    ),
    "a command of the first step": (
        {"spec": {"initContainers": [{"name": "fetch-weights", "command": ["sh"]}]}},
        "allow.podFields={command}",
    ),
    "an image of the first step": (
        {"spec": {"initContainers": [{"name": "fetch-weights", "image": "evil/x:1"}]}},
        "allow.images={evil/x:1}",
    ),
    "variables of the first step": (
        {"spec": {"initContainers": [{"name": "fetch-weights", "envFrom": [{"secretRef": {}}]}]}},
        "{envFrom}",
    ),
    "a first step that stays": (
        {"spec": {"initContainers": [{"name": "fetch-weights", "restartPolicy": "Always"}]}},
        "{restartPolicy}",
    ),
    "a file of the node as a message": (
        container(terminationMessagePath="/etc/passwd"),
        "{terminationMessagePath}",
    ),
    "another folder to start in": (container(workingDir="/data"), "allow.podFields={workingDir}"),
    "a profile of the node": (
        {
            "metadata": {
                "annotations": {"container.apparmor.security.beta.kubernetes.io/worker": ""}
            }
        },
        "allow.podFields={annotations}",
    ),
    "a cloud's identity": (
        {"metadata": {"labels": {"azure.workload.identity/use": "true"}}},
        "allow.podFields={labels}",
    ),
    "a hook that nobody waits for": (
        {"metadata": {"finalizers": ["evil.example/x"]}},
        "finalizers",
    ),
    "an owner of one's choice": ({"metadata": {"ownerReferences": []}}, "{ownerReferences}"),
    "the user of Windows": (
        container(securityContext={"windowsOptions": {"hostProcess": True}}),
        "{securityContext}",
    ),
    "other users of the node": ({"spec": {"hostUsers": True}}, "allow.podFields={hostUsers}"),
    "another operating system": ({"spec": {"os": {"name": "windows"}}}, "allow.podFields={os}"),
    "a network of the node's own": ({"spec": {"hostname": "bank"}}, "allow.podFields={hostname}"),
    "the names of all Services": ({"spec": {"enableServiceLinks": True}}, "enableServiceLinks"),
    "an Event per failed pull": ({"spec": {"restartPolicy": "Never"}}, "{restartPolicy}"),
    "a gate that never opens": ({"spec": {"readinessGates": []}}, "{readinessGates}"),
    "a field of tomorrow": ({"spec": {"hostEverything": True}}, "{hostEverything}"),
}


@pytest.mark.parametrize("case", ESCAPES)
def test_a_pod_patch_does_not_reach_further_than_serving(case: str) -> None:
    patch, value = ESCAPES[case]

    (text,) = said(a_model(patch))

    assert text.startswith(
        ("FieldNotAllowed: spec.unified.podPatch.", "Image", "Account", "Volume")
    )
    assert value in text
    assert text.endswith(" in the chart")


@pytest.mark.parametrize("case", ESCAPES)
def test_what_the_sentence_says_to_set_is_what_allows_it(case: str) -> None:
    patch, _ = ESCAPES[case]
    (text,) = said(a_model(patch))
    field, _, value = text.rpartition("set allow.")[2].removesuffix(" in the chart").partition("=")

    assert said(a_model(patch), AllowList.model_validate({field: [value.strip("{}")]})) == []


def test_every_volume_of_the_operators_own_is_known_as_such() -> None:
    """By what `plan` writes: a name, and where its content comes from."""
    sources = {"configMap", "secret", "emptyDir", "hostPath", "persistentVolumeClaim"}
    planned = {"embedding", "predictor"}
    for file in Path(plan.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Dict):
                fields = {k.value: v for k, v in zip(node.keys, node.values, strict=True)
                          if isinstance(k, ast.Constant)}  # fmt: skip
                name = fields.get("name")
                if sources & fields.keys() and isinstance(name, ast.Constant):
                    planned.add(name.value)

    assert len(planned) > 8
    for name in planned:
        volume = {"name": name, "configMap": {"name": "mine"}}
        (text,) = said(a_model({"spec": {"volumes": [volume]}}))
        assert "of the operator's own" in text
        assert said(a_model({"spec": {"volumes": [{"name": name, "emptyDir": {}}]}})) == []


def test_what_teams_patch_every_day_is_allowed() -> None:
    patch = container(
        env=[{"name": "HF_HUB_OFFLINE", "value": "1"}],
        resources={"limits": {"amd.com/gpu": 1}},
        volumeMounts=[
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "claim", "mountPath": "/data"},
        ],
        livenessProbe={"periodSeconds": 30},
    )
    patch["spec"] |= {
        "affinity": {},
        "topologySpreadConstraints": [],
        "runtimeClassName": "nvidia",
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "scratch", "emptyDir": {"sizeLimit": "20Gi"}},
            {"name": "claim", "persistentVolumeClaim": {"claimName": "documents"}},
        ],
    }

    assert said(a_model(patch)) == []


def test_images_are_allowed_by_whole_parts_of_their_name() -> None:
    allow = AllowList(images=("registry.example.com/ml",))

    assert said(a_model(image="registry.example.com/ml/worker:2"), allow) == []
    assert said(a_model(image="registry.example.com/ml@sha256:0"), allow) == []
    assert said(a_model(image="tandem/worker:0.1.0"), allow) == []
    assert "ImageNotAllowed" in said(a_model(image="registry.example.com/mlx/worker:2"), allow)[0]


def test_folders_of_nodes_and_the_operators_namespace_are_refused() -> None:
    (folder,) = said(a_model(weights={"source": "file:///models"}))
    (own,) = said(a_model(namespace="tandem-system"))

    assert folder == (
        "VolumeNotAllowed: spec.weights.source file:///models mounts a folder of the node; use "
        "image:///, pvc://, hf:// or another source, or set allow.volumes={hostPath} in the chart"
    )
    assert "set allow.ownNamespace=true in the chart" in own
    assert said(a_model(namespace="tandem-system"), AllowList(own_namespace=True)) == []


def test_a_secret_is_used_only_with_its_owners_label() -> None:
    router = a_router()
    label = "tandem.dev/usable-by"

    (refused,) = said(router, **{"db-password": {"app": "bank"}})
    (missing,) = said(router, **{"db-password": None})

    assert refused == (
        "SecretNotAllowed: spec.tiers[0].external.apiKeySecretRef: Secret db-password is not for "
        "routers; whoever owns it may allow it: kubectl label secret db-password "
        "tandem.dev/usable-by=routers, or set allow.unlabelledSecrets=true in the chart"
    )
    assert missing.startswith("SecretMissing: spec.tiers[0].external.apiKeySecretRef: there is no ")
    assert "SecretNotAllowed" in said(router, **{"db-password": {label: "models"}})[0]
    for value in ("routers", "all"):
        assert said(router, **{"db-password": {label: value}}) == []
    assert said(router, AllowList(unlabelled_secrets=True)) == []


PLACES = {
    "volumes[0].secret": {"volumes": [{"name": "x", "secret": {"secretName": "s"}}]},
    "imagePullSecrets[0]": {"imagePullSecrets": [{"name": "s"}]},
    "containers[0].env[0].valueFrom.secretKeyRef": {
        "containers": [
            {"name": "worker", "env": [{"valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}
        ]
    },
    "volumes[0].csi.nodePublishSecretRef": {
        "volumes": [{"name": "x", "csi": {"nodePublishSecretRef": {"name": "s"}}}]
    },
    "volumes[0].projected.sources[0].secret": {
        "volumes": [{"name": "x", "projected": {"sources": [{"secret": {"name": "s"}}]}}]
    },
}


@pytest.mark.parametrize("place", PLACES)
def test_every_way_of_a_patch_to_a_secret_is_found(place: str) -> None:
    found = secrets_of(a_model({"spec": PLACES[place]}))

    assert found == {f"spec.unified.podPatch.spec.{place}": "s"}


def test_every_field_that_names_a_secret_asks_for_its_label() -> None:
    """A field that is added tomorrow is found by its name."""
    key = {"name": "s", "key": "k"}
    store = {"postgres": {"secretRef": key}}
    router = a_router(keySecretRef=key, metricsTokenSecretRef=key, store=store)

    assert set(secrets_of(router)) == {
        "spec.tiers[0].external.apiKeySecretRef",
        "spec.keySecretRef",
        "spec.metricsTokenSecretRef",
        "spec.store.postgres.secretRef",
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["metadata", "spec", "containers", "volumes", "env", "name", "secret"])
            | st.text(max_size=8),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["metadata", "spec", "x"]), JSON, max_size=3))
def test_any_patch_gets_an_answer(patch: Object) -> None:
    for text in said(a_model(patch)):
        assert text


async def test_a_refused_model_makes_nothing_and_says_so() -> None:
    cluster = Cluster(settings=CLOSED)
    await cluster.settle()

    accepted = cluster.condition("Model", "m", "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "VolumeNotAllowed")
    assert cluster.condition("Model", "m", "Ready")["reason"] == "VolumeNotAllowed"
    assert cluster.names("Deployment") == cluster.names("Secret") == []


async def test_a_router_waits_for_its_secrets_label() -> None:
    text = BOTH.replace("file:///models", "hf://models") + "  keySecretRef: {name: keys, key: k}\n"
    cluster = Cluster(text, settings=CLOSED)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}}
    cluster.store.write(secret, manager="user")
    result = await cluster.reconcile("Router", "r")
    assert cluster.condition("Router", "r", "Accepted")["reason"] == "SecretNotAllowed"
    assert result.again_s is not None  # a label of a Secret wakes nobody

    secret["metadata"] = {"name": "keys", "labels": {"tandem.dev/usable-by": "routers"}}
    cluster.store.write(secret, manager="user")
    await cluster.settle()
    assert cluster.condition("Router", "r", "Accepted")["status"] == "True"
    assert "r-router" in cluster.names("Deployment")


# Somebody else's objects ----------------------------------------------------------------------


def foreign(kind: str, name: str, **body: Any) -> Object:
    versions = {"Service": "v1", "Role": "rbac.authorization.k8s.io/v1", "Deployment": "apps/v1"}
    owner = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "bank", "uid": "b"}
    metadata = {"name": name, "ownerReferences": [{**owner, "controller": True}]}
    version = versions.get(kind, "v1")
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **body}


@pytest.mark.parametrize(
    ("kind", "name", "owner"),
    [
        ("Service", "l-prefill", "Model l"),
        ("ConfigMap", "s-weights", ""),
        ("Service", "r-router", "Router r"),
        ("Role", "r-router", "Router r"),
        ("Deployment", "r-router", "Router r"),
    ],
)
async def test_an_object_of_somebody_else_is_never_touched(
    kind: str, name: str, owner: str
) -> None:
    cluster = Cluster(BOTH)
    cluster.store.write(foreign(kind, name, spec={"selector": {"app": "bank"}}), manager="bank")
    before = cluster.get(kind, name)
    await cluster.settle()

    assert cluster.get(kind, name) == before
    if owner:
        condition = cluster.condition(*owner.split(), "Accepted")
        assert (condition["status"], condition["reason"]) == ("False", "NameTaken")
        assert f"{kind} {name} exists and belongs to StatefulSet bank" in condition["message"]
        label = f"tandem.dev/{owner.split()[0].lower()}"
        own = cluster.store.find("Deployment", labels={label: owner.split()[1]})
        assert own == []  # half a Model helps nobody

    cluster.store.remove(kind, "default", name)
    await cluster.settle()
    assert cluster.names("Deployment") == ["l-decode", "l-prefill", "r-router", "s-unified"]


CHILD_KINDS = (
    "Deployment",
    "Service",
    "ConfigMap",
    "Role",
    "RoleBinding",
    "ServiceAccount",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "WorkerPool",
)


async def children() -> list[Object]:
    """One of each kind that a pair of Models and their Router are made into."""
    cluster = Cluster(BOTH)
    await cluster.settle()
    return [cluster.store.find(kind)[-1] for kind in CHILD_KINDS]


@pytest.mark.parametrize("claim", ["nobody's", "not the controller", "another uid", "held", "ours"])
async def test_of_every_kind_of_child_one_that_is_not_ours_stays_as_it_is(claim: str) -> None:
    """Orphans, objects that name us without being ours, and those with a finalizer included."""
    for child in await children():
        kind, name = child["kind"], child["metadata"]["name"]
        [reference] = child["metadata"]["ownerReferences"]
        cluster = Cluster(BOTH)
        uid = cluster.get(reference["kind"], reference["name"])["metadata"]["uid"]
        metadata: Object = {"name": name, "labels": child["metadata"]["labels"]}
        if claim == "not the controller":
            metadata["ownerReferences"] = [reference | {"uid": uid, "controller": False}]
        elif claim == "another uid":
            metadata["ownerReferences"] = [reference | {"uid": "of-an-earlier-one"}]
        elif claim == "held":
            metadata["finalizers"] = ["bank.example/ledger"]
        elif claim == "ours":
            metadata["ownerReferences"] = [reference | {"uid": uid}]
        theirs = {"apiVersion": child["apiVersion"], "kind": kind, "metadata": metadata}
        spec = child["spec"] if kind == "WorkerPool" else {"selector": {"app": "bank"}}
        cluster.store.write(theirs | {"spec": spec}, manager="bank")
        before = cluster.get(kind, name)
        await cluster.settle()

        changed = cluster.get(kind, name) != before
        refused = cluster.condition(reference["kind"], reference["name"], "Accepted")
        assert changed == (claim == "ours"), (kind, name)
        assert (refused["reason"] == "NameTaken") == (claim != "ours"), (kind, name)


async def test_a_child_that_changes_hands_is_let_go() -> None:
    """Adopted by somebody else while it runs: no more written, nor removed with its Model."""
    for child in await children():
        kind, name = child["kind"], child["metadata"]["name"]
        cluster = Cluster(BOTH)
        await cluster.settle()
        stored = cluster.get(kind, name)
        bank = foreign(kind, name)["metadata"]["ownerReferences"]
        stored["metadata"] = {"name": name, "ownerReferences": bank}
        cluster.store.remove(kind, "default", name)
        cluster.store.write(stored, manager="bank")
        before = cluster.get(kind, name)
        await cluster.settle()

        assert cluster.get(kind, name) == before, (kind, name)


async def test_labels_do_not_make_an_object_ours() -> None:
    """Neither pruned, nor scaled, nor counted as a child."""
    cluster = Cluster(BOTH)
    labels = {"app.kubernetes.io/managed-by": "tandem", "tandem.dev/model": "l"}
    for kind, name in (("Service", "other"), ("ConfigMap", "other")):
        obj = foreign(kind, name)
        obj["metadata"]["labels"] = labels
        cluster.store.write(obj, manager="bank")
    before = [cluster.get(kind, "other") for kind in ("Service", "ConfigMap")]
    await cluster.settle()

    assert [cluster.get(kind, "other") for kind in ("Service", "ConfigMap")] == before


async def test_a_child_that_was_made_again_by_somebody_is_not_taken_over() -> None:
    """The pass has seen its own Service; before it writes, another one has the name."""
    cluster = Cluster(BOTH)
    await cluster.settle()
    apply = cluster.store.apply
    cluster.store.change("Service", "default", "l-decode", {"spec": {"selector": {"a": "b"}}})

    async def meanwhile(obj: Object) -> Object:
        if (obj["kind"], obj["metadata"]["name"]) == ("Service", "l-decode"):
            cluster.store.remove("Service", "default", "l-decode")
            cluster.store.write(foreign("Service", "l-decode"), manager="bank")
        return await apply(obj)

    cluster.store.apply = meanwhile  # type: ignore[method-assign]
    with pytest.raises(Exception, match="is not the one with uid"):
        await cluster.reconcile("Model", "l")

    assert cluster.get("Service", "l-decode")["metadata"]["ownerReferences"][0]["name"] == "bank"


async def test_a_secret_of_the_users_own_is_not_removed_with_the_last_router() -> None:
    cluster = Cluster(BOTH)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "tandem-peer-token"}}
    cluster.store.write({**secret, "stringData": {"token": "t"}}, manager="user")
    await cluster.settle()
    for kind, name in (("Router", "r"), ("Model", "s"), ("Model", "l")):
        cluster.store.remove(kind, "default", name)
        await cluster.reconcile(kind, name)

    assert cluster.names("Secret") == ["tandem-peer-token"]


def at(url: str, **more: Any) -> Router:
    """A Router that asks this address, without a key unless one is given."""
    tier = {"name": "large", "external": {"url": url, "model": "x", **PRICES, **more}}
    return Router.model_validate(
        {
            "metadata": {"name": "r", "namespace": "team", "uid": "u"},
            "spec": {"tiers": [tier]},
        }
    )


@pytest.mark.parametrize(
    "url",
    ["http://2852039166/v1", "https://kubernetes.default.svc/v1", "http://10.96.0.1:443/v1"],
)
def test_a_router_asks_no_address_of_the_cluster_or_of_its_cloud(url: str) -> None:
    (refusal,) = said(at(url))
    lifted = said(at(url), AllowList(external_networks=("0.0.0.0/0",)))

    assert refusal.startswith("AddressNotAllowed: spec.tiers[0].external.url")
    assert "allow.externalNetworks" in refusal
    assert lifted == []


def test_a_judge_is_held_to_the_same() -> None:
    spec = at("https://api.example.com/v1").spec.to_wire()
    judge = {"url": "http://10.0.0.1/v1", "model": "j", "apiKeySecretRef": KEY}
    learning = {"shadowShare": "0.1", "judge": judge}
    metadata = {"name": "r", "namespace": "team", "uid": "u"}
    router = Router.model_validate({"metadata": metadata, "spec": {**spec, "learning": learning}})

    found = said(router, **{"db-password": {"tandem.dev/usable-by": "routers"}})

    assert [each.partition(":")[0] for each in found] == ["AddressNotAllowed", "KeyInTheClear"]
    assert all("spec.learning.judge.url" in each for each in found)


def test_a_routers_key_is_not_sent_in_the_clear() -> None:
    router = at("http://api.example.com/v1", apiKeySecretRef=KEY)
    labels = {"db-password": {"tandem.dev/usable-by": "routers"}}

    (refusal,) = said(router, **labels)
    lifted = said(router, AllowList(plain_http_keys=True), **labels)

    assert refusal.startswith("KeyInTheClear: ")
    assert "allow.plainHttpKeys=true" in refusal
    assert lifted == []


def test_a_routers_pods_hold_to_what_the_installation_allows_and_local_ones_to_less() -> None:
    """The second look is at every connection: a name says where it leads only then."""
    allow = AllowList(external_networks=("10.20.0.0/16",))
    router = at("https://api.example.com/v1")

    inside = router_config(router, {}, Settings(allow=allow)).outward
    at_home = router_config(router, {}, Settings()).outward

    assert (inside.only_public, inside.allowed_networks) == (True, ("10.20.0.0/16",))
    assert (at_home.only_public, at_home.plain_http_keys) == (False, True)


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/", "https://user:pw@api.example/v1", "http://[fe80::1]:80/v1"],
)
def test_what_no_installation_allows_breaks_a_rule_of_the_resource(url: str) -> None:
    found = violations("Router", {"spec": at(url).spec.to_wire()})

    assert any("metadata service" in each.message for each in found)
