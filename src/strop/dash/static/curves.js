// Curves of a run: axes, titles, and updates of the server's series.

import uPlot from "./uplot/uPlot.esm.js";
import { h, uniqueId } from "./dom.js";
import { bytes, duration, isNumber } from "./format.js";
import { setQuery } from "./route.js";

const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 2 });

/** The axes of a history. */
export const AXES = {
  step: {
    name: "step",
    integer: true,
    show: (value) => (Number.isInteger(value) && value < 1e5 ? String(value) : compact.format(value)),
  },
  epoch: { name: "epoch", show: (value) => String(Number(value.toFixed(2))) },
  tokens: { name: "tokens", show: (value) => compact.format(value) },
  time: { name: "time", show: (value) => (value < 0 ? "" : duration(Math.max(0, value))) },
};

/** Options of a plot of sizes. */
export const BYTES = { show: bytes, incrs: Array.from({ length: 50 }, (_, power) => 2 ** power), zero: true };

/** Join series that have different x values: {x, ys}. A missing series is empty. */
export function joinSeries(series) {
  const tables = series.map((entry) => (entry && entry.x.length ? [entry.x, entry.y] : [[], []]));
  if (!tables.some(([x]) => x.length)) return { x: [], ys: tables.map(() => []) };
  const [x, ...ys] = uPlot.join(tables);
  return { x, ys };
}

const WEIGHTS = [0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999];
const DEFAULT_WEIGHT = 0.6;
const MIN_SMOOTHED = 20; // steps: a mean of a shorter curve lags too far behind its end

/** Return whether the loss of a history is smoothed. */
export const isSmoothed = ({ last }, weight) => weight > 0 && (last?.step ?? 0) >= MIN_SMOOTHED;

/**
 * Return the loss of a history as a smoothed series, or unchanged if it is short. A long curve is smoothed from the means
 * of its parts.
 */
export function smoothedLoss(history, slider) {
  const { series } = history,
    weight = isSmoothed(history, slider) ? slider : 0;
  const { x, y, steps = 1 } = series.loss_mean ?? series.loss ?? { x: [], y: [] },
    decay = weight ** steps,
    lead = average(series.loss?.before ?? [], weight),
    scale = (1 - weight) / (1 - decay); // a mean of several steps counts as one value
  return { x, y: smooth(y, decay, { sum: scale * lead.sum, weight: scale * lead.weight }) };
}

/** Return the sum of values whose weights decay exponentially with their distance from the end, and of the weights. */
function average(values, decay) {
  return values.reduce(
    ({ sum, weight }, value) => ({ sum: decay * sum + value, weight: decay * weight + 1 }),
    { sum: 0, weight: 0 },
  );
}

/**
 * Average each value with those before it, whose weights decay exponentially with their distance. start: the sum and
 * the weight of values before the first one.
 */
export function smooth(values, decay, start = { sum: 0, weight: 0 }) {
  let { sum, weight } = start;
  return values.map((value) => {
    sum = decay * sum + value;
    weight = decay * weight + 1;
    return sum / weight;
  });
}

/** Create the slider of the smoothing, which is stored in the address: {element, weight()}. */
export function smoothingSlider(query, onChange) {
  const given = Number(query.get("smooth") ?? DEFAULT_WEIGHT),
    index = WEIGHTS.findIndex((weight) => weight >= given);
  const input = h("input", { type: "range", min: 0, max: WEIGHTS.length - 1, step: 1, id: uniqueId("smooth") });
  const shown = h("output", { for: input.id });
  const weight = () => WEIGHTS[Number(input.value)];
  const draw = () => {
    shown.textContent = weight() ? String(weight()) : "off";
    input.setAttribute("aria-valuetext", shown.textContent);
  };
  input.value = index < 0 ? WEIGHTS.length - 1 : index;
  input.addEventListener("input", () => {
    draw();
    setQuery({ smooth: weight() === DEFAULT_WEIGHT ? null : weight() });
    onChange();
  });
  draw();
  return {
    element: h("div", { class: "smoothing" }, h("label", { for: input.id }, "Smoothing"), input, shown),
    weight,
  };
}

/** Append new steps and evaluations to the series of a history. */
export function append(history, { rows, evals, last }) {
  const add = (name, x, y) => {
    if (!isNumber(y) || !isNumber(x)) return;
    const entry = (history.series[name] ??= { x: [], y: [] });
    if (entry.x.length && entry.x.at(-1) >= x) return; // already known from a reloaded history
    entry.x.push(x);
    entry.y.push(y);
  };
  for (const { step, tokens, x, ...values } of rows ?? [])
    for (const [name, value] of Object.entries(values)) add(name, x, value);
  if (history.series.loss_mean) for (const row of rows ?? []) add("loss_mean", row.x, row.loss);
  for (const row of evals ?? []) add("eval_loss", row.x, row.loss);
  history.last = { ...history.last, ...last };
}

/** Return the marks with their position on an axis. */
export function withPositions(marks, by) {
  return marks
    .map((mark) => ({ ...mark, x: mark.at?.[by], bad: mark.level === "bad" }))
    .filter((mark) => isNumber(mark.x));
}
