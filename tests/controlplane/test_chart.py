"""The chart: its values, what it renders, and its life on a real control plane."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem_operator.resources.base import Object

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "tandem"
CRDS = (
    "autoscalingpolicies.tandem.dev",
    "models.tandem.dev",
    "routers.tandem.dev",
    "workerpools.tandem.dev",
)
PROMETHEUS_RULE = "monitoring.coreos.com/v1/PrometheusRule"
HTTP_ROUTE = "gateway.networking.k8s.io/v1/HTTPRoute"
INFERENCE_POOL = "inference.networking.k8s.io/v1/InferencePool"
SERVICE_MONITOR = "monitoring.coreos.com/v1/ServiceMonitor"
POD_MONITOR = "monitoring.coreos.com/v1/PodMonitor"


def template(cluster: Any, *options: str) -> list[Object]:
    """What the chart renders."""
    result = cluster.run("helm", "template", "t", str(CHART), *options)
    assert result.returncode == 0, result.stderr
    return [o for o in yaml.safe_load_all(result.stdout) if o]


# Values -------------------------------------------------------------------------------------


def documented() -> dict[str, str]:
    """The comment above each value of values.yaml, by its path."""
    found: dict[str, str] = {}
    path: list[str] = []
    comment = ""
    for line in (CHART / "values.yaml").read_text().splitlines():
        if match := re.match(r"\s*# -- (.*)", line):
            comment = match[1]
        elif match := re.match(r"(\s*)([A-Za-z]+):", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            if comment:
                found[".".join(path)] = comment
            comment = ""
    return found


def described(schema: Object, path: str = "") -> dict[str, str]:
    """The description of each value of the schema, by its path; sections are opened."""
    found: dict[str, str] = {}
    for name, node in schema["properties"].items():
        at = f"{path}{name}"
        if "properties" in node and at != "operator.resources":
            found |= described(node, f"{at}.")
        elif at != "global":
            found[at] = node["description"]
    return found


def leaves(values: Object, path: str = "") -> Iterator[str]:
    """The paths of the values; a section is what has no comment of its own."""
    for name, value in values.items():
        at = f"{path}{name}"
        if isinstance(value, dict) and at not in documented():
            yield from leaves(value, f"{at}.")
        else:
            yield at


def test_every_value_is_documented_and_the_schema_says_the_same() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    assert documented() == described(schema)
    assert set(leaves(values)) == set(documented())


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("operator.replicas=many", "at '/operator/replicas': got string, want integer"),
        ("operator.replicas=6", "at '/operator/replicas': maximum: got 6, want 5"),
        ("operator.leaseSeconds=1", "at '/operator/leaseSeconds': minimum: got 1, want 3"),
        ("operator.logLevel=loud", "at '/operator/logLevel': value must be one of"),
        ("operator.watchNamespace=Team_A", "at '/operator/watchNamespace': 'Team_A' does not"),
        ("operator.resources.cpu=1", "at '/operator/resources': additional properties 'cpu'"),
        ("operators.replicas=1", "additional properties 'operators' not allowed"),
        ("images.opeator=x", "at '/images': additional properties 'opeator' not allowed"),
        ("images.worker=", "at '/images/worker': minLength: got 0, want 1"),
        ("images.pullPolicy=Sometimes", "at '/images/pullPolicy': value must be one of"),
        ("clusterDomain=.local", "at '/clusterDomain': '.local' does not match pattern"),
        ("metrics.intervalSeconds=0", "at '/metrics/intervalSeconds': minimum: got 0, want 1"),
        (
            "serviceAccount.create=false",
            "needs serviceAccount.name; name an existing ServiceAccount, or set "
            "serviceAccount.create=true",
        ),
        (
            "serviceAccount.create=false,serviceAccount.name=a,serviceAccount.annotations.x=y",
            "annotate yours yourself, or set serviceAccount.create=true",
        ),
        (
            "operator.watchNamespace=a,operator.watchNamespaces={b}",
            "put it into operator.watchNamespaces",
        ),
        ("images.digests.router=latest", "at '/images/digests/router': 'latest' does not match"),
        ("allow.image={x}", "at '/allow': additional properties 'image' not allowed"),
        (
            "operator.watchNamespace=default",
            "is the operator's own namespace, where Models and Routers are refused; install into "
            "another one, or set allow.ownNamespace=true",
        ),
        (
            "networkPolicies.metricsFrom=null",
            "could not scrape; name its namespace there, or set metrics.podMonitor=false",
        ),
        (
            "networkPolicies.egressTo[0].ipBlock.cidr=10.0.0.0/8",
            "set networkPolicies.restrictEgress=true, or remove egressTo",
        ),
        ("routers.ingress.host=ai.test", "at '/routers/ingress/host': 'ai.test' does not match"),
        ("routers.serviceType=Public", "at '/routers/serviceType': value must be one of"),
        ("routers.ingress.className=nginx", "set routers.ingress.host, or remove the rest"),
        (
            r"routers.httpRoute.host=\{router\}.test,routers.httpRoute.parentRefs[0].name=g,"
            "operator.watchNamespace=a",
            "needs Gateway API, which the cluster does not know",
        ),
        ("routers.inferencePools=true", "which the cluster does not know; install its definitions"),
        (
            r"routers.ingress.host=\{router\}.test",
            "write {namespace} into it, or set operator.watchNamespaces to one",
        ),
        (
            r"routers.ingress.host=\{router\}.\{namespace\}.test,routers.ingress.clusterIssuer=le",
            "name that Secret, such as {router}-tls",
        ),
        (
            "crds.install=false",
            "the cluster does not know Models; apply the definitions first (kubectl apply "
            "--server-side -f charts/tandem/files/crds), or set crds.install=true",
        ),
        (
            "metrics.serviceMonitor=true",
            "would both have every pod scraped; set metrics.podMonitor=false",
        ),
        (
            "metrics.podMonitor=false,metrics.alerts=false,metrics.labels.release=x",
            "set metrics.podMonitor=true, or remove the labels",
        ),
        (
            "images.pullPolicy=Never,images.pullSecrets={a}",
            "remove them, or set images.pullPolicy=IfNotPresent",
        ),
        (
            r"operator.resources.limits.nvidia\.com/gpu=1",
            "which the operator never uses; remove it, and set gpus on a Model's roles",
        ),
    ],
)
def test_values_that_cannot_work_are_refused_with_a_sentence(
    cluster: Any, value: str, problem: str
) -> None:
    result = cluster.run("helm", "template", "t", str(CHART), "--set", value)

    assert result.returncode != 0
    assert problem in " ".join(result.stderr.split())


def test_helm_lint_finds_nothing(cluster: Any) -> None:
    result = cluster.run("helm", "lint", "--strict", str(CHART))

    assert result.returncode == 0, result.stdout
    assert "0 chart(s) failed" in result.stdout


def test_the_packaged_chart_renders_what_the_folder_does(cluster: Any, tmp_path: Path) -> None:
    """What goes into an OCI registry holds every file that the templates read."""
    packed = cluster.run("helm", "package", str(CHART), "--destination", str(tmp_path))
    (archive,) = tmp_path.glob("tandem-*.tgz")
    options = ("--set", "metrics.dashboard=true", "--api-versions", PROMETHEUS_RULE)

    assert packed.returncode == 0, packed.stderr
    rendered = cluster.run("helm", "template", "t", str(archive), *options)
    assert rendered.returncode == 0, rendered.stderr
    assert rendered.stdout == cluster.run("helm", "template", "t", str(CHART), *options).stdout


def test_every_value_reaches_what_is_rendered(cluster: Any) -> None:
    """Changing any value changes the output: none is ignored."""
    changed = {
        "images.operator": "x/operator:1",
        "images.router": "x/router:1",
        "images.worker": "x/worker:1",
        "images.registry": "registry.test/mirror",
        "images.digests.operator": "sha256:" + 64 * "0",
        "images.digests.router": "sha256:" + 64 * "1",
        "images.digests.worker": "sha256:" + 64 * "2",
        "images.pullPolicy": "Always",
        "images.pullSecrets": ["key"],
        "crds.install": False,
        "crds.keep": False,
        "operator.replicas": 1,
        "operator.logLevel": "debug",
        "operator.watchNamespace": "team-a",
        "operator.watchNamespaces": ["team-b", "team-c"],
        "operator.leaseSeconds": 30,
        "operator.prometheusUrl": "http://prometheus.test:9090",
        "operator.resources": {"requests": {"cpu": "7"}},
        "operator.nodeSelector": {"disk": "ssd"},
        "operator.tolerations": [{"operator": "Exists"}],
        "operator.affinity": {"nodeAffinity": {}},
        "operator.topologySpreadConstraints": [{"maxSkew": 2}],
        "operator.priorityClassName": "high",
        "operator.podAnnotations": {"a": "b"},
        "operator.extraEnv": [{"name": "A", "value": "b"}],
        "operator.extraVolumes": [{"name": "a", "emptyDir": {}}],
        "operator.extraVolumeMounts": [{"name": "a", "mountPath": "/a"}],
        "serviceAccount.create": False,
        "serviceAccount.name": "mine",
        "serviceAccount.annotations": {"a": "b"},
        "serviceAccount.workerAnnotations": {"a": "b"},
        "serviceAccount.routerAnnotations": {"a": "b"},
        "podDefaults.worker": {"spec": {"schedulerName": "mine"}},
        "podDefaults.router": {"spec": {"schedulerName": "mine"}},
        "allow.images": ["registry.example.com/ml"],
        "allow.serviceAccounts": ["a"],
        "allow.volumes": ["hostPath"],
        "allow.podFields": ["command"],
        "allow.unlabelledSecrets": True,
        "allow.plainHttpKeys": True,
        "allow.externalNetworks": ["10.0.0.0/8"],
        "allow.remoteCode": True,
        "allow.ownNamespace": True,
        "roles.create": False,
        "routers.serviceType": "LoadBalancer",
        "routers.ipFamilyPolicy": "PreferDualStack",
        "routers.serviceAnnotations": {"a": "b"},
        "routers.ingress.host": "{router}.{namespace}.test",
        "routers.ingress.className": "nginx",
        "routers.ingress.annotations": {"a": "b"},
        "routers.ingress.tlsSecret": "{router}-tls",
        "routers.ingress.clusterIssuer": "le",
        "routers.httpRoute.host": "{router}.{namespace}.test",
        "routers.httpRoute.parentRefs": [{"name": "gateway"}],
        "routers.httpRoute.annotations": {"a": "b"},
        "routers.inferencePools": True,
        "networkPolicies.enabled": False,
        "networkPolicies.metricsFrom": [{"podSelector": {}}],
        "networkPolicies.routerFrom": [{"podSelector": {}}],
        "networkPolicies.restrictEgress": True,
        "networkPolicies.egressTo": [{"podSelector": {}}],
        "clusterDomain": "example.org",
        "logFormat": "json",
        "metrics.podMonitor": False,
        "metrics.serviceMonitor": True,
        "metrics.alerts": False,
        "metrics.runbooks": "https://runbooks.test/tandem",
        "metrics.labels": {"release": "prometheus"},
        "metrics.intervalSeconds": 60,
        "metrics.routerTokenSecret": "scrape",
        "metrics.dashboard": True,
    }
    kinds = ("--api-versions", POD_MONITOR, "--api-versions", "tandem.dev/v1alpha1/Model")
    kinds = (*kinds, "--api-versions", HTTP_ROUTE, "--api-versions", PROMETHEUS_RULE)
    kinds = (*kinds, "--api-versions", INFERENCE_POOL)
    kinds = (*kinds, "--api-versions", SERVICE_MONITOR)
    script = f"helm template t {CHART} {' '.join(kinds)} -f - | sha256sum"
    digests: dict[str, str] = {}
    for path, value in changed.items():
        values: Object = {}
        node = values
        *parents, last = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
        if path == "serviceAccount.create":
            node["name"] = "t-operator"
        if path == "metrics.serviceMonitor":
            node["podMonitor"] = False
        if path == "networkPolicies.egressTo":
            node["restrictEgress"] = True
        if path.startswith("routers.ingress.") and last != "host":
            node["host"] = "{router}.{namespace}.other"
            node.setdefault("tlsSecret", "{router}-key")
        if path.startswith("routers.httpRoute."):
            node.setdefault("host", "{router}.{namespace}.other")
            node.setdefault("parentRefs", [{"name": "other"}])
        digests[path] = cluster.run("sh", "-c", script, stdin=yaml.safe_dump(values)).stdout
    default = cluster.run("sh", "-c", script, stdin="{}").stdout

    assert set(changed) == set(documented())
    assert len(default.split()) == 2
    assert [p for p, d in digests.items() if d == default] == []
    assert len(set(digests.values())) == len(digests)


def test_values_of_an_earlier_release_are_completed_by_this_ones_defaults(cluster: Any) -> None:
    """`--reuse-values` knows nothing of sections that came later; here each in turn is unknown."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert (CHART / "files" / "defaults.yaml").read_text() == (CHART / "values.yaml").read_text()
    whole = cluster.run("helm", "template", "t", str(CHART)).stdout
    each = " ".join(f"'{section}'" for section in values)
    script = f"for s in {each}; do helm template t {CHART} --set $s=null | sha256sum; done"
    found = cluster.run("sh", "-c", script).stdout.splitlines()
    digest = hashlib.sha256(whole.encode()).hexdigest()

    assert [line.split()[0] for line in found] == [digest] * len(values)


def test_a_value_that_is_taken_away_is_no_error_of_a_template(cluster: Any) -> None:
    """One that somebody sets to null, or that a later release of this section added."""
    each = " ".join(sorted(documented()))
    script = f"for v in {each}; do helm template t {CHART} --set $v=null 2>&1 >/dev/null; done"
    said = cluster.run("sh", "-c", script, timeout_s=200.0).stdout

    assert "nil pointer" not in said, said
    assert "<nil>" not in said, said
    assert "wrong type" not in said, said


# Monitoring ---------------------------------------------------------------------------------


def test_monitors_are_rendered_only_where_their_kind_exists(cluster: Any) -> None:
    plain = template(cluster)
    labelled = ("--set", "metrics.labels.release=prometheus")
    monitored = template(cluster, "--api-versions", POD_MONITOR, *labelled)
    off = template(cluster, "--api-versions", POD_MONITOR, "--set", "metrics.podMonitor=false")

    found = [o for o in monitored if o["kind"] == "PodMonitor"]
    assert not [o for o in [*plain, *off] if o["kind"] == "PodMonitor"]
    assert [o["metadata"]["name"] for o in found] == ["t-operator", "t-router", "t-worker"]
    assert {o["metadata"]["labels"]["release"] for o in found} == {"prometheus"}


def test_service_monitors_take_the_place_of_pod_monitors(cluster: Any) -> None:
    """For a Prometheus that selects those alone; each finds the Services that are made."""
    from tandem_operator.plan.objects import MANAGED, ROLE_LABEL, ROUTER_LABEL

    on = "metrics.podMonitor=false,metrics.serviceMonitor=true"
    kinds = ("--api-versions", SERVICE_MONITOR, "--api-versions", POD_MONITOR)
    objects = template(cluster, *kinds, "--set", on)
    monitors = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "ServiceMonitor"}
    service = next(o for o in objects if o["kind"] == "Service")

    assert not [o for o in objects if o["kind"] == "PodMonitor"]
    assert set(monitors) == {"t-operator", "t-router", "t-worker"}
    own = monitors["t-operator"]["selector"]["matchLabels"]
    assert own.items() <= service["metadata"]["labels"].items()
    for name, label in (("t-router", ROUTER_LABEL), ("t-worker", ROLE_LABEL)):
        selector = monitors[name]["selector"]
        assert selector["matchLabels"] == MANAGED
        assert selector["matchExpressions"] == [{"key": label, "operator": "Exists"}]
        assert monitors[name]["endpoints"][0]["port"] == "http"


def test_alerts_come_where_their_kind_exists_and_name_their_runbooks(cluster: Any) -> None:
    kind = ("--api-versions", PROMETHEUS_RULE)
    (rule,) = [o for o in template(cluster, *kind) if o["kind"] == "PrometheusRule"]
    off = template(cluster, *kind, "--set", "metrics.alerts=false")
    rules = [r for group in rule["spec"]["groups"] for r in group["rules"]]
    source = (CHART / "files" / "alerts.yaml").read_text()

    assert "PrometheusRule" not in {o["kind"] for o in [*off, *template(cluster)]}
    assert [r["alert"] for r in rules] == re.findall(r"alert: (\w+)", source)
    for r in rules:
        url = f"docs/monitoring.md#{r['alert'].lower()}"
        assert r["annotations"]["runbook_url"] == url
        if not r["alert"].startswith("TandemOperator"):
            assert "{{ $labels" in r["annotations"]["summary"]


def planned_pods() -> list[Object]:
    """The pod templates that the operator plans for the example."""
    from tandem_operator.manifests import load_paths
    from tandem_operator.plan import Settings, plan_model, plan_router
    from tandem_operator.plan.decode import parse
    from tandem_operator.resources import Model, Router

    found = [parse(m.obj) for m in load_paths([ROOT / "examples" / "01-hybrid"])]
    models = {m.metadata.name: m for m in found if isinstance(m, Model)}
    (router,) = [r for r in found if isinstance(r, Router)]
    plans = [plan_model(m, [], [], Settings(), "token") for m in models.values()]
    plans.append(plan_router(router, models, [router], Settings(), "token"))
    objects = [o for plan in plans for o in plan.apply]
    return [o["spec"]["template"] for o in objects if o["kind"] == "Deployment"]


def test_the_monitors_select_the_pods_that_there_are(cluster: Any) -> None:
    objects = template(cluster, "--api-versions", POD_MONITOR)
    operator = next(o for o in objects if o["kind"] == "Deployment")["spec"]["template"]
    monitors = [o["spec"] for o in objects if o["kind"] == "PodMonitor"]
    matched = 0

    for pod in [operator, *planned_pods()]:
        labels = pod["metadata"]["labels"].items()
        (spec,) = [m for m in monitors if m["selector"]["matchLabels"].items() <= labels]
        ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert {e["port"] for e in spec["podMetricsEndpoints"]} <= ports
        matched += 1

    assert matched == 5


def test_the_dashboard_comes_when_asked_for_and_asks_only_for_metrics_that_exist(
    cluster: Any,
) -> None:
    assert not [o for o in template(cluster) if o["kind"] == "ConfigMap"]
    (found,) = [
        o for o in template(cluster, "--set", "metrics.dashboard=true") if o["kind"] == "ConfigMap"
    ]
    dashboard = json.loads(found["data"]["tandem.json"])
    expressions = [t["expr"] for p in dashboard["panels"] for t in p.get("targets", [])]
    asked = {m for e in expressions for m in re.findall(r"(?:tandem_|vllm:)[a-z0-9_]+", e)}

    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert len(expressions) >= 30
    assert asked - exported() == set()
    assert all(p["description"] for p in dashboard["panels"] if p["type"] != "row")


def exported() -> set[str]:
    """Names of all series that operator, router and worker export."""
    from prometheus_client.parser import text_string_to_metric_families

    import exported_metrics

    names: set[str] = set()
    for family in text_string_to_metric_families(exported_metrics.text()):
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        names |= {family.name + s for s in suffixes.get(family.type, [""])}
        names |= {sample.name for sample in family.samples}
    return names


# Life ---------------------------------------------------------------------------------------


def readme_commands() -> list[str]:
    section = (ROOT / "README.md").read_text().split("\n## On a cluster\n")[1]
    return [line[2:] for line in section.split("```")[1].splitlines() if line.startswith("$ ")]


def test_install_upgrade_rollback_and_uninstall(cluster: Any, tmp_path: Path) -> None:
    """One release through its life, in one namespace, with a Model that outlives it.

    The first version's definitions lack a column and have a field that this operator does not know.
    """
    namespace = "chart-life"
    here = ("--namespace", namespace)
    wait = ("--wait", "--timeout=90s")
    older = tmp_path / "tandem"
    shutil.copytree(CHART, older)
    models = older / "files" / "crds" / "tandem.dev_models.yaml"
    definition = yaml.safe_load(models.read_text())
    columns = definition["spec"]["versions"][0]["additionalPrinterColumns"]
    removed = columns.pop(0)["name"]
    fields = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    fields["spec"]["properties"]["colour"] = {"type": "string"}
    models.write_text(yaml.safe_dump(definition))
    model = json.dumps(
        {
            "apiVersion": "tandem.dev/v1alpha1",
            "kind": "Model",
            "metadata": {"name": "m", "namespace": namespace},
            "spec": {
                "weights": {"source": "image:///m"},
                "unified": {"nodeSelector": {"no-node": "has-this"}},
            },
        }
    )
    coloured = model.replace('"name": "m"', '"name": "c"').replace(
        '"spec": {', '"spec": {"colour": "red", '
    )

    def helm(*arguments: str) -> str:
        result = cluster.run("helm", *arguments, timeout_s=120.0)
        assert result.returncode == 0, f"{arguments}: {result.stderr}"
        return str(result.stdout)

    def shown() -> list[str]:
        crd = cluster.get("crd", "models.tandem.dev")
        return [c["name"] for c in crd["spec"]["versions"][0]["additionalPrinterColumns"]]

    def operator() -> tuple[str, list[str]]:
        """Name of the one operator pod that is meant to stay, and its arguments."""
        selector = "app.kubernetes.io/name=tandem-operator"
        pods = cluster.get("pods", *here, "-l", selector)["items"]
        (pod,) = [p for p in pods if "deletionTimestamp" not in p["metadata"]]
        return pod["metadata"]["name"], pod["spec"]["containers"][0]["args"]

    cluster.kubectl("delete", "namespace", namespace, "--ignore-not-found", "--timeout=60s")

    # Install: the older definitions, the operator at work. Kept definitions of other tests'
    # releases are taken over.
    own = f"operator.replicas=1,operator.watchNamespace={namespace},allow.ownNamespace=true"
    values = ("--set", own)
    options = (*here, *values, *wait)
    notes = helm(
        "install", "tandem", str(older), *options, "--create-namespace", "--take-ownership"
    )
    next_commands = [line.strip() for line in notes.splitlines() if line.startswith("  kubectl")]
    assert next_commands == [f"{c} --namespace {namespace}" for c in readme_commands()[1:]]
    assert removed not in shown()
    first, arguments = operator()
    assert "--log-level=info" in arguments
    cluster.kubectl("apply", "-f", "-", stdin=model)
    cluster.kubectl("wait", *here, "--for=create", "deployment/m-unified", "--timeout=30s")
    child = cluster.get("deployment", "m-unified", *here)["metadata"]

    # A field that slipped through is told on the object, with its path.
    cluster.kubectl("apply", "-f", "-", stdin=coloured)
    refused = '--for=jsonpath={.status.conditions[?(@.type=="Ready")].reason}=Invalid'
    cluster.kubectl("wait", *here, refused, "model/c", "--timeout=30s")
    conditions = cluster.get("model", "c", *here)["status"]["conditions"]
    assert {c["message"].split(";")[0] for c in conditions} == {"spec.colour: unknown field"}

    # Upgrade: the definitions follow the chart, a changed value rolls the operator, the Model's
    # Deployment does not notice.
    helm("upgrade", "tandem", str(CHART), *options, "--set", "operator.logLevel=debug")
    assert removed in shown()
    cluster.kubectl("wait", *here, "--for=create", "deployment/c-unified", "--timeout=30s")
    second, arguments = operator()
    assert second != first
    assert "--log-level=debug" in arguments

    # Rollback: the first release's values and definitions; Models stay.
    helm("rollback", "tandem", "1", *here, *wait)
    third, arguments = operator()
    assert third != second
    assert "--log-level=info" in arguments
    assert removed not in shown()
    helm("upgrade", "tandem", str(CHART), *options)
    leads = "--for=jsonpath={.spec.holderIdentity}"
    cluster.kubectl("wait", *here, leads, "lease/tandem-operator", "--timeout=30s")
    same = cluster.get("deployment", "m-unified", *here)["metadata"]
    assert (same["uid"], same["generation"]) == (child["uid"], child["generation"])

    # Uninstall: what the chart made goes; definitions, Models and their workers stay.
    helm("uninstall", "tandem", *here, *wait)
    made = "deployments,serviceaccounts,roles,rolebindings,configmaps"
    left = cluster.get(made, *here, "-l", "helm.sh/chart")["items"]
    assert [o["metadata"]["name"] for o in left] == []
    cluster.kubectl("get", "crd", *CRDS)
    cluster.kubectl("get", *here, "model/m", "deployment/m-unified")
    cluster.kubectl("delete", *here, "model/m", "model/c", "--timeout=30s")
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")
