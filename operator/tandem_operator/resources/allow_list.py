"""What an installation lets Models and Routers ask for; the chart's `allow` values.

Whoever may create a Model or a Router creates Deployments with the operator's rights. So what
reaches beyond serving a model (other images, accounts, Secrets, volumes, parts of a pod) is refused
unless the installation allows it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, field_validator

from tandem_operator.resources.base import Values
from tandem_router.config.addresses import networks

Entry = Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=r"^\S+$")]

# On a Secret: which of our kinds may name it.
USABLE_BY_LABEL = "tandem.dev/usable-by"


class AllowList(Values):
    """Restrictive by default; each field opens one thing."""

    images: tuple[Entry, ...] = Field(
        default=(),
        description="Images besides the installation's own, by prefix: a repository, or a folder "
        "of repositories. registry.example.com/ml allows registry.example.com/ml/x:1 and not "
        "registry.example.com/mlx.",
    )
    service_accounts: tuple[Entry, ...] = Field(
        default=(), description="ServiceAccounts that podPatch may name."
    )
    volumes: tuple[Entry, ...] = Field(
        default=(),
        description="Volume types besides configMap, downwardAPI, emptyDir, ephemeral, "
        "persistentVolumeClaim and labelled secret: hostPath (which file:// weights need), csi, "
        "nfs, projected and others.",
    )
    pod_fields: tuple[Entry, ...] = Field(
        default=(),
        description="Fields of a pod or container that podPatch may set besides the usual ones, "
        "such as command, hostNetwork or securityContext; sidecars allows containers of one's own.",
    )
    unlabelled_secrets: bool = Field(
        default=False,
        description=f"Any Secret of the namespace, not only those with the label "
        f"{USABLE_BY_LABEL}.",
    )
    remote_code: bool = Field(
        default=False,
        description="engine.args by which a server runs Python that comes with the weights, or "
        "that they name: trust-remote-code, middleware, worker-cls and such.",
    )
    external_networks: tuple[Entry, ...] = Field(
        default=(),
        description="Networks, such as 10.20.0.0/16, where external tiers may be besides public "
        "addresses.",
    )
    plain_http_keys: bool = Field(
        default=False, description="API keys of external tiers over plain http."
    )
    own_namespace: bool = Field(
        default=False, description="Models and Routers in the operator's own namespace."
    )

    @field_validator("external_networks")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        networks(value)
        return value
