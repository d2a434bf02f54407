"""Which tier is good enough for a prompt: a predictor learned from outcomes.

``load(path)`` and ``Predictor.score(prompt)`` are all the router needs; training and evaluation
live in :mod:`.training` and :mod:`.evaluation` and are imported by the command line only.
"""

from tandem_router.predictor.errors import ArtifactError, DataError, PredictorError
from tandem_router.predictor.runtime import Predictor, Score, load, loads

__all__ = [
    "ArtifactError",
    "DataError",
    "Predictor",
    "PredictorError",
    "Score",
    "load",
    "loads",
]
