"""Two releases of the chart on one cluster: whose are the definitions and each namespace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHART = str(Path(__file__).resolve().parents[2] / "charts" / "tandem")
TEAM = "two-releases"
ONE, TWO = "release-one", "release-two"
OPTIONS = ("--create-namespace", "--wait", "--timeout=60s", "--set", "images.pullPolicy=Never")
SECOND = ("--set", "crds.install=false,operator.replicas=1")
MODEL = f"""\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {{name: m, namespace: {TEAM}}}
spec:
  weights: {{source: "image:///m"}}
  unified: {{nodeSelector: {{no-node: has-this}}}}
"""


@pytest.fixture(scope="module")
def first(cluster: Any) -> Iterator[Any]:
    """A release that holds the definitions and looks after one namespace."""
    cluster.kubectl("create", "namespace", TEAM)
    own = ("--set", f"operator.replicas=1,operator.watchNamespace={TEAM}", "--take-ownership")
    installed = cluster.run("helm", "install", "one", CHART, "-n", ONE, *OPTIONS, *own)
    try:
        assert installed.returncode == 0, installed.stderr
        cluster.kubectl("apply", "-f", "-", stdin=MODEL)
        cluster.kubectl("wait", "--for=create", "deployment/m-unified", "-n", TEAM)
        yield cluster
    finally:
        for name, namespace in (("two", TWO), ("one", ONE)):
            cluster.run("helm", "uninstall", name, "-n", namespace, "--ignore-not-found")
            cluster.run("kubectl", "delete", "namespace", namespace, "--wait=false")
        cluster.run("kubectl", "delete", "namespace", TEAM, "--wait=false")


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
