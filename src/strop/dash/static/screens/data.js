// Data: rows as tokens, dropped rows, lengths and duplicates. Works on a file before any run.

import { count, errorBox, field, get, h, lasting, link, percent, post, put, select } from "../all.js";
import { histogram } from "../bars.js";
import { confirmTyping, showFieldErrors, withLabels } from "../fields.js";
import { fileField } from "../files.js";
import { labelOfField } from "../labels.js";
import { formAddress, readOptions, restoreForm, storeOptions, setOption } from "../options.js";
import { setQuery } from "../route.js";
import { Table } from "../table.js";
import { pager } from "./answers.js";

const PAGE = 20;

export async function show(container, { query, signal }) {
  restoreForm(["options"]);
  const options = readOptions(),
    out = h("div"),
    next = link("", "Plan a run with this data", { class: "button main push" });
  let offset = Number(query.get("offset")) || 0,
    order = query.get("order") ?? "file",
    part = query.get("part") ?? "train",
    requests = 0;
  const change = (name, value) => {
    setOption(options, name, value);
    storeOptions(options);
    offset = 0;
    load();
  };
  const train = fileField("data.train", "Rows", "data", options["data.train"], (value) => change("data.train", value));
  const model = fileField(
    "model.name",
    "Model",
    "model",
    options["model.name"],
    (value) => change("model.name", value),
    "its tokenizer and chat template; without one, those of `demo`",
  );
  const { fields } = await get("schema", {}, signal),
    byName = new Map(fields.map((item) => [item.field, item]));
  const choice = (name, label) =>
    field(
      label,
      select(
        [["", `default (${byName.get(name).default})`], ...byName.get(name).choices],
        String(options[name] ?? ""),
        (value) => change(name, value),
        { data: { option: name } },
      ),
    );
  const longest = h("input", {
    inputmode: "numeric",
    value: options["data.max_length"] ?? "",
    placeholder: String(byName.get("data.max_length").default),
    data: { option: "data.max_length" },
    on: { change: () => change("data.max_length", longest.value.trim()) },
  });
  const columns = h("input", {
    value: typeof options["data.columns"] === "object" ? JSON.stringify(options["data.columns"]) : options["data.columns"],
    placeholder: "automatic",
    data: { option: "data.columns" },
    on: { change: () => change("data.columns", columns.value.trim()) },
  });
  put(
    container,
    h("div", { class: "line" }, h("h1", {}, "Data"), next),
    h(
      "div",
      { class: "form", style: { "margin-top": "1rem" } },
      h(
        "fieldset",
        {},
        h("legend", {}, "Data"),
        h(
          "div",
          { class: "fields" },
          h("div", { class: "wide fields pair" }, train.element, model.element),
          choice("train.objective", "Objective"),
          field(labelOfField("data.max_length"), longest),
          choice("data.overlong", "Longer rows"),
          choice("data.bad_rows", "Invalid rows"),
          choice("data.loss", "Trained on"),
          field("Columns", columns, "their names in your rows, such as `prompt=question,completion=answer`"),
        ),
      ),
    ),
    out,
  );

  confirmTyping(container);
  async function load() {
    next.href = formAddress();
    next.hidden = !options["data.train"];
    if (!options["data.train"]) {
      put(out, h("p", { class: "empty" }, "Choose a data file. No weights are loaded."));
      return;
    }
    const request = (requests += 1);
    setQuery({ offset: offset || null, order: order === "file" ? null : order, part: part === "train" ? null : part });
    if (!out.children.length || out.querySelector(".empty")) {
      const hint = "The first check also starts Python's libraries and loads the tokenizer.";
      put(out, h("p", { class: "empty" }, "Reading the rows…", lasting(Date.now() / 1000), h("br"), hint));
    }
    out.setAttribute("aria-busy", "true");
    try {
      const page = await post("data", { options, offset, count: PAGE, order, part }, signal);
      if (request === requests) {
        showFieldErrors(container, null);
        draw(page);
      }
    } catch (error) {
      if (error.name !== "AbortError" && request === requests) {
        const labels = showFieldErrors(container, error);
        put(
          out,
          labels.length
            ? h("p", { class: "empty", role: "status" }, `Fix: ${labels.join(", ")}`)
            : errorBox(error, withLabels(container)),
        );
      }
    }
    out.removeAttribute("aria-busy");
  }

  function draw(page) {
    const fullReport = page.report,
      report = part === "eval" && fullReport.eval ? fullReport.eval : fullReport,
      { rows, tokens } = report;
    const dropped = new Table(
      [
        {
          key: "place",
          name: "where",
          head: true,
          value: (row) => (row.line ? `${row.file}:${row.line}` : row.file),
          show: (row, value) => h("code", {}, value),
        },
        { key: "reason", name: "reason", value: (row) => row.reason },
        { key: "what", name: "what", free: true, value: (row) => row.what ?? "" },
      ],
      { label: "Dropped, truncated and split rows", file: "dropped rows.csv" },
    );
    dropped.set([...(report.dropped ?? []), ...(report.cut ?? []).map((item) => ({ ...item, reason: item.how }))]);
    const leftOut = (report.dropped_left_out ?? 0) + (report.cut_left_out ?? 0);
    const duplicates = page.repeats ?? [];
    const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
    put(
      out,
      report.refusal
        ? errorBox(
            { message: `A run would be refused: ${report.refusal.message}`, fix: report.refusal.fix },
            withLabels(container),
          )
        : null,
      h(
        "dl",
        { class: "facts" },
        fact("rows read", count(rows.read)),
        fact("used", count(rows.used + rows.truncated + rows.split)),
        ["truncated", "split", "dropped"].map((name) => fact(name, count(rows[name]))),
        fact("tokens", count(tokens.all)),
        fact(
          "supervised tokens",
          `${count(tokens.supervised)} (${percent(tokens.all ? tokens.supervised / tokens.all : 0, 0)})`,
        ),
        fact("median length", count(tokens.p50)),
        fact("95th percentile", count(tokens.p95)),
        fact("longest", count(tokens.max)),
        fact("end with a stop token", percent(report.stop_token?.share, 0)),
        fact("duplicates", count(report.duplicates?.within)),
        report.padding
          ? fact("padding in batches of 8", percent(report.padding.batched, 0))
          : null,
        page.sharing?.prefix_saves ? fact("computed once, as rows begin alike", percent(page.sharing.prefix_saves, 0)) : null,
      ),
      (report.warnings ?? []).map((warning) => h("p", { class: "warn" }, `Warning: ${warning}`)),
      (report.template ?? []).map((line) => h("p", { class: "soft" }, line)),
      page.lengths?.counts?.length
        ? h(
            "section",
            { class: "card", style: { "margin-top": ".8rem" } },
            h(
              "div",
              { class: "line" },
              h("h3", {}, "Rows by length"),
              h(
                "span",
                { class: "key" },
                h("span", {}, h("i", { class: "dot", style: { background: "var(--base)" } }), "all tokens of a row"),
                h("span", {}, h("i", { class: "dot", style: { background: "var(--tuned)" } }), "tokens trained on"),
              ),
            ),
            histogram(page.lengths),
          )
        : null,
      dropped.rows.length
        ? [
            h(
              "div",
              { class: "line", style: { margin: "1.4rem 0 .6rem" } },
              h("h2", { style: { margin: 0 } }, "Dropped, truncated and split rows"),
              dropped.tools(),
            ),
            dropped.element,
            leftOut ? h("p", { class: "soft" }, `and ${count(leftOut)} more`) : null,
          ]
        : null,
      duplicates.length
        ? h(
            "details",
            {},
            h("summary", {}, `${count(duplicates.length)} duplicate ${duplicates.length === 1 ? "row" : "rows"}`),
            h(
              "ul",
              {},
              duplicates
                .slice(0, 200)
                .map((item) =>
                  h("li", {}, h("code", {}, `${item.file}:${item.line}`), " same as ", h("code", {}, item.same_as)),
                ),
            ),
          )
        : null,
      h(
        "div",
        { class: "line", style: { margin: "1.6rem 0 .6rem" } },
        h("h2", { style: { margin: 0 } }, "Rows as tokens"),
        select(
          [
            ["file", "file order"],
            ["long", "longest first"],
            ["short", "shortest first"],
          ],
          order,
          (value) => {
            order = value;
            offset = 0;
            load();
          },
          { "aria-label": "Order of the rows", style: { width: "auto" } },
        ),
        fullReport.eval
          ? select(
              [
                ["train", "training rows"],
                ["eval", "evaluation rows"],
              ],
              part,
              (value) => {
                part = value;
                offset = 0;
                load();
              },
              { "aria-label": "Part", style: { width: "auto" } },
            )
          : null,
      ),
      h(
        "p",
        { class: "key tokens" },
        h("span", {}, "context"),
        h("span", { class: "learned" }, "trained on"),
        h("span", { class: "stop" }, "stop token"),
      ),
      h(
        "div",
        { class: "rows" },
        page.rows.map((row) =>
          h(
            "article",
            { class: "card" },
            h(
              "div",
              { class: "line" },
              h("code", {}, `${row.file}:${row.line}`),
              row.part ? h("strong", {}, row.part) : null,
              h("span", { class: "soft" }, `${count(row.tokens)} tokens, ${count(row.supervised)} trained on`),
            ),
            row.images.length
              ? h(
                  "div",
                  { class: "pictures" },
                  row.images.map((src, i) => h("img", { src, alt: `image ${i + 1} of the row` })),
                )
              : null,
            h("div", { class: "tokens mono" }, tokensOf(row)),
          ),
        ),
      ),
      page.rows.length ? null : h("p", { class: "empty" }, "No matching rows."),
      h(
        "div",
        { class: "line", style: { "margin-top": ".8rem" } },
        pager(page.num_rows, offset, PAGE, (at) => {
          offset = at;
          load();
        }),
      ),
    );
  }

  await load();
  return "Data";
}

/** Return the tokens of a row, with visible line breaks and tabs. */
function tokensOf(row) {
  return row.pieces.map(([text, weight, stop]) =>
    h(
      "span",
      {
        class: stop ? "stop" : weight > 0 ? "learned" : null,
        title: weight > 0 && weight !== 1 ? `weight ${weight}` : null,
      },
      text.replaceAll("\n", "↵\n").replaceAll("\t", "→\t"),
    ),
  );
}
