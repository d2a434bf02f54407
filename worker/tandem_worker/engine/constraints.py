"""Which tokens may come next: a grammar's mask and the bounds of a model's thinking.

Everything is a function of the tokens generated so far. So a constrained answer goes on after a
preemption, a resumption on another worker or a remote prefill exactly where it was: the state is
rebuilt from token ids. Grammars are llguidance's (docs/decisions/0071).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from tandem_worker.engine.sampling import SamplingParams, Thinking
from tandem_worker.errors import WorkerError

MAX_GRAMMAR_CHARS = 256 * 1024
_CACHED_GRAMMARS = 64


class GrammarError(WorkerError):
    """A grammar cannot be used; the message says why, in llguidance's words."""


def parser_limits() -> LLParserLimits:
    """Work that one grammar may cause; in fuel, so that every machine decides alike.

    A step's lexer fuel is some 4 ms, its items 1 ms; a step beyond either ends the request.
    """
    return LLParserLimits(
        max_items_in_row=1000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def build_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at its start.

    Raises:
        GrammarError: the grammar is malformed, allows nothing, or exceeds the limits.
    """
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    problem = matcher.get_error()
    if not problem:
        probe = matcher.deep_copy()
        probe.compute_bitmask()
        problem = probe.get_error()
    if problem:
        raise GrammarError(_sentence(problem))
    return matcher


def _sentence(problem: str) -> str:
    """llguidance's message without its dumps of state."""
    text = problem.split("<state>")[0].split("<non-verbose/>")[0]
    line = " ".join(text.split())
    if line.startswith("NoExtension"):
        return "it allows no text at all"
    return line[:300] or "it cannot be parsed"


class ThinkingPhase:
    """Whether a model is thinking, from the tokens seen: ``<think>`` opens, ``</think>`` closes."""

    def __init__(self, thinking: Thinking | None) -> None:
        self._thinking = thinking
        self.is_open = thinking is not None and thinking.is_open
        self.may_open = thinking is not None and not thinking.is_open
        self.num_tokens = 0
        """Tokens of thinking so far, the closing one not counted."""

    def follow(self, token_id: int) -> bool:
        """Add a token; says whether it belongs to the thinking (its two marks included)."""
        if self._thinking is None:
            return False
        if self.is_open:
            self.is_open = token_id != self._thinking.end_id
            self.num_tokens += self.is_open
            return True
        opens = self.may_open and token_id == self._thinking.start_id
        self.may_open = False
        self.is_open = opens
        return opens

    @property
    def is_spent(self) -> bool:
        """Whether the budget of thinking is used up, so that the end has to come now."""
        budget = self._thinking.budget if self._thinking is not None else None
        return self.is_open and budget is not None and self.num_tokens >= budget


class TokenConstraint:
    """What one sequence may generate next.

    Args:
        vocab_size: Bits of a mask.
        thinking: Bounds of the thinking, or None.
        matcher: A grammar's matcher, owned by this object, for what follows the thinking.
        eos_token_ids: May not end a constrained answer inside the thinking.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        thinking: Thinking | None,
        matcher: LLMatcher | None,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._num_bytes = 4 * -(-vocab_size // 32)
        self._thinking = thinking
        self._matcher = matcher
        self._eos = eos_token_ids
        self._phase = ThinkingPhase(thinking)
        self._num_seen = 0

    def mask(self, token_ids: Sequence[int], num_prompt_tokens: int) -> bytes | None:
        """One bit per token that may come after these; None where every token may.

        Raises:
            GrammarError: no token may come, or the grammar's limits are exceeded.
        """
        self._follow(token_ids[num_prompt_tokens + self._num_seen :])
        thinking, matcher = self._thinking, self._matcher
        if self._phase.is_open:
            assert thinking is not None
            if self._phase.is_spent:
                return self._only(thinking.end_id)
            return None if matcher is None else self._all_but_ends()
        if matcher is None:
            return None
        mask = matcher.compute_bitmask()
        if problem := matcher.get_error():
            raise GrammarError(_sentence(problem))
        if self._phase.may_open:
            assert thinking is not None
            mask = _with_bit(mask, thinking.start_id)
        if not any(mask):
            raise GrammarError("no token of this model can follow")
        return bytes(mask[: self._num_bytes]).ljust(self._num_bytes, b"\0")

    def _follow(self, token_ids: Sequence[int]) -> None:
        self._num_seen += len(token_ids)
        answer = [token for token in token_ids if not self._phase.follow(token)]
        if answer and self._matcher is not None and not self._matcher.consume_tokens(answer):
            raise GrammarError(_sentence(self._matcher.get_error()))

    def _only(self, token_id: int) -> bytes:
        return _with_bit(bytes(self._num_bytes), token_id)

    def _all_but_ends(self) -> bytes:
        mask = bytearray(b"\xff" * self._num_bytes)
        for token in self._eos:
            mask[token // 8] &= ~(1 << token % 8) & 0xFF
        return bytes(mask)


class ConstraintFactory:
    """Makes the constraints of one model's requests; safe to use from any thread.

    Args:
        tokenizer: Of the model, from :func:`open_tokenizer`.
        vocab_size: The model's, which may exceed the tokenizer's.
        eos_token_ids: Tokens that end an answer.
    """

    def __init__(
        self, tokenizer: LLTokenizer, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._lock = threading.Lock()
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()

    def create(self, sampling: SamplingParams) -> TokenConstraint | None:
        """A fresh constraint; None where the request asks for none.

        Raises:
            GrammarError: the grammar cannot be used.
        """
        if not sampling.grammar and sampling.thinking is None:
            return None
        return TokenConstraint(
            self._vocab_size,
            thinking=sampling.thinking,
            matcher=self._matcher(sampling.grammar) if sampling.grammar else None,
            eos_token_ids=self._eos,
        )

    def knows(self, grammar: str) -> bool:
        """Whether this grammar was built before."""
        with self._lock:
            return grammar in self._matchers

    def _matcher(self, grammar: str) -> LLMatcher:
        with self._lock:
            known = self._matchers.get(grammar)
            if known is not None:
                self._matchers.move_to_end(grammar)
                return known.deep_copy()
        built = build_matcher(self.tokenizer, grammar)
        with self._lock:
            self._matchers[grammar] = built
            while len(self._matchers) > _CACHED_GRAMMARS:
                self._matchers.popitem(last=False)
            return built.deep_copy()


CreateConstraint = Callable[[SamplingParams], TokenConstraint | None]


def open_tokenizer(
    tokenizer_json: str, vocab_size: int, eos_token_ids: frozenset[int]
) -> LLTokenizer:
    """llguidance's view of a fast tokenizer."""
    return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None)


def _with_bit(mask: bytes, token_id: int) -> bytes:
    changed = bytearray(mask)
    changed[token_id // 8] |= 1 << token_id % 8
    return bytes(changed)
