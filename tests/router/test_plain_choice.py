"""The router's short way to a tier leads where its long way does, whatever the tiers' state."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_router.api.app import RouterApp
from tandem_router.balancing.worker import Load
from tandem_router.config import parse_config
from tandem_router.limits.ledger import ANONYMOUS, Hold
from tandem_router.openai.body import Bodies
from tandem_router.openai.request import parse_inference
from tandem_router.policy import (
    NO_OVERRIDES,
    Capabilities,
    Overrides,
    PlainScore,
    ScoreStatus,
)
from tandem_router.routing.scorer import Scored
from tandem_router.routing.tier_router import Routing
from tandem_router.testing.two_tiers import CONFIG, TIERS

NOW = 1000.0
EXTERNAL = {
    "name": "far",
    "served_model": "far-model",
    "kind": "external",
    "url": "http://127.0.0.1:9/v1",
    "usd_per_1m_input_tokens": 3.0,
    "usd_per_1m_output_tokens": 5.0,
}
times = st.none() | st.floats(0.0, 5.0)
reports = st.builds(
    Load,
    ready=st.booleans(),
    pending_prefill_tokens=st.integers(0, 1000),
    prefill_profile=st.none() | st.just((0.0, 0.001, 0.0)),
    capabilities=st.sampled_from(
        [Capabilities(), Capabilities(tools=False), Capabilities(context_length=100)]
    ),
)
load = st.none() | st.just(Load(prefill_profile=(0.0, 0.001, 0.0))) | reports
tier_state = st.tuples(
    times,
    st.sampled_from([NOW - 1.0, NOW - 60.0]),
    load,
    st.sampled_from([False] * 9 + [True]),
)
odd = st.lists(st.none() | st.floats(-0.2, 1.2), min_size=3, max_size=3)
bodies = st.fixed_dictionaries(
    {"model": st.just("chat"), "messages": st.just([{"role": "user", "content": "hi"}])},
    optional={
        "max_tokens": st.integers(0, 5000),
        "n": st.integers(1, 3),
        "tools": st.just([{"type": "function", "function": {"name": "f"}}]),
    },
)


class Learned:
    """A score whose gains are its own, as a learned predictor's."""

    output_tokens = None
    out_of_distribution = False

    def __init__(self, quality: dict[str, float]) -> None:
        self.quality = self.utility = quality


@cache
def router(changes: str) -> RouterApp:
    fields = {**CONFIG, "predictor": {"type": "Length"}, **json.loads(changes)}
    config = parse_config(json.dumps({**fields, "tiers": [*TIERS, EXTERNAL]}))
    app = RouterApp(config, endpoints_path=Path("none"), clock=lambda: NOW)
    app.set_table({"small": {"unified": ("http://s",)}, "large": {"unified": ("http://l",)}})
    return app


@settings(max_examples=150, deadline=None)
@given(
    states=st.lists(tier_state, min_size=3, max_size=3),
    body=bodies,
    qualities=st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3) | odd,
    status=st.sampled_from([ScoreStatus.OK] * 5 + [ScoreStatus.LATE]),
    is_learned=st.sampled_from([False] * 9 + [True]),
    uses=st.sampled_from([1.0, 3.0]),
    overrides=st.sampled_from([NO_OVERRIDES] * 5 + [Overrides(quality=0.9)]),
    changes=st.sampled_from(
        [{}, {}, {}, {"routing": "Advise"}, {"threshold": 0.5}, {"slo": {"ttft_ms": 500}}]
    ),
    failed=st.sampled_from([frozenset()] * 5 + [frozenset({"far"})]),
)
def test_the_short_way_to_a_tier_leads_where_the_long_one_does(
    states: Any,
    body: Any,
    qualities: Any,
    status: Any,
    is_learned: bool,
    uses: float,
    overrides: Any,
    changes: Any,
    failed: Any,
) -> None:
    app = router(json.dumps(changes))
    services, config = app.services, app.config
    names = [tier.name for tier in config.tiers]
    stated = {n: q for n, q in zip(names, qualities, strict=True) if q is not None}
    score: Any = Learned(stated) if is_learned else PlainScore(stated)
    for name, (ttft_s, updated, report, down) in zip(names, states, strict=True):
        latency = services.routing.latency[name]
        latency.ttft_s, latency.updated = ttft_s, updated
        for worker in app.picker.workers:
            if worker.tier == name:
                worker.load = report if name != "far" else None
                worker.down_until = NOW + 1.0 if down else 0.0
    request = parse_inference("chat", json.dumps(body).encode(), Bodies(config.limits))
    hold = Hold(ANONYMOUS, (), 0.0)
    scored, set_points = Scored(score, status), services.steering.set_points
    choice = (request, overrides, hold, scored, set_points, uses, failed)

    shortly = services.routing.choose(*choice)
    with patch.object(Routing, "_plainly", lambda *_: None):
        fully = services.routing.choose(*choice)

    assert shortly == fully
