"""The tables of a store, in the SQL that SQLite and PostgreSQL share."""

from __future__ import annotations

import json
from typing import Any

from tandem_router.store.records import Label

VERSION = 1

TABLES = (
    """CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS batches (writer TEXT PRIMARY KEY, sequence BIGINT NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS spend (
        day TEXT NOT NULL, tenant TEXT NOT NULL, tier TEXT NOT NULL,
        num_requests BIGINT NOT NULL, prompt_tokens BIGINT NOT NULL, output_tokens BIGINT NOT NULL,
        cost_usd DOUBLE PRECISION NOT NULL, cost_all_large_usd DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (day, tenant, tier))""",
    """CREATE TABLE IF NOT EXISTS decisions (
        request_id TEXT PRIMARY KEY, time DOUBLE PRECISION NOT NULL, body TEXT NOT NULL)""",
    """CREATE INDEX IF NOT EXISTS decisions_by_time ON decisions (time)""",
    # Not `labels`: a table of that name, never written, is left from earlier routers.
    """CREATE TABLE IF NOT EXISTS quality_labels (
        request_id TEXT NOT NULL, source TEXT NOT NULL, at DOUBLE PRECISION NOT NULL,
        tenant TEXT NOT NULL, tier TEXT NOT NULL, probability DOUBLE PRECISION NOT NULL,
        quality TEXT NOT NULL, gold BIGINT NOT NULL, predicted TEXT NOT NULL,
        cost_usd DOUBLE PRECISION NOT NULL, features TEXT, prompt TEXT,
        PRIMARY KEY (request_id, source))""",
    """CREATE INDEX IF NOT EXISTS quality_labels_by_time ON quality_labels (at)""",
    """CREATE TABLE IF NOT EXISTS keys (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL, hash TEXT NOT NULL,
        created DOUBLE PRECISION NOT NULL, expires DOUBLE PRECISION, revoked DOUBLE PRECISION,
        max_concurrency BIGINT, requests_per_minute DOUBLE PRECISION,
        tokens_per_minute DOUBLE PRECISION, usd_per_hour DOUBLE PRECISION)""",
    """CREATE TABLE IF NOT EXISTS buckets (
        name TEXT PRIMARY KEY, level DOUBLE PRECISION NOT NULL, at DOUBLE PRECISION NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, body BYTEA NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS claims (
        name TEXT PRIMARY KEY, holder TEXT NOT NULL, until DOUBLE PRECISION NOT NULL)""",
)

SPEND_COLUMNS = (
    "day",
    "tenant",
    "tier",
    "num_requests",
    "prompt_tokens",
    "output_tokens",
    "cost_usd",
    "cost_all_large_usd",
)
LABEL_COLUMNS = (
    "request_id",
    "source",
    "at",
    "tenant",
    "tier",
    "probability",
    "quality",
    "gold",
    "predicted",
    "cost_usd",
    "features",
    "prompt",
)
KEY_COLUMNS = (
    "id",
    "tenant",
    "hash",
    "created",
    "expires",
    "revoked",
    "max_concurrency",
    "requests_per_minute",
    "tokens_per_minute",
    "usd_per_hour",
)

ADD_SPEND = (
    f"INSERT INTO spend ({', '.join(SPEND_COLUMNS)}) VALUES ({{values}}) "
    "ON CONFLICT (day, tenant, tier) DO UPDATE SET "
    + ", ".join(f"{name} = spend.{name} + excluded.{name}" for name in SPEND_COLUMNS[3:])
)
ADD_DECISION = (
    "INSERT INTO decisions (request_id, time, body) VALUES ({values}) "
    "ON CONFLICT (request_id) DO UPDATE SET time = excluded.time, body = excluded.body"
)
# Who judges again, judges anew: the last word of a source stands.
ADD_LABEL = (
    f"INSERT INTO quality_labels ({', '.join(LABEL_COLUMNS)}) VALUES ({{values}}) "
    "ON CONFLICT (request_id, source) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in LABEL_COLUMNS[2:])
)
FORGET_LABELS = "DELETE FROM quality_labels WHERE at < {values}"
FORGET_CAPTURED = (
    "UPDATE quality_labels SET features = NULL, prompt = NULL "
    "WHERE at < {values} AND (features IS NOT NULL OR prompt IS NOT NULL)"
)
# A revocation stays: whatever is written later, by whoever had not seen it.
PUT_KEY = (
    f"INSERT INTO keys ({', '.join(KEY_COLUMNS)}) VALUES ({{values}}) "
    "ON CONFLICT (id) DO UPDATE SET "
    + ", ".join(
        f"{name} = COALESCE(keys.{name}, excluded.{name})"
        if name == "revoked"
        else f"{name} = excluded.{name}"
        for name in KEY_COLUMNS[1:]
    )
)
NOTE_BATCH = (
    "INSERT INTO batches (writer, sequence) VALUES ({values}) "
    "ON CONFLICT (writer) DO UPDATE SET sequence = excluded.sequence "
    "WHERE batches.sequence < excluded.sequence"
)
KEEP = (
    "INSERT INTO kept (name, body) VALUES ({values}) "
    "ON CONFLICT (name) DO UPDATE SET body = excluded.body"
)
DROP_KEPT = "DELETE FROM kept WHERE name = {values}"
KEPT = "SELECT body FROM kept WHERE name = {values}"
# A claim that has ended, or is one's own, is anybody's; the last value is the time.
CLAIM = (
    "INSERT INTO claims (name, holder, until) VALUES ({values}) "
    "ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until "
    "WHERE claims.holder = excluded.holder OR claims.until < {now}"
)
KEEP_META = "INSERT INTO meta (name, value) VALUES ({values}) ON CONFLICT (name) DO NOTHING"


def select(table: str, columns: tuple[str, ...]) -> str:
    return f"SELECT {', '.join(columns)} FROM {table}"


def label_values(label: Label) -> tuple[Any, ...]:
    """A label as a row, in the order of LABEL_COLUMNS."""
    return (
        label.request_id,
        label.source,
        label.at,
        label.tenant,
        label.tier,
        label.probability,
        json.dumps(dict(label.quality)),
        int(label.gold),
        json.dumps(dict(label.predicted)),
        label.cost_usd,
        None if label.features is None else json.dumps(dict(label.features)),
        None if label.prompt is None else json.dumps(label.prompt),
    )


def label_of(row: Any) -> Label:
    """The label of a row."""
    values = dict(zip(LABEL_COLUMNS, row, strict=True))
    for name in ("quality", "predicted", "features", "prompt"):
        if values[name] is not None:
            values[name] = json.loads(values[name])
    return Label(**{**values, "gold": bool(values["gold"])})


def leased(level: float, want: float, owed: float) -> float:
    """What of `want` is moved out of a shared bucket; what is `owed` was used and always is."""
    if want <= 0.0:
        return want
    return owed + max(0.0, min(want - owed, level - owed))
