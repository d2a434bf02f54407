"""A real Envoy as a Gateway API gateway sets it up for an InferencePool, and a router process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from eventually import eventually_in_another_process

ROOT = Path(__file__).resolve().parents[2]


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def envoy_program() -> str:
    script = ROOT / "scripts" / "envoy_setup.py"
    made = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def _typed(name: str, **fields: Any) -> dict[str, Any]:
    return {"@type": f"type.googleapis.com/{name}", **fields}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _endpoints(name: str, ports: Iterable[int]) -> dict[str, Any]:
    entries = [{"endpoint": {"address": _address(port)}} for port in ports]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": entries}]}


@dataclass(frozen=True)
class SecurePicker:
    """A picker that is asked by TLS, and is known by a certificate of this authority."""

    port: int
    authority: Path


def envoy_config(
    ports: Mapping[int, Mapping[str, Any]],
    picker: int,
    pool: Iterable[int],
    secure: SecurePicker | None = None,
) -> dict[str, Any]:
    """What gateways make of an HTTPRoute to an InferencePool: a filter that asks, and a cluster
    whose load balancer does as it is told.

    ports: to listen on, each with what is unusual of its filter. secure: the picker of those
    that say so.
    """
    pickers = [_picker("picker", picker)]
    if secure is not None:
        pickers.append(_picker("secure-picker", secure.port) | _by_tls(secure.authority))
    return {
        "static_resources": {
            "listeners": [_listener(port, **unusual) for port, unusual in ports.items()],
            "clusters": [*pickers, _pool(pool)],
        }
    }


def _listener(
    port: int, fail_open: bool = False, picker: str = "picker", **mode: str
) -> dict[str, Any]:
    http = "envoy.extensions.filters.http"
    duplex = "FULL_DUPLEX_STREAMED"
    processing = {
        "request_header_mode": "SEND",
        "response_header_mode": "SEND",
        "request_body_mode": duplex,
        "response_body_mode": duplex,
        "request_trailer_mode": "SEND",
        "response_trailer_mode": "SEND",
        **mode,
    }
    asks = _typed(
        f"{http}.ext_proc.v3.ExternalProcessor",
        grpc_service={"envoy_grpc": {"cluster_name": picker}},
        failure_mode_allow=fail_open,
        processing_mode=processing,
        message_timeout="5s",
        metadata_options={
            "forwarding_namespaces": {"untyped": ["envoy.lb", "envoy.lb.subset_hint"]},
            "receiving_namespaces": {"untyped": ["envoy.lb"]},
        },
    )
    route = {
        "match": {"prefix": "/"},
        "route": {
            "cluster": "pool",
            "timeout": "0s",
            "retry_policy": {"retry_on": "connect-failure", "num_retries": 2},
        },
    }
    manager = _typed(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="http",
        http_filters=[
            {"name": "envoy.filters.http.ext_proc", "typed_config": asks},
            {
                "name": "envoy.filters.http.router",
                "typed_config": _typed(f"{http}.router.v3.Router"),
            },
        ],
        route_config={"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
    )
    filters = [{"name": "http_connection_manager", "typed_config": manager}]
    return {
        "name": f"in-{port}",
        "address": _address(port),
        "filter_chains": [{"filters": filters}],
    }


def _by_tls(authority: Path) -> dict[str, Any]:
    """As a gateway's policy for the picker's Service says it: TLS, and whom to trust."""
    name = {"san_type": "IP_ADDRESS", "matcher": {"exact": "127.0.0.1"}}
    trust = {
        "trusted_ca": {"filename": str(authority)},
        "match_typed_subject_alt_names": [name],
    }
    tls = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
    context = _typed(
        tls, common_tls_context={"alpn_protocols": ["h2"], "validation_context": trust}
    )
    return {"transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context}}


def _picker(name: str, port: int) -> dict[str, Any]:
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    http2 = _typed(options, explicit_http_config={"http2_protocol_options": {}})
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {options: http2},
        "load_assignment": _endpoints(name, [port]),
    }


def _pool(ports: Iterable[int]) -> dict[str, Any]:
    policies = "envoy.extensions.load_balancing_policies"
    in_turn = {
        "typed_extension_config": {
            "name": "round_robin",
            "typed_config": _typed(f"{policies}.round_robin.v3.RoundRobin"),
        }
    }
    as_told = _typed(
        f"{policies}.override_host.v3.OverrideHost",
        override_host_sources=[
            {
                "metadata": {
                    "key": "envoy.lb",
                    "path": [{"key": "x-gateway-destination-endpoint"}],
                }
            },
            {"header": "x-gateway-destination-endpoint"},
        ],
        fallback_policy={"policies": [in_turn]},
    )
    policy = {"name": "override_host", "typed_config": as_told}
    return {
        "name": "pool",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_balancing_policy": {"policies": [{"typed_extension_config": policy}]},
        "load_assignment": _endpoints("pool", ports),
    }


def _answers(url: str) -> bool:
    try:
        httpx.get(url)
    except httpx.HTTPError:
        return False
    return True


@contextmanager
def _running(command: list[str], log: Path, answers: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process once `answers` does; its log is what an assertion shows."""
    environment = {name: value for name, value in os.environ.items() if name != "POD_IP"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        eventually_in_another_process(
            lambda: _answers(answers), told=lambda: log.read_text()[-4000:], process=process
        )
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def envoy(folder: Path, config: dict[str, Any]) -> Iterator[None]:
    file = folder / "envoy.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [envoy_program(), "-c", str(file), "--concurrency", "1", "--disable-hot-restart"]
    first = config["static_resources"]["listeners"][0]["address"]["socket_address"]
    url = f"http://127.0.0.1:{first['port_value']}"
    with _running([*command, "-l", "warning"], folder / "envoy.log", url):
        yield


@contextmanager
def router(
    folder: Path,
    config: dict[str, Any],
    port: int,
    table: dict[str, Any],
    *options: str,
    **secrets: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """secrets: options with a file of this content."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "endpoints.json").write_text(json.dumps({"tiers": table}))
    command = [sys.executable, "-m", "tandem_router", "--config", str(folder / "config.json")]
    command += ["--endpoints", str(folder / "endpoints.json"), "--port", str(port), *options]
    for option, text in secrets.items():
        file = folder / option
        file.write_text(text)
        command += [f"--{option.replace('_', '-')}-file", str(file)]
    with _running(command, folder / "router.log", f"http://127.0.0.1:{port}/health") as process:
        yield process
