"""What an apiserver cannot know of a wrong object becomes a condition with the next step."""

from __future__ import annotations

import pytest
import yaml

from objects_table import MODEL
from stored_cluster import Cluster
from tandem_operator.manifests import ManifestError, load_text
from tandem_operator.plan import Settings
from tandem_operator.plan.decode import parse
from tandem_operator.plan.objects import Problem
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.resources.allow_list import AllowList
from wrong_by_hand import REFUSED, TOLD

BYSTANDER = MODEL.replace("name: m", "name: bystander")


@pytest.mark.parametrize("name", REFUSED)
def test_local_mode_refuses_what_an_apiserver_refuses(name: str) -> None:
    with pytest.raises(ManifestError):
        load_text(REFUSED[name][0], "f.yaml")


@pytest.mark.parametrize("name", TOLD)
async def test_the_condition_says_what_is_wrong_and_what_to_do(name: str) -> None:
    text, reason, sentence = TOLD[name]
    obj = yaml.safe_load(text)
    obj["metadata"]["namespace"] = "default"
    cluster = Cluster(BYSTANDER, Settings(allow=AllowList(volumes=("hostPath",))))
    try:
        cluster.store.write(obj, manager="user")
    except ApiError:  # this store knows what CEL cannot; a real one hands it to the operator
        problem = parse({**obj, "metadata": {**obj["metadata"], "uid": "u"}})
        assert isinstance(problem, Problem)
        assert (problem.reason, sentence in problem.message) == (reason, True)
        return

    await cluster.reconcile(obj["kind"], obj["metadata"]["name"])

    found = cluster.get(obj["kind"], obj["metadata"]["name"])["status"]["conditions"]
    said = {c["reason"]: c["message"] for c in found if c["status"] == "False"}
    assert sentence in said.get(reason, ""), said


def test_the_table_is_large_enough() -> None:
    assert len(REFUSED) + len(TOLD) >= 50
