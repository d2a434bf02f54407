"""One client's stream out of vLLM's: token ids are asked for, used to go on, and taken out again.

A plain text stream goes on through `/v1/completions` from prompt ids and sent ids. What depends on
more than ids (stop strings, a JSON schema, several choices) is made again from the beginning and
what the client has is left out; that needs an answer that comes out the same, so temperature 0 or
a seed. Tool calls, thoughts and log-probabilities that were begun cannot be gone on with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tandem_router.engines.protocol import Resumption, SentChoice
from tandem_router.errors import UpstreamError
from tandem_router.openai.request import InferenceRequest
from tandem_router.openai.said import chunk_of
from tandem_router.openai.sse import encode_event, split_events

# A quote inside of a string is escaped, so these bytes stand only where the key does.
_IDS = re.compile(rb',"(?:prompt_)?token_ids":\s*(?:\[[\d,\s]*\]|null)')
DEFAULT_COMPLETION_TOKENS = 16
_KEPT = frozenset(
    "temperature top_p top_k min_p seed logit_bias repetition_penalty ignore_eos stop_token_ids "
    "skip_special_tokens spaces_between_special_tokens bad_words allowed_token_ids user "
    "cache_salt stream stream_options".split()
)
# What ids alone do not carry: state of a grammar, of a parser, of counts, of held-back text.
_STATEFUL = frozenset(
    "stop response_format tools functions logprobs top_logprobs presence_penalty "
    "structured_outputs frequency_penalty min_tokens echo suffix guided_json guided_regex "
    "guided_choice guided_grammar include_stop_str_in_output use_beam_search best_of".split()
)


class VLLMWire:
    """See `protocol.Wire`."""

    def __init__(self, request: InferenceRequest) -> None:
        self._request = request
        self._asked_for_ids = bool(request.fields.get("return_token_ids"))
        self._prompt_ids: list[int] | None = None
        self._head: dict[str, Any] | None = None  # id, created and model of the first reply
        self._num_continued = 0  # ids that the present worker was given as part of its prompt
        self._continues = False

    def read(self, events: bytes) -> bytes:
        if self._continues:
            return b"".join(self._translated(event) for event in split_events(events))
        if self._head is None and b'"choices"' in events:
            self._look_at(events)
        return events

    def shown(self, events: bytes) -> bytes:
        return events if self._asked_for_ids else _IDS.sub(b"", events)

    def _look_at(self, events: bytes) -> None:
        """Keep the prompt's ids, which come once, with the first chunk."""
        for event in split_events(events):
            payload = chunk_of(event)
            if payload is None or "choices" not in payload:
                continue
            self._head = {k: payload[k] for k in ("id", "created", "model") if k in payload}
            choices = payload["choices"]
            first = choices[0] if isinstance(choices, list) and choices else {}
            found = payload.get("prompt_token_ids") or (
                first.get("prompt_token_ids") if isinstance(first, dict) else None
            )
            self._prompt_ids = found if isinstance(found, list) else None
            return

    # -- going on ---------------------------------------------------------------------------

    def resume(self, sent: Sequence[SentChoice], max_tokens: int | None) -> Resumption:
        request = self._request
        self._continues = False
        if not any(choice.num_text_chars or choice.token_ids for choice in sent):
            return Resumption(request.path, request.body)
        if any(choice.text_without_ids for choice in sent):
            raise UpstreamError("the reply carries no token ids, so it cannot be carried on")
        if not all(choice.only_text for choice in sent):
            raise UpstreamError(
                "tool calls, thoughts or log-probabilities were sent, and vLLM cannot go on inside "
                "of them"
            )
        return self._from_ids(sent, max_tokens) or self._from_the_beginning()

    def _from_ids(self, sent: Sequence[SentChoice], max_tokens: int | None) -> Resumption | None:
        fields = self._request.fields
        if self._prompt_ids is None or len(sent) != 1 or _stateful(fields):
            return None
        ids = list(sent[0].token_ids[: sent[0].num_settled])
        limit = max_tokens if max_tokens is not None else self._request.max_tokens
        if limit is None and self._request.kind == "completions":
            limit = DEFAULT_COMPLETION_TOKENS
        left = None if limit is None else limit - len(ids)
        if not ids or (left is not None and left < 1):
            return None
        body = {k: v for k, v in fields.items() if k in _KEPT}
        body |= {"prompt": [*self._prompt_ids, *ids], "max_tokens": left}
        self._continues, self._num_continued = True, len(ids)
        text = json.dumps(body, ensure_ascii=False).encode()
        return Resumption("/v1/completions", text, _greedy(fields), repeats="unsettled")

    def _from_the_beginning(self) -> Resumption:
        fields = self._request.fields
        if not _greedy(fields) and fields.get("seed") is None:
            raise UpstreamError(
                "the answer was drawn at random and its ids alone do not carry it on; temperature "
                "0 or a seed makes such a stream survive"
            )
        return Resumption(self._request.path, self._request.body, _greedy(fields), repeats="all")

    def _translated(self, event: bytes) -> bytes:
        """A chunk of the completion that goes on, as a chunk of what the client asked for."""
        payload = chunk_of(event)
        if payload is None or payload.get("error"):
            return event
        payload.update(self._head or {})
        usage = payload.get("usage")
        if isinstance(usage, dict) and self._prompt_ids is not None:
            said = usage.get("completion_tokens")
            made = (said if isinstance(said, int) else 0) + self._num_continued
            usage["prompt_tokens"] = len(self._prompt_ids)
            usage["completion_tokens"] = made
            usage["total_tokens"] = len(self._prompt_ids) + made
        for choice in payload.get("choices") or []:
            choice.pop("prompt_token_ids", None)
            if self._request.kind == "chat":
                choice["delta"] = {"content": choice.pop("text", "")}
        if self._request.kind == "chat":
            payload["object"] = "chat.completion.chunk"
        return encode_event(payload)


def _stateful(fields: Mapping[str, Any]) -> bool:
    return any(fields.get(name) not in (None, False, 0, [], "", {}) for name in _STATEFUL)


def _greedy(fields: Mapping[str, Any]) -> bool:
    return fields.get("temperature") == 0
