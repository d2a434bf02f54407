"""Megabytes of text hold up nobody else: neither the loop, nor what cannot fit the context."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers

from tandem_worker.errors import RequestError
from tandem_worker.tokenization.tokenizer import Tokenizer


def test_other_threads_run_while_a_long_text_is_tokenized(tiny_llama: Path) -> None:
    tokenizer = Tokenizer(tiny_llama)
    begun, turns = threading.Event(), 0

    def work() -> None:
        begun.set()
        tokenizer.encode("a b " * 100_000)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(10)
    while thread.is_alive():
        thread.join(0.001)
        turns += 1

    assert turns > 5


@pytest.mark.parametrize("text", ["the quick fox", "a b " * 3000, "<s> a</s>" * 2000])
def test_a_text_has_the_ids_that_it_had_one_by_one(tiny_llama: Path, text: str) -> None:
    tokenizer = Tokenizer(tiny_llama)
    file = tokenizers.Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    plain = file.encode(text, add_special_tokens=False).ids

    ids = tokenizer.encode(text, add_special_tokens=False, parse_special_tokens=True)

    assert ids == plain
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode(text + "\ud800")


async def test_what_cannot_fit_is_told_before_it_is_tokenized(
    start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await start_worker()
    most = worker.tokenizer.most_chars_per_token
    assert most is not None
    asked: list[int] = []
    monkeypatch.setattr(worker.tokenizer, "encode_marked", lambda text, **_: asked.append(1))
    text = "x" * (most * worker.max_model_len + 1)
    chat = {"messages": [{"role": "user", "content": text}]}
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        replies = await asyncio.gather(
            client.post("/v1/completions", json={"prompt": text}),
            client.post("/v1/chat/completions", json=chat),
        )

    assert [reply.json()["error"]["code"] for reply in replies] == ["context_length_exceeded"] * 2
    assert asked == []
