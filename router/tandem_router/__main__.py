"""`python -m tandem_router --config FILE`: run one router until SIGTERM, then drain."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem_router.config import LimitsConfig, RouterConfig, load_config
from tandem_router.config.secret_file import SecretFile
from tandem_router.errors import ConfigError, RouterError
from tandem_router.http.listen import listen
from tandem_router.http.server import Listener, ServerLimits
from tandem_router.telemetry.logs import configure
from tandem_router.telemetry.tracing import from_environment

# For the store, the configuration, workers' load reports and the reserve for probes.
FILES_KEPT_BACK = 96
GC_THRESHOLDS = (5_000, 20, 50)

logger = logging.getLogger("tandem.router")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tandem-router", description="Run one Tandem router.")
    parser.add_argument("--config", type=Path, required=True, help="RouterConfig as JSON")
    parser.add_argument("--predictor", type=Path, help="artifact of `tandem train`")
    parser.add_argument("--endpoints", type=Path, help="JSON file with the workers of each tier")
    parser.add_argument("--peer-token-file", type=Path, help="secret shared with the workers")
    parser.add_argument("--key-secret-file", type=Path, help="secret of the API key hashes")
    parser.add_argument("--metrics-token-file", type=Path, help="opens /metrics once tenants exist")
    parser.add_argument("--store-file", type=Path, help="SQLite file, for store.type=sqlite")
    parser.add_argument(
        "--store-url-file", type=Path, help="file with a PostgreSQL URL, for store.type=postgres"
    )
    parser.add_argument(
        "--retraining-dir", type=Path, help="folder of retrained predictors, for retraining"
    )
    parser.add_argument(
        "--training-data", type=Path, help="graded rows to train again from, beside labels"
    )
    parser.add_argument(
        "--gateway-tls",
        type=Path,
        metavar="DIR",
        help="folder with tls.crt and tls.key for gateway_port (default: no TLS)",
    )
    parser.add_argument(
        "--host",
        help="address to listen on, several with commas between, such as 0.0.0.0,:: (default: "
        "$POD_IPS, $POD_IP or 127.0.0.1)",
    )
    parser.add_argument("--port", type=int, help="port (default: http_port of the configuration)")
    parser.add_argument(
        "--log-level", default="info", choices=("debug", "info", "warning"), help="least severe"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    configure(args.log_level)
    try:
        return _run(args)
    except RouterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    import uvicorn

    from tandem_router.api.app import RouterApp
    from tandem_router.api.origin import loopback_names

    named = args.host or os.environ.get("POD_IPS") or os.environ.get("POD_IP") or "127.0.0.1"
    hosts = [host.strip().strip("[]") for host in named.split(",")]
    port = args.port or config.http_port
    app = RouterApp(
        config,
        artifact_path=args.predictor,
        endpoints_path=args.endpoints,
        peer_token=_secret_file(args.peer_token_file),
        key_secret=_secret_file(args.key_secret_file, least_bytes=16),
        metrics_token=_secret_file(args.metrics_token_file),
        store_file=args.store_file,
        store_url=_secret_text(args.store_url_file),
        config_path=args.config,
        retraining_dir=args.retraining_dir,
        training_data=args.training_data,
        allowed_hosts=loopback_names(hosts),
        tracing=from_environment("tandem-router"),
        address=(hosts[0], port),
        gateway_tls=args.gateway_tls,
    )
    # Long-lived objects leave the collector's sight: full collections otherwise stop every
    # stream for tens of milliseconds once a predictor is loaded.
    gc.collect()
    gc.freeze()
    # A request leaves some ten objects in the decision log: the usual 700 would have them looked
    # at every hundred requests.
    gc.set_threshold(*GC_THRESHOLDS)
    listener = Listener(_server_limits(config.limits))

    def bound(changed: RouterConfig) -> None:
        listener.limits = _server_limits(changed.limits)

    app.settings.on_change.append(bound)
    listeners = listen(hosts, port)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            for each in sockets or ():
                host, number = each.getsockname()[:2]
                name = f"[{host}]" if ":" in host else host
                logger.info("router %r running on http://%s:%d/v1", config.name, name, number)

    server = Server(
        uvicorn.Config(
            app,
            loop="auto",
            http=listener.protocol(),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(max(1, config.drain_timeout_s)),
        )
    )
    # uvicorn drains on the first signal and then raises it again for whoever listened before;
    # a drained router has ended well, so nobody does.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=listeners)
    return 0 if server.started else 1


def _server_limits(limits: LimitsConfig) -> ServerLimits:
    """Caps that the process can keep: every request needs a file for either side."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        wanted = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
        soft = max(soft, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    most = limits.max_connections
    if soft != resource.RLIM_INFINITY:
        most = max(1, min(most, (soft - FILES_KEPT_BACK) // 2))
    return ServerLimits(
        max_header_bytes=limits.max_header_bytes,
        header_timeout_s=limits.header_timeout_s,
        write_timeout_s=limits.write_timeout_s,
        max_connections=most,
        max_waiting_per_address=limits.max_waiting_connections_per_address,
    )


def _secret_text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        text = path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if not text:
        raise ConfigError(f"{path}: the file is empty")
    return text


def _secret_file(path: Path | None, least_bytes: int = 1) -> SecretFile | None:
    return None if path is None else SecretFile(path, least_bytes=least_bytes)


if __name__ == "__main__":
    sys.exit(main())
