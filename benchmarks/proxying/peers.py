"""The routers that are compared: how each is installed, once, and started in front of an upstream.

nginx comes from Debian, the Rust routers from PyPI into an environment of their own under
`~/.cache/tandem`; run again it costs nothing. Every router runs with its own defaults; nginx is
told to keep connections and not to buffer, which is what a stream needs. vllm-router picks by
round robin: its default asks the worker to render each prompt first, which costs it twice as much.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {"vllm-router": "0.1.17", "sglang-router": "0.3.2"}


def peers_home() -> Path:
    """Python environment of the Rust routers; raises subprocess.CalledProcessError."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    pins = [f"{name}=={version}" for name, version in VERSIONS.items()]
    key = hashlib.sha256(" ".join([*pins, sys.version]).encode()).hexdigest()[:12]
    home = Path(cache) / "tandem" / f"routers-{key}"
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "done").exists():
            shutil.rmtree(home, ignore_errors=True)
            venv.create(home, with_pip=True)
            pip = [str(home / "bin" / "python"), "-m", "pip", "install", "-q"]
            subprocess.run([*pip, "--disable-pip-version-check", *pins], check=True)
            (home / "done").touch()
    return home


def nginx_binary() -> str:
    """Raises OSError where it can neither be found nor installed."""
    found = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if found is None:
        subprocess.run(["apt-get", "update", "-q"], check=False, stdout=subprocess.DEVNULL)
        subprocess.run(
            ["apt-get", "install", "-y", "-q", "nginx-light"],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )
        found = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if found is None:
        raise OSError("nginx is neither installed nor to be had from apt-get")
    return found


def nginx_version() -> str:
    said = subprocess.run([nginx_binary(), "-v"], capture_output=True, text=True, check=True)
    return said.stderr.strip().rpartition("/")[2]


NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr error;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  keepalive_requests 1000000;
  upstream worker {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://worker; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


def nginx(port: int, upstream: int, folder: Path) -> list[str]:
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=port, upstream=upstream))
    return [nginx_binary(), "-c", str(config), "-p", str(folder)]


def vllm_router(port: int, upstream: int, folder: Path) -> list[str]:
    return [
        *(str(peers_home() / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin"),
        *("--prometheus-port", str(port + 1), "--log-level", "error"),
    ]


def sglang_router(port: int, upstream: int, folder: Path) -> list[str]:
    return [
        *(str(peers_home() / "bin" / "python"), "-m", "sglang_router.launch_router"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", f"http://127.0.0.1:{upstream}"),
        *("--prometheus-port", str(port + 1), "--log-level", "error"),
    ]


def tandem(port: int, upstream: int, folder: Path) -> list[str]:
    """Two tiers of one provider, a predictor by length, and everything else as it is by default."""
    url = f"http://127.0.0.1:{upstream}/v1"
    prices = {"mini": (0.15, 0.6), "full": (2.5, 10.0)}
    config = {
        "name": "bench",
        "tiers": [
            {
                "name": name,
                "served_model": f"provider-{name}",
                "kind": "external",
                "url": url,
                "usd_per_1m_input_tokens": price_in,
                "usd_per_1m_output_tokens": price_out,
            }
            for name, (price_in, price_out) in prices.items()
        ],
        "fallback_tier": "full",
        "predictor": {"type": "Length"},
    }
    path = folder / "router.json"
    path.write_text(json.dumps(config))
    return [
        *(sys.executable, "-m", "tandem_router", "--config", str(path)),
        *("--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"),
    ]


@dataclass(frozen=True)
class Peer:
    """command: (port, upstream's port, a folder for files) to what is run."""

    name: str
    version: str
    command: Callable[[int, int, Path], list[str]]


def earlier(tree: Path) -> Peer:
    """Tandem of another checkout, with the packages that are installed here."""

    def command(port: int, upstream: int, folder: Path) -> list[str]:
        return ["env", f"PYTHONPATH={tree / 'router'}", *tandem(port, upstream, folder)]

    return Peer("before", str(tree), command)


def peers() -> list[Peer]:
    return [
        Peer("nginx", nginx_version(), nginx),
        Peer("vllm-router", VERSIONS["vllm-router"], vllm_router),
        Peer("sglang-router", VERSIONS["sglang-router"], sglang_router),
        Peer("tandem", "this tree", tandem),
    ]
