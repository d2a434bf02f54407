"""A variable that pods are given is read by somebody, and one that is read is told somewhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Read by what is not ours, or set there.
READ_ELSEWHERE = {
    "HF_HUB_OFFLINE": "huggingface_hub, in an engine's image",
    "HOME": "every program; the image's may not be writable",
    "TMPDIR": "Python's tempfile, and every engine",
    "TRITON_CACHE_DIR": "Triton",
    "TANDEM_WEIGHTS": "an OpenAI-compatible engine's arguments (docs/engines.md)",
    "TANDEM_PORT": "the same",
    "TANDEM_SERVED_MODEL": "the same",
}
# Read, and set by no plan: by the system, by convention, or by whoever starts a program.
SET_ELSEWHERE = {
    "COMP_LINE": "argcomplete's convention, set by the shell",
    "KUBERNETES_SERVICE_HOST": "the kubelet",
    "KUBERNETES_SERVICE_PORT": "the kubelet",
    "OMP_NUM_THREADS": "whoever starts a worker; OpenMP's own",
    "OMP_WAIT_POLICY": "the same",
    "SHELL": "the login",
    "XDG_CACHE_HOME": "the desktop's convention",
    "XDG_RUNTIME_DIR": "the desktop's convention",
    "HF_HOME": "huggingface_hub's convention",
    "HF_HUB_DISABLE_TELEMETRY": "set for the library before it is imported",
    "HF_HUB_DISABLE_XET": "the same",
    "TOKENIZERS_PARALLELISM": "the same",
    "TRITON_INTERPRET": "Triton's own",
}
PACKAGES = ("operator", "router", "worker", "kernels")


def strings(folder: Path) -> Iterator[str]:
    """Every text that stands in the code by itself; documentation does not count."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def set_on_pods() -> set[str]:
    """Names of `env` in the plans: {"name": "UPPER", ...}."""
    found = set()
    for path in (ROOT / "operator" / "tandem_operator" / "plan").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Dict):
                continue
            for key, value in zip(node.keys, node.values, strict=True):
                named = isinstance(key, ast.Constant) and key.value == "name"
                if named and isinstance(value, ast.Constant) and str(value.value).isupper():
                    found.add(str(value.value))
    return found - {"IP"}  # a printer column


def read(folder: Path) -> set[str]:
    """Variables that the code names where it asks the environment."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript):
                asked, name = ast.unparse(node.value), node.slice
            elif isinstance(node, ast.Call) and node.args:
                asked, name = ast.unparse(node.func), node.args[0]
            else:
                continue
            is_asked = asked.endswith(("environ", "environ.get", "environ.setdefault", "getenv"))
            if is_asked and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return found


def test_a_variable_that_a_pod_is_given_is_read() -> None:
    known = {text for package in ("router", "worker") for text in strings(ROOT / package)}

    given = set_on_pods()

    assert {"POD_IP", "TANDEM_REVISION"} <= given
    assert sorted(given - known - READ_ELSEWHERE.keys()) == []


def test_a_variable_that_is_read_is_set_by_a_plan_or_told_in_the_documents() -> None:
    asked = {name for package in PACKAGES for name in read(ROOT / package)}
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "charts").rglob("*.yaml"), ROOT / "README.md"]
    told = "\n".join(page.read_text(encoding="utf-8") for page in pages)

    unknown = asked - set_on_pods() - SET_ELSEWHERE.keys()

    assert {"TANDEM_PEER_TOKEN", "POD_IP"} <= asked
    assert [name for name in sorted(unknown) if name not in told] == []
    assert SET_ELSEWHERE.keys() - asked == set(), "in the table, and read no longer"
