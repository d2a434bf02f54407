"""How a Router's dollars per hour are split between workers and answers of external tiers.

docs/decisions/0030 says why: workers cost money by the hour whether they answer or not, so the
operator holds their number; an external answer costs money by the token, so routers hold theirs.
One dollar is never counted by both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tandem_operator.resources import Model, Router


@dataclass(frozen=True)
class BudgetSplit:
    """US dollars per hour; None: no ceiling, or nothing of that kind to pay."""

    workers_usd_per_hour: float | None
    tokens_usd_per_hour: float | None


def budget_split(router: Router, models: Mapping[str, Model]) -> BudgetSplit:
    """What workers and what external tokens may cost; together never more than the budget.

    Without an external tier workers have all of it. Beside one they have the price of the replicas
    that their Models ask for, at most the budget, and tokens have the rest: the external tier
    takes the peaks. Without a Model here tokens have all of it.
    """
    if router.spec.budget.usd_per_hour is None:
        return BudgetSplit(None, None)
    budget = float(router.spec.budget.usd_per_hour)
    tiers = router.spec.tiers
    if all(tier.external is None for tier in tiers):
        return BudgetSplit(budget, None)
    names = dict.fromkeys(tier.model_ref.name for tier in tiers if tier.model_ref is not None)
    used = [models[name] for name in names if name in models]
    workers = sum(
        float(role.usd_per_hour or 0) * role.replicas
        for model in used
        for role in model.spec.roles().values()
    )
    workers = min(workers, budget)
    return BudgetSplit(workers if used else None, budget - workers)
