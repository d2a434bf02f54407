"""Stands in for workers and routers in tests: starts in a blink and answers probes.

Environment: STUB_CRASH (exit status, at once), STUB_NOT_READY (a file: not ready while it exists),
STUB_CHILD (start a grandchild and write its pid there), STUB_SLOW_EXIT (ignore SIGTERM).
"""

import http.server
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

ARGS = sys.argv[1:]


def value(flag, default=None):
    return ARGS[ARGS.index(flag) + 1] if flag in ARGS else default


if "STUB_CRASH" in os.environ:
    print("stub: asked to crash", flush=True)
    sys.exit(int(os.environ["STUB_CRASH"]))
if "STUB_CHILD" in os.environ:
    child = subprocess.Popen(["sleep", "300"])
    pathlib.Path(os.environ["STUB_CHILD"]).write_text(str(child.pid))

config = {}
if value("--config"):
    config = json.loads(pathlib.Path(value("--config")).read_text())


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        blocker = os.environ.get("STUB_NOT_READY")
        if self.path == "/ready" and blocker and os.path.exists(blocker):
            self.reply(503, {})
            return
        endpoints = value("--endpoints")
        shown = {}
        if endpoints and os.path.exists(endpoints):
            shown = json.loads(pathlib.Path(endpoints).read_text())
        environ = {
            k: v for k, v in os.environ.items() if k.startswith(("POD_", "STUB_", "TANDEM_"))
        }
        usable = {tier["name"]: 1 for tier in config.get("tiers", [])}
        about = {"args": ARGS, "env": environ, "pid": os.getpid(), "endpoints": shown}
        self.reply(200, {**about, "usable_workers": usable})

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.reply(200, {"ok": True, "num_bytes": 64})

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


server = Server((os.environ["POD_IP"], config.get("http_port", 8100)), Handler)
print(f"stub: serving as {os.environ.get('POD_NAME')}", flush=True)


def stop(*_):
    if "STUB_SLOW_EXIT" not in os.environ:
        print("stub: drained", flush=True)
        threading.Thread(target=server.shutdown).start()


signal.signal(signal.SIGTERM, stop)
server.serve_forever(poll_interval=0.02)
