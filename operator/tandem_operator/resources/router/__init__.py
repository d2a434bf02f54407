"""Router: one endpoint over two or more tiers, with its predictor, objective, SLO and budget."""

from pydantic import Field

from tandem_operator.resources.base import Metadata, Resource
from tandem_operator.resources.router.learning import Learning
from tandem_operator.resources.router.spec import RouterSpec
from tandem_operator.resources.router.status import RouterStatus
from tandem_operator.resources.router.store import SqliteStore, Store
from tandem_operator.resources.router.tiers import TierSpec

__all__ = [
    "Learning",
    "Router",
    "RouterSpec",
    "RouterStatus",
    "SqliteStore",
    "Store",
    "TierSpec",
]


class Router(Resource):
    """One OpenAI-compatible endpoint over several tiers."""

    metadata: Metadata
    spec: RouterSpec
    status: RouterStatus = Field(default_factory=RouterStatus)
