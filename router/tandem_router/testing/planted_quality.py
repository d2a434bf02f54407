"""Providers that are right as often as a test wants, and a judge that errs at a known rate.

A question is any text; whether a provider is right on it is a hash of the question and the
provider's model, so that a test knows the truth of every answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tandem_router.testing.fake_provider import FakeProvider
from tandem_router.testing.fake_server import FakeServer, Seen, plain_reply


def uniform(*parts: object) -> float:
    """A number in [0, 1) that is the same for the same parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56


def question_of(seen: Seen) -> str:
    return str(seen.json["messages"][-1]["content"])


@dataclass(eq=False)
class PlantedProvider(FakeProvider):
    """quality: how often it is right, of a question; it may be changed while the test runs."""

    quality: Callable[[str], float] = lambda question: 0.5

    def is_right(self, question: str, model: str) -> bool:
        return uniform(question, model) < self.quality(question)

    def said(self, seen: Seen) -> str:
        question = question_of(seen)
        model = str(seen.json.get("model"))
        word = "right" if self.is_right(question, model) else f"wrong by {model}"
        return f"It is {word}."

    def whole(self, seen: Seen) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.said(seen)}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "choices": [choice],
            "usage": self.usage(),
        }

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        self._now = seen
        return await super().answer(seen, writer)

    def events(self) -> list[bytes]:
        events = [self.chunk({"role": "assistant", "content": ""})]
        events += [self.chunk({"content": f"{word} "}) for word in self.said(self._now).split()]
        events += [self.chunk({}, "stop"), self.chunk(None, usage=self.usage())]
        return [*events, b"data: [DONE]\n\n"]


_SHOWN = re.compile(r"Start of Assistant ([AB])'s Answer\]\n(.*?)\n\[The End", re.DOTALL)
_ALONE = re.compile(r"Start of the Assistant's Answer\]\n(.*?)\n\[The End", re.DOTALL)


@dataclass(eq=False)
class FakeJudge(FakeServer):
    """errs: share of verdicts that name another winner than the truth. mood: how it behaves.

    honest; garbled (names no winner); down (500); silent (never answers); liar (always for B, and
    each answer alone is good); page (HTML).
    """

    errs: float = 0.0
    mood: str = "honest"

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if self.mood == "silent":
            await asyncio.Event().wait()
        if self.mood == "down":
            return await plain_reply(writer, 500, {}, b'{"error": {"message": "boom"}}')
        if self.mood == "page":
            return await plain_reply(writer, 200, {}, b"<html>", "text/html")
        shown = question_of(seen)
        alone = _ALONE.search(shown)
        lie = "[[B]]" if alone is None else "[[GOOD]]"
        text = {"garbled": "Both have their merits.", "liar": lie}.get(self.mood)
        if text is None and alone is not None:
            is_good = ("right" in alone[1]) != (uniform("judge", shown) < self.errs)
            text = "[[GOOD]]" if is_good else "[[BAD]]"
        elif text is None:
            text = f"[[{self.verdict(shown)}]]"
        reply = {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10},
        }
        return await plain_reply(writer, 200, {}, json.dumps(reply).encode())

    def verdict(self, shown: str) -> str:
        right = {name: "right" in text for name, text in _SHOWN.findall(shown)}
        truth = "C"
        if right.get("A") != right.get("B"):
            truth = "A" if right.get("A") else "B"
        if uniform("judge", shown) < self.errs:
            others = [mark for mark in "ABC" if mark != truth]
            return others[int(uniform("which", shown) * 2)]
        return truth
