"""The text that a prompt of token ids stands for, so that it is routed like the text."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tandem_router.engines import engine_of
from tandem_router.errors import UpstreamError
from tandem_router.limits.prices import list_price
from tandem_router.proxy.context import Services

# Of the predictor's view of a prompt the beginning decides; a request waits no longer for it.
MAX_IDS = 4096
PATIENCE_S = 0.5


async def text_of_ids(services: Services, token_ids: Sequence[int]) -> str | None:
    """Asks a worker, of the dearest tier that has one; None where none can say in time.

    Ids mean nothing without a tokenizer, and the router has none. Tiers of one router that are
    asked with token ids share theirs, or the client could not have made the ids.
    """
    by_price = sorted(services.config.tiers, key=list_price, reverse=True)
    for tier in by_price:
        usable = services.picker.usable(tier.name) if tier.kind == "pool" else []
        if not usable:
            continue
        headers = [(b"content-type", b"application/json")]
        headers += engine_of(tier.engine).auth(services.peer_token)
        order = {"model": tier.served_model, "tokens": list(token_ids[:MAX_IDS])}
        try:
            response = await services.client.request(
                "POST",
                usable[0].url + "/detokenize",
                headers=headers,
                body=json.dumps(order).encode(),
                begin_within_s=PATIENCE_S,
            )
            said = json.loads(await response.read_all(2**20))
        except (UpstreamError, ValueError):
            return None
        text = said.get("prompt", said.get("text")) if isinstance(said, dict) else None
        return text if isinstance(text, str) else None
    return None
