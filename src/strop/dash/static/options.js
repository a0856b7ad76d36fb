// The recipe options in the page's address: only those that are set.

import { address, setQuery } from "./route.js";

export function readOptions() {
  try {
    const options = JSON.parse(address().query.get("options") ?? "{}");
    return options && typeof options === "object" && !Array.isArray(options) ? options : {};
  } catch {
    return {};
  }
}

export function storeOptions(options) {
  setQuery({ options: Object.keys(options).length ? JSON.stringify(options) : null });
}

/** Set an option; an empty value removes it. */
export function setOption(options, name, value) {
  if (value === "" || value === null || value === undefined) delete options[name];
  else options[name] = value;
}
