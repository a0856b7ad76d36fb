// What most screens need, under one name.

export * from "./api.js";
export * from "./dom.js";
export * from "./format.js";
export * from "./route.js";
