
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const two = data.runs.length === 2;
const letters = ["a", "b"];
const $ = (id) => document.getElementById(id);
const state = { setting: data.settings.length ? data.settings[Math.min(1, data.settings.length - 1)].key : null };

// Elements: text goes in as text, never as HTML, for names of files may hold anything.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "rect", "circle", "text", "g", "title"].includes(tag) || attributes.svg;
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "svg" || value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
const percent = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const run = (number) => make("span", { class: `run ${letters[number]}` }, letters[number].toUpperCase());
const setting = () => data.settings.find((one) => one.key === state.setting);
const address = (name) => "query-" + encodeURIComponent(name);

// A picture's address is made once, when it is first shown.
const addresses = new Map();
function picture(base64, kind) {
  if (!addresses.has(base64)) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    addresses.set(base64, URL.createObjectURL(new Blob([bytes], { type: kind })));
  }
  return addresses.get(base64);
}

// ------------------------------------------------------------------------------------------------ scores and cards
function drawScores() {
  const place = make("div", { class: "scores" });
  if (data.table) {
    const { columns, rows } = data.table;
    const published = rows.some((row) => row.published !== null && row.published !== undefined);
    const differences = rows.some((row) => row.difference);
    const heads = ["", ...(two ? [""] : []), ...columns, ...(differences ? ["B − A, mAP", "95 % of resampled queries"] : []),
      ...(published ? ["mAP of DOLG as published"] : []), "queries counted"].map((head) => make("th", { scope: "col" }, head));
    const body = rows.flatMap((row) => row.values.map((values, number) => {
      const last = number === row.values.length - 1, found = last ? row.difference : null;
      const cells = number ? [] : [make("th", { scope: "row", rowspan: row.values.length }, row.name)];
      if (two) cells.push(make("td", {}, run(number)));
      values.forEach((value, column) => cells.push(make("td", { class: columns[column] === "mAP" ? "map" : null }, percent(value))));
      if (differences) cells.push(
        make("td", {}, found ? signed(found.b - found.a) : ""),
        make("td", {}, found ? `${signed(found.low)} to ${signed(found.high)}${found.low <= 0 && found.high >= 0 ? " (holds 0)" : ""}` : ""));
      if (published) cells.push(make("td", {}, number ? "" : percent(row.published)));
      cells.push(make("td", {}, number ? "" : String(row.counted)));
      return make("tr", { class: number ? "second" : null }, ...cells);
    }));
    place.append(make("div", { class: "panel scroll" },
      make("table", { id: "table" }, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body))));
  }
  const keys = [...new Set(data.runs.flatMap((one) => Object.keys(one.card)))];
  const text = (value) =>
    value === null || value === undefined ? "unknown" : Array.isArray(value) ? value.join(", ") || "none"
      : value === true ? "yes" : value === false ? "no" : typeof value === "object" ? JSON.stringify(value) : String(value);
  const rows = keys.map((key) => {
    const values = data.runs.map((one) => text(one.card[key]));
    return make("tr", { class: new Set(values).size > 1 ? "differs" : null },
      make("th", { scope: "row" }, key.replaceAll("_", " ")), ...values.map((value) => make("td", {}, value)));
  });
  const heads = make("tr", {}, make("th", {}, ""), ...data.runs.map((one, number) =>
    make("th", { scope: "col" }, two ? run(number) : null, two ? " " : null, one.name)));
  place.append(make("details", { class: "card panel", id: "card" },
    make("summary", {}, two ? "What was measured: the cards (what differs is marked)" : "What was measured: the card"),
    make("div", { class: "scroll" }, make("table", {}, make("thead", {}, heads), make("tbody", {}, ...rows))),
    ...data.runs.filter((one) => one.line).map((one) => make("code", {}, one.line))));
  if (!data.table) document.querySelector("#scores h2").textContent = "Descriptors";
  $("scores").append(place);
}

// ----------------------------------------------------------------------------------------------------------- charts
const WIDTH = 380, HEIGHT = 230, LEFT = 38, BOTTOM = 34, TOP = 8, RIGHT = 10;
function frame({ x, y, highest = 1, xTicks, yTicks, label }) {
  const sx = (value) => LEFT + value * (WIDTH - LEFT - RIGHT);
  const sy = (value) => HEIGHT - BOTTOM - (value / highest) * (HEIGHT - BOTTOM - TOP);
  const chart = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
  for (const [value, text] of yTicks) {
    chart.append(make("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: sy(value), y2: sy(value) }));
    chart.append(make("text", { x: LEFT - 6, y: sy(value) + 4, "text-anchor": "end" }, text));
  }
  for (const [value, text] of xTicks)
    chart.append(make("text", { x: sx(value), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, text));
  chart.append(make("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: sy(0), y2: sy(0) }));
  chart.append(make("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, x));
  chart.append(make("text", { x: 11, y: (HEIGHT - BOTTOM) / 2, "text-anchor": "middle", transform: `rotate(-90 11 ${(HEIGHT - BOTTOM) / 2})` }, y));
  return { chart, sx, sy };
}
const fifths = [0, 0.2, 0.4, 0.6, 0.8, 1].map((value) => [value, String(Math.round(100 * value))]);

function histogram(values, { x, scale, label }) {
  const bins = values.map((of_run) => {
    const counts = Array(10).fill(0);
    of_run.forEach((value) => counts[Math.max(0, Math.min(9, Math.floor(value * 10)))]++);
    return counts;
  });
  const highest = Math.max(1, ...bins.flat());
  const step = Math.max(1, Math.ceil(highest / 5));
  const yTicks = [...Array(Math.floor(highest / step) + 1).keys()].map((place) => [place * step, String(place * step)]);
  const { chart, sx, sy } = frame({ x, y: "queries", highest, xTicks: fifths.map(([value]) => [value, scale(value)]), yTicks, label });
  bins.forEach((counts, number) => counts.forEach((count, place) => {
    const left = sx((place + 0.06 + (0.88 / bins.length) * number) / 10), width = (sx(0.088) - sx(0)) / bins.length;
    chart.append(make("rect", { class: `fill ${letters[number]}`, x: left, width: Math.max(1, width - 1), y: sy(count), height: sy(0) - sy(count) },
      make("title", {}, `${count} queries from ${scale(place / 10)} to ${scale((place + 1) / 10)}`)));
  }));
  return chart;
}

function link(query, shape, title) {
  const anchor = make("a", { svg: true, href: "#" + address(query.name), "aria-label": title });
  shape.append(make("title", {}, title));
  anchor.append(shape);
  return anchor;
}

function eachQuery() {
  const counted = data.queries.filter((query) => query.runs.every((one) => one.aps[state.setting] !== null));
  if (two) {
    const { chart, sx, sy } = frame({ x: "AP of A", y: "AP of B", xTicks: fifths, yTicks: fifths, label: "AP of each query in A and B" });
    chart.append(make("line", { class: "axis", x1: sx(0), y1: sy(0), x2: sx(1), y2: sy(1), "stroke-dasharray": "4 4" }));
    for (const query of counted) {
      const [a, b] = query.runs.map((one) => one.aps[state.setting]);
      const dot = make("circle", { class: `fill ${b >= a ? "b" : "a"}`, cx: sx(a / 100), cy: sy(b / 100), r: 4.5 });
      chart.append(link(query, dot, `${query.name}: ${percent(a)} → ${percent(b)}`));
    }
    return chart;
  }
  const sorted = [...counted].sort((one, other) => one.runs[0].aps[state.setting] - other.runs[0].aps[state.setting]);
  const { chart, sx, sy } = frame({ x: `${sorted.length} queries, worst to best: click one`, y: "AP", xTicks: [], yTicks: fifths, label: "AP of each query, sorted" });
  sorted.forEach((query, place) => {
    const ap = query.runs[0].aps[state.setting], width = (sx(1) - sx(0)) / sorted.length;
    const bar = make("rect", { class: "fill a", x: sx(0) + place * width, width: Math.max(0.8, width * 0.86), y: sy(ap / 100) - 1.5, height: sy(0) - sy(ap / 100) + 1.5 });
    chart.append(link(query, bar, `${query.name}: ${percent(ap)}`));
  });
  return chart;
}

function meanCurve() {
  const { chart, sx, sy } = frame({ x: "recall", y: "precision", xTicks: fifths, yTicks: fifths, label: "Mean precision at each recall" });
  data.curves.forEach((of_run, number) => {
    const points = of_run[state.setting].map((value, place) => `${sx(place / 100)},${sy(value)}`);
    if (points.length) chart.append(make("path", { class: `curve ${letters[number]}`, d: "M" + points.join("L") }));
  });
  return chart;
}

function drawCurves() {
  const place = document.querySelector("#curves .panels");
  const panel = (title, chart) => make("div", { class: "panel" }, make("h3", {}, title), chart);
  if (!data.settings.length) {
    const firsts = data.runs.map((_, number) => data.queries.map((query) => query.runs[number].found[0]?.[1] ?? 0));
    place.replaceChildren(panel("Similarity of the first result",
      histogram(firsts, { x: "similarity (cosine)", scale: (value) => value.toFixed(1), label: "Similarity of the first result" })));
  } else {
    const aps = data.runs.map((_, number) => data.queries.map((query) => query.runs[number].aps[state.setting])
      .filter((ap) => ap !== null).map((ap) => ap / 100));
    const name = setting().name;
    place.replaceChildren(
      panel(`Distribution of AP, ${name}`, histogram(aps, { x: "AP", scale: (value) => String(Math.round(100 * value)), label: `Distribution of AP, ${name}` })),
      panel(`AP of each query, ${name}`, eachQuery()),
      panel(`Precision at recall, mean of queries, ${name}`, meanCurve()));
  }
}

function smallCurve(query) {
  const width = 210, height = 110, left = 22, bottom = 16;
  const sx = (value) => left + value * (width - left - 4), sy = (value) => height - bottom - value * (height - bottom - 4);
  const chart = make("svg", { viewBox: `0 0 ${width} ${height}`, class: "curve-of-one", role: "img", "aria-label": "Precision and recall" });
  for (const value of [0, 0.5, 1]) {
    chart.append(make("line", { class: value ? "grid" : "axis", x1: sx(0), x2: sx(1), y1: sy(value), y2: sy(value) }));
    chart.append(make("text", { x: left - 4, y: sy(value) + 4, "text-anchor": "end" }, value === 0.5 ? ".5" : String(value)));
  }
  chart.append(make("text", { x: sx(0.5), y: height - 2, "text-anchor": "middle" }, "recall → precision ↑"));
  query.runs.forEach((one, number) => {
    const ranks = one.ranks[state.setting];
    if (!ranks.length) return;
    // Before and at each right image, as average precision sums it up.
    const points = [];
    ranks.forEach((rank, place) => {
      points.push([place / ranks.length, rank ? place / rank : 1], [(place + 1) / ranks.length, (place + 1) / (rank + 1)]);
    });
    chart.append(make("path", { class: `curve ${letters[number]}`, d: "M" + points.map(([x, y]) => `${sx(x)},${sy(y)}`).join("L") }));
  });
  return chart;
}

// ---------------------------------------------------------------------------------------------------------- queries
const INITIALS = { easy: "E", hard: "H", junk: "J", negative: "–", same: "✓", other: "–" };
function result(query, number, row, place, rank, right) {
  const [image, value, label] = row, [name, photo] = data.images[image];
  const out = label && setting() && setting().ignored.includes(label);
  const told = `${name}, rank ${rank}${right ? "" : `, similarity ${value.toFixed(4)}`}${label ? `, ${label}` : ""}${out ? " (ignored in this setting)" : ""}`;
  const shown = photo ? make("img", { src: picture(photo, "image/jpeg"), alt: "", loading: "lazy", decoding: "async" }) : make("span", { class: "none" }, name);
  return make("figure", { class: `${label}${out ? " out" : ""}`, title: told },
    make("button", { type: "button", "aria-label": told, onclick: () => view(query, number, place, right) }, shown),
    make("figcaption", {}, make("b", {}, `${rank}${label ? " " + INITIALS[label] : ""}`), right ? null : value.toFixed(3)));
}

function runBlock(query, number) {
  const one = query.runs[number], ap = one.aps[state.setting];
  const block = make("div", { class: "of-run" });
  const first = one.found.filter((row) => setting() && setting().right.includes(row[2])).length;
  block.append(make("div", { class: "head" }, two ? run(number) : null,
    data.settings.length ? make("b", {}, ap === null ? "no right images in this setting" : `AP ${percent(ap)}`) : make("b", {}, "Most similar"),
    data.settings.length && ap !== null ? make("small", {}, `${first} of ${one.ranks[state.setting].length} right images among the first ${one.found.length}`) : null));
  block.append(make("div", { class: "results" }, ...one.found.map((row, place) => result(query, number, row, place, place + 1, false))));
  const missed = one.missed.map((row, place) => [row, place]).filter(([row]) => setting() && setting().right.includes(row[2]));
  if (missed.length)
    block.append(make("div", { class: "head" }, make("small", {}, `right images further down${one.later > one.missed.length ? ` (the first ${one.missed.length} of ${one.later})` : ""}:`)),
      make("div", { class: "results further" }, ...missed.map(([row, place]) => result(query, number, row, place, row[1] + 1, true))));
  return block;
}

function fill(block, query) {
  const apRows = data.settings.map((one) => make("tr", { class: one.key === state.setting ? "now" : null },
    make("th", { scope: "row" }, one.name), ...query.runs.map((of_run) => make("td", {}, percent(of_run.aps[one.key])))));
  const layers = [query.photo
    ? make("img", { class: "own", src: picture(query.photo, "image/jpeg"), alt: `query ${query.name}`, decoding: "async" })
    : make("span", { class: "none" }, "no picture")];
  const heats = query.heat.map((heat, number) => ({ heat, number })).filter((one) => one.heat);
  const views = heats.length > 1 && query.heat[0] !== query.heat[1] ? heats : heats.slice(0, 1);
  const photos = (views.length ? views : [null]).map((one) => make("div", {},
    views.length > 1 ? make("div", {}, run(one.number)) : null,
    make("div", { class: "photo" }, ...layers.map((layer) => layer.cloneNode(true)),
      one ? make("img", { class: "heat", src: picture(one.heat, "image/png"), alt: "attention of the local branch" }) : null)));
  block.replaceChildren(
    make("div", { class: "about" }, make("h3", {}, make("a", { href: "#" + address(query.name) }, query.name)), ...photos,
      data.settings.length ? make("table", { class: "aps" },
        two ? make("tr", {}, make("th", {}, "AP"), ...query.runs.map((_, number) => make("td", {}, run(number)))) : null, ...apRows) : null,
      data.settings.length ? smallCurve(query) : null),
    make("div", { class: two ? "side-by-side" : null }, ...query.runs.map((_, number) => runBlock(query, number))));
}

const blocks = new Map();
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const block = blocks.get(entry.target.dataset.name);
    if (entry.isIntersecting && block.drawn !== state.setting) { fill(block.element, block.query); block.drawn = state.setting; }
  }
}, { rootMargin: "1200px" });

const ap = (query, number = 0) => query.runs[number].aps[state.setting];
const firstScore = (query) => query.runs[0].found[0]?.[1] ?? 0;
const nullsLast = (key) => (one, other) => {
  const [a, b] = [key(one), key(other)];
  return a === null || b === null ? (a === null) - (b === null) : a - b;
};
const change = (query) => (ap(query, 0) === null || ap(query, 1) === null ? null : ap(query, 1) - ap(query, 0));
const minus = (key) => (query) => (key(query) === null ? null : -key(query));
const ORDERS = data.settings.length
  ? [["set", "as in the set", null], ["worst", two ? "worst of A first" : "worst first", nullsLast(ap)], ["best", two ? "best of A first" : "best first", nullsLast(minus(ap))],
    ...(two ? [["gain", "largest gain of B first", nullsLast(minus(change))], ["loss", "largest loss of B first", nullsLast(change)]] : [])]
  : [["set", "as in the set", null], ["best", "most similar first result", nullsLast(minus(firstScore))], ["worst", "least similar first result", nullsLast(firstScore)]];
const wrongFirst = (query) => query.runs.some((one) => {
  const row = one.found.find((found) => !setting().ignored.includes(found[2]));
  return row && !setting().right.includes(row[2]);
});
const ONLY = [["all", "all queries", () => true],
  ...(data.settings.length ? [
    ["counted", "with right images", (query) => ap(query) !== null],
    ["wrong", "first result wrong", (query) => ap(query) !== null && wrongFirst(query)],
    ["missed", "right images further down", (query) => query.runs.some((one) => one.missed.some((row) => setting().right.includes(row[2])))]] : []),
  ...(two ? [["changed", "A and B differ", (query) => data.settings.length ? change(query) !== null && change(query) !== 0
    : query.runs[0].found.some((row, place) => row[0] !== query.runs[1].found[place]?.[0])]] : [])];

function arrange() {
  const order = ORDERS.find(([key]) => key === $("order").value), only = ONLY.find(([key]) => key === $("only").value);
  const wanted = $("filter").value.trim().toLowerCase();
  let queries = data.queries.filter((query) => only[2](query) && query.name.toLowerCase().includes(wanted));
  if (order[2]) queries = [...queries].sort(order[2]);
  const list = $("list");
  list.replaceChildren(...queries.map((query) => blocks.get(query.name).element));
  if (!queries.length) list.append(make("p", { class: "empty panel" }, "No query is like that."));
  $("count").textContent = `${queries.length} of ${data.queries.length} queries`;
  near.disconnect();
  queries.forEach((query) => near.observe(blocks.get(query.name).element));
}

function drawLegend() {
  const told = data.settings.length > 1
    ? [["easy", "easy"], ["hard", "hard"], ["junk", "junk"], ["negative", "negative"]] : data.settings.length
      ? [["same", "same label"], ["other", "other label"]] : [];
  const now = setting();
  $("legend").replaceChildren(...told.map(([label, name]) => make("span", {}, make("i", { class: label }), make("b", {}, `${INITIALS[label]} ${name}`),
    now.ignored.includes(label) ? " (ignored)" : now.right.includes(label) ? " (right)" : "")),
  make("span", {}, "number: rank; below the picture: cosine similarity"));
}

// ----------------------------------------------------------------------------------------------------------- viewer
let viewed = null;
function view(query, number, place, further) {
  const one = query.runs[number], rows = further ? one.missed : one.found;
  viewed = { query, number, place, further, count: rows.length };
  const [image, value, label] = rows[place], [name, photo] = data.images[image];
  const rank = further ? value + 1 : place + 1;
  const show = (base64, text) => (base64 ? make("img", { src: picture(base64, "image/jpeg"), alt: text }) : make("span", { class: "none" }, text));
  document.querySelector("#viewer .pair").replaceChildren(
    make("figure", {}, make("div", { class: "frame" }, show(query.photo, query.name)), make("figcaption", {}, query.name)),
    make("figure", {}, make("div", { class: `frame ${label}` }, show(photo, name)), make("figcaption", {}, name)));
  $("told").textContent = `${two ? letters[number].toUpperCase() + ", " : ""}rank ${rank}${further ? "" : `, similarity ${value.toFixed(4)}`}${label ? `: ${label}` : ""}`;
  $("previous").disabled = place === 0;
  $("next").disabled = place === rows.length - 1;
  if (!$("viewer").open) $("viewer").showModal();
}
function step(by) {
  const to = viewed.place + by;
  if (to >= 0 && to < viewed.count) view(viewed.query, viewed.number, to, viewed.further);
}

// ------------------------------------------------------------------------------------------------------------ start
function show() {
  drawCurves();
  drawLegend();
  arrange();
}
function goToAddress() {
  const block = [...blocks.values()].find((one) => "#" + one.element.id === location.hash);
  if (!block) return;
  if (!block.element.isConnected) { $("filter").value = ""; $("only").value = "all"; arrange(); }
  fill(block.element, block.query);
  block.drawn = state.setting;
  // What lies above is drawn as it comes near, and is then of another height than was assumed.
  const scroll = (times) => {
    block.element.scrollIntoView();
    if (times) setTimeout(() => requestAnimationFrame(() => scroll(times - 1)), 60);
  };
  scroll(3);
}

document.querySelector("h1").textContent = data.title;
$("counts").textContent = data.counts;
$("runs").append(...data.runs.map((one, number) => make("span", {}, two ? run(number) : null, two ? " " : null, one.name)));
$("notes").append(...data.notes.map((note) => make("p", { class: "note" }, note)));
drawScores();
for (const query of data.queries) {
  const element = make("article", { class: "query panel", id: address(query.name), "data-name": query.name }, make("h3", {}, query.name));
  blocks.set(query.name, { element, query, drawn: undefined });
}
data.settings.forEach((one) => $("settings").append(make("label", {},
  make("input", { type: "radio", name: "setting", value: one.key, checked: one.key === state.setting ? "" : null, onchange: () => { state.setting = one.key; show(); } }), one.name)));
$("settings").hidden = data.settings.length < 2;
ORDERS.forEach(([key, name]) => $("order").append(make("option", { value: key }, name)));
ONLY.forEach(([key, name]) => $("only").append(make("option", { value: key }, name)));
$("only").parentElement.hidden = ONLY.length < 2;
$("ignored").parentElement.hidden = !data.settings.some((one) => one.ignored.length);
const anyHeat = data.queries.some((query) => query.heat.some((heat) => heat));
$("heat").parentElement.hidden = !anyHeat;
for (const id of ["order", "only"]) $(id).addEventListener("change", arrange);
$("filter").addEventListener("input", arrange);
$("heat").addEventListener("change", () => document.body.classList.toggle("with-heat", $("heat").checked));
$("ignored").addEventListener("change", () => $("list").classList.toggle("hide-ignored", !$("ignored").checked));
$("tools").addEventListener("submit", (event) => event.preventDefault());
$("close").addEventListener("click", () => $("viewer").close());
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("viewer").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
$("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
window.addEventListener("hashchange", goToAddress);
show();
goToAddress();
