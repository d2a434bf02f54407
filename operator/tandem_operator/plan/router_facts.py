"""What the pods of a Router report of themselves, as plain values that its status is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LatencyFacts:
    """Latencies of one kind in the last five minutes: the one at the stated percentile, counts."""

    value_s: float
    num: int
    num_met: int


@dataclass(frozen=True)
class ProfileFacts:
    """How fast a tier's workers are, in seconds: a, b, c of a prefill and of a decode step."""

    prefill: tuple[float, float, float] | None = None
    decode: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class TierFacts:
    """What routers measured for one tier."""

    share: float | None = None
    ttft: LatencyFacts | None = None
    tpot: LatencyFacts | None = None
    profile: ProfileFacts | None = None


@dataclass(frozen=True)
class PredictorFacts:
    """The artifact of one router pod; problem says why none is in use.

    verdicts: what its training said to do with each pair of tiers, a sentence each.
    """

    version: str = ""
    tiers: tuple[str, ...] = ()
    problem: str = ""
    verdicts: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreFacts:
    """The store of one router pod."""

    kind: str
    durable: bool
    ok: bool
    error: str = ""


@dataclass(frozen=True)
class CascadeFacts:
    """What routers did with answers that they could read; problem says why they read none.

    judge_problem: why an external judge says nothing of them.
    """

    zones: Mapping[str, int] = field(default_factory=dict)
    outcomes: Mapping[str, int] = field(default_factory=dict)
    problem: str = ""
    judge_problem: str = ""


@dataclass(frozen=True)
class QualityFacts:
    """What a router learned of the quality that it delivered; ratios of the last tier's.

    since, drifted_at: Unix times. drift: the last change of a tier's quality in words, and whether
    it rose. disagreement: of pods whose intervals exclude each other. The last four say
    why nothing is learned now; empty where that is not why.
    """

    measured: float | None = None
    low: float | None = None
    high: float | None = None
    num_labels: int = 0
    since: float | None = None
    cost_usd: float = 0.0
    drift: str = ""
    rose: bool = False
    drifted_at: float | None = None
    disagreement: str = ""
    judge_error: str = ""
    labels_error: str = ""
    cap_error: str = ""
    paused: str = ""


@dataclass(frozen=True)
class RetrainingFacts:
    """What became of predictors that a router trained from its labels; texts may be empty.

    run: the training that it asks a Job for. changes: those that pods still know, oldest first.
    """

    candidate: str = ""
    comparison: str = ""
    changes: tuple[str, ...] = ()
    problem: str = ""
    run: str = ""


@dataclass(frozen=True)
class TrafficFacts:
    """What the pods of a Router measured, and what its predictor expects of recent answers.

    Ratios are fractions of the last tier's quality: with the choices as they were, and with as many
    requests for each tier whatever is in them. predictors: by name of the pod.
    """

    predictor: str = ""
    threshold: float | None = None
    quality_ratio: float | None = None
    content_blind_quality_ratio: float | None = None
    tiers: Mapping[str, TierFacts] = field(default_factory=dict)
    predictors: Mapping[str, PredictorFacts] = field(default_factory=dict)
    quality: QualityFacts | None = None
    # The threshold in force and the most that the floor allows, and what moves it beyond.
    threshold_limit: float | None = None
    lambda_per_usd: float = 0.0
    # The store of a pod that has trouble with it, else of any; None: none was told of.
    store: StoreFacts | None = None
    retraining: RetrainingFacts | None = None
    cascade: CascadeFacts | None = None  # of all pods; None where none reads answers
