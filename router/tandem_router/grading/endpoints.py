"""Who is asked: tiers of a Router, running or as a file, or OpenAI-compatible endpoints by name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tandem_router.grading.errors import GradingError

#: Name of a whole Router that is asked to route; no tier can have it.
ROUTER = "the Router"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One model that can be asked at `url` + /chat/completions; prices in dollars per 1M tokens.

    `key_variable` names the environment variable that `key` was read from.
    """

    name: str
    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    key_variable: str = ""
    usd_per_1m_input: float | None = None
    usd_per_1m_output: float | None = None
    router: bool = False

    def fingerprint(self) -> dict[str, str]:
        """What makes an answer this endpoint's: compared when a run is resumed."""
        return {"name": self.name, "url": self.url, "model": self.model}

    def identity(self) -> str:
        """The model and where it is, in one word for a journal's key."""
        return f"{self.model}@{self.url}"

    def cost_usd(self, prompt_tokens: float, output_tokens: float) -> float | None:
        if self.usd_per_1m_input is None or self.usd_per_1m_output is None:
            return None
        return (
            prompt_tokens * self.usd_per_1m_input + output_tokens * self.usd_per_1m_output
        ) / 1e6

    def list_price(self) -> float | None:
        return self.cost_usd(1e6, 1e6)


def base_url(text: str, option: str) -> str:
    """A base URL up to and including /v1. Raises GradingError for what is no URL."""
    try:
        parts = urlsplit(text.strip())
        port = parts.port
    except ValueError as error:
        raise GradingError(f"{option}: {text!r} is not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise GradingError(
            f"{option}: {text!r} is not a URL; write it like http://127.0.0.1:8000/v1"
        )
    if parts.username or parts.password:
        raise GradingError(f"{option}: leave user and password out of the URL; use --key")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{path or '/v1'}"


def parse_tier(text: str, option: str = "--tier") -> Endpoint:
    """``NAME=URL#MODEL``. Raises GradingError with what is missing."""
    name, equals, rest = text.partition("=")
    url, _, model = rest.partition("#")
    if not equals or not url or not _NAME.fullmatch(name):
        raise GradingError(
            f"{option} {text!r} is not NAME=URL#MODEL, such as "
            "small=http://127.0.0.1:9000/v1#qwen-1b"
        )
    if not model:
        raise GradingError(f"{option} {text!r} names no model; end it with #MODEL")
    return Endpoint(name, base_url(url, option), model)


def parse_judge(text: str) -> Endpoint:
    """``URL#MODEL``. Raises GradingError with what is missing."""
    url, _, model = text.partition("#")
    if not model:
        raise GradingError(f"--judge {text!r} names no model; write URL#MODEL")
    return Endpoint("judge", base_url(url, "--judge"), model)


def parse_price(text: str, option: str) -> tuple[float, float]:
    """``IN/OUT`` in dollars per million tokens."""
    given, slash, made = text.partition("/")
    try:
        prices = float(given), float(made)
    except ValueError:
        prices = (-1.0, -1.0)
    if not slash or not all(0 <= price < 1e6 for price in prices):
        raise GradingError(
            f"{option} {text!r} is not IN/OUT in dollars per million tokens, such as 0.15/0.60"
        )
    return prices


def named(values: Sequence[str], option: str, known: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` of an option that may stand several times; names must be tiers."""
    found: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise GradingError(f"{option} {text!r} is not NAME=VALUE")
        if name not in known:
            raise GradingError(
                f"{option} {text!r}: there is no tier {name!r}; the tiers are {', '.join(known)}"
            )
        found[name] = value
    return found


def with_prices(tiers: Sequence[Endpoint], prices: Mapping[str, str]) -> list[Endpoint]:
    found = []
    for tier in tiers:
        if tier.name in prices:
            given, made = parse_price(prices[tier.name], f"--price {tier.name}=")
            tier = replace(tier, usd_per_1m_input=given, usd_per_1m_output=made)
        found.append(tier)
    return found


def with_key(
    endpoint: Endpoint, variable: str | None, environment: Mapping[str, str] = os.environ
) -> Endpoint:
    """The endpoint with its key, from the named variable or the customary one.

    A key is sent only where it was named for: OPENAI_API_KEY to api.openai.com, TANDEM_API_KEY to
    a Router. Raises GradingError where a named one is not set, or a key cannot be sent.
    """
    name = variable
    if name is None and urlsplit(endpoint.url).hostname == "api.openai.com":
        name = "OPENAI_API_KEY"
    elif name is None and endpoint.router:
        name = "TANDEM_API_KEY"
    key = environment.get(name) if name else None
    if not name or not key:
        if variable is not None:
            raise GradingError(
                f"the variable {variable}, named for {endpoint.name}'s key, is not set; export it"
            )
        return endpoint
    if not (key.isascii() and key.isprintable()):
        raise GradingError(f"the key in {name} holds characters that no header can; set it again")
    return replace(endpoint, key=key, key_variable=name)


def check(tiers: Sequence[Endpoint]) -> None:
    """Raises GradingError for names that come twice, or for no tier at all."""
    names = [tier.name for tier in tiers]
    again = next((name for name in names if names.count(name) > 1), None)
    if again:
        raise GradingError(f"two tiers are called {again!r}; give each its own name")
    if not tiers:
        raise GradingError(
            "nobody to ask; name a Router (--router FILE or URL) or tiers (--tier NAME=URL#MODEL)"
        )


def of_state(url: str, state: Mapping[str, Any]) -> list[Endpoint]:
    """The tiers of a running Router, from what its /admin/state says."""
    found = []
    for tier in state.get("tiers") or []:
        if isinstance(tier, dict) and isinstance(tier.get("name"), str):
            names = ("usd_per_1m_input_tokens", "usd_per_1m_output_tokens")
            prices = [
                _price(tier.get(each), f"{url}, tier {tier['name']}: {each}") for each in names
            ]
            free = not any(prices)
            found.append(
                Endpoint(
                    tier["name"],
                    url,
                    tier["name"],
                    usd_per_1m_input=None if free else prices[0],
                    usd_per_1m_output=None if free else prices[1],
                    router=True,
                )
            )
    return found


def of_file(path: Path, url: str) -> list[Endpoint]:
    """The tiers of the Router in a YAML file: external ones at their own URL, others through `url`.

    Raises GradingError where the file holds no Router, or more than one.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise GradingError(f"--router {path} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise GradingError(f"cannot read --router {path}: {error}") from error
    except yaml.YAMLError as error:
        raise GradingError(f"--router {path} is not YAML: {str(error)[:200]}") from error
    routers = [d for d in documents if isinstance(d, dict) and d.get("kind") == "Router"]
    if len(routers) != 1:
        raise GradingError(
            f"--router {path} holds {len(routers)} resources of kind Router; name a file with one"
        )
    spec = routers[0].get("spec")
    tiers = spec.get("tiers") if isinstance(spec, dict) else None
    if not isinstance(tiers, list) or not tiers:
        raise GradingError(f"--router {path}: its Router has no spec.tiers")
    return [_of_spec(tier, path, url) for tier in tiers]


def _of_spec(tier: Any, path: Path, url: str) -> Endpoint:
    name = tier.get("name") if isinstance(tier, dict) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise GradingError(f"--router {path}: a tier has no name")
    external = tier.get("external")
    source = external if isinstance(external, dict) else tier
    names = ("usdPer1MInputTokens", "usdPer1MOutputTokens")
    given, made = (None, None)
    if any(source.get(each) for each in names):
        given, made = (_price(source.get(each), f"{path}, tier {name}: {each}") for each in names)
    if not isinstance(external, dict):
        return Endpoint(
            name, url, name, usd_per_1m_input=given, usd_per_1m_output=made, router=True
        )
    if not isinstance(external.get("url"), str) or not isinstance(external.get("model"), str):
        raise GradingError(f"--router {path}: the external tier {name} needs a url and a model")
    address = base_url(external["url"], f"--router {path}, tier {name}")
    return Endpoint(
        name, address, external["model"], usd_per_1m_input=given, usd_per_1m_output=made
    )


def _price(value: Any, where: str) -> float:
    """A price of a Router, absent being free. Raises GradingError for what is none."""
    try:
        price = float(value) if value is not None else 0.0
    except (TypeError, ValueError):
        price = -1.0
    if not 0.0 <= price < 1e6:
        raise GradingError(
            f"--router {where} is {value!r}, not dollars per million tokens, such as 0.15; "
            "correct it there"
        )
    return price
