"""What is served to clients, as OpenAPI 3.1: `GET /openapi.json`; and which version: `/version`.

Fields that only a model gives a meaning to pass through and are not listed; those that the router
reads are, with the names and bounds of its configuration.
"""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

from msgspec.json import schema_components

from tandem_router.anthropic.body import Message, MessageTokens
from tandem_router.config import RouterConfig
from tandem_router.openai.body import Bodies, Response

Schema = dict[str, Any]

RELEASE = metadata.version("tandem")
VERSION = json.dumps({"version": RELEASE}).encode()


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


TEXT: Schema = {"type": "string"}
NAME: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}


def schemas_of(config: RouterConfig) -> Schema:
    """The bodies and replies, with the names and bounds of this router."""
    limits = config.limits
    names = [config.name, *(tier.name for tier in config.tiers)]
    names += [tier.served_model for tier in config.tiers]
    model: Schema = {
        "enum": list(dict.fromkeys(names)),
        "description": "The router's name: it chooses a tier; a tier or its model: that one.",
    }
    read = Bodies(limits)
    bodies = (read.chat, read.completion, read.embedding, Response, Message, MessageTokens)
    _, declared = schema_components(bodies, ref_template="#/components/schemas/{name}")
    for body in bodies:
        declared[body.__name__]["properties"]["model"] = model
    return {
        **declared,
        "Error": _object(
            ("error",),
            error=_object(
                ("message", "type", "param", "code"),
                message=TEXT,
                type=TEXT,
                param=_maybe(TEXT),
                code=_maybe(TEXT),
                doc_url=TEXT,
            ),
        ),
        "AnthropicError": _object(
            ("type", "error"),
            type={"const": "error"},
            error=_object(("type", "message"), type=TEXT, message=TEXT, doc_url=TEXT),
            request_id=TEXT,
        ),
        "Tokenize": _object((), model=model, prompt=TEXT),
        "Detokenize": _object((), model=model, tokens={"type": "array", "items": COUNT}),
        "Feedback": {
            **_object(
                ("request_id", "verdict"),
                request_id={**NAME, "maxLength": 64},
                verdict={"enum": ["good", "bad"]},
            ),
            "additionalProperties": False,
        },
        "Choices": _object(("choices",), choices=_list({"type": "object"})),
        "Vectors": _object(("data",), data=_list({"type": "object"})),
        "Models": _object(("object", "data"), object={"const": "list"}, data=_list(_ref("Model"))),
        "Model": _object(("id", "object"), id=TEXT, object={"const": "model"}),
        "Any": {"type": "object"},
    }


# What a request may be answered beside 200; 4xx and 5xx are always objects.
STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 429, 431, 500, 502, 503)


def _operation(summary: str, reply: str, error: str = "Error", **more: Any) -> Schema:
    responses = {"200": _content(reply, "The answer.")}
    responses |= {str(status): _content(error, "Refused, and why.") for status in STATUSES}
    return {"summary": summary, "responses": responses, **more}


def _content(schema: str, description: str, streams: bool = False) -> Schema:
    content: Schema = {"application/json": {"schema": _ref(schema)}}
    if streams:
        content["text/event-stream"] = {"schema": TEXT}
    return {"description": description, "content": content}


def _post(
    summary: str, body: str, reply: str, error: str = "Error", streams: bool = False
) -> Schema:
    content = {"application/json": {"schema": _ref(body)}}
    operation = _operation(
        summary, reply, error, requestBody={"required": True, "content": content}
    )
    operation["responses"]["200"] = _content(reply, "The answer.", streams)
    return {"post": operation}


def _get(summary: str, reply: str, **more: Any) -> Schema:
    return {"get": _operation(summary, reply, **more)}


_NAME = {"name": "model", "in": "path", "required": True, "schema": NAME}
_CODE = {"name": "code", "in": "path", "required": True, "schema": NAME}
PATHS: Schema = {
    "/v1/chat/completions": _post("A chat's next message", "Chat", "Choices", streams=True),
    "/v1/completions": _post("A text's continuation", "Completion", "Choices", streams=True),
    "/v1/embeddings": _post("Vectors of texts, by the tier that can", "Embedding", "Vectors"),
    "/v1/responses": _post("As chat, in OpenAI's newer form", "Response", "Any", streams=True),
    "/v1/messages": _post(
        "As chat, in Anthropic's form", "Message", "Any", "AnthropicError", streams=True
    ),
    "/v1/messages/count_tokens": _post(
        "Tokens of a chat", "MessageTokens", "Any", "AnthropicError"
    ),
    "/v1/models": _get("The router, its tiers, their models", "Models"),
    "/v1/models/{model}": _get("One of them", "Model", parameters=[_NAME]),
    "/v1/feedback": _post("Whether an answer was good", "Feedback", "Any"),
    "/tokenize": _post("Token ids of a text, by a worker of the tier", "Tokenize", "Any"),
    "/detokenize": _post("The text of token ids", "Detokenize", "Any"),
    "/version": _get("Which release this is", "Any"),
    "/openapi.json": _get("This document", "Any"),
    "/health": _get("Whether the process lives", "Any"),
    "/ready": _get("Whether a tier has a usable worker", "Any"),
    "/errors/{code}": _get("What an error's code means and what to do", "Any", parameters=[_CODE]),
}
PATHS["/errors/{code}"]["get"]["responses"]["200"] = {
    "description": "In words.",
    "content": {"text/plain": {"schema": TEXT}},
}
PATHS["/ready"]["get"]["responses"]["503"] = _content("Any", "None has.")


def document(config: RouterConfig) -> bytes:
    """The OpenAPI document of a router."""
    return json.dumps(
        {
            "openapi": "3.1.0",
            "info": {"title": f"Tandem router {config.name}", "version": RELEASE},
            "paths": PATHS,
            "security": [{}, {"bearer": []}, {"key": []}],
            "components": {
                "schemas": schemas_of(config),
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                },
            },
        }
    ).encode()
