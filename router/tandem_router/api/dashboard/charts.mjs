// Two small charts as SVG, drawn through the DOM so that no style or markup is ever inline.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 46, right: 10, top: 8, bottom: 22 };

function node(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function niceTicks(low, high, count = 4) {
  const span = high - low || 1;
  const raw = span / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const ticks = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) {
    ticks.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  }
  return ticks;
}

// A frame with a y axis; `draw` gets (svg, x, y) where x takes 0..1 and y takes data values.
function frame(holder, low, high, format, draw) {
  const width = holder.clientWidth || 480;
  const height = holder.clientHeight || 220;
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const x = (part) => MARGIN.left + part * (width - MARGIN.left - MARGIN.right);
  const y = (value) =>
    height - MARGIN.bottom - ((value - low) / (high - low || 1)) * (height - MARGIN.top - MARGIN.bottom);
  for (const tick of niceTicks(low, high)) {
    svg.append(
      node("line", { class: "grid", x1: x(0), x2: x(1), y1: y(tick), y2: y(tick) }),
      node("text", { x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, format(tick)),
    );
  }
  svg.append(node("line", { class: "axis", x1: x(0), x2: x(1), y1: y(low), y2: y(low) }));
  draw(svg, x, y, width, height);
  holder.replaceChildren(svg);
  return svg;
}

function tooltip(holder, svg, width, pick) {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  holder.append(tip);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    const found = pick((at - MARGIN.left) / (width - MARGIN.left - MARGIN.right), event);
    tip.hidden = !found;
    if (!found) return;
    tip.textContent = found.text;
    const left = (found.x / width) * box.width;
    tip.style.left = `${left > box.width / 2 ? left - tip.offsetWidth - 12 : left + 12}px`;
    tip.style.top = `${Math.max(0, found.y - 20)}px`;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}

function empty(holder, text) {
  const note = document.createElement("p");
  note.className = "empty";
  note.textContent = text;
  holder.replaceChildren(note);
}

// Where each of some times lies between the first and the last, 0..1; evenly where all are one.
function places(times) {
  const first = times[0];
  const span = times.at(-1) - first;
  return times.map((at, index) => (span > 0 ? (at - first) / span : index / Math.max(1, times.length - 1)));
}

function clock(at, span) {
  const when = new Date(at * 1000);
  return span > 86400 ? when.toLocaleString() : when.toLocaleTimeString();
}

// Begin, middle and end of an axis of times.
function timeAxis(svg, x, height, times) {
  const [first, last] = [times[0], times.at(-1)];
  for (const [part, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
    svg.append(node("text", { x: x(part), y: height - 4, "text-anchor": anchor },
      clock(first + part * (last - first), last - first)));
  }
}

function nearest(parts, part) {
  let best = 0;
  parts.forEach((each, index) => { if (Math.abs(each - part) < Math.abs(parts[best] - part)) best = index; });
  return best;
}

// points: [{at, gain, tier (class index), text}], oldest first.
export function gainChart(holder, points, threshold) {
  const shown = points.filter((point) => point.gain !== null);
  if (!shown.length) return empty(holder, "No routed request with a prediction yet");
  const values = [...shown.map((point) => point.gain), threshold ?? 0, 0];
  const pad = 0.06 * (Math.max(...values) - Math.min(...values) || 1);
  const low = Math.min(...values) - pad;
  const high = Math.max(...values) + pad;
  const times = shown.map((point) => point.at);
  const parts = shown.length === 1 ? [0.5] : places(times);
  let place;
  const svg = frame(holder, low, high, (v) => v.toFixed(2), (svg, x, y, width, height) => {
    place = (index) => [x(parts[index]), y(shown[index].gain)];
    shown.forEach((point, index) => {
      const [cx, cy] = place(index);
      svg.append(node("circle", { class: `dot tier-${point.tier}`, cx, cy, r: 4 }));
    });
    if (threshold !== null) {
      svg.append(
        node("line", { class: "rule", x1: x(0), x2: x(1), y1: y(threshold), y2: y(threshold) }),
        node("text", { x: x(1), y: y(threshold) - 5, "text-anchor": "end" },
          `threshold ${threshold.toFixed(3)}`),
      );
    }
    timeAxis(svg, x, height, times);
  });
  const width = svg.viewBox.baseVal.width;
  tooltip(holder, svg, width, (part) => {
    const index = nearest(parts, part);
    const [px, py] = place(index);
    return { x: px, y: py, text: shown[index].text };
  });
}

// series: [{name, className, values}], equally long, cumulative; times: of the values.
export function lineChart(holder, series, format, times) {
  const length = series[0].values.length;
  if (length < 2) return empty(holder, "Not enough requests yet");
  const high = Math.max(...series.flatMap((one) => one.values)) * 1.05 || 1;
  const parts = places(times);
  let scaleX;
  let scaleY;
  let cross;
  const svg = frame(holder, 0, high, format, (svg, x, y, width, height) => {
    scaleX = (index) => x(parts[index]);
    scaleY = y;
    cross = node("line", { class: "cross", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
    svg.append(cross);
    for (const one of series) {
      const path = one.values.map((v, i) => `${i ? "L" : "M"}${scaleX(i).toFixed(1)},${y(v).toFixed(1)}`);
      svg.append(node("path", { class: `series ${one.className}`, d: path.join("") }));
    }
    timeAxis(svg, x, height, times);
  });
  tooltip(holder, svg, svg.viewBox.baseVal.width, (part) => {
    const index = nearest(parts, part);
    cross.setAttribute("visibility", "visible");
    cross.setAttribute("x1", scaleX(index));
    cross.setAttribute("x2", scaleX(index));
    const text = series.map((one) => `${one.name}  ${format(one.values[index])}`).join("\n");
    return { x: scaleX(index), y: scaleY(series[0].values[index]), text };
  });
}

// points: [{at, measured, low, high, predicted}], oldest first; ratios, null where not known.
export function qualityChart(holder, points, floor) {
  const shown = points.filter((point) => point.measured !== null || point.predicted !== null);
  if (shown.length < 2) return empty(holder, "Too few labels yet; one point a minute while they come");
  const format = (v) => `${(v * 100).toFixed(0)} %`;
  const values = shown.flatMap((p) => [p.measured, p.low, p.high, p.predicted]);
  const known = [...values.filter((v) => v !== null && v !== undefined), floor ?? 1];
  const low = Math.max(0, Math.min(...known) - 0.02);
  const high = Math.min(1.5, Math.max(...known) + 0.02);
  const first = shown[0].at;
  const span = shown.at(-1).at - first || 1;
  let place;
  const svg = frame(holder, low, high, format, (svg, x, y, width, height) => {
    const level = (v) => y(Math.min(high, Math.max(low, v)));
    place = (point) => [x((point.at - first) / span), level(point.measured ?? point.predicted)];
    const line = (name, className) => {
      const part = shown.filter((p) => p[name] !== null && p[name] !== undefined);
      const path = part.map((p, i) =>
        `${i ? "L" : "M"}${x((p.at - first) / span).toFixed(1)},${level(p[name]).toFixed(1)}`);
      if (part.length > 1) svg.append(node("path", { class: `series ${className}`, d: path.join("") }));
    };
    line("low", "bound");
    line("high", "bound");
    line("predicted", "tier-1");
    line("measured", "tier-2");
    if (floor !== null) {
      svg.append(
        node("line", { class: "rule", x1: x(0), x2: x(1), y1: level(floor), y2: level(floor) }),
        node("text", { x: x(1), y: level(floor) - 5, "text-anchor": "end" }, `floor ${format(floor)}`),
      );
    }
    svg.append(
      node("text", { x: x(0), y: height - 4 }, new Date(first * 1000).toLocaleString()),
      node("text", { x: x(1), y: height - 4, "text-anchor": "end" }, "now"),
    );
  });
  tooltip(holder, svg, svg.viewBox.baseVal.width, (part) => {
    const at = first + part * span;
    const point = shown.reduce((a, b) => (Math.abs(b.at - at) < Math.abs(a.at - at) ? b : a));
    const [px, py] = place(point);
    const percent = (v) => (v === null || v === undefined ? "–" : `${(v * 100).toFixed(1)} %`);
    const text = `${new Date(point.at * 1000).toLocaleTimeString()}\nmeasured ${percent(point.measured)}\n`
      + `between ${percent(point.low)} and ${percent(point.high)}\npredicted ${percent(point.predicted)}`;
    return { x: px, y: py, text };
  });
}
