"""One real control plane per test session (and per xdist worker), in its own network namespace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import binaries
from running_cluster import Cluster, run_cluster

CRDS = Path(__file__).resolve().parents[2] / "charts" / "tandem" / "files" / "crds"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with run_cluster(tmp_path_factory.mktemp("cluster"), release=binaries.NEWEST) as running:
        yield running


@pytest.fixture(scope="module")
def crds(cluster: Cluster) -> Cluster:
    """A cluster that knows the kinds. They stay: every release in these tests takes them over."""
    if cluster.run("kubectl", "get", "crd", "models.tandem.dev").returncode != 0:
        # As Helm, so that a chart takes them over.
        cluster.kubectl("apply", "--server-side", "--field-manager=helm", "-f", str(CRDS))
        cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    return cluster
