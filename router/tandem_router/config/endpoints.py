"""Where workers are found, and how one of them is chosen."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tandem_router.config.section import Name, Positive, Section


class PickingConfig(Section):
    """How a worker is chosen within a tier."""

    prefix_block_bytes: int = Field(
        default=256, ge=16, description="Bytes per hashed prefix block (about 64 tokens)."
    )
    max_prefix_blocks: int = Field(
        default=1024, ge=0, description="Hashed blocks per prompt; 0 switches affinity off."
    )
    max_prefix_entries: int = Field(
        default=65_536, ge=1, description="Blocks remembered for each worker."
    )
    load_poll_s: Positive = Field(default=1.0, description="Period of GET /v1/load per worker.")


class FileEndpoints(Section):
    """Endpoints from the JSON file given by --endpoints, read again when it changes."""

    type: Literal["file"] = "file"
    poll_s: Positive = Field(default=0.25, description="How often the file's stamp is looked at.")


class ServiceRef(Section):
    """A Kubernetes Service whose EndpointSlices name the workers of one role."""

    tier: Name
    role: Literal["unified", "prefill", "decode"]
    service: Name
    port: int = Field(default=8100, ge=1, le=65535, description="Used where a slice names none.")


class EndpointSliceEndpoints(Section):
    """Endpoints from watching EndpointSlices with the pod's ServiceAccount."""

    type: Literal["endpointslice"]
    namespace: Name
    services: tuple[ServiceRef, ...] = Field(
        max_length=64, description="Those of the tiers that are pools; none where no tier is."
    )
    api_url: str | None = Field(
        default=None,
        max_length=2048,
        description="API server; absent: KUBERNETES_SERVICE_HOST and _PORT.",
    )
    credentials_dir: str = Field(
        default="/var/run/secrets/kubernetes.io/serviceaccount",
        max_length=4096,
        description="Folder with token and ca.crt; the token is read again as it rotates.",
    )
