"""The plan of the house: rooms stand on floors, every import goes down, and few of them are needed.

docs/decisions/0188 says what was planned and why it is what it is.
"""

from __future__ import annotations

import re
import sys
from graphlib import CycleError
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from reference import rooms  # noqa: E402

# (rooms, floors, arrows): who adds one sees it here, and says in docs/architecture.md what for.
MOST = {
    "operator": (14, 6, 36),
    "router": (22, 11, 98),
    "predictor": (11, 9, 42),
    "worker": (15, 8, 45),
}


@pytest.mark.parametrize("name", rooms.PLANS)
def test_a_package_has_few_rooms_floors_and_arrows_and_none_runs_up(name: str) -> None:
    counted = rooms.figures(rooms.rooms(*rooms.PLANS[name]))

    assert all(n <= most for n, most in zip(counted, MOST[name], strict=True)), counted


@pytest.mark.parametrize("name", rooms.PLANS)
def test_the_picture_shows_the_rooms_that_are_there(name: str) -> None:
    picture = (rooms.PICTURES / f"rooms-{name}.svg").read_text(encoding="utf-8")

    assert set(re.findall(r">([a-z_]+)</text>", picture)) == set(rooms.rooms(*rooms.PLANS[name])), (
        "`make reference` draws it anew; commit the result"
    )


def test_a_circle_of_rooms_is_found() -> None:
    uses = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a")}

    with pytest.raises(CycleError):
        rooms.floors(uses)


def test_an_arrow_that_a_longer_way_implies_is_counted_and_not_drawn() -> None:
    plan = {"a": frozenset("bc"), "b": frozenset("c"), "c": frozenset()}

    assert rooms.figures(plan) == (3, 3, 3)
    assert rooms.svg("test", plan).count("marker-end") == 2
