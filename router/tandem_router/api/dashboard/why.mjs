// What a row of the decisions says when it is opened: why this tier, over what, and by how much.

const usd = (value) => (value === null || value === undefined ? "–" : `${(value * 1e6).toFixed(1)} µUSD`);
const number = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));

function element(name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
}

function table(one) {
  const made = element("table");
  const head = made.createTHead().insertRow();
  for (const name of ["Tier", "Stated quality", "Price", "Wait", "Late", "Holds, tokens", "Utility", "Ruled out by"]) {
    head.append(element("th", name));
  }
  const body = made.createTBody();
  for (const tier of one.tiers) {
    const line = body.insertRow();
    const taken = tier.tier === one.tier ? " (taken)" : "";
    for (const text of [
      tier.tier + taken,
      number(tier.quality),
      usd(tier.expected_cost_usd),
      tier.wait_s === null ? "–" : `${(tier.wait_s * 1000).toFixed(0)} ms`,
      `${((tier.slo_miss_probability ?? 0) * 100).toFixed(0)} %`,
      tier.held_tokens || "–",
      number(tier.utility),
      tier.excluded ?? "",
    ]) line.append(element("td", String(text)));
  }
  return made;
}

function said(one) {
  const over = one.runner_up === null ? "nothing else was left to choose"
    : `over ${one.runner_up}${one.margin === null ? "" : `, by ${number(one.margin)} quality points after price, threshold and latency`}`;
  const asked = one.gain === null ? "" : ` The gain of the dearest tier was ${number(one.gain)}, ${number(one.threshold)} were asked.`;
  return `${one.tier}: ${one.reason}, ${over}.${asked}`;
}

// Fills `holder` from /admin/decisions/<id>.
export async function explain(holder, requestId) {
  holder.replaceChildren(element("p", "looking it up"));
  const reply = await fetch(`/admin/decisions/${requestId}`);
  if (!reply.ok) {
    holder.replaceChildren(element("p", (await reply.json()).error.message));
    return;
  }
  const one = await reply.json();
  const parts = [element("p", said(one)), table(one)];
  for (const attempt of one.attempts) {
    parts.push(element("p", `Asked before: ${attempt.tier}, which ${attempt.fault}; ${usd(attempt.cost_usd)}.`));
  }
  const ends = [
    `request ${one.request_id}`,
    `tenant ${one.tenant}`,
    one.decode_worker && `worker ${one.decode_worker}`,
    one.prefill_worker && `prefilled by ${one.prefill_worker}`,
    one.max_tokens !== null && `bounded to ${one.max_tokens} tokens`,
    one.advised && `would have gone to ${one.advised}`,
    one.error && `error: ${one.error}`,
  ];
  parts.push(element("p", ends.filter(Boolean).join(" · ")));
  holder.replaceChildren(...parts);
}
