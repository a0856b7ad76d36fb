// A plot as an SVG file, and sparklines.

import { svg } from "./dom.js";
import { figure, isNumber } from "./format.js";

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [900, 360, 66, 16, 40, 46];

/** Return a plot as SVG text. Names of runs are text nodes, so that the serializer escapes them. */
export function plotSvg({ title, series, xs, x, show, range, marks, logarithmic, colour }) {
  const [x0, x1] = range?.x ?? [xs[0], xs.at(-1)],
    [y0, y1] = range?.y ?? [0, 1];
  const level = (y) => (logarithmic ? Math.log10(y) : y);
  const across = (value) => LEFT + ((value - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT);
  const down = (value) =>
    HEIGHT - BOTTOM - ((level(value) - level(y0)) / (level(y1) - level(y0) || 1)) * (HEIGHT - TOP - BOTTOM);
  const text = (at, below, content, more = {}) =>
    svg("text", { x: at, y: below, fill: colour("soft"), ...more }, content);
  const parts = [
    svg("rect", { width: WIDTH, height: HEIGHT, fill: colour("card") }),
    text(LEFT, 22, title, { fill: colour("ink"), "font-weight": "bold" }),
  ];
  for (const value of logarithmic ? powers(y0, y1) : ticks(y0, y1, 5)) {
    parts.push(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: down(value), y2: down(value), stroke: colour("line") }));
    parts.push(text(LEFT - 8, down(value) + 4, show(value), { "text-anchor": "end" }));
  }
  for (const value of ticks(x0, x1, 7, x.integer ? 1 : 0))
    parts.push(
      text(across(value), HEIGHT - BOTTOM + 18, x.show ? x.show(value) : figure(value), { "text-anchor": "middle" }),
    );
  parts.push(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.name, { "text-anchor": "middle" }));
  for (const mark of marks.filter((curve) => curve.x >= x0 && curve.x <= x1)) {
    const line = svg("line", {
      x1: across(mark.x),
      x2: across(mark.x),
      y1: TOP,
      y2: HEIGHT - BOTTOM,
      stroke: colour(mark.bad ? "bad" : "warn"),
      "stroke-dasharray": "4 3",
    });
    line.append(svg("title", {}, mark.text));
    parts.push(line);
  }
  let right = WIDTH - RIGHT;
  for (const curve of series) {
    const points = xs
      .map((value, index) => [value, curve.ys[index]])
      .filter(([at, y]) => isNumber(y) && at >= x0 && at <= x1 && (!logarithmic || y > 0));
    parts.push(
      svg("polyline", {
        points: points.map(([at, y]) => `${across(at).toFixed(1)},${down(y).toFixed(1)}`).join(" "),
        fill: "none",
        stroke: colour(curve.colour),
        "stroke-width": curve.width ?? 1.5,
        "stroke-opacity": curve.opacity ?? 1,
        "stroke-linejoin": "round",
      }),
    );
    if (curve.points || points.length === 1)
      for (const [at, y] of points)
        parts.push(svg("circle", { cx: across(at), cy: down(y), r: 3, fill: colour(curve.colour) }));
    if (curve.of !== undefined) continue;
    right -= 7 * curve.name.length + 26;
    parts.push(
      svg("line", {
        x1: right,
        x2: right + 14,
        y1: 18,
        y2: 18,
        stroke: colour(curve.colour),
        "stroke-width": 3,
        "stroke-opacity": curve.opacity ?? 1,
      }),
    );
    parts.push(text(right + 19, 22, curve.name));
  }
  const root = svg(
    "svg",
    {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      width: WIDTH,
      height: HEIGHT,
      "font-family": "system-ui, sans-serif",
      "font-size": 12,
    },
    parts,
  );
  return new XMLSerializer().serializeToString(root);
}

function ticks(low, high, maxTicks, smallest = 0) {
  if (!(high > low)) return [low];
  const rough = (high - low) / maxTicks,
    unit = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(smallest, unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough));
  const finite = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step)
    finite.push(Number(value.toPrecision(12)));
  return finite;
}

function powers(low, high) {
  const finite = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power += 1)
    finite.push(...[1, 2, 5].map((factor) => factor * 10 ** power).filter((value) => value >= low && value <= high));
  return finite;
}

/** Return a small curve without axes for a table cell, or null if there are too few values. */
export function sparkline(values, label) {
  const finite = values.filter(isNumber);
  if (finite.length < 2) return null;
  let low = Infinity,
    high = -Infinity;
  for (const value of finite) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  const points = finite.map(
    (value, index) =>
      `${((100 * index) / (finite.length - 1)).toFixed(1)},${(24 - (22 * (value - low)) / (high - low || 1)).toFixed(1)}`,
  );
  return svg(
    "svg",
    { class: "spark", viewBox: "0 0 100 26", role: "img", "aria-label": label, preserveAspectRatio: "none" },
    svg("polyline", {
      points: points.join(" "),
      fill: "none",
      stroke: "currentColor",
      "vector-effect": "non-scaling-stroke",
    }),
  );
}
