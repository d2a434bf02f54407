"""How a node treats its pods."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NodeSettings:
    """How a node treats its pods; times in seconds.

    Defaults suit a person waiting at a terminal; a kubelet is slower in all of them.
    """

    name: str = "local"
    backoff_first_s: float = 0.5
    backoff_max_s: float = 30.0
    # A container that ran this long starts again at once and with a fresh count.
    backoff_reset_s: float = 10.0
    # Probes are this fast until they first succeed; then the manifest's period holds.
    starting_probe_period_s: float = 0.2
    mount_retry_s: float = 1.0
    # Children see this process's environment (PATH, virtual environment, thread limits) as well.
    inherit_environment: bool = True
    # Volumes appear at their real paths, through a mount namespace per container (needs root);
    # otherwise the paths in arguments and environment are rewritten.
    mount_namespaces: bool = False
    # Upper bound of a pod's own grace period, so that Ctrl-C ends in bounded time.
    max_grace_s: float = 120.0
