"""The predictor's exceptions: each message names the thing, its value, the rule, the way out."""

from __future__ import annotations


class PredictorError(Exception):
    """Anything the predictor refuses; the text is meant for the person at the terminal."""


class DataError(PredictorError):
    """Training or evaluation data that cannot be used."""


class ArtifactError(PredictorError):
    """An artifact file that is missing, damaged, hostile, or from another version."""
