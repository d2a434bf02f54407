"""What a worker serves, as OpenAPI 3.1: `GET /openapi.json`; and which release: `GET /version`.

Bodies are the schemas of the classes that read them.
"""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

from pydantic import BaseModel

from tandem_worker.openai.body import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tandem_worker.openai.embeddings import EmbeddingsBody

RELEASE = metadata.version("tandem")

_BODIES: dict[str, tuple[str, type[BaseModel]]] = {
    "/v1/chat/completions": ("A chat's next message", ChatBody),
    "/v1/completions": ("A text's continuation", CompletionBody),
    "/v1/embeddings": ("Vectors of texts", EmbeddingsBody),
    "/tokenize": ("Token ids of a text", TokenizeBody),
    "/detokenize": ("The text of token ids", DetokenizeBody),
}
_STREAMED = {"/v1/chat/completions", "/v1/completions"}
_PAGES = {
    "/v1/models": "The model that is served",
    "/v1/models/{model}": "The same by its name",
    "/v1/load": "How busy this worker is, and what it can",
    "/version": "Which release this is",
    "/openapi.json": "This document",
    "/health": "Whether the process lives",
    "/ready": "Whether requests are taken",
    "/errors/{code}": "What an error's code means and what to do",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
                "doc_url": {"type": "string"},
            },
        }
    },
}


def document(model: str) -> bytes:
    """The OpenAPI document of a worker that serves this model."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for path, (summary, body) in _BODIES.items():
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
        content = {
            "application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}
        }
        operation = _operation(summary, streams=path in _STREAMED)
        paths[path] = {"post": {**operation, "requestBody": {"required": True, "content": content}}}
    for path, summary in _PAGES.items():
        paths[path] = {"get": _operation(summary)}
    for path, named in (("/v1/models/{model}", "model"), ("/errors/{code}", "code")):
        name = {"name": named, "in": "path", "required": True, "schema": {"type": "string"}}
        paths[path]["get"]["parameters"] = [name]
    return json.dumps(
        {
            "openapi": "3.1.0",
            "info": {"title": f"Tandem worker of {model}", "version": RELEASE},
            "paths": paths,
            "components": {"schemas": schemas},
        }
    ).encode()


def _operation(summary: str, *, streams: bool = False) -> dict[str, Any]:
    answer: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        answer["text/event-stream"] = {"schema": {"type": "string"}}
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer.", "content": answer},
            "4XX": {"description": "Refused, and why.", "content": refused},
            "5XX": {"description": "Not served, and why.", "content": refused},
        },
    }
