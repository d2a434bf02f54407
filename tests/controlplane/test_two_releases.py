"""Two releases of the chart on one cluster: whose are the definitions and each namespace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHART = str(Path(__file__).resolve().parents[2] / "charts" / "tandem")
TEAM, OTHER, UNSEEN = "two-releases", "two-releases-b", "default"
ONE, TWO = "release-one", "release-two"
OPTIONS = ("--create-namespace", "--wait", "--timeout=60s", "--set", "images.pullPolicy=Never")
SECOND = ("--set", "crds.install=false,operator.replicas=1")
MODEL = """\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {name: m}
spec:
  weights: {source: "image:///m"}
  unified: {nodeSelector: {no-node: has-this}}
"""


@pytest.fixture(scope="module")
def first(cluster: Any) -> Iterator[Any]:
    """A release that holds the definitions and looks after one namespace."""
    for namespace in (TEAM, OTHER):
        cluster.kubectl("create", "namespace", namespace)
    both = f"operator.replicas=1,operator.watchNamespaces={{{TEAM},{OTHER}}}"
    own = ("--set", both, "--take-ownership")
    installed = cluster.run("helm", "install", "one", CHART, "-n", ONE, *OPTIONS, *own)
    try:
        assert installed.returncode == 0, installed.stderr
        for namespace in (TEAM, OTHER, UNSEEN):
            cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=MODEL)
        yield cluster
    finally:
        for name, namespace in (("two", TWO), ("one", ONE)):
            cluster.run("helm", "uninstall", name, "-n", namespace, "--ignore-not-found")
            cluster.run("kubectl", "delete", "namespace", namespace, "--wait=false")
        cluster.run("kubectl", "delete", "model", "m", "-n", UNSEEN)
        cluster.run("kubectl", "delete", "namespace", TEAM, OTHER, "--wait=false")


def test_a_release_looks_after_the_namespaces_that_it_is_given(first: Any) -> None:
    for namespace in (TEAM, OTHER):
        made = ("--for=create", "deployment/m-unified", "-n", namespace, "--timeout=40s")
        first.kubectl("wait", *made)
        role = first.get("role", "one-operator", "-n", namespace)
        assert {"models", "routers"} <= set(role["rules"][0]["resources"])

    assert first.get("deployments", "-n", UNSEEN)["items"] == []
    assert first.run("kubectl", "get", "clusterrole", "one-operator").returncode != 0


def test_helm_test_says_whether_the_release_works(first: Any) -> None:
    result = first.run("helm", "test", "one", "-n", ONE, "--logs", "--timeout=60s")

    assert result.returncode == 0, result.stderr
    assert "the operator may list them, and one leads" in result.stdout


def test_a_plain_second_release_is_told_what_to_set(first: Any) -> None:
    result = first.run("helm", "install", "two", CHART, "-n", TWO, *OPTIONS)

    assert result.returncode != 0
    assert (
        f"release one in namespace {ONE} holds the definitions of Models and Routers; set "
        "crds.install=false" in result.stderr
    )


def test_the_second_release_stands_still_until_the_first_is_gone(first: Any) -> None:
    installed = first.run("helm", "install", "two", CHART, "-n", TWO, *OPTIONS, *SECOND)
    assert installed.returncode == 0, installed.stderr

    first.kubectl(
        "wait", "--for=create", "event", "-n", TEAM, "--field-selector=reason=OtherRelease"
    )
    events = first.get("events", "-n", TEAM, "--field-selector=reason=OtherRelease")["items"]
    claim = first.get("configmap", "tandem-operator", "-n", TEAM)
    assert events[0]["message"].startswith(f"release one in namespace {ONE} looks")
    assert claim["data"] == {"namespace": ONE, "release": "one"}

    first.kubectl("delete", "deployment", "one-operator", "-n", ONE, "--cascade=foreground")
    taken = "--for=jsonpath={.data.release}=two"
    first.kubectl("wait", taken, "configmap/tandem-operator", "-n", TEAM, "--timeout=55s")
