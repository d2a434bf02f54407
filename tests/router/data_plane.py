"""A gateway's side of external processing without a gateway: says what one would."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from tandem_router.api.app import RouterApp
from tandem_router.gateway.messages import BODY_MODES, ProcessingRequest
from tandem_router.gateway.session import Session

HOME = "10.0.0.9:8000"
CHAT = "/v1/chat/completions"


def asked(
    path: str = CHAT,
    method: str = "POST",
    end: bool = False,
    subset: Any = None,
    modes: tuple[str, str] | None = None,
    **headers: str,
) -> Any:
    """headers: with underscores for dashes."""
    message = ProcessingRequest()
    said = {":path": path, ":method": method, ":authority": "chat.test", "accept": "*/*"}
    said |= {name.replace("_", "-"): value for name, value in headers.items()}
    _fill(message.request_headers.headers, said)
    message.request_headers.end_of_stream = end
    if subset is not None:
        entry = message.metadata_context.filter_metadata.add(key="envoy.lb.subset_hint")
        entry.value.update({"x-gateway-destination-endpoint-subset": subset})
    if modes is not None:
        config = message.protocol_config
        config.request_body_mode, config.response_body_mode = map(BODY_MODES.index, modes)
    return message


def body(data: bytes, end: bool = True, side: str = "request") -> Any:
    message = ProcessingRequest()
    part = getattr(message, f"{side}_body")
    part.body, part.end_of_stream = data, end
    return message


def answered(status: int = 200, end: bool = False, served: str = "", **headers: str) -> Any:
    message = ProcessingRequest()
    said = {":status": str(status), "content-type": "application/json"}
    said |= {name.replace("_", "-"): value for name, value in headers.items()}
    _fill(message.response_headers.headers, said)
    message.response_headers.end_of_stream = end
    if served:
        entry = message.metadata_context.filter_metadata.add(key="envoy.lb")
        entry.value.update({"x-gateway-destination-endpoint-served": served})
    return message


def trailers(side: str) -> Any:
    message = ProcessingRequest()
    getattr(message, f"{side}_trailers").SetInParent()
    return message


def _fill(map_: Any, said: dict[str, str]) -> None:
    for name, value in said.items():
        map_.headers.add(key=name, raw_value=value.encode())


class DataPlane:
    """One request's exchange; `told` is what the router said, oldest first."""

    def __init__(self, app: RouterApp) -> None:
        self.told: list[Any] = []
        self._coming: asyncio.Queue[Any] = asyncio.Queue()
        self._news = asyncio.Event()
        session = Session(app.front(HOME), self._coming.get, self._take)
        self._running = asyncio.ensure_future(session.run())

    async def _take(self, message: Any) -> None:
        # As it is after a way over the wire.
        self.told.append(type(message).FromString(message.SerializeToString()))
        self._news.set()

    def say(self, *messages: Any) -> None:
        for message in messages:
            self._coming.put_nowait(message)

    async def until(self, number: int) -> list[Any]:
        """All that was told, once it is this much."""
        while len(self.told) < number:
            assert not self._running.done(), self.told
            self._news.clear()
            news = asyncio.ensure_future(self._news.wait())
            await asyncio.wait((news, self._running), return_when=asyncio.FIRST_COMPLETED)
            news.cancel()
        return self.told

    async def end(self) -> list[Any]:
        """No more is said; all that was told in the end."""
        self._coming.put_nowait(None)
        await self._running
        return self.told

    async def vanish(self) -> None:
        """As when the stream is reset."""
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)


def question(text: str = "hi", **fields: Any) -> bytes:
    said = {"model": "chat", "messages": [{"role": "user", "content": text}], **fields}
    return json.dumps(said).encode()


def heads(message: Any) -> dict[str, str]:
    """The headers that a message sets."""
    which = message.WhichOneof("response")
    part = getattr(message, which)
    mutation = part.headers if which == "immediate_response" else part.response.header_mutation
    return {each.header.key: each.header.raw_value.decode() for each in mutation.set_headers}


def removed(message: Any) -> set[str]:
    part = getattr(message, message.WhichOneof("response"))
    return set(part.response.header_mutation.remove_headers)


def streamed(messages: Iterable[Any], side: str) -> tuple[bytes, list[bool]]:
    """The body that goes on in full duplex, and whether each of its parts was the last."""
    parts = [
        getattr(each, f"{side}_body").response.body_mutation.streamed_response
        for each in messages
        if each.WhichOneof("response") == f"{side}_body"
    ]
    return b"".join(part.body for part in parts), [part.end_of_stream for part in parts]


def refusal(message: Any) -> tuple[int, dict[str, Any]]:
    """Status and error object of a reply that takes the place of all others."""
    said = message.immediate_response
    assert message.WhichOneof("response") == "immediate_response", message
    return said.status.code, json.loads(said.body)["error"]
