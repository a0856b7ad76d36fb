// Curves of a run: axes, titles, and updates of the server's series.

import uPlot from "./uplot/uPlot.esm.js";
import { duration, isNumber } from "./format.js";

const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 2 });

/** The axes of a history. */
export const AXES = {
  step: {
    name: "step",
    show: (value) => (Number.isInteger(value) && value < 1e5 ? String(value) : compact.format(value)),
  },
  epoch: { name: "epoch", show: (value) => String(Number(value.toFixed(2))) },
  tokens: { name: "tokens", show: (value) => compact.format(value) },
  time: { name: "time", show: (value) => (value < 0 ? "" : duration(Math.max(0, value))) },
};

export const TITLES = {
  learning_rate: "learning rate",
  grad_norm: "gradient norm",
  tokens_per_s: "tokens/s",
  accuracy: "answers ranked right",
  margin: "reward margin",
  chosen_nats: "chosen, log-probability per token",
  rejected_nats: "rejected, log-probability per token",
};

/** Join series that have different x values: {x, ys}. A missing series is empty. */
export function joinSeries(series) {
  const tables = series.map((entry) => (entry && entry.x.length ? [entry.x, entry.y] : [[], []]));
  if (!tables.some(([x]) => x.length)) return { x: [], ys: tables.map(() => []) };
  const [x, ...ys] = uPlot.join(tables);
  return { x, ys };
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
  const names = new Set(["loss", "learning_rate", "grad_norm", "tokens_per_s", ...Object.keys(history.series)]);
  for (const row of rows ?? [])
    for (const name of names) if (!["smoothed", "eval_loss", "undone"].includes(name)) add(name, row.x, row[name]);
  for (const row of evals ?? []) add("eval_loss", row.x, row.loss);
  history.last = { ...history.last, ...last };
}

/** Return the marks with their position on an axis. */
export function withPositions(marks, by) {
  return marks
    .map((mark) => ({ ...mark, x: mark.at?.[by], bad: mark.level === "bad" }))
    .filter((mark) => isNumber(mark.x));
}
