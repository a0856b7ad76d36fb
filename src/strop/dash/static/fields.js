// Controls of a form that are more than one element.

import { field, h, put, select } from "./dom.js";
import { shown } from "./format.js";

/**
 * A slider over given values with a field for an exact one. onChange(value) gets a number, "" for none, or the text that
 * is no whole number. Gives {element, draw(value)}: draw shows a value that was decided elsewhere.
 */
export function slider(words, values, value, onChange) {
  const input = h("input", { type: "range", min: 0, max: values.length - 1, step: 1 });
  const exact = h("input", { inputmode: "numeric", "aria-label": `${words}, exact` });
  const away = (one, wanted) => Math.abs(Math.log(one / wanted));
  const nearest = (wanted) =>
    values.reduce((best, one, at) => (away(one, wanted) < away(values[best], wanted) ? at : best), 0);
  const draw = (now) => {
    if (document.activeElement !== input) input.value = nearest(now || 1);
    input.setAttribute("aria-valuetext", String(now));
    if (document.activeElement !== exact) exact.value = now;
  };
  input.addEventListener("input", () => {
    const now = values[Number(input.value)];
    draw(now);
    onChange(now);
  });
  exact.addEventListener("change", () => {
    const text = exact.value.trim();
    onChange(text !== "" && Number.isInteger(Number(text)) ? Number(text) : text);
  });
  draw(value);
  const element = field(words, input);
  const line = h("div", { class: "slider" });
  input.replaceWith(line);
  line.append(input, exact);
  return { element, draw };
}

/** Fields of the recipe's schema to be found by a word. values: those that are given; onChange(name, text). */
export function fieldList(fields, values, onChange) {
  const filter = h("input", { type: "search", placeholder: "Find a setting", "aria-label": "Find a setting" });
  const list = h("div", { class: "fields" });
  const rows = fields.map((one) => [one, field(one.field, control(one, values[one.field], onChange), one.help)]);
  const draw = () => {
    const word = filter.value.toLowerCase();
    put(
      list,
      rows.filter(([one]) => `${one.field} ${one.help}`.toLowerCase().includes(word)).map(([, element]) => element),
    );
  };
  filter.addEventListener("input", draw);
  const box = h("details", { class: "card others" }, h("summary", {}, `More settings (${rows.length})`), filter, list);
  box.addEventListener("toggle", draw, { once: true });
  return box;
}

function control({ field: name, choices, type, default: preset }, value, onChange) {
  const now = value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
  const orNumber = choices?.includes("<integer>"); // one of some words, or a number
  const words = type === "boolean" ? ["true", "false"] : orNumber ? null : choices?.map(String);
  if (words) return select([["", `default (${shown(preset)})`], ...words], now, (text) => onChange(name, text));
  const placeholder = orNumber ? `${shown(preset)} (${choices.join(", ")})` : shown(preset);
  return h("input", { value: now, placeholder, on: { change: (event) => onChange(name, event.target.value.trim()) } });
}
