"""The largest and slowest request that is accepted."""

from __future__ import annotations

from pydantic import Field

from tandem_router.config.section import Positive, Section


class LimitsConfig(Section):
    """Largest request the router accepts; beyond any of these it answers 4xx."""

    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, description="Request body, bytes.")
    max_header_bytes: int = Field(default=32_768, ge=1024, description="All headers, bytes.")
    max_json_depth: int = Field(default=32, ge=4, le=500, description="Nesting of the body.")
    max_n: int = Field(default=16, ge=1, description="Choices per request (`n`, `best_of`).")
    max_tokens: int = Field(default=131_072, ge=1, description="`max_tokens` of one request.")
    max_stop: int = Field(default=16, ge=1, description="Stop strings of one request.")
    max_stop_chars: int = Field(default=1024, ge=1, description="Length of one stop string.")
    max_messages: int = Field(default=2048, ge=1, description="Messages of one chat request.")
    max_inflight: int = Field(default=1024, ge=1, description="Requests in flight, all tenants.")
    max_sequences: int = Field(
        default=64, ge=1, description="Prompts times choices (`n`, `best_of`) of one request."
    )
    max_embedding_inputs: int = Field(
        default=2048, ge=1, description="Texts of one request for embeddings."
    )
    max_logit_bias: int = Field(default=300, ge=0, description="Entries of `logit_bias`.")
    max_logprobs: int = Field(
        default=20, ge=0, description="`top_logprobs`, `logprobs` of one request."
    )
    body_timeout_s: Positive = Field(default=30.0, description="Time a client has to send a body.")
    header_timeout_s: Positive = Field(
        default=10.0, description="Time a client has to send a request's header."
    )
    write_timeout_s: Positive = Field(
        default=30.0, description="A client that reads nothing of its reply this long is left."
    )
    max_held_body_bytes: int = Field(
        default=256 * 2**20, ge=1024, description="Request bodies held at once, bytes."
    )
    max_held_body_bytes_per_sender: int = Field(
        default=64 * 2**20,
        ge=1024,
        description="The same of one tenant, or of one address where no key is needed.",
    )
    max_connections: int = Field(
        default=4096,
        ge=1,
        description="Client connections at once; less where the process may not open as many "
        "files. Probes have a reserve beyond it.",
    )
    max_waiting_connections_per_address: int = Field(
        default=256, ge=1, description="Connections of one address that have asked nothing yet."
    )
