"""Where spend, decisions, keys and labels outlive the router's pods."""

from __future__ import annotations

from pydantic import Field

from tandem_operator.resources.base import ClassName, Quantity, Resource, SecretKeyRef


class SqliteStore(Resource):
    """One file on a claim, for one router pod."""

    size: Quantity = Field(default="1Gi", description="Size of the claim, a quantity in bytes.")
    storage_class_name: ClassName | None = Field(
        default=None, description="StorageClass of the claim; the cluster's default when absent."
    )


class PostgresStore(Resource):
    """A PostgreSQL database, which several router pods share."""

    secret_ref: SecretKeyRef = Field(
        description="Secret with the URL, postgresql://user:password@host:port/database."
    )


class Store(Resource):
    """Where spend, decisions, keys and labels outlive the pods."""

    sqlite: SqliteStore | None = Field(default=None, description="A file; excludes postgres.")
    postgres: PostgresStore | None = Field(default=None, description="A database; excludes sqlite.")
