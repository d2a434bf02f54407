"""The wheel holds all four packages, and each console script starts from it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    result = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.glob("tandem-*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    return target


def test_the_wheel_holds_all_four_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    for package in ("tandem_operator", "tandem_router", "tandem_worker", "tandem_kernels"):
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}

    packages = {top for top in tops if not top.endswith(".dist-info")}
    assert packages == {"tandem_operator", "tandem_router", "tandem_worker", "tandem_kernels"}


@pytest.mark.parametrize("script", ["tandem", "tandem-router", "tandem-worker"])
def test_each_console_script_starts_from_the_installed_wheel(site: Path, script: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}

    result = subprocess.run(
        [sys.executable, str(site / "bin" / script), "--help"],
        env=env,
        cwd=site,
        capture_output=True,
        text=True,
    )

    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
