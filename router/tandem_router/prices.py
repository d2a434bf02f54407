"""What tokens cost on each tier, and which tier is the dearest."""

from __future__ import annotations

from tandem_router.config import RouterConfig, TierConfig


class Prices:
    """List prices of a router's tiers; `dearest` and `cheapest` are tier names."""

    def __init__(self, config: RouterConfig) -> None:
        self._tiers = {tier.name: tier for tier in config.tiers}
        # Of equally priced tiers the last declared is the dearest, as the policy ranks them.
        self.dearest = max(reversed(config.tiers), key=_list_price).name
        self.cheapest = min(config.tiers, key=_list_price).name

    def cost_usd(self, tier: str, prompt_tokens: float, output_tokens: float) -> float:
        prices = self._tiers[tier]
        return (
            prompt_tokens * prices.usd_per_1m_input_tokens
            + output_tokens * prices.usd_per_1m_output_tokens
        ) / 1e6


def _list_price(tier: TierConfig) -> float:
    return tier.usd_per_1m_input_tokens + tier.usd_per_1m_output_tokens
