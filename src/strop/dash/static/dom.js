// Create elements from data. Text becomes text nodes only: no code of the page parses markup.

import { elapsed } from "./format.js";

/**
 * Create an element. props: `class`, `on: {event: listener}`, `style: {property: value}`, `data: {name: value}`,
 * DOM properties (value, checked, disabled, hidden, tabIndex), and attributes. children: nodes, text, lists of them.
 * Props and children that are null, undefined or false are skipped.
 */
export function h(kind, props = {}, ...children) {
  return fill(document.createElement(kind), props, children);
}

const SVG = "http://www.w3.org/2000/svg";

/** Create an SVG element. */
export function svg(kind, props = {}, ...children) {
  return fill(document.createElementNS(SVG, kind), props, children);
}

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "tabIndex", "indeterminate", "open", "selected"]);

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...flat(children));
  return element;
}

function flat(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}

/** Replace the children of an element. */
export function put(element, ...children) {
  element.replaceChildren(...flat(children));
  return element;
}

/** Return text with its parts between backticks as code. */
export const prose = (text) =>
  String(text)
    .split(/`([^`\n]+)`/)
    .map((part, index) => (index % 2 ? h("code", {}, part) : part));

const clocks = new WeakMap(); // element -> function that returns its text

/** Create text that is computed again each second while it is on the page. */
export function clock(text, props = {}) {
  const element = h("span", { ...props, class: `clock ${props.class ?? ""}`.trim() }, text());
  clocks.set(element, text);
  return element;
}
setInterval(() => {
  for (const element of document.querySelectorAll(".clock")) {
    const text = clocks.get(element)();
    if (element.textContent !== text) element.textContent = text;
  }
}, 1000);

/** Show how long an activity lasts. since: Unix time in seconds. Screen readers do not announce each second. */
export const lasting = (since) => clock(() => ` (${elapsed(Date.now() / 1000 - since)})`, { "aria-hidden": "true" });

let lastId = 0;
export const uniqueId = (prefix) => `${prefix}-${(lastId += 1)}`;

/** Create a labelled field. The control gets an id, which its label and hint refer to. */
export function field(label, control, hint = null) {
  control.id ||= uniqueId("field");
  const hintElement = hint && h("small", { id: `${control.id}-hint` }, prose(hint));
  if (hintElement) control.setAttribute("aria-describedby", hintElement.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, hintElement);
}

export function select(options, chosen, onChange, props = {}) {
  const element = h("select", { ...props, on: { change: () => onChange(element.value) } });
  for (const option of options) {
    const [value, text] = Array.isArray(option) ? option : [option, option];
    element.append(h("option", { value, selected: value === chosen }, text));
  }
  return element;
}

export const button = (text, onClick, props = {}) =>
  h("button", { type: "button", ...props, on: { click: onClick } }, text);

export const link = (to, text, props = {}) => h("a", { href: to, ...props }, text);

/** Create a list of names and values, as in report.html. */
export function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h(
    "dl",
    { class: "facts" },
    shown.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

/** Show a command line with a button that copies it. */
export function command(text) {
  const copy = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(text);
      notify("Copied.");
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      notify("Selected: press Ctrl+C.");
    }
    setTimeout(() => (copy.textContent = "Copy"), 2000);
  });
  const code = h("code", { tabIndex: 0 }, text);
  return h("div", { class: "command" }, code, copy);
}

/** Show a notice at the bottom of the page, which screen readers announce. */
export function notify(text, bad = false) {
  const element = document.getElementById("notice");
  put(element, prose(text));
  element.classList.toggle("bad", bad);
  element.classList.add("shown");
  clearTimeout(notify.timer);
  notify.timer = setTimeout(() => element.classList.remove("shown"), bad ? 12000 : 4000);
}

/** Download a file. */
export function download(name, kind, text) {
  const url = URL.createObjectURL(text instanceof Blob ? text : new Blob([text], { type: kind }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
