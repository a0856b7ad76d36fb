// A table that can be sorted, filtered by words, and saved as CSV.

import { button, download, uniqueId, h, put } from "./dom.js";
import { csv, isNumber } from "./format.js";

/**
 * columns: [{key, name, value(row), show(row, value)?, number?, free?, plain?, sortable?, csvOnly?, csvName?, csv(row)?}]; value is sorted and saved,
 * csvName and csv replace name and value in the file, show returns a node or text; the column with `head: true` names its row. rows: any objects.
 * options: label, sort: [key, "ascending" | "descending"], filter text, file (name of the CSV), empty, class, onChange({sort, filter}),
 * identity(row): rows with the same identity keep their elements, so that focus and selection outlive an update.
 */
export class Table {
  constructor(columns, options) {
    this.columns = columns;
    this.shown = columns.filter((column) => !column.csvOnly);
    this.options = { empty: "No rows.", ...options };
    this.sort = this.options.sort ?? null;
    this.filter = this.options.filter ?? "";
    this.rows = [];
    this.items = new Map();
    this.heads = new Map();
    for (const column of this.shown) this.heads.set(column.key, this.#head(column));
    this.body = h("tbody");
    const table = h(
      "table",
      { class: `stack ${this.options.class ?? ""}`, "aria-label": this.options.label },
      h("thead", {}, h("tr", {}, [...this.heads.values()])),
      this.body,
    );
    this.empty = h("p", { class: "empty", hidden: true });
    this.element = h(
      "div",
      { class: "scroll", tabIndex: 0, role: "region", "aria-label": this.options.label },
      table,
      this.empty,
    );
  }

  #head(column) {
    const inner =
      column.sortable === false
        ? column.name
        : button(column.name, () => {
            const descending = this.sort?.[0] === column.key ? this.sort[1] === "ascending" : Boolean(column.number);
            this.sort = [column.key, descending ? "descending" : "ascending"];
            this.#changed();
          });
    return h("th", { scope: "col", class: column.number ? "n" : null }, inner);
  }

  #changed() {
    this.draw();
    this.options.onChange?.({ sort: this.sort, filter: this.filter });
  }

  /** Return the filter and the save button. */
  tools() {
    const input = h("input", {
      type: "search",
      value: this.filter,
      placeholder: "Filter",
      "aria-label": `Filter ${this.options.label}`,
      on: {
        input: () => {
          this.filter = input.value;
          this.#changed();
        },
      },
    });
    input.id = uniqueId("filter");
    this.filterInput = input;
    return [h("div", { class: "filter" }, input), button("Save CSV", () => this.save(), { class: "small" })];
  }

  /** Filter by words, as if they were entered. */
  setFilter(text) {
    this.filter = this.filterInput.value = text;
    this.#changed();
  }

  save() {
    const rows = this.chosen().map((row) =>
      this.columns.filter((column) => !column.plain).map((column) => (column.csv ?? column.value)(row)),
    );
    download(
      this.options.file ?? "table.csv",
      "text/csv",
      csv(
        this.columns.filter((column) => !column.plain).map((column) => column.csvName ?? column.name),
        rows,
      ),
    );
  }

  set(rows) {
    this.rows = rows;
    this.draw();
  }

  /** Return the rows that pass the filter, sorted. */
  chosen() {
    const words = this.filter.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (row) =>
      this.columns
        .map((column) => column.value(row) ?? "")
        .join(" ")
        .toLowerCase();
    let rows = words.length
      ? this.rows.filter((row) => {
          const all = text(row);
          return words.every((word) => all.includes(word));
        })
      : [...this.rows];
    const column = this.sort && this.columns.find((column) => column.key === this.sort[0]);
    if (column) {
      const sign = this.sort[1] === "ascending" ? 1 : -1;
      const isEmpty = (value) => value === null || value === undefined || value === "";
      rows = rows.map((row) => [column.value(row), row]);
      rows.sort(([a], [b]) => {
        if (isEmpty(a) || isEmpty(b)) return isEmpty(a) - isEmpty(b); // missing values come last in either order
        return (
          sign * (isNumber(a) && isNumber(b) ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }))
        );
      });
      rows = rows.map(([, row]) => row);
    }
    return rows;
  }

  draw() {
    for (const [key, head] of this.heads) {
      if (this.sort?.[0] === key) head.setAttribute("aria-sort", this.sort[1]);
      else head.removeAttribute("aria-sort");
    }
    const chosen = this.chosen(),
      reused = new Map(),
      elements = [];
    for (const row of chosen) {
      const identity = this.options.identity?.(row) ?? row,
        text = this.options.identity ? JSON.stringify(row) : "";
      const previous = this.items.get(identity);
      const item = previous && previous.text === text ? previous : { text, element: this.#row(row) };
      reused.set(identity, item);
      elements.push(item.element);
    }
    this.items = reused;
    const focus = document.activeElement?.closest?.("tr") && document.activeElement;
    const same =
      elements.length === this.body.children.length &&
      elements.every((element, index) => element === this.body.children[index]);
    if (!same) put(this.body, elements);
    if (focus && focus.isConnected && focus !== document.activeElement) focus.focus({ preventScroll: true });
    this.empty.hidden = chosen.length > 0;
    put(this.empty, this.rows.length ? "No row matches the filter." : this.options.empty);
  }

  #row(row) {
    return h(
      "tr",
      {},
      this.shown.map((column) => {
        const value = column.value(row),
          shown = column.show ? column.show(row, value) : value;
        const blank = shown === null || shown === undefined || shown === "";
        const props = {
          class:
            [column.number && "n", column.free && "free", column.key === "pick" && "pick", blank && "blank"]
              .filter(Boolean)
              .join(" ") || null,
        };
        return column.head
          ? h("th", { scope: "row", ...props }, shown)
          : h("td", { ...props, data: column.name ? { name: column.name } : {} }, blank ? "" : shown);
      }),
    );
  }
}
