"""vLLM: the body carries what our headers say, `/metrics` is the load report."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from tandem_router.engines.openai import as_provider
from tandem_router.engines.protocol import Ask, Headers, Told
from tandem_router.engines.served_models import ServedModels
from tandem_router.engines.vllm_metrics import Sample, StepProfile, load_of
from tandem_router.engines.vllm_stream import VLLMWire
from tandem_router.openai.request import InferenceRequest

# A further name of the model, by which a server says which revision of a Model it is.
REVISION_NAME = "tandem.revision="
# Requests that run without one counter moving for this long: the engine behind the server hangs.
HUNG_AFTER_S = 120.0
# How often a server that runs is asked again for its names: adapters are loaded while it does.
NAMES_EVERY_S = 10.0
# vLLM gives the token ids of a stream since.
TOKEN_IDS_SINCE = (0, 10, 2)
_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwAD"
    "hgGAWjR9awAAAABJRU5ErkJggg=="
)
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
_REMOTE_DECODE: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
# Tokens of a test prompt: longer than a block (128 on CPUs), and no more than a model holds.
_NUM_TEST_TOKENS = 160
# How it is asked for the log-probabilities of an answer's own tokens.
_SURE: dict[str, bool | int] = {"chat": True, "completions": 1}
# One request's priority in front of the queue's own order.
_PRIORITY_STEP = 10**15


class VLLMReader:
    """Reads one server: who it is once per start, its metrics each time.

    probe: whether to find out what it can do, which takes two requests of one token each.
    """

    def __init__(
        self,
        served_model: str,
        role: str,
        clock: Callable[[], float] = time.monotonic,
        probe: bool = True,
    ) -> None:
        self._models = ServedModels(served_model)
        self._served_model = served_model
        self._role = role
        self._clock = clock
        self._probe = probe
        self._who: dict[str, Any] | None = None
        self._named_at = clock()
        self._profile = StepProfile()
        self._progress: float | None = None
        self._moved_at = clock()

    async def read(self, ask: Ask) -> dict[str, Any]:
        """Raises ValueError for a server that does not say who it is."""
        try:
            status, body = await ask("/metrics")
            sample = Sample.parse(body.decode(errors="replace")) if status == 200 else Sample({})
            restarted = (
                self._progress is not None
                and sample.progress is not None
                and sample.progress < self._progress
            )
            if self._who is None or restarted:
                self._who = await self._identify(ask)
            elif self._clock() - self._named_at >= NAMES_EVERY_S:
                self._who |= await self._names(ask)
        except BaseException:
            self._who = None  # whoever answers next may be another one
            raise
        self._profile.add(sample)
        report = {"role": self._role, **load_of(sample, self._profile), **self._who}
        problem = report.pop("problem") or self._hangs(sample)
        if not sample.values:
            report["notes"] = [*report["notes"], "gives no metrics: its load is not known"]
        elif sample.missing:
            lost = f"its /metrics lack {', '.join(sample.missing)}: its load is known in part"
            report["notes"] = [*report["notes"], lost]
        return {**report, "ready": problem is None, **({"problem": problem} if problem else {})}

    def _hangs(self, sample: Sample) -> str | None:
        now, progress = self._clock(), sample.progress
        if sample.running < 1 or progress is None or progress != self._progress:
            self._moved_at = now
        self._progress = progress
        if now - self._moved_at <= HUNG_AFTER_S:
            return None
        return (
            f"runs {sample.running:.0f} requests and has made no token for {HUNG_AFTER_S:.0f} s: "
            "the engine hangs behind its server; delete the pod"
        )

    async def _identify(self, ask: Ask) -> dict[str, Any]:
        who: dict[str, Any] = {"served_model": self._served_model, "notes": []}
        who |= await self._names(ask)
        version = await _json(ask, "/version")
        text = str(version.get("version") or "") if isinstance(version, dict) else ""
        who["engine"] = f"vLLM {text}".strip()
        described = await _json(ask, "/openapi.json")
        if not _gives_token_ids(described, text):
            who["notes"].append(
                f"{who['engine']} gives no token ids: a stream whose worker dies ends with an "
                "error; 0.10.2 or newer goes on"
            )
        if self._probe and who["problem"] is None:
            who["capabilities"] = await self._able(ask, described)
        return who

    async def _names(self, ask: Ask) -> dict[str, Any]:
        """What its list of models says: whether it serves ours, its revision, its adapters."""
        problem = await self._models.read(ask)
        self._named_at = self._clock()
        names: dict[str, Any] = {
            "problem": problem,
            "revision": None,
            "adapters": self._models.adapters,
        }
        for entry in self._models.entries:
            name = str(entry.get("id"))
            if name.startswith(REVISION_NAME):
                names["revision"] = name.removeprefix(REVISION_NAME)
            elif name == self._served_model and isinstance(entry.get("max_model_len"), int):
                names["max_model_len"] = entry["max_model_len"]
        return names

    async def _able(self, ask: Ask, described: Any) -> dict[str, Any]:
        paths = described.get("paths") if isinstance(described, dict) else None
        paths = paths if isinstance(paths, dict) else {}
        # Older versions list the path for every model.
        embeds = "/v1/embeddings" in paths and await self._embeds(ask)
        order = {"model": self._served_model, "max_tokens": 1, "temperature": 0}
        words = [{"role": "user", "content": "a"}]
        picture = [{"type": "image_url", "image_url": {"url": _PIXEL}}]
        image = [{"role": "user", "content": picture}]
        tools = await _accepts(ask, {**order, "messages": words, "tools": [_TOOL]})
        return {
            "tools": tools,
            "images": await _accepts(ask, {**order, "messages": image}),
            "structured_output": True,
            "logprobs": True,
            "embeddings": embeds,
            "generation": not embeds or await _accepts(ask, {**order, "messages": words}),
        }

    async def _embeds(self, ask: Ask) -> bool:
        """0.10 answers 200 with an error where the model does not embed."""
        order = {"model": self._served_model, "input": "a"}
        status, body = await ask("/v1/embeddings", json.dumps(order).encode())
        return status == 200 and b'"data"' in body


async def _json(ask: Ask, path: str) -> Any:
    status, body = await ask(path)
    try:
        return json.loads(body) if status == 200 else None
    except ValueError:
        return None


async def _accepts(ask: Ask, order: dict[str, Any]) -> bool:
    status, body = await ask("/v1/chat/completions", json.dumps(order).encode())
    return status == 200 and b'"choices"' in body


def _gives_token_ids(described: Any, version: str) -> bool:
    """By its API's own description; by its version where it shows none."""
    try:
        schemas = described["components"]["schemas"].values()
        return any("return_token_ids" in (schema.get("properties") or {}) for schema in schemas)
    except (AttributeError, KeyError, TypeError):
        numbers = _numbers(version)
        return not numbers or numbers >= TOKEN_IDS_SINCE


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:3]
    return tuple(int(p) for p in parts) if all(p.isdigit() for p in parts) else ()


class VLLMEngine:
    """vLLM 0.10.2 and newer; older ones work without exact resumption."""

    salted = True

    def auth(self, peer_token: str | None) -> Headers:
        return []  # it knows one key per process, and peer tokens change while processes run

    def reader(self, served_model: str, role: str, probe: bool = True) -> VLLMReader:
        return VLLMReader(served_model, role, probe=probe)

    def headers(self, told: Told, stream: bool) -> Headers:
        return self.auth(told.peer_token)

    def fields(
        self, request: InferenceRequest, fields: Mapping[str, Any], told: Told
    ) -> Mapping[str, Any]:
        taken = as_provider(request, fields, told.served_model)
        taken.pop("priority", None)  # the router's to give
        if request.stream:
            taken["return_token_ids"] = True
        elif told.token_statistics and request.kind in _SURE and "logprobs" not in taken:
            taken["logprobs"] = _SURE[request.kind]
        if (priority := _priority(told)) is not None:
            taken["priority"] = priority
        return taken

    def prefill_order(self, request: InferenceRequest, body: bytes) -> tuple[str, bytes] | None:
        fields = json.loads(body)
        for name in ("stream_options", "return_token_ids", "max_completion_tokens", "min_tokens"):
            fields.pop(name, None)
        fields |= {"stream": False, "max_tokens": 1, "n": 1}
        fields["kv_transfer_params"] = dict(_REMOTE_DECODE)
        return request.path, json.dumps(fields, ensure_ascii=False).encode()

    def handed_over(self, body: bytes, reply: bytes) -> bytes:
        said = json.loads(reply)
        params = said.get("kv_transfer_params") if isinstance(said, dict) else None
        if not isinstance(params, dict):
            raise ValueError("the prefill worker's reply has no kv_transfer_params")
        fields = {**json.loads(body), "kv_transfer_params": params}
        return json.dumps(fields, ensure_ascii=False).encode()

    async def test_handover(
        self, served_model: str, prefill: Ask, decode: Ask
    ) -> tuple[bool, str] | None:
        # New each time: what a server has in its cache is not asked of another.
        prompt = [random.randrange(8, 72) for _ in range(_NUM_TEST_TOKENS)]
        order = {"model": served_model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        asked = {**order, "kv_transfer_params": dict(_REMOTE_DECODE)}
        status, reply = await prefill("/v1/completions", json.dumps(asked).encode())
        if status != 200:
            return False, f"the prefill server answered {status}{_said(reply)}"
        try:
            body = self.handed_over(json.dumps(order).encode(), reply)
        except ValueError as error:
            return False, f"{error}; is NixlConnector in its image?"
        before = Sample.parse((await decode("/metrics"))[1].decode(errors="replace"))
        status, reply = await decode("/v1/completions", body)
        if status != 200:
            return False, f"the decode server answered {status}{_said(reply)}"
        after = Sample.parse((await decode("/metrics"))[1].decode(errors="replace"))
        num = after.external_hits - before.external_hits
        if num <= 0:
            return False, "the decode server computed the prompt itself: no block arrived"
        return True, f"the KV of {num:.0f} prompt tokens went over, as vLLM's counters say"

    def wire(self, request: InferenceRequest) -> VLLMWire:
        return VLLMWire(request)


def _said(reply: bytes) -> str:
    """An error's own words, for a message."""
    try:
        return f": {json.loads(reply)['error']['message']}"[:300]
    except (ValueError, KeyError, TypeError):
        return ""


def _priority(told: Told) -> int | None:
    """Lower goes first; None, which is 0 there, where nothing is told or nothing sets it apart."""
    if told.order == "Arrival":
        return (told.turn or 0) * _PRIORITY_STEP or None
    if told.order == "Length":
        own = round(told.expected_tokens or 0.0)
    elif told.order == "Deadline":
        # Without a deadline last, in the order of arrival.
        own = told.created * 1000 + (told.deadline_ms if told.deadline_ms is not None else 10**9)
    else:
        return None
    return (told.turn or 0) * _PRIORITY_STEP + own
