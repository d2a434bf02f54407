"""The tables of a store, in the SQL that SQLite and PostgreSQL share."""

from __future__ import annotations

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
    """CREATE TABLE IF NOT EXISTS labels (
        request_id TEXT NOT NULL, tier TEXT NOT NULL, source TEXT NOT NULL,
        probability DOUBLE PRECISION NOT NULL, value DOUBLE PRECISION NOT NULL,
        time DOUBLE PRECISION NOT NULL, PRIMARY KEY (request_id, tier, source))""",
    """CREATE TABLE IF NOT EXISTS keys (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL, hash TEXT NOT NULL,
        created DOUBLE PRECISION NOT NULL, expires DOUBLE PRECISION, revoked DOUBLE PRECISION,
        max_concurrency BIGINT, requests_per_minute DOUBLE PRECISION,
        tokens_per_minute DOUBLE PRECISION, usd_per_hour DOUBLE PRECISION)""",
    """CREATE TABLE IF NOT EXISTS buckets (
        name TEXT PRIMARY KEY, level DOUBLE PRECISION NOT NULL, at DOUBLE PRECISION NOT NULL)""",
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
LABEL_COLUMNS = ("request_id", "tier", "probability", "source", "value", "time")
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
ADD_LABEL = (
    f"INSERT INTO labels ({', '.join(LABEL_COLUMNS)}) VALUES ({{values}}) "
    "ON CONFLICT (request_id, tier, source) DO UPDATE SET "
    "probability = excluded.probability, value = excluded.value, time = excluded.time"
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
KEEP_META = "INSERT INTO meta (name, value) VALUES ({values}) ON CONFLICT (name) DO NOTHING"


def select(table: str, columns: tuple[str, ...]) -> str:
    return f"SELECT {', '.join(columns)} FROM {table}"


def leased(level: float, want: float, owed: float) -> float:
    """What of `want` is moved out of a shared bucket; what is `owed` was used and always is."""
    if want <= 0.0:
        return want
    return owed + max(0.0, min(want - owed, level - owed))
