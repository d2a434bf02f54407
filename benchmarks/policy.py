"""What the online controllers are worth on real outcomes with real arrival times.

    python benchmarks/policy.py [budget|share|floor|managed|change|cascade|"new tier"|verifier|
        coverage|bias|drop|all] [--runs 200] [--first-seed 0] [--json FILE]

Outcomes: mmlu and gsm8k of `shared/data/routing` (Mixtral-8x7B against GPT-4-1106); arrivals,
prompt and answer lengths: Azure's conversation trace of 2023. Compared with

* a frozen threshold, set as RouteLLM does: the quantile of calibration scores that gives the
  wanted share of large calls (routellm/calibrate_threshold.py);
* ParetoBandit's pacer (arXiv 2604.00136): a ceiling per request, dual ascent on an exponential
  average of cost, and for adaptation geometric forgetting of the statistics;
* plain dual ascent on spend per second.

Everything is replayed on a virtual clock through the production `decide` and controllers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from outcomes import load, load_tiers, markdown
from policy_studies.budget import budget_study
from policy_studies.cascade import cascade_study
from policy_studies.change import change_study
from policy_studies.floor import floor_study
from policy_studies.managed import managed_study
from policy_studies.measured import bias_study, coverage_study, drop_study
from policy_studies.new_tier import new_tier_study
from policy_studies.share import share_study
from policy_studies.verifier import verifier_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", default="all")
    parser.add_argument("--runs", type=int, default=200, help="runs where an interval is")
    parser.add_argument("--seeds", type=int, default=5, help="runs of the other studies")
    parser.add_argument("--first-seed", type=int, default=0, help="to look where nobody looked")
    parser.add_argument("--json", help="write all numbers to this file")
    options = parser.parse_args()
    mmlu, gsm8k = load("mmlu"), load("gsm8k")

    def seeds(count: int) -> range:
        return range(options.first_seed, options.first_seed + count)

    studies: dict[str, Callable[[], dict[str, object]]] = {
        "budget": lambda: budget_study(mmlu, gsm8k, seeds(options.seeds)),
        "share": lambda: share_study(mmlu, gsm8k, seeds(options.seeds)),
        "floor": lambda: floor_study(mmlu, gsm8k, seeds(options.runs)),
        "managed": lambda: managed_study(mmlu, gsm8k, seeds(options.runs // 2)),
        "change": lambda: change_study(mmlu, gsm8k, seeds(4 * options.seeds)),
        "cascade": lambda: cascade_study(seeds(options.seeds)),
        "new tier": lambda: new_tier_study(
            *load_tiers("paretobandit_k4_dev"), seeds(4 * options.seeds)
        ),
        "verifier": lambda: verifier_study(seeds(options.seeds)),
        "coverage": lambda: coverage_study(mmlu, gsm8k, seeds(options.runs)),
        "bias": lambda: bias_study(mmlu, seeds(options.runs)),
        "drop": lambda: drop_study(*load_tiers("paretobandit_k4_dev"), seeds(options.runs)),
    }
    if options.part != "all" and options.part not in studies:
        parser.error(f"part {options.part!r} is not one of {', '.join(studies)}, all")
    results: dict[str, object] = {}
    for name, study in studies.items():
        if options.part in (name, "all"):
            started = time.monotonic()
            results[name] = study()
            print(markdown({name: results[name]}), flush=True)
            print(f"({time.monotonic() - started:.0f} s)\n", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
