"""Whatever a constrained answer is drawn from, it parses; and its state is a function of tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings

from tandem_worker.engine.constraints import (
    ConstraintFactory,
    GrammarError,
    TokenConstraint,
    open_tokenizer,
)
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.openai.answer_format import choice_grammar, json_grammar, regex_grammar
from tandem_worker.tokenization.tokenizer import Tokenizer

EOS = 1
VOCAB = 512
NAMES = st.text("abz_", min_size=1, max_size=3)


def leaves() -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.sampled_from(
            [
                {"type": "integer"},
                {"type": "boolean"},
                {"type": "null"},
                {"type": "number"},
                {"type": "integer", "minimum": -3, "maximum": 12},
                {"type": "string", "maxLength": 6},
                {"type": "string", "pattern": "^[a-c]{1,4}$"},
                {"type": "string", "format": "date"},
                {"type": ["string", "null"], "maxLength": 3},
            ]
        ),
        st.lists(st.one_of(NAMES, st.integers(-5, 5)), min_size=1, max_size=4, unique=True).map(
            lambda values: {"enum": values}
        ),
        NAMES.map(lambda value: {"const": value}),
    )


def wider(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def described(properties: dict[str, Any], data: random.Random) -> dict[str, Any]:
        names = sorted(properties)
        return {
            "type": "object",
            "properties": properties,
            "required": [name for name in names if data.random() < 0.6],
            "additionalProperties": False,
        }

    return st.one_of(
        st.builds(
            described,
            st.dictionaries(NAMES, inner, max_size=3),
            st.randoms(use_true_random=False),
        ),
        inner.map(lambda item: {"type": "array", "items": item, "maxItems": 3}),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    )


SCHEMAS = st.recursive(leaves(), wider, max_leaves=6)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def factory(tokenizer: Tokenizer) -> ConstraintFactory:
    eos = frozenset([EOS])
    return ConstraintFactory(open_tokenizer(tokenizer.to_json(), VOCAB, eos), VOCAB)


def allowed(mask: bytes | None) -> list[int]:
    if mask is None:
        return list(range(VOCAB))
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
    found: list[int] = np.nonzero(bits[:VOCAB])[0].tolist()
    return found


def draw(
    constraint: TokenConstraint, rng: random.Random, limit: int, start: tuple[int, ...] = ()
) -> list[int]:
    """Random logits under the mask, from a prompt of two tokens on; the end token included."""
    tokens = [5, 9, *start]
    while len(tokens) < limit + 2 and tokens[-1] != EOS:
        choices = allowed(constraint.mask(tokens, 2))
        # Ending is always among the choices once it can: take it half of the time.
        tokens.append(EOS if EOS in choices and rng.random() < 0.5 else rng.choice(choices))
    return tokens[2:]


@settings(max_examples=1000, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 1 << 30))
def test_an_answer_to_any_schema_validates_unless_it_was_cut(
    factory: ConstraintFactory, tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    sampling = SamplingParams(grammar=json_grammar(schema, "s"))

    tokens = draw(factory.create(sampling), random.Random(seed), 120)  # type: ignore[arg-type]

    if tokens[-1] == EOS:
        value = json.loads(tokenizer.decode(tokens[:-1], skip_special_tokens=False))
        jsonschema.validate(value, schema)


@settings(max_examples=100, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 1 << 30), cut=st.integers(0, 40))
def test_a_state_rebuilt_from_tokens_allows_what_the_first_one_did(
    factory: ConstraintFactory, schema: dict[str, Any], seed: int, cut: int
) -> None:
    sampling = SamplingParams(grammar=json_grammar(schema, "s"))
    whole = draw(factory.create(sampling), random.Random(seed), 40)  # type: ignore[arg-type]
    cut = min(cut, len(whole) - 1)
    followed, rebuilt = factory.create(sampling), factory.create(sampling)
    assert followed is not None
    assert rebuilt is not None

    for end in range(cut + 1):
        mask = followed.mask(whole[:end], 0)

    assert rebuilt.mask(whole[:cut], 0) == mask


def test_choices_and_patterns_hold_too(factory: ConstraintFactory, tokenizer: Tokenizer) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        chosen = draw(
            factory.create(SamplingParams(grammar=choice_grammar(["yes", "no", "你好"], "c"))),  # type: ignore[arg-type]
            rng,
            30,
        )
        matched = draw(
            factory.create(SamplingParams(grammar=regex_grammar(r"[0-9]{3}-[a-f]+", "r"))),  # type: ignore[arg-type]
            rng,
            30,
        )

        assert tokenizer.decode(chosen[:-1]) in ("yes", "no", "你好")
        assert tokenizer.decode(matched[:7])[:4].removesuffix("-").isdigit()


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"$ref": "#"}, "allows no text at all"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "(a"}, "regex"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused_with_the_reason(
    factory: ConstraintFactory, schema: dict[str, Any], said: str
) -> None:
    with pytest.raises(GrammarError, match=said):
        factory.create(SamplingParams(grammar=json_grammar(schema, "s")))


def test_tokens_that_the_grammar_does_not_know_end_in_an_error(factory: ConstraintFactory) -> None:
    constraint = factory.create(SamplingParams(grammar=choice_grammar(["yes"], "c")))
    assert constraint is not None

    with pytest.raises(GrammarError):
        constraint.mask([5, 300, 300, 300], 1)
