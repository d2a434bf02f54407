"""No file imports one that imports it: every reader can begin at the bottom."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

PACKAGES = ("tandem_operator", "tandem_router", "tandem_worker", "tandem_kernels")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_goes_in_a_circle(package: str) -> None:
    """Names that are only for types do not count: nothing is imported for them."""
    graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    imported = {
        module: {
            found
            for found in graph.find_modules_directly_imported_by(module)
            # A package's face hands on what its files define, and its files import through it.
            if not found.startswith(module + ".") and not module.startswith(found + ".")
        }
        for module in graph.modules
    }

    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
