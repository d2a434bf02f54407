"""A configuration is taken whole or refused with a sentence that names field and rule."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tandem_router.__main__ import main
from tandem_router.balancing.file_discovery import parse_endpoints
from tandem_router.config import parse_config
from tandem_router.errors import ConfigError

GOOD: dict[str, Any] = {
    "name": "chat",
    "tiers": [{"name": "small", "served_model": "s"}, {"name": "large", "served_model": "l"}],
    "fallback_tier": "large",
}


def test_a_minimal_configuration_is_enough_and_survives_a_round_trip() -> None:
    config = parse_config(json.dumps(GOOD))

    assert parse_config(config.model_dump_json()) == config
    assert config.predictor.deadline_ms == 20


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fallback_tier": "huge"}, "fallback_tier='huge' is not a tier"),
        ({"name": "small"}, "ambiguous"),
        ({"tiers": []}, "tiers"),
        ({"tires": []}, "tires: unknown field"),
        ({"threshold": 2}, "threshold"),
        ({"predictor": {"type": "Magic"}}, "predictor.type"),
        (
            {"tiers": [{"name": "small", "served_model": "s", "capabilities": {"tools": False}}]},
            "workers report theirs",
        ),
        ({"tenants": [{"name": "a", "key_hashes": ["plain"]}]}, "hmac-sha256"),
        ({"tenants": [{"name": "a", "allowed_tiers": ["x"]}]}, "'x' does not exist"),
        ({"tenants": [{"name": "a"}, {"name": "a"}]}, "same name"),
        (
            {"tenants": [{"name": n, "key_hashes": ["hmac-sha256:" + 64 * "0"]} for n in "ab"]},
            "tenants 'a' and 'b' have the same key",
        ),
        ({"budget": {"usd_per_hour": -1}}, "budget.usd_per_hour"),
        ({"endpoints": {"type": "endpointslice", "namespace": "n"}}, "services"),
        (
            {"tiers": [{"name": "small", "served_model": "s", "kind": "external"}]},
            "`url` belongs to kind external",
        ),
        (
            {
                "tiers": [
                    {"name": "small", "served_model": "s"},
                    {"name": "large", "served_model": "s"},
                ]
            },
            "two tiers serve the model name s; give each its own: servedName of a Model",
        ),
    ],
)
def test_a_broken_configuration_is_refused_with_a_sentence(
    change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(json.dumps({**GOOD, **change}), "router.json")

    assert said in str(refused.value)
    assert "router.json" in str(refused.value)


def test_reading_the_configuration_class_imports_nothing_heavy() -> None:
    code = (
        "import sys, tandem_router.config; heavy = ('numpy', 'fastapi', 'torch', 'uvicorn'); "
        "print([name for name in heavy if name in sys.modules])"
    )

    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[]",
        b'{"tiers": {"small": []}}',
        b'{"tiers": {"small": {"worker": []}}}',
        b'{"tiers": {"small": {"unified": "http://a:1"}}}',
        b'{"tiers": {"small": {"unified": ["ftp://a:1"]}}}',
        b'{"tiers": {"small": {"unified": ["http://a:1/path"]}}}',
        b'{"tiers": {"small": {"unified": ["http://a:99999999"]}}}',
        b'{"tiers": {"small": {"unified": [7]}}}',
    ],
)
def test_broken_endpoints_are_refused(text: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_endpoints(text)


def test_endpoints_are_read_in_order_without_repeats() -> None:
    text = b'{"tiers": {"t": {"decode": ["http://b:1/", "http://a:1", "http://b:1"]}}}'

    assert parse_endpoints(text) == {"t": {"decode": ("http://b:1", "http://a:1")}}


@pytest.mark.parametrize(
    ("config", "arguments", "said"),
    [
        (None, [], "cannot be read"),
        (GOOD, [], "--endpoints"),
        (GOOD, ["--endpoints", "e", "--peer-token-file", "/nowhere/token"], "/nowhere/token"),
    ],
)
def test_the_command_ends_with_a_sentence_when_it_cannot_start(
    tmp_path: Any, capsys: Any, config: Any, arguments: list[str], said: str
) -> None:
    path = tmp_path / "router.json"
    if config is not None:
        path.write_text(json.dumps(config))

    status = main(["--config", str(path), *arguments])

    printed = capsys.readouterr().err
    assert status == 2
    assert printed.startswith("error: ")
    assert said in printed
