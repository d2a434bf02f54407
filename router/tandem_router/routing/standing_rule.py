"""The gain rule for a router's tiers as they stand: made anew when one of its inputs is another.

Prices, threshold and capabilities change once in a while, and requests come all the time. What
does change from one to the next (who is ready, how long a tier takes) is the caller's to look at.
"""

from __future__ import annotations

from collections.abc import Callable

from tandem_router.config import RouterConfig
from tandem_router.openai.request import DEFAULT_OUTPUT_TOKENS
from tandem_router.policy import Capabilities, PolicySetPoints, TierOption
from tandem_router.policy.gain_rule import GainRule, gain_rule

CapabilitiesOf = Callable[[str], Capabilities]


class StandingRule:
    """gain: None where more than the rule has to be weighed, whatever the request.

    tiers: those that generate, in the order of the configuration, which is that of the waits that
    the rule takes.
    """

    def __init__(
        self, config: RouterConfig, set_points: PolicySetPoints, capabilities: CapabilitiesOf
    ) -> None:
        self._config = config
        self._set_points = set_points
        seen = [(tier, capabilities(tier.name)) for tier in config.tiers]
        # What external tiers can is declared, and so part of the configuration.
        self._reported = [(tier.name, able) for tier, able in seen if tier.kind == "pool"]
        options = [
            TierOption(
                name=tier.name,
                usd_per_1m_input_tokens=tier.usd_per_1m_input_tokens,
                usd_per_1m_output_tokens=tier.usd_per_1m_output_tokens,
                max_share=tier.max_share,
                capabilities=able,
                default_output_tokens=float(DEFAULT_OUTPUT_TOKENS),
            )
            for tier, able in seen
            # One that only embeds is no end of the scale that gains are measured on.
            if able.generation
        ]
        self.gain: GainRule | None = None
        if config.routing != "Advise":
            self.gain = gain_rule(options, set_points)
        self.tiers = tuple(option.name for option in options)
        self.unknown_waits: list[float | None] = [None] * len(options)

    def holds(
        self, config: RouterConfig, set_points: PolicySetPoints, capabilities: CapabilitiesOf
    ) -> bool:
        """Whether it was made of the same; by identity, since all of these are never changed."""
        if config is not self._config or set_points is not self._set_points:
            return False
        for name, able in self._reported:  # noqa: SIM110 (a generator costs thrice)
            if capabilities(name) is not able:
                return False
        return True
