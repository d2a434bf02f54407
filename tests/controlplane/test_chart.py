"""The chart installs, upgrades and uninstalls on a real control plane."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHART = str(ROOT / "charts" / "tandem")
CRDS = (
    "autoscalingpolicies.tandem.dev",
    "models.tandem.dev",
    "routers.tandem.dev",
    "workerpools.tandem.dev",
)


def test_values_of_the_wrong_type_are_refused_with_their_path(cluster) -> None:
    result = cluster.run("helm", "template", "t", CHART, "--set", "operator.replicas=many")

    assert result.returncode != 0
    assert "at '/operator/replicas': got string, want integer" in result.stderr


@pytest.mark.parametrize("value", ["operators.replicas=1", "images.opeator=x"])
def test_misspelled_values_are_refused(cluster, value: str) -> None:
    result = cluster.run("helm", "template", "t", CHART, "--set", value)

    assert result.returncode != 0
    assert "additional properties" in result.stderr


def test_a_combination_that_cannot_work_is_refused_with_a_sentence(cluster) -> None:
    result = cluster.run("helm", "template", "t", CHART, "--set", "serviceAccount.create=false")

    assert result.returncode != 0
    assert "name an existing ServiceAccount, or set serviceAccount.create=true" in result.stderr


def test_monitors_are_rendered_only_where_their_kind_exists(cluster) -> None:
    plain = cluster.run("helm", "template", "t", CHART).stdout
    kind = "monitoring.coreos.com/v1/PodMonitor"
    monitored = cluster.run("helm", "template", "t", CHART, "--api-versions", kind).stdout

    assert "PodMonitor" not in plain
    assert monitored.count("kind: PodMonitor") == 3


def test_custom_resource_definitions_are_established_and_survive_an_upgrade(cluster) -> None:
    namespace = "chart-crds"
    common = (CHART, "--namespace", namespace, "--set", "operator.replicas=0")

    # The definitions may be there already, kept from another test's release.
    options = ("--create-namespace", "--take-ownership")
    installed = cluster.run("helm", "install", "tandem", *common, *options)
    assert installed.returncode == 0, installed.stderr
    cluster.kubectl(
        "wait", "--for=condition=Established", "--timeout=30s", *(f"crd/{c}" for c in CRDS)
    )
    upgraded = cluster.run("helm", "upgrade", "tandem", *common, "--set", "operator.logLevel=debug")
    assert upgraded.returncode == 0, upgraded.stderr
    removed = cluster.run("helm", "uninstall", "tandem", "--namespace", namespace)

    assert removed.returncode == 0, removed.stderr
    assert "kubectl apply -f FILE" in installed.stdout
    # crds.keep: removing the chart must not remove everybody's Models.
    cluster.kubectl("get", "crd", *CRDS)
