"""What a client of a stream has been sent, and how another worker goes on from there.

The journal keeps what was forwarded as bytes, bounded, and reads the token ids out of them only
when a stream has to be carried on elsewhere (or when the bytes outgrow their bound). Pure.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tandem_router.engines.protocol import SentChoice
from tandem_router.openai.said import choices_of, chunk_of
from tandem_router.openai.sse import encode_event, event_data, split_events
from tandem_router.openai.usage import generated_chars, text_tokens


def _index(choice: Mapping[str, Any]) -> int:
    index = choice.get("index", 0)
    return index if isinstance(index, int) else 0


def _text_of(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


@dataclass
class _ChoiceState:
    token_ids: array[int] = field(default_factory=lambda: array("I"))
    role_sent: bool = False
    finished: bool = False
    num_text_chars: int = 0
    num_generated_chars: int = 0  # of those events that carry no token ids
    text_without_ids: bool = False
    num_settled: int = 0  # ids up to and with the last one that came with text
    only_text: bool = True
    # False once a worker began again: those of what was left out are not known.
    ids_whole: bool = True

    def could_not_read(self, num_chars: int) -> None:
        """A chunk that is not JSON, or whose ids are none, went on as it was: text without ids."""
        self.text_without_ids = True
        self.num_generated_chars += num_chars


class StreamJournal:
    """What a client has been sent, and how to go on from there."""

    def __init__(self, max_kept_bytes: int = 256 * 1024) -> None:
        self.max_kept_bytes = max_kept_bytes
        # As `forwarded` keeps them; it is spared a call for every chunk.
        self.kept: list[bytes] = []
        self.num_kept_bytes = 0
        self._choices: dict[int, _ChoiceState] = {}
        # Characters of each choice still to be dropped after a restart from the beginning.
        self._skip_chars: dict[int, int] = {}
        self.resumed = False
        self._condensed = False

    @property
    def events(self) -> bytes | None:
        """All that was forwarded, as long as nothing had to be condensed; else None."""
        return None if self._condensed else b"".join(self.kept)

    def forwarded(self, events: bytes) -> None:
        """Remember complete events that were sent to the client."""
        self.kept.append(events)
        self.num_kept_bytes += len(events)
        if self.num_kept_bytes > self.max_kept_bytes:
            self.condense()

    def condense(self) -> None:
        """Make of what is kept how far each choice is."""
        kept = b"".join(self.kept)
        self._condensed = self._condensed or bool(kept)
        self.kept.clear()
        self.num_kept_bytes = 0
        for event in split_events(kept):
            chunk = chunk_of(event)
            if chunk is None and (unread := event_data(event)) not in (b"", b"[DONE]"):
                self._choices.setdefault(0, _ChoiceState()).could_not_read(len(unread))
            for choice in choices_of(chunk or {}):
                self._account(choice)

    def _account(self, choice: Mapping[str, Any]) -> None:
        state = self._choices.setdefault(_index(choice), _ChoiceState())
        delta = choice.get("delta")
        if isinstance(delta, dict) and "role" in delta:
            state.role_sent = True
        token_ids = choice.get("token_ids")
        text = _text_of(choice)
        if isinstance(token_ids, list):
            try:
                state.token_ids.extend(token_ids)
            except (TypeError, OverflowError):
                state.could_not_read(generated_chars(delta) or len(text))
        else:
            # Text, or anything else that a repetition would say twice: thoughts, a tool call.
            num_chars = generated_chars(delta) or len(text)
            state.text_without_ids = state.text_without_ids or num_chars > 0
            state.num_generated_chars += num_chars
        if text:
            state.num_settled = len(state.token_ids)
        generated = generated_chars(delta) if isinstance(delta, dict) else len(text)
        if generated > len(text) or choice.get("logprobs"):
            state.only_text = False
        state.num_text_chars += len(text)
        if choice.get("finish_reason") is not None:
            state.finished = True

    def num_tokens(self) -> int:
        """Generated tokens forwarded so far, all choices; estimated where no ids came along."""
        self.condense()
        return sum(
            len(state.token_ids) + text_tokens(state.num_generated_chars)
            for state in self._choices.values()
        )

    def all_finished(self, num_choices: int) -> bool:
        """Whether every choice has been told its finish reason."""
        self.condense()
        finished = sum(state.finished for state in self._choices.values())
        return finished >= max(1, num_choices)

    def sent(self, num_choices: int) -> list[SentChoice]:
        """What the client has, choice by choice."""
        self.condense()
        states = [self._choices.get(index, _ChoiceState()) for index in range(num_choices)]
        return [
            SentChoice(
                token_ids=state.token_ids if state.ids_whole else (),
                num_text_chars=state.num_text_chars,
                num_settled=state.num_settled,
                only_text=state.only_text,
                text_without_ids=state.text_without_ids,
            )
            for state in states
        ]

    def resume(self, repeats: Literal["nothing", "unsettled", "all"]) -> None:
        """Another worker's reply comes next; repeats: what of the sent tokens it says again."""
        self.condense()
        self.resumed = True
        self._skip_chars.clear()
        for index, state in self._choices.items():
            if repeats == "unsettled":
                del state.token_ids[state.num_settled :]
            elif repeats == "all":
                self._skip_chars[index] = state.num_text_chars
                state.ids_whole = False
            elif not state.token_ids and state.num_text_chars:
                # An echoed prompt: the next worker starts this choice over and echoes again.
                self._skip_chars[index] = state.num_text_chars

    def without_repeats(self, events: bytes) -> bytes:
        """After a resume: drop what the client already has (roles, finished choices, echo)."""
        kept = []
        for event in split_events(events):
            payload = chunk_of(event)
            if payload is None or not payload.get("choices"):
                kept.append(event)
                continue
            changed = False
            choices = []
            for choice in choices_of(payload):
                new = self._without_repeat(choice)
                changed = changed or new is not choice
                if new is not None:
                    choices.append(new)
            if not choices:
                continue
            kept.append(encode_event({**payload, "choices": choices}) if changed else event)
        return b"".join(kept)

    def _without_repeat(self, choice: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The choice, a shortened copy, or None when nothing of it is new."""
        index = _index(choice)
        self.condense()
        state = self._choices.get(index)
        if state is None:
            return choice
        if state.finished:
            return None
        skip = self._skip_chars.get(index, 0)
        if skip:
            text = _text_of(choice)
            self._skip_chars[index] = max(0, skip - len(text))
            rest = text[skip:]
            if isinstance(choice.get("delta"), dict):
                choice = {**choice, "delta": {**choice["delta"], "content": rest}}
            else:
                choice = {**choice, "text": rest}
            empty = not rest
        else:
            empty = not _text_of(choice)
        delta = choice.get("delta")
        if isinstance(delta, dict) and "role" in delta and state.role_sent:
            choice = {**choice, "delta": {k: v for k, v in delta.items() if k != "role"}}
            rest_of_delta = any(v not in (None, "") for v in choice["delta"].values())
        else:
            rest_of_delta = not skip
        if (
            empty
            and not rest_of_delta
            and (skip or not choice.get("token_ids"))
            and choice.get("finish_reason") is None
        ):
            return None
        return choice
