"""How one question gets one answer: an OpenAI chat request, repeated while that can help.

What a reply means is decided here once: whose fault a failure is (the tier's, the request's,
nobody's), how long a busy tier wants to be left alone, what an answer cost.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from tandem_router.grading.endpoints import ROUTER, Endpoint
from tandem_router.grading.errors import AskFailed
from tandem_router.predictor.cascade.token_statistics import TokenStatistics
from tandem_router.predictor.records.conversation import content_text

MAX_ATTEMPTS = 5
MAX_WAIT_S = 60.0
STEP_S = 0.5
_BACKOFF_S = (0.5, 1.0, 2.0, 4.0)
_WAITS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_REFUSED = frozenset({401, 402, 403})


@dataclass(frozen=True, slots=True)
class Answer:
    """What a tier answered; None is what it did not say."""

    text: str
    output_tokens: int | None
    cost_usd: float | None
    cut_off: bool
    tokens: TokenStatistics | None = None

    def record(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "text": self.text,
            "output_tokens": self.output_tokens,
            "cost_usd": self.cost_usd,
            "cut_off": self.cut_off,
        }
        if self.tokens is not None:
            said["token_statistics"] = asdict(self.tokens)
        return said


class Asker:
    """Asks endpoints; a tier that answers 429 is left alone by every request as long as it says.

    `stopping` tells that no further attempt is wanted. `sleep` and `clock` are passed in.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        *,
        max_tokens: int | None,
        temperature: float | None,
        timeout_s: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] | None = None,
        stopping: Callable[[], bool] = lambda: False,
        token_statistics: bool = False,
    ) -> None:
        self._client = client
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._timeout_s = timeout_s
        self._sleep = sleep
        self._clock = clock or asyncio.get_running_loop().time
        self._stopping = stopping
        self._not_before: dict[str, float] = {}
        self._newer_limit: set[str] = set()
        self._asks_certainty = token_statistics
        self._says_none: set[str] = set()  # endpoints that refuse to tell log-probabilities

    async def ask(
        self,
        endpoint: Endpoint,
        messages: Sequence[Mapping[str, Any]],
        *,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[Answer, httpx.Headers]:
        """The answer and the reply's headers. Raises AskFailed with the last thing that failed."""
        failure = AskFailed(f"{endpoint.name} was not asked: stopped before")
        for attempt in range(MAX_ATTEMPTS):
            await self._until(self._not_before.get(endpoint.name, 0.0))
            if self._stopping():
                break
            try:
                response = await self._post(endpoint, messages, headers or {})
            except AskFailed as error:
                failure = error
                await self._pause(attempt)
                continue
            if response.status_code == 400 and (
                self._wants_newer_limit(endpoint, response)
                or self._tells_no_logprobs(endpoint, response)
            ):
                continue
            if response.status_code in _WAITS:
                failure = AskFailed(_said(endpoint, response))
                told = _retry_after(response)
                if told is not None:
                    until = self._clock() + min(told, MAX_WAIT_S)
                    self._not_before[endpoint.name] = max(
                        until, self._not_before.get(endpoint.name, 0.0)
                    )
                else:
                    await self._pause(attempt)
                continue
            return _answer(endpoint, response), response.headers
        raise failure

    async def _pause(self, attempt: int) -> None:
        if attempt + 1 < MAX_ATTEMPTS:
            await self._until(self._clock() + _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])

    async def _until(self, when: float) -> None:
        """Waits in steps short enough that a stop is noticed."""
        while (wait := when - self._clock()) > 0 and not self._stopping():
            await self._sleep(min(wait, STEP_S))

    async def _post(
        self,
        endpoint: Endpoint,
        messages: Sequence[Mapping[str, Any]],
        headers: Mapping[str, str],
    ) -> httpx.Response:
        body: dict[str, Any] = {"model": endpoint.model, "messages": list(messages)}
        if self._max_tokens is not None:
            newer = endpoint.name in self._newer_limit
            body["max_completion_tokens" if newer else "max_tokens"] = self._max_tokens
        if self._temperature is not None:
            body["temperature"] = self._temperature
        if self._asks_certainty and endpoint.name not in {"judge", *self._says_none}:
            body["logprobs"] = True
        sent = {"content-type": "application/json", **headers}
        if endpoint.key:
            sent["authorization"] = f"Bearer {endpoint.key}"
        content = json.dumps(body).encode()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._client.post(
                    f"{endpoint.url}/chat/completions", content=content, headers=sent
                )
        except (TimeoutError, httpx.TimeoutException) as error:
            raise AskFailed(
                f"{endpoint.name} did not answer within {self._timeout_s:g} s (--timeout)"
            ) from error
        except httpx.InvalidURL as error:
            raise AskFailed(
                f"{endpoint.name}: {endpoint.url}: {error}", blames_tier=True
            ) from error
        except (httpx.HTTPError, UnicodeEncodeError) as error:
            why = str(error) or type(error).__name__
            raise AskFailed(
                f"{endpoint.name} at {endpoint.url} cannot be reached: {why}"
            ) from error

    def _wants_newer_limit(self, endpoint: Endpoint, response: httpx.Response) -> bool:
        """Some models take `max_completion_tokens` only, and say so in a 400."""
        if endpoint.name in self._newer_limit or "max_completion_tokens" not in response.text:
            return False
        self._newer_limit.add(endpoint.name)
        return True

    def _tells_no_logprobs(self, endpoint: Endpoint, response: httpx.Response) -> bool:
        """Some models refuse `logprobs`; they are asked without from then on."""
        if not self._asks_certainty or endpoint.name in self._says_none:
            return False
        if not any(word in response.text.lower() for word in ("logprob", "log-prob")):
            return False
        self._says_none.add(endpoint.name)
        return True


def _retry_after(response: httpx.Response) -> float | None:
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def _said(endpoint: Endpoint, response: httpx.Response) -> str:
    return f"{endpoint.name} at {endpoint.url} answered {response.status_code}{_reason(response)}"


def _reason(response: httpx.Response) -> str:
    """What the reply says of itself, short; a page of HTML says nothing."""
    try:
        value = response.json()
    except (ValueError, RecursionError):
        return "" if "<" in response.text[:200] else _short(response.text)
    if isinstance(value, dict):
        error = value.get("error", value.get("detail", value.get("message", "")))
        text = error.get("message", "") if isinstance(error, dict) else error
        return _short(text) if isinstance(text, str) else ""
    return ""


def _short(text: str) -> str:
    plain = " ".join("".join(c if c.isprintable() else " " for c in text[:2000]).split())
    return f": {plain[:160]}" if plain else ""


def _answer(endpoint: Endpoint, response: httpx.Response) -> Answer:
    status = response.status_code
    if status in _REFUSED:
        key = (
            f"the key in {endpoint.key_variable} is not accepted"
            if endpoint.key
            else f"no key was sent; name its variable with {_key_option(endpoint)}"
        )
        raise AskFailed(f"{_said(endpoint, response)}; {key}", blames_tier=True)
    if status == 404:
        raise AskFailed(
            f"{_said(endpoint, response)}; check the URL (it ends with /v1) and the model "
            f"{endpoint.model!r}",
            blames_tier=True,
        )
    if 300 <= status < 400:
        raise AskFailed(
            f"{_said(endpoint, response)}, a redirect to "
            f"{response.headers.get('location', 'nowhere')[:120]}; name that URL instead",
            blames_tier=True,
        )
    if status != 200:
        raise AskFailed(_said(endpoint, response), blames_request=True)
    try:
        reply = response.json()
        choice = reply["choices"][0]
        text = content_text(choice["message"].get("content"))
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError) as error:
        what = "HTML" if response.text.lstrip()[:1] == "<" else "no chat completion"
        raise AskFailed(
            f"{endpoint.name} at {endpoint.url} answered {what}{_reason(response)}; is that the "
            "URL of an OpenAI-compatible API, ending with /v1?",
            blames_tier=True,
        ) from error
    served = response.headers.get("x-tandem-tier")
    if endpoint.router and served not in (None, endpoint.model) and endpoint.name != ROUTER:
        raise AskFailed(f"{endpoint.name} was asked and {served} answered", blames_request=True)
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    output_tokens = _count(usage.get("completion_tokens"))
    prompt_tokens = _count(usage.get("prompt_tokens"))
    return Answer(
        text,
        output_tokens,
        _cost(endpoint, prompt_tokens, output_tokens, usage, response.headers),
        choice.get("finish_reason") == "length",
        TokenStatistics.of_logprobs(choice.get("logprobs")),
    )


def _key_option(endpoint: Endpoint) -> str:
    options = {"judge": "--judge-key VARIABLE", ROUTER: "--key VARIABLE"}
    return options.get(endpoint.name, f"--key {endpoint.name}=VARIABLE")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _cost(
    endpoint: Endpoint,
    prompt_tokens: int | None,
    output_tokens: int | None,
    usage: Mapping[str, Any],
    headers: Mapping[str, str],
) -> float | None:
    """Dollars: as the reply says, else tokens at the given price; None where neither is known."""
    told: Sequence[Any] = (
        None if headers.get("x-tandem-cache") else headers.get("x-tandem-cost-usd"),
        headers.get("x-litellm-response-cost"),
        usage.get("cost"),
    )
    if prompt_tokens is not None and output_tokens is not None:
        listed = endpoint.cost_usd(prompt_tokens, output_tokens)
        if listed is not None:
            return listed
    for value in told:
        try:
            cost = float(value)
        except (TypeError, ValueError):
            continue
        if 0 <= cost < 1e6:
            return cost
    return None
