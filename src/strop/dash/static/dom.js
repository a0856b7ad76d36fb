// Elements from data. Text only ever becomes a text node: nothing here, or in any screen, parses markup.

/**
 * An element. props: `class`, `on: {event: listener}`, `style: {property: value}`, `data: {name: value}`,
 * DOM properties (value, checked, disabled, hidden, tabIndex), and attributes. null and false leave a prop out.
 * children: nodes, text, lists of them; null and false are left out.
 */
export function h(kind, props = {}, ...children) {
  return fill(document.createElement(kind), props, children);
}

const SVG = "http://www.w3.org/2000/svg";

/** The same for a drawing. */
export function svg(kind, props = {}, ...children) {
  return fill(document.createElementNS(SVG, kind), props, children);
}

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "tabIndex", "indeterminate", "open", "selected"]);

function fill(made, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (name === "style") for (const [key, text] of Object.entries(value)) made.style.setProperty(key, text);
    else if (name === "data") Object.assign(made.dataset, value);
    else if (PROPERTIES.has(name)) made[name] = value;
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...flat(children));
  return made;
}

function flat(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}

/** Puts new children in place of the old ones. */
export function put(place, ...children) {
  place.replaceChildren(...flat(children));
  return place;
}

let numbered = 0;
export const fresh = (word) => `${word}-${(numbered += 1)}`;

/** A labelled field: the control gets an id, its label and its hint are tied to it. */
export function field(label, control, hint = null) {
  control.id ||= fresh("field");
  const said = hint && h("small", { id: `${control.id}-hint` }, hint);
  if (said) control.setAttribute("aria-describedby", said.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, said);
}

export function select(options, chosen, onChange, props = {}) {
  const made = h("select", { ...props, on: { change: () => onChange(made.value) } });
  for (const option of options) {
    const [value, text] = Array.isArray(option) ? option : [option, option];
    made.append(h("option", { value, selected: value === chosen }, text));
  }
  return made;
}

export const button = (text, onClick, props = {}) =>
  h("button", { type: "button", ...props, on: { click: onClick } }, text);

export const link = (to, text, props = {}) => h("a", { href: to, ...props }, text);

/** Facts as a list of name and value, as in report.html. */
export function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h(
    "dl",
    { class: "facts" },
    shown.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

/** A command line with a button that copies it. */
export function command(text) {
  const copy = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(text);
      say("Copied.");
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      say("Selected: press Ctrl+C.");
    }
    setTimeout(() => (copy.textContent = "Copy"), 2000);
  });
  const code = h("code", { tabIndex: 0 }, text);
  return h("div", { class: "command" }, code, copy);
}

/** Says a sentence to everyone: below the page for eyes, and to screen readers. */
export function say(text, bad = false) {
  const place = document.getElementById("said");
  place.textContent = text;
  place.classList.toggle("bad", bad);
  place.classList.add("shown");
  clearTimeout(say.timer);
  say.timer = setTimeout(() => place.classList.remove("shown"), bad ? 12000 : 4000);
}

/** Gives the reader a file. */
export function download(name, kind, text) {
  const url = URL.createObjectURL(text instanceof Blob ? text : new Blob([text], { type: kind }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
