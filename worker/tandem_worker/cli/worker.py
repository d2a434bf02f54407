"""The ``tandem-worker`` command: start, serve, drain on SIGTERM, exit 0."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tandem_worker.config import WorkerConfig
from tandem_worker.engine.malloc import keep_freed_memory
from tandem_worker.errors import ModelError, UnqualifiedError, WorkerError
from tandem_worker.server.secret_file import SecretFile
from tandem_worker.telemetry.logs import configure

if TYPE_CHECKING:
    from tandem_worker.server.worker import Worker

_LOOK_EVERY_S = 1.0
# Exit status of a worker whose weights are not there or are no model (EX_NOINPUT): status tells
# that apart from a worker that crashed.
NO_WEIGHTS = 66
# Of one whose lossy settings change its answers by more than the stated loss (EX_DATAERR).
UNQUALIFIED = 65


def build_parser() -> argparse.ArgumentParser:
    """The command line; files, addresses and secrets are given here, never in the config."""
    parser = argparse.ArgumentParser(
        prog="tandem-worker", description="Serve one model as a unified, prefill or decode worker."
    )
    parser.add_argument("--config", required=True, type=Path, help="worker config, JSON")
    parser.add_argument("--weights", required=True, type=Path, help="Hugging Face model directory")
    parser.add_argument(
        "--host",
        default=os.environ.get("POD_IP") or "127.0.0.1",
        help="address to listen on (default: $POD_IP or 127.0.0.1)",
    )
    parser.add_argument("--port", type=int, default=None, help="HTTP port instead of http_port")
    parser.add_argument(
        "--peer-token-file", type=Path, default=None, help="shared secret of router and workers"
    )
    parser.add_argument(
        "--log-level", default="info", choices=("debug", "info", "warning"), help="least severe"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    # OpenMP reads these when torch is imported, which happens later; spinning threads would take
    # the core from the HTTP side and from the other workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    configure(arguments.log_level)
    try:
        config = WorkerConfig.load(arguments.config)
        os.environ.setdefault("OMP_NUM_THREADS", str(config.num_threads))
        keep_freed_memory()
        path = arguments.peer_token_file
        token = SecretFile(path) if path is not None else b""
        revision = os.environ.get("TANDEM_REVISION")
        if revision and not config.revision:
            config = config.model_copy(update={"revision": revision})
        if not arguments.weights.is_dir():
            raise ModelError(
                f"--weights {arguments.weights} is not a directory; name a folder that is there"
            )
        port = config.http_port if arguments.port is None else arguments.port
        return asyncio.run(
            serve(config, arguments.weights, host=arguments.host, port=port, token=token)
        )
    except WorkerError as error:
        print(f"tandem-worker: {error}", file=sys.stderr)
        if isinstance(error, UnqualifiedError):
            return UNQUALIFIED
        return NO_WEIGHTS if isinstance(error, ModelError) else 1


def _log_ready(url: str) -> None:
    logging.getLogger(__name__).info("ready at %s", url)


async def _lost_rank(worker: Worker) -> str:
    """Why a worker of several processes cannot go on; waits until it cannot."""
    while worker.config.tensor_parallel == 1 or worker.failure is None:  # noqa: ASYNC110
        # a thread finds it, and the loop may be closed when it does
        await asyncio.sleep(_LOOK_EVERY_S)
    return worker.failure


async def serve(
    config: WorkerConfig,
    weights: Path,
    *,
    host: str,
    port: int,
    token: SecretFile | bytes = b"",
    on_ready: Callable[[str], None] = _log_ready,
) -> int:
    """Listen, load, serve until SIGTERM or SIGINT, drain; the exit status.

    Args:
        on_ready: Called with the URL once requests are welcome.

    Raises:
        WorkerError: the address or the model cannot be used.
    """
    from tandem_worker.server.app import WorkerApp
    from tandem_worker.server.http_server import HttpServer, listen
    from tandem_worker.server.worker import Worker

    listener = listen(host, port)
    worker = Worker(
        config,
        weights,
        host=host,
        port=listener.getsockname()[1],
        peer_token=token,
        name=os.environ.get("POD_NAME", ""),
    )
    server = HttpServer(WorkerApp(worker), listener)
    await server.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    starting = asyncio.create_task(worker.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            on_ready(worker.url)
        lost = asyncio.create_task(_lost_rank(worker))
        await asyncio.wait({stopping, lost}, return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            raise WorkerError(lost.result())
        lost.cancel()
        await worker.drain(config.drain_timeout_s)
    finally:
        was_loading = not starting.done()
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, WorkerError):
            await starting
        await server.stop(force=worker.num_requests > 0)
        await worker.stop()
        if was_loading:
            # The thread that imports torch and reads weights cannot be interrupted; everything
            # else is closed, so leave without waiting for it.
            logging.shutdown()
            os._exit(0)
    return 0
