"""One request's choices: submitted to the engine, turned from tokens into text, and cleaned up."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tandem_worker.dialects.reader import AnswerReader
from tandem_worker.engine.constraints import CreateConstraint
from tandem_worker.engine.drawn import TokenLogprobs
from tandem_worker.engine.requests import (
    EngineRequest,
    ErrorEvent,
    Event,
    FinishReason,
    PromptLogprobsEvent,
    ReservedEvent,
    TokenEvent,
)
from tandem_worker.engine.sampling import SamplingParams, choice_seed
from tandem_worker.engine.thread import EngineThread
from tandem_worker.metrics import WorkerMetrics
from tandem_worker.openai.context import RequestContext
from tandem_worker.openai.request import CompletionRequest
from tandem_worker.openai.response import Delta
from tandem_worker.scheduling.sequence import Sequence as ScheduledSequence
from tandem_worker.tokenization.detokenizer import AnswerText
from tandem_worker.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tandem_worker.disaggregation.decode_side import RemotePrefill

_CONTEXT_TOKENS = 5
# Where nobody has predicted a length: half of Azure's conversations are shorter than 130 tokens.
UNKNOWN_OUTPUT_TOKENS = 256

_numbers = itertools.count(1)
"""Sets requests of one id apart: a retry may arrive before its predecessor's end was noticed."""


@dataclass(slots=True, eq=False)
class _Choice:
    index: int
    sequence_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    text: AnswerText
    reader: AnswerReader | None
    resumed: tuple[int, ...] = ()
    num_generated: int = 0
    num_thought: int = 0
    last_token_s: float = 0.0
    is_done: bool = False
    is_first: bool = True
    task: asyncio.Task[None] | None = None
    followers: list[_Choice] = field(default_factory=list)


class Generation:
    """Runs one request; iterate :meth:`deltas`, then :meth:`close`.

    Args:
        request: Checked body.
        prompts: Token ids, one list per prompt.
        context: From the headers.
        max_tokens: Per choice, resumed tokens included.
        make_reader: What tells thoughts and calls from one answer's text.
    """

    def __init__(
        self,
        *,
        request: CompletionRequest,
        prompts: Sequence[tuple[int, ...]],
        context: RequestContext,
        max_tokens: int,
        engine: EngineThread,
        remote: RemotePrefill | None,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[int],
        metrics: WorkerMetrics,
        create_constraint: CreateConstraint,
        make_reader: Callable[[], AnswerReader | None] = lambda: None,
    ) -> None:
        self.request = request
        self.context = context
        self.prompts = prompts
        self.num_cached_tokens = 0
        self._engine = engine
        self._remote = remote if context.prefill_url else None
        self._tokenizer = tokenizer
        self._eos = eos_token_ids
        self._metrics = metrics
        self._create_constraint = create_constraint
        self._make_reader = make_reader
        self._events: asyncio.Queue[tuple[_Choice, Event]] = asyncio.Queue()
        self._arrival_s = time.monotonic()
        self._number = next(_numbers)
        self._choices = self._make_choices(max_tokens)

    @property
    def num_completion_tokens(self) -> int:
        """Generated so far over all choices, resumed ones included."""
        return sum(choice.num_generated for choice in self._choices)

    def usage(self) -> dict[str, object]:
        """OpenAI's usage object."""
        prompt = sum(len(tokens) for tokens in self.prompts)
        completion = self.num_completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
            **self._thought_usage(),
        }

    def _thought_usage(self) -> dict[str, object]:
        if all(choice.reader is None for choice in self._choices):
            return {}
        thought = sum(choice.num_thought for choice in self._choices)
        return {"completion_tokens_details": {"reasoning_tokens": thought}}

    def resumed_deltas(self) -> list[Delta]:
        """Replay what another worker has already sent: the state moves, nothing is emitted.

        The returned text is for answers that are not streamed.
        """
        deltas = []
        for choice in self._choices:
            for token_id in choice.resumed:
                deltas.append(self._advance(choice, token_id, None, self._reason(choice, token_id)))
                if choice.is_done:
                    break
        return deltas

    async def deltas(self) -> AsyncIterator[Delta]:
        """Everything new, as it comes; ends when all choices are done.

        Raises:
            RequestError: the engine failed.
        """
        for choice in self._choices:
            if self._is_leader(choice):
                if choice.is_done:
                    self._release_followers(choice)
                else:
                    self._submit(choice)
        while not all(choice.is_done for choice in self._choices):
            choice, event = await self._events.get()
            if choice.is_done:
                continue
            if isinstance(event, ReservedEvent):
                self._start_remote(choice, event)
            elif isinstance(event, ErrorEvent):
                raise event.as_refusal()
            elif isinstance(event, PromptLogprobsEvent):
                if event.finish_reason is not None:
                    choice.is_done = True
                    self._metrics_done(choice, event.finish_reason)
                self._release_followers(choice)
                yield Delta(
                    choice.index,
                    "",
                    finish_reason=event.finish_reason,
                    is_first=choice.is_first,
                    prompt_logprobs=event.logprobs,
                )
                choice.is_first = False
            elif isinstance(event, TokenEvent):
                yield self._on_token(choice, event)

    def close(self) -> None:
        """Abort what still runs; harmless when everything is done."""
        for choice in self._choices:
            if not choice.is_done:
                choice.is_done = True
                if choice.task is not None and not choice.task.done():
                    choice.task.cancel()  # aborts in the engine as well
                else:
                    self._engine.abort(choice.sequence_id)

    # -- the parts -------------------------------------------------------------------------------

    def _make_choices(self, max_tokens: int) -> list[_Choice]:
        request = self.request
        choices = []
        for number, prompt in enumerate(self.prompts):
            for nth in range(request.n):
                index = number * request.n + nth
                resumed: tuple[int, ...] = ()
                if index < len(request.resume_token_ids):
                    resumed = request.resume_token_ids[index]
                sampling = replace(
                    request.sampling,
                    seed=choice_seed(self.context.seed, index),
                    max_tokens=max_tokens,
                )
                if self.context.send_token_statistics and sampling.num_logprobs is None:
                    sampling = replace(sampling, num_logprobs=0)  # computed, shown to no client
                reader = self._make_reader()
                choices.append(
                    _Choice(
                        index=index,
                        sequence_id=f"{self.context.request_id}-{index}.{self._number}",
                        prompt=prompt,
                        sampling=sampling,
                        text=self._answer_text(prompt, sampling, reader),
                        reader=reader,
                        resumed=resumed,
                        is_first=not resumed,
                    )
                )
            leader = choices[number * request.n]
            leader.followers = choices[number * request.n + 1 :]
        return choices

    def _answer_text(
        self, prompt: tuple[int, ...], sampling: SamplingParams, reader: AnswerReader | None
    ) -> AnswerText:
        skip = self.request.skip_special_tokens
        tokenizer = self._tokenizer
        keep = (
            {token: text for text, token in tokenizer.dialect.token_ids.items()} if reader else {}
        )
        hidden = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            hidden |= self._eos
        return AnswerText(
            lambda ids: tokenizer.decode(ids, skip_special_tokens=skip, keep=keep),
            self.request.stop,
            include_stop=self.request.include_stop,
            hidden=frozenset(hidden),
            context=prompt[-_CONTEXT_TOKENS:],
            min_tokens=sampling.min_tokens,
            reader=reader,
        )

    def _submit(self, choice: _Choice) -> None:
        context = self.context
        scored = self.request.echo and self.request.sampling.num_logprobs is not None
        sequence = ScheduledSequence(
            request_id=choice.sequence_id,
            token_ids=[*choice.prompt, *choice.resumed],
            num_prompt_tokens=len(choice.prompt),
            arrival_s=self._arrival_s,
            deadline_s=self._arrival_s + context.deadline_ms / 1e3 if context.deadline_ms else None,
            priority=context.priority,
            predicted_output_tokens=min(
                choice.sampling.max_tokens, context.expected_tokens or UNKNOWN_OUTPUT_TOKENS
            ),
            remote_prefill=self._remote is not None
            and self._is_leader(choice)
            and not scored
            and choice.sampling.max_tokens > 0,
            reuse_prefix=not scored,
            salt=self.request.cache_salt,
            tenant=context.tenant,
        )
        self._engine.add(
            EngineRequest(
                sequence=sequence,
                sampling=choice.sampling,
                sink=lambda event: self._events.put_nowait((choice, event)),
                constraint=self._create_constraint(choice.sampling),
                prompt_logprobs=self.request.sampling.num_logprobs
                if scored and not choice.resumed
                else None,
            )
        )

    def _is_leader(self, choice: _Choice) -> bool:
        """Whether it is the first choice of its prompt, whose blocks the others will hit."""
        return choice.index % self.request.n == 0

    def _release_followers(self, choice: _Choice) -> None:
        """Start the other choices of a prompt once its blocks are in the prefix cache."""
        followers, choice.followers = choice.followers, []
        for follower in followers:
            if not follower.is_done:
                self._submit(follower)

    def _start_remote(self, choice: _Choice, event: ReservedEvent) -> None:
        from tandem_worker.disaggregation.protocol import PrefillJob

        assert self._remote is not None
        assert self.context.prefill_url is not None
        job = PrefillJob(
            request_id=choice.sequence_id,
            token_ids=event.token_ids,
            num_prompt_tokens=len(choice.prompt),
            sampling=choice.sampling,
            deadline_ms=self.context.deadline_ms,
            cache_salt=self.request.cache_salt,
            tenant=self.context.tenant,
        )
        choice.task = self._remote.start(self.context.prefill_url, job, event)

    def _on_token(self, choice: _Choice, event: TokenEvent) -> Delta:
        now_s = time.monotonic()
        if choice.is_first and self._is_leader(choice):  # the prompt is counted once, too
            self.num_cached_tokens += event.num_cached_tokens
        if choice.last_token_s:
            self._metrics.itl_s.observe(now_s - choice.last_token_s)
        else:
            self._metrics.ttft_s.observe(now_s - self._arrival_s)
        choice.last_token_s = now_s
        self._release_followers(choice)
        delta = self._advance(choice, event.token_id, event.logprobs, event.finish_reason)
        if choice.is_done:
            if event.finish_reason is None:
                self._engine.abort(choice.sequence_id, reason="stop")
            self._metrics_done(choice, event.finish_reason or "stop")
        return delta

    def _advance(
        self,
        choice: _Choice,
        token_id: int,
        logprobs: TokenLogprobs | None,
        reason: FinishReason | None,
    ) -> Delta:
        """Add a token to a choice's text; the same for new and for replayed tokens."""
        choice.num_generated += 1
        reader = choice.reader
        was_thinking = reader is not None and reader.is_thinking
        text = choice.text.push(token_id, last=reason is not None)
        if text.stopped:
            reason = "stop"
        choice.is_done = reason is not None
        if was_thinking and reader is not None and reader.is_thinking:
            choice.num_thought += 1
        delta = Delta(
            choice.index,
            text.text,
            (token_id,),
            (logprobs,) if logprobs is not None else (),
            "tool_calls" if self._ends_in_calls(reader, reason) else reason,
            choice.is_first,
            thought=text.thought if self.request.include_thought else "",
            calls=text.calls,
        )
        choice.is_first = False
        return delta

    def _ends_in_calls(self, reader: AnswerReader | None, reason: FinishReason | None) -> bool:
        """Whether the reply says ``tool_calls``; not for a named one, as OpenAI has it."""
        tools = self.request.tools
        return (
            reason == "stop"
            and tools is not None
            and tools.mode != "named"
            and reader is not None
            and reader.num_calls > 0
        )

    def _reason(self, choice: _Choice, token_id: int) -> FinishReason | None:
        return choice.sampling.finish_reason(token_id, choice.num_generated + 1, self._eos)

    def _metrics_done(self, choice: _Choice, reason: FinishReason) -> None:
        self._metrics.e2e_s.observe(time.monotonic() - self._arrival_s)
        self._metrics.success.labels(self._metrics.model_name, reason).inc()
