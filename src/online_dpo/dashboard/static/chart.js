// One chart: a metric of one run or several, by step, with the runs' events below.
import uPlot from "/static/vendor/uplot/uPlot.esm.js";
import { number } from "/static/format.js";

const GROUPED_MARKS = { skip: "bad", out_of_memory: "bad", failure: "bad", retry: "mark", warning: "mark", stop: "mark" };
const TABLE_ROWS = 25;
const EMPTY = { raw: [[], []] };

export function colours() {
  const of = (name) => getComputedStyle(document.querySelector(`#probes .${name}`)).color;
  return {
    series: Array.from({ length: 8 }, (_, place) => of(`series-${place}`)),
    text: of("probe-text"),
    line: of("probe-line"),
    bad: of("probe-bad"),
    mark: of("probe-mark"),
  };
}

function faint(colour) {
  return colour.replace("rgb(", "rgba(").replace(")", ", 0.3)");
}

export class Chart {
  // figure: the element; view: what all charts share (runs, colours, log, smoothing, range, marks, onZoom, onPick, onHover)
  constructor(figure, view) {
    this.figure = figure;
    this.metric = figure.dataset.metric;
    this.view = view;
    this.plotElement = figure.querySelector(".plot");
    this.readout = figure.querySelector(".readout");
    this.data = new Map(view.runs.map((run) => [run.id, EMPTY]));
    this.last = new Map(Object.entries(JSON.parse(this.readout.dataset.values || "{}")));
    this.plot = null;
    this.isWanted = false; // whether it can be seen
    this.isStale = true; // whether its points have to be asked for
    figure.querySelector("details").addEventListener("toggle", () => this.fillTable());
  }

  setPoints(runId, points) {
    this.data.set(runId, points);
    const values = points.raw[1];
    if (values.length && this.view.range === null) this.last.set(runId, values[values.length - 1]);
    this.isStale = false;
  }

  // New points of a live run. Smoothing goes on from the last average.
  append(runId, [steps, values]) {
    const had = this.data.get(runId) ?? EMPTY;
    const data = { ...had, raw: [[...had.raw[0], ...steps], [...had.raw[1], ...values]] };
    if (had.smooth) {
      const averages = [];
      let average = had.average;
      for (const value of values) averages.push((average = this.view.smoothing * average + (1 - this.view.smoothing) * value));
      Object.assign(data, { smooth: [[...had.smooth[0], ...steps], [...had.smooth[1], ...averages]], average });
    }
    this.data.set(runId, data);
    this.last.set(runId, values[values.length - 1]);
  }

  get size() {
    return Math.max(...[...this.data.values()].map((points) => points.raw[0].length));
  }

  get lines() {
    return this.view.runs.flatMap((run, place) => {
      const points = this.data.get(run.id) ?? EMPTY;
      const colour = this.view.colours.series[place % 8];
      if (!points.smooth) return [{ run, colour, data: points.raw, width: 1.5 }];
      return [
        { run, colour: faint(colour), data: points.raw, width: 1 },
        { run, colour, data: points.smooth, width: 2 },
      ];
    });
  }

  draw() {
    const lines = this.lines;
    const data = joined(lines.map((line) => line.data));
    const low = Math.min(...lines.flatMap((line) => line.data[1].filter((value) => value !== null)));
    const form = `${lines.length} ${this.view.log} ${this.view.log && low > 0} ${data[0].length < 60}`;
    if (this.plot && this.form === form) this.plot.setData(data, false);
    else this.create(lines, data, low);
    this.form = form;
    this.scale();
    this.show(null);
    this.plotElement.setAttribute("aria-label", this.description());
    if (this.figure.querySelector("details").open) this.fillTable();
  }

  create(lines, data, low) {
    this.plot?.destroy();
    const { text, line } = this.view.colours;
    const axis = { stroke: text, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1, size: 4 }, font: "11px system-ui" };
    const hasDots = data[0].length < 60;
    const options = {
      width: this.plotElement.clientWidth,
      height: this.plotElement.clientHeight,
      legend: { show: false },
      padding: [6, 18, 0, 0],
      cursor: {
        sync: { key: "steps", setSeries: false, scales: ["x", null] },
        drag: { x: true, y: false, setScale: false },
        focus: { prox: 1e4 },
        points: { size: 5 },
      },
      focus: { alpha: 1 },
      scales: { x: { time: false }, y: this.view.log ? { distr: low > 0 ? 3 : 4, asinh: 0.01 } : {} },
      axes: [
        { ...axis, size: 26, values: (_, steps) => steps.map(short) },
        { ...axis, size: 52, values: (_, values) => values.map((value) => (value === null ? "" : short(value))) },
      ],
      series: [
        {},
        ...lines.map((each) => ({ stroke: each.colour, width: each.width, spanGaps: true, points: { show: hasDots, size: 4, fill: each.colour } })),
      ],
      hooks: {
        setCursor: [(plot) => this.view.onHover(plot.cursor.idx === null ? null : plot.data[0][plot.cursor.idx], this)],
        setSelect: [(plot) => this.selected(plot)],
        draw: [(plot) => this.drawMarks(plot)],
      },
    };
    this.plot = new uPlot(options, data, this.plotElement);
    this.plot.over.addEventListener("click", (event) => this.picked(event));
    this.plot.over.addEventListener("dblclick", () => this.view.onZoom(null));
  }

  scale() {
    const steps = this.plot.data[0];
    const [first, last] = this.view.range ?? [steps[0] ?? 0, steps[steps.length - 1] ?? 1];
    this.plot.setScale("x", { min: first, max: last > first ? last : first + 1 });
  }

  selected(plot) {
    if (plot.select.width < 6) return;
    this.isDragged = true;
    const at = (place) => plot.posToVal(place, "x");
    const range = [Math.max(0, Math.round(at(plot.select.left))), Math.round(at(plot.select.left + plot.select.width))];
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    if (range[1] > range[0]) this.view.onZoom(range);
  }

  picked(event) {
    if (this.isDragged || event.detail > 1) {
      this.isDragged = false;
      return;
    }
    const { idx, left, top } = this.plot.cursor;
    if (idx === null || idx === undefined) return;
    const step = this.plot.data[0][idx];
    this.view.onPick(this.nearest(idx, left, top), step);
  }

  // The run whose line is nearest to the pointer.
  nearest(idx, left, top) {
    const lines = this.lines;
    let best = lines[0].run;
    let least = Infinity;
    lines.forEach((line, place) => {
      const value = this.plot.data[place + 1][idx];
      if (value === null || value === undefined) return;
      const distance = Math.abs(this.plot.valToPos(value, "y") - top);
      if (distance < least) [least, best] = [distance, line.run];
    });
    return best;
  }

  drawMarks(plot) {
    if (!this.view.showsMarks) return;
    const { ctx, bbox } = plot;
    ctx.save();
    for (const run of this.view.runs) {
      for (const [step, kind] of this.view.marks.get(run.id) ?? []) {
        const x = plot.valToPos(step, "x", true);
        if (x < bbox.left || x > bbox.left + bbox.width) continue;
        const important = GROUPED_MARKS[kind];
        ctx.fillStyle = important ? this.view.colours[important] : this.view.colours.text;
        ctx.globalAlpha = important ? 0.9 : 0.45;
        const height = (important ? 9 : 5) * devicePixelRatio;
        ctx.fillRect(Math.round(x), bbox.top + bbox.height - height, devicePixelRatio * (important ? 2 : 1), height);
      }
    }
    ctx.restore();
  }

  // Say the values at a step, or the last ones.
  show(step) {
    this.readout.replaceChildren();
    if (step !== null) {
      const place = document.createElement("span");
      place.className = "muted";
      place.textContent = `step ${step.toLocaleString("en")}`;
      this.readout.append(place);
    }
    this.view.runs.forEach((run, place) => {
      const value = step === null ? this.last.get(run.id) : at(this.data.get(run.id), step);
      if (value === undefined) return;
      const entry = document.createElement("span");
      entry.className = `series-${place % 8}`;
      entry.textContent = ` ${number(value)}`;
      entry.title = run.name;
      this.readout.append(entry);
    });
  }

  description() {
    const values = this.view.runs
      .filter((run) => this.last.has(run.id))
      .map((run) => `${run.name}: last value ${number(this.last.get(run.id))}`);
    return `Chart of ${this.metric} by step. ${values.join("; ")}. Its table follows.`;
  }

  fillTable() {
    const details = this.figure.querySelector("details");
    if (!details.open) return;
    const table = document.createElement("table");
    const caption = table.createCaption();
    caption.className = "unseen";
    caption.textContent = `${this.metric}: last points`;
    const head = table.createTHead().insertRow();
    for (const title of ["Step", ...this.view.runs.map((run) => run.name)]) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = title;
      head.append(cell);
    }
    const body = table.createTBody();
    const all = joined(this.view.runs.map((run) => (this.data.get(run.id) ?? EMPTY).raw));
    for (let row = all[0].length - 1; row >= Math.max(0, all[0].length - TABLE_ROWS); row--) {
      const cells = body.insertRow();
      const link = document.createElement("a");
      link.href = this.view.samplesOf(this.view.runs[0], all[0][row]);
      link.textContent = all[0][row].toLocaleString("en");
      cells.insertCell().append(link);
      for (const column of all.slice(1)) cells.insertCell().textContent = number(column[row]);
    }
    details.querySelector(".numbers").replaceChildren(table);
  }

  resize() {
    if (this.plot) this.plot.setSize({ width: this.plotElement.clientWidth, height: this.plotElement.clientHeight });
  }

  forget() {
    this.plot?.destroy();
    this.plot = null;
  }
}

// Lines with steps of their own as columns over all steps.
function joined(lines) {
  if (lines.length === 1) return [lines[0][0], lines[0][1]];
  const steps = [...new Set(lines.flatMap((line) => line[0]))].sort((a, b) => a - b);
  return [steps, ...lines.map(([own, values]) => {
    const known = new Map(own.map((step, place) => [step, values[place]]));
    return steps.map((step) => known.get(step) ?? null);
  })];
}

// The value at a step, or at the last one before it.
function at(points, step) {
  if (!points) return undefined;
  const [steps, values] = points.smooth ?? points.raw;
  let low = 0;
  let high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low ? values[low - 1] : undefined;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e4) return `${+(value / 1000).toPrecision(3)}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(0);
  return String(+value.toPrecision(4));
}
