// Keeps the page live from /admin/state and /admin/decisions, and runs the playground.

import { gainChart, lineChart, qualityChart } from "./charts.mjs";
import { RANGES, budgetOf, byTenant, ofRange, offer, passes, whatIf } from "./shown.mjs";
import { explain } from "./why.mjs";

// Nothing can be fetched from an address with a name and password in it; the browser knows them now.
if (new URL(document.baseURI).username) location.replace(location.origin + location.pathname);

const byId = (id) => document.getElementById(id);
const dearest = document.body.dataset.dearest;
const routerName = document.body.dataset.name;
const MAX_SHOWN = 300;
const PERIOD_MS = 1000;

let decisions = [];
let lastSequence = 0;
let tierNames = [];
let lastState = null;
let rangeNote = ""; // what is to be said of the range besides its number of requests
let ranged = null; // decisions of a range, out of the store; null: the last ones
const opened = new Map(); // request id -> its row's explanation

const tierClass = (name) => Math.max(0, tierNames.indexOf(name)) % 4;
const usd = (value) => (value === 0 ? "0" : value >= 0.01 ? value.toFixed(4) : value.toFixed(6));
const ms = (seconds) => (seconds === null || seconds === undefined ? "–" : `${(seconds * 1000).toFixed(0)} ms`);
const number = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));

function put(id, text) {
  byId(id).textContent = text;
}

function row(cells) {
  const tr = document.createElement("tr");
  for (const cell of cells) {
    const td = document.createElement("td");
    if (cell !== null && typeof cell === "object") {
      td.textContent = cell.text;
      if (cell.className) td.className = cell.className;
      if (cell.title) td.title = cell.title;
    } else {
      td.textContent = cell;
    }
    tr.append(td);
  }
  return tr;
}

function tierCell(name) {
  const td = document.createElement("td");
  const key = document.createElement("span");
  key.className = `key tier-${tierClass(name)}`;
  td.append(key, name);
  return td;
}

function withTier(name, cells) {
  const tr = row(cells);
  tr.prepend(tierCell(name));
  return tr;
}

function percentile(values, part) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(part * sorted.length) - 1)];
}

function latencyTile(id, values, targetMs, part) {
  const value = percentile(values, part);
  put(id, ms(value));
  if (targetMs && values.length) {
    const met = values.filter((v) => v * 1000 <= targetMs).length / values.length;
    put(`${id}-note`, `${(met * 100).toFixed(0)} % within ${targetMs} ms`);
  } else {
    put(`${id}-note`, values.length ? `${values.length} streams` : "");
  }
}

function showState(state) {
  tierNames = state.tiers.map((tier) => tier.name);
  put("predictor", state.predictor);
  const problem = state.predictor_artifact?.problem;
  const silent = problem && state.predictor_artifact.reason === "NotLoaded";
  put("threshold", silent ? "none in force" : number(state.set_points.gain_threshold));
  byId("banner").hidden = !problem;
  put("banner", silent ? `The predictor cannot answer, and ${state.fallback_tier} answers everything: ${problem}` : problem ?? "");
  put("inflight", state.num_inflight);
  const total = state.tiers.reduce((sum, tier) => sum + tier.num_requests, 0);
  const large = state.tiers.find((tier) => tier.name === dearest);
  put("requests", total);
  put("share", total ? `${((large.num_requests / total) * 100).toFixed(1)} %` : "–");
  put("share-note", `${(large.recent_share * 100).toFixed(1)} % of the last 500 routed`);
  put("cost", usd(state.cost_usd));
  const saved = state.cost_all_large_usd - state.cost_usd;
  put("saved", usd(saved));
  put("saved-note", state.cost_all_large_usd > 0
    ? `${((saved / state.cost_all_large_usd) * 100).toFixed(1)} % of ${usd(state.cost_all_large_usd)}` : "");
  put("price-note", state.price_note);

  const ratio = state.expected_quality_ratio;
  put("quality", ratio === null ? "–" : `${(ratio * 100).toFixed(1)} %`);
  const broken = ratio !== null && state.quality_floor !== null && ratio < state.quality_floor - 0.005;
  byId("quality").className = broken ? "bad" : "";
  const budget = budgetOf(state);
  byId("cost").className = budget.broken ? "bad" : "";
  put("cost-note", budget.note);
  put("quality-note", state.quality_floor === null ? "predicted, last 500 scored"
    : `floor ${(state.quality_floor * 100).toFixed(1)} %, predicted`);

  byId("tiers").tBodies[0].replaceChildren(...state.tiers.map((tier) =>
    withTier(tier.name, [tier.served_model, tier.usable_workers, tier.num_requests, usd(tier.cost_usd)])));
  byId("workers").tBodies[0].replaceChildren(...state.workers.map((worker) =>
    withTier(worker.tier, [
      worker.role,
      worker.url,
      worker.usable ? { text: "usable", className: "good" } : { text: "not usable", className: "bad" },
      worker.num_inflight,
      worker.load ? worker.load.num_requests : "–",
      worker.load ? `${(worker.load.kv_free_share * 100).toFixed(0)} %` : "–",
      worker.last_error ?? "",
    ])));
  return state;
}

const percent = (value) => (value === null || value === undefined ? "–" : `${(value * 100).toFixed(1)} %`);

function showQuality(state) {
  const { quality, learning, threshold } = state;
  const known = quality.measured !== null;
  put("measured", known ? `${percent(quality.measured)}, between ${percent(quality.low)} and `
    + `${percent(quality.high)}, ${quality.num_labels} labels (${quality.num_gold} gold)`
    : `too few labels: ${quality.num_labels}`);
  put("basis", threshold.limit === null ? "none: no floor is held"
    : `${number(threshold.limit)}, ${threshold.basis}, ${threshold.num_labels} labels`
      + (threshold.judge_lean > 1 ? `; losses ${threshold.judge_lean.toFixed(2)} times what the judge says` : ""));
  const sources = Object.entries(quality.labels_by_source).map(([name, num]) => `${name} ${num}`);
  put("sources", sources.join(", ") || "none");
  put("learning-spent", learning.shadow_share > 0
    ? `${usd(learning.spent_today_usd)} of ${usd(learning.daily_usd)}; ${usd(learning.cost_usd)} in all` : "nothing is asked twice");
  const judge = learning.judge;
  put("judge", judge === null ? "none" : judge.ok ? `${judge.type}, ${judge.num_pairs} pairs` : judge.error);
  byId("judge").className = judge !== null && !judge.ok ? "bad" : "";
  put("closed", Object.values(learning.closed).join("; ") || "–");
  const change = quality.changes.at(-1);
  put("change", change === undefined ? "none" : `${new Date(change.at * 1000).toLocaleString()}: ${change.tier} `
    + `${change.rose ? "up" : "down"} from ${percent(change.before)} to ${percent(change.after)} `
    + `(${change.statistic.toFixed(1)} after ${change.num_labels} labels)`);
  showPredictor(state.predictor_artifact, state.retraining);
  const { cascade } = state;
  const counts = cascade === null ? [] : [...Object.entries(cascade.zones), ...Object.entries(cascade.outcomes)];
  put("cascade", cascade === null ? "none are asked for" : cascade.problem
    || counts.map(([name, num]) => `${name} ${num}`).join(", ") || "none yet");
  const now = { at: Date.now() / 1000, measured: quality.measured, low: quality.low, high: quality.high, predicted: quality.predicted };
  qualityChart(byId("quality-chart"), [...quality.history, now], state.quality_floor);
  legend("quality-legend", [["tier-2", "measured"], ["tier-1", "predicted"]]);
}

function showPredictor(artifact, retraining) {
  put("predictor-in-use", artifact?.version ?? "–");
  if (!retraining) { return; }
  const { comparison, steps, candidate, predecessor } = retraining;
  const other = candidate ?? predecessor;
  put("candidate", other !== null && comparison !== null
    ? `${candidate !== null ? "" : "the one before, "}${other}: squared error `
      + `${Math.abs(comparison.smaller_error).toFixed(4)} `
      + `${comparison.smaller_error < 0 ? "larger" : "smaller"} over `
      + `${comparison.num_labels} labels`
    : retraining.phase === "training" ? "being trained"
      : retraining.problem || `${retraining.num_new_labels} of ${retraining.min_labels} new labels`);
  const step = steps.at(-1);
  put("predictor-step", step === undefined ? "none"
    : `${new Date(step.at * 1000).toLocaleString()}: ${step.kind} ${step.version}: ${step.why}`);
}

function filters() {
  return {
    tier: byId("of-tier").value,
    reason: byId("of-reason").value,
    tenant: byId("of-tenant").value,
    failed: byId("failed").checked,
  };
}

function showWhatIf(state) {
  const floor = Number(byId("floor").value);
  put("floor-value", percent(floor));
  const found = whatIf(state, floor);
  if (found === null) return put("what-if", state.curve.length ? "no threshold keeps that floor on recent requests" : "no scored request yet");
  const { point, usd: each, allUsd, large } = found;
  const quality = state.expected_quality_ratio === null
    ? "prompt length ranks requests and says nothing of quality"
    : `expected quality ${percent(point.quality_ratio)} of all-${dearest}`;
  const cost = each === null ? "" : `, ${usd(1000 * each)} USD per 1,000 requests`
    + (allUsd ? ` (all to ${dearest}: ${usd(1000 * allUsd)})` : "");
  put("what-if", `${percent(large)} to ${dearest} at a threshold of ${number(point.threshold)}${cost}; `
    + `${quality}. From the last scored requests (1,000 at most), and what each tier's answers cost so far.`);
}

function whyRow(id, columns) {
  const tr = document.createElement("tr");
  tr.className = "why";
  const td = document.createElement("td");
  td.colSpan = columns;
  td.id = `why-${id}`;
  td.append(opened.get(id));
  tr.append(td);
  return tr;
}

function toggle(id) {
  if (opened.has(id)) {
    opened.delete(id);
  } else {
    const holder = document.createElement("div");
    opened.set(id, holder);
    explain(holder, id).catch(() => { holder.textContent = "the router does not answer"; });
  }
  showDecisions(lastState);
  document.querySelector(`[data-request="${CSS.escape(id)}"]`)?.focus();
}

function showDecisions(state) {
  const everything = ranged ?? decisions;
  offer(byId("of-tier"), everything.map((one) => one.tier));
  offer(byId("of-reason"), everything.map((one) => one.reason));
  offer(byId("of-tenant"), everything.map((one) => one.tenant));
  const wanted = filters();
  const shown = everything.filter((one) => passes(one, wanted));
  const some = shown.length < everything.length;
  put("range-note", ranged === null && !some ? rangeNote
    : `${some ? `${shown.length} of ` : ""}${everything.length} requests${rangeNote}`);
  byId("tenants").tBodies[0].replaceChildren(...byTenant(shown, dearest).map((tenant) =>
    row([tenant.tenant, tenant.requests, percent(tenant.large / tenant.requests), tenant.failed || "", usd(tenant.usd)])));
  showWhatIf(state);
  const streams = shown.filter((one) => one.ttft_s !== null);
  const part = (state.slo.percentile ?? 95) / 100;
  latencyTile("ttft", streams.map((one) => one.ttft_s), state.slo.ttft_ms, part);
  latencyTile("tpot", streams.filter((one) => one.tpot_s !== null).map((one) => one.tpot_s), state.slo.tpot_ms, part);

  const oldestFirst = [...shown].reverse();
  gainChart(byId("gain-chart"), oldestFirst.map((one) => ({
    at: one.time,
    gain: one.gain,
    tier: tierClass(one.tier),
    text: `${one.tier} (${one.reason})\ngain ${number(one.gain)}\ndifficulty ${number(one.difficulty)}`,
  })), state.set_points.gain_threshold);
  const spent = [];
  const allLarge = [];
  const times = [];
  for (const one of oldestFirst.filter((each) => each.cost_usd !== null)) {
    times.push(one.time);
    spent.push((spent.at(-1) ?? 0) + one.cost_usd);
    allLarge.push((allLarge.at(-1) ?? 0) + (one.cost_all_large_usd ?? 0));
  }
  const large = `tier-${tierClass(dearest)}`;
  lineChart(byId("cost-chart"), [
    { name: `all-${dearest}`, className: large, values: allLarge },
    { name: "routed", className: "tier-2", values: spent },
  ], usd, times);
  legend("gain-legend", tierNames.map((name) => [`tier-${tierClass(name)}`, name]));
  legend("cost-legend", [["tier-2", "routed"], [large, `all-${dearest}`]]);

  // The table is drawn anew each second: who is at a row stays there.
  const focused = document.activeElement?.dataset.request;
  byId("decisions").tBodies[0].replaceChildren(...shown.slice(0, 100).flatMap((one) => {
    const failed = one.status !== null && one.status !== 200;
    const tr = row([
      new Date(one.time * 1000).toLocaleTimeString(),
      one.reason,
      number(one.gain),
      number(one.difficulty),
      ms(one.ttft_s),
      ms(one.tpot_s),
      one.prompt_tokens === null ? "–" : `${one.prompt_tokens} / ${one.output_tokens}`,
      one.cost_usd === null ? "–" : (one.cost_usd * 1e6).toFixed(1),
      one.num_failovers || "",
      { text: one.status === null ? "running" : one.error && !failed ? "broke off" : one.status,
        className: failed || one.error ? "bad" : "", title: one.error ?? "" },
    ]);
    tr.insertBefore(tierCell(one.tier), tr.children[1]);
    const button = document.createElement("button");
    button.type = "button";
    button.className = "open-row";
    button.dataset.request = one.request_id;
    button.textContent = tr.cells[0].textContent;
    button.setAttribute("aria-expanded", String(opened.has(one.request_id)));
    button.setAttribute("aria-label", `why ${one.tier} at ${button.textContent}`);
    button.addEventListener("click", () => toggle(one.request_id));
    tr.cells[0].replaceChildren(button);
    return opened.has(one.request_id) ? [tr, whyRow(one.request_id, tr.cells.length)] : [tr];
  }));
  if (focused) document.querySelector(`[data-request="${CSS.escape(focused)}"]`)?.focus();
}

function legend(id, entries) {
  byId(id).replaceChildren(...entries.map(([className, name]) => {
    const span = document.createElement("span");
    const key = document.createElement("span");
    key.className = `key ${className}`;
    span.append(key, name);
    return span;
  }));
}

async function refresh() {
  try {
    // Requests that were running last time are asked for again until they have ended.
    const running = decisions.findLast((one) => one.status === null);
    const after = running ? running.sequence - 1 : lastSequence;
    const [state, news] = await Promise.all([
      fetch("/admin/state").then((reply) => reply.json()),
      fetch(`/admin/decisions?limit=${MAX_SHOWN}&after=${after}`).then((reply) => reply.json()),
    ]);
    const known = new Set(news.decisions.map((one) => one.sequence));
    decisions = [...news.decisions, ...decisions.filter((one) => !known.has(one.sequence))].slice(0, MAX_SHOWN);
    lastSequence = news.sequence;
    lastState = showState(state);
    showDecisions(state);
    showQuality(state);
    put("link", "live");
    byId("link").className = "good";
  } catch {
    put("link", "the router does not answer");
    byId("link").className = "bad";
  } finally {
    setTimeout(refresh, PERIOD_MS);
  }
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (data && data !== "[DONE]" && !part.startsWith(":")) yield JSON.parse(data);
    }
  }
}

function thumbs(panel, requestId, headers) {
  const line = document.createElement("p");
  line.className = "thumbs";
  const said = document.createElement("span");
  for (const [verdict, sign] of [["good", "\u{1F44D}"], ["bad", "\u{1F44E}"]]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = sign;
    button.setAttribute("aria-label", `this answer is ${verdict}`);
    button.addEventListener("click", async () => {
      const reply = await fetch("/v1/feedback", {
        method: "POST",
        headers,
        body: JSON.stringify({ request_id: requestId, verdict }),
      });
      said.textContent = reply.ok ? ` counted as ${verdict}` : ` ${(await reply.json()).error.message}`;
    });
    line.append(button);
  }
  line.append(said);
  panel.append(line);
}

async function ask(model) {
  const panel = document.createElement("article");
  panel.className = "answer";
  const title = document.createElement("h3");
  const note = document.createElement("p");
  const text = document.createElement("pre");
  title.textContent = model;
  note.textContent = "waiting";
  panel.append(title, note, text);
  byId("answers").append(panel);

  const headers = { "content-type": "application/json" };
  const key = byId("api-key").value;
  if (key) headers.authorization = `Bearer ${key}`;
  const started = performance.now();
  let first = null;
  try {
    const reply = await fetch("/v1/chat/completions", {
      method: "POST",
      headers,
      body: JSON.stringify({
        model,
        messages: [{ role: "user", content: byId("prompt").value }],
        max_tokens: Number(byId("max-tokens").value),
        temperature: Number(byId("temperature").value),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    const tier = reply.headers.get("x-tandem-tier");
    const reason = reply.headers.get("x-tandem-reason");
    const gain = reply.headers.get("x-tandem-gain");
    panel.classList.add(`tier-${tierClass(tier)}`);
    title.textContent = `${tier} · ${reason}${gain === null ? "" : ` · gain ${gain}`}`;
    for await (const chunk of events(reply)) {
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) {
        if (first === null && choice.delta.content) first = performance.now() - started;
        text.textContent += choice.delta.content ?? "";
      }
      if (chunk.usage) {
        const seconds = (performance.now() - started) / 1000;
        note.textContent = `${first === null ? "no text" : `first token ${first.toFixed(0)} ms`} · `
          + `${chunk.usage.completion_tokens} tokens in ${seconds.toFixed(2)} s · `
          + `${(chunk.tandem.cost_usd * 1e6).toFixed(1)} µUSD`;
      }
    }
    thumbs(panel, reply.headers.get("x-request-id"), headers);
  } catch (error) {
    note.textContent = error.message;
    note.className = "bad";
  }
}

async function changeRange() {
  const seconds = RANGES[byId("range").value];
  put("range-note", seconds ? "reading the store" : "");
  try {
    const found = seconds ? await ofRange(seconds) : null;
    ranged = found?.decisions ?? null;
    rangeNote = found?.cut ? ", the newest; the range has more" : "";
  } catch {
    ranged = null;
    rangeNote = "the router does not answer";
  }
  if (lastState) showDecisions(lastState);
}

byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("range").addEventListener("change", changeRange);
for (const id of ["of-tier", "of-reason", "of-tenant", "failed"]) {
  byId(id).addEventListener("change", () => { if (lastState) showDecisions(lastState); });
}
byId("floor").addEventListener("input", () => { if (lastState) showWhatIf(lastState); });

byId("playground").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!byId("prompt").value.trim()) {
    byId("prompt").focus();
    return;
  }
  const compare = event.submitter?.value === "compare";
  const buttons = [...event.target.querySelectorAll("button")];
  for (const button of buttons) button.disabled = true;
  byId("answers").replaceChildren();
  await Promise.all((compare ? [routerName, ...tierNames] : [routerName]).map(ask));
  for (const button of buttons) button.disabled = false;
});

refresh();
