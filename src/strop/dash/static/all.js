// Modules that most screens import.

export * from "./api.js";
export * from "./dom.js";
export * from "./format.js";
export * from "./route.js";
