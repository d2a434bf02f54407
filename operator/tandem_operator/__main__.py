"""`python -m tandem_operator`: the operator of a Kubernetes cluster."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence

from tandem_operator.reconcile.cluster_api import ApiError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the operator until it is told to stop; the exit status."""
    from tandem_operator.kube.operator import build_parser, serve

    args = build_parser().parse_args(argv)
    log_as(args.log_level, args.log_format)
    # Not asyncio.run(), which would wait for tasks that kopf left behind and that never end.
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(serve(args))
    except ApiError as error:
        sys.stderr.write(f"tandem-operator: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"tandem-operator: port {args.port} cannot be used: {error.strerror}\n")
        return 1


def log_as(level: str, form: str) -> None:
    """Lines as text, or one JSON object each."""
    if level.lower() != "debug":
        # kopf tells of each event at info, httpx of each question to a pod.
        for chatty in ("kopf", "httpx"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
    handler = logging.StreamHandler()
    if form == "json":
        from pythonjsonlogger.json import JsonFormatter

        fields = {"asctime": "time", "levelname": "level", "name": "logger"}
        line = "%(asctime)s %(levelname)s %(name)s %(message)s"
        handler.setFormatter(JsonFormatter(line, rename_fields=fields))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


if __name__ == "__main__":
    raise SystemExit(main())
