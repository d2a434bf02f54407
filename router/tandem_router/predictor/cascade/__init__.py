"""Cascade: read the small tier's answer before deciding on the large one. Pure numpy.

Training, where rows hold `responses`:

    verifier = fit_verifier(prompts, small_answers, quality)     # training.answer_verifier
    power = VerifierPower.measure(held_out_scores, quality[:, 0])
    arrays = verifier.to_arrays()                                # into the artifact

Serving:

    zone = choose_zone(p_small, p_large, power, terms)
    # Zone.VERIFY: get the whole small answer without streaming it, then
    if escalate(verifier.verify(prompt, answer, token_statistics), terms): ...ask the large tier
"""

from tandem_router.predictor.cascade.answer_features import FEATURE_NAMES, answer_features
from tandem_router.predictor.cascade.token_statistics import TokenStatistics
from tandem_router.predictor.cascade.verifier import VIEWS, AnswerVerifier, Verdict
from tandem_router.predictor.cascade.zones import (
    CascadeTerms,
    VerifierPower,
    Zone,
    choose_zone,
    escalate,
    zone_bounds,
)

__all__ = [
    "FEATURE_NAMES",
    "VIEWS",
    "AnswerVerifier",
    "CascadeTerms",
    "TokenStatistics",
    "Verdict",
    "VerifierPower",
    "Zone",
    "answer_features",
    "choose_zone",
    "escalate",
    "zone_bounds",
]
