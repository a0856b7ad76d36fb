// Parallel coordinates: one axis for each field of a sweep and for its scores, one line for each trial.

import { svg } from "./dom.js";
import { formatValue, isNumber } from "./format.js";

const [WIDTH, HEIGHT, SIDE, TOP, BOTTOM] = [900, 320, 70, 34, 24];

/** Return an axis: {name, at(value): 0 to 1 from the bottom, ticks: [[position, text]]}, or null without values. */
function axis(name, values, { log = false, show = formatValue }) {
  const known = values.filter((value) => value !== null && value !== undefined);
  if (!known.length) return null;
  if (!known.every(isNumber)) {
    const texts = [...new Set(known.map(formatValue))];
    const at = (value) => (texts.indexOf(formatValue(value)) + 0.5) / texts.length;
    return { name, at, ticks: texts.map((text) => [at(text), text]) };
  }
  const level = (value) => (log ? Math.log(value) : value),
    distinct = [...new Set(known)].sort((a, b) => a - b),
    low = distinct[0],
    high = distinct.at(-1);
  const at = (value) => (high > low ? (level(value) - level(low)) / (level(high) - level(low)) : 0.5);
  return { name, at, ticks: (distinct.length > 6 ? [low, high] : distinct).map((value) => [at(value), show(value)]) };
}

/**
 * columns: [{name, value(row), log?, show?}]; rows: the trials, drawn in order; describe(row): its tooltip; kind(row): its
 * class, such as "best".
 */
export function parallel(columns, rows, { describe, kind, label }) {
  const axes = columns
    .map((column) => ({ column, axis: axis(column.name, rows.map(column.value), column) }))
    .filter((pair) => pair.axis);
  const across = (index) => SIDE + (index * (WIDTH - 2 * SIDE)) / Math.max(1, axes.length - 1),
    down = (position) => HEIGHT - BOTTOM - position * (HEIGHT - TOP - BOTTOM);
  const text = (x, y, content, more = {}) => svg("text", { x, y, "text-anchor": "middle", ...more }, content);
  const lines = rows.map((row) => {
    const points = axes
      .map(({ column, axis }, index) => [across(index), column.value(row), axis])
      .filter(([, value]) => value !== null && value !== undefined)
      .map(([x, value, axis]) => `${x.toFixed(1)},${down(axis.at(value)).toFixed(1)}`);
    const line = svg("polyline", {
      points: points.join(" "),
      fill: "none",
      class: kind(row),
      "data-trial": row.number,
    });
    line.append(svg("title", {}, describe(row)));
    return line;
  });
  return svg(
    "svg",
    { class: "parallel", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label },
    lines,
    axes.map(({ axis }, index) => [
      svg("line", { x1: across(index), x2: across(index), y1: TOP, y2: HEIGHT - BOTTOM, class: "axis" }),
      text(across(index), 18, axis.name, { class: "name" }),
      axis.ticks.map(([position, content]) => text(across(index), down(position) + 4, content, { class: "tick" })),
    ]),
  );
}
