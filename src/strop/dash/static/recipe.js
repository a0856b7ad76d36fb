// A recipe as a table: each field with its value, origin and reason.

import { h, prose } from "./dom.js";
import { formatValue } from "./format.js";
import { FIELD_COLUMN } from "./labels.js";
import { Table } from "./table.js";

/** Create the table. options: those of Table. Rows: [{field, value, origin, why}]. */
export function recipeTable(options) {
  return new Table(
    [
      FIELD_COLUMN,
      {
        key: "value",
        name: "value",
        free: true,
        value: (row) => formatValue(row.value),
        show: (row, value) => h("strong", {}, value),
      },
      { key: "origin", name: "origin", value: (row) => row.origin },
      {
        key: "why",
        name: "reason",
        free: true,
        value: (row) => row.why,
        show: (row, value) => value && h("span", { class: "soft" }, prose(value)),
      },
    ],
    options,
  );
}
