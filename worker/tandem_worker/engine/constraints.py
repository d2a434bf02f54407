"""Which tokens may come next: a grammar's mask.

Everything is a function of the tokens generated so far. So a constrained answer goes on after a
preemption, a resumption on another worker or a remote prefill exactly where it was: the state is
rebuilt from token ids. Grammars are llguidance's (docs/decisions/0071).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from tandem_worker.engine.sampling import SamplingParams
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


class TokenConstraint:
    """What one sequence may generate next.

    Args:
        vocab_size: Bits of a mask.
        matcher: The grammar's, owned by this object.
    """

    def __init__(self, vocab_size: int, matcher: LLMatcher) -> None:
        self._num_bytes = 4 * -(-vocab_size // 32)
        self._matcher = matcher
        self._num_seen = 0

    def mask(self, token_ids: Sequence[int], num_prompt_tokens: int) -> bytes:
        """One bit per token that may come after these.

        Raises:
            GrammarError: no token may come, or the grammar's limits are exceeded.
        """
        matcher = self._matcher
        fresh = list(token_ids[num_prompt_tokens + self._num_seen :])
        self._num_seen += len(fresh)
        if fresh and not matcher.consume_tokens(fresh):
            raise GrammarError(_sentence(matcher.get_error()))
        mask = matcher.compute_bitmask()
        if problem := matcher.get_error():
            raise GrammarError(_sentence(problem))
        if not any(mask):
            raise GrammarError("no token of this model can follow")
        return bytes(mask[: self._num_bytes]).ljust(self._num_bytes, b"\0")


class ConstraintFactory:
    """Makes the constraints of one model's requests; safe to use from any thread.

    Args:
        tokenizer: Of the model, from :func:`open_tokenizer`.
        vocab_size: The model's, which may exceed the tokenizer's.
    """

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()

    def create(self, sampling: SamplingParams) -> TokenConstraint | None:
        """A fresh constraint; None where the request asks for none.

        Raises:
            GrammarError: the grammar cannot be used.
        """
        if not sampling.grammar:
            return None
        return TokenConstraint(self._vocab_size, self._matcher(sampling.grammar))

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
