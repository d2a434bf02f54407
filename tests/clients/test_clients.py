"""Unchanged clients of other people against a router over fakes: what they print is what they got.

A program per client in `programs/` runs in the environment of its set (`scripts/clients_setup.py`).
"""

from __future__ import annotations

import pytest

from clients_kit import found_by
from tandem_router.testing.live_router import LiveRouter

pytestmark = pytest.mark.slow
SAID, ADDED = "The answer is 42.", "The result is 42."


@pytest.mark.parametrize("name", ["current", "openai2", "openai1"])
def test_openais_python_client_of_three_majors(router: LiveRouter, name: str) -> None:
    assert found_by(name, "openai_client.py", router.url) == {
        "whole": SAID,
        "usage": 10,
        "stream": SAID,
        "stream_usage": 10,
        "agent": ADDED,
        "completion": " 42",
        "vectors": [8, 8],
        "models": ["chat", "small"],
        "model": "small",
        "response": SAID,
        "response_stream": SAID,
        "response_agent": [ADDED, ADDED],
        "tier": "small",
        "request_id": True,
        "unknown": ["NotFoundError", 404, "model_not_found"],
        "explained": "/errors/model_not_found",
        "long": ["BadRequestError", 400, "context_length_exceeded"],
    }


def test_nodes_clients_of_openai_and_anthropic(router: LiveRouter) -> None:
    assert found_by("npm", "node_client.mjs", router.url) == {
        "whole": SAID,
        "stream": SAID,
        "agent": ADDED,
        "vectors": 8,
        "response": SAID,
        "unknown": ["NotFoundError", "model_not_found"],
        "anthropic": SAID,
    }


def test_anthropics_client_with_tools_and_errors(router: LiveRouter) -> None:
    assert found_by("current", "anthropic_client.py", router.url) == {
        "whole": SAID,
        "usage": [5, 5],
        "stream": SAID,
        "agent": [ADDED, ADDED],
        "count": 2,
        "unknown": ["NotFoundError", "not_found_error"],
        "long": ["BadRequestError", "invalid_request_error"],
    }


def test_langchain_with_tools_and_embeddings(router: LiveRouter) -> None:
    assert found_by("current", "langchain_client.py", router.url) == {
        "whole": SAID,
        "stream": SAID,
        "call": ["add", {"a": 12, "b": 30}],
        "agent": ADDED,
        "vectors": [8, 8],
    }


def test_litellm_knows_a_prompt_that_is_too_long_from_every_tier(router: LiveRouter) -> None:
    """Its fallbacks to models with more room look at the words."""
    assert found_by("current", "litellm_client.py", router.url) == {
        "whole": SAID,
        "stream": SAID,
        "vectors": 8,
        "anthropic": SAID,
        "unknown": "NotFoundError",
        "long": "ContextWindowExceededError",
        "long_small": "ContextWindowExceededError",
        "long_worker": "ContextWindowExceededError",
    }


def test_an_agent_of_pydantic_ai(router: LiveRouter) -> None:
    found = found_by("current", "pydantic_ai_client.py", router.url)

    assert found == {"agent": ADDED, "stream": ADDED}


def test_an_agent_of_openais_sdk_over_responses_and_chat(router: LiveRouter) -> None:
    found = found_by("openai_agents", "openai_agents_client.py", router.url)

    items = ["ToolCallItem", "ToolCallOutputItem", "MessageOutputItem"]
    assert found == {
        **dict.fromkeys(("responses", "chat"), ADDED),
        **{f"{name}_calls": items for name in ("responses", "chat")},
        **{f"{name}_stream": [ADDED, ADDED] for name in ("responses", "chat")},
    }


def test_lm_eval_chooses_by_token_ids_and_generates(router: LiveRouter) -> None:
    """By the fake's log-probabilities " a" is likelier than " b", three times of three."""
    found = found_by("evaluations", "evaluate.py", router.url, "evaluate")

    assert found == {"choose": 1.0, "say": [" 42"] * 3}


def test_guidellm_measures(router: LiveRouter) -> None:
    found = found_by("evaluations", "evaluate.py", router.url, "measure")

    assert found == {"guidellm": {"successful": 3}}
