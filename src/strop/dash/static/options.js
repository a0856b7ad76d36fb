// The recipe options in the page's address: only those that are set.

import { address, setQuery, to } from "./route.js";

export function readOptions() {
  try {
    const options = JSON.parse(address().query.get("options") ?? "{}");
    return options && typeof options === "object" && !Array.isArray(options) ? options : {};
  } catch {
    return {};
  }
}

export function storeOptions(options) {
  storeForm({ options: Object.keys(options).length ? JSON.stringify(options) : null });
}

const FORM_KEY = "strop-dash-form";
const storedForm = () => JSON.parse(sessionStorage.getItem(FORM_KEY) ?? "{}");

/** Store values of the form in the address, and for the next time that the form is opened in this tab. */
export function storeForm(values) {
  setQuery(values);
  sessionStorage.setItem(FORM_KEY, JSON.stringify({ ...storedForm(), ...values }));
}

/** Restore values of the form that the address lacks, and store those that it has. */
export function restoreForm(names) {
  const { query } = address();
  const isGiven = query.has("options"), // by a link
    stored = isGiven ? {} : storedForm();
  storeForm(Object.fromEntries(names.map((name) => [name, query.get(name) ?? stored[name] ?? null])));
}

/** Return the address of the form with its stored values. */
export const formAddress = () => to("new", storedForm());

/** Forget the form of this tab. */
export function clearForm() {
  sessionStorage.removeItem(FORM_KEY);
}

/** Set an option; an empty value removes it. */
export function setOption(options, name, value) {
  if (value === "" || value === null || value === undefined) delete options[name];
  else options[name] = value;
}
