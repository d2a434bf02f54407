"""From an answer's text, piece by piece, to what it says: content, thought and tool calls.

Pure: the same text in other pieces gives the same, so a stream that goes on elsewhere replays what
was sent and continues inside a call or a thought.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from tandem_worker.dialects.formats import CallFormat, ThoughtTags

_BROKEN = "\ufffd"


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A tool call begins (with its name), or its arguments go on."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a piece of text adds."""

    content: str = ""
    thought: str = ""
    calls: tuple[CallPiece, ...] = ()


class Opening(Enum):
    """What the prompt leaves to the answer's beginning."""

    MAYBE = auto()
    """It may begin with a thought."""
    OPEN = auto()
    """The prompt has opened one."""
    CLOSED = auto()
    """There is none."""


def opening(prompt: str, tags: ThoughtTags | None) -> Opening:
    """How an answer to a rendered prompt begins."""
    if tags is None:
        return Opening.CLOSED
    text = prompt.rstrip()
    if text.endswith(tags.begin):
        return Opening.OPEN
    return Opening.CLOSED if text.endswith(tags.end) else Opening.MAYBE


class JsonSpan:
    """Finds where a JSON object or array ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """Length of the text up to and with the end; None where it goes on."""
        for at, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None


class AnswerReader:
    """One answer.

    Args:
        calls: How tool calls are written; None where none are expected.
        thought: The tags around a thought; None where none are expected.
        opening: How the answer begins.
    """

    def __init__(
        self,
        *,
        calls: CallFormat | None = None,
        thought: ThoughtTags | None = None,
        opening: Opening = Opening.CLOSED,
    ) -> None:
        self._calls = calls
        self._tags = thought
        self._text = ""
        self._content: list[str] = []
        self._thought: list[str] = []
        self._pieces: list[CallPiece] = []
        self._has_thought = False
        self._has_content = False
        self._after_thought = False
        self._span = JsonSpan()
        self.num_calls = 0
        """Calls begun so far."""
        # Each state takes what it can from the text and says whether another may go on.
        self._state: Callable[[bool], bool] = {
            Opening.MAYBE: self._at_start,
            Opening.OPEN: self._in_thought,
            Opening.CLOSED: self._in_content,
        }[opening if thought is not None else Opening.CLOSED]

    @property
    def is_thinking(self) -> bool:
        """Whether the text so far ends inside a thought."""
        return self._state == self._in_thought

    def push(self, text: str, *, last: bool = False) -> Parts:
        """Add text; ``last`` says that no more comes."""
        self._text += text
        while self._state(last):
            pass
        parts = Parts("".join(self._content), "".join(self._thought), tuple(self._pieces))
        self._content, self._thought, self._pieces = [], [], []
        return parts

    # -- states ----------------------------------------------------------------------------------

    def _at_start(self, last: bool) -> bool:
        assert self._tags is not None
        begin, text = self._tags.begin, self._text.lstrip()
        if text.startswith(begin):
            self._text = text[len(begin) :]
            self._state = self._in_thought
            return True
        if begin.startswith(text) and not last:
            return False
        self._state = self._in_content
        return True

    def _in_thought(self, last: bool) -> bool:
        assert self._tags is not None
        at = self._text.find(self._tags.end)
        if at < 0:
            keep = 0 if last else _held(self._text, self._tags.end)
            self._emit_thought(self._take(len(self._text) - keep))
            return False
        # A limit of tokens may end a thought within a character.
        self._emit_thought(self._take(at).rstrip().rstrip(_BROKEN))
        self._take(len(self._tags.end))
        self._after_thought = True
        self._state = self._in_content
        return True

    def _in_content(self, last: bool) -> bool:
        calls = self._calls
        if calls is None:
            self._emit_content(self._take(len(self._text)))
            return False
        if not calls.marker:
            return self._at_bare_call(calls, last)
        at = self._text.find(calls.marker)
        if at < 0:
            keep = 0 if last else _held(self._text, calls.marker)
            self._emit_content(self._take(len(self._text) - keep))
            return False
        self._emit_content(self._take(at).rstrip())
        self._state = self._at_call
        return True

    def _at_bare_call(self, calls: CallFormat, last: bool) -> bool:
        """Calls without a marker take the whole answer."""
        text = self._text.lstrip()
        if not self._has_content:
            if text.startswith(calls.before_name[0]):
                self._state = self._at_call
                return True
            if not text and not last:
                return False
        self._emit_content(self._take(len(self._text)))
        return False

    def _at_call(self, last: bool) -> bool:
        assert self._calls is not None
        expected = self._calls.begin + self._calls.before_name
        text = self._text.lstrip()
        if text.startswith(expected):
            self._text = text[len(expected) :]
            self._state = self._in_name
            return True
        if expected.startswith(text) and not last:
            return False
        if not expected.startswith(text):  # no call after all
            self._emit_content(self._take(len(self._text)))
        self._take(len(self._text))  # a call that was cut off before its name says nothing
        return False

    def _in_name(self, last: bool) -> bool:
        assert self._calls is not None
        at = self._text.find(self._calls.between)
        if at < 0:
            return False
        self._pieces.append(CallPiece(self.num_calls, name=self._take(at)))
        self.num_calls += 1
        self._take(len(self._calls.between))
        self._span = JsonSpan()
        self._state = self._in_arguments
        return True

    def _in_arguments(self, last: bool) -> bool:
        end = self._span.end(self._text)
        arguments = self._take(len(self._text) if end is None else end)
        if arguments:
            self._pieces.append(CallPiece(self.num_calls - 1, arguments=arguments))
        if end is None:
            return False
        self._state = self._after_call
        return True

    def _after_call(self, last: bool) -> bool:
        calls = self._calls
        assert calls is not None
        expected = calls.after + calls.separator + calls.before_name
        if self._text.startswith(expected):
            self._take(len(expected))
            self._state = self._in_name
            return True
        if not expected.startswith(self._text):
            self._state = self._at_end
        return False

    def _at_end(self, last: bool) -> bool:
        self._text = ""
        return False

    # -- the text --------------------------------------------------------------------------------

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken

    def _emit_thought(self, text: str) -> None:
        if not self._has_thought:
            text = text.lstrip()
        if text:
            self._has_thought = True
            self._thought.append(text)

    def _emit_content(self, text: str) -> None:
        if self._after_thought and not self._has_content:
            text = text.lstrip("\n")
        if text:
            self._has_content = True
            self._content.append(text)


def _held(text: str, marker: str) -> int:
    """Characters at the end that may belong to the marker, with the white space before them."""
    overlap = next(
        (
            length
            for length in range(min(len(marker) - 1, len(text)), 0, -1)
            if text.endswith(marker[:length])
        ),
        0,
    )
    before = text[: len(text) - overlap]
    return overlap + len(before) - len(before.rstrip())
