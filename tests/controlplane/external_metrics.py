"""A little external-metrics API server: one metric, whose value stands in a file.

usage: external_metrics.py ADDRESS PORT CERTIFICATE KEY FILE
The apiserver passes requests for external.metrics.k8s.io on to it; an HPA asks there.
"""

from __future__ import annotations

import http.server
import json
import ssl
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

GROUP_VERSION = "external.metrics.k8s.io/v1beta1"
METRIC = "s0-prometheus"  # as KEDA names the first trigger of a ScaledObject
ROOT = f"/apis/{GROUP_VERSION}"


def reply(path: str, value: str) -> dict[str, Any] | None:
    """The object at a path, None where there is none."""
    if path == ROOT:
        metric = {"name": METRIC, "singularName": "", "namespaced": True}
        metric |= {"kind": "ExternalMetricValueList", "verbs": ["get"]}
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": GROUP_VERSION,
            "resources": [metric],
        }
    if path.startswith(f"{ROOT}/namespaces/") and path.endswith(f"/{METRIC}"):
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        item = {"metricName": METRIC, "metricLabels": {}, "timestamp": now, "value": value}
        return {
            "kind": "ExternalMetricValueList",
            "apiVersion": GROUP_VERSION,
            "metadata": {},
            "items": [item],
        }
    return None


def main(address: str, port: int, certificate: str, key: str, file: Path) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found = reply(self.path.split("?")[0], file.read_text().strip())
            body = json.dumps(found or {"kind": "Status", "code": 404}).encode()
            self.send_response(200 if found else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.ThreadingHTTPServer((address, port), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], Path(sys.argv[5]))
