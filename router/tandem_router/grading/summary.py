"""What a grading run found, as data and as the lines that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tandem_router.grading.endpoints import Endpoint
from tandem_router.grading.graders.agreement import Share, agreement, wilson
from tandem_router.grading.progress import dollars
from tandem_router.grading.rows import Graded
from tandem_router.grading.runner import Outcome
from tandem_router.grading.so_far import PairSoFar
from tandem_router.grading.spend import Spend

Summary = dict[str, Any]


def summarise(
    tiers: Sequence[Endpoint],
    graded: Graded,
    outcome: Outcome,
    spend: Spend,
    *,
    num_questions: int,
    samples: int,
    judged: bool,
    pairs: Sequence[PairSoFar] = (),
) -> Summary:
    """Plain JSON values; what is unknown is None."""
    return {
        "questions": num_questions,
        "graded_rows": len(graded.rows),
        "graded_by": dict(graded.by),
        "ungraded": dict(graded.ungraded),
        "stopped": outcome.stopped or None,
        "asked_in_this_run": outcome.num_asked,
        "spent_usd": spend.total_usd,
        "tiers": {
            tier.name: _tier(tier.name, graded, outcome, spend, num_questions * samples)
            for tier in tiers
        },
        "judge": _judge(graded, outcome, spend) if judged else None,
        "pairs": [asdict(pair) for pair in pairs],
    }


def _tier(name: str, graded: Graded, outcome: Outcome, spend: Spend, wanted: int) -> Summary:
    grades = [_mean(row["quality"][name]) for row in graded.rows if name in row["quality"]]
    tokens = [
        row["output_tokens"][name] for row in graded.rows if name in row.get("output_tokens", {})
    ]
    quality = sum(grades) / len(grades) if grades else None
    return {
        "quality": quality,
        "quality_interval": list(wilson(quality, len(grades))) if quality is not None else None,
        "graded_prompts": len(grades),
        "answers": graded.answers[name],
        "missing": wanted - graded.answers[name],
        "cut_off": graded.cut_off[name],
        "empty": graded.empty[name],
        "without_usage": graded.without_usage[name],
        "without_cost": graded.without_cost[name],
        "holding_reference": int(graded.holding[name]),
        "mean_output_tokens": sum(tokens) / len(tokens) if tokens else None,
        "usd": spend.by_name[name],
        "failures": outcome.failures[name],
        "last_failure": outcome.last_failure.get(name),
        "given_up": outcome.given_up.get(name),
    }


def _mean(value: Any) -> float:
    return sum(value) / len(value) if isinstance(value, list) else float(value)


def _judge(graded: Graded, outcome: Outcome, spend: Spend) -> Summary:
    found = agreement(graded.compared)
    return {
        "judged_pairs": graded.num_judged_pairs,
        "contradicted": graded.contradicted,
        "garbled": graded.garbled,
        "failures": outcome.failures["judge"],
        "given_up": outcome.given_up.get("judge"),
        "usd": spend.by_name["judge"],
        "agreement": asdict(found.overall) if found.overall else None,
        "agreement_where_one_is_better": asdict(found.decided) if found.decided else None,
    }


def lines(found: Summary, output: str) -> list[str]:
    """The summary as a person reads it in a terminal."""
    out = [
        f"{found['graded_rows']:,} of {found['questions']:,} questions graded"
        f"{_how(found['graded_by'])}, {dollars(found['spent_usd'])} spent in all"
    ]
    out += _table(found["tiers"])
    out += [line for name, tier in found["tiers"].items() for line in _troubles(name, tier)]
    for reason, count in found["ungraded"].items():
        out.append(f"{count:,} questions could not be graded: {_UNGRADED.get(reason, reason)}")
    if found["judge"]:
        out += _about_judge(found["judge"])
    out += [pair["sentence"] for pair in found["pairs"]]
    if found["stopped"] == "max_usd":
        out.append("stopped before --max-usd would be passed; raise it and run the same again")
    if found["stopped"] == "interrupted" or any(t["missing"] for t in found["tiers"].values()):
        out.append("run the same command again to ask only what is missing")
    if found["graded_rows"]:
        out.append(f"wrote {output}; next: tandem train {output} -o predictor")
    else:
        out.append(f"nothing was graded, so {output} was not written")
    return out


_UNGRADED = {
    "judge": "the judge gave no verdict in both orders",
    "command": "the command gave no grade",
    "no reference": "no reference, and no judge to ask (--judge URL#MODEL)",
}


# How the sentences below begin, of one answer and of several.
_ONE = {"are": "is", "were": "was", "count": "counts"}
_MANY = {"are": "are", "were": "were", "count": "count"}
_ABOUT_ANSWERS = {
    "missing": "{are} missing",
    "cut_off": "{were} cut off at max_tokens and graded as written; --max-tokens (with another -o) "
    "sets it, if your users get longer ones",
    "empty": "{are} empty",
    "without_usage": "came without token counts",
    "holding_reference": "{count} as wrong though the reference stands in the text; read some, and "
    "if right run the same with --grader includes (nobody is asked again)",
    "without_cost": "came without a cost; give --price {name}=IN/OUT and run the same again",
}


def _how(by: dict[str, int]) -> str:
    if not by:
        return ""
    return " (" + ", ".join(f"{name} {count:,}" for name, count in by.items()) + ")"


def _table(tiers: dict[str, Summary]) -> list[str]:
    width = max(4, *(len(name) for name in tiers)) if tiers else 4
    out = [
        f"{'tier':<{width}}  {'quality':>7}  {'95 % interval':>14}  {'answers':>7}  "
        f"{'tokens':>6}  {'cost':>9}"
    ]
    for name, tier in tiers.items():
        quality, interval = tier["quality"], tier["quality_interval"]
        level = f"{quality:.3f}" if quality is not None else "-"
        between = f"{interval[0]:.3f} - {interval[1]:.3f}" if interval else "-"
        tokens = tier["mean_output_tokens"]
        length = f"{tokens:.0f}" if tokens is not None else "-"
        priced = tier["usd"] or not tier["without_cost"]
        cost = dollars(tier["usd"]) if priced else "unknown"
        out.append(
            f"{name:<{width}}  {level:>7}  {between:>14}  {tier['answers']:>7,}  "
            f"{length:>6}  {cost:>9}"
        )
    return out


def _troubles(name: str, tier: Summary) -> list[str]:
    out = []
    if tier["given_up"]:
        out.append(f"{name} was left alone: {tier['given_up']}")
    elif tier["failures"]:
        out.append(f"{name}: {tier['failures']:,} failures, the last: {tier['last_failure']}")
    out += [
        f"{name}: {tier[count]:,} {'answer' if tier[count] == 1 else 'answers'} "
        + said.format(name=name, **(_ONE if tier[count] == 1 else _MANY))
        for count, said in _ABOUT_ANSWERS.items()
        if tier[count]
    ]
    return out


def _about_judge(judge: Summary) -> list[str]:
    out = []
    pairs = judge["judged_pairs"]
    if pairs:
        out.append(
            f"the judge compared {pairs:,} pairs in both orders for {dollars(judge['usd'])}; in "
            f"{judge['contradicted']:,} ({judge['contradicted'] / pairs:.0%}) it contradicted "
            "itself when the order changed"
        )
    if judge["garbled"]:
        out.append(
            f"the judge garbled {judge['garbled']:,} verdicts: neither [[A]], [[B]] nor [[C]]; "
            "those pairs are left out"
        )
    if judge["given_up"]:
        out.append(f"the judge was left alone: {judge['given_up']}")
    overall, decided = judge["agreement"], judge["agreement_where_one_is_better"]
    if overall:
        out.append(f"the judge agrees with the references in {_share(overall)}")
    if decided:
        out.append(f"  where one answer is right and the other wrong, in {_share(decided)}")
    if pairs and not overall:
        out.append("how far the judge can be believed is unknown: no judged row has a reference")
    return out


def _share(share: dict[str, Any]) -> str:
    value = Share(**share)
    between = f"({value.low:.1%} to {value.high:.1%})"
    return f"{value.value:.1%} {between} of {value.num_verdicts:,} verdicts"
