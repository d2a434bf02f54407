"""Who a download is towards AWS: static keys, the pod's ServiceAccount, or the pod's own identity.

The variables are those that AWS's own webhooks set in a pod; keys that expire are fetched again
before they do.
"""

from __future__ import annotations

import datetime
import json
import time
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from tandem_worker.models.fetching import WeightsError

EARLY_S = 300.0
MAX_REPLY_BYTES = 65536
_STS = "{https://sts.amazonaws.com/doc/2011-06-15/}"


@dataclass(frozen=True)
class Keys:
    """What signs requests; without a session for keys that do not expire."""

    key: str
    secret: str
    session: str = ""
    expires_s: float = float("inf")


class Credentials:
    """The keys of this moment.

    Args:
        env: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN; else
            AWS_WEB_IDENTITY_TOKEN_FILE, AWS_ROLE_ARN, AWS_REGION, AWS_ENDPOINT_URL_STS; else
            AWS_CONTAINER_CREDENTIALS_FULL_URI, AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE.
        now: the time, seconds since 1970.
    """

    def __init__(
        self, env: Mapping[str, str], http: httpx.Client, now: Callable[[], float] = time.time
    ) -> None:
        self._env = env
        self._http = http
        self._now = now
        self._held: Keys | None = None

    def current(self) -> Keys | None:
        """The keys; None where there are none, so that requests go unsigned.

        Raises:
            WeightsError: AWS gives none to this pod.
        """
        key = self._env.get("AWS_ACCESS_KEY_ID")
        secret = self._env.get("AWS_SECRET_ACCESS_KEY")
        if key and secret:
            return Keys(key, secret, self._env.get("AWS_SESSION_TOKEN", ""))
        if self._held is None or self._now() > self._held.expires_s - EARLY_S:
            self._held = self._fetched()
        return self._held

    def _fetched(self) -> Keys | None:
        env = self._env
        if (path := env.get("AWS_WEB_IDENTITY_TOKEN_FILE")) and (role := env.get("AWS_ROLE_ARN")):
            region = env.get("AWS_REGION") or "us-east-1"
            service = env.get("AWS_ENDPOINT_URL_STS") or f"https://sts.{region}.amazonaws.com"
            query = {
                "Action": "AssumeRoleWithWebIdentity",
                "Version": "2011-06-15",
                "RoleArn": role,
                "RoleSessionName": env.get("AWS_ROLE_SESSION_NAME") or "tandem",
                "WebIdentityToken": _token(path),
            }
            body = urllib.parse.urlencode(query)
            form = {"content-type": "application/x-www-form-urlencoded"}
            what = f"role {role}"
            return _of_sts(self._ask("POST", service, form, body, what), what)
        if uri := env.get("AWS_CONTAINER_CREDENTIALS_FULL_URI"):
            file = env.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
            headers = {"authorization": _token(file)} if file else {}
            what = "the pod's identity"
            return _of_agent(self._ask("GET", uri, headers, "", what), what)
        return None

    def _ask(
        self, method: str, url: str, headers: Mapping[str, str], body: str, what: str
    ) -> bytes:
        try:
            reply = self._http.request(method, url, headers=dict(headers), content=body)
        except httpx.HTTPError as error:
            raise WeightsError(f"{what}: no connection ({error}); check the network") from error
        if reply.status_code != 200 or len(reply.content) > MAX_REPLY_BYTES:
            raise WeightsError(
                f"{what}: HTTP {reply.status_code}; check the annotation of the ServiceAccount and "
                "whom the role trusts"
            )
        return reply.content


def _token(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error


def _of_sts(body: bytes, what: str) -> Keys:
    try:
        if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
            raise ValueError("a document type")
        found = ET.fromstring(body).find(f".//{_STS}Credentials")
        if found is None:
            raise ValueError("no Credentials")
        text = {e.tag.removeprefix(_STS): e.text or "" for e in found}
        return Keys(
            text["AccessKeyId"],
            text["SecretAccessKey"],
            text["SessionToken"],
            _seconds(text["Expiration"]),
        )
    except (ET.ParseError, ValueError, KeyError) as error:
        raise WeightsError(f"{what}: the answer of STS cannot be read: {error}") from error


def _of_agent(body: bytes, what: str) -> Keys:
    try:
        found = json.loads(body)
        return Keys(
            str(found["AccessKeyId"]),
            str(found["SecretAccessKey"]),
            str(found["Token"]),
            _seconds(str(found["Expiration"])),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{what}: the answer of its agent cannot be read: {error}") from error


def _seconds(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()
