"""What ends `tandem grade` and `tandem verify` with a sentence, and what ends one question only."""

from __future__ import annotations


class GradingError(Exception):
    """The command cannot go on; the text is meant for the person at the terminal."""


class AskFailed(Exception):
    """One question was not answered by one tier.

    `blames_tier` says that every further question would meet the same (a refused key, a wrong
    URL); `blames_request` that only this question does (too long, refused content).
    """

    def __init__(
        self, message: str, *, blames_tier: bool = False, blames_request: bool = False
    ) -> None:
        super().__init__(message)
        self.blames_tier = blames_tier
        self.blames_request = blames_request
