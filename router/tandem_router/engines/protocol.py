"""What the router (and the operator's eyes) need of an engine, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from msgspec import Struct

from tandem_router.errors import UpstreamError
from tandem_router.openai.request import InferenceRequest

Headers = list[tuple[bytes, bytes]]


class Ask(Protocol):
    """GET of a worker, or POST where there is a body; (status, body).

    Raises UpstreamError, OSError or TimeoutError where nothing answers.
    """

    async def __call__(self, path: str, body: bytes = b"") -> tuple[int, bytes]: ...


class LoadReader(Protocol):
    """Of one worker: what it said before may be needed to read what it says now."""

    async def read(self, ask: Ask) -> dict[str, Any]:
        """A body as `GET /v1/load` of a Tandem worker gives it (docs/contract.md).

        `problem` in it is a sentence that keeps the worker from being used.
        Raises ValueError for a reply that says nothing.
        """
        ...


class Told(Struct, frozen=True):
    """What the router adds to a request for a worker."""

    request_id: str
    created: int
    seed: int
    served_model: str
    prefill_url: str | None = None
    deadline_ms: int | None = None
    priority: int | None = None
    # The same behind the requests that its tenant has under way, for engines that know no tenants.
    turn: int | None = None
    tenant: str | None = None  # an opaque name, where tenants have keys
    expected_tokens: float | None = None
    order: str = "None"  # by what the engine orders its queue: None, Arrival, Length or Deadline
    peer_token: str | None = None
    # Whether the answer will be read: how sure the model was of its tokens is worth telling. Only
    # where the client did not ask for log-probabilities, so all that come back are the router's.
    token_statistics: bool = False


@dataclass(frozen=True, slots=True)
class Resumption:
    """What is sent to another worker so that a broken stream goes on.

    exact: whether the continued stream is the one that the first worker would have sent (in
    float32), token for token. repeats: what of the sent tokens the reply says again: nothing,
    those whose text may not be out yet, or all.
    """

    path: str
    body: bytes
    exact: bool = True
    repeats: Literal["nothing", "unsettled", "all"] = "nothing"


@dataclass(frozen=True, slots=True)
class SentChoice:
    """What a client has of one choice: ids, characters of text, and whether there is more."""

    token_ids: Sequence[int] = ()
    num_text_chars: int = 0
    # Ids whose text has been sent for certain; later ones may be half a character.
    num_settled: int = 0
    only_text: bool = True  # no thought, tool call or log-probability was sent
    text_without_ids: bool = False


class Wire(Protocol):
    """Of one client's stream: between the worker's events and what the router reads and sends."""

    def read(self, events: bytes) -> bytes:
        """A worker's events in the shape that the client asked for, token ids still in them."""
        ...

    def shown(self, events: bytes) -> bytes:
        """What the client may see of them."""
        ...

    def resume(self, sent: Sequence[SentChoice], max_tokens: int | None) -> Resumption:
        """How another worker goes on after what was sent. Raises UpstreamError where none can."""
        ...


class Engine(Protocol):
    """One engine's ways; without state, which lives in readers and wires.

    salted: whether it keeps prefixes apart by a body's `cache_salt`; others may refuse the field.
    """

    salted: bool

    def auth(self, peer_token: str | None) -> Headers:
        """What proves to a worker that a router of its namespace asks."""
        ...

    def reader(self, served_model: str, role: str, probe: bool = True) -> LoadReader:
        """probe: whether it may make the engine compute to find out what it can do."""
        ...

    def headers(self, told: Told, stream: bool) -> Headers: ...

    def fields(
        self, request: InferenceRequest, fields: Mapping[str, Any], told: Told
    ) -> Mapping[str, Any]:
        """The client's fields as the engine takes them; the same object where it takes all."""
        ...

    def prefill_order(self, request: InferenceRequest, body: bytes) -> tuple[str, bytes] | None:
        """Path and body for the prefill worker that the router itself has to ask first."""
        ...

    def handed_over(self, body: bytes, reply: bytes) -> bytes:
        """The decode worker's body after the prefill worker's reply. Raises ValueError."""
        ...

    async def test_handover(
        self, served_model: str, prefill: Ask, decode: Ask
    ) -> tuple[bool, str] | None:
        """Whether KV blocks get from one server to the other; None: it has no such question."""
        ...

    def wire(self, request: InferenceRequest) -> Wire: ...


class PlainWire:
    """Events pass as they are, here and in what derives from it; a broken stream ends."""

    def __init__(self, request: InferenceRequest) -> None:
        self._request = request

    def read(self, events: bytes) -> bytes:
        return events

    def shown(self, events: bytes) -> bytes:
        return events

    def resume(self, sent: Sequence[SentChoice], max_tokens: int | None) -> Resumption:
        if any(choice.text_without_ids for choice in sent):
            raise UpstreamError("the reply carries no token ids, so it cannot be carried on")
        return Resumption(self._request.path, self._request.body)
