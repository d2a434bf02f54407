"""The messages of Envoy's external processing, as far as an endpoint picker reads and writes them.

Declared here by field number rather than taken from a package: the one that holds all of Envoy's
types overwrites files of other packages that this router has (docs/decisions/0150). The pool is
private, so that a process which also has Envoy's own types holds both. Fields that nobody here
reads are not declared; protobuf skips them.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
HEALTH_SERVICE = "grpc.health.v1.Health"

# ProcessingMode.BodySendMode
BODY_MODES = ("NONE", "STREAMED", "BUFFERED", "BUFFERED_PARTIAL", "FULL_DUPLEX_STREAMED", "GRPC")
# HeaderValueOption.HeaderAppendAction
OVERWRITE_IF_EXISTS_OR_ADD = 2
# HealthCheckResponse.ServingStatus
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3

_STRUCT = "google.protobuf.Struct"
# Message: (number, name, type); a type in brackets is repeated, `|name` puts a field into a oneof.
_MESSAGES: dict[str, tuple[tuple[int, str, str], ...]] = {
    "HeaderValue": ((1, "key", "string"), (2, "value", "string"), (3, "raw_value", "bytes")),
    "HeaderValueOption": ((1, "header", "HeaderValue"), (3, "append_action", "int32")),
    "HeaderMap": ((1, "headers", "[HeaderValue]"),),
    # A map is on the wire what a repeated pair is.
    "MetadataEntry": ((1, "key", "string"), (2, "value", _STRUCT)),
    "Metadata": ((1, "filter_metadata", "[MetadataEntry]"),),
    "HttpStatus": ((1, "code", "int32"),),
    "ProtocolConfiguration": (
        (1, "request_body_mode", "int32"),
        (2, "response_body_mode", "int32"),
    ),
    "HttpHeaders": ((1, "headers", "HeaderMap"), (3, "end_of_stream", "bool")),
    "HttpBody": ((1, "body", "bytes"), (2, "end_of_stream", "bool")),
    "HttpTrailers": ((1, "trailers", "HeaderMap"),),
    "ProcessingRequest": (
        (2, "request_headers", "HttpHeaders|request"),
        (3, "response_headers", "HttpHeaders|request"),
        (4, "request_body", "HttpBody|request"),
        (5, "response_body", "HttpBody|request"),
        (6, "request_trailers", "HttpTrailers|request"),
        (7, "response_trailers", "HttpTrailers|request"),
        (8, "metadata_context", "Metadata"),
        (10, "observability_mode", "bool"),
        (11, "protocol_config", "ProtocolConfiguration"),
    ),
    "HeaderMutation": (
        (1, "set_headers", "[HeaderValueOption]"),
        (2, "remove_headers", "[string]"),
    ),
    "StreamedBodyResponse": ((1, "body", "bytes"), (2, "end_of_stream", "bool")),
    "BodyMutation": (
        (1, "body", "bytes|mutation"),
        (2, "clear_body", "bool|mutation"),
        (3, "streamed_response", "StreamedBodyResponse|mutation"),
    ),
    "CommonResponse": (
        (2, "header_mutation", "HeaderMutation"),
        (3, "body_mutation", "BodyMutation"),
        (5, "clear_route_cache", "bool"),
    ),
    "HeadersResponse": ((1, "response", "CommonResponse"),),
    "BodyResponse": ((1, "response", "CommonResponse"),),
    "TrailersResponse": ((1, "header_mutation", "HeaderMutation"),),
    "ImmediateResponse": (
        (1, "status", "HttpStatus"),
        (2, "headers", "HeaderMutation"),
        (3, "body", "bytes"),
        (5, "details", "string"),
    ),
    "ProcessingResponse": (
        (1, "request_headers", "HeadersResponse|response"),
        (2, "response_headers", "HeadersResponse|response"),
        (3, "request_body", "BodyResponse|response"),
        (4, "response_body", "BodyResponse|response"),
        (5, "request_trailers", "TrailersResponse|response"),
        (6, "response_trailers", "TrailersResponse|response"),
        (7, "immediate_response", "ImmediateResponse|response"),
        (8, "dynamic_metadata", _STRUCT),
    ),
    "HealthCheckRequest": ((1, "service", "string"),),
    "HealthCheckResponse": ((1, "status", "int32"),),
}

_PACKAGE = "tandem.ext_proc"
_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "string": _FIELD.TYPE_STRING,
    "bytes": _FIELD.TYPE_BYTES,
    "bool": _FIELD.TYPE_BOOL,
    "int32": _FIELD.TYPE_INT32,
}


def _pool() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="tandem/ext_proc.proto",
        package=_PACKAGE,
        syntax="proto3",
        dependency=["google/protobuf/struct.proto"],
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, field_name, written in fields:
            kind, _, group = written.partition("|")
            repeated = kind.startswith("[")
            kind = kind.strip("[]")
            field = message.field.add(name=field_name, number=number)
            field.label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
            if kind in _SCALARS:
                field.type = _SCALARS[kind]
            else:
                field.type = _FIELD.TYPE_MESSAGE
                field.type_name = f".{kind}" if "." in kind else f".{_PACKAGE}.{kind}"
            if group:
                if not message.oneof_decl:
                    message.oneof_decl.add(name=group)
                field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    struct = descriptor_pb2.FileDescriptorProto()
    struct_pb2.DESCRIPTOR.CopyToProto(struct)
    pool.Add(struct)
    pool.Add(file)
    return pool


_POOL = _pool()


def _class(name: str) -> Any:
    found = _POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}")
    return message_factory.GetMessageClass(found)


ProcessingRequest = _class("ProcessingRequest")
ProcessingResponse = _class("ProcessingResponse")
HealthCheckRequest = _class("HealthCheckRequest")
HealthCheckResponse = _class("HealthCheckResponse")
