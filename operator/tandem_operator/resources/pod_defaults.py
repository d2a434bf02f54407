"""What an installation gives all pods that the operator makes; the chart's values of these names.

A patch of a whole pod template per kind instead of a field per wish. It lies under the `podPatch`
of a Router or role, which wins where both say something, and only where `allow` lets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, StringConstraints, field_validator

from tandem_operator.resources.base import GROUP, Values
from tandem_operator.resources.pod_patch import misfits

Annotations = dict[str, str]
SecretName = Annotated[str, StringConstraints(min_length=1, max_length=253)]


class PodDefaults(Values):
    """Nothing, where nothing is said."""

    worker: dict[str, Any] = Field(
        default_factory=dict, description="Patch of every worker's pod template."
    )
    router: dict[str, Any] = Field(
        default_factory=dict, description="Patch of every router's pod template."
    )
    pull_secrets: tuple[SecretName, ...] = Field(
        default=(), description="Names of pull secrets of all pods, in each namespace."
    )
    worker_annotations: Annotations = Field(
        default_factory=dict, description="Annotations of the workers' ServiceAccounts."
    )
    router_annotations: Annotations = Field(
        default_factory=dict, description="Annotations of the routers' ServiceAccounts."
    )

    @field_validator("worker", "router")
    @classmethod
    def _is_a_template(cls, patch: dict[str, Any]) -> dict[str, Any]:
        for path, text in misfits(patch) if patch else []:
            raise ValueError(f"{'.'.join(map(str, path))} {text}")
        labels = (patch.get("metadata") or {}).get("labels") or {}
        for key in labels:
            if key.startswith((f"{GROUP}/", "app.kubernetes.io/name", "app.kubernetes.io/managed")):
                raise ValueError(f"metadata.labels.{key} is by what pods are found; remove it")
        return patch

    def under(self, kind: str) -> list[Mapping[str, Any]]:
        """What is merged into the pod template of a worker or router, in this order."""
        secrets = [{"name": name} for name in self.pull_secrets]
        given = self.worker if kind == "worker" else self.router
        pulls: list[Mapping[str, Any]] = (
            [{"spec": {"imagePullSecrets": secrets}}] if secrets else []
        )
        return [*pulls, *([given] if given else [])]
