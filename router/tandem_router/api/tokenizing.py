"""Text to token ids and back, and how many tokens a message is: asked of a worker of the tier."""

from __future__ import annotations

import json

import msgspec

from tandem_router.anthropic.request import to_counted_chat
from tandem_router.api.api_keys import Caller
from tandem_router.engines import engine_of
from tandem_router.errors import ApiError, UpstreamError
from tandem_router.limits.ledger import Used
from tandem_router.limits.prices import list_price
from tandem_router.openai.answer import NotAnAnswer, unpacked
from tandem_router.openai.json_body import parse_json
from tandem_router.openai.prompt_size import BYTES_PER_TOKEN
from tandem_router.proxy.context import Services

TOKENIZING = frozenset({"/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize"})
COUNT_TOKENS = "/v1/messages/count_tokens"


class Tokenizing:
    """The tokenizers of one router's pools."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def count(self, body: bytes, caller: Caller | None, request_id: str) -> tuple[int, bytes]:
        """Tokens of an Anthropic message, as its worker's template writes it."""
        fields = parse_json(body, self._services.config.limits.max_json_depth)
        chat = msgspec.json.encode(to_counted_chat(fields))
        status, reply = await self.ask("/tokenize", chat, caller, request_id)
        if status != 200:
            return status, reply
        try:
            count = json.loads(reply)["count"]
        except (ValueError, KeyError, TypeError):
            raise ApiError(
                502, "the worker's tokenizer gave no count", type="server_error"
            ) from None
        return 200, json.dumps({"input_tokens": count}).encode()

    async def ask(
        self, path: str, body: bytes, caller: Caller | None, request_id: str
    ) -> tuple[int, bytes]:
        """(status, body) of the worker's reply.

        Admitted like any request, by as many tokens as its body may stand for. Raises ApiError.
        """
        ledger = self._services.ledger
        tokens = len(body) / BYTES_PER_TOKEN
        tenant = caller.tenant.name if caller is not None else "anonymous"
        hold = ledger.hold(tenant, tokens, caller.key if caller is not None else None)
        try:
            return await self._ask(path, body, request_id)
        finally:
            ledger.settle(hold, Used(tokens))

    async def _ask(self, path: str, body: bytes, request_id: str) -> tuple[int, bytes]:
        """Proxied to a worker of the named tier; the router's own name means the dearest pool.

        Never to a provider: it has no such path, and what goes to workers is not for it to see.
        """
        services = self._services
        fields = parse_json(body, services.config.limits.max_json_depth)
        model = fields.get("model", services.config.name)
        if not isinstance(model, str):
            raise ApiError(400, "`model` must be a string", param="model")
        pools = [tier for tier in services.config.tiers if tier.kind == "pool"]
        forced = services.routing.forced_tier(model)
        served = [tier for tier in pools if forced in (None, tier.name)]
        if not served:
            which = f"tier {forced!r} is a provider's" if forced else "every tier is a provider's"
            names = ", ".join(tier.name for tier in pools) or "none"
            raise ApiError(
                404,
                f"{which}, which has no tokenizer here; tiers that have: {names}",
                param="model",
                code="unsupported_by_tier",
            )
        chosen = max(reversed(served), key=list_price)
        tier, adapter = chosen.name, services.routing.adapter(model)
        headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]
        headers += engine_of(chosen.engine).auth(services.peer_token)
        body = msgspec.json.encode({**fields, "model": adapter or chosen.served_model})
        left_out = services.picker.without(tier, adapter) if adapter is not None else frozenset()
        for worker in services.picker.usable(tier):
            if worker.url in left_out:
                continue
            try:
                response = await services.client.request(
                    "POST", worker.url + path, headers=headers, body=body
                )
                payload = await response.read_all()
                payload = unpacked(payload, response.headers.get(b"content-encoding"))
            except (UpstreamError, NotAnAnswer) as error:
                services.picker.failed(worker, str(error))
                continue
            return response.status, payload
        raise ApiError(
            503,
            f"tier {tier!r} has no worker now; retry later",
            type="service_unavailable",
            code="no_worker",
            retry=True,
            retry_after_s=5.0,
        )
