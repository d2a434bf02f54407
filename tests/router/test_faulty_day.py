"""A day of random faults in seconds: nothing is lost, wrong, unbooked or shown.

`benchmarks/faults.py` runs days of ten minutes with the router's own time-outs.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from faulty_day.schedule import OF_PROVIDERS, OF_WORKERS, POOL, TIERS, WORKERS, day  # noqa: E402


async def test_nothing_is_lost_wrong_unbooked_or_shown(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "benchmarks" / "faults.py")),
        *("--minutes", "0.15", "--seed", "1", "--rate", "15", "--hurried"),
        *("--json", str(tmp_path / "day.json")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    told = json.loads((tmp_path / "day.json").read_text())

    assert process.returncode == 0, said.decode()
    assert [told[name] for name in ("lost", "wrong", "unbooked", "leaked")] == [0] * 4
    assert told["answered"] > 50
    assert told["moved"] > 5
    assert 0.0 < told["due_usd"] <= told["booked_usd"] < 2.0 * told["due_usd"]


@given(st.integers(0, 10**6))
def test_some_tier_is_well_at_every_moment_of_a_day(seed: int) -> None:
    episodes = day(seed, 600.0, 40.0, 10.0)
    met = {(each.tier, each.kind) for each in episodes}

    for moment in [each.start_s for each in episodes] + [each.end_s for each in episodes]:
        sick = {
            each.tier for each in episodes if each.disables and each.start_s <= moment < each.end_s
        }
        assert len(sick) < len(TIERS)
    assert {kind for tier, kind in met if tier == POOL} == set(OF_WORKERS)
    assert all(len(each.workers) <= WORKERS for each in episodes)
    assert {kind for tier, kind in met if tier != POOL} >= set(OF_PROVIDERS) - {"key rotated"}
