"""From a checked body to what the engine is given: token ids, the answer's grammar, its length."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tandem_worker.dialects.reader import AnswerReader, Opening, opening
from tandem_worker.errors import RequestError
from tandem_worker.openai.answer_grammar import answer_grammar
from tandem_worker.openai.body import TokenizeBody
from tandem_worker.openai.embeddings import EmbeddingsBody
from tandem_worker.openai.request import CompletionRequest
from tandem_worker.server.worker import Worker

_LONG_TEXT = 8192
"""Texts beyond this many characters are tokenized in another thread."""


@dataclass(frozen=True)
class Prepared:
    """One request as the engine takes it.

    Attributes:
        request: With the grammar of the whole answer in its sampling.
        prompts: Token ids of each prompt.
        opening: How the prompt leaves the answer's beginning.
    """

    request: CompletionRequest
    prompts: list[tuple[int, ...]]
    opening: Opening = Opening.CLOSED

    def reader(self, worker: Worker) -> AnswerReader | None:
        """What tells thoughts and calls from one answer's text; None where there are neither."""
        dialect = worker.tokenizer.dialect
        thought = None if self.opening is Opening.CLOSED else dialect.thought
        calls = dialect.calls if self.request.tools is not None else None
        if thought is None and calls is None:
            return None
        return AnswerReader(calls=calls, thought=thought, opening=self.opening)


async def prepare(worker: Worker, request: CompletionRequest) -> Prepared:
    """Tokenize, and settle what the answer has to look like.

    Raises:
        RequestError: the model has no such tokens, template, tools or format.
    """
    if request.kind == "completion":
        texts: Sequence[str | tuple[int, ...]] = request.prompts
        begins = Opening.CLOSED
    else:
        text = await _rendered(worker, request)
        texts = [text]
        begins = opening(text, worker.tokenizer.dialect.thought)
        if not request.add_generation_prompt:
            begins = Opening.CLOSED
    prompts = [
        await encode(worker, text, request) if isinstance(text, str) else text for text in texts
    ]
    for prompt in prompts:
        if not prompt:
            raise RequestError("the prompt has no tokens; send some text", param="prompt")
        check_vocabulary(worker, prompt, "prompt")
    for resumed in request.resume_token_ids:
        check_vocabulary(worker, resumed, "tandem.resume_token_ids")
    for token_id, _ in request.sampling.logit_bias:
        check_vocabulary(worker, (token_id,), "logit_bias")
    return Prepared(request, prompts, begins)


async def prepare_inputs(worker: Worker, body: EmbeddingsBody) -> list[tuple[int, ...]]:
    """Token ids of the texts of a request for vectors.

    Raises:
        RequestError: one has no tokens, too many, or some that the model lacks.
    """
    prompts = []
    for index, given in enumerate(body.input):
        if isinstance(given, str):
            prompt = await encode(worker, given, body)
        else:
            prompt = tuple(given)
        name = f"input[{index}]"
        if not prompt:
            raise RequestError(f"{name} has no tokens; send some text", param="input")
        check_vocabulary(worker, prompt, name)
        if len(prompt) > worker.max_model_len:
            raise RequestError(
                f"This model's maximum context length is {worker.max_model_len} tokens. However, "
                f"{name} has {len(prompt)}; shorten it.",
                param="input",
                code="context_length_exceeded",
            )
        prompts.append(prompt)
    return prompts


async def with_grammar(worker: Worker, prepared: Prepared) -> Prepared:
    """The same with the answer's grammar, tried out.

    A schema that cannot be built is refused where it was asked for strictly; else the arguments
    may be any object.

    Raises:
        RequestError: the answer's format cannot be had.
    """
    request = prepared.request

    def constrained(*, lenient: bool) -> Prepared:
        grammar = answer_grammar(
            worker.tokenizer.dialect,
            opening=prepared.opening,
            tools=request.tools,
            answer=request.sampling.grammar,
            max_thought_tokens=request.max_thought_tokens,
            lenient=lenient,
        )
        sampling = replace(request.sampling, grammar=grammar)
        return replace(prepared, request=replace(request, sampling=sampling))

    try:
        chosen = constrained(lenient=False)
    except RecursionError as error:
        raise RequestError(
            "the answer's format is nested too deeply", param="response_format"
        ) from error
    try:
        await worker.check_format(chosen.request.sampling)
    except RequestError as error:
        tools = request.tools
        if tools is None or error.code != "invalid_format" or all(t.strict for t in tools.callable):
            raise
        chosen = constrained(lenient=True)
        await worker.check_format(chosen.request.sampling)
    return chosen


async def _rendered(worker: Worker, request: CompletionRequest) -> str:
    dialect = worker.tokenizer.dialect
    messages = request.messages
    variables = dict(request.template_variables)
    if request.tools is not None:
        if dialect.calls is None:
            raise RequestError(
                "this model's chat template shows no tools in a form that is known here; leave "
                "tools out, or set tool_choice to 'none'",
                param="tools",
                code="unsupported_parameter",
            )
        variables["tools"] = list(request.tools.shown)
    if dialect.calls is not None and dialect.calls.id_length is not None:
        messages = tuple(_with_ids(message, dialect.calls.id_length) for message in messages)
    return await asyncio.to_thread(
        worker.tokenizer.render_chat,
        messages,
        add_generation_prompt=request.add_generation_prompt,
        parse_special_tokens=request.parse_special_tokens,
        **variables,
    )


def _with_ids(message: dict[str, Any], length: int) -> dict[str, Any]:
    """Ids of calls as the template takes them: another model may have made the history."""
    changed = dict(message)
    if isinstance(message.get("tool_call_id"), str):
        changed["tool_call_id"] = _id_of(message["tool_call_id"], length)
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            {**call, "id": _id_of(str(call.get("id", "")), length)}
            for call in message["tool_calls"]
        ]
    return changed


def _id_of(given: str, length: int) -> str:
    if len(given) == length and given.isascii() and given.isalnum():
        return given
    return hashlib.blake2b(given.encode("utf-8", "surrogatepass")).hexdigest()[:length]


async def encode(
    worker: Worker, text: str, body: CompletionRequest | EmbeddingsBody | TokenizeBody
) -> tuple[int, ...]:
    """Token ids of a text, as its request wants it; in another thread where it is long.

    A chat's text is what the template made, with its control tokens.
    """
    tokenizer = worker.tokenizer
    most = tokenizer.most_chars_per_token
    if most and not isinstance(body, TokenizeBody) and len(text) > most * worker.max_model_len:
        # Told before it is tokenized, which takes seconds for megabytes.
        raise RequestError(
            f"This model's maximum context length is {worker.max_model_len} tokens. However, the "
            f"prompt has at least {-(-len(text) // most)} tokens; shorten it.",
            code="context_length_exceeded",
        )
    if isinstance(body, CompletionRequest) and body.kind == "chat":
        work = partial(tokenizer.encode_marked, text, add_special_tokens=False)
    else:
        work = partial(
            tokenizer.encode,
            text,
            add_special_tokens=body.add_special_tokens,
            parse_special_tokens=body.parse_special_tokens,
        )
    return tuple(work() if len(text) < _LONG_TEXT else await asyncio.to_thread(work))


def check_vocabulary(worker: Worker, token_ids: Sequence[int], name: str) -> None:
    """Refuse tokens that the model lacks.

    Raises:
        RequestError: there is one.
    """
    limit = worker.vocab_size
    if token_ids and max(token_ids) >= limit:
        raise RequestError(
            f"{name} holds token {max(token_ids)}; the vocabulary ends at {limit - 1}",
            param=name,
        )


def max_tokens(worker: Worker, request: CompletionRequest, prompts: list[tuple[int, ...]]) -> int:
    """Tokens that each answer may have.

    Raises:
        RequestError: prompt and answer exceed the model's context.
    """
    limit = worker.max_model_len
    longest = max(len(prompt) for prompt in prompts)
    room = limit - longest
    wanted = request.max_tokens
    if wanted is None:
        wanted = room if request.kind == "chat" else min(16, room)
    if room < 1 or wanted > room:
        if request.max_tokens == 0 and room >= 0:
            return 0
        raise RequestError(
            # In the words that clients look for to fall back on a model with more room.
            f"This model's maximum context length is {limit} tokens. However, the prompt has "
            f"{longest} tokens and the answer may have {max(wanted, 1)}; shorten either.",
            param="messages" if request.kind == "chat" else "prompt",
            code="context_length_exceeded",
        )
    return wanted
