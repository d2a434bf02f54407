"""What a tier's tokens cost by its workers' price per hour and their measured speed.

    input   price of a prefill worker's hour * seconds that a token of a usual prompt takes
    output  price of a decode worker's hour * seconds that a token of a usual batch takes

both fully used, as `tandem profile --usd-per-hour` prints them. A profile is refined with every
step, a price is not: the one told before stays until it is a tenth off, because each change goes to
every router.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tandem_operator.plan.router_facts import ProfileFacts, TrafficFacts
from tandem_operator.resources import Model, Router
from tandem_operator.resources.base import Object
from tandem_operator.resources.router import TierSpec

PRICED_BATCH = 16
PRICED_CONTEXT = 1024
STAYS_WITHIN = 0.1
Three = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """US dollars of a million tokens."""

    usd_per_1m_input_tokens: float
    usd_per_1m_output_tokens: float

    def is_near(self, other: TokenPrice) -> bool:
        """Whether neither of the two is more than a tenth off."""
        pairs = (
            (self.usd_per_1m_input_tokens, other.usd_per_1m_input_tokens),
            (self.usd_per_1m_output_tokens, other.usd_per_1m_output_tokens),
        )
        return all(abs(one - two) <= STAYS_WITHIN * two for one, two in pairs)


def token_price(
    prefill: Three,
    decode: Three,
    prefill_usd_per_hour: float,
    decode_usd_per_hour: float,
    *,
    batch: int = PRICED_BATCH,
    context_tokens: int = PRICED_CONTEXT,
) -> TokenPrice:
    """Prices of workers paid by the hour.

    Args:
        batch: Sequences decoding together at the load one plans for.
        context_tokens: Of one of them, and of a prompt.
    """
    length = float(context_tokens)
    a, b, c = prefill
    input_s = (a + b * length + c * length * length) / length
    a, b, c = decode
    output_s = (a + b * batch * length + c * batch) / batch
    return TokenPrice(
        1e6 * prefill_usd_per_hour / 3600.0 * input_s, 1e6 * decode_usd_per_hour / 3600.0 * output_s
    )


def measured_prices(
    router: Router,
    models: Mapping[str, Model],
    old_status: Object,
    traffic: TrafficFacts | None,
) -> dict[str, TokenPrice]:
    """By tier, where its Model has a price per hour, its spec lists none and a profile is known."""
    told = {str(entry.get("name")): entry for entry in old_status.get("tiers") or []}
    found: dict[str, TokenPrice] = {}
    for tier in router.spec.tiers:
        hours = _hours(tier, models)
        if hours is None:
            continue
        before = _told(told.get(tier.name) or {})
        facts = traffic.tiers.get(tier.name) if traffic is not None else None
        profile = facts.profile if facts is not None else None
        now = _priced(profile, hours)
        if now is None or (before is not None and now.is_near(before)):
            now = before
        if now is not None:
            found[tier.name] = now
    return found


def _hours(tier: TierSpec, models: Mapping[str, Model]) -> tuple[float, float] | None:
    """Dollars per hour of the workers that prefill and that decode."""
    listed = tier.usd_per_1m_input_tokens is not None and tier.usd_per_1m_output_tokens is not None
    model = models.get(tier.model_ref.name) if tier.model_ref is not None else None
    if listed or model is None:
        return None
    roles = model.spec.roles()
    prefill = roles.get("prefill") or roles.get("unified")
    decode = roles.get("decode") or roles.get("unified")
    prices = [role.usd_per_hour for role in (prefill, decode) if role is not None]
    if len(prices) < 2 or any(price is None or float(price) <= 0.0 for price in prices):
        return None
    return float(prices[0] or 0.0), float(prices[1] or 0.0)


def _priced(profile: ProfileFacts | None, hours: tuple[float, float]) -> TokenPrice | None:
    if profile is None or profile.prefill is None or profile.decode is None:
        return None
    exact = token_price(profile.prefill, profile.decode, *hours)
    rounded = [
        float(f"{price:.3g}")
        for price in (exact.usd_per_1m_input_tokens, exact.usd_per_1m_output_tokens)
    ]
    return TokenPrice(*rounded) if all(0.0 < price < 1e6 for price in rounded) else None


def _told(entry: Object) -> TokenPrice | None:
    """What the status said before, where that was measured."""
    if entry.get("tokenPrices") != "Measured":
        return None
    try:
        return TokenPrice(float(entry["usdPer1MInputTokens"]), float(entry["usdPer1MOutputTokens"]))
    except (KeyError, TypeError, ValueError):
        return None
