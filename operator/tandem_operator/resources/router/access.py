"""Who may ask a Router for what, and from which web pages."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from tandem_operator.resources.base import Decimal, Name, Resource


class Tenant(Resource):
    """One customer with API keys and limits."""

    name: Name = Field(description="Name in metrics and logs.")
    key_hashes: list[
        Annotated[
            str,
            StringConstraints(pattern=r"^hmac-sha256:[0-9a-f]{64}$", min_length=76, max_length=76),
        ]
    ] = Field(
        default_factory=list,
        max_length=16,
        description="Keyed hashes of the tenant's API keys, hmac-sha256:<64 hex digits>; "
        "`python -m tandem_router.api.api_keys` makes key and hash. `tandem keys create` mints "
        "more at run time; a key that is revoked there stays revoked.",
    )
    allowed_tiers: list[Name] | None = Field(
        default=None,
        min_length=1,
        max_length=8,
        description="Tiers that the tenant may use; all when absent.",
    )
    max_concurrency: int | None = Field(
        default=None, ge=1, le=100_000, description="Most requests at the same time, a count."
    )
    requests_per_minute: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Most requests in a minute, a count."
    )
    tokens_per_minute: int | None = Field(
        default=None, ge=1, le=1_000_000_000, description="Most prompt plus output tokens a minute."
    )
    usd_per_hour: Decimal | None = Field(default=None, description="Most US dollars in an hour.")
    max_cost_usd: Decimal | None = Field(
        default=None, description="Most US dollars that one request may cost."
    )
    learning: bool = Field(
        default=True,
        description="Whether the tenant's requests may be asked again, judged and captured.",
    )


class Access(Resource):
    """Which names and which web pages the endpoint answers to."""

    allowed_hosts: (
        list[
            Annotated[
                str,
                StringConstraints(
                    pattern=r"^([a-z0-9._-]+|\[[0-9a-f:.]+\])$", min_length=1, max_length=253
                ),
            ]
        ]
        | None
    ) = Field(
        default=None,
        max_length=64,
        description="Host names without port, in lower case, that requests may be sent to; every "
        "one when absent (in local mode: this machine's).",
    )
    cors_origins: list[
        Annotated[
            str,
            StringConstraints(
                pattern=r"^(\*|https?://[a-z0-9.:\[\]_-]+)$", min_length=1, max_length=253
            ),
        ]
    ] = Field(
        default_factory=list,
        max_length=64,
        description="Origins such as https://app.example whose pages may use /v1 from a browser, "
        "or *: all.",
    )
