"""Run the kernels' tests under other versions of torch and triton, without another environment.

    python tests/kernels/versions.py                       the pairs of PAIRS
    python tests/kernels/versions.py 2.11.0/3.6.0          one pair: torch/triton
    python tests/kernels/versions.py 2.11.0/3.6.0 -- -k interpreted -x

Each version is installed alone (pip --target --no-deps, 1 GB each) into a folder that is put before
the current environment on PYTHONPATH, so pytest, numpy and the CUDA 13 libraries torch links
against are those at hand. What follows -- goes to pytest. One line per pair is printed at the end;
the exit status is 1 if any pair failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The ranges' ends and middles; the lock file's own pair runs with every `pytest`.
PAIRS = ("2.11.0/3.6.0", "2.12.1/3.7.1", "2.13.0/3.8.0")
# Linked by torch 2.11 to 2.14, no longer by the versions after them.
CUDA_LIBRARY = "nvidia-curand==10.4.0.35"


def layer(folder, *requirements):
    """Install packages alone into a folder named after the first; returns the folder."""
    target = folder / requirements[0].replace("==", "-")
    if not target.exists():
        partial = folder / f"{target.name}.{os.getpid()}.partial"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(partial), *requirements], check=True)
        if target.exists():  # another run was faster
            shutil.rmtree(partial)
        else:
            partial.rename(target)
    return target


def environment(folder, torch, triton):
    """The current environment with the two versions in front."""
    layers = [layer(folder, f"torch=={torch}"), layer(folder, f"triton=={triton}")]
    roots = [layer(folder, CUDA_LIBRARY), Path(sysconfig.get_paths()["purelib"])]
    libraries = [str(path) for root in roots for path in sorted(root.glob("nvidia/*/lib"))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, layers)),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "OMP_NUM_THREADS": "1",
    }


def run(pair, folder, pytest_arguments):
    """Test one pair; returns pytest's exit status."""
    torch, triton = pair.split("/")
    wanted = environment(folder, torch, triton)
    program = "import torch, triton; print(torch.__version__.split('+')[0], triton.__version__)"
    found = subprocess.run(
        [sys.executable, "-c", program], env=wanted, capture_output=True, text=True, cwd=folder
    )
    if found.stdout.split() != [torch, triton]:
        raise SystemExit(f"{pair} is not what Python imports: {found.stdout}{found.stderr}")
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    folders = [] if pytest_arguments else ["tests/kernels"]
    return subprocess.run([*command, *folders, *pytest_arguments], env=wanted, cwd=ROOT).returncode


def main():
    """Test every pair named, or all of PAIRS."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", nargs="*", help="torch/triton, for example 2.11.0/3.6.0")
    parser.add_argument(
        "--folder", type=Path, default=Path.home() / ".cache" / "tandem" / "versions",
        help="where the versions are installed and kept",
    )  # fmt: skip
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    arguments, pytest_arguments = parser.parse_args(given[:cut]), given[cut + 1 :]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    failed = {}
    for pair in arguments.pairs or PAIRS:
        print(f"== torch/triton {pair}", flush=True)
        failed[pair] = run(pair, arguments.folder, pytest_arguments)
    for pair, status in failed.items():
        print(f"torch/triton {pair}: {'failed' if status else 'passed'}")
    raise SystemExit(any(failed.values()))


if __name__ == "__main__":
    main()
