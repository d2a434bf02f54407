"""The checkout keeps clear of the traps that its layout has."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPONENTS = {
    "operator": "tandem_operator",
    "router": "tandem_router",
    "worker": "tandem_worker",
    "kernels": "tandem_kernels",
}


def tracked_files() -> list[Path]:
    """Every file that git tracks, absolute."""
    output = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    return [ROOT / name for name in output.split("\0") if name and (ROOT / name).exists()]


@pytest.mark.parametrize("component", COMPONENTS)
def test_no_python_file_lies_directly_in_a_component_root(component: str) -> None:
    """operator/x.py or operator/__init__.py would shadow the standard library's operator."""
    assert list((ROOT / component).glob("*.py")) == []


@pytest.mark.parametrize("component", sorted(set(COMPONENTS) - {"kernels"}))
def test_a_package_root_holds_at_most_a_dozen_modules(component: str) -> None:
    """More than a dozen rooms in one corridor and nobody finds a file by its name.

    Kernels are apart: one file per operation is their layout.
    """
    root = ROOT / component / COMPONENTS[component]

    assert len(list(root.glob("*.py"))) <= 12


def test_the_standard_library_imports_from_the_repository_root() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import json, operator; print(operator.__file__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert result.returncode == 0, result.stderr
    assert not result.stdout.startswith(str(ROOT / "operator"))


def test_tests_hold_no_init_file() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (
            ("tandem_operator.cli", "tandem_operator.plan"),
            ("torch", "triton", "sklearn", "kopf", "kubernetes"),
        ),
        (("tandem_router.api.app", "tandem_router.predictor"), ("torch", "triton", "sklearn")),
        (("tandem_router.config",), ("numpy", "fastapi", "torch")),
        (("tandem_worker.config",), ("numpy", "fastapi", "torch")),
    ],
)
def test_imports_stay_light(modules: tuple[str, ...], forbidden: tuple[str, ...]) -> None:
    """Operator and router images stay small because nothing heavy is ever imported there."""
    code = f"""
import importlib, sys
for name in {modules!r}: importlib.import_module(name)
print(sorted(set({forbidden!r}) & set(sys.modules)))
"""

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_nothing_that_executes_foreign_data_is_called() -> None:
    """No pickle, eval or torch.load anywhere: what crosses a process is data."""
    offenders = []
    for path in tracked_files():
        if path.suffix != ".py" or "tests" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                names = []
            bad = [n for n in names if n.split(".")[0] in {"pickle", "joblib", "dill", "marshal"}]
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                bad += [called] if called in {"eval", "exec", "torch.load", "yaml.load"} else []
            offenders += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in bad]

    assert offenders == []


def test_committed_files_stay_small() -> None:
    """The demo models are 25 MB together at most; nothing else passes 3 MB."""
    models = [p for p in tracked_files() if p.suffix == ".safetensors"]
    others = [p for p in tracked_files() if p not in models and p.stat().st_size > 3_000_000]

    assert sum(p.stat().st_size for p in models) <= 25_000_000
    assert others == []


# What tests take from inside others' libraries, whose faces do not show it, and of ours where
# nothing else could be made to do it.
INSIDE = {
    "_actions": "argparse: the walk over all commands",
    "_option_string_actions": "argparse: the walk over all commands",
    "_request_id": "openai: what its documentation names so",
    "_get_np_dtype": "triton's interpreter",
    "_patch_lang_tensor": "triton's interpreter",
    "_convert_float": "triton's interpreter",
    "_outward_pools": "one client's connections are closed under it",
    "_pool": "instructions are counted of a connection that no socket is behind",
    "_run": "a full disk: a limit of one connection of sqlite",
    "_allocate": "how much memory a worker asks for at once",
}


def test_tests_see_what_anybody_may_see() -> None:
    """A published view, not a private attribute: what is behind it may change."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
                continue
            owner = node.value
            own = isinstance(owner, ast.Name) and owner.id in ("self", "cls", "os")
            of_self = isinstance(owner, ast.Attribute) and owner.attr.startswith("_")
            if not own and not of_self and not node.attr.endswith("__"):
                found.add(node.attr)

    assert sorted(found - INSIDE.keys() - {"_replace", "_asdict", "_fields"}) == []
