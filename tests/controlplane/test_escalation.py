"""Who may create Models and Routers, and nothing else, gets nothing else by them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem_operator.resources.base import Object

pytestmark = pytest.mark.controlplane

CHART = str(Path(__file__).resolve().parents[2] / "charts" / "tandem")
OWN, TEAM = "fortress", "tenants"
SEEN = "--for=jsonpath={.status.observedGeneration}"
MALLORY = ("--as=mallory", "--as-group=system:authenticated")

PEOPLE = f"""\
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: only-models}}
rules:
- {{apiGroups: [tandem.dev], resources: [models, routers], verbs: [get, create, patch, delete]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: only-models}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: only-models}}
subjects: [{{kind: User, name: mallory, apiGroup: rbac.authorization.k8s.io}}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{name: editors, namespace: {TEAM}}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: edit}}
subjects: [{{kind: User, name: eve, apiGroup: rbac.authorization.k8s.io}}]
---
apiVersion: v1
kind: Secret
metadata: {{name: db-password, namespace: {TEAM}}}
stringData: {{key: secret}}
---
apiVersion: v1
kind: Service
metadata: {{name: bank-router, namespace: {TEAM}, labels: {{app: bank}}}}
spec: {{selector: {{app: bank}}, ports: [{{port: 80}}]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{name: till-router, namespace: {TEAM}}}
rules: [{{apiGroups: [""], resources: [pods], verbs: [get]}}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: vault-worker, namespace: {TEAM}}}
spec: {{podSelector: {{matchLabels: {{app: vault}}}}, policyTypes: [Ingress]}}
"""


def obj(kind: str, name: str, namespace: str = TEAM, **spec: Any) -> Object:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "tandem.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


def a_model(name: str, patch: Object | None = None, namespace: str = TEAM, **spec: Any) -> Object:
    role = {"podPatch": {"spec": patch}} if patch else {}
    weights = {"source": "image:///m"}
    return obj("Model", name, namespace, **{"weights": weights, "unified": role, **spec})


def external(**more: Any) -> Object:
    prices = {"usdPer1MInputTokens": "1", "usdPer1MOutputTokens": "1"}
    return {"url": "https://evil.example.com/v1", "model": "x", **prices, **more}


def a_router(name: str, **tier: Any) -> Object:
    return obj("Router", name, tiers=[{"name": "t", "external": external(**tier)}])


ROOT = {"name": "x", "hostPath": {"path": "/"}}
ATTACKS = {
    "account": (a_model("account", {"serviceAccountName": "default"}), "AccountNotAllowed"),
    "host": (a_model("host", {"hostPID": True, "hostNetwork": True}), "FieldNotAllowed"),
    "command": (
        a_model("command", {"containers": [{"name": "worker", "command": ["sh"]}]}),
        "FieldNotAllowed",
    ),
    "privileged": (
        a_model(
            "privileged",
            {"containers": [{"name": "worker", "securityContext": {"privileged": True}}]},
        ),
        "FieldNotAllowed",
    ),
    "image": (a_model("image", image="evil/miner:1"), "ImageNotAllowed"),
    "node": (a_model("node", weights={"source": "file:///etc"}), "VolumeNotAllowed"),
    "volume": (a_model("volume", {"volumes": [ROOT]}), "VolumeNotAllowed"),
    "config": (
        a_router("config")
        | {
            "spec": {
                "tiers": [{"name": "t", "external": external()}],
                "podPatch": {"spec": {"volumes": [{"name": "config", "configMap": {"name": "m"}}]}},
            }
        },
        "FieldNotAllowed",
    ),
    "step": (
        a_model("step", {"initContainers": [{"name": "fetch-weights", "command": ["sh"]}]}),
        "FieldNotAllowed",
    ),
    "token": (
        a_model(
            "token",
            {
                "volumes": [
                    {
                        "name": "x",
                        "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]},
                    }
                ]
            },
        ),
        "VolumeNotAllowed",
    ),
    "compiled": (
        a_model(
            "compiled",
            {
                "containers": [
                    {"name": "worker", "volumeMounts": [{"name": "x", "mountPath": "/tmp"}]}
                ],
                "volumes": [{"name": "x", "persistentVolumeClaim": {"claimName": "x"}}],
            },
        ),
        "FieldNotAllowed",
    ),
    "own": (a_model("own", namespace=OWN), "NamespaceNotAllowed"),
    "metadata": (a_router("metadata", url="http://2852039166/v1"), "AddressNotAllowed"),
    "inside": (a_router("inside", url="https://kubernetes.default.svc/v1"), "AddressNotAllowed"),
    "private": (a_router("private", url="https://10.96.0.1/v1"), "AddressNotAllowed"),
    "weights": (
        a_model("weights", weights={"source": "hf://a/b", "secretRef": {"name": "db-password"}}),
        "SecretNotAllowed",
    ),
    "thief": (
        a_router("thief", apiKeySecretRef={"name": "db-password", "key": "key"}),
        "SecretNotAllowed",
    ),
    "bank": (a_router("bank"), "NameTaken"),
    "till": (a_router("till"), "NameTaken"),
    "vault": (a_model("vault"), "NameTaken"),
}


@pytest.fixture(scope="module")
def guarded(cluster: Any) -> Iterator[Any]:
    """The chart as it comes, somebody else's objects, and everything that Mallory tries."""
    for namespace in (OWN, TEAM):
        cluster.kubectl("create", "namespace", namespace)
    options = ("-n", OWN, "--take-ownership", "--wait", "--timeout=60s")
    installed = cluster.run("helm", "install", "t", CHART, "--set", "operator.replicas=1", *options)
    try:
        assert installed.returncode == 0, installed.stderr
        cluster.kubectl("apply", "-f", "-", stdin=PEOPLE)
        tried = {"apiVersion": "v1", "kind": "List", "items": [o for o, _ in ATTACKS.values()]}
        cluster.kubectl("create", "-f", "-", *MALLORY, stdin=json.dumps(tried))
        yield cluster
    finally:
        for namespace in (OWN, TEAM):
            cluster.run("kubectl", "delete", "models,routers", "--all", "-n", namespace)
        cluster.run("helm", "uninstall", "t", "-n", OWN)
        cluster.run("kubectl", "delete", "clusterrole,clusterrolebinding", "only-models")
        cluster.run("kubectl", "delete", "namespace", OWN, TEAM, "--wait=false")


def accepted(cluster: Any, attack: Object) -> Object:
    """The condition, once the operator has looked at the object."""
    kind, metadata = attack["kind"].lower(), attack["metadata"]
    here = ("-n", metadata["namespace"])
    cluster.kubectl("wait", *here, SEEN, f"{kind}/{metadata['name']}", "--timeout=30s")
    status = cluster.get(kind, metadata["name"], *here)["status"]
    return next(c for c in status["conditions"] if c["type"] == "Accepted")


@pytest.mark.parametrize("case", ATTACKS)
def test_what_reaches_beyond_serving_is_refused_with_its_rule(guarded: Any, case: str) -> None:
    attack, reason = ATTACKS[case]

    condition = accepted(guarded, attack)

    assert (condition["status"], condition["reason"]) == ("False", reason)
    told = "Rename this" if reason == "NameTaken" else " in the chart"
    assert told in condition["message"]
    name = attack["metadata"]["name"]
    label = f"tandem.dev/{attack['kind'].lower()}={name}"
    made = "deployments,services,configmaps,roles,serviceaccounts,networkpolicies,pods"
    assert guarded.get(made, "-A", "-l", label)["items"] == []


def test_an_object_that_is_nested_too_deep_is_refused_and_stops_nobody(guarded: Any) -> None:
    """Whoever lists or watches Models has it among what is to be read."""

    def told(name: str) -> str:
        where = "jsonpath={.status.conditions[?(@.type=='Accepted')].message}"
        guarded.kubectl("wait", "-n", TEAM, f"model/{name}", "--timeout=60s", SEEN)
        text: str = guarded.kubectl("get", "model", name, "-n", TEAM, "-o", where)
        return text

    for levels in (900, 9000):
        text = json.dumps(a_model(f"deep-{levels}", {"affinity": "DEEP"}))
        deep = '{"a":' * levels + "{}" + "}" * levels
        guarded.kubectl("create", "-f", "-", *MALLORY, stdin=text.replace('"DEEP"', deep))

        assert "nested deeper than 64 levels" in told(f"deep-{levels}")

    # Who starts now reads them in a list.
    guarded.kubectl("delete", "pod", "-n", OWN, "-l", "app.kubernetes.io/component=operator")
    text = json.dumps(a_model("after", {"hostPID": True}))
    guarded.kubectl("create", "-f", "-", *MALLORY, stdin=text)

    assert "hostPID" in told("after")


def test_objects_of_others_are_as_they_were(guarded: Any) -> None:
    for case in ("bank", "till", "vault"):
        accepted(guarded, ATTACKS[case][0])
    service = guarded.get("service", "bank-router", "-n", TEAM)
    role = guarded.get("role", "till-router", "-n", TEAM)
    policy = guarded.get("networkpolicy", "vault-worker", "-n", TEAM)

    assert service["spec"]["selector"] == {"app": "bank"}
    assert service["metadata"]["labels"] == {"app": "bank"}
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]
    assert policy["spec"]["podSelector"] == {"matchLabels": {"app": "vault"}}
    for found in (service, role, policy):
        assert "ownerReferences" not in found["metadata"]


def test_the_owner_of_a_secret_lets_routers_use_it(guarded: Any) -> None:
    label = "tandem.dev/usable-by=routers"
    guarded.kubectl("label", "secret", "db-password", label, "-n", TEAM)
    accepted_now = '--for=jsonpath={.status.conditions[?(@.type=="Accepted")].status}=True'
    guarded.kubectl("wait", "-n", TEAM, accepted_now, "router/thief", "--timeout=60s")

    deployment = guarded.get("deployment", "thief-router", "-n", TEAM)
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    assert {"secretName": "db-password", "defaultMode": 420} in [v.get("secret") for v in volumes]


def test_people_get_their_rights_by_the_usual_roles(guarded: Any) -> None:
    def may(verb: str, resource: str, *who: str) -> bool:
        asked = ("auth", "can-i", verb, f"{resource}.tandem.dev", "-n", TEAM, *who)
        return guarded.run("kubectl", *asked).stdout.strip() == "yes"

    eve, everyone = ("--as=eve",), ("--as=somebody",)
    assert may("create", "models", *eve)
    assert may("delete", "routers", *eve)
    assert not may("delete", "workerpools", *eve)  # the operator's own
    assert not may("get", "models", *everyone)
