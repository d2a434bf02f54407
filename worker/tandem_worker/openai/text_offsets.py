"""Where each token begins in a text of characters, though tokens are pieces of bytes. Pure."""

from __future__ import annotations

import codecs


class TextOffsets:
    """The offsets of one choice, token by token.

    A token that goes on within a character begins where the character does.

    Args:
        echoed: The prompt at the text's beginning, as it was given; None without one. Tokenizers of
            sentencepiece's kind put a space before it that it does not have.
    """

    def __init__(self, echoed: str | None = None) -> None:
        self._echoed = echoed
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self._is_begun = False

    def next(self, token: bytes) -> int:
        """The offset of a token with these bytes."""
        offset = self._offset
        text = self._decoder.decode(token)
        if text and not self._is_begun:
            self._is_begun = True
            if self._echoed is not None and text[0] == " " and not self._echoed.startswith(" "):
                text = text[1:]
        self._offset += len(text)
        return offset
