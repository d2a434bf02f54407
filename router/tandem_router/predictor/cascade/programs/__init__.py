"""Short programs in a question are run, so that an answer can be held against what they give."""

from tandem_router.predictor.cascade.programs.interpreter import MAX_SOURCE, run
from tandem_router.predictor.cascade.programs.values import NotRun, Plain

__all__ = ["MAX_SOURCE", "NotRun", "Plain", "run"]
