"""A running OpenAI-compatible server as `measure` asks it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tandem_operator.profiling.measure import Completion

DEFAULT_MAX_TOKENS = 2048


class EndpointError(Exception):
    """The server cannot be measured; the message says what it answered and what to do."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Engine:
    """What the server says of itself."""

    model: str
    max_tokens: int
    kv_tokens: int | None


class Endpoint:
    """One server; use as an async context manager.

    Args:
        url: Its root, with or without /v1.
        model: Model name; None asks for the first one it lists.
        key: Bearer token.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        key: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(600.0, connect=5.0),
            limits=httpx.Limits(max_connections=None),
            transport=transport,
        )

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def describe(self) -> Engine:
        """Model, context length and KV capacity, from `/v1/models` and, where served, `/v1/load`.

        Raises EndpointError.
        """
        body = await self._get("/v1/models", needed=True)
        rows = body.get("data") if isinstance(body, dict) else None
        if not isinstance(rows, list) or not rows:
            raise EndpointError(f"{self.url}/v1/models lists no model; is this an OpenAI server?")
        names = [str(row.get("id")) for row in rows if isinstance(row, dict)]
        if self._model is None:
            self._model = names[0]
        elif self._model not in names:
            raise EndpointError(f"{self.url} has no model {self._model!r}; it has {names}")
        row = rows[names.index(self._model)]
        load = await self._get("/v1/load", needed=False)
        load = load if isinstance(load, dict) else {}
        blocks = load.get("kv_blocks")
        total = blocks.get("total") if isinstance(blocks, dict) else None
        kv_tokens = int(total * load.get("block_size", 64)) if total else None
        longest = load.get("max_model_len") or row.get("max_model_len") or DEFAULT_MAX_TOKENS
        return Engine(self._model, int(longest), kv_tokens)

    async def _get(self, path: str, *, needed: bool) -> Any:
        try:
            reply = await self._client.get(path)
        except httpx.HTTPError as error:
            raise EndpointError(f"{self.url} cannot be reached: {error}; is it running?") from error
        if reply.status_code != 200:
            if needed:
                raise EndpointError(f"{self.url}{path} answered {reply.status_code}")
            return None
        try:
            return reply.json()
        except ValueError as error:
            raise EndpointError(f"{self.url}{path} did not answer in JSON") from error

    async def warm_up(self, prompt: str, patience_s: float = 600.0) -> Completion:
        """One answer, waiting while the server says 503: it may still load its weights."""
        while True:
            try:
                return await self._one(prompt, 2)
            except EndpointError as error:
                if error.status != 503 or patience_s <= 0.0:
                    raise
            await asyncio.sleep(1.0)
            patience_s -= 1.0

    async def complete(self, prompts: Sequence[str], output_tokens: int) -> list[Completion]:
        """Ask all prompts at once; see `measure.Complete`. Raises EndpointError."""
        return list(await asyncio.gather(*(self._one(p, output_tokens) for p in prompts)))

    async def _one(self, prompt: str, output_tokens: int) -> Completion:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            # Ours and vLLM's: an answer that ends early would be measured as a faster step.
            "ignore_eos": True,
        }
        times: list[float] = []
        prompt_tokens: int | None = None
        started = time.perf_counter()
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as reply:
                if reply.status_code != 200:
                    text = (await reply.aread()).decode("utf-8", "replace")[:200]
                    raise EndpointError(
                        f"{self.url}/v1/completions answered {reply.status_code}: {text}",
                        reply.status_code,
                    )
                async for line in reply.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line[6:])
                    if event.get("choices"):
                        times.append(time.perf_counter())
                    usage = event.get("usage")
                    if isinstance(usage, dict) and usage.get("prompt_tokens"):
                        prompt_tokens = int(usage["prompt_tokens"])
        except (httpx.HTTPError, ValueError) as error:
            raise EndpointError(f"{self.url}/v1/completions broke off: {error}") from error
        if not times or prompt_tokens is None:
            raise EndpointError(
                f"{self.url}/v1/completions streamed no token or no usage; both are needed"
            )
        return Completion(prompt_tokens, started, times)
