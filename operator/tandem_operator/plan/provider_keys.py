"""Where router pods find the API keys of providers: one folder for each Secret, whoever names it.

So a tier or judge may come, go or change its URL beside a Secret that pods mount already; a Secret
that none mounts yet needs new pods, since kubelet alone reads Secrets for them.
"""

from __future__ import annotations

from tandem_operator.plan.objects import digest
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object, SecretKeyRef

KEYS_DIR = "/etc/tandem/keys"


def key_file(ref: SecretKeyRef) -> str:
    """The path of a key in a router pod."""
    return f"{KEYS_DIR}/{ref.name}/{ref.key}"


def add_provider_keys(router: Router, mounts: list[Object], volumes: list[Object]) -> None:
    """Mount the Secrets that external tiers and the judge name."""
    refs = [tier.external.api_key_secret_ref for tier in router.spec.tiers if tier.external]
    if router.spec.learning is not None and router.spec.learning.judge is not None:
        refs.append(router.spec.learning.judge.api_key_secret_ref)
    for name in sorted({ref.name for ref in refs if ref is not None}):
        volume = f"keys-{digest(name)}"  # a Secret's name may be too long for a volume's
        mounts.append({"name": volume, "mountPath": f"{KEYS_DIR}/{name}", "readOnly": True})
        volumes.append({"name": volume, "secret": {"secretName": name}})
