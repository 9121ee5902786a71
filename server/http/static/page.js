// The page about one server. It reads, once a second while somebody looks, and inserts what it read as text alone.

import { ask, knows } from "./picture.js";

const RATE_MS = 10_000;
const QUANTILE_MS = 60_000;
const LOOK_MS = 1000;
const SLOWEST_MS = 30_000;
const INDEX_MS = 15_000;
const NAMED = 50;
const DASH = "–";

const at = (id) => document.getElementById(id);
const kept = window.sessionStorage;
const KEY = "convoy-token";
let samples = [];
let index = [];
let indexed = -Infinity;
let timer = 0;
let failures = 0;
const cards = new Map();

function el(name, options = {}, ...children) {
  const made = Object.assign(document.createElement(name), options);
  made.append(...children);
  return made;
}

function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Requests.

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function send(path, options = {}) {
  const token = kept.getItem(KEY);
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  let why = "";
  try {
    why = (await response.json()).error;
  } catch {
    why = response.statusText;
  }
  throw new Refused(response.status, why || `status ${response.status}`);
}

async function look() {
  window.clearTimeout(timer);
  let wait = LOOK_MS;
  try {
    const state = await (await send("page/state", { signal: AbortSignal.timeout(SLOWEST_MS) })).json();
    if (state.milliseconds - indexed > INDEX_MS || state.milliseconds < indexed) {
      index = await (await send("v2/repository/index", { method: "POST" })).json();
      indexed = state.milliseconds;
    }
    failures = 0;
    at("access").hidden = true;
    at("known").hidden = !kept.getItem(KEY);
    show(state);
  } catch (error) {
    wait = failed(error);
  }
  window.clearTimeout(timer);
  if (wait) timer = window.setTimeout(() => document.hidden || look(), wait);
}

// What a look that failed means; milliseconds to the next one, 0 for none.
function failed(error) {
  const refused = error instanceof Refused;
  if (refused && (error.status === 401 || error.status === 403)) {
    mark(at("server"), "bad", "a token is needed");
    say(at("access-why"), `The server says: ${error.message}.`);
    at("known").hidden = !kept.getItem(KEY);
    if (at("access").hidden) {
      at("access").hidden = false;
      at("token").focus();
    }
    return 0;
  }
  failures += 1;
  mark(at("server"), "bad", refused ? `the server says: ${error.message}` : "the server does not answer");
  return Math.min(LOOK_MS * 2 ** failures, SLOWEST_MS);
}

function mark(node, kind, text) {
  node.className = `state ${kind}`;
  say(node, text);
}

// Numbers of a span of time, from counters at its ends.

function sampleBefore(milliseconds) {
  const last = samples[samples.length - 1];
  return samples.find((one) => last.milliseconds - one.milliseconds <= milliseconds) ?? last;
}

const sum = (counts) => Object.values(counts ?? {}).reduce((total, count) => total + count, 0);

// A counter that went down began anew.
const grown = (now, then) => (now >= then ? now - then : now);

function rate(now, then, of) {
  const seconds = (now.milliseconds - then.milliseconds) / 1000;
  return seconds > 0 ? grown(of(now), of(then)) / seconds : null;
}

function between(now, then) {
  if (!then || then.length !== now.length || now.some((count, place) => count < then[place])) return now;
  return now.map((count, place) => count - then[place]);
}

// As Prometheus' histogram_quantile(): even within a bucket, and above the last bound that bound.
export function quantile(share, counts, bounds) {
  const total = sum(counts);
  if (!total) return null;
  let below = 0;
  for (let place = 0; place < bounds.length; place += 1) {
    if (counts[place] && below + counts[place] >= share * total) {
      const low = place ? bounds[place - 1] : 0;
      return low + ((bounds[place] - low) * (share * total - below)) / counts[place];
    }
    below += counts[place];
  }
  return bounds[bounds.length - 1];
}

function added(lists) {
  return lists.reduce((total, list) => list.map((count, place) => count + (total[place] ?? 0)), []);
}

function number(value) {
  if (value === null || !Number.isFinite(value)) return DASH;
  return value >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toFixed(value >= 10 ? 1 : 2)));
}

function milliseconds(seconds) {
  return seconds === null ? DASH : seconds >= 1 ? `${number(seconds)} s` : `${Number((1000 * seconds).toPrecision(2))} ms`;
}

// What is shown.

function figures(list, values) {
  for (const [name, value] of values) {
    let box = [...list.children].find((one) => one.dataset.name === name);
    if (!box) {
      box = el("div", {}, el("dt", { textContent: name }), el("dd"));
      box.dataset.name = name;
      list.append(box);
    }
    say(box.lastChild, value);
  }
}

const keyOf = (model) => `${model.name} ${model.version}`;

function show(state) {
  const last = samples[samples.length - 1];
  if (last && state.milliseconds < last.milliseconds) samples = []; // another process
  state.byKey = new Map(state.models.map((model) => [keyOf(model), model]));
  samples.push(state);
  samples = samples.filter((one) => state.milliseconds - one.milliseconds <= QUANTILE_MS + LOOK_MS);
  say(at("version"), state.server.version);
  const ready = state.models.filter((model) => model.state === "READY").length;
  const how = state.server.ready ? "ready" : "not ready";
  mark(at("server"), state.server.ready ? "good" : "bad", `${how}: ${ready} of ${state.models.length} models`);
  showNow(state);
  showCards(state);
  showUnloaded(new Set(state.models.map((model) => model.name)));
  showChoice(state);
}

function showNow(state) {
  const [rates, quantiles] = [sampleBefore(RATE_MS), sampleBefore(QUANTILE_MS)];
  const all = (of) => (one) => one.models.reduce((total, model) => total + of(model), of(one.others));
  const latency = added(
    state.models.filter((model) => model.latency?.length).map((model) => between(model.latency, quantiles.byKey.get(keyOf(model))?.latency)),
  );
  figures(at("now"), [
    ["requests/s", number(rate(state, rates, all((one) => sum(one.requests))))],
    ["p50", milliseconds(quantile(0.5, latency, state.latency_bounds))],
    ["p99", milliseconds(quantile(0.99, latency, state.latency_bounds))],
    ["waiting", number(all((one) => one.queued ?? 0)(state))],
    ["refused/s", number(rate(state, rates, all((one) => sum(one.rejected))))],
  ]);
}

const KINDS = { READY: "good", LOADING: "", UNLOADING: "" };

function showCards(state) {
  for (const [key, card] of cards) {
    if (!state.byKey.has(key)) {
      card.root.remove();
      cards.delete(key);
    }
  }
  at("none").hidden = state.models.length > 0;
  state.models.forEach((model, place) => {
    const key = keyOf(model);
    if (!cards.has(key)) cards.set(key, newCard(model));
    const card = cards.get(key);
    if (at("cards").children[place] !== card.root) at("cards").insertBefore(card.root, at("cards").children[place] ?? null);
    fill(card, model, state);
  });
}

// What the repository holds beside, where clients say what is loaded.
function showUnloaded(known) {
  const names = [...new Set(index.map((entry) => entry.name))].filter((name) => !known.has(name));
  const more = names.length > NAMED ? ` and ${names.length - NAMED} more` : "";
  say(at("unloaded"), `Not loaded: ${names.slice(0, NAMED).join(", ")}${more}.`);
  at("unloaded").hidden = !names.length;
}

function newCard(model) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 60 24");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.append(path);
  const card = {
    state: el("span"), engine: el("p", { className: "quiet" }), why: el("p", { className: "why" }), figures: el("dl", { className: "figures" }),
    path, svg, batches: el("dl", { className: "bars" }), refusals: el("p", { className: "quiet" }), report: el("a", { textContent: "The report of its export" }),
  };
  const title = el("h3", {}, model.name, el("span", { className: "quiet", textContent: model.version ? `  version ${model.version}` : "" }));
  card.more = el("details", {}, el("summary", { textContent: "Batches and refusals" }), card.batches, card.refusals);
  card.root = el("article", { className: "card" }, el("div", { className: "head" }, title, card.state), card.engine, card.why, card.figures, svg, card.more, el("p", {}, card.report));
  card.report.addEventListener("click", openReport);
  return card;
}

function fill(card, model, state) {
  mark(card.state, KINDS[model.state] ?? "bad", (model.state || "not loaded").toLowerCase());
  say(card.why, model.reason);
  card.why.hidden = !model.reason;
  const served = model.latency !== undefined;
  for (const node of [card.figures, card.svg, card.more, card.engine]) node.toggleAttribute("hidden", !served);
  card.report.parentNode.hidden = !model.report;
  if (!served) return;
  const { runtime, device, instances } = model.engine;
  const parts = [runtime || model.platform, model.precision, device && runtime !== device ? `on ${device}` : "", Number(instances) > 1 ? `${instances} engines` : ""];
  say(card.engine, [parts.filter(Boolean).join(", "), model.task].filter(Boolean).join(" · "));
  card.report.href = `v2/models/${encodeURIComponent(model.name)}/versions/${model.version}/report`;
  const key = keyOf(model);
  const [rates, quantiles] = [sampleBefore(RATE_MS), sampleBefore(QUANTILE_MS)];
  const of = (field) => (one) => field(one.byKey.get(key) ?? {});
  const latency = between(model.latency, quantiles.byKey.get(key)?.latency);
  const rows = grown(model.rows, quantiles.byKey.get(key)?.rows ?? 0);
  const batches = grown(model.batches, quantiles.byKey.get(key)?.batches ?? 0);
  figures(card.figures, [
    ["requests/s", number(rate(state, rates, of((one) => sum(one.requests))))],
    ["p50", milliseconds(quantile(0.5, latency, state.latency_bounds))],
    ["p99", milliseconds(quantile(0.99, latency, state.latency_bounds))],
    ["waiting", number(model.queued)],
    ["rows/batch", number(batches ? rows / batches : null)],
    ["refused/s", number(rate(state, rates, of((one) => sum(one.rejected))))],
  ]);
  card.path.setAttribute("d", sparkline(key));
  showBatches(card.batches, model.batch_rows, state.batch_bounds);
  const told = (counts) => Object.entries(counts).map(([name, count]) => `${count.toLocaleString("en")} ${name}`).join(", ");
  say(card.refusals, `Since it was loaded: ${told(model.requests) || "no request"}. Refused or given up: ${told(model.rejected) || "none"}.`);
}

// Requests a second over the last minute.
function sparkline(key) {
  const end = samples[samples.length - 1].milliseconds;
  const points = samples.slice(1).map((one, place) => {
    const value = rate(one, samples[place], (sample) => sum(sample.byKey.get(key)?.requests));
    return [60 - (60 * (end - one.milliseconds)) / QUANTILE_MS, value ?? 0];
  });
  if (!points.length) return "";
  const most = Math.max(...points.map(([, value]) => value), 1);
  const line = points.map(([x, value]) => `L${x.toFixed(2)} ${(23 - (22 * value) / most).toFixed(2)}`).join("");
  return `M${points[0][0].toFixed(2)} 23${line}V23Z`;
}

function rowsBetween(below, most) {
  if (most === undefined) return `over ${below} rows`;
  return most - below > 1 ? `${below + 1}–${most} rows` : `${most} ${most === 1 ? "row" : "rows"}`;
}

function showBatches(list, counts, bounds) {
  const total = sum(counts);
  const shown = counts
    .map((count, place) => ({ count, name: rowsBetween(bounds[place - 1] ?? 0, bounds[place]) }))
    .filter(({ count }) => count);
  while (list.children.length > shown.length) list.lastChild.remove();
  shown.forEach(({ name, count }, place) => {
    let line = list.children[place];
    if (!line) {
      line = el("div", {}, el("dt"), el("dd", { className: "bar", ariaHidden: "true" }, el("i")), el("dd"));
      list.append(line);
    }
    say(line.children[0], name);
    line.children[1].firstChild.style.width = `${(100 * count) / total}%`;
    say(line.children[2], count.toLocaleString("en"));
  });
}

// A link cannot carry a token: with one the report is fetched and kept as a file.
async function openReport(event) {
  if (!kept.getItem(KEY)) {
    event.currentTarget.target = "_blank";
    event.currentTarget.rel = "noopener";
    return;
  }
  event.preventDefault();
  const [, name, version] = /models\/([^/]+)\/versions\/([^/]+)/.exec(event.currentTarget.href);
  try {
    const response = await send(event.currentTarget.href);
    const url = URL.createObjectURL(await response.blob());
    el("a", { href: url, download: `${decodeURIComponent(name)}-${version}-report.html` }).click();
    window.setTimeout(() => URL.revokeObjectURL(url), SLOWEST_MS);
  } catch (error) {
    mark(at("server"), "bad", error.message);
  }
}

// A picture.

function showChoice(state) {
  const able = state.models.filter((model) => model.state === "READY" && model.takes_images && knows(model.task));
  at("picture").hidden = !able.length;
  const wanted = able.map((model) => ({ value: JSON.stringify([model.name, model.version]), text: `${model.name}, version ${model.version}` }));
  const list = at("asked");
  if (JSON.stringify(wanted.map((one) => one.value)) === JSON.stringify([...list.options].map((one) => one.value))) return;
  const before = list.value;
  list.replaceChildren(...wanted.map((one) => el("option", one)));
  if (wanted.some((one) => one.value === before)) list.value = before;
}

let asking = 0;
let file = null;

async function showPicture() {
  if (!file || !at("asked").value) return;
  const turn = (asking += 1);
  const [name, version] = JSON.parse(at("asked").value);
  const path = `v2/models/${encodeURIComponent(name)}/versions/${version}`;
  say(at("failure"), "");
  say(at("outcome"), `Asking ${name} about ${file.name}.`);
  const picture = at("shown");
  const url = URL.createObjectURL(file);
  try {
    const config = await (await send(`${path}/config`)).json();
    picture.src = url;
    await picture.decode().catch(() => {
      throw new Error(`'${file.name}' is no picture that this browser can show`);
    });
    at("overlay").width = at("overlay").height = 0;
    at("found").replaceChildren();
    at("answer").hidden = false;
    const begun = performance.now();
    const size = storedSize(picture);
    const answer = await ask(send, path, config, file, size);
    if (turn !== asking) return;
    // As wide as there is room for, never higher than most of the window; small ones are enlarged.
    at("canvas").style.width = `min(100%, ${(70 * size[0]) / size[1]}vh, ${Math.max(size[0], 360)}px)`;
    say(at("outcome"), `${name} answered in ${Math.round(performance.now() - begun)} ms, the way included. ${answer.summary}`);
    answer.overlay?.(at("overlay"));
    say(at("evidence"), answer.evidence ?? "");
    picture.alt = `The picture that was asked about: ${file.name}`;
    say(at("caption"), `${file.name}, ${size.join(" by ")} pixels`);
    at("found").replaceChildren(...answer.entries.map((entry, place) => entryShown(entry, answer.explain && explaining(answer, turn), !place)));
  } catch (error) {
    if (turn !== asking) return;
    at("answer").hidden = true;
    say(at("outcome"), "");
    say(at("failure"), error.message);
  } finally {
    URL.revokeObjectURL(url);
  }
}

// Width and height as the server sees them: EXIF turns neither its pixels nor those of #shown, only these two numbers.
function storedSize(picture) {
  const { naturalWidth: width, naturalHeight: height } = picture;
  const shown = picture.getBoundingClientRect();
  return width > height === shown.width > shown.height ? [width, height] : [height, width];
}

// Shows the evidence for an entry instead of that for the first.
function explaining(answer, turn) {
  let latest = null;
  return async (entry, button) => {
    latest = button;
    try {
      const { overlay, evidence } = await answer.explain(entry);
      if (turn !== asking || latest !== button) return;
      overlay(at("overlay"));
      say(at("evidence"), evidence);
      say(at("failure"), "");
      for (const other of at("found").querySelectorAll("button")) other.ariaPressed = String(other === button);
    } catch (error) {
      if (turn === asking) say(at("failure"), error.message);
    }
  };
}

function entryShown(entry, explain, first) {
  const swatch = el("span", { className: "swatch", ariaHidden: "true" });
  if (entry.color) swatch.style.background = `rgb(${entry.color.join()})`;
  const bar = el("span", { className: "bar", ariaHidden: "true" }, el("i"));
  bar.firstChild.style.width = `${100 * Math.min(1, Math.max(0, entry.share))}%`;
  const line = el("li", {}, ...(entry.color === undefined ? [] : [swatch]), labelShown(entry, explain, first), el("span", { className: "value", textContent: entry.text }), bar);
  if (entry.place) line.append(el("span", { className: "place", textContent: entry.place }));
  return line;
}

function labelShown(entry, explain, first) {
  if (!explain) return el("span", { className: "label", textContent: entry.label });
  const button = el("button", { type: "button", className: "label", textContent: entry.label, ariaPressed: String(first), title: "Show where the evidence for it lies" });
  button.addEventListener("click", () => explain(entry, button));
  return button;
}

function take(files) {
  if (!files.length) return;
  [file] = files;
  showPicture();
}

at("file").addEventListener("change", (event) => {
  take([...event.target.files]);
  event.target.value = ""; // the same file may be chosen again
});
at("asked").addEventListener("change", showPicture);
for (const kind of ["dragenter", "dragover"]) {
  at("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
}
at("drop").addEventListener("dragleave", () => at("drop").classList.remove("over"));
at("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take([...event.dataTransfer.files]);
});
at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  kept.setItem(KEY, at("token").value.trim());
  at("token").value = "";
  look();
});
at("forget").addEventListener("click", () => {
  kept.removeItem(KEY);
  window.location.reload();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && at("access").hidden) look();
});
look();
