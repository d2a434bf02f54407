"""The commands that start a worker: `tandem-worker` in a pod, `tandem serve` on a machine."""

from tandem_worker.cli.worker import NO_WEIGHTS, UNQUALIFIED, build_parser, main

__all__ = ["NO_WEIGHTS", "UNQUALIFIED", "build_parser", "main"]
