"""Text from tokens: whole characters only, stop strings exact, a replay changes nothing."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tandem_worker.errors import RequestError
from tandem_worker.tokenization.detokenizer import AnswerText, IncrementalDetokenizer, StopChecker
from tandem_worker.tokenization.tokenizer import Tokenizer


def decode_bytes(ids: object) -> str:
    """A byte-level tokenizer of 256 tokens."""
    return bytes(ids).decode("utf-8", errors="replace")  # type: ignore[call-overload, no-any-return]


def run(text: str, stops: list[str], *, cut: int = 0, include: bool = False) -> tuple[str, bool]:
    """Text after the first ``cut`` tokens, whether a stop string was found."""
    answer = AnswerText(decode_bytes, stops, include_stop=include)
    out, stopped = "", False
    data = text.encode()
    for index, token in enumerate(data):
        delta = answer.push(token, last=index == len(data) - 1)
        if index >= cut:
            out += delta.text
        stopped = stopped or delta.stopped
        if delta.stopped:
            break
    return out, stopped


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_pieces_join_to_the_whole_text(text: str) -> None:
    assert run(text, []) == (text, False)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_even_broken_bytes_come_out_once(data: bytes) -> None:
    detokenizer = IncrementalDetokenizer(decode_bytes)

    out = "".join(detokenizer.push(byte) for byte in data) + detokenizer.flush()

    clean = [c for c in data.decode("utf-8", errors="replace") if c != "\ufffd"]
    assert [c for c in out if c != "\ufffd"] == clean


def test_half_a_character_is_never_emitted() -> None:
    detokenizer = IncrementalDetokenizer(decode_bytes)

    pieces = [detokenizer.push(byte) for byte in "é🙂x".encode()]

    assert pieces == ["", "é", "", "", "", "🙂", "x"]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab🙂", max_size=20),
    stops=st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    out, stopped = run(text, stops)

    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if ends:
        found = [s for s in stops if text[: min(ends)].endswith(s)]
        longest = max(len(stop) for stop in found)
        assert out == text[: min(ends) - longest]
    else:
        assert out == text


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab🙂", max_size=16),
    stops=st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=4), max_size=2),
    cut=st.integers(0, 64),
)
def test_a_replayed_answer_goes_on_exactly_where_it_was(
    text: str, stops: list[str], cut: int
) -> None:
    whole, stopped = run(text, stops)

    rest, stopped_again = run(text, stops, cut=cut)

    assert whole.endswith(rest)
    assert stopped == stopped_again


def test_a_stop_string_can_be_kept() -> None:
    assert run("one two three", ["two"], include=True) == ("one two", True)


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    checker = StopChecker(["###"])

    assert checker.push("a#") == ("a", False)
    assert checker.push("#b") == ("##b", False)
    assert checker.push("##") == ("", False)
    assert checker.flush() == "##"


def test_real_tokens_join_to_the_decoded_text(tiny_llama: Path) -> None:
    tokenizer = Tokenizer(tiny_llama)
    ids = tokenizer.encode("Grüße, 你好 🙂🙃 naïve  café\n")
    detokenizer = IncrementalDetokenizer(tokenizer.decode)

    pieces = [detokenizer.push(token) for token in ids]

    assert "".join(pieces) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces)


def test_chat_templates_render_as_in_transformers(tiny_llama: Path) -> None:
    import transformers

    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello {{ x }} <b>"},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_llama)

    ours = Tokenizer(tiny_llama).render_chat(messages)

    assert ours == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_template_cannot_reach_python(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny_llama / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")

    with pytest.raises(RequestError, match="chat template refuses"):
        Tokenizer(tmp_path).render_chat([{"role": "user", "content": "x"}])


def test_a_token_that_is_part_of_a_character_has_its_bytes(tiny_llama: Path) -> None:
    tokenizer = Tokenizer(tiny_llama)
    ids = tokenizer.encode("naïve 🙃 world", add_special_tokens=False)

    assert b"".join(map(tokenizer.token_bytes, ids)) == "naïve 🙃 world".encode()
