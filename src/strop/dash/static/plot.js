// Plots: curves by uPlot (see uplot/NOTE.md) with a title, a legend that toggles curves, values under the cursor, marks,
// and buttons that save the plot (SVG, PNG) or its values (CSV).

import uPlot from "./uplot/uPlot.esm.js";
import { button, download, uniqueId, h, put } from "./dom.js";
import { csv, figure, isNumber, lossText } from "./format.js";
import { plotSvg } from "./drawing.js";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const INTEGERS = Array.from({ length: 13 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** power)).flat();

/** Return a colour with an opacity for a canvas. */
const faded = (name, share) =>
  colour(name) +
  Math.round(255 * share)
    .toString(16)
    .padStart(2, "0");

/**
 * options: title; series: [{name, colour (of look.css), width, opacity, points, of: index of the series whose legend entry
 * it shares}]; x: {name, show(value), integer: ticks at integers only};
 * show(value): a value as text; incrs: possible distances of ticks; height; file: name for saved files; group: plots of one group share the cursor;
 * zero: the axis starts at 0; log: offer a logarithmic axis; onZoom([low, high] | null).
 * Data: {x: [...], ys: [[...], ...]}, null where a series has no value. marks: [{x, kind, text}].
 */
export class Plot {
  constructor(options) {
    this.options = { height: 260, x: { name: "step" }, show: figure, ...options };
    this.hidden = new Set();
    this.data = { x: [], ys: this.options.series.map(() => []) };
    this.marks = [];
    this.logarithmic = false;
    this.range = null;
    this.legend = h("div", { class: "legend" });
    this.readout = h("span", { class: "where" });
    this.canvas = h("div", {
      class: "canvas",
      tabIndex: 0,
      role: "img",
      "aria-label": this.options.title,
      id: uniqueId("plot"),
      on: { keydown: (event) => this.#key(event) },
    });
    this.none = h("p", { class: "empty", hidden: true });
    const tools = [
      this.options.log &&
        button("log", (event) => this.#toLog(event.currentTarget), {
          class: "small",
          "aria-pressed": "false",
          title: "Logarithmic axis",
        }),
      button("reset zoom", () => this.zoom(null), { class: "small back", hidden: true, title: "Show the whole curve" }),
      h(
        "details",
        { class: "save" },
        h("summary", { "aria-label": `Save ${this.options.title}` }, "Save"),
        h(
          "div",
          { class: "menu" },
          ["SVG", "PNG", "CSV"].map((kind) =>
            button(
              kind,
              (event) => {
                this.save(kind);
                event.currentTarget.closest("details").open = false;
              },
              { class: "small" },
            ),
          ),
        ),
      ),
    ];
    this.element = h(
      "figure",
      { class: "plot card" },
      h("figcaption", {}, h("span", { class: "title" }, this.options.title), h("span", { class: "tools" }, tools)),
      this.legend,
      this.canvas,
      this.none,
    );
    this.back = this.element.querySelector(".back");
    this.#drawLegend();
    this.watch = new ResizeObserver(() => this.#resize());
    this.watch.observe(this.canvas);
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.recolour = () => this.#make();
    this.scheme.addEventListener("change", this.recolour);
    addEventListener("themechange", this.recolour);
  }

  destroy() {
    this.watch.disconnect();
    this.scheme.removeEventListener("change", this.recolour);
    removeEventListener("themechange", this.recolour);
    this.u?.destroy();
    this.u = null;
  }

  /** Set new data; the zoom stays unchanged. */
  set(data, marks = [], x = this.options.x) {
    const renamed = x.name !== this.options.x.name;
    this.data = data;
    this.marks = marks;
    this.options.x = x;
    const hasData = data.x.length > 0;
    this.none.hidden = hasData;
    this.#nameEmpty();
    this.canvas.hidden = !hasData;
    if (hasData && (!this.u || renamed)) {
      if (renamed) this.range = null;
      this.#make();
    } else if (hasData) {
      this.u.setData(this.#columns(), false);
      this.#scale();
    }
    data.ys.forEach((ys, index) => {
      this.legend.children[index].hidden = this.options.series[index].of !== undefined || !ys.some(isNumber);
    });
    this.canvas.setAttribute("aria-label", this.#description());
    this.#values(null);
  }

  /** Change the name of a series. */
  rename(index, name) {
    if (this.options.series[index].name === name) return;
    this.options.series[index].name = name;
    this.#drawLegend();
  }

  zoom(range) {
    this.zoomTo(range);
    this.options.onZoom?.(range);
  }

  /** Zoom without calling onZoom. */
  zoomTo(range) {
    this.range = range;
    this.back.hidden = range === null;
    this.#nameEmpty();
    this.#scale();
  }

  #nameEmpty() {
    this.none.textContent = this.range ? "Nothing in this range." : "No data yet.";
  }

  #columns() {
    const positive = (value) => (isNumber(value) && value > 0 ? value : null);
    return [this.data.x, ...this.data.ys.map((ys) => (this.logarithmic ? ys.map(positive) : ys))];
  }

  #scale() {
    if (!this.u) return;
    const { x } = this.data,
      low = x[0],
      high = x.at(-1);
    const [from, to] = this.range ?? [low, high];
    this.u.batch(() => {
      this.u.setScale("x", from === to ? { min: from - 0.5, max: to + 0.5 } : { min: from, max: to });
    });
  }

  #make() {
    this.u?.destroy();
    this.u = null;
    if (!this.data.x.length) return;
    const { series, x, show, zero } = this.options,
      self = this;
    const font = "12px system-ui, sans-serif",
      ink = colour("soft"),
      grid = { stroke: faded("soft", 0.16), width: 1 };
    const axis = { stroke: ink, font, grid, ticks: { show: false } };
    this.u = new uPlot(
      {
        width: this.#width(),
        height: this.options.height,
        padding: [8, 22, 0, 0],
        legend: { show: false },
        cursor: {
          // not the drag: the other plots would apply its pixels to axes that are already zoomed
          sync: { key: this.options.group, filters: { pub: (type) => ["mousemove", "mouseleave"].includes(type) } },
          drag: { x: true, y: false, setScale: false },
          points: { size: 6 },
          y: false,
        },
        scales: {
          x: { time: false, auto: false },
          y: {
            distr: this.logarithmic ? 3 : 1,
            range: this.logarithmic ? undefined : (u, low, high) => span(low, high, zero),
          },
        },
        axes: [
          {
            ...axis,
            size: 26,
            space: 70,
            incrs: x.integer ? INTEGERS : undefined,
            values: (u, splits) => splits.map((value) => (x.show ? x.show(value) : figure(value))),
          },
          {
            ...axis,
            size: 58,
            space: 34,
            incrs: this.options.incrs,
            values: (u, splits) => axisTexts(splits, show),
          },
        ],
        series: [
          {},
          ...series.map((curve, index) => ({
            stroke: curve.opacity ? faded(curve.colour, curve.opacity) : colour(curve.colour),
            width: curve.width ?? 1.5,
            spanGaps: true,
            points: {
              show: (u, at) => curve.points || u.data[at].filter(isNumber).length === 1, // a line needs two values
              size: 5,
              fill: colour(curve.colour),
            },
            show: !this.hidden.has(index),
            dash: curve.dash,
          })),
        ],
        hooks: {
          drawAxes: [(u) => self.#drawMarks(u)], // under the curves: a spike is often at a mark
          setCursor: [(u) => self.#values(u.cursor.idx)],
          setSelect: [(u) => self.#selected(u)],
        },
      },
      this.#columns(),
      this.canvas,
    );
    this.u.root.addEventListener("dblclick", () => this.zoom(null));
    this.#scale();
  }

  #width = () => Math.max(120, this.canvas.clientWidth);

  #resize() {
    const width = this.#width();
    if (this.u && this.u.width !== width) this.u.setSize({ width, height: this.options.height });
  }

  #selected(u) {
    if (u.select.width < 8) return;
    const range = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
    u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.zoom(range);
  }

  #drawMarks(u) {
    const { ctx, bbox } = u,
      ratio = devicePixelRatio;
    ctx.save();
    for (const mark of this.marks) {
      const at = Math.round(u.valToPos(mark.x, "x", true));
      if (at < bbox.left || at > bbox.left + bbox.width) continue;
      ctx.strokeStyle = colour(mark.bad ? "bad" : mark.kind === "save" ? "line" : "warn");
      ctx.lineWidth = ratio * (mark.chosen ? 2.5 : 1);
      ctx.setLineDash(mark.kind === "save" ? [] : [4 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(at, bbox.top);
      ctx.lineTo(at, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  /** Highlight a mark by its index. */
  choose(chosen) {
    this.marks.forEach((mark, index) => (mark.chosen = index === chosen));
    this.u?.redraw(false);
  }

  #drawLegend() {
    put(
      this.legend,
      this.options.series.map((curve, index) => {
        const value = h("b", {});
        curve.value = value;
        return button(
          "",
          () => {
            const off = !this.hidden.has(index);
            this.legend.children[index].setAttribute("aria-pressed", String(!off));
            this.options.series.forEach((other, at) => {
              if (at !== index && other.of !== index) return;
              this.hidden[off ? "add" : "delete"](at);
              this.u?.setSeries(at + 1, { show: !off });
            });
          },
          { class: "entry", "aria-pressed": "true" },
        );
      }),
      this.readout,
    );
    this.options.series.forEach((curve, index) => {
      const swatch = h("i", {
        class: "swatch",
        style: { background: `var(--${curve.colour})`, opacity: curve.opacity ?? 1 },
      });
      put(this.legend.children[index], swatch, curve.name, curve.value);
      if (this.options.series.length === 1 && curve.name === this.options.title)
        put(this.legend.children[index], h("span", { class: "soft" }, "last "), curve.value);
    });
  }

  /** Show the values under the cursor, or the last ones. */
  #values(at) {
    const { x } = this.options;
    this.options.series.forEach((curve, index) => {
      const ys = this.data.ys[index];
      let value = isNumber(at) ? ys[at] : null;
      for (
        let back = isNumber(at) ? at : ys.length - 1;
        !isNumber(value) && back >= 0 && ys.length - back < 1e6;
        back -= 1
      )
        value = ys[back];
      curve.value.textContent = isNumber(value) ? ` ${this.options.show(value)}` : "";
    });
    this.readout.textContent =
      isNumber(at) && this.data.x.length
        ? `${x.name} ${x.show ? x.show(this.data.x[at]) : figure(this.data.x[at])}`
        : "";
  }

  #description() {
    const { title, series, show, x } = this.options;
    const descriptions = series
      .map((curve, index) => {
        const ys = this.data.ys[index].filter(isNumber);
        if (!ys.length || curve.of !== undefined) return null;
        let low = Infinity,
          high = -Infinity;
        for (const y of ys) {
          low = Math.min(low, y);
          high = Math.max(high, y);
        }
        return `${curve.name}: first ${show(ys[0])}, last ${show(ys.at(-1))}, lowest ${show(low)}, highest ${show(high)}`;
      })
      .filter(Boolean);
    return `${title} by ${x.name}. ${descriptions.join(". ")}. Arrow keys move along the curve.`;
  }

  #key(event) {
    if (!this.u || !this.data.x.length) return;
    const step = { ArrowRight: 1, ArrowLeft: -1, PageDown: 50, PageUp: -50, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") {
      this.zoom(null);
      return;
    }
    if (step === undefined) return;
    event.preventDefault();
    const last = this.data.x.length - 1,
      old = this.u.cursor.idx ?? last;
    const at = Math.min(last, Math.max(0, old + step));
    this.u.setCursor({ left: this.u.valToPos(this.data.x[at], "x"), top: 10 });
    this.#values(at);
  }

  #toLog(toggle) {
    this.logarithmic = !this.logarithmic;
    toggle.setAttribute("aria-pressed", String(this.logarithmic));
    this.#make();
  }

  save(kind) {
    const { series, x, title } = this.options,
      name = this.options.file ?? title;
    if (kind === "CSV") {
      const rows = this.data.x.map((value, index) => [value, ...this.data.ys.map((ys) => ys[index])]);
      download(`${name}.csv`, "text/csv", csv([x.name, ...series.map((curve) => curve.name)], rows));
    } else if (kind === "SVG") {
      const shown = series
        .map((curve, index) => ({ ...curve, ys: this.data.ys[index] }))
        .filter((curve, index) => !this.hidden.has(index));
      const range = this.u
        ? { x: [this.u.scales.x.min, this.u.scales.x.max], y: [this.u.scales.y.min, this.u.scales.y.max] }
        : null;
      download(
        `${name}.svg`,
        "image/svg+xml",
        plotSvg({
          ...this.options,
          series: shown,
          xs: this.data.x,
          range,
          marks: this.marks,
          logarithmic: this.logarithmic,
          colour,
        }),
      );
    } else {
      const from = this.u?.ctx.canvas;
      if (!from) return;
      const copy = h("canvas", { width: from.width, height: from.height }),
        ctx = copy.getContext("2d");
      ctx.fillStyle = colour("card");
      ctx.fillRect(0, 0, copy.width, copy.height);
      ctx.drawImage(from, 0, 0);
      copy.toBlob((blob) => download(`${name}.png`, "image/png", blob));
    }
  }
}

/** Return the texts of an axis: all with an exponent if one of them has it. */
function axisTexts(values, show) {
  const isPlain = show === figure || show === lossText;
  const texts = values.map((value) => (value === null ? "" : isPlain ? figure(value) : show(value)));
  if (!isPlain || !texts.some((text) => text.includes("e"))) return texts;
  return values.map((value, index) => (value ? Number(value.toPrecision(3)).toExponential() : texts[index]));
}

function span(low, high, zero) {
  if (!isNumber(low) || !isNumber(high)) return [0, 1];
  if (zero && low >= 0) return [0, high === 0 ? 1 : high * 1.06];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}
