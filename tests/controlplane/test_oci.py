"""The chart goes into a registry and comes out of it as it is."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import binaries
import debian_package
from eventually import eventually_in_another_process

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """\
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: FOLDER}}
http: {addr: "127.0.0.1:PORT"}
"""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """HOST:PORT of an empty registry (Debian's docker-registry)."""
    command = debian_package.folder("docker-registry", "docker-registry") / "docker-registry"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "registry.yml"
    config.write_text(CONFIG.replace("FOLDER", str(tmp_path)).replace("PORT", str(port)))
    process = subprocess.Popen([command, "serve", str(config)], stderr=subprocess.PIPE)

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/").status == 200
        except OSError:
            return False

    try:
        eventually_in_another_process(answers, 20.0, process=process)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def test_a_pushed_chart_renders_what_the_folder_does(registry: str, tmp_path: Path) -> None:
    helm = str(binaries.build() / "helm")
    target = f"oci://{registry}/charts"
    pushed = subprocess.run(
        ["make", "-s", "chart", f"ARGS={target} --plain-http", f"HELM={helm}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    refused = subprocess.run(
        ["scripts/chart.sh", "registry.test"], cwd=ROOT, capture_output=True, text=True
    )

    def rendered(*chart: str) -> str:
        command = [helm, "template", "t", *chart]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.endswith(f"helm install tandem {target}/tandem --version 0.1.0\n")
    tags = urllib.request.urlopen(f"http://{registry}/v2/charts/tandem/tags/list")
    assert json.loads(tags.read())["tags"] == ["0.1.0"]
    remote = rendered(f"{target}/tandem", "--version", "0.1.0", "--plain-http")
    assert remote.endswith(rendered(str(ROOT / "charts" / "tandem")))  # after what was pulled
    assert refused.returncode == 1
    assert "write oci://REGISTRY/PATH" in refused.stderr
