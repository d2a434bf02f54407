"""OpenAI reply bodies from deltas: whole ones, and the chunks of a stream."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tandem_worker.dialects.reader import CallPiece
from tandem_worker.engine.drawn import TokenLogprobs
from tandem_worker.engine.requests import FinishReason
from tandem_worker.openai.context import RequestContext
from tandem_worker.openai.request import CompletionRequest
from tandem_worker.openai.text_offsets import TextOffsets
from tandem_worker.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event adds to a choice."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    is_first: bool = False
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    thought: str = ""
    calls: tuple[CallPiece, ...] = ()


class ReplyWriter:
    """Formats one request's answer.

    Args:
        echo_texts: Completions with echo: the text of each prompt, else empty.
    """

    def __init__(
        self,
        request: CompletionRequest,
        context: RequestContext,
        prompts: Sequence[tuple[int, ...]],
        tokenizer: Tokenizer,
        echo_texts: Sequence[str] = (),
    ) -> None:
        self._request = request
        self._context = context
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._echo_texts = echo_texts
        self._is_chat = request.kind == "chat"
        self._offsets: dict[int, TextOffsets] = {}
        self._parts: dict[int, list[Delta]] = {}
        prefix = "chatcmpl-" if self._is_chat else "cmpl-"
        noun = "chat.completion" if self._is_chat else "text_completion"
        self._head = {
            "id": prefix + context.request_id,
            "object": noun,
            "created": context.created,
            "model": context.model,
        }
        chunk_head = {**self._head, "object": noun + ".chunk" if self._is_chat else noun}
        self._chunk_start = f"data: {_dumps(chunk_head)[:-1]},".encode()

    # -- streams ---------------------------------------------------------------------------------

    def chunk(self, delta: Delta) -> bytes | None:
        """One server-sent event, or None where there is nothing to say."""
        choice = self._chunk_choice(delta)
        if choice is None:
            return None
        return self._chunk_start + f'"choices":[{_dumps(choice)}]}}\n\n'.encode()

    def skip(self, delta: Delta) -> None:
        """Count a delta that another worker has already sent."""
        if self._is_chat or self._request.sampling.num_logprobs is None:
            return
        token_ids = delta.token_ids
        if delta.index not in self._offsets and self._echo_texts:
            token_ids = (*self._prompts[delta.index // self._request.n], *token_ids)
        offsets = self._offsets_of(delta.index)
        for token_id in token_ids:
            offsets.next(self._shown_bytes(token_id))

    def usage_chunk(self, usage: dict[str, object]) -> bytes:
        """The event with usage and no choices."""
        return self._chunk_start + f'"choices":[],"usage":{_dumps(usage)}}}\n\n'.encode()

    def _chunk_choice(self, delta: Delta) -> dict[str, Any] | None:
        send_ids = self._context.send_token_ids
        says_something = (
            delta.text
            or delta.thought
            or delta.calls
            or delta.finish_reason
            or delta.logprobs
            or delta.is_first
            or delta.prompt_logprobs is not None
            or (send_ids and delta.token_ids)
        )
        if not says_something:
            return None
        choice: dict[str, Any] = {"index": delta.index}
        if self._is_chat:
            content: dict[str, Any] = {"role": "assistant"} if delta.is_first else {}
            other = delta.thought or delta.calls or delta.finish_reason
            if delta.text or not other or (delta.is_first and not delta.thought):
                content["content"] = delta.text
            if delta.thought:
                content["reasoning_content"] = delta.thought
            if delta.calls:
                content["tool_calls"] = [self._call_delta(delta.index, p) for p in delta.calls]
            choice["delta"] = content
        else:
            text = delta.text
            if self._echo_texts and delta.is_first:
                text = self._echo_texts[delta.index // self._request.n] + text
            choice["text"] = text
        choice["logprobs"] = self._logprobs([delta], streaming=True)
        choice["finish_reason"] = delta.finish_reason
        if send_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    # -- whole replies ---------------------------------------------------------------------------

    def collect(self, delta: Delta) -> None:
        """Keep a delta for :meth:`body`."""
        self._parts.setdefault(delta.index, []).append(delta)

    def body(self, usage: dict[str, object]) -> bytes:
        """The whole reply."""
        choices = []
        for index in range(len(self._prompts) * self._request.n):
            deltas = self._parts.get(index, [])
            text = "".join(delta.text for delta in deltas)
            choice: dict[str, Any] = {"index": index}
            if self._is_chat:
                choice["message"] = self._message(index, text, deltas)
            else:
                if self._echo_texts:
                    text = self._echo_texts[index // self._request.n] + text
                choice["text"] = text
            choice["logprobs"] = self._logprobs(deltas, streaming=False)
            choice["finish_reason"] = deltas[-1].finish_reason if deltas else None
            if self._context.send_token_ids:
                choice["token_ids"] = [token for delta in deltas for token in delta.token_ids]
            choices.append(choice)
        whole = {**self._head, "choices": choices, "usage": usage}
        if self._context.send_token_statistics:
            drawn = [
                scores.logprob
                for parts in self._parts.values()
                for part in parts
                for scores in part.logprobs
            ]
            whole["tandem"] = {"token_statistics": token_statistics(drawn)}
        return _dumps(whole).encode()

    def _message(self, index: int, text: str, deltas: Sequence[Delta]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        thought = "".join(delta.thought for delta in deltas)
        if thought:
            message["reasoning_content"] = thought
        calls: list[dict[str, Any]] = []
        for piece in (piece for delta in deltas for piece in delta.calls):
            if piece.name is not None:
                calls.append(self._call(index, piece.index, piece.name))
            calls[piece.index]["function"]["arguments"] += piece.arguments
        if calls:
            message["tool_calls"] = calls
            message["content"] = text or None
        return message

    def _call_delta(self, index: int, piece: CallPiece) -> dict[str, Any]:
        if piece.name is None:
            return {"index": piece.index, "function": {"arguments": piece.arguments}}
        return {"index": piece.index, **self._call(index, piece.index, piece.name)}

    def _call(self, index: int, number: int, name: str) -> dict[str, Any]:
        """A call without arguments; its id is the same wherever the answer is made."""
        calls = self._tokenizer.dialect.calls
        length = calls.id_length if calls is not None else None
        unique = f"{self._context.request_id} {index} {number}"
        digest = hashlib.blake2b(unique.encode("utf-8", "surrogatepass")).hexdigest()
        call_id = digest[:length] if length is not None else "call_" + digest[:24]
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}

    # -- log-probabilities -----------------------------------------------------------------------

    def _logprobs(self, deltas: Sequence[Delta], *, streaming: bool) -> dict[str, Any] | None:
        if self._request.sampling.num_logprobs is None:
            return None
        pairs: list[tuple[int, TokenLogprobs | None]] = []
        for delta in deltas:
            if delta.prompt_logprobs is not None and self._request.echo:
                prompt = self._prompts[delta.index // self._request.n]
                pairs += zip(prompt, [None, *delta.prompt_logprobs], strict=False)
            pairs += zip(delta.token_ids, delta.logprobs, strict=False)
        if streaming and not pairs:
            return None
        if self._is_chat:
            return {"content": [self._chat_entry(token, scores) for token, scores in pairs]}
        index = deltas[0].index if deltas else 0
        places = self._offsets_of(index)
        tokens, values, tops, offsets = [], [], [], []
        for token_id, scores in pairs:
            tokens.append(self._tokenizer.token_text(token_id))
            offsets.append(places.next(self._shown_bytes(token_id)))
            values.append(None if scores is None else max(scores.logprob, _LEAST_LOGPROB))
            tops.append(None if scores is None else self._top_map(token_id, scores))
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops if self._request.sampling.num_logprobs else None,
            "text_offset": offsets,
        }

    def _offsets_of(self, index: int) -> TextOffsets:
        """Where the tokens of a choice begin in its text, the echoed prompt included."""
        if index not in self._offsets:
            echoed = self._echo_texts[index // self._request.n] if self._echo_texts else None
            self._offsets[index] = TextOffsets(echoed)
        return self._offsets[index]

    def _shown_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text; special tokens may be left out of it."""
        hidden = self._request.skip_special_tokens and self._tokenizer.is_special(token_id)
        return b"" if hidden else self._tokenizer.token_bytes(token_id)

    def _top_map(self, token_id: int, scores: TokenLogprobs) -> dict[str, float]:
        # OpenAI reports the chosen token even when it is not among the likeliest.
        entries = [*scores.top, (token_id, scores.logprob)]
        return {
            self._tokenizer.token_text(token): max(value, _LEAST_LOGPROB)
            for token, value in entries
        }

    def _chat_entry(self, token_id: int, scores: TokenLogprobs | None) -> dict[str, Any]:
        top = scores.top if scores is not None else ()
        value = scores.logprob if scores is not None else 0.0
        return {
            **self._chat_token(token_id, value),
            "top_logprobs": [self._chat_token(token, logprob) for token, logprob in top],
        }

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


_LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of zero, which JSON cannot say; OpenAI's number."""

_NUM_LAST = 8
_DOUBTFUL = math.log(0.5)


def token_statistics(logprobs: Sequence[float]) -> dict[str, float] | None:
    """How sure the model was of an answer's tokens, as `docs/contract.md` names the numbers.

    logprobs: natural logarithms of the probabilities that the tokens were drawn with.
    """
    if not logprobs:
        return None
    bounded = [max(value, _LEAST_LOGPROB) for value in logprobs]
    last = bounded[-_NUM_LAST:]
    return {
        "num_tokens": len(bounded),
        "mean_logprob": sum(bounded) / len(bounded),
        "lowest_logprob": min(bounded),
        "doubtful_share": sum(value < _DOUBTFUL for value in bounded) / len(bounded),
        "final_logprob": sum(last) / len(last),
    }


DONE = b"data: [DONE]\n\n"


def error_chunk(body: dict[str, object]) -> bytes:
    """An error after the headers are out; ends the stream."""
    return f"data: {_dumps(body)}\n\n".encode()


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
