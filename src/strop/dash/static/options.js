// The options of a recipe as they stand in an address: those that are given, no others.

import { address, remember } from "./route.js";

export function given() {
  try {
    const found = JSON.parse(address().query.get("options") ?? "{}");
    return found && typeof found === "object" && !Array.isArray(found) ? found : {};
  } catch {
    return {};
  }
}

export function keep(options) {
  remember({ options: Object.keys(options).length ? JSON.stringify(options) : null });
}

/** Sets or, for an empty value, takes back an option. */
export function set(options, name, value) {
  if (value === "" || value === null || value === undefined) delete options[name];
  else options[name] = value;
}
