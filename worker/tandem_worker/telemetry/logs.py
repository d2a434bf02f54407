"""Log lines as text, or one JSON object each; every line of a request names its id."""

from __future__ import annotations

import logging
import os
import sys
from contextvars import ContextVar

# Of the request that the running task works on.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
FORMAT = "TANDEM_LOG_FORMAT"


def configure(level: str) -> None:
    """Set up logging as $TANDEM_LOG_FORMAT says: text (the default) or json."""
    handler = logging.StreamHandler(sys.stderr)
    if os.environ.get(FORMAT) == "json":
        from pythonjsonlogger.json import JsonFormatter

        handler.addFilter(_with_request_id)
        fields = {"asctime": "time", "levelname": "level", "name": "logger"}
        line = "%(asctime)s %(levelname)s %(name)s %(message)s"
        handler.setFormatter(JsonFormatter(line, rename_fields=fields))
    else:
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        handler.setFormatter(logging.Formatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _with_request_id(record: logging.LogRecord) -> bool:
    if request_id := REQUEST_ID.get():
        record.request_id = request_id
    return True
