// A recipe as a table: each field with its value, where that came from, and why.

import { h } from "./dom.js";
import { shown } from "./format.js";
import { Table } from "./table.js";

/** options: as Table takes them. Its rows: [{field, value, origin, why}]. */
export function recipeTable(options) {
  return new Table(
    [
      { key: "field", name: "field", head: true, value: (row) => row.field, show: (row) => h("code", {}, row.field) },
      {
        key: "value",
        name: "value",
        free: true,
        value: (row) => shown(row.value),
        show: (row, value) => h("strong", {}, value),
      },
      { key: "origin", name: "from", value: (row) => row.origin },
      {
        key: "why",
        name: "reason",
        free: true,
        value: (row) => row.why,
        show: (row, value) => value && h("span", { class: "soft" }, value),
      },
    ],
    options,
  );
}
