"""A predictor in a ConfigMap reaches running pods through a copy whose name does not change."""

from __future__ import annotations

from stored_cluster import BOTH, Cluster
from tandem_operator.plan.objects import Object
from tandem_operator.reconcile.predictor_source import TOUCH_ANNOTATION

COPY = "r-router-predictor"
LATER = "2999-01-01T00:00:00Z"


def naming(uri: str) -> str:
    return BOTH + f'  predictor: {{artifact: "{uri}"}}\n'


class Copied(Cluster):
    """Router `r` with a running pod, and ConfigMaps that a user makes."""

    def config_map(self, name: str, **entries: str) -> None:
        obj = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": "default"},
            "binaryData": entries,
        }
        self.store.write(obj, manager="user")

    @property
    def held(self) -> Object:
        found: Object = self.get("ConfigMap", COPY)["binaryData"]
        return found

    @property
    def template(self) -> Object:
        found: Object = self.get("Deployment", "r-router")["spec"]["template"]
        return found

    @property
    def touched(self) -> str:
        """What was written on the running pod so that its node looks at its volumes."""
        pods = [p for p in self.store.find("Pod") if p["metadata"]["name"].startswith("r-router")]
        annotations = pods[0]["metadata"].get("annotations") or {}
        return str(annotations.get(TOUCH_ANNOTATION, ""))


async def running(uri: str, **maps: str) -> Copied:
    cluster = Copied(naming(uri))
    for name, value in maps.items():
        cluster.config_map(name, artifact=value)
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()
    return cluster


async def test_another_config_map_is_another_content_of_the_same_pods() -> None:
    cluster = await running("configmap://one/artifact", one="b25l", two="dHdv")
    before = cluster.template
    assert cluster.held == {"artifact": "b25l"}
    assert cluster.touched == ""  # it is younger than the copy

    cluster.reconciler.now = lambda: LATER
    cluster.apply(naming("configmap://two/artifact"))
    await cluster.settle()

    assert cluster.held == {"artifact": "dHdv"}
    assert cluster.template == before
    assert cluster.touched != ""


async def test_a_changed_config_map_is_copied_and_an_unchanged_one_is_not_read() -> None:
    cluster = await running("configmap://one/artifact", one="b25l")
    reads: list[str] = []
    named = cluster.store.named

    async def counted(kind: str, namespace: str, name: str) -> Object | None:
        if name == "one":
            reads.append(name)
        return await named(kind, namespace, name)

    cluster.store.named = counted  # type: ignore[method-assign]
    assert (await cluster.reconcile("Router", "r")).writes == 0
    assert reads == []

    cluster.config_map("one", artifact="bmV3")
    await cluster.settle()

    assert cluster.held == {"artifact": "bmV3"}
    assert reads == ["one"]


async def test_a_copy_that_somebody_changed_is_made_anew() -> None:
    cluster = await running("configmap://one/artifact", one="b25l")

    cluster.config_map(COPY, artifact="YmFk")
    await cluster.settle()

    assert cluster.held == {"artifact": "b25l"}


async def test_an_artifact_that_moves_into_the_image_leaves_no_copy_behind() -> None:
    cluster = await running("configmap://one/artifact", one="b25l")
    before = cluster.template

    cluster.apply(naming("image:///opt/p"))
    await cluster.settle()

    assert COPY not in cluster.names("ConfigMap")
    assert cluster.template == before


async def test_a_first_artifact_needs_no_new_pods() -> None:
    cluster = Copied(BOTH)
    await cluster.settle()
    before = cluster.template
    cluster.config_map("one", artifact="b25l")

    cluster.apply(naming("configmap://one/artifact"))
    await cluster.settle()

    assert cluster.held == {"artifact": "b25l"}
    assert cluster.template == before


async def test_what_is_missing_is_said_with_what_to_do_and_taken_up_once_it_is_there() -> None:
    cluster = await running("configmap://one/artifact")
    missing = cluster.condition("Router", "r", "PredictorReady")
    assert (missing["status"], missing["reason"]) == ("False", "VolumeMissing")
    assert "kubectl create configmap one --from-file=ARTIFACT" in missing["message"]

    cluster.config_map("one", model="b25l")
    await cluster.settle()
    keyless = cluster.condition("Router", "r", "PredictorReady")
    assert "ConfigMap one has no key artifact, only model" in keyless["message"]

    cluster.config_map("one", artifact="b25l")
    await cluster.settle()
    assert cluster.condition("Router", "r", "PredictorReady")["reason"] == "NotLoaded"
    assert cluster.held["artifact"] == "b25l"


async def test_a_config_map_without_the_key_does_not_take_the_place_of_what_is_in_use() -> None:
    cluster = await running("configmap://one/artifact", one="b25l")
    cluster.config_map("two", model="dHdv")

    cluster.apply(naming("configmap://two/artifact"))
    await cluster.settle()

    said = cluster.condition("Router", "r", "PredictorReady")["message"]
    assert "ConfigMap two has no key artifact, only model" in said
    assert cluster.held == {"artifact": "b25l"}


async def test_the_copy_itself_cannot_be_named() -> None:
    cluster = await running(f"configmap://{COPY}/artifact")

    said = cluster.condition("Router", "r", "PredictorReady")["message"]

    assert "is the operator's copy; name the ConfigMap that you made" in said


async def test_a_config_map_of_that_name_that_somebody_made_is_left_alone() -> None:
    cluster = Copied(naming("configmap://one/artifact"))
    cluster.config_map("one", artifact="b25l")
    cluster.config_map(COPY, artifact="bWluZQ==")

    await cluster.settle()

    assert cluster.held == {"artifact": "bWluZQ=="}
    refused = cluster.condition("Router", "r", "Accepted")
    assert refused["reason"] == "NameTaken"
    assert f"ConfigMap {COPY} exists and belongs to nobody" in refused["message"]
