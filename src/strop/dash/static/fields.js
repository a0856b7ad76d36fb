// Form controls of several elements.

import { field, h, prose, put, select, uniqueId } from "./dom.js";
import { formatValue } from "./format.js";

/** Return an error with the labels of a form instead of command-line options: "Invalid rows: drop". */
export function withLabels(form, { message, fix, where }) {
  const words = (text) =>
    text?.replace(/--([a-z_]+(?:\.[a-z_0-9]+)?)(?:[ =]([\w-]+))?/g, (option, name, value) => {
      const control = form.querySelector(`[data-option="${name}"]`);
      if (!control) return option;
      const chosen = [...(control.options ?? [])].some((item) => item.value && item.value === value);
      const rest = value ? ` ${value}` : "";
      return `${control.closest(".field").querySelector("label").textContent}${chosen ? ":" : ""}${rest}`;
    });
  const places = (where ?? []).map(({ file, line, what }) => ({ file: words(file), line, what: words(what) }));
  return { message: words(message), fix: words(fix), where: places };
}

/**
 * Show an error next to the fields that caused it and remove earlier ones. error: null for none. Returns their labels.
 * A control with data-option caused a problem if its text begins with this option, or with the value of the control.
 */
export function showFieldErrors(form, error) {
  for (const shown of form.querySelectorAll("p.problem")) {
    const control = form.querySelector(`[aria-errormessage="${shown.id}"]`);
    const hints = control.getAttribute("aria-describedby").split(" ");
    control.setAttribute("aria-describedby", hints.filter((id) => id !== shown.id).join(" "));
    for (const name of ["aria-invalid", "aria-errormessage"]) control.removeAttribute(name);
    shown.remove();
  }
  if (!error) return [];
  const places = (error.where ?? []).map(({ file, line, what }) => `${file}${line ? `:${line}` : ""}: ${what}`);
  const problems = places.length ? places : [error.message];
  return [...form.querySelectorAll("[data-option]")].flatMap((control) => {
    const own = problems.filter((text) => concerns(text, control.dataset.option, control.value.trim()));
    if (!own.length) return [];
    const lines = [...own.slice(0, 3), own.length > 3 ? `and ${own.length - 3} more` : "", error.fix];
    const id = uniqueId("problem"),
      box = control.closest(".field");
    const text = lines
      .filter(Boolean)
      .map((line) => line.replace(new RegExp(`^(--)?${control.dataset.option}: `), ""))
      .map((line) => withLabels(form, { message: line }).message);
    box.append(h("p", { class: "problem bad", id }, prose(text.join("\n"))));
    control.setAttribute("aria-describedby", `${control.getAttribute("aria-describedby") ?? ""} ${id}`.trim());
    control.setAttribute("aria-errormessage", id);
    control.setAttribute("aria-invalid", "true");
    const folded = control.closest("details");
    if (folded) folded.open = true;
    return [box.querySelector("label").textContent];
  });
}

/**
 * Confirm the text of an option when its field is left, or half a second after it was typed. The browser confirms only a
 * text that differs from the one at which the field was entered, and thus not one that was changed and changed back.
 */
export function confirmTyping(form) {
  let typed = null,
    timer = 0;
  const confirm = () => {
    if (typed?.isConnected) typed.dispatchEvent(new Event("change", { bubbles: true }));
    typed = null;
  };
  form.addEventListener("change", ({ target }) => {
    if (target === typed) typed = null;
  });
  form.addEventListener("focusout", confirm);
  form.addEventListener("input", ({ target }) => {
    if (target !== typed) confirm();
    clearTimeout(timer);
    if (!target.matches("input[data-option]")) return;
    typed = target;
    timer = setTimeout(confirm, 500);
  });
}

function concerns(problem, option, value) {
  if (value && problem.startsWith(`${value}:`)) return true;
  const [, dashes, name] = problem.replace(/^recipe: /, "").match(/^(--)?([\w.-]*)/);
  return name === option || Boolean(dashes && name === option.split(".").at(-1));
}

/**
 * Create a slider over fixed values with a field for an exact value. onChange(value) receives a number, "" for none, or
 * text that is not a whole number. Returns {element, draw(value)}; draw shows a value without calling onChange.
 * option: name of the recipe field.
 */
export function slider(option, label, values, value, onChange) {
  const input = h("input", { type: "range", min: 0, max: values.length - 1, step: 1 });
  const exact = h("input", { inputmode: "numeric", "aria-label": `${label}, exact`, data: { option } });
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
  draw();
  filter.addEventListener("input", draw);
  return h("details", { class: "card others" }, h("summary", {}, `More settings (${rows.length})`), filter, list);
}

function control({ field: name, choices, type, default: preset }, value, onChange) {
  const now = value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
  const orNumber = choices?.includes("<integer>"); // one of the choices, or a number
  const label = type === "boolean" ? ["true", "false"] : orNumber ? null : choices?.map(String);
  const data = { option: name };
  if (label)
    return select([["", `default (${formatValue(preset)})`], ...label], now, (text) => onChange(name, text), { data });
  const placeholder = orNumber ? `${formatValue(preset)} (${choices.join(", ")})` : formatValue(preset);
  const change = (event) => onChange(name, event.target.value.trim());
  return h("input", { value: now, placeholder, data, on: { change } });
}
