"""The table of good and bad objects, held against a real apiserver: it agrees with local mode."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

import objects_table
from tandem_operator.resources import API_VERSION, KINDS
from tandem_operator.resources.rules import RULES
from wrong_by_hand import REFUSED, TOLD
from wrong_values import WRONG

# The apiserver takes these: of a field given twice a YAML parser keeps the last, an empty value
# counts as absent. Local mode tells both.
MENDED = {"given twice", "empty value"}
# CEL cannot know these; local mode tells them at once, the operator as a condition: by itself, or
# because the apiserver refuses the Deployment that follows.
TOLD_LATER = {
    "cron line",
    "time zone",
    "pod patch with a typo",
    "pod patch with amounts that are none",
}
MESSAGES = {rule.message for rules in RULES.values() for rule in rules}

# What the apiserver says to each bad object, word for word.
REFUSALS = Path(__file__).resolve().parent / "golden" / "refusals.txt"

# Runs inside the cluster's network: creates each object as a dry run and prints [status, message].
CREATE = """
import asyncio, json, sys
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.kube.client import KubeApi, connect, path

async def main():
    api = KubeApi(await connect(sys.argv[1]))
    answers = []
    for obj in json.load(sys.stdin):
        query = {"dryRun": "All", "fieldValidation": "Strict"}
        try:
            await api.write("POST", path(obj["kind"], "default"), query, obj)
            answers.append([201, ""])
        except ApiError as error:
            answers.append([error.status, str(error).split(": ", 1)[1]])
    await api.close()
    print(json.dumps(answers))

asyncio.run(main())
"""


def _objects(text: str) -> list[dict[str, Any]]:
    """The custom resources of a text; empty where there is nothing that an apiserver could get."""
    try:
        found = [d for d in yaml.safe_load_all(text) if isinstance(d, dict)]
    except yaml.YAMLError:
        return []
    found = [i for d in found for i in (d["items"] if d.get("kind") == "List" else [d])]
    return [
        d
        for d in found
        if d.get("apiVersion") == API_VERSION
        and d.get("kind") in KINDS
        and (d.get("metadata") or {}).get("name")
    ]


def create(cluster: Any, objects: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Status and message of the apiserver for each object."""
    command = (sys.executable, "-c", CREATE, cluster.env["KUBECONFIG"])
    result = cluster.run(*command, stdin=json.dumps(objects), timeout_s=120.0)
    assert result.returncode == 0, result.stderr
    return [(status, message) for status, message in json.loads(result.stdout)]


def test_every_good_object_is_taken(crds: Any) -> None:
    objects = [o for text in objects_table.GOOD.values() for o in _objects(text)]

    refused = [message for status, message in create(crds, objects) if status != 201]

    assert len(objects) >= 20
    assert refused == []


def test_every_bad_object_is_refused_with_our_sentence(crds: Any) -> None:
    cases = {n: (_objects(t)[0], p) for n, (t, p) in objects_table.BAD.items() if _objects(t)}

    answers = dict(zip(cases, create(crds, [o for o, _ in cases.values()]), strict=True))

    assert len(cases) + len(objects_table.GOOD) >= 60
    assert {name for name, (status, _) in answers.items() if status == 201} == (MENDED | TOLD_LATER)
    said = {name: message or "(taken)" for name, (_, message) in answers.items()}
    found = "\n".join(f"{name}:\n  {message}\n" for name, message in said.items())
    if os.environ.get("TANDEM_GOLDEN") == "write":
        REFUSALS.write_text(found)
    assert found == REFUSALS.read_text(), "TANDEM_GOLDEN=write writes it anew; see test_golden.py"
    for name, (_, problems) in cases.items():
        for message in MESSAGES:
            if any(problem.endswith(message) for problem in problems):
                assert message in answers[name][1], name


def test_every_value_that_nothing_runs_with_is_refused_with_its_sentence(crds: Any) -> None:
    """CEL knows all of them, so that no pod has to fail first."""
    answers = create(crds, [_objects(text)[0] for text, _, _ in WRONG.values()])

    for name, (status, message) in zip(WRONG, answers, strict=True):
        _, path, sentence = WRONG[name]
        assert status == 422, name
        assert path in message, name
        assert sentence in message, (name, message)


def test_what_people_get_wrong_by_hand_is_refused_or_taken_as_the_table_says(crds: Any) -> None:
    """What it takes is told by the operator (test_wrong_by_hand.py)."""
    texts = {name: text for name, (text, *_) in {**REFUSED, **TOLD}.items()}
    answers = create(crds, [_objects(text)[0] for text in texts.values()])

    for name, (status, message) in zip(texts, answers, strict=True):
        if name in TOLD:
            assert status == 201, (name, message)
        else:
            assert status in (400, 422), (name, status)
            assert REFUSED[name][1] in message, (name, message)


def test_a_pool_by_hand_is_refused_unless_a_model_could_have_it(crds: Any) -> None:
    """CEL knows its name, and not whose it is: the operator tells that (test_pools.py)."""
    pool = {"apiVersion": API_VERSION, "kind": "WorkerPool", "metadata": {"name": "mine"}}
    pool["spec"] = {"modelRef": {"name": "m"}, "role": "unified"}

    ((status, message),) = create(crds, [pool])

    assert status == 422
    assert "a WorkerPool is called MODEL-ROLE and is written by the operator" in message


def test_kubectl_explains_fields_with_their_units(crds: Any) -> None:
    for field in ("models.spec.decode", "workerpools", "asp.spec.idle"):
        assert "DESCRIPTION" in crds.kubectl("explain", field)

    text = crds.kubectl("explain", "routers.spec.budget.usdPerHour")
    assert "Most US dollars per hour" in text


def test_immutable_fields_stay(crds: Any) -> None:
    named = objects_table.GOOD["smallest model"].replace("spec:", "spec:\n  servedName: first")
    crds.kubectl("apply", "-f", "-", stdin=named)
    try:
        other = named.replace("first", "second")
        changed = crds.run("kubectl", "apply", "-f", "-", stdin=other)

        assert changed.returncode != 0
        assert "servedName cannot change" in changed.stderr
    finally:
        crds.kubectl("delete", "model", "m")
