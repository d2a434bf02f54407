"""What a Model of another engine is planned as, and what is refused of it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from tandem_operator.autoscale.observe import pool_signals
from tandem_operator.local.store import Store
from tandem_operator.manifests import ManifestError, load_text
from tandem_operator.node.images import ImageTable, UnknownImageError
from tandem_operator.plan import Settings, plan_model, revision_of
from tandem_operator.plan.engines.protocol import ENGINE_LABEL, SERVED_ANNOTATION
from tandem_operator.plan.engines.vllm import VLLMPod
from tandem_operator.plan.model_status import LinkTest, Remark, WorkerReports, model_status
from tandem_operator.reconcile.engine_reports import EngineReports, is_foreign
from tandem_operator.reconcile.pod_client import WorkerPods
from tandem_operator.resources import Model
from tandem_operator.resources.base import Object
from tandem_operator.resources.rules.engines import VLLM_LOADS_CODE, VLLM_SET_BY
from tandem_router.testing.fake_vllm import FakeVLLM

HEAD = """\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {name: m}
spec:
  weights: {source: "hf://org/name"}
"""


def parsed(body: str) -> Model:
    [manifest] = load_text(HEAD + body, "f.yaml")
    return Model.model_validate({k: manifest.obj[k] for k in ("metadata", "spec")})


def pods(model: Model) -> dict[str, Any]:
    plan = plan_model(model, [], [], Settings(), "token")
    assert plan.problems == []
    return {
        o["metadata"]["labels"]["tandem.dev/role"]: o["spec"]["template"]
        for o in plan.apply
        if o["kind"] == "Deployment"
    }


def flags(template: Any) -> dict[str, str]:
    args = template["spec"]["containers"][0]["args"][1:]
    found = {}
    for at, word in enumerate(args):
        if word.startswith("--"):
            after = args[at + 1] if at + 1 < len(args) else "--"
            found[word] = "" if after.startswith("--") else after
    return found


def test_each_field_of_a_model_becomes_vllms_flag() -> None:
    model = parsed(
        """\
  image: vllm/vllm-openai:v0.32.0
  engine:
    type: VLLM
    dtype: bfloat16
    maxModelLen: 4096
    maxNumSeqs: 8
    maxBatchedTokens: 1024
    kvCacheMemory: 1Gi
    prefixCache: false
    scheduler: sjf
    args: {quantization: fp8, enforce-eager: "true", async-scheduling: "false"}
  drain: {timeout: 45s}
  unified: {gpus: 2, tensorParallel: 2}
"""
    )

    template = pods(model)["unified"]
    container = template["spec"]["containers"][0]
    given = flags(template)

    assert container["command"] == ["vllm", "serve"]
    assert container["args"][1:4] == [
        "--served-model-name",
        "m",
        f"tandem.revision={revision_of(model, Settings())}",
    ]
    assert (
        given.items()
        >= {
            "--host": "$(POD_IP)",
            "--port": "8100",
            "--dtype": "bfloat16",
            "--max-model-len": "4096",
            "--max-num-seqs": "8",
            "--max-num-batched-tokens": "1024",
            "--kv-cache-memory-bytes": str(2**30),
            "--no-enable-prefix-caching": "",
            "--scheduling-policy": "priority",
            "--shutdown-timeout": "45",
            "--tensor-parallel-size": "2",
            "--quantization": "fp8",
            "--enforce-eager": "",
            "--no-async-scheduling": "",
        }.items()
    )
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert template["metadata"]["labels"][ENGINE_LABEL] == "VLLM"
    assert template["metadata"]["annotations"][SERVED_ANNOTATION] == "m"
    # Downloads are Tandem's own work, in its own image.
    assert template["spec"]["initContainers"][0]["image"] == Settings().worker_image


@pytest.mark.parametrize(
    ("scheduler", "order"), [("fcfs", "Arrival"), ("sjf", "Length"), ("edf", "Deadline")]
)
def test_vllm_orders_by_priority_whatever_the_scheduler(scheduler: str, order: str) -> None:
    """In its own fcfs a tenant's flood would go before everybody else."""
    model = parsed(
        f"  image: v\n  engine: {{type: VLLM, scheduler: {scheduler}}}\n  unified: {{}}\n"
    )

    assert flags(pods(model)["unified"])["--scheduling-policy"] == "priority"
    assert VLLMPod().router_fields(model)["engine_order"] == order


def test_a_flag_of_several_values_gets_each_as_a_word() -> None:
    args = "{enable-lora: 'true', lora-modules: 'sql=/a/sql poems=/a/poems', chat-template: 'a b'}"
    one = '{lora-modules: \'{"name": "sql", "path": "/a b"}\'}'

    several, single = (
        pods(parsed(f"  image: v\n  engine: {{type: VLLM, args: {given}}}\n  unified: {{}}\n"))
        for given in (args, one)
    )

    words = several["unified"]["spec"]["containers"][0]["args"]
    at = words.index("--lora-modules")
    assert words[at + 1 :] == ["sql=/a/sql", "poems=/a/poems"]
    assert flags(several["unified"])["--chat-template"] == "a b"
    assert flags(single["unified"])["--lora-modules"] == '{"name": "sql", "path": "/a b"}'


def test_split_roles_get_nixl_with_buffers_where_the_model_is() -> None:
    body = "  image: v\n  engine: {type: VLLM}\n  prefill: {gpus: 1}\n  decode: {}\n"

    found = pods(parsed(body))

    on_gpu = json.loads(flags(found["prefill"])["--kv-transfer-config"])
    on_cpu = json.loads(flags(found["decode"])["--kv-transfer-config"])
    assert on_gpu == {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    assert on_cpu == {**on_gpu, "kv_buffer_device": "cpu"}
    names = {e["name"] for e in found["decode"]["spec"]["containers"][0]["env"]}
    assert {"VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_CPU_OMP_THREADS_BIND"} <= names


def test_weights_of_our_image_are_copied_for_another_engine() -> None:
    body = "  image: v\n  engine: {type: VLLM}\n  unified: {}\n"
    spec = {**parsed(body).spec.to_wire(), "weights": {"source": "image:///opt/x"}}
    model = Model.model_validate({"metadata": {"name": "m"}, "spec": spec})

    [copy] = pods(model)["unified"]["spec"]["initContainers"]

    assert copy["command"][:3] == ["cp", "-rL", "/opt/x"]
    assert copy["image"] == Settings().worker_image


def test_any_server_finds_what_it_needs_in_variables() -> None:
    body = (
        "  image: sglang\n"
        "  engine: {type: OpenAI, args: {port: $(TANDEM_PORT), model-path: $(TANDEM_WEIGHTS)}}\n"
        "  unified: {}\n"
    )

    template = pods(parsed(body))["unified"]

    container = template["spec"]["containers"][0]
    assert container["args"] == ["--model-path", "$(TANDEM_WEIGHTS)", "--port", "$(TANDEM_PORT)"]
    assert {e["name"] for e in container["env"]} >= {"TANDEM_WEIGHTS", "TANDEM_SERVED_MODEL"}
    assert container["startupProbe"]["httpGet"]["path"] == "/v1/models"


VLLM = "  image: v\n  engine: {type: VLLM, %s}\n  unified: {}\n"
REFUSED = {
    "no image": ("  engine: {type: VLLM}\n  unified: {}\n", "needs spec.image"),
    "args of ours": ("  engine: {args: {a: b}}\n  unified: {}\n", "engine.args are flags"),
    "dashes": (VLLM % "args: {--max-loras: b}", "without dashes in front"),
    "code": (VLLM % "args: {middleware: evil.Module}", "load code by name"),
    "underscores": (VLLM % "args: {max_model_len: '3'}", "that Tandem sets"),
    "mlfq": (VLLM % "scheduler: mlfq", "mlfq is Tandem's only"),
    "device": (VLLM % "device: cuda", "decided by spec.image"),
    "link": (VLLM % "" + "  kvTransfer: {checksum: true}\n", "brings its own"),
    "split": (
        "  image: v\n  engine: {type: OpenAI}\n  prefill: {}\n  decode: {}\n",
        "no prefill and decode roles",
    ),
    "settings": (
        "  image: v\n  engine: {type: OpenAI, maxNumSeqs: 3}\n  unified: {}\n",
        "as engine.args only",
    ),
    "another port": (
        "  image: v\n  engine: {type: OpenAI, args: {port: '8000'}}\n  unified: {}\n",
        r"must be \$\(TANDEM_PORT\): probes and routers ask there",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_engine_does_not_take_is_refused_with_the_next_step(name: str) -> None:
    body, sentence = REFUSED[name]

    with pytest.raises(ManifestError, match=sentence):
        load_text(HEAD + body, "f.yaml")


@pytest.mark.parametrize(
    "flag",
    [
        *VLLM_LOADS_CODE,
        "tool-parser-plug",
        "scheduler_cl",
        "kv-transfer-config.kv_connector_module_path",
        "kv_transfer_conf.kv_role",
        "served-model",
    ],
)
def test_no_spelling_that_vllm_reads_gets_a_refused_flag_through(flag: str) -> None:
    text = HEAD + f"  image: v\n  engine: {{type: VLLM, args: {{{flag}: x}}}}\n  unified: {{}}\n"

    with pytest.raises(ManifestError, match="holds a flag that"):
        load_text(text, "f.yaml")


def test_flags_that_only_begin_like_a_refused_one_are_taken() -> None:
    args = "{quantization: fp8, max-loras: '4', tool-call-parser: hermes, max-model-len-x: '1'}"

    load_text(HEAD + f"  image: v\n  engine: {{type: VLLM, args: {args}}}\n  unified: {{}}\n", "f")


@pytest.mark.parametrize("flag", sorted(VLLM_SET_BY))
def test_flags_that_tandem_sets_are_refused_by_name(flag: str) -> None:
    with pytest.raises(ManifestError, match=flag):
        load_text(HEAD + VLLM % f'args: {{{flag}: "1"}}', "f.yaml")


def test_a_command_that_is_not_on_this_machine_says_how_to_name_it() -> None:
    with pytest.raises(UnknownImageError, match="--image no-such-engine=/path/to/no-such-engine"):
        ImageTable().command("v", ["no-such-engine", "serve"], [])


def _ready_message(remark: Remark) -> tuple[str, str, str]:
    model = parsed("  image: v\n  engine: {type: VLLM}\n  unified: {}\n")
    pod = {
        "metadata": {"name": "m-0", "labels": {"tandem.dev/role": "unified"}},
        "spec": {"containers": []},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }
    plan = plan_model(model, [], [], Settings(), "token")
    status = model_status(
        model,
        {},
        plan,
        "r",
        {},
        [pod],
        LinkTest(None),
        "now",
        reports=WorkerReports(remarks={"m-0": remark}),
    )
    ready = status["conditions"][-1]
    return ready["status"], ready["reason"], ready["message"]


def test_a_server_of_another_model_is_the_first_blocking_cause() -> None:
    said = _ready_message(Remark("serves other and not 'm'; set servedName"))

    assert said == ("False", "EngineUnfit", "pod m-0 serves other and not 'm'; set servedName")


def test_what_an_older_server_does_without_is_said_in_status() -> None:
    status, reason, message = _ready_message(Remark(notes=("vLLM 0.9.2 gives no token ids",)))

    assert (status, reason) == ("True", "Serving")
    assert message.endswith("; vLLM 0.9.2 gives no token ids")


async def test_what_a_worker_of_ours_says_of_its_context_reaches_status() -> None:
    load = {"weights": {"digest": "9f" * 32}, "notes": ["max_model_len=64000 is beyond"]}

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = json.dumps(load).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    pod = _vllm_pod()
    del pod["metadata"]["labels"][ENGINE_LABEL]
    async with server:
        pods = WorkerPods(Store(), replace(Settings(), worker_port=port), lambda: 0.0)
        reports = await pods.reports([pod])

    assert reports.weights == {"m-0": {"digest": "9f" * 32}}
    status, reason, message = _ready_message(reports.remarks["m-0"])
    assert (status, reason) == ("True", "Serving")
    assert message.endswith("; max_model_len=64000 is beyond")


def _vllm_pod() -> Object:
    return {
        "metadata": {
            "name": "m-0",
            "uid": "u",
            "namespace": "default",
            "labels": {ENGINE_LABEL: "VLLM", "tandem.dev/role": "unified"},
            "annotations": {SERVED_ANNOTATION: "m"},
        },
        "status": {"podIP": "127.0.0.1"},
    }


async def test_a_pass_asks_another_engine_once_for_all_that_it_wants_to_know() -> None:
    server = await FakeVLLM(served_model="m").start()
    pods = WorkerPods(Store(), replace(Settings(), worker_port=server.port), lambda: 0.0)
    try:
        reports = await pods.reports([_vllm_pod()])
        paths = [request.path for request in server.seen]
    finally:
        await server.stop()

    assert reports.weights == {}
    assert 0 < len(paths) == len(set(paths))


async def test_a_proxy_of_the_operators_environment_leads_to_no_pod(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = await FakeVLLM(served_model="m", running=3.0).start()
    try:
        load = await EngineReports().read(_vllm_pod(), server.port, 5.0)
    finally:
        await server.stop()

    assert load is not None
    assert load["num_running"] == 3.0


async def test_load_of_a_vllm_pod_has_the_shape_that_the_control_loop_reads() -> None:
    server = await FakeVLLM(served_model="m", running=3.0, kv_use=0.5).start()
    pod = _vllm_pod()
    reports = EngineReports()
    try:
        load = await reports.read(pod, server.port, 5.0)
    finally:
        await server.stop()
    gone = await reports.read(pod, server.port, 5.0)

    assert is_foreign(pod)
    assert pool_signals([load]) == {
        "RunningRequests": 3.0,
        "PendingPrefillTokens": 0.0,
        "KVUtilization": 0.5,
    }
    # What it can do is the router's to find out: asking makes the engine compute.
    assert all(seen.body == b"" for seen in server.seen)
    assert gone is None
