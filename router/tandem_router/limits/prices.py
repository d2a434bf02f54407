"""What tokens cost on each tier, and which tier is the dearest."""

from __future__ import annotations

from collections.abc import Sequence

from tandem_router.config import RouterConfig, TierConfig


class Prices:
    """List prices of a router's tiers; `dearest` and `cheapest` are tier names."""

    def __init__(self, config: RouterConfig) -> None:
        # Of input, output, cached input and reasoning.
        self.per_1m: dict[str, tuple[float, float, float, float]] = {}
        self.reconfigure(config)

    def reconfigure(self, config: RouterConfig) -> None:
        """Take other tiers and prices; a tier that is gone may still have requests to pay."""
        self.per_1m |= {tier.name: _of_one_million(tier) for tier in config.tiers}
        # Of equally priced tiers the last declared is the dearest, as the policy ranks them.
        self.dearest = max(reversed(config.tiers), key=list_price).name
        self.cheapest = min(config.tiers, key=list_price).name

    def cost_usd(
        self,
        tier: str,
        prompt_tokens: float,
        output_tokens: float,
        cached_tokens: float = 0.0,
        reasoning_tokens: float = 0.0,
    ) -> float:
        """Price of an answer; cached tokens are part of the prompt's, reasoning of the output's."""
        price_in, price_out, cached, reasoning = self.per_1m[tier]
        if not cached_tokens and not reasoning_tokens:
            return (prompt_tokens * price_in + output_tokens * price_out) / 1e6
        return (
            (prompt_tokens - cached_tokens) * price_in
            + cached_tokens * cached
            + (output_tokens - reasoning_tokens) * price_out
            + reasoning_tokens * reasoning
        ) / 1e6


def price_note(tiers: Sequence[TierConfig]) -> str:
    """What a reader of costs and savings has to know of the prices; empty where all are real."""
    parts = []
    if nominal := [tier.name for tier in tiers if tier.token_prices == "Nominal"]:
        parts.append(f"nominal prices of {', '.join(nominal)}: nothing has measured them yet")
    if free := [tier.name for tier in tiers if tier.token_prices == "None"]:
        parts.append(f"no price of {', '.join(free)}: counted as free")
    return "; ".join(parts)


def list_price(tier: TierConfig) -> float:
    """Orders tiers from cheap to dear, as the policy does."""
    return tier.usd_per_1m_input_tokens + tier.usd_per_1m_output_tokens


def _of_one_million(tier: TierConfig) -> tuple[float, float, float, float]:
    """Dollars for input, output, cached input and reasoning tokens."""
    price_in, price_out = tier.usd_per_1m_input_tokens, tier.usd_per_1m_output_tokens
    cached, reasoning = tier.usd_per_1m_cached_input_tokens, tier.usd_per_1m_reasoning_tokens
    return (
        price_in,
        price_out,
        price_in if cached is None else cached,
        price_out if reasoning is None else reasoning,
    )
