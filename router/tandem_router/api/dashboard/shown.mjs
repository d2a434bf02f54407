// Which decisions the page shows: the last ones, or those of a range of time out of the store,
// and of these what the filters let through.

const MOST_OF_RANGE = 5000;
const PAGE = 1000;

export const RANGES = { live: 0, "1h": 3600, "24h": 86400, "7d": 604800 };

// Decisions of the last `seconds`, newest first; `cut` where there are more than are shown.
export async function ofRange(seconds) {
  const since = Date.now() / 1000 - seconds;
  const found = [];
  let before = Date.now() / 1000 + 1;
  while (found.length < MOST_OF_RANGE) {
    const reply = await fetch(`/admin/decisions?limit=${PAGE}&before=${before}`);
    const page = (await reply.json()).decisions;
    const inRange = page.filter((one) => one.time >= since && one.time < before);
    found.push(...inRange);
    if (inRange.length < page.length || page.length < PAGE) return { decisions: found, cut: false };
    before = page.at(-1).time;
  }
  return { decisions: found, cut: true };
}

export function passes(one, filters) {
  const failed = Boolean(one.error) || (one.status !== null && one.status !== 200);
  return (!filters.tier || one.tier === filters.tier)
    && (!filters.reason || one.reason === filters.reason)
    && (!filters.tenant || one.tenant === filters.tenant)
    && (!filters.failed || failed);
}

// Keeps a select's choices up to date without losing what is chosen.
export function offer(select, values) {
  const wanted = ["", ...[...new Set(values)].filter(Boolean).sort()];
  const there = [...select.options].map((option) => option.value);
  if (wanted.join("\n") === there.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...wanted.map((value) => {
    const option = document.createElement("option");
    option.value = value;
    option.textContent = value || "all";
    return option;
  }));
  select.value = wanted.includes(chosen) ? chosen : "";
}

// Requests, cost and the share to the dearest tier, by tenant.
export function byTenant(decisions, dearest) {
  const rows = new Map();
  for (const one of decisions) {
    const row = rows.get(one.tenant) ?? { tenant: one.tenant, requests: 0, usd: 0, large: 0, failed: 0 };
    row.requests += 1;
    row.usd += one.cost_usd ?? 0;
    row.large += one.tier === dearest ? 1 : 0;
    row.failed += one.status !== null && one.status !== 200 ? 1 : 0;
    rows.set(one.tenant, row);
  }
  return [...rows.values()].sort((a, b) => b.usd - a.usd);
}

// What the budget has left, and whether a usual answer of the dearest tier is more than that.
export function budgetOf(state) {
  const { budget_remaining_usd: left, budget_refill_usd_per_s: refill } = state.set_points;
  if (left === null || left === undefined) return { note: "", broken: false };
  const large = state.tiers.find((tier) => tier.name === state.dearest_tier);
  const usual = large && large.num_requests ? large.cost_usd / large.num_requests : 0;
  const hourly = refill ? ` of ${(refill * 3600).toPrecision(3)} an hour` : "";
  return { note: `budget: ${Math.max(0, left).toPrecision(3)} left${hourly}`, broken: left <= usual };
}

// Where a floor of quality leads, from the router's own curve: the cheapest point that keeps it.
export function whatIf(state, floor) {
  const kept = state.curve.filter((point) => point.quality_ratio >= floor - 1e-9);
  if (!kept.length) return null;
  const usdPer = new Map(state.tiers.map((tier) =>
    [tier.name, tier.num_requests ? tier.cost_usd / tier.num_requests : null]));
  const cost = (point) => {
    let usd = 0;
    for (const [tier, share] of Object.entries(point.shares)) {
      if (share === 0) continue;
      const each = usdPer.get(tier);
      if (each === null || each === undefined) return null;
      usd += share * each;
    }
    return usd;
  };
  const large = (point) => point.shares[state.dearest_tier] ?? 0;
  const point = kept.reduce((a, b) => (large(b) < large(a) ? b : a));
  const all = usdPer.get(state.dearest_tier) ?? null;
  return { point, usd: cost(point), allUsd: all, large: large(point) };
}
