"""For every field of the worker's configuration: what shows its effect, or its refusal."""

from __future__ import annotations

from doors_rows import Probe, Tests, shown_by

_TOLD_APART = "test_two_workers_that_differ_in_a_setting_can_be_told_apart"


def told_apart(*nodes: str, word: str = "") -> Tests:
    """That the setting arrives; nodes: what it does there."""
    return shown_by(f"worker/test_every_setting.py::{_TOLD_APART}", *nodes, word=word)


WORKER: dict[str, Tests | Probe] = {
    "served_model": shown_by(
        "worker/test_server_life.py::test_errors_are_openai_objects", word="model"
    ),
    "role": told_apart("worker/test_split.py::test_a_unified_worker_has_no_kv_link_and_says_so"),
    "dtype": told_apart("worker/test_models.py::test_logits_equal_those_of_transformers"),
    "kv_cache_dtype": told_apart(
        "worker/test_kv_cache_dtype.py::test_bytes_of_a_block_are_counted_with_their_scales"
    ),
    "max_loss": told_apart(
        "worker/test_qualification.py::test_answers_that_lose_more_than_stated_end_the_worker"
    ),
    "device": told_apart("worker/test_warm_up.py::test_warm_up_compiles_on_a_gpu_and_not_on_a_cpu"),
    "block_size": shown_by("worker/test_config.py::test_a_broken_rule_is_named_with_its_value"),
    "kv_cache_bytes": shown_by("worker/test_config.py::test_a_broken_rule_is_named_with_its_value"),
    "num_kv_blocks": told_apart(
        "worker/test_models.py::test_more_kv_blocks_than_memory_are_refused_with_their_size"
    ),
    "max_num_seqs": told_apart(
        "worker/test_options.py::test_a_full_queue_answers_429_with_retry_after"
    ),
    "max_batched_tokens": told_apart(
        "worker/test_scheduler.py::test_decodes_go_first_and_prefill_chunks_fill_the_budget"
    ),
    "max_waiting": shown_by(
        "worker/test_options.py::test_a_full_queue_answers_429_with_retry_after"
    ),
    "max_model_len": told_apart(
        "worker/test_options.py::test_a_context_can_be_filled_to_its_last_token"
    ),
    "scheduler": told_apart(
        "worker/test_scheduler.py::test_sjf_serves_the_shortest_first",
        "worker/test_scheduler.py::test_edf_serves_the_least_slack_first",
        "worker/test_options.py::test_every_order_gives_the_same_answers",
    ),
    "prefix_cache": told_apart(
        "worker/test_kv_blocks.py::test_without_a_prefix_cache_nothing_is_kept"
    ),
    "transfer.transport": shown_by(
        "worker/test_config.py::test_a_broken_rule_is_named_with_its_value"
    ),
    "transfer.max_inflight_bytes": told_apart(
        "transfer/test_tcp_receiver.py::test_too_little_room_for_one_block_is_refused_at_start"
    ),
    "transfer.checksum": told_apart(
        "worker/test_split.py::test_greedy_over_the_split_is_that_of_transformers"
    ),
    "transfer.reserve_timeout_s": told_apart(
        "worker_split/test_split.py::"
        "test_killed_and_frozen_prefill_workers_only_delay_and_a_killed_decode_leaks_nothing"
    ),
    "transfer.attempts": told_apart(
        "worker_split/test_split.py::"
        "test_killed_and_frozen_prefill_workers_only_delay_and_a_killed_decode_leaks_nothing"
    ),
    "http_port": shown_by(
        "worker/test_every_setting.py::test_the_command_serves_and_drains_as_its_configuration_says",
        "worker/test_config.py::test_a_busy_port_is_named",
        word="port",
    ),
    "kv_port": told_apart(
        "worker_split/test_split.py::test_a_taken_kv_port_ends_a_worker_with_a_sentence"
    ),
    "drain_timeout_s": shown_by(
        "worker/test_every_setting.py::test_the_command_serves_and_drains_as_its_configuration_says",
        "worker/test_server_life.py::test_a_draining_worker_finishes_what_runs_and_refuses_the_rest",
        word="drain",
    ),
    "local_prefill_max_tokens": told_apart(
        "worker/test_split.py::test_short_prompts_stay_here_when_told_so"
    ),
    "num_threads": told_apart(
        "operator/test_plan.py::test_a_cpu_worker_computes_on_the_cores_that_it_asks_for"
    ),
    "tensor_parallel": shown_by(
        "worker/test_tensor_parallel.py::test_several_ranks_give_the_tokens_of_one"
    ),
    "revision": told_apart(
        "worker/test_split.py::"
        "test_a_prefill_worker_with_other_weights_is_refused_and_costs_no_answer"
    ),
}

# Read by nobody because they are there to be refused; their tests show the sentence.
REFUSED = {"WorkerConfig": frozenset({"block_size", "transfer.transport"})}
