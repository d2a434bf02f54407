"""For every field of the router's configuration, and its headers: what shows its effect."""

from __future__ import annotations

from doors_probes import (
    able,
    accepted,
    answer_time,
    background,
    bodies,
    cache_bounds,
    cached,
    chosen,
    ejected,
    embedding_asked_for,
    floor_threshold,
    flushed,
    gateways,
    held,
    kept_decisions,
    kept_of_a_stream,
    never_sent,
    paid,
    patience,
    points,
    prefixes,
    read_in_time,
    reported,
    retries,
    scored,
    served,
    shadowed_share,
    slowly_scored,
    stored,
    trained_every,
    upstream,
)
from doors_rows import Probe, Tests, shown_by

EXTERNAL = {"tiers.kind": "external", "tiers.url": "http://127.0.0.1:1/v1"}
TENANT = {"name": "a", "key_hashes": ["hmac-sha256:" + 64 * "0"]}


def hostile(test: str, word: str = "") -> Tests:
    """A row of the tests of what one client may hold."""
    return shown_by(f"router/test_hostile_clients.py::{test}", word=word)


def shadowed(test: str, word: str = "") -> Tests:
    """A row of the tests of what is learned after an answer."""
    return shown_by(f"router/test_shadow.py::{test}", word=word)


_JUDGED = "test_the_judge_is_asked_by_its_model_and_key_and_its_price_is_booked"
_CAPTURED = "test_captured_prompts_are_redacted_and_features_hold_no_words"


def outward(test: str) -> Tests:
    """A row of the tests of where providers may be."""
    return shown_by(f"router/test_outward.py::{test}")


ROUTER: dict[str, Tests | Probe] = {
    "learning.shadow_share": Probe(
        shadowed_share,
        0.1,
        0.2,
        {"learning.judge": {"type": "Exact"}},
        then=shadowed("test_no_share_means_no_second_answer"),
    ),
    "learning.daily_usd": shadowed("test_the_days_money_is_never_passed_and_survives_a_restart"),
    "learning.judge.type": shadowed("test_rules_take_the_dearest_tiers_answer_for_right"),
    "learning.judge.url": shadowed(_JUDGED),
    "learning.judge.model": shadowed(_JUDGED),
    "learning.judge.api_key_file": shadowed(_JUDGED),
    "learning.judge.usd_per_1m_input_tokens": shadowed(_JUDGED),
    "learning.judge.usd_per_1m_output_tokens": shadowed(_JUDGED),
    "learning.judge.timeout_s": shadowed(
        "test_a_judge_that_gives_no_verdict_costs_labels_and_nothing_else"
    ),
    "learning.capture": shadowed(_CAPTURED),
    "learning.redact": shadowed(_CAPTURED),
    "learning.retention_days": shadowed("test_what_was_captured_is_deleted_after_retention_days"),
    "tenants.learning": shadowed("test_who_names_a_tier_or_opts_out_is_not_asked_again"),
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
        "router/test_engines.py::test_a_tiers_engine_order_says_whether_its_server_is_given_priorities"
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
    "tiers.capabilities.embeddings": Probe(able, False, True, EXTERNAL),
    "tiers.capabilities.generation": Probe(able, False, True, EXTERNAL),
    "tiers.capabilities.context_length": Probe(able, 2, 100, EXTERNAL),
    "tiers.usd_per_1m_input_tokens": shown_by(
        "router/test_money.py::test_cached_and_reasoning_tokens_have_their_prices"
    ),
    "tiers.usd_per_1m_output_tokens": shown_by(
        "router/test_money.py::test_cached_and_reasoning_tokens_have_their_prices"
    ),
    "tiers.token_prices": shown_by(
        "router/test_dashboard.py::test_the_page_says_which_prices_nothing_has_measured"
    ),
    "tiers.usd_per_1m_cached_input_tokens": shown_by(
        "router/test_money.py::test_cached_and_reasoning_tokens_have_their_prices"
    ),
    "tiers.usd_per_1m_reasoning_tokens": shown_by(
        "router/test_money.py::test_cached_and_reasoning_tokens_have_their_prices"
    ),
    "tiers.max_share": shown_by(
        "router/test_floor.py::test_a_largest_share_still_comes_before_the_floor"
    ),
    "fallback_tier": shown_by(
        "router/test_choices.py::test_a_late_predictor_means_the_fallback_tier", word="fallback"
    ),
    "predictor.type": shown_by(
        "router/test_choices.py::test_a_fixed_predictor_sends_everything_to_the_fallback_tier"
    ),
    "predictor.deadline_ms": Probe(slowly_scored, 1.0, 10_000.0),
    "predictor.max_prompt_chars": Probe(scored, 256, 1000),
    "predictor.artifact": shown_by(
        "router/test_live_tiers.py::test_another_kind_of_predictor_or_another_artifact_is_used"
    ),
    "predictor.embedding": Probe(
        embedding_asked_for,
        "/a",
        "/b",
        {"predictor.type": "Learned", "predictor.artifact": "/nowhere"},
        then=shown_by(
            "predictor/test_embedding.py::test_served_numbers_equal_the_estimators_with_the_view"
        ),
    ),
    "predictor.retraining.every_s": Probe(
        trained_every,
        3600.0,
        7200.0,
        {"predictor.type": "Learned", "predictor.artifact": "/nowhere"},
        then=shown_by(
            "router/test_retraining.py::test_a_training_that_dies_is_told_and_changes_nothing"
        ),
    ),
    "predictor.retraining.min_labels": shown_by(
        "router/test_retraining.py::test_a_better_predictor_is_trained_shadowed_and_promoted"
    ),
    "predictor.retraining.by": shown_by(
        "router/test_retraining.py::"
        "test_routers_that_share_a_store_use_the_same_predictor_that_a_job_trained"
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
    "cascade.streams": shown_by(
        "router/test_cascade.py::"
        "test_streams_go_straight_to_their_tier_unless_the_router_says_otherwise",
        "router/test_cascade.py::"
        "test_an_escalation_that_fails_sends_the_small_answer_which_is_paid_once",
        word="cascade",
    ),
    "cascade.deadline_ms": Probe(
        read_in_time,
        1.0,
        10_000.0,
        then=shown_by("router/test_cascade.py::test_a_late_verdict_does_not_count"),
    ),
    "cascade.judge_timeout_s": shown_by(
        "router/test_cascade_judge.py::"
        "test_without_judge_timeout_s_a_judge_sees_no_answer_before_it_is_sent",
        "router/test_cascade_judge.py::"
        "test_a_judge_that_says_nothing_leaves_the_verifier_to_decide",
        word="judge_timeout_s",
    ),
    "cache.enabled": Probe(cached, False, True),
    "cache.max_bytes": Probe(
        cache_bounds,
        2**20,
        2**21,
        {"cache.enabled": True},
        then=shown_by(
            "policy/test_cache.py::test_an_answer_without_a_price_or_above_the_capacity_is_refused",
            word="capacity",
        ),
    ),
    "cache.ttl_s": Probe(
        cache_bounds,
        1.0,
        2.0,
        {"cache.enabled": True},
        then=shown_by(
            "policy/test_cache.py::test_expired_answers_are_not_served_and_free_their_bytes"
        ),
    ),
    "cache.eviction": Probe(cache_bounds, "LEC", "GDSF", {"cache.enabled": True}),
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
    "tenants.max_cost_usd": Probe(
        chosen,
        0.0002,
        0.0004,
        {"tenants": [TENANT]},
        then=shown_by(
            "router/test_money.py::test_a_ceiling_of_a_request_and_of_a_tenant_shortens_too"
        ),
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
    "store.flush_s": Probe(
        flushed,
        1.0,
        2.0,
        {"store.type": "sqlite"},
        then=shown_by(
            "router/test_store.py::test_a_killed_process_loses_at_most_its_last_batch", word="batch"
        ),
    ),
    "store.max_decisions": Probe(
        stored,
        2,
        3,
        {"store.type": "sqlite"},
        then=shown_by("router/test_store.py::test_decisions_are_kept_up_to_a_number_newest_first"),
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
    "limits.max_embedding_inputs": shown_by(
        "router/test_embeddings.py::test_what_is_no_input_is_refused_by_name"
    ),
    "limits.max_sequences": Probe(
        accepted, 4, 8, then=hostile("test_one_request_may_not_be_many", word="sequences")
    ),
    "limits.max_logit_bias": Probe(
        accepted, 4, 8, then=hostile("test_one_request_may_not_be_many", word="logit_bias")
    ),
    "limits.max_logprobs": Probe(
        accepted, 2, 4, then=hostile("test_one_request_may_not_be_many", word="logprobs")
    ),
    "limits.header_timeout_s": Probe(
        served, 1.0, 2.0, then=hostile("test_a_slow_header_is_refused_while_it_is_read")
    ),
    "limits.write_timeout_s": Probe(
        served, 1.0, 2.0, then=hostile("test_a_client_that_never_reads_is_dropped")
    ),
    "limits.max_held_body_bytes": Probe(
        bodies,
        4000,
        40000,
        then=hostile("test_bodies_are_counted_by_sender_and_in_all", word="HeldBodies"),
    ),
    "limits.max_held_body_bytes_per_sender": Probe(
        bodies,
        4000,
        40000,
        then=hostile("test_bodies_are_counted_by_sender_and_in_all", word="HeldBodies"),
    ),
    "limits.max_connections": Probe(
        served, 10, 20, then=hostile("test_health_lives_when_every_connection_is_taken")
    ),
    "limits.max_waiting_connections_per_address": Probe(
        served, 10, 20, then=hostile("test_connections_that_say_nothing_are_bounded_by_address")
    ),
    "outward.only_public": outward(
        "test_in_a_cluster_names_of_the_cluster_are_refused_unless_a_network_is_allowed"
    ),
    "outward.allowed_networks": outward(
        "test_in_a_cluster_names_of_the_cluster_are_refused_unless_a_network_is_allowed"
    ),
    "outward.plain_http_keys": outward("test_a_key_is_not_sent_in_the_clear_unless_that_is_said"),
    "access.allowed_hosts": hostile("test_a_router_answers_to_its_allowed_hosts_only"),
    "access.cors_origins": shown_by(
        "router/test_hostile_clients.py::test_a_page_that_cors_origins_name_may_ask",
        "router/test_hostile_clients.py::test_a_page_of_a_named_origin_asks_first_and_reads_the_reply",
    ),
    "tenants.highest_priority": hostile("test_a_tenant_may_not_jump_the_queue"),
    "failover.wait_s": shown_by(
        "router/test_waiting.py::test_a_tier_is_waited_for_as_long_as_its_settings_say"
    ),
    "failover.wake_s": shown_by(
        "router/test_waiting.py::test_a_tier_that_never_wakes_is_refused_with_a_time_to_come_back"
    ),
    "failover.tier_wait_s": shown_by(
        "router/test_waiting.py::test_a_tier_is_waited_for_as_long_as_its_settings_say"
    ),
    "failover.tier_patience_s": Probe(
        patience,
        0.25,
        0.5,
        {**EXTERNAL, "fallback_tier": "small", "predictor.type": "Fixed"},
        then=shown_by(
            "router/test_tier_faults.py::"
            "test_a_provider_that_hangs_is_left_within_the_default_patience",
            word="patience",
        ),
    ),
    "failover.answer_s_per_token": Probe(answer_time, 0.01, 0.1),
    "failover.retry_share": Probe(retries, 0.2, 0.5),
    "failover.min_retries": Probe(retries, 20, 30),
    "failover.outliers.consecutive_failures": Probe(ejected, 2, 4),
    "failover.outliers.base_ejection_s": Probe(ejected, 10.0, 20.0),
    "failover.outliers.max_ejection_s": Probe(ejected, 40.0, 50.0),
    "failover.outliers.max_ejected_share": Probe(ejected, 0.4, 1.0),
    "failover.max_attempts": shown_by(
        "router/test_waiting.py::test_a_request_is_tried_as_often_as_max_attempts_says"
    ),
    "failover.connect_timeout_s": Probe(
        upstream,
        1.0,
        2.0,
        then=shown_by("router/test_upstream.py::test_an_unreachable_server_is_told_apart"),
    ),
    "failover.stall_timeout_s": Probe(
        upstream,
        1.0,
        2.0,
        then=shown_by("router/test_upstream.py::test_silence_is_a_stall_but_a_slow_stream_is_not"),
    ),
    "failover.dead_after_s": Probe(background, 15.0, 20.0),
    "failover.max_kept_bytes": Probe(
        kept_of_a_stream,
        2000,
        4000,
        then=shown_by(
            "router/test_failover.py::test_journal_stays_within_its_bound_and_forgets_no_token"
        ),
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
        "router/test_upstream.py::test_where_a_slice_names_no_port_the_services_is_asked"
    ),
    "endpoints.api_url": shown_by(
        "router/test_upstream.py::test_slices_are_watched_and_listed_again_after_a_410"
    ),
    "endpoints.credentials_dir": shown_by(
        "router/test_upstream.py::test_slices_are_watched_and_listed_again_after_a_410"
    ),
    "http_port": Probe(served, 8001, 8002),
    "gateway_port": Probe(
        gateways,
        9001,
        9002,
        then=shown_by(
            "gateway/test_envoy.py::test_an_envoy_asks_the_router_where_each_request_goes"
        ),
    ),
    "drain_timeout_s": Probe(served, 10.0, 20.0),
    "decisions_kept": Probe(kept_decisions, 5, 10),
}
