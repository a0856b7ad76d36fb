// The history of a run as curves: what the server's series become, and how they grow.

import uPlot from "./uplot/uPlot.esm.js";
import { duration, isNumber } from "./format.js";

const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 2 });

/** The ways to lay a history out. */
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
  margin: "margin of rewards",
  chosen_nats: "chosen, log-probability a token",
  rejected_nats: "rejected, log-probability a token",
};

/** Series with their own xs, laid over one: {x, ys}. A series that is not there is empty. */
export function together(series) {
  const tables = series.map((one) => (one && one.x.length ? [one.x, one.y] : [[], []]));
  if (!tables.some(([x]) => x.length)) return { x: [], ys: tables.map(() => []) };
  const [x, ...ys] = uPlot.join(tables);
  return { x, ys };
}

/** Puts what was appended to a run's events behind its series. */
export function append(history, { rows, evals, last }) {
  const add = (name, x, y) => {
    if (!isNumber(y) || !isNumber(x)) return;
    const one = (history.series[name] ??= { x: [], y: [] });
    if (one.x.length && one.x.at(-1) >= x) return; // it is there already: a history that came in between had it
    one.x.push(x);
    one.y.push(y);
  };
  const known = new Set(["loss", "learning_rate", "grad_norm", "tokens_per_s", ...Object.keys(history.series)]);
  for (const row of rows ?? [])
    for (const name of known) if (!["smoothed", "eval_loss", "undone"].includes(name)) add(name, row.x, row[name]);
  for (const row of evals ?? []) add("eval_loss", row.x, row.loss);
  history.last = { ...history.last, ...last };
}

/** Marks with their place on an axis. */
export function placed(marks, by) {
  return marks
    .map((mark) => ({ ...mark, x: mark.at?.[by], bad: mark.level === "bad" }))
    .filter((mark) => isNumber(mark.x));
}
