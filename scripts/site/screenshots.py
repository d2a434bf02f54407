"""`make screenshots`: pictures of a running Router's page and of a predictor's report.

Needs Chromium (Debian and Ubuntu: apt-get install chromium). Beside the pictures a file keeps the
hash of the sources that they show; a test compares it (tests/project/test_screenshots.py).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"
HASHES = PICTURES / "screenshots.json"
TANDEM = [sys.executable, "-m", "tandem_operator.cli"]
NUM_QUESTIONS = 60

#: What each picture shows, as the folders and files that make it.
SOURCES = {
    "dashboard.png": ["router/tandem_router/api/dashboard"],
    "report.png": ["router/tandem_router/predictor/evaluation/html_report.py"],
}


def digest(sources: list[str]) -> str:
    """A hash over names and content of files; a folder stands for all below it."""
    total = hashlib.sha256()
    for source in sources:
        path = ROOT / source
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            if "__pycache__" not in file.parts:
                total.update(file.relative_to(ROOT).as_posix().encode() + b"\0")
                total.update(file.read_bytes())
    return total.hexdigest()


def main() -> int:
    """Take both pictures anew."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.stderr.write(
            "screenshots: no chromium; on Debian and Ubuntu: apt-get install chromium\n"
        )
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        report = _report(folder)
        _shoot(chromium, f"file://{report}", PICTURES / "report.png", 1100, 1000, folder)
        _dashboard(chromium, folder)
    HASHES.write_text(json.dumps({k: digest(v) for k, v in SOURCES.items()}, indent=2) + "\n")
    return 0


def _shoot(chromium: str, url: str, to: Path, width: int, height: int, folder: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [f"--window-size={width},{height}", f"--user-data-dir={folder}/profile"]
    flags += ["--virtual-time-budget=8000", f"--screenshot={to}"]
    subprocess.run([chromium, *flags, url], check=True, timeout=120, capture_output=True)
    sys.stdout.write(f"{to.relative_to(ROOT)}: {to.stat().st_size // 1024} kB\n")


def _report(folder: Path) -> Path:
    """The report of the example's predictor on some of the demo pair's outcomes."""
    rows = folder / "rows.jsonl.gz"
    with gzip.open(ROOT / "examples" / "models" / "outcomes.jsonl.gz", "rt") as all_rows:
        kept = [next(all_rows) for _ in range(1000)]
    with gzip.open(rows, "wt") as out:
        out.writelines(kept)
    report = folder / "report.html"
    artifact = str(ROOT / "examples" / "01-hybrid" / "predictor")
    command = [*TANDEM, "evaluate", artifact, str(rows), "--html", str(report)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    return report


def _dashboard(chromium: str, folder: Path) -> None:
    """The page after some questions of the demo's suite."""
    from tandem_operator.demo import suite

    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    env.pop("XDG_RUNTIME_DIR", None)
    log = folder / "up.log"
    with open(log, "wb") as out:
        up = subprocess.Popen(
            [*TANDEM, "up", str(ROOT / "examples" / "01-hybrid")], env=env, stdout=out, stderr=out
        )
    try:
        end = time.monotonic() + 240
        while "ready after" not in log.read_text():
            if up.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"screenshots: tandem up did not become ready\n{log.read_text()}")
            time.sleep(0.2)
        url = log.read_text().split("chat: ")[1].split("/v1")[0]
        for question in suite.generate("test", 21, NUM_QUESTIONS):
            _ask(f"{url}/v1/chat/completions", question.prompt)
        _shoot(chromium, f"{url}/", PICTURES / "dashboard.png", 1200, 1000, folder)
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait(60)


def _ask(url: str, prompt: str) -> None:
    body = {"model": "chat", "max_tokens": 60, "temperature": 0}
    body["messages"] = [{"role": "user", "content": prompt}]
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        reply.read()


if __name__ == "__main__":
    raise SystemExit(main())
