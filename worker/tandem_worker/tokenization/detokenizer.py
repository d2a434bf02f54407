"""Token ids to text as they come, and when to stop: a pure function of the ids seen so far.

A stream that resumes on another worker replays the ids it has already sent through the same
objects, so what it emits next is exactly what the first worker would have emitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem_worker.dialects.reader import AnswerReader, CallPiece, Parts

Decode = Callable[[Sequence[int]], str]

_REPLACEMENT = "\ufffd"
_MAX_PENDING_TOKENS = 16
_MAX_WINDOW_TOKENS = 64


class IncrementalDetokenizer:
    """Emits text only once it can no longer change: never half a UTF-8 character.

    Decodes a short window (the last piece of emitted text plus what is pending) each time, because
    many tokenizers decode a token differently at the start of a text.

    Args:
        decode: Token ids to text, special tokens already left out.
        context: The prompt's last tokens, so that the first token keeps its leading space.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context)
        self._num_emitted = len(self._window)
        self._prefix = decode(self._window) if self._window else ""

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that became final."""
        self._window.append(token_id)
        text = self._decode(self._window)
        pending = len(self._window) - self._num_emitted
        if text.endswith(_REPLACEMENT) and pending < _MAX_PENDING_TOKENS:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """The text still pending when no more tokens come."""
        if len(self._window) == self._num_emitted:
            return ""
        return self._emit(self._decode(self._window))

    def _emit(self, text: str) -> str:
        prefix = self._prefix
        if prefix.endswith(_REPLACEMENT):
            # A prompt ended within a character; where that is complete now, it is new.
            prefix = _common(prefix, text)
        new = text[len(prefix) :]
        if new:
            # What was pending becomes the context for what follows. Tokens without text (special
            # ones) are no context: a decoder may strip the space after them.
            self._window = self._window[self._num_emitted :]
        self._window = self._window[-_MAX_WINDOW_TOKENS:]
        self._num_emitted = len(self._window)
        self._prefix = self._decode(self._window)
        return new


def _common(one: str, other: str) -> str:
    """What both begin with."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return one[:length]


class StopChecker:
    """Finds stop strings in a stream and holds back text that may become one.

    Args:
        stops: Strings that end the answer; they are cut off unless ``include``.
        include: Keep the stop string that was found.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns (what may be emitted, whether a stop string was found)."""
        if not self._stops:
            return text, False
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda item: (item[0] + len(item[1]), item[0]))
            out = self._held[: at + len(stop) if self._include else at]
            self._held = ""
            return out, True
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out, False

    def flush(self) -> str:
        """The text held back when no more comes."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins the stop string."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one token adds to the answer.

    Attributes:
        text: Of the answer itself.
        stopped: Whether a stop string was found in it.
        thought: Of what the model thinks before it answers.
        calls: Tool calls begun or continued.
    """

    text: str
    stopped: bool = False
    thought: str = ""
    calls: tuple[CallPiece, ...] = ()


class AnswerText:
    """Detokenizer and stop strings of one answer.

    Args:
        decode: Token ids to text.
        stops: Stop strings.
        include_stop: Keep a found stop string in the text.
        hidden: Tokens that end the answer and have no text (end of sequence, stop tokens).
        context: The prompt's last tokens.
        min_tokens: Stop strings are looked for in the text from this token on.
        reader: Tells thoughts and tool calls from the answer; stop strings are looked for in the
            answer only.
    """

    def __init__(
        self,
        decode: Decode,
        stops: Sequence[str] = (),
        *,
        reader: AnswerReader | None = None,
        min_tokens: int = 0,
        include_stop: bool = False,
        hidden: frozenset[int] = frozenset(),
        context: Sequence[int] = (),
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(decode, context)
        self._checker = StopChecker(stops, include=include_stop)
        self._hidden = hidden
        self._reader = reader
        self._left_unstopped = min_tokens - 1

    def push(self, token_id: int, *, last: bool = False) -> TextDelta:
        """Add a token; ``last`` says that the engine ended the answer with it."""
        text = ""
        if not (last and token_id in self._hidden):
            text = self._detokenizer.push(token_id)
        if last:
            text += self._detokenizer.flush()
        parts = Parts(text) if self._reader is None else self._reader.push(text, last=last)
        if self._left_unstopped > 0:
            self._left_unstopped -= 1
            return TextDelta(parts.content, False, parts.thought, parts.calls)
        out, stopped = self._checker.push(parts.content)
        if (last or parts.calls) and not stopped:
            out += self._checker.flush()
        return TextDelta(out, stopped, parts.thought, parts.calls)
