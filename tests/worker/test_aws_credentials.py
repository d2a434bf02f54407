"""Downloads from S3 as the pod's ServiceAccount: whose keys sign, and when they are renewed."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs

import httpx
import pytest

from tandem_worker.models.aws_credentials import EARLY_S, Credentials
from tandem_worker.models.fetching import WeightsError

EXPIRES_S = 1_767_225_600.0  # 2026-01-01T00:00:00Z


def sts_reply(key: str) -> str:
    return (
        '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
        "<AssumeRoleWithWebIdentityResult><Credentials>"
        f"<AccessKeyId>{key}</AccessKeyId><SecretAccessKey>s</SecretAccessKey>"
        "<SessionToken>t</SessionToken><Expiration>2026-01-01T00:00:00Z</Expiration>"
        "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
    )


class FakeAws:
    """STS and the agent of EKS Pod Identity."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.status = 200

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        number = len(self.requests)
        if request.method == "POST":
            return httpx.Response(self.status, text=sts_reply(f"key-{number}"))
        body = {
            "AccessKeyId": "agent",
            "SecretAccessKey": "s",
            "Token": "t",
            "Expiration": "2026-01-01T00:00:00Z",
        }
        return httpx.Response(self.status, json=body)


@pytest.fixture
def aws() -> FakeAws:
    return FakeAws()


def credentials(aws: FakeAws, env: dict[str, str], now: list[float]) -> Credentials:
    client = httpx.Client(transport=httpx.MockTransport(aws))
    return Credentials(env, client, lambda: now[0])


def role_env(folder: Path) -> dict[str, str]:
    token = folder / "token"
    token.write_text("jwt\n")
    return {
        "AWS_ROLE_ARN": "arn:aws:iam::1:role/weights",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
        "AWS_REGION": "eu-west-1",
    }


def test_a_service_accounts_role_is_taken_and_renewed_before_its_keys_expire(
    aws: FakeAws, tmp_path: Path
) -> None:
    now = [EXPIRES_S - 2 * EARLY_S]
    found = credentials(aws, role_env(tmp_path), now)

    assert [found.current(), found.current()] == 2 * [found.current()]
    assert len(aws.requests) == 1
    asked = parse_qs(aws.requests[0].content.decode())
    assert str(aws.requests[0].url) == "https://sts.eu-west-1.amazonaws.com"
    assert asked["Action"] == ["AssumeRoleWithWebIdentity"]
    assert asked["RoleArn"] == ["arn:aws:iam::1:role/weights"]
    assert asked["WebIdentityToken"] == ["jwt"]

    now[0] = EXPIRES_S - EARLY_S / 2
    later = found.current()
    assert later is not None
    assert (later.key, later.session, len(aws.requests)) == ("key-2", "t", 2)


def test_a_pods_identity_is_asked_of_its_agent(aws: FakeAws, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("pod-token")
    env = {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://169.254.170.23/v1/credentials",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(tmp_path / "token"),
    }
    found = credentials(aws, env, [0.0]).current()

    assert found is not None
    assert (found.key, found.session) == ("agent", "t")
    assert aws.requests[0].headers["authorization"] == "pod-token"


def test_static_keys_come_first_and_none_at_all_leave_requests_unsigned(
    aws: FakeAws, tmp_path: Path
) -> None:
    static = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", **role_env(tmp_path)}
    found = credentials(aws, static, [0.0]).current()

    assert found is not None
    assert (found.key, found.session) == ("k", "")
    assert credentials(aws, {}, [0.0]).current() is None
    assert aws.requests == []


@pytest.mark.parametrize("status", [403, 500])
def test_a_role_that_does_not_trust_the_pod_is_a_sentence(
    aws: FakeAws, tmp_path: Path, status: int
) -> None:
    aws.status = status

    with pytest.raises(WeightsError, match=f"HTTP {status}; check the annotation") as refused:
        credentials(aws, role_env(tmp_path), [0.0]).current()
    assert "jwt" not in str(refused.value)
