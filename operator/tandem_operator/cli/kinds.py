"""The words that name kinds on the command line: models, mdl, all."""

from __future__ import annotations

import difflib

from tandem_operator.cli.errors import CommandError

ALIASES = {
    "model": "Model",
    "models": "Model",
    "mdl": "Model",
    "router": "Router",
    "routers": "Router",
    "rtr": "Router",
    "autoscalingpolicy": "AutoscalingPolicy",
    "autoscalingpolicies": "AutoscalingPolicy",
    "asp": "AutoscalingPolicy",
    "workerpool": "WorkerPool",
    "workerpools": "WorkerPool",
    "wp": "WorkerPool",
    "pod": "Pod",
    "pods": "Pod",
    "po": "Pod",
    "deployment": "Deployment",
    "deployments": "Deployment",
    "deploy": "Deployment",
    "service": "Service",
    "services": "Service",
    "svc": "Service",
    "configmap": "ConfigMap",
    "configmaps": "ConfigMap",
    "cm": "ConfigMap",
    "event": "Event",
    "events": "Event",
}
MAIN_KINDS = ["Model", "Router", "WorkerPool"]


def kind_of(word: str) -> list[str]:
    """The kinds that a word such as "models" or "all" names.

    Raises CommandError for an unknown word.
    """
    if word == "all":
        return [*MAIN_KINDS, "AutoscalingPolicy", "Pod"]
    kind = ALIASES.get(word.lower())
    if kind is None:
        close = difflib.get_close_matches(word.lower(), ALIASES, n=1)
        hint = f"did you mean {close[0]}?" if close else "use models, routers, workerpools or pods"
        raise CommandError(f"unknown kind {word!r}; {hint}")
    return [kind]


def kinds_of(words: str) -> list[str]:
    """The kinds of a list such as "models,routers", each once.

    Raises CommandError for an unknown word.
    """
    return list(dict.fromkeys(kind for word in words.split(",") if word for kind in kind_of(word)))
