"""What the autoscaling core does over two weeks of real request rates.

    python benchmarks/autoscale.py

Rates: ServeGen's 14-day curve of a production model at ten-minute steps (`shared/data/traces/
servegen`), linearly interpolated to one-minute control steps with 10 % noise. Cluster: a small
tier (unified) and a large tier (prefill and decode), profiles of the size an 8B and a 70B model
have on H100. A plan takes effect two minutes later, as workers take to start. Each minute is
judged by the real rate: would the workers that are up have met the SLO?
"""

from __future__ import annotations

import csv
import random
from dataclasses import replace

from outcomes import DATA, markdown

from tandem_operator.autoscale import (
    Autoscaler,
    Ceilings,
    Load,
    LoopSettings,
    Observation,
    Operating,
    PerformanceProfile,
    PoolSpec,
    Slo,
    workers_for_slo,
)

PROFILES = {
    "small": PerformanceProfile((0.006, 2.2e-5, 2e-10), (0.007, 1.5e-8, 2e-5), 400_000),
    "large": PerformanceProfile((0.02, 1.1e-4, 1.2e-9), (0.02, 5e-8, 6e-5), 500_000),
}
POOLS = (
    PoolSpec("small", "unified", gpus=1, usd_per_hour=3.0, minimum=1, maximum=200),
    PoolSpec("large", "prefill", gpus=4, usd_per_hour=12.0, minimum=1, maximum=200),
    PoolSpec("large", "decode", gpus=4, usd_per_hour=12.0, minimum=1, maximum=200),
)
SLO = Slo(ttft_s=2.0, tpot_s=0.06)
CURVE = tuple(
    Operating(round(0.4 - 0.05 * i, 2), {"small": 1 - i / 10, "large": i / 10}, quality)
    for i, quality in enumerate(
        (0.826, 0.856, 0.884, 0.908, 0.929, 0.947, 0.963, 0.976, 0.987, 0.995, 1.0)
    )
)
STEP_S, STARTUP_S = 60.0, 120.0


def load_at(rate: float) -> Load:
    return Load(rate, 1155.0, 2.5 * 1155.0**2, 211.0)  # Azure conversations, 2023


def rates() -> list[float]:
    path = DATA / "traces" / "servegen" / "rate_curves_10min.csv"
    if not path.exists():
        raise SystemExit(f"{path} is absent; this benchmark needs the shared data folder")
    with path.open() as lines:
        points = [float(row["language/m-mid_rps"] or 0) / 10 for row in csv.DictReader(lines)]
    smooth = []
    for here, there in zip(points, points[1:], strict=False):
        smooth += [here + (there - here) * i / 10 for i in range(10)]
    return smooth


def replay(settings: LoopSettings, seed: int = 0) -> dict[str, float]:
    rng = random.Random(seed)
    loop = Autoscaler(settings)
    wanted = {pool.key: 4 for pool in settings.pools}
    pending: list[tuple[float, dict, float]] = []
    up, threshold = dict(wanted), 0.15
    gpu_hours = met = changes = quality = over = 0.0
    series = rates()
    for minute, rate in enumerate(series):
        now = minute * STEP_S
        while pending and pending[0][0] <= now:
            _, up, threshold = pending.pop(0)
        seen = Observation(
            load_at(rate * rng.uniform(0.9, 1.1)), wanted, CURVE, PROFILES, threshold
        )
        plan = loop.step(now, seen)
        changes += sum(d.pool != "threshold" for d in plan.decisions)
        wanted = dict(plan.workers)
        # Removals are immediate, additions wait for their start.
        up = {key: min(up[key], wanted[key]) for key in up}
        pending.append((now + STARTUP_S, wanted, plan.threshold))
        point = next(p for p in CURVE if p.threshold == plan.threshold)
        gpus = sum(pool.gpus * wanted[pool.key] for pool in settings.pools)
        gpu_hours += gpus * STEP_S / 3600
        over += settings.ceilings.gpus is not None and gpus > settings.ceilings.gpus
        quality += point.quality_ratio
        met += all(
            workers_for_slo(
                replace(pool, minimum=up[pool.key], maximum=up[pool.key]),
                load_at(rate).scaled(point.shares[pool.tier]),
                PROFILES[pool.tier],
                SLO,
            )[1]
            for pool in settings.pools
        )
    n = len(series)
    return {
        "gpu_hours": gpu_hours,
        "minutes_within_slo": met / n,
        "mean_quality_ratio": quality / n,
        "changes_per_hour": changes / (n / 60),
        "minutes_over_gpu_ceiling": over / n,
    }


def static_peak(floor: float) -> dict[str, float]:
    series = rates()
    point = max((p for p in CURVE if p.quality_ratio >= floor), key=lambda p: p.threshold)
    gpus = 0
    for pool in POOLS:
        part = load_at(max(series)).scaled(point.shares[pool.tier])
        gpus += pool.gpus * workers_for_slo(pool, part, PROFILES[pool.tier], SLO)[0]
    hours = gpus * len(series) * STEP_S / 3600
    return {
        "gpu_hours": hours,
        "minutes_within_slo": 1.0,
        "mean_quality_ratio": point.quality_ratio,
        "changes_per_hour": 0.0,
        "minutes_over_gpu_ceiling": 0.0,
    }


def main() -> None:
    base = LoopSettings(POOLS, SLO, quality_floor=0.95, startup_s=180.0)
    results = {"static, sized for the peak": static_peak(0.95)}
    results["autoscaled"] = replay(base)
    results["autoscaled, no forecast (horizon 1 s)"] = replay(replace(base, startup_s=1.0))
    peak = results["static, sized for the peak"]["gpu_hours"] / (len(rates()) * STEP_S / 3600)
    for share in (0.8, 0.5):
        ceiling = int(share * peak)
        settings = replace(base, ceilings=Ceilings(gpus=ceiling))
        results[f"autoscaled, at most {ceiling} GPUs ({share:.0%} of the peak)"] = replay(settings)
    print(markdown({"14 days of ServeGen m-mid, a tenth of its rate": results}))


if __name__ == "__main__":
    main()
