// Form controls of several elements.

import { button, field, h, prose, put, select, uniqueId } from "./dom.js";
import { errorBox } from "./api.js";
import { formatValue } from "./format.js";
import { labelOfField } from "./labels.js";

const labelOf = (control) => control.closest(".field").querySelector("label").textContent;

/** Make a field visible that is folded or filtered out. */
function reveal(control) {
  control.closest(".field").hidden = false;
  const folded = control.closest("details");
  if (folded) folded.open = true;
}

/**
 * Return a function from text to nodes, as `prose`. Names and options of the form's fields are links to these, with their
 * labels: "Invalid rows: drop". Column names that fit the rows have a button that enters them.
 */
export function withLabels(form) {
  const linked = (text) =>
    text.split(/(--[a-z_]+(?:\.[a-z_0-9]+)?(?:[ =](?:'[^']*'|[\w-][\w=,./-]*[\w]|[\w-]))?|\b[a-z]+\.[a-z_0-9]+)/).map((part, index) => {
      const [, name, value] = (index % 2 && part.match(/^(?:--)?([\w.]+)(?:[ =](.+))?$/)) || [];
      const control = name && form.querySelector(`[data-option="${name}"]`);
      if (!control) return part;
      const open = () => {
        reveal(control);
        control.focus();
      };
      const chosen = [...(control.options ?? [])].some((item) => item.value && item.value === value);
      const columns = name === "data.columns" && value?.replace(/^'(.*)'$/, "$1");
      const use = () => {
        reveal(control);
        control.value = columns;
        control.dispatchEvent(new Event("change", { bubbles: true }));
      };
      return [
        button(labelOf(control), open, { class: "link" }),
        chosen ? ":" : "",
        value ? ` ${value}` : "",
        columns && /=(?!A\b|value\b)/.test(columns) ? [" ", button("Use these columns", use, { class: "small" })] : "",
      ];
    });
  return (text) =>
    prose(text).map((part) => (typeof part === "string" ? linked(part) : h("code", {}, linked(part.textContent))));
}

/** Remove the error of a control. */
function clearError(control) {
  const shown = document.getElementById(control.getAttribute("aria-errormessage"));
  const hints = (control.getAttribute("aria-describedby") ?? "").split(" ");
  control.setAttribute("aria-describedby", hints.filter((id) => id !== shown?.id).join(" "));
  for (const name of ["aria-invalid", "aria-errormessage"]) control.removeAttribute(name);
  shown?.remove();
}

/** Return an error of the form's number fields whose text is not a number that they take, or null. */
export function checkNumbers(form) {
  const invalid = [...form.querySelectorAll("input[type=number][data-option]")].filter((input) => !input.validity.valid);
  const where = invalid.map(({ dataset, min, max, step }) => {
    const range = max ? ` from ${min} to ${max}` : min ? ` of at least ${min}` : "";
    return { file: dataset.option, what: `must be a ${step === "any" ? "" : "whole "}number${range}` };
  });
  return where.length ? { message: `${where[0].file}: ${where[0].what}`, where } : null;
}

/**
 * Show an error next to the fields that caused it, until their values change, and remove earlier ones. error: null for none. Returns their labels.
 * A control with data-option caused a problem if its text begins with this option, or with the value of the control.
 */
export function showFieldErrors(form, error) {
  for (const control of form.querySelectorAll("[aria-errormessage]")) clearError(control);
  if (!error) return [];
  const places = (error.where ?? []).map(({ file, line, what }) => `${file}${line ? `:${line}` : ""}: ${what}`);
  const problems = places.length ? places : [error.message];
  return [...form.querySelectorAll("[data-option]")].flatMap((control) => {
    const own = problems.filter((text) => concerns(text, control.dataset.option, control.value.trim()));
    if (!own.length) return [];
    const lines = [...(own.length > 3 ? [own[0], `and ${own.length - 1} more`] : own), fixOf(error, control)];
    const id = uniqueId("problem"),
      box = control.closest(".field");
    const text = lines
      .filter(Boolean)
      .map((line) => line.replace(new RegExp(`^(--)?${control.dataset.option}: `), ""))
      .map((line, index) => [index ? "\n" : "", useButton(control, line) ?? withLabels(form)(line)]);
    box.append(h("p", { class: "problem bad", id }, text));
    control.setAttribute("aria-describedby", `${control.getAttribute("aria-describedby") ?? ""} ${id}`.trim());
    control.setAttribute("aria-errormessage", id);
    control.setAttribute("aria-invalid", "true");
    for (const event of ["input", "change"])
      control.addEventListener(event, () => control.hasAttribute("aria-errormessage") && clearError(control), { once: true });
    reveal(control);
    return [labelOf(control)];
  });
}

/**
 * Return a button that submits a form, and an element for an error that no field has caused. form: returns the form.
 * submit: sends the request; its error is shown at the fields.
 */
export function submitButton(text, form, submit, props = {}) {
  const problem = h("div");
  const submitting = button(
    text,
    async () => {
      put(problem);
      const invalid = checkNumbers(form());
      showFieldErrors(form(), invalid);
      if (invalid) return;
      submitting.disabled = true;
      try {
        await submit();
      } catch (error) {
        if (!showFieldErrors(form(), error).length) put(problem, errorBox(error, withLabels(form())));
      }
      submitting.disabled = false;
    },
    { class: "main", ...props },
  );
  return [submitting, problem];
}

/** Make Enter in a one-line field click a button of the same group. Returns the group. */
export function submitOnEnter(group, submitting) {
  group.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches("input") && !event.defaultPrevented) submitting.click();
  });
  return group;
}

/** Return a button that enters the path of the fix "use PATH" or "give another name, such as --out PATH", or undefined. */
function useButton(control, fix) {
  const path = fix.match(new RegExp(`^(?:use|give(?: another \\w+, such as)? --${control.dataset.option}) ('?)(.+)\\1$`))?.[2];
  const use = () => {
    control.value = path;
    control.dispatchEvent(new Event("change", { bubbles: true }));
  };
  return path && button(`Use ${path}`, use, { class: "small" });
}

/** Return how to fix a problem of a field: of the examples for several fields only its own. */
function fixOf({ fix, where }, { dataset: { option } }) {
  if (!fix?.startsWith("for example ") || !(where?.length > 1)) return fix;
  return fix.split(/(?=--)/).find((part) => part.startsWith(`--${option} `))?.replace(/^\S+/, "for example");
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

/** Show in each empty control the value that the plan chose, or else the default. recipe: the values of the plan. */
export function showChosen(form, recipe) {
  const chosen = new Map(recipe.filter((item) => item.origin !== "default").map((item) => [item.field, item.value]));
  for (const control of form.querySelectorAll("[data-option]")) {
    const name = control.dataset.option,
      item = control.options?.[0] ?? control,
      attribute = control.options ? "textContent" : "placeholder";
    control.dataset.unset ??= item[attribute];
    item[attribute] = chosen.has(name) ? `chosen (${formatValue(chosen.get(name))})` : control.dataset.unset;
  }
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

/**
 * Create a searchable list of recipe fields. values: the values that are set. onChange(name, text). placed: fields with a
 * control elsewhere in the form, which the search finds too. withoutOption: names of other tools that have no field, with
 * the reason.
 */
export function fieldList(fields, values, onChange, placed, withoutOption) {
  const filter = h("input", { type: "search", placeholder: "Find a setting", "aria-label": "Find a setting" });
  const change = (name, value) => {
    onChange(name, value);
    countSet();
  };
  const rows = fields.map((item) => [
    item,
    field(labelOfField(item.field), control(item, values[item.field], change), item.help),
  ]);
  const found = h("p", { role: "status" });
  const draw = () => {
    const plain = (text) => String(text).trim().toLowerCase().replaceAll(/[-_ ]+/g, " ");
    const word = plain(filter.value);
    const matches = (item, label) =>
      plain([item.field, label, item.help, item.names, item.choices ?? []].flat().join(" ")).includes(word);
    for (const [item, row] of rows) row.hidden = !matches(item, labelOfField(item.field));
    const controls = (word ? placed : []).flatMap((item) => {
      const option = item.field === "out" ? "name" : item.field; // the form has the name of the run's folder
      const at = document.querySelector(`[data-option="${option}"]`);
      return at && matches(item, labelOf(at)) ? [at] : [];
    });
    const named = Object.keys(withoutOption).filter((name) => word.length > 3 && plain(name).startsWith(word));
    const reasons = [...new Set(named.map((name) => withoutOption[name]))];
    const links = controls.map((at) => button(labelOf(at), () => at.focus(), { class: "link" }));
    put(
      found,
      reasons.length
        ? reasons.map((reason) => h("span", {}, prose(`${filter.value.trim()}: ${reason}. `)))
        : null,
      links.length
        ? ["Other fields: ", links.map((item, index) => [index ? ", " : "", item])]
        : rows.every(([, row]) => row.hidden) && !reasons.length && "No setting matches.",
    );
    found.hidden = !found.childNodes.length;
  };
  filter.addEventListener("input", draw);
  const summary = h("summary"),
    list = h("div", { class: "fields" }, rows.map(([, element]) => element)),
    element = h("details", { class: "card others" }, summary, filter, found, list);
  const countSet = () => {
    const set = fields.filter((item) => values[item.field] !== undefined).length;
    summary.textContent = `More settings (${rows.length}${set ? `, ${set} set` : ""})`;
    return set;
  };
  element.open = countSet() > 0;
  draw();
  return element;
}

/** Return a default as text: "not set" for null and an empty list or map. */
export const defaultText = (preset) =>
  preset === null || (typeof preset === "object" && !Object.keys(preset).length) ? "not set" : formatValue(preset);

function control({ field: name, choices, type, default: preset }, value, onChange) {
  const now = value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
  const orNumber = choices?.includes("<integer>"); // one of the choices, or a number
  const label = type === "boolean" ? ["true", "false"] : orNumber ? null : choices?.map(String);
  const data = { option: name };
  if (label)
    return select([["", `default (${defaultText(preset)})`], ...label], now, (text) => onChange(name, text), { data });
  const placeholder = orNumber ? `${defaultText(preset)} (${choices.join(", ")})` : defaultText(preset);
  const change = (event) => onChange(name, event.target.value.trim());
  return h("input", { value: now, placeholder, data, on: { change } });
}
