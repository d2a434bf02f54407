"""From a request to a tier: score the prompt, gather what the tiers offer, ask the policy.

The policy itself is pure (`tandem_router.policy`); here its inputs are collected from the
predictor, the picker and the tenant. What comes of its answer is
`tandem_router.routing.set_points`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from tandem_router.balancing.endpoint_picker import Picker
from tandem_router.config import RouterConfig, TenantConfig, TierConfig, served_by
from tandem_router.errors import ApiError
from tandem_router.limits.ledger import NO_CEILINGS, Hold, Ledger
from tandem_router.openai.request import DEFAULT_OUTPUT_TOKENS, InferenceRequest
from tandem_router.policy import (
    NO_OVERRIDES,
    Capabilities,
    Decision,
    Overrides,
    PolicySetPoints,
    Reason,
    RouteRequest,
    ScoreStatus,
    TenantCeilings,
    TierOption,
    decide,
)
from tandem_router.routing.answer_reading import AnswerReader, Middle
from tandem_router.routing.latency_window import LatencyWindow
from tandem_router.routing.predictor_source import Predictor
from tandem_router.routing.scorer import UNSCORED, Scored, Scorer, with_gains
from tandem_router.routing.set_points import Steering
from tandem_router.routing.standing_rule import StandingRule
from tandem_router.telemetry.metrics import Metrics

# What a tier's option is made of, beside the router's settings.
_State = tuple[bool, float | None, float | None, float, Capabilities]

LATENCY_SMOOTHING = 0.2
# A smoothed latency says nothing about a load that ended longer ago than this.
LATENCY_BELIEVED_S = 10.0


@dataclass
class TierLatency:
    """Latencies of a tier as this router saw them: smoothed, seconds, and the last ones."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    updated: float = 0.0
    last_ttft: LatencyWindow = field(default_factory=LatencyWindow)
    last_tpot: LatencyWindow = field(default_factory=LatencyWindow)
    last_whole: LatencyWindow = field(default_factory=LatencyWindow)  # from arrival to last byte

    def saw(
        self, ttft_s: float | None, tpot_s: float | None, now: float, queue_wait_s: float = 0.0
    ) -> None:
        """queue_wait_s: of ttft_s, what stood before the request; the policy adds that of now."""
        self.updated = now
        if ttft_s is not None:
            self.ttft_s = _smoothed(self.ttft_s, max(0.0, ttft_s - queue_wait_s))
            self.last_ttft.saw(ttft_s, now)
        if tpot_s is not None:
            self.tpot_s = _smoothed(self.tpot_s, tpot_s)
            self.last_tpot.saw(tpot_s, now)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + LATENCY_SMOOTHING * (new - old)


def gone_tier(tier: str) -> ApiError:
    """What who asks for a deleted tier is told, at once."""
    return ApiError(
        404,
        f"tier {tier!r} is no longer served: it was removed, or its workers were deleted, not only "
        "stopped",
        param="model",
        code="model_not_found",
    )


class Routing:
    """The tier choice of one router."""

    def __init__(
        self,
        config: RouterConfig,
        predictor: Predictor | None,
        picker: Picker,
        steering: Steering,
        ledger: Ledger,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._picker = picker
        self._steering = steering
        self._ledger = ledger
        self._clock = clock
        self.scorer = Scorer(predictor, config.predictor, metrics)
        self.answers = AnswerReader(config, predictor, metrics)
        # Of a tier that is gone too: its last requests still end.
        self.latency: dict[str, TierLatency] = {}
        self._options: dict[str, tuple[TierConfig, _State, TierOption]] = {}
        self._rule: StandingRule | None = None
        self._ceilings: dict[str, tuple[TenantConfig, TenantCeilings]] = {}
        self._take(config)

    def _take(self, config: RouterConfig) -> None:
        self._config = config
        for tier in config.tiers:
            self.latency.setdefault(tier.name, TierLatency())
        self._declared = {
            tier.name: Capabilities(**tier.capabilities.model_dump())
            if tier.capabilities is not None
            else Capabilities(embeddings=False)
            for tier in config.tiers
            if tier.kind == "external"
        }
        # Tiers where it is worth something that they hold a prompt's beginning, and whether they
        # are a provider's.
        holding = {
            tier.name: tier.kind == "external"
            for tier in config.tiers
            if tier.kind == "pool" or tier.usd_per_1m_cached_input_tokens is not None
        }
        self._holding = holding if len(config.tiers) > 1 else {}
        self.weighs_prefixes = bool(self._holding)
        self.tiers = {tier.name: tier for tier in config.tiers}
        self.router_name = config.name
        self.reads_answers = config.cascade is not None
        self.allows_late = config.budget.on_exhausted != "Reject"
        self._by_model = {tier.served_model: tier.name for tier in config.tiers}
        self._by_model.update({tier.name: tier.name for tier in config.tiers})

    def reconfigure(self, config: RouterConfig) -> None:
        """Take other tiers, prices, shares, fallback tier and mode.

        Latencies of a tier that somebody else answers now are forgotten, all others stay.
        """
        before = self._config
        known = {tier.name: served_by(before, tier) for tier in before.tiers}
        for tier in config.tiers:
            if known.get(tier.name, ()) not in ((), served_by(config, tier)):
                self.latency[tier.name] = TierLatency()
        self._take(config)
        self.scorer.reconfigure(config.predictor)
        self.answers.reconfigure(config)

    def predict_by(self, predictor: Predictor | None) -> None:
        """Another predictor scores from now on."""
        self.scorer.use(predictor)
        self.answers.use(predictor)

    def forced_tier(self, model: str) -> str | None:
        """Tier named by `model`, itself or one of its adapters; None where the router decides.

        Raises ApiError (404).
        """
        if model == self._config.name:
            return None
        adapters = {} if model in self._by_model else self.adapters()
        tier = self._by_model.get(model) or adapters.get(model)
        if tier is None:
            names = ", ".join([self._config.name, *self._by_model, *adapters])
            raise ApiError(
                404,
                f"the model {model[:100]!r} does not exist; use one of {names}",
                param="model",
                code="model_not_found",
            )
        if self._picker.gone(tier):
            raise gone_tier(tier)
        return tier

    def adapter(self, model: str) -> str | None:
        """`model` where it is a LoRA adapter's, not a tier's, a model's or the router's."""
        return None if model == self._config.name or model in self._by_model else model

    def adapters(self) -> dict[str, str]:
        """LoRA adapters that workers have loaded, with their tier: the first that has one.

        A name that a tier, its model or the router has already is theirs.
        """
        taken = {self._config.name, *self._by_model}
        found: dict[str, str] = {}
        for tier in self._config.tiers:
            for name in sorted(self._picker.adapters(tier.name) - taken):
                found.setdefault(name, tier.name)
        return found

    def embedding_tier(self) -> str:
        """The one tier that embeds. Raises ApiError (400) where none or several can.

        Vectors of two models cannot be compared, so nothing but the client chooses between them.
        """
        able = [tier.name for tier in self._config.tiers if self.capabilities(tier.name).embeddings]
        if len(able) == 1:
            return able[0]
        if able:
            raise ApiError(
                400,
                f"tiers {', '.join(able)} embed, and their vectors cannot be compared; name one "
                "as `model`",
                param="model",
                code="ambiguous_model",
            )
        names = ", ".join(tier.name for tier in self._config.tiers)
        raise ApiError(
            400,
            f"no tier embeds now (tiers: {names}); a provider's says so by "
            "`capabilities.embeddings`, a worker's with its load",
            param="model",
            code="unsupported_by_tier",
        )

    def capabilities(self, tier: str) -> Capabilities:
        """What a tier can, as it declares or its workers report."""
        return self._declared.get(tier) or self._picker.capabilities(tier)

    def holds_prefixes(self, tier: str) -> bool:
        """Whether it is worth something that a tier has seen a prompt's beginning."""
        return tier in self._holding

    def _held_tokens(self, chain: Sequence[int]) -> dict[str, float] | None:
        """Tokens of a prompt by the tiers that hold them; None where none does."""
        held = {
            tier: tokens
            for tier, by_provider in self._holding.items()
            if (tokens := self._picker.held_tokens(tier, chain, by_provider))
        }
        return held or None

    async def score(self, prompt: str | None) -> Scored:
        """The predictor's view of a prompt; absent where there is no text."""
        if prompt is None:
            return UNSCORED
        return self.scorer.score_now(prompt) or await self.scorer.score(prompt)

    def choose(
        self,
        request: InferenceRequest,
        overrides: Overrides,
        hold: Hold,
        scored: Scored,
        set_points: PolicySetPoints,
        expected_uses: float = 1.0,
        failed: frozenset[str] = frozenset(),
        chain: Sequence[int] = (),
    ) -> Decision:
        """Decide, without counting: the caller counts what it dispatches.

        expected_uses: how often the answer will be served, this time included. failed: tiers that
        could not serve this request. chain: of its prompt, as the picker makes it. What money is
        held for it already, it may spend. Raises ApiError (404) for an unknown model.
        """
        means = self._ledger.means(hold)
        held = self._held_tokens(chain) if chain else None
        if held is None and not failed and means is NO_CEILINGS and overrides is NO_OVERRIDES:
            plain = self._plainly(request, hold.tenant, scored, set_points, expected_uses)
            if plain is not None:
                return plain
        if means.budget_usd is not None:
            set_points = replace(set_points, budget_remaining_usd=means.budget_usd)
        forced = overrides.tier
        score = scored.score
        now = self._clock()
        complete = self._steering.new_tiers.complete
        options = [self._option(tier, failed, now) for tier in self._config.tiers]
        if forced is not None and all(option.name != forced for option in options):
            raise gone_tier(forced)  # it went while the request was on its way here
        if forced is None:
            # One that only embeds is no end of the scale that gains are measured on.
            options = [each for each in options if each.capabilities.generation] or options
        is_any_available = False
        for option in options:
            if option.available:
                is_any_available = True
                if option.ttft_s is None:
                    # Latencies are compared: one known beside one unknown would seem slower.
                    options = [_of_unknown_latency(each) for each in options]
                    break
        if forced is not None or not is_any_available:
            # Held until a worker is there rather than refused: the exchange waits.
            options = [
                option
                if option.available or option.name in failed
                else replace(option, available=True)
                for option in options
            ]
        route = RouteRequest(
            prompt_tokens=request.num_prompt_tokens,
            most_prompt_tokens=request.most_prompt_tokens,
            score=complete(with_gains(score)),
            score_status=scored.status,
            max_tokens=request.max_tokens,
            num_choices=request.num_choices,
            needs=request.needs,
            num_expected_uses=expected_uses,
            held_tokens=held,
            overrides=overrides,
            tenant=self._ceilings_of(hold.tenant, means.tenant_usd),
        )
        decision = decide(route, options, set_points, self._steering.state)
        if self._config.routing == "Advise" and forced is None and not failed:
            fallback = replace(overrides, tier=self._config.fallback_tier)
            taken = decide(
                replace(route, overrides=fallback), options, set_points, self._steering.state
            )
            advised = decision.tier
            decision = replace(taken, advised=advised)
            if taken.tier is not None:
                decision = replace(decision, reason=Reason.ADVISE)
        if route.score is not score and score is not None and decision.difficulty is not None:
            cheapest = score.quality.get(decision.verdicts[0].tier)
            if cheapest is not None:
                decision = replace(decision, difficulty=1.0 - cheapest)
        return decision

    def _plainly(
        self,
        request: InferenceRequest,
        tenant: TenantConfig,
        scored: Scored,
        set_points: PolicySetPoints,
        expected_uses: float,
    ) -> Decision | None:
        """What `choose` says where the gain rule alone decides; None where more may be weighed."""
        score = scored.score
        if (
            score is None
            or self._steering.new_tiers.num
            or scored.status is not ScoreStatus.OK
            or score.out_of_distribution
            or score.output_tokens
            or getattr(score, "mean_tokens", None)
            or getattr(score, "utility", None)
            or tenant.allowed_tiers is not None
            or tenant.max_cost_usd is not None
        ):
            return None
        rule = self._rule
        if rule is None or not rule.holds(self._config, set_points, self.capabilities):
            rule = self._rule = StandingRule(self._config, set_points, self.capabilities)
        if rule.gain is None:
            return None
        now = self._clock()
        if not self._picker.all_ready(rule.tiers, now):
            return None
        waits_s: list[float | None] = []
        for name in rule.tiers:
            latency = self.latency[name]
            if latency.ttft_s is None or now - latency.updated >= LATENCY_BELIEVED_S:
                waits_s = rule.unknown_waits
                break
            waits_s.append(max(0.0, self.queue_wait_s(name)) + latency.ttft_s)
        return rule.gain.decide(
            score.quality,
            request.num_prompt_tokens,
            request.max_tokens,
            request.num_choices,
            request.needs.features,
            expected_uses,
            waits_s,
        )

    def _ceilings_of(self, tenant: TenantConfig, remaining_usd: float | None) -> TenantCeilings:
        """Made once per tenant's configuration; what is left of its money is of now."""
        known = self._ceilings.get(tenant.name)
        if known is None or known[0] is not tenant:
            allowed = tenant.allowed_tiers
            ceilings = TenantCeilings(
                name=tenant.name,
                allowed_tiers=frozenset(allowed) if allowed is not None else None,
                max_cost_usd=tenant.max_cost_usd,
            )
            known = self._ceilings[tenant.name] = (tenant, ceilings)
        if remaining_usd is None:
            return known[1]
        return replace(known[1], remaining_usd=remaining_usd)

    def middle(
        self, request: InferenceRequest, slo_s: float | None, decision: Decision
    ) -> Middle | None:
        """Where the cheaper tier is to answer first and be read, and on what terms.

        slo_s: time to the first token that the client asked for; the Router's where it did not.
        """
        cascade = self.answers.cascade if self.answers.settings is not None else None
        if cascade is None:
            return None
        slo_ms = self._config.slo.ttft_ms
        if slo_s is None and slo_ms is not None:
            slo_s = slo_ms / 1000.0
        seen = self.latency[cascade.first].last_whole.report(95.0, None, self._clock())
        return self.answers.middle(request, decision, slo_s, seen.value_s)

    def unfit(self, tier: str) -> str | None:
        """Why a tier should be asked nothing that nobody waits for; None where it may be."""
        if self._picker.num_usable(tier) == 0:
            return f"tier {tier} has no worker"
        slack_s = self.slack_s(tier)
        return f"tier {tier} misses its SLO" if slack_s is not None and slack_s < 0.0 else None

    def slack_s(self, tier: str) -> float | None:
        """By how much a tier's last requests kept the SLO, seconds; negative: they missed it.

        None where there is no SLO, or no request of late.
        """
        slo, seen, now = self._config.slo, self.latency[tier], self._clock()
        slacks = []
        for window, percentile, target_ms in (
            (seen.last_ttft, slo.ttft_percentile, slo.ttft_ms),
            (seen.last_tpot, slo.tpot_percentile, slo.tpot_ms),
        ):
            if target_ms is not None:
                value_s = window.report(percentile, target_ms / 1000.0, now).value_s
                if value_s is not None:
                    slacks.append(target_ms / 1000.0 - value_s)
        return min(slacks, default=None)

    def queue_wait_s(self, tier: str) -> float:
        """How long a request would now wait before its prefill; 0 where nothing is known."""
        return 0.0 if tier in self._declared else self._picker.queue_wait_s(tier)

    def _option(self, tier: TierConfig, unavailable: frozenset[str], now: float) -> TierOption:
        name = tier.name
        latency = self.latency[name]
        # A tier that was slow a while ago is worth another try: without traffic the smoothed
        # value would never recover.
        fresh = now - latency.updated < LATENCY_BELIEVED_S
        state = (
            name not in unavailable and self._picker.any_usable(name),
            latency.ttft_s if fresh else None,
            latency.tpot_s if fresh else None,
            self.queue_wait_s(name),
            self.capabilities(name),
        )
        known = self._options.get(name)
        # The configuration is compared by identity: it is large, and replaced as a whole.
        if known is not None and known[0] is tier and known[1] == state:
            return known[2]
        option = TierOption(
            name=name,
            available=state[0],
            usd_per_1m_input_tokens=tier.usd_per_1m_input_tokens,
            usd_per_1m_output_tokens=tier.usd_per_1m_output_tokens,
            usd_per_1m_cached_input_tokens=tier.usd_per_1m_cached_input_tokens,
            is_pool=tier.kind == "pool",
            ttft_s=state[1],
            tpot_s=state[2],
            max_share=tier.max_share,
            queue_wait_s=state[3],
            capabilities=state[4],
            default_output_tokens=float(DEFAULT_OUTPUT_TOKENS),
        )
        self._options[name] = (tier, state, option)
        return option


def _of_unknown_latency(option: TierOption) -> TierOption:
    if option.ttft_s is None and option.tpot_s is None:
        return option
    return replace(option, ttft_s=None, tpot_s=None)
