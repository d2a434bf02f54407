"""For every field of the router's and the worker's configuration: the test that shows its effect.

A row is either the tests that show it, by their pytest ids, or a probe: a function of the whole
configuration and two values of the field for which it must give something different. REFUSED
fields exist to say no; their tests show that they do.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandem_router import __main__ as router_command
from tandem_router.api.admin import router_state
from tandem_router.api.app import RouterApp
from tandem_router.config import LimitsConfig, RouterConfig, parse_config
from tandem_router.errors import ApiError
from tandem_router.openai.request import parse_headers, parse_inference
from tandem_router.policy import (
    Overrides,
    PlainScore,
    RouteRequest,
    TenantCeilings,
    TierOption,
    decide,
)
from tandem_router.policy.terms import ScoreStatus
from tandem_router.proxy.arrival import admit
from tandem_router.routing.predictor_source import ArtifactPredictor, Predictor
from tandem_router.routing.scorer import UNSCORED
from tandem_router.testing.two_tiers import CONFIG

Object = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """What two values of a field do, side by side."""

    see: Callable[[RouterConfig], Any]
    a: Any
    b: Any
    given: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Tests:
    """The tests that show a field's effect; word: how they call it, its own name when absent."""

    nodes: tuple[str, ...]
    word: str = ""


def shown_by(*nodes: str, word: str = "") -> Tests:
    """Tests below tests/."""
    return Tests(tuple(f"tests/{node}" for node in nodes), word)


def configured(path: str, value: Any, given: Mapping[str, Any] | None = None) -> RouterConfig:
    """The standard two tiers with a field set."""
    data: Object = json.loads(json.dumps(CONFIG))
    for name, change in {**(given or {}), path: value}.items():
        at: Any = data
        *parents, last = name.split(".")
        for part in parents:
            at = at.setdefault(part, {})
            at = at[0] if isinstance(at, list) else at
        at[last] = change
    return parse_config(json.dumps(data))


def same(path: str, row: Probe) -> bool:
    """Whether nothing shows which of its two values the field has."""
    return bool(
        row.see(configured(path, row.a, row.given)) == row.see(configured(path, row.b, row.given))
    )


# Probes of the router -----------------------------------------------------------------------------

_BODIES = [
    {"prompt": "x", "n": 3},
    {"prompt": "x", "max_tokens": 300},
    {"prompt": "x", "stop": ["a", "b", "c"]},
    {"prompt": "x", "stop": "a long stop string"},
    {"prompt": "x", "metadata": [[[[[[1]]]]]]},
    {"messages": 5 * [{"role": "user", "content": "x"}]},
]


def accepted(config: RouterConfig) -> list[str]:
    """What the router says to requests of several sizes."""
    return [*_bodies(config.limits), _headers(config.limits)]


def _bodies(limits: LimitsConfig) -> list[str]:
    said = []
    for body in _BODIES:
        kind: Any = "chat" if "messages" in body else "completions"
        try:
            parse_inference(kind, json.dumps({"model": "chat", **body}).encode(), limits)
            said.append("taken")
        except ApiError as error:
            said.append(str(error))
    return said


def _headers(limits: LimitsConfig) -> str:
    try:
        parse_headers([(b"x", 2000 * b"y")], limits)
    except ApiError as error:
        return str(error)
    return "taken"


def never_sent(config: RouterConfig) -> Any:
    """What a client is told that promises a body and sends none."""
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-length", b"10")],
        "query_string": b"",
    }
    asyncio.run(app(config)(scope, receive, send))
    return [message.get("body") for message in sent]


def app(config: RouterConfig, predictor: Predictor | None = None) -> RouterApp:
    """A router whose clock stands still and that has no workers."""
    return RouterApp(
        config,
        predictor=predictor,
        endpoints_path=Path(tempfile.gettempdir()) / "no-endpoints.json",
        key_secret=32 * b"k",
        clock=lambda: 0.0,
    )


def held(config: RouterConfig) -> list[str]:
    """What the first tenant's next requests of 100 tokens are told while none has ended."""
    ledger = app(config).services.ledger
    tenant = config.tenants[0].name if config.tenants else "anonymous"
    said = []
    for _ in range(4):
        try:
            ledger.hold(tenant, 100.0)
            said.append("taken")
        except ApiError as error:
            said.append(str(error))
    return said


def reported(config: RouterConfig) -> Any:
    """What /admin/state says of 100 requests of 10 to 1,000 ms."""
    router = app(config)
    services = router.services
    for i in range(1, 101):
        services.routing.latency["small"].saw(i / 100.0, i / 100.0, 0.0)
    return router_state(services, router.settings)["tiers"]


def scored(config: RouterConfig) -> Any:
    """What the predictor makes of a long and of a short prompt."""

    async def ask() -> list[Any]:
        scorer = app(config).services.routing.scorer
        found = [await scorer.score(text) for text in (3_000 * "x", "short")]
        scorer.close()
        return [dict(one.score.quality) for one in found if one.score is not None]

    return asyncio.run(ask())


def paid(config: RouterConfig) -> Any:
    """What a small budget leaves of an answer whose client named no bound."""
    services = app(config).services
    found = []
    for remaining in (0.0005, 0.01):
        request = RouteRequest(
            prompt_tokens=10,
            score=None,
            score_status=ScoreStatus.ABSENT,
            overrides=Overrides(max_cost_usd=remaining),
            tenant=TenantCeilings(),
        )
        options = [
            TierOption(name=t.name, usd_per_1m_output_tokens=t.usd_per_1m_output_tokens)
            for t in config.tiers
        ]
        decision = decide(request, options, services.steering.set_points, services.steering.state)
        found.append(str(decision))
    return found


def prefixes(config: RouterConfig) -> Any:
    """Blocks of a prompt, and how many of them a worker's index keeps."""
    router = app(config)
    router.set_table({"small": {"unified": ("http://127.0.0.1:1",)}})
    (worker,) = router.picker.workers
    chain = router.picker.chain(2048 * b"x")
    worker.prefixes.add(chain)
    return [chain[:1], len(chain), worker.prefixes.num_covered(chain)]


class Artifact(ArtifactPredictor):
    """A learned predictor whose training gains are these."""

    def training_gains(self, dearest: str, cheapest: str) -> list[tuple[float, float]]:
        return [(gain / 100.0, 0.9) for gain in range(100)]


def floor_threshold(config: RouterConfig) -> float:
    """The threshold that holds the floor over the training data."""
    steering = app(config, Artifact(Path("none"), ("small", "large"))).services.steering
    return steering.set_points.gain_threshold


class Slow:
    """Takes 30 ms."""

    def score(self, prompt: str) -> PlainScore:
        time.sleep(0.03)
        return PlainScore({"small": 0.5, "large": 0.9})


def slowly_scored(config: RouterConfig) -> Any:
    """Whether a prediction of 30 ms is in time."""

    async def ask() -> Any:
        scorer = app(config, Slow()).services.routing.scorer
        found = await scorer.score("x")
        scorer.close()
        return found.status

    return asyncio.run(ask())


def background(config: RouterConfig) -> Any:
    """The periods of what runs beside the requests, as its functions are told them."""
    from tandem_router.api import app as module

    told: list[Any] = []

    async def fake(*arguments: Any, **options: Any) -> None:
        told.append([a for a in arguments if isinstance(a, float)])
        told.append({k: v for k, v in options.items() if k.endswith("_s")})

    async def run() -> None:
        async with app(config).running():
            await asyncio.sleep(0)

    kept = module.poll_loads, module.watch_file
    module.poll_loads = module.watch_file = fake  # type: ignore[assignment]
    try:
        asyncio.run(run())
    finally:
        module.poll_loads, module.watch_file = kept
    return told


def served(config: RouterConfig) -> Any:
    """What the HTTP server of `python -m tandem_router` is told."""
    import gc
    import signal

    import uvicorn

    told: list[Any] = []

    class Server:
        started = True

        def __init__(self, options: uvicorn.Config) -> None:
            told.extend([options.port, options.timeout_graceful_shutdown])

        def run(self) -> None:
            return

    kept = uvicorn.Server, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(config.model_dump_json(exclude_unset=True))
        uvicorn.Server = Server  # type: ignore[assignment, misc]
        try:
            router_command.main(["--config", str(file), "--endpoints", str(file)])
        finally:
            uvicorn.Server = kept[0]  # type: ignore[misc]
            signal.signal(signal.SIGTERM, kept[1])
            signal.signal(signal.SIGINT, kept[2])
            gc.unfreeze()
    return told


def kept_decisions(config: RouterConfig) -> int:
    """Decisions that are left of many."""
    log = app(config).services.decisions
    for _ in range(20):
        log.add(None)  # type: ignore[arg-type]
    return len(log._kept)


def cached(config: RouterConfig) -> Any:
    """Whether there is a cache."""
    return app(config).services.reuse.cache is not None


def points(config: RouterConfig) -> Any:
    """The set-points that the policy decides with at the start."""
    return asdict(app(config).services.steering.set_points)


def able(config: RouterConfig) -> list[str]:
    """What requests that need more than text are told of the first tier."""
    services = app(config).services
    said = []
    for more in (
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": 1},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"prompt": [1, 2, 3]},
    ):
        kind: Any = "chat" if "messages" in more else "completions"
        body = json.dumps({"model": "small", "prompt": "x", "max_tokens": 1, **more}).encode()
        request = parse_inference(kind, body, config.limits)
        hold = services.ledger.hold("anonymous", 1.0)
        decision = services.routing.choose(
            request, Overrides(tier="small"), hold, UNSCORED, services.steering.set_points
        )
        said.append(f"{decision.tier}: {decision.message}")
    return said


def answer_time(config: RouterConfig) -> float:
    """How long a whole reply of a hundred tokens may take beyond the deadline."""
    body = b'{"model": "small", "prompt": "x", "max_tokens": 100}'
    request = parse_inference("completions", body, config.limits)
    headers = parse_headers([], config.limits)
    return admit(app(config).services, request, headers, "anonymous", None, "id", 0.0).answer_s


def retries(config: RouterConfig) -> int:
    """How many retries may be under way beside a hundred requests, and beside none."""
    router = app(config)
    return sum(
        sum(router.picker.retries(tier).take(num_inflight) for _ in range(200))
        for tier, num_inflight in (("small", 100), ("large", 0))
    )


def ejected(config: RouterConfig) -> Any:
    """Which failures of two of a tier's four workers eject them, and for how long."""
    router = app(config)
    router.set_table({"small": {"unified": tuple(f"http://127.0.0.1:{n}" for n in range(1, 5))}})
    one, other, *_ = router.picker.workers
    told = [
        [router.picker.outcome(worker, good=False) for _ in range(9)] for worker in (one, other)
    ]
    out: list[float] = []
    for _ in range(4):
        one.outcomes.failed(1000.0 * (len(out) + 1), config.failover.outliers, [])
        out.append(one.outcomes.ejected_until - 1000.0 * (len(out) + 1))
    return told, out


def cache_order(config: RouterConfig) -> Any:
    """What leaves the cache first."""
    cache = app(config).services.reuse.cache
    return None if cache is None else cache.eviction


EXTERNAL = {"tiers.kind": "external", "tiers.url": "http://127.0.0.1:1/v1"}
TENANT = {"name": "a", "key_hashes": ["hmac-sha256:" + 64 * "0"]}


def hostile(test: str, word: str = "") -> Tests:
    """A row of the tests of what one client may hold."""
    return shown_by(f"router/test_hostile_clients.py::{test}", word=word)


ROUTER: dict[str, Tests | Probe] = {
    "name": shown_by(
        "router/test_surface.py::test_models_lists_the_router_its_tiers_and_their_models"
    ),
    "tiers.name": shown_by(
        "router/test_choices.py::test_naming_a_tier_or_its_model_forces_it", word="model"
    ),
    "tiers.engine": shown_by(
        "router/test_engines.py::test_a_stream_of_a_dead_server_goes_on_from_its_ids"
    ),
    "tiers.engine_order": shown_by(
        "router/test_engines.py::test_a_queue_by_priority_is_given_length_or_deadline",
        word="order",
    ),
    "tiers.max_tokens_field": shown_by(
        "router/test_money.py::test_a_provider_gets_the_bound_under_the_name_that_it_reads"
    ),
    "tiers.served_model": shown_by(
        "router/test_choices.py::test_naming_a_tier_or_its_model_forces_it", word="-model"
    ),
    "tiers.kind": shown_by(
        "router/test_proxying.py::test_an_external_tier_gets_its_model_its_key_and_nothing_of_ours"
    ),
    "tiers.url": shown_by(
        "router/test_proxying.py::test_an_external_tier_gets_its_model_its_key_and_nothing_of_ours"
    ),
    "tiers.api_key_file": shown_by(
        "router/test_proxying.py::test_an_external_tier_gets_its_model_its_key_and_nothing_of_ours"
    ),
    "tiers.capabilities.tools": Probe(able, False, True, EXTERNAL),
    "tiers.capabilities.structured_output": Probe(able, False, True, EXTERNAL),
    "tiers.capabilities.images": Probe(able, False, True, EXTERNAL),
    "tiers.capabilities.logprobs": Probe(able, False, True, EXTERNAL),
    "tiers.capabilities.context_length": Probe(able, 2, 100, EXTERNAL),
    "tiers.usd_per_1m_input_tokens": shown_by(
        "router/test_money.py::test_cached_and_reasoning_tokens_have_their_prices"
    ),
    "tiers.usd_per_1m_output_tokens": shown_by(
        "router/test_money.py::test_cached_and_reasoning_tokens_have_their_prices"
    ),
    "tiers.usd_per_1m_cached_input_tokens": shown_by(
        "router/test_money.py::test_cached_and_reasoning_tokens_have_their_prices"
    ),
    "tiers.usd_per_1m_reasoning_tokens": shown_by(
        "router/test_money.py::test_cached_and_reasoning_tokens_have_their_prices"
    ),
    "tiers.max_share": shown_by(
        "policy/test_decide.py::test_max_share_holds_in_every_window_of_recent_requests"
    ),
    "fallback_tier": shown_by(
        "router/test_choices.py::test_a_late_predictor_means_the_fallback_tier", word="fallback"
    ),
    "predictor.type": shown_by(
        "router/test_config.py::test_the_command_ends_with_a_sentence_when_it_cannot_start"
    ),
    "predictor.deadline_ms": Probe(slowly_scored, 1.0, 10_000.0),
    "predictor.max_prompt_chars": Probe(scored, 256, 1000),
    "predictor.embedding": shown_by(
        "predictor/test_embedding.py::test_served_numbers_equal_the_estimators_with_the_view"
    ),
    "predictor.length_midpoint_chars": Probe(scored, 100.0, 400.0),
    "objective.quality_floor": Probe(floor_threshold, 0.8, 0.99),
    "slo.ttft_ms": Probe(reported, 100.0, 500.0),
    "slo.tpot_ms": Probe(reported, 100.0, 500.0),
    "slo.ttft_percentile": Probe(reported, 90.0, 99.0),
    "slo.tpot_percentile": Probe(reported, 90.0, 99.0),
    "budget.usd_per_hour": shown_by(
        "router/test_money.py::test_a_small_budget_shortens_the_answer_and_is_never_exceeded"
    ),
    "budget.on_exhausted": shown_by(
        "router/test_choices.py::test_a_missed_slo_moves_requests_or_sheds_them_as_the_router_says",
        "router/test_failover.py::test_a_full_tier_is_queued_for_where_the_budget_says_so",
    ),
    "budget.max_paid_tokens": Probe(paid, 100, 200),
    "budget.min_paid_tokens": Probe(paid, 1, 10_000),
    "cache.enabled": Probe(cached, False, True),
    "cache.max_bytes": shown_by(
        "policy/test_cache.py::test_an_answer_without_a_price_or_above_the_capacity_is_refused",
        word="capacity",
    ),
    "cache.ttl_s": shown_by(
        "policy/test_cache.py::test_expired_answers_are_not_served_and_free_their_bytes"
    ),
    "cache.eviction": Probe(cache_order, "LEC", "GDSF", {"cache.enabled": True}),
    "tenants.name": shown_by(
        "router/test_admission.py::test_a_tenant_is_held_to_its_rates_and_tiers"
    ),
    "tenants.key_hashes": shown_by("router/test_admission.py::test_keys_are_matched_by_keyed_hash"),
    "tenants.allowed_tiers": shown_by(
        "router/test_admission.py::test_a_tenant_is_held_to_its_rates_and_tiers"
    ),
    "tenants.max_concurrency": Probe(held, 1, 2, {"tenants": [TENANT]}),
    "tenants.requests_per_minute": Probe(held, 1.0, 2.0, {"tenants": [TENANT]}),
    "tenants.tokens_per_minute": Probe(held, 100.0, 200.0, {"tenants": [TENANT]}),
    "tenants.usd_per_hour": shown_by(
        "router/test_admission.py::test_concurrency_and_money_of_a_tenant_are_bounded"
    ),
    "tenants.max_cost_usd": shown_by(
        "router/test_money.py::test_a_ceiling_of_a_request_and_of_a_tenant_shortens_too"
    ),
    "threshold": Probe(points, 0.2, 0.3),
    "replicas": shown_by(
        "router/test_leases.py::test_without_a_shared_store_each_router_has_its_equal_part"
    ),
    "generation": shown_by(
        "router/test_live.py::test_the_mounted_file_is_taken_up_and_a_broken_one_is_said"
    ),
    "routing": shown_by(
        "router/test_live.py::test_advice_is_recorded_and_everything_goes_to_the_fallback_tier"
    ),
    "store.type": shown_by(
        "router/test_live.py::test_a_router_with_a_store_goes_on_counting_after_a_restart"
    ),
    "store.flush_s": shown_by(
        "router/test_store.py::test_a_killed_process_loses_at_most_its_last_batch", word="batch"
    ),
    "store.max_decisions": shown_by(
        "router/test_store.py::test_decisions_are_kept_up_to_a_number_newest_first"
    ),
    "limits.max_body_bytes": shown_by(
        "router/test_surface.py::test_a_body_above_the_limit_is_refused_before_it_is_read"
    ),
    "limits.max_header_bytes": Probe(accepted, 1024, 4096),
    "limits.max_json_depth": Probe(accepted, 4, 20),
    "limits.max_n": Probe(accepted, 2, 4),
    "limits.max_tokens": Probe(accepted, 200, 400),
    "limits.max_stop": Probe(accepted, 2, 4),
    "limits.max_stop_chars": Probe(accepted, 2, 40),
    "limits.max_messages": Probe(accepted, 4, 8),
    "limits.max_inflight": Probe(held, 1, 2),
    "limits.body_timeout_s": Probe(never_sent, 0.01, 0.02),
    "limits.max_sequences": hostile("test_one_request_may_not_be_many", word="sequences"),
    "limits.max_logit_bias": hostile("test_one_request_may_not_be_many", word="logit_bias"),
    "limits.max_logprobs": hostile("test_one_request_may_not_be_many", word="logprobs"),
    "limits.header_timeout_s": hostile("test_a_slow_header_is_refused_while_it_is_read"),
    "limits.write_timeout_s": hostile("test_a_client_that_never_reads_is_dropped"),
    "limits.max_held_body_bytes": hostile(
        "test_bodies_are_counted_by_sender_and_in_all", word="HeldBodies"
    ),
    "limits.max_held_body_bytes_per_sender": hostile(
        "test_bodies_are_counted_by_sender_and_in_all", word="HeldBodies"
    ),
    "limits.max_connections": hostile("test_health_lives_when_every_connection_is_taken"),
    "limits.max_waiting_connections_per_address": hostile(
        "test_connections_that_say_nothing_are_bounded_by_address"
    ),
    "access.allowed_hosts": hostile("test_a_router_answers_to_its_allowed_hosts_only"),
    "access.cors_origins": hostile("test_a_page_that_cors_origins_name_may_ask"),
    "tenants.highest_priority": hostile("test_a_tenant_may_not_jump_the_queue"),
    "failover.wait_s": shown_by(
        "router/test_failover.py::"
        "test_a_stream_survives_every_worker_dying_once_and_waits_for_the_restart"
    ),
    "failover.wake_s": shown_by(
        "router/test_waiting.py::test_a_tier_that_never_wakes_is_refused_with_a_time_to_come_back"
    ),
    "failover.tier_wait_s": shown_by(
        "router/test_waiting.py::"
        "test_a_tier_without_workers_is_replaced_with_a_reason_unless_it_was_named"
    ),
    "failover.tier_patience_s": shown_by(
        "router/test_tier_faults.py::"
        "test_a_provider_that_hangs_is_left_within_the_default_patience",
        word="patience",
    ),
    "failover.answer_s_per_token": Probe(answer_time, 0.01, 0.1),
    "failover.retry_share": Probe(retries, 0.2, 0.5),
    "failover.min_retries": Probe(retries, 20, 30),
    "failover.outliers.consecutive_failures": Probe(ejected, 2, 4),
    "failover.outliers.base_ejection_s": Probe(ejected, 10.0, 20.0),
    "failover.outliers.max_ejection_s": Probe(ejected, 40.0, 50.0),
    "failover.outliers.max_ejected_share": Probe(ejected, 0.4, 1.0),
    "failover.max_attempts": shown_by(
        "router/test_failover.py::test_a_worker_that_is_not_ready_yet_is_waited_for"
    ),
    "failover.connect_timeout_s": shown_by(
        "router/test_upstream.py::test_an_unreachable_server_is_told_apart"
    ),
    "failover.stall_timeout_s": shown_by(
        "router/test_upstream.py::test_silence_is_a_stall_but_a_slow_stream_is_not"
    ),
    "failover.dead_after_s": Probe(background, 15.0, 20.0),
    "failover.max_kept_bytes": shown_by(
        "router/test_failover.py::test_journal_stays_within_its_bound_and_forgets_no_token"
    ),
    "picking.prefix_block_bytes": Probe(prefixes, 128, 256),
    "picking.max_prefix_blocks": Probe(prefixes, 1, 4),
    "picking.max_prefix_entries": Probe(prefixes, 1, 100),
    "picking.load_poll_s": Probe(background, 1.0, 2.0),
    "endpoints.type": shown_by(
        "router/test_upstream.py::test_slices_are_watched_and_listed_again_after_a_410"
    ),
    "endpoints.poll_s": Probe(background, 1.0, 2.0),
    "endpoints.namespace": shown_by(
        "router/test_upstream.py::test_slices_are_watched_and_listed_again_after_a_410"
    ),
    "endpoints.services.tier": shown_by(
        "router/test_upstream.py::"
        "test_slices_become_the_table_without_unready_and_terminating_addresses"
    ),
    "endpoints.services.role": shown_by(
        "router/test_upstream.py::"
        "test_slices_become_the_table_without_unready_and_terminating_addresses"
    ),
    "endpoints.services.service": shown_by(
        "router/test_upstream.py::"
        "test_slices_become_the_table_without_unready_and_terminating_addresses"
    ),
    "endpoints.services.port": shown_by(
        "router/test_upstream.py::"
        "test_slices_become_the_table_without_unready_and_terminating_addresses"
    ),
    "endpoints.api_url": shown_by(
        "router/test_upstream.py::test_slices_are_watched_and_listed_again_after_a_410"
    ),
    "endpoints.credentials_dir": shown_by(
        "router/test_upstream.py::test_slices_are_watched_and_listed_again_after_a_410"
    ),
    "http_port": Probe(served, 8001, 8002),
    "drain_timeout_s": Probe(served, 10.0, 20.0),
    "decisions_kept": Probe(kept_decisions, 5, 10),
}

WORKER: dict[str, Tests | Probe] = {
    "served_model": shown_by("worker/test_server.py::test_errors_are_openai_objects", word="model"),
    "role": shown_by("worker/test_split.py::test_a_unified_worker_has_no_kv_link_and_says_so"),
    "dtype": shown_by("worker/test_models.py::test_logits_equal_those_of_transformers"),
    "device": shown_by("worker/test_warm_up.py::test_warm_up_compiles_on_a_gpu_and_not_on_a_cpu"),
    "block_size": shown_by("worker/test_config.py::test_a_broken_rule_is_named_with_its_value"),
    "kv_cache_bytes": shown_by("worker/test_config.py::test_a_broken_rule_is_named_with_its_value"),
    "num_kv_blocks": shown_by(
        "worker/test_models.py::test_more_kv_blocks_than_memory_are_refused_with_their_size"
    ),
    "max_num_seqs": shown_by(
        "worker/test_options.py::test_a_full_queue_answers_429_with_retry_after"
    ),
    "max_batched_tokens": shown_by(
        "worker/test_scheduler.py::test_decodes_go_first_and_prefill_chunks_fill_the_budget"
    ),
    "max_waiting": shown_by(
        "worker/test_options.py::test_a_full_queue_answers_429_with_retry_after"
    ),
    "max_model_len": shown_by(
        "worker/test_options.py::test_a_context_can_be_filled_to_its_last_token"
    ),
    "scheduler": shown_by(
        "worker/test_scheduler.py::test_sjf_serves_the_shortest_first",
        "worker/test_scheduler.py::test_edf_serves_the_least_slack_first",
        "worker/test_options.py::test_every_order_gives_the_same_answers",
    ),
    "prefix_cache": shown_by(
        "worker/test_kv_blocks.py::test_without_a_prefix_cache_nothing_is_kept"
    ),
    "transfer.transport": shown_by(
        "worker/test_config.py::test_a_broken_rule_is_named_with_its_value"
    ),
    "transfer.max_inflight_bytes": shown_by(
        "transfer/test_tcp_receiver.py::test_too_little_room_for_one_block_is_refused_at_start"
    ),
    "transfer.checksum": shown_by(
        "worker/test_split.py::test_greedy_over_the_split_is_that_of_transformers"
    ),
    "transfer.reserve_timeout_s": shown_by(
        "worker_split/test_split.py::"
        "test_killed_and_frozen_prefill_workers_only_delay_and_a_killed_decode_leaks_nothing"
    ),
    "transfer.attempts": shown_by(
        "worker_split/test_split.py::"
        "test_killed_and_frozen_prefill_workers_only_delay_and_a_killed_decode_leaks_nothing"
    ),
    "http_port": shown_by("worker/test_config.py::test_a_busy_port_is_named", word="port"),
    "kv_port": shown_by(
        "worker_split/test_split.py::test_a_taken_kv_port_ends_a_worker_with_a_sentence"
    ),
    "drain_timeout_s": shown_by(
        "worker/test_server.py::test_a_draining_worker_finishes_what_runs_and_refuses_the_rest",
        word="drain",
    ),
    "local_prefill_max_tokens": shown_by(
        "worker/test_split.py::test_short_prompts_stay_here_when_told_so"
    ),
    "num_threads": shown_by(
        "operator/test_plan.py::test_a_cpu_worker_computes_on_the_cores_that_it_asks_for"
    ),
    "tensor_parallel": shown_by(
        "worker/test_tensor_parallel.py::test_several_ranks_give_the_tokens_of_one"
    ),
    "revision": shown_by(
        "worker/test_split.py::"
        "test_a_prefill_worker_with_other_weights_is_refused_and_costs_no_answer"
    ),
}

# Read by nobody because they are there to be refused; their tests show the sentence.
REFUSED = {"WorkerConfig": frozenset({"block_size", "transfer.transport"})}

# Headers that the docs list for requests, by the package that reads them.
HEADERS: dict[str, Tests] = {
    "x-tandem-quality": shown_by(
        "router/test_choices.py::"
        "test_a_quality_floor_in_a_header_moves_the_request_to_the_large_tier"
    ),
    "x-tandem-max-cost-usd": shown_by(
        "router/test_choices.py::test_a_cost_ceiling_in_a_header_moves_the_request_to_the_small_tier"
    ),
    "x-tandem-ttft-slo-ms": shown_by(
        "policy/test_decide.py::test_a_queue_on_the_large_tier_moves_the_request_to_the_small_one",
        word="ttft_slo_s",
    ),
    "x-tandem-priority": shown_by(
        "router/test_proxying.py::test_prefill_is_named_to_decode_workers_and_never_to_unified_ones"
    ),
    "cache-control": shown_by(
        "router/test_reuse.py::test_what_may_come_out_differently_is_asked_again"
    ),
}


def nodes(table: Mapping[str, Tests | Probe]) -> list[tuple[str, Tests]]:
    """The rows that name tests."""
    return [(path, row) for path, row in table.items() if isinstance(row, Tests)]


def probes(table: Mapping[str, Tests | Probe]) -> list[tuple[str, Probe]]:
    """The rows that try two values."""
    return [(path, row) for path, row in table.items() if isinstance(row, Probe)]


def unknown(table: Mapping[str, Any], known: set[str]) -> list[str]:
    """Rows of fields that do not exist, and fields without a row."""
    gone = (f"{path} does not exist" for path in sorted(set(table) - known))
    missing = (f"{path} has no row" for path in sorted(known - set(table)))
    return list(itertools.chain(gone, missing))
