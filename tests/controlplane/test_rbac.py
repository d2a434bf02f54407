"""The operator holds the rights that it uses, each of them and no other."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import gateway_kinds
from eventually import eventually_in_another_process
from tandem_operator.resources.base import Object

HERE = Path(__file__).resolve().parent
CHART = str(HERE.parents[1] / "charts" / "tandem")
NAMESPACE = "guarded"
ACCOUNT = "tandem-operator"
FORBIDDEN = 403
RBAC = "rbac.authorization.k8s.io"

# Answers what the operator asks of workers; real ones would only cost time here.
WORKER = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b'{"ok": true, "num_bytes": 64, "num_running": 1, "num_waiting": 0}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST = answer
http.server.ThreadingHTTPServer((os.environ["POD_IP"], 8100), Handler).serve_forever()
"""


# Stands in for a router that asks for a training.
ASKS = """
import http.server, json, os
STATE = {"set_points": {"gain_threshold": 0.1}, "retraining": {"run": "1", "leads": True}}
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        body = json.dumps(STATE).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST = do_PUT = answer
http.server.ThreadingHTTPServer((os.environ["POD_IP"], 8000), Handler).serve_forever()
"""


def _python(name: str, code: str) -> Object:
    return {"name": name, "command": ["python", "-c", code], "args": []}


def _worker(**spec: Any) -> Object:
    return {**spec, "podPatch": {"spec": {"containers": [_python("worker", WORKER)]}}}


def _object(kind: str, name: str, **spec: Any) -> Object:
    metadata = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": "tandem.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


# A token that its owner wants changed, from the beginning.
TOKEN = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {
        "name": "tandem-peer-token",
        "namespace": NAMESPACE,
        "labels": {"app.kubernetes.io/managed-by": "tandem"},
        "annotations": {"tandem.dev/rotate": "now"},
    },
    "stringData": {"token": "first"},
}

RESOURCES = [
    TOKEN,
    _object("AutoscalingPolicy", "p"),
    _object(
        "Model",
        "m",
        image="python",
        weights={"source": "image:///models/m"},
        drain={"timeout": "1s"},
        prefill=_worker(replicas=1),
        decode=_worker(replicas=2),
    ),
    _object(
        "Model",
        "c",
        weights={"source": "hf://org/name", "cache": {"size": "1Gi"}},
        unified={"nodeSelector": {"no-node": "has-this"}},
    ),
    _object(
        "Router",
        "r",
        tiers=[{"name": n, "modelRef": {"name": n}} for n in ("c", "m")],
        gateway={"namespace": "gateways"},
        podPatch={"spec": {"nodeSelector": {"no-node": "has-this"}}},
    ),
    {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": "db",
            "namespace": NAMESPACE,
            "labels": {"tandem.dev/usable-by": "routers"},
        },
        "stringData": {"url": "postgresql://nobody@127.0.0.1:9/none"},
    },
    _object(
        "Router",
        "t",
        tiers=[{"name": n, "modelRef": {"name": n}} for n in ("c", "m")],
        store={"postgres": {"secretRef": {"name": "db", "key": "url"}}},
        predictor={"training": {"data": "image:///graded.jsonl", "fromLabels": True}},
        learning={
            "shadowShare": "0.1",
            "capture": "Prompts",
            "judge": {"url": "https://judge.example/v1", "model": "j"},
        },
        podPatch={
            "spec": {
                "initContainers": [_python("train-predictor", "pass")],
                "containers": [_python("router", ASKS)],
            }
        },
    ),
]

# Its Models stand in for real ones: with a command and an image of their own.
ALLOWED = (
    "--set",
    "allow.ownNamespace=true,allow.podFields={command,args},allow.images={python},"
    "allow.volumes={hostPath}",
)

GATEWAY = "inference.networking.k8s.io"
GATEWAY_API = "gateway.networking.k8s.io"
# Every way in that the chart can make.
ENTRANCE = json.dumps(
    {
        "inferencePools": True,
        "ingress": {"host": "{router}.{namespace}.test"},
        "httpRoute": {
            "host": "{router}.{namespace}.gateway.test",
            "parentRefs": [{"name": "public"}],
        },
    }
)
WITH_ENTRANCES = ("--set-json", f"routers={ENTRANCE}")

ON_THE_NODE = _object("Model", "f", weights={"source": "file:///m"}, unified={})

# Objects that say they belong to Model m, or Router r, and are in no plan, one of each kind.
MANAGED = "app.kubernetes.io/managed-by=tandem"
_POD = {
    "metadata": {"labels": {"stray": "1"}},
    "spec": {"containers": [{"name": "c", "image": "python"}]},
}
STRAYS: list[Object] = [
    {"apiVersion": "v1", "kind": "ConfigMap"},
    {"apiVersion": "v1", "kind": "ServiceAccount"},
    {"apiVersion": "v1", "kind": "Service", "spec": {"ports": [{"port": 1}]}},
    {"apiVersion": f"{RBAC}/v1", "kind": "Role", "rules": []},
    {
        "apiVersion": f"{RBAC}/v1",
        "kind": "RoleBinding",
        "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": "stray"},
    },
    {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "spec": {"podSelector": {"matchLabels": {"stray": "1"}}},
    },
    {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": {"stray": "1"}}},
    },
    {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "spec": {"replicas": 0, "selector": {"matchLabels": {"stray": "1"}}, "template": _POD},
    },
    {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "spec": {"suspend": True, "template": {"spec": {**_POD["spec"], "restartPolicy": "Never"}}},
    },
    {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "WorkerPool",
        "spec": {"modelRef": {"name": "m"}, "role": "unified"},
    },
    {
        "apiVersion": f"{GATEWAY}/v1",
        "kind": "InferencePool",
        "spec": {"selector": {"matchLabels": {"stray": "1"}}, "targetPorts": [{"number": 1}]},
    },
    {"apiVersion": f"{GATEWAY_API}/v1", "kind": "HTTPRoute", "spec": {"hostnames": ["stray.test"]}},
    {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "spec": {"defaultBackend": {"service": {"name": "stray", "port": {"number": 1}}}},
    },
]
OF_A_ROUTER = ("InferencePool", "HTTPRoute", "Ingress")


# Kinds that the operator makes by server-side apply.
APPLIED = (
    ("apps", "deployments"),
    ("", "services"),
    ("", "configmaps"),
    ("", "serviceaccounts"),
    ("", "persistentvolumeclaims"),
    ("policy", "poddisruptionbudgets"),
    ("networking.k8s.io", "networkpolicies"),
    ("batch", "jobs"),
    (RBAC, "roles"),
    (RBAC, "rolebindings"),
    (GATEWAY, "inferencepools"),
    (GATEWAY_API, "httproutes"),
    ("networking.k8s.io", "ingresses"),
)


@dataclass(frozen=True)
class Grant:
    """One verb on one resource; name is "" where the rule names none."""

    group: str
    resource: str
    verb: str
    name: str = ""

    def rule(self) -> Object:
        rule: Object = {
            "apiGroups": [self.group],
            "resources": [self.resource],
            "verbs": [self.verb],
        }
        return {**rule, "resourceNames": [self.name]} if self.name else rule


def rendered(cluster: Any, *options: str) -> list[Object]:
    """The chart's objects."""
    options = (*WITH_ENTRANCES, "--api-versions", f"{GATEWAY}/v1/InferencePool", *options)
    options = ("--api-versions", f"{GATEWAY_API}/v1/HTTPRoute", *options)
    result = cluster.run("helm", "template", "tandem", CHART, "-n", NAMESPACE, *options)
    assert result.returncode == 0, result.stderr
    return [o for o in yaml.safe_load_all(result.stdout) if o]


def grants(objects: list[Object]) -> list[Grant]:
    """Everything that the rules of the objects allow, one verb at a time."""
    rules = [r for o in objects if is_the_operators(o) and "rules" in o for r in o["rules"]]
    return [
        Grant(group, resource, verb, name)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames", [""])
    ]


def is_the_operators(obj: Object) -> bool:
    """Whether a role, or its binding, is for the operator and not for people."""
    people = "app.kubernetes.io/component" in obj["metadata"].get("labels", {})
    return obj["kind"].startswith(("Role", "ClusterRole")) and not people


# A claim's owner is changed by a patch; admission asks for this besides.
LETTING_GO = Grant("", "persistentvolumeclaims", "delete")


@dataclass
class Story:
    """What the operator asked for while resources lived, and objects as it had made them."""

    requests: list[Any]
    made: dict[tuple[str, str], Object]

    def find(self, grant: Grant) -> Any:
        """A request that took the grant, None where there was none."""
        for request in self.requests:
            same = (request.group, request.resource) == (grant.group, grant.resource)
            if same and grant.verb in request.verbs() and grant.name in ("", request.name):
                return request
        return None


@pytest.fixture(scope="module")
def story(cluster: Any) -> Iterator[Story]:
    """The life of a few resources under the chart's own rights.

    All of it happens under the restricted pod security standard.
    """
    level = "pod-security.kubernetes.io/enforce=restricted"
    # None is there, unless tests of other files ran between those of this one.
    cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--timeout=60s")
    # An operator of before was refused once its rights were uninstalled: that is another life.
    before = len(cluster.requests(NAMESPACE, ACCOUNT))
    cluster.kubectl("create", "namespace", NAMESPACE)
    cluster.kubectl("label", "namespace", NAMESPACE, level)
    gateway_kinds.install(cluster)
    options = (
        *ALLOWED,
        *WITH_ENTRANCES,
        "--set",
        "operator.replicas=1",
        "--take-ownership",
        "--wait",
        "--timeout=60s",
    )
    installed = cluster.run("helm", "install", "tandem", CHART, "-n", NAMESPACE, *options)
    try:
        assert installed.returncode == 0, installed.stderr
        made = live(cluster)
        # What other tests' namespaces are left with while they end is no part of the story.
        log = [
            request
            for request in cluster.requests(NAMESPACE, ACCOUNT)[before:]
            if "/namespaces/" not in request.uri or f"/namespaces/{NAMESPACE}" in request.uri
        ]
        yield Story(log, made)
    finally:
        cluster.run("kubectl", "delete", "models,routers,asp", "--all", "-n", NAMESPACE)
        cluster.run("helm", "uninstall", "tandem", "-n", NAMESPACE)
        cluster.run("kubectl", "delete", "namespace", NAMESPACE, "--wait=false")
        gateway_kinds.remove(cluster)


def live(cluster: Any) -> dict[tuple[str, str], Object]:
    """Resources are made, get ready, are disturbed, shrink and go; the objects made for them."""
    here = ("-n", NAMESPACE)
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(RESOURCES))
    cluster.kubectl("wait", *here, "--for=condition=Ready", "model/m", "--timeout=60s")
    admitted(cluster)
    eventually_in_another_process(lambda: cluster.get("jobs", *here, "-l", MANAGED)["items"])
    made = {key: plain(cluster, key[1]) for key in APPLIED}

    # A folder of the node is not for pods under this standard, and the Model says so.
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(ON_THE_NODE))
    refused = '--for=jsonpath={.status.conditions[?(@.type=="Ready")].reason}=PodsRefused'
    cluster.kubectl("wait", *here, refused, "model/f", "--timeout=30s")

    of_m, of_r = stray(cluster, "Model", "m"), stray(cluster, "Router", "r")
    strays = yaml.safe_dump_all([{**s, "metadata": metadata_of(s, of_m, of_r)} for s in STRAYS])
    cluster.kubectl("apply", *here, "-f", "-", stdin=strays)
    cluster.kubectl("wait", *here, "--for=delete", "-f", "-", "--timeout=30s", stdin=strays)

    # What happens a second time is counted on the Event of the first.
    for count in (1, 2, 1):
        cluster.kubectl("scale", *here, "workerpool/m-decode", f"--replicas={count}")
        there = f"--for=jsonpath={{.status.replicas}}={count}"
        cluster.kubectl("wait", *here, there, "workerpool/m-decode", "--timeout=30s")

    cluster.kubectl("delete", *here, "models,routers,asp", "--all", "--timeout=30s")
    cluster.kubectl("wait", *here, "--for=delete", "secret/tandem-peer-token", "--timeout=30s")
    # A RoleBinding is only judged while its Role is there.
    role, binding = made[RBAC, "roles"], made[RBAC, "rolebindings"]
    binding["roleRef"]["name"] = "bound"
    bound = {**role, "metadata": {**role["metadata"], "name": "bound"}}
    cluster.kubectl("create", "-f", "-", stdin=yaml.safe_dump(bound))
    return made


def metadata_of(stray: Object, of_a_model: Object, of_a_router: Object) -> Object:
    """Whose a stray says it is; a WorkerPool has to be called as its Model and role are."""
    owner = of_a_router if stray["kind"] in OF_A_ROUTER else of_a_model
    return {**owner, "name": "m-unified"} if stray["kind"] == "WorkerPool" else owner


def stray(cluster: Any, kind: str, name: str) -> Object:
    """Metadata of something that says it belongs to this resource."""
    uid = cluster.get(kind.lower(), name, "-n", NAMESPACE)["metadata"]["uid"]
    owner = {"apiVersion": "tandem.dev/v1alpha1", "kind": kind, "name": name, "uid": uid}
    labels = {"app.kubernetes.io/managed-by": "tandem", f"tandem.dev/{kind.lower()}": name}
    references = [{**owner, "controller": True}]
    return {"name": "stray", "labels": labels, "ownerReferences": references}


def admitted(cluster: Any) -> None:
    """Every Deployment got its pods: restricted pod security refused none of them."""
    for deployment in cluster.get("deployments", "-n", NAMESPACE)["items"]:
        status, name = deployment["status"], deployment["metadata"]["name"]
        assert status["replicas"] == deployment["spec"]["replicas"], name
        assert not [c for c in status["conditions"] if c["type"] == "ReplicaFailure"], name


def plain(cluster: Any, resource: str) -> Object:
    """An object that the operator made, as it could be applied again."""
    found: Object = cluster.get(resource, "-n", NAMESPACE, "-l", MANAGED)["items"][0]
    spec = found.get("spec", {})
    for key in ("clusterIP", "clusterIPs"):
        if isinstance(spec, dict):
            spec.pop(key, None)
    if found["kind"] == "Job":  # what the apiserver made of it
        del spec["selector"]
        labels = spec["template"]["metadata"]["labels"]
        own = {k: v for k, v in labels.items() if "controller-uid" not in k and "job-name" not in k}
        spec["template"]["metadata"] = {"labels": own}
    metadata = {k: found["metadata"][k] for k in ("name", "namespace", "labels")}
    return {k: v for k, v in found.items() if k != "status"} | {"metadata": metadata}


def attempt(grant: Grant, story: Story) -> list[Any]:
    """Method, path and body of something that the operator did with a grant, as a dry run."""
    if grant.resource.endswith("/finalizers"):
        kind = {"models/finalizers": "Model", "routers/finalizers": "Router"}[grant.resource]
        owner = {"apiVersion": "tandem.dev/v1alpha1", "kind": kind, "name": "x", "uid": "y"}
        owned = {"ownerReferences": [{**owner, "blockOwnerDeletion": True}]}
        return again(story.made["", "configmaps"], "/api/v1", "configmaps", owned)
    if grant == LETTING_GO:
        claim = story.made["", "persistentvolumeclaims"]
        owner = {"apiVersion": "tandem.dev/v1alpha1", "kind": "Model", "name": "x", "uid": "y"}
        metadata = {**claim["metadata"], "ownerReferences": [owner]}
        path = f"/api/v1/namespaces/{NAMESPACE}/{grant.resource}/{metadata['name']}"
        body = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata}
        return ["PATCH", f"{path}?dryRun=All&fieldManager=trial", body]
    if grant.resource == "endpointslices":
        role = dict(story.made[RBAC, "roles"])
        role["rules"] = [{**role["rules"][0], "verbs": [grant.verb]}]
        return again(role, f"/apis/{RBAC}/v1", "roles", {})
    done = story.find(grant)
    path = done.uri.split("?")[0]
    dry = f"{path}?dryRun=All"
    if grant.verb == "watch":
        return ["GET", f"{path}?watch=true&resourceVersion=0", None]
    if grant.verb in ("get", "list"):
        return ["GET", path, None]
    if done.verb == "patch":
        body = story.made.get((grant.group, grant.resource))
        if body is None:
            return ["PATCH", f"{dry}&fieldManager=trial", {}]
        return again(body, path.split("/namespaces/")[0], grant.resource, {})
    method = {"create": "POST", "update": "PUT", "delete": "DELETE"}[grant.verb]
    return [method, dry, None if method == "DELETE" else {}]


def again(body: Object, root: str, resource: str, metadata: Object) -> list[Any]:
    """Server-side apply of an object under a name of its own, which takes patch and create."""
    named = {**body, "metadata": {**body["metadata"], "name": "trial", **metadata}}
    path = f"{root}/namespaces/{NAMESPACE}/{resource}/trial"
    return ["PATCH", f"{path}?dryRun=All&fieldManager=trial", named]


def statuses(cluster: Any, trials: list[Object]) -> list[list[int]]:
    """What the requests of each trial were answered; see rights.py."""
    server = cluster.kubectl("config", "view", "--minify", "-o", "jsonpath={..server}")
    command = (sys.executable, str(HERE / "rights.py"), str(cluster.run_dir / "pki"), server)
    result = cluster.run(*command, stdin=json.dumps(trials), timeout_s=120.0)
    assert result.returncode == 0, result.stderr
    found: list[list[int]] = json.loads(result.stdout)
    return found


def test_the_operator_lives_a_whole_life_without_being_refused(story: Story) -> None:
    refused = [(r.verb, r.uri) for r in story.requests if r.status == FORBIDDEN]

    assert len(story.requests) > 100
    assert refused == []


def test_without_any_one_right_something_that_the_operator_did_is_forbidden(
    cluster: Any, story: Story
) -> None:
    every = grants(rendered(cluster))
    unused = [g for g in every if not (story.find(g) or asked_by_others(g))]
    assert unused == []

    # A proof that the other rights are in force: a list that works as long as they are.
    proofs = [Grant("tandem.dev", kind, "list") for kind in ("models", "routers")]
    trials = [
        {
            "rules": [g.rule() for g in every if g != grant],
            "requests": [attempt(grant, story)],
            "proof": attempt(next(p for p in proofs if p != grant), story),
        }
        for grant in every
    ]
    requests = [request for t in trials for request in t["requests"]]
    whole = {**trials[0], "rules": [g.rule() for g in every], "requests": requests}
    allowed, *without = statuses(cluster, [whole, *trials])

    assert len(every) > 60
    assert [g for g, s in zip(every, allowed, strict=True) if s == FORBIDDEN] == []
    assert [g for g, s in zip(every, without, strict=True) if s != [FORBIDDEN]] == []


def asked_by_others(grant: Grant) -> bool:
    """Rights that admission asks for and never appear as requests of their own."""
    resource = grant.resource
    return resource.endswith("/finalizers") or resource == "endpointslices" or grant == LETTING_GO


@pytest.mark.parametrize("labelled", [True, False])
def test_the_operator_lists_no_secrets_and_changes_none_of_others(
    cluster: Any, story: Story, labelled: bool
) -> None:
    """It can make one, so that a namespace gets its token, but neither list nor watch any.

    RBAC cannot say "metadata only", so that looking at labels takes the right to get; where labels
    are not asked for, it reads one by name and no other.
    """
    options = () if labelled else ("--set", "allow.unlabelledSecrets=true")
    every = [g.rule() for g in grants(rendered(cluster, *options))]
    proof = attempt(Grant("tandem.dev", "models", "list"), story)
    secrets = f"/api/v1/namespaces/{NAMESPACE}/secrets"
    mine, other = f"{secrets}/tandem-peer-token", f"{secrets}/somebodys-password"
    dry, everywhere = "?dryRun=All", "/api/v1/secrets"
    tried = {
        "get its own": ["GET", mine, None],
        "get another": ["GET", other, None],
        "list": ["GET", secrets, None],
        "list its own by field": ["GET", f"{secrets}?fieldSelector=metadata.name=x", None],
        "list all namespaces": ["GET", everywhere, None],
        "watch": ["GET", f"{everywhere}?watch=true", None],
        "change another": ["PATCH", f"{other}{dry}&fieldManager=trial", {}],
        "delete another": ["DELETE", f"{other}{dry}", None],
        "take a token": ["POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/x/token", {}],
        "enter a pod": ["POST", f"/api/v1/namespaces/{NAMESPACE}/pods/x/exec?command=id", None],
    }

    trial = {"rules": every, "requests": list(tried.values()), "proof": proof}
    (answers,) = statuses(cluster, [trial])

    allowed = [name for name, status in zip(tried, answers, strict=True) if status != FORBIDDEN]
    assert allowed == (["get its own", "get another"] if labelled else ["get its own"])


@pytest.mark.parametrize("scope", ["", "team-a"])
def test_no_right_has_a_wildcard_and_none_reaches_beyond_the_namespace_asked_for(
    cluster: Any, scope: str
) -> None:
    objects = rendered(cluster, "--set", f"operator.watchNamespace={scope}")
    roles = [o for o in objects if is_the_operators(o)]

    assert len(grants(objects)) == len(set(grants(objects))) > 60
    assert all("*" not in (g.group, g.resource, g.verb) for g in grants(objects))
    assert all(g.verb not in ("escalate", "bind", "impersonate") for g in grants(objects))
    where = {o["metadata"].get("namespace") for o in roles}
    assert where == ({"team-a", NAMESPACE} if scope else {None, NAMESPACE})


def test_both_scopes_give_the_same_rights(cluster: Any) -> None:
    everywhere = grants(rendered(cluster))

    assert grants(rendered(cluster, "--set", "operator.watchNamespace=team-a")) == everywhere
