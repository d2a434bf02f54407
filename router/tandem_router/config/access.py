"""Who may ask for what, under which names, and where the router itself may connect."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from tandem_router.config.addresses import Outward, networks, shows_key
from tandem_router.config.section import Name, Positive, Section


class TenantConfig(Section):
    """One API tenant. Where any tenant is configured, a request without a key is refused."""

    name: Name = Field(description="Shown in metrics and decisions.")
    key_hashes: tuple[str, ...] = Field(
        default=(),
        max_length=16,
        description="`hmac-sha256:<64 hex digits>` of each API key under the secret given by "
        "--key-secret-file (`python -m tandem_router.api.api_keys` makes both); more may be minted "
        "at run time.",
    )
    allowed_tiers: tuple[str, ...] | None = Field(
        default=None, description="Tiers this tenant may use; absent: all."
    )
    max_concurrency: int | None = Field(default=None, ge=1, description="Requests in flight.")
    requests_per_minute: Positive | None = Field(default=None, description="Rate ceiling.")
    tokens_per_minute: Positive | None = Field(
        default=None, description="Prompt plus generated tokens per minute."
    )
    usd_per_hour: Positive | None = Field(default=None, description="Spend ceiling, $/h.")
    highest_priority: int = Field(
        default=0,
        ge=-100,
        le=100,
        description="Lowest number (lower goes first) that `x-tandem-priority` may give.",
    )
    max_cost_usd: Positive | None = Field(
        default=None, description="Most that one request may cost, US dollars."
    )

    learning: bool = Field(
        default=True,
        description="Whether answers of this tenant may be asked again of another tier, judged and "
        "captured (`learning`).",
    )

    @model_validator(mode="after")
    def _hashes_well_formed(self) -> Self:
        for entry in self.key_hashes:
            scheme, _, digest = entry.partition(":")
            if (
                scheme != "hmac-sha256"
                or len(digest) != 64
                or set(digest) - set("0123456789abcdef")
            ):
                raise ValueError(
                    f"tenant {self.name!r}: key hash {entry[:24]!r} is not "
                    "hmac-sha256:<64 lower-case hex digits>; make one with "
                    "`python -m tandem_router.api.api_keys`"
                )
        return self


class AccessConfig(Section):
    """Which names and which web pages a router answers to."""

    allowed_hosts: tuple[str, ...] | None = Field(
        default=None,
        max_length=64,
        description="Host names without port that requests may be sent to; absent: every one, but "
        "only this machine's where the router listens on a loopback address.",
    )
    cors_origins: tuple[str, ...] = Field(
        default=(),
        max_length=64,
        description="Origins (`https://app.example`) whose pages may use /v1 from a browser; `*`: "
        "all.",
    )


class OutwardConfig(Section):
    """Where external tiers and judges may be; checked at the start and at every connection."""

    only_public: bool = Field(
        default=False,
        description="Public addresses only, as the operator sets it in a cluster. Link-local and "
        "metadata addresses are refused in any case.",
    )
    allowed_networks: tuple[str, ...] = Field(
        default=(),
        max_length=64,
        description="Networks (`10.20.0.0/16`) that are not refused, whatever they are.",
    )
    plain_http_keys: bool = Field(
        default=False,
        description="Send API keys over plain http to other machines, where they can be read.",
    )

    @field_validator("allowed_networks")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        networks(value)
        return value

    @property
    def rule(self) -> Outward:
        """What connections are held to."""
        return Outward(self.only_public, networks(self.allowed_networks))

    def refused(self, url: str, has_key: bool) -> str | None:
        """What is wrong with a provider's URL, and the next step; None where nothing is."""
        why = self.rule.refused_url(url)
        if why is not None:
            return f"{url!r} {why}; use another, or add its network to outward.allowed_networks"
        if has_key and not self.plain_http_keys and shows_key(url):
            return (
                f"{url!r} is plain http, which shows the API key on the way; use https, or set "
                "outward.plain_http_keys"
            )
        return None
