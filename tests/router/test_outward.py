"""External tiers are asked at addresses that an outsider may have, whatever a name answers."""

from __future__ import annotations

import json
import socket
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.config import parse_config
from tandem_router.config.addresses import Outward, networks, numeric, shows_key
from tandem_router.errors import ApiError, ConfigError, UnreachableError
from tandem_router.http.client import UpstreamClient
from tandem_router.openai.body import Bodies
from tandem_router.openai.request import parse_inference
from tandem_router.testing.fake_provider import FakeProvider
from tandem_router.testing.two_tiers import CONFIG, TIERS

CLUSTER = Outward(only_public=True)
METADATA = ("169.254.169.254", "fd00:ec2::254", "fe80::1", "100.100.100.200", "168.63.129.16")
INSIDE = ("10.96.0.1", "172.16.0.1", "192.168.1.1", "127.0.0.1", "::1", "fd00::1", "100.64.0.1")
OUTSIDE = ("8.8.8.8", "2606:4700::1111")


def config(url: str, key: bool = False, **outward: Any) -> str:
    keyed = {"api_key_file": "/key"} if key else {}
    tier = {**TIERS[1], "kind": "external", "url": url, **keyed}
    return json.dumps({**CONFIG, "tiers": [TIERS[0], tier], "outward": outward})


@pytest.mark.parametrize("address", METADATA)
def test_metadata_and_link_local_addresses_are_refused_everywhere(address: str) -> None:
    assert Outward().refused(ip_address(address)) is not None
    assert Outward(allowed=networks(["0.0.0.0/0", "::/0"])).refused(ip_address(address)) is None


@pytest.mark.parametrize("address", INSIDE)
def test_a_cluster_refuses_private_addresses_unless_their_network_is_allowed(address: str) -> None:
    allowing = Outward(only_public=True, allowed=networks([address]))

    assert Outward().refused(ip_address(address)) is None
    assert CLUSTER.refused(ip_address(address)) is not None
    assert allowing.refused(ip_address(address)) is None


@pytest.mark.parametrize("address", OUTSIDE)
def test_public_addresses_are_never_refused(address: str) -> None:
    assert CLUSTER.refused(ip_address(address)) is None


@pytest.mark.parametrize(
    "address", ["::169.254.169.254", "64:ff9b:1::a9fe:a9fe", "fec0::1", "2002:a9fe:a9fe::"]
)
def test_no_ipv6_address_stands_for_an_inner_one(address: str) -> None:
    assert CLUSTER.refused(ip_address(address)) is not None


@given(st.sampled_from([each for each in METADATA + INSIDE if ":" not in each]))
def test_no_spelling_of_an_address_passes(address: str) -> None:
    """Decimal, hexadecimal, octal, short, and inside of IPv6: what a resolver takes."""
    value = int(ip_address(address))
    parts = address.split(".")
    spellings = [
        str(value),
        hex(value),
        "0" + oct(value)[2:],
        ".".join(hex(int(part)) for part in parts),
        f"{parts[0]}.{value & 0xFFFFFF}",
        f"{parts[0]}.{parts[1]}.{value & 0xFFFF}",
        f"[::ffff:{address}]",
        f"[64:ff9b::{address}]",
        f"[2002:{value >> 16:x}:{value & 0xFFFF:x}::]",
    ]
    for spelling in spellings:
        assert CLUSTER.refused_url(f"http://{spelling}:80/v1") is not None, spelling


@given(st.text(alphabet="0123456789abcdefx.", max_size=18))
def test_an_address_is_read_as_the_system_reads_it(host: str) -> None:
    try:
        expected = socket.inet_aton(host)
    except OSError:
        return

    number = numeric(host)

    assert number is not None
    assert number.packed == expected


@pytest.mark.parametrize(
    "url",
    [
        "http://metadata.google.internal/v1",
        "http://user:pw@api.example/v1",
        "https://[fe80::1]/v1",
        "http://169.254.169.254/v1",
    ],
)
def test_a_configuration_that_names_such_a_place_is_refused_with_the_next_step(url: str) -> None:
    with pytest.raises(ConfigError, match=r"tier 'large': url .*outward.allowed_networks"):
        parse_config(config(url))


@pytest.mark.parametrize(
    "url",
    [
        "http://models/v1",
        "https://x.team.svc/v1",
        "https://x.svc.cluster.local/v1",
        "http://[::1]/",
    ],
)
def test_in_a_cluster_names_of_the_cluster_are_refused_unless_a_network_is_allowed(
    url: str,
) -> None:
    with pytest.raises(ConfigError, match="cluster"):
        parse_config(config(url, only_public=True))
    parse_config(config(url, only_public=True, allowed_networks=["10.0.0.0/8", "::1/128"]))


def test_a_key_is_not_sent_in_the_clear_unless_that_is_said() -> None:
    with pytest.raises(ConfigError, match="plain http, which shows the API key"):
        parse_config(config("http://api.example/v1", key=True))

    for url in ("https://api.example/v1", "http://127.0.0.1:8000/v1", "http://localhost/v1"):
        parse_config(config(url, key=True))
    parse_config(config("http://api.example/v1", key=True, plain_http_keys=True))
    assert shows_key("http://127.0.0.1.evil.example/v1")


async def test_what_a_name_answers_is_checked_at_every_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DNS rebinding: the name is asked once, and the address that was checked is connected to."""
    provider = await FakeProvider().start()
    answers = ["169.254.169.254", "127.0.0.1", "10.0.0.7"]
    allowed = Outward(only_public=True, allowed=networks(["127.0.0.0/8"]))
    client = UpstreamClient(outward=allowed, connect_timeout_s=1.0)
    real = socket.getaddrinfo

    def lookup(host: str, port: int, *rest: Any, **more: Any) -> Any:
        return real(answers.pop(0) if host == "rebound.example" else host, port, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    url = f"http://rebound.example:{provider.port}/v1/chat/completions"
    with pytest.raises(UnreachableError, match="link-local or metadata"):
        await client.request("POST", url, body=b"{}", outward=True)
    response = await client.request("POST", url, body=b"{}", outward=True)
    assert response.status == 200
    await response.read_all()
    client.abandon(url, "another connection")
    response.close()
    for pool in client._outward_pools.values():
        pool.close()
    with pytest.raises(UnreachableError, match="not a public address"):
        await client.request("POST", url, body=b"{}", outward=True)
    client.close()
    await provider.stop()


async def test_a_client_reads_nothing_of_where_a_tier_may_not_be(
    run_router: Any, make_config: Any
) -> None:
    """Its name passes at the start; at the connection the tier cannot be reached."""
    tier = {**TIERS[1], "kind": "external", "url": "http://localhost:1/v1"}
    outward = {"only_public": True, "allowed_networks": ["192.0.2.0/24"]}

    async with run_router({}, tiers=[TIERS[0], tier], outward=outward) as (client, _):
        reply = await client.chat(model="large")

    assert reply.status == 502
    assert "cannot be reached" in reply.error["message"]
    assert "127.0.0.1" not in reply.body.decode()


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "HTTPS://[::ffff:a9fe:a9fe]/x.png",
        "http://0xa9fea9fe/",
        "http://10.0.0.1/x.png",
        "http://db.team.svc/x.png",
        "file:///var/run/secrets/token",
        " file:/etc/passwd",
        "gopher://x/",
    ],
)
async def test_no_image_makes_a_server_of_ours_ask_inside(
    run_router: Any, make_worker: Any, url: str
) -> None:
    worker = await make_worker()
    outward = {"only_public": True}
    async with run_router({"large": {"decode": [worker]}}, outward=outward) as (client, _):
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        refused = await client.chat(messages=[{"role": "user", "content": parts}])

    assert refused.status == 400
    assert "data: URL" in refused.error["message"]
    assert worker.inference == []


@pytest.mark.parametrize(
    "said",
    [
        {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.0.0.1"}},
        {"ec_transfer_params": {}},
        {"vllm_xargs": {"kv_transfer_params": {"remote_host": "10.0.0.1"}}},
        {"tandem": {"resume_token_ids": [[1]]}},
        {"chat_template": "{% for x in range(10**9) %}{% endfor %}"},
    ],
    ids=str,
)
def test_what_servers_say_to_each_other_no_client_says(make_config: Any, said: Any) -> None:
    """A KV transfer's parameters would fetch another tenant's blocks; a template is a program."""
    turn, bodies = {"role": "user", "content": "hello"}, Bodies(make_config().limits)
    body = json.dumps({"model": "large", "messages": [turn], **said}).encode()

    with pytest.raises(ApiError, match=r"reserved for the router|not taken from requests"):
        parse_inference("chat", body, bodies)


@pytest.mark.parametrize(
    "said",
    [
        {"cache_salt": "mine"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"priority": 3},
        {"return_token_ids": True},
    ],
    ids=str,
)
async def test_what_only_our_workers_understand_reaches_no_provider(
    run_router: Any, said: dict[str, Any]
) -> None:
    provider = await FakeProvider().start()
    tiers = [{**tier, "kind": "external", "url": f"{provider.url}/v1"} for tier in TIERS]
    async with run_router({}, tiers=tiers) as (client, _):
        await client.chat(model="large", **said)
    await provider.stop()

    asked = [seen.json for seen in provider.seen if seen.path.endswith("/chat/completions")]
    assert not any(name in body for body in asked for name in said)
    assert asked
