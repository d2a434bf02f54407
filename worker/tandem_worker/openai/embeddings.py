"""POST /v1/embeddings: what its body may hold, and vectors as replies write them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PlainValidator, WithJsonSchema

from tandem_worker.openai.body import MAX_SALT, are_token_ids
from tandem_worker.openai.fields import INT32, Declared, wrong

MAX_INPUTS = 2048


def _inputs(value: Any) -> list[str | list[int]]:
    rule = "must be a string, a list of strings, or token ids, and not empty"
    parts = [value] if isinstance(value, str) or (value and are_token_ids(value)) else value
    if not isinstance(parts, list) or not parts:
        raise wrong("input", value, rule)
    if len(parts) > MAX_INPUTS:
        raise wrong("input", f"{len(parts)} texts", f"must be at most {MAX_INPUTS}")
    for part in parts:
        is_text = isinstance(part, str) and part
        if not is_text and not (isinstance(part, list) and part and are_token_ids(part)):
            raise wrong("input", value, rule)
    return parts


Inputs = Annotated[
    list[str | list[int]],
    PlainValidator(_inputs),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}]}),
]


class EmbeddingsBody(Declared):
    """POST /v1/embeddings."""

    input: Inputs
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, le=INT32)
    pooling: Literal["last", "mean", "cls"] | None = None
    add_special_tokens: bool = True
    parse_special_tokens: bool = False
    cache_salt: str | None = Field(default=None, min_length=1, max_length=MAX_SALT)


def embeddings_reply(
    vectors: Sequence[Sequence[float]],
    *,
    encoding: Literal["float", "base64"],
    dimensions: int | None,
    model: str,
    num_tokens: int,
    normalize: bool = True,
) -> bytes:
    """The whole reply; each vector has length 1, as OpenAI's, unless the checkpoint's have not."""
    data = []
    for index, vector in enumerate(vectors):
        array = np.asarray(vector, dtype=np.float64)[:dimensions]
        length = float(np.linalg.norm(array))
        array = array / length if normalize and length > 0 else array
        written: Any = array.tolist()
        if encoding == "base64":
            written = base64.b64encode(array.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": written})
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    reply = {"object": "list", "data": data, "model": model, "usage": usage}
    return json.dumps(reply, separators=(",", ":")).encode()
