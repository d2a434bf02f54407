"""Text from outside that spells a control token stays text.

A tokenizer takes `<|im_end|>` for the control token wherever it stands, so a user could end his own
message and speak as somebody else. Here such a spelling is broken after its first character: both
parts are tokenized on their own, which gives the same text and no control token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

MARK = "\ufdd0"
"""Where a text is broken; a code point that no text has (Unicode's noncharacters)."""

_LONGEST = 200
"""Characters of a control token; published ones have at most 40."""
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


def is_control(text: str, *, special: bool) -> bool:
    """Whether an added token is one; others are words and runs of spaces, which are text."""
    return len(text) > 1 and (special or _TAG.fullmatch(text) is not None)


def _any_of(texts: Iterable[str]) -> str:
    """A pattern that finds where one of the texts begins.

    Written as a tree of characters: of a thousand alternatives each would be tried at every place,
    seconds for a hostile megabyte.
    """
    root: dict[str, Any] = {}
    for text in texts:
        node = root
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}

    def written(node: dict[str, Any]) -> str:
        if "" in node:  # longer ones begin at the same place
            return ""
        ways = [re.escape(character) + written(after) for character, after in node.items()]
        return ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"

    return written(root)


class PlainText:
    """Breaks the spellings of control tokens.

    Args:
        tokens: The texts of the control tokens.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        texts = {text for text in tokens if len(text) <= _LONGEST}
        self._pattern = re.compile(f"(?={_any_of(texts)})") if texts else None

    def marked(self, text: str) -> str:
        """The text with a mark after the first character of each spelling."""
        text = text.replace(MARK, "\ufffd")
        if self._pattern is None:
            return text
        parts, begin = [], 0
        for match in self._pattern.finditer(text):
            parts.append(text[begin : match.start() + 1])
            begin = match.start() + 1
        return MARK.join([*parts, text[begin:]])

    def marked_all(self, value: Any) -> Any:
        """The same for every text in a JSON value."""
        if isinstance(value, str):
            return self.marked(value)
        if isinstance(value, list | tuple):
            return [self.marked_all(item) for item in value]
        if isinstance(value, dict):
            return {self.marked(str(key)): self.marked_all(item) for key, item in value.items()}
        return value
