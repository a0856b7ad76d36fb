// Form controls of several elements.

import { field, h, put, select } from "./dom.js";
import { formatValue } from "./format.js";

/**
 * Create a slider over fixed values with a field for an exact value. onChange(value) receives a number, "" for none, or
 * text that is not a whole number. Returns {element, draw(value)}; draw shows a value without calling onChange.
 */
export function slider(label, values, value, onChange) {
  const input = h("input", { type: "range", min: 0, max: values.length - 1, step: 1 });
  const exact = h("input", { inputmode: "numeric", "aria-label": `${label}, exact` });
  const distance = (item, wanted) => Math.abs(Math.log(item / wanted));
  const nearest = (wanted) =>
    values.reduce((best, item, index) => (distance(item, wanted) < distance(values[best], wanted) ? index : best), 0);
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
  const element = field(label, input);
  const line = h("div", { class: "slider" });
  input.replaceWith(line);
  line.append(input, exact);
  return { element, draw };
}

/** Create a searchable list of recipe fields. values: the values that are set. onChange(name, text). */
export function fieldList(fields, values, onChange) {
  const filter = h("input", { type: "search", placeholder: "Find a setting", "aria-label": "Find a setting" });
  const list = h("div", { class: "fields" });
  const rows = fields.map((item) => [item, field(item.field, control(item, values[item.field], onChange), item.help)]);
  const draw = () => {
    const word = filter.value.toLowerCase();
    put(
      list,
      rows.filter(([item]) => `${item.field} ${item.help}`.toLowerCase().includes(word)).map(([, element]) => element),
    );
  };
  filter.addEventListener("input", draw);
  const box = h("details", { class: "card others" }, h("summary", {}, `More settings (${rows.length})`), filter, list);
  box.addEventListener("toggle", draw, { once: true });
  return box;
}

function control({ field: name, choices, type, default: preset }, value, onChange) {
  const now = value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
  const orNumber = choices?.includes("<integer>"); // one of the choices, or a number
  const label = type === "boolean" ? ["true", "false"] : orNumber ? null : choices?.map(String);
  if (label) return select([["", `default (${formatValue(preset)})`], ...label], now, (text) => onChange(name, text));
  const placeholder = orNumber ? `${formatValue(preset)} (${choices.join(", ")})` : formatValue(preset);
  return h("input", { value: now, placeholder, on: { change: (event) => onChange(name, event.target.value.trim()) } });
}
