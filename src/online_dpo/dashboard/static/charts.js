// The page of a run's charts: asks for points of the charts that can be seen, follows live runs, zooms all together.
import { Chart, colours } from "/static/chart.js";
import { follow } from "/static/live.js";

const container = document.getElementById("charts");
const status = document.getElementById("status");
const input = (id) => document.getElementById(id);
const address = new URLSearchParams(location.search);
const LOST = "No connection to the dashboard: has it been stopped? New steps are not shown.";
const MOST_POINTS = 3; // for each pixel, before a live chart asks for fewer

const view = {
  runs: [...document.querySelectorAll(".chip")].map((chip) => ({ id: chip.dataset.run, name: chip.dataset.name })),
  colours: colours(),
  log: address.get("log") === "1",
  smoothing: Number(address.get("smoothing")) || 0,
  range: address.has("from") && address.has("to") ? [Number(address.get("from")), Number(address.get("to"))] : null,
  marks: new Map(),
  showsMarks: address.get("events") !== "0",
  samplesOf: (run, step) => `/runs/${run.id}/pairs?step_min=${step}&step_max=${step}`,
  onPick: (run, step) => (location.href = view.samplesOf(run, step)),
  onZoom: zoom,
  onHover: hover,
};
const cursors = new Map(JSON.parse(container.dataset.cursors).map((cursor) => [cursor.split(":")[0], cursor]));
const charts = new Map();

// Charts that come into sight, and those that leave it

const sight = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const chart = charts.get(entry.target.dataset.metric);
    if (chart) chart.isWanted = entry.isIntersecting;
  }
  askSoon();
}, { rootMargin: "300px" });

const sizes = new ResizeObserver((entries) => {
  for (const entry of entries) charts.get(entry.target.closest("figure").dataset.metric)?.resize();
});

function adopt(root) {
  for (const figure of root.querySelectorAll("figure.chart")) {
    if (charts.has(figure.dataset.metric)) continue;
    charts.set(figure.dataset.metric, new Chart(figure, view));
    sight.observe(figure);
    sizes.observe(figure.querySelector(".plot"));
  }
}

let waiting = 0;
function askSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(ask, 30);
}

// One request a run for all charts that need points.
async function ask() {
  const needy = [...charts.values()].filter((chart) => chart.isWanted && chart.isStale && !chart.figure.hidden);
  if (!needy.length) return;
  const query = new URLSearchParams(needy.map((chart) => ["metric", chart.metric]));
  query.set("points", Math.round(needy[0].plotElement.clientWidth) || 300);
  if (view.smoothing) query.set("smoothing", view.smoothing);
  if (view.range) {
    query.set("from", view.range[0]);
    query.set("to", view.range[1]);
  }
  for (const chart of needy) chart.isStale = false;
  const answers = await Promise.all(view.runs.map((run) => fetchJson(`/runs/${run.id}/series?${query}`)));
  for (const answer of answers) {
    if (!answer) continue;
    for (const chart of needy) chart.setPoints(answer.run, answer.series[chart.metric] ?? { raw: [[], []] });
  }
  for (const chart of needy) chart.draw();
}

async function fetchJson(url) {
  try {
    const response = await fetch(url);
    if (response.ok) return await response.json();
    status.textContent = "The dashboard does not answer: reload the page.";
  } catch {
    status.textContent = "The dashboard does not answer: has it been stopped?";
  }
  return null;
}

function renew() {
  for (const chart of charts.values()) chart.isStale = true;
  askSoon();
}

// Live runs

function receive({ run, cursor, series }) {
  cursors.set(run, cursor);
  let hasNew = false;
  for (const [metric, points] of Object.entries(series)) {
    const chart = charts.get(metric);
    if (!chart) {
      hasNew = true;
      continue;
    }
    if (chart.isStale) {
      chart.last.set(run, points[1][points[1].length - 1]);
      chart.show(null);
      continue;
    }
    const known = chart.data.get(run)?.raw[0] ?? [];
    const last = known.length ? known[known.length - 1] : -1;
    const from = points[0].findIndex((step) => step > last);
    if (from < 0) continue; // it came with the points that were asked for
    chart.append(run, [points[0].slice(from), points[1].slice(from)]);
    if (chart.size > MOST_POINTS * chart.plotElement.clientWidth) chart.isStale = true;
    else if (chart.plot) chart.draw();
  }
  askSoon();
  if (hasNew) askForCharts();
}

let isAskingForCharts = false;
async function askForCharts() {
  if (isAskingForCharts) return;
  isAskingForCharts = true;
  try {
    const query = new URLSearchParams(view.runs.slice(1).map((run) => ["with", run.id]));
    const answer = await fetch(`/runs/${view.runs[0].id}/charts?${query}`);
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.getElementById("empty")?.remove();
    for (const group of page.querySelectorAll(".group")) {
      const here = document.getElementById(group.id);
      if (!here) container.append(group);
      else for (const figure of group.querySelectorAll("figure")) {
        if (!charts.has(figure.dataset.metric)) here.querySelector(".grid").append(figure);
      }
    }
    adopt(container);
    filter();
  } finally {
    isAskingForCharts = false;
  }
}

follow(
  () => `/live/run?${new URLSearchParams(view.runs.map((run) => ["cursor", cursors.get(run.id)]))}`,
  {
    rows: receive,
    reload: ({ run, cursor }) => {
      cursors.set(run, cursor);
      if (!charts.size) askForCharts();
      renew();
      askForMarks();
    },
    state: ({ run, state }) => {
      if (run !== view.runs[0].id) return;
      const tag = document.getElementById("state");
      tag.textContent = state;
      tag.className = `tag ${state}`;
      askForMarks();
    },
    events: askForMarks,
    lost: () => (status.textContent = LOST),
    found: () => status.textContent === LOST && (status.textContent = ""),
  },
);

async function askForMarks() {
  const answers = await Promise.all(view.runs.map((run) => fetchJson(`/runs/${run.id}/marks`)));
  for (const answer of answers) if (answer) view.marks.set(answer.run, answer.marks);
  for (const chart of charts.values()) chart.plot?.redraw(false);
}

// Zoom, smoothing and the like

function zoom(range) {
  view.range = range;
  showTools();
  for (const chart of charts.values()) if (chart.plot) chart.scale();
  renew();
}

let hovered = { step: undefined };
function hover(step, chart) {
  if (chart.plot && hovered.step === step && hovered.chart === chart) return;
  hovered = { step, chart };
  chart.show(step);
  if (step === null || !view.showsMarks) return;
  const near = view.runs.flatMap((run) => (view.marks.get(run.id) ?? []).filter(([at]) => at === step));
  status.textContent = near.map(([at, kind, message]) => `${at}: ${message || kind}`).join("  ");
}

function showTools() {
  input("smoothing").value = view.smoothing;
  input("smoothing-value").value = view.smoothing || "off";
  input("log").setAttribute("aria-pressed", view.log);
  input("marks").setAttribute("aria-pressed", view.showsMarks);
  input("from").value = view.range?.[0] ?? "";
  input("to").value = view.range?.[1] ?? "";
  input("reset").hidden = view.range === null;
  const state = { log: view.log ? 1 : null, smoothing: view.smoothing || null, events: view.showsMarks ? null : 0 };
  [state.from, state.to] = view.range ?? [null, null];
  for (const [name, value] of Object.entries(state)) value === null ? address.delete(name) : address.set(name, value);
  history.replaceState(null, "", address.size ? `?${address}` : location.pathname);
}

function redraw() {
  showTools();
  for (const chart of charts.values()) {
    if (!chart.plot) continue;
    chart.forget();
    chart.draw();
  }
}

input("smoothing").addEventListener("input", (event) => {
  view.smoothing = Number(event.target.value);
  showTools();
  renew();
});
input("log").addEventListener("click", () => ((view.log = !view.log), redraw()));
input("marks").addEventListener("click", () => ((view.showsMarks = !view.showsMarks), redraw()));
input("reset").addEventListener("click", () => zoom(null));
for (const id of ["from", "to"]) {
  input(id).addEventListener("change", () => {
    const [from, to] = [input("from").value, input("to").value];
    if (from !== "" && to !== "" && Number(to) > Number(from)) zoom([Number(from), Number(to)]);
    else if (from === "" && to === "") zoom(null);
  });
}

function filter() {
  const text = input("filter").value.toLowerCase();
  for (const chart of charts.values()) chart.figure.hidden = !chart.metric.toLowerCase().includes(text);
  for (const group of container.querySelectorAll(".group")) group.hidden = !group.querySelector("figure:not([hidden])");
  askSoon();
}
input("filter").addEventListener("input", filter);

container.addEventListener("click", (event) => {
  const button = event.target.closest(".fold");
  if (!button) return;
  const isOpen = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", !isOpen);
  document.getElementById(button.getAttribute("aria-controls")).hidden = isOpen;
});

// Runs over this one

function showRuns(ids) {
  address.delete("with");
  for (const id of ids) address.append("with", id);
  location.search = address;
}
const others = () => view.runs.slice(1).map((run) => run.id);
input("overlay")?.addEventListener("change", (event) => event.target.value && showRuns([...others(), event.target.value]));
for (const button of document.querySelectorAll(".remove")) {
  button.addEventListener("click", () => showRuns(others().filter((id) => id !== button.closest(".chip").dataset.run)));
}

function recolour() {
  view.colours = colours();
  redraw();
}
document.addEventListener("themechange", recolour);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);

showTools();
adopt(container);
askForMarks();
