"""What a plan needs to know of an engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from tandem_operator.plan.objects import Settings
from tandem_operator.resources import Model, RoleSpec
from tandem_operator.resources.base import Object

# Of a pod whose worker does not speak docs/contract.md: its engine and the name it serves.
ENGINE_LABEL = "tandem.dev/engine"
SERVED_ANNOTATION = "tandem.dev/served-model"


class EnginePod(Protocol):
    """One engine's part of a worker pod; everything else is the same for all."""

    ready_path: str
    health_path: str
    reads_config: bool  # whether the pod mounts a Tandem worker's configuration and token

    def config(self, model: Model, role: str, settings: Settings, revision: str) -> Object | None:
        """The configuration that the worker reads; None for an engine that has flags only.

        Raises pydantic.ValidationError when settings contradict each other.
        """
        ...

    def container(
        self, model: Model, role: str, spec: RoleSpec, weights: str, revision: str, at: Settings
    ) -> Object:
        """command, args and env of the container; weights is the folder that holds them."""
        ...

    def router_fields(self, model: Model) -> Mapping[str, Any]:
        """What a tier of the Model says in a Router's configuration about its engine."""
        ...


def pod_labels(model: Model) -> dict[str, str]:
    """None for our own workers, so that their pods stay what they were."""
    kind = model.spec.engine.type
    return {} if kind == "Tandem" else {ENGINE_LABEL: kind}


def flags(args: Mapping[str, str], lists: Collection[str] = ()) -> list[str]:
    """Flags of a command line: true is the bare flag, false its --no- form.

    lists: names of flags that take several values; the words of theirs are one each.
    """
    found: list[str] = []
    for name, value in sorted(args.items()):
        if value == "true":
            found.append(f"--{name}")
        elif value == "false":
            found.append(f"--no-{name}")
        elif name.replace("_", "-") in lists and not value.lstrip().startswith("{"):
            found += [f"--{name}", *value.split()]
        else:
            found += [f"--{name}", value]
    return found


def cpu_threads(spec: RoleSpec, quantity_cpu: float | None) -> int | None:
    """Threads to compute with on a CPU; None on a GPU and where nothing is said."""
    if spec.gpus or quantity_cpu is None:
        return None
    return max(1, int(quantity_cpu))
