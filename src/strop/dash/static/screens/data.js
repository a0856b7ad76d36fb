// What will be trained on: rows as tokens, the account of every row, lengths. Works on a file before any run.

import { count, fault, field, get, h, link, percent, post, put, select, to } from "../all.js";
import { histogram } from "../bars.js";
import { fileField } from "../files.js";
import { given, keep, set } from "../options.js";
import { remember } from "../route.js";
import { Table } from "../table.js";
import { pager } from "./answers.js";

const PAGE = 20;

export async function show(place, { query, signal }) {
  const options = given(),
    out = h("div"),
    next = h("span", { class: "push" });
  let offset = Number(query.get("offset")) || 0,
    order = query.get("order") ?? "file",
    part = query.get("part") ?? "train",
    asked = 0;
  const change = (name, value) => {
    set(options, name, value);
    keep(options);
    offset = 0;
    load();
  };
  const train = fileField("Rows", "data", options["data.train"], (value) => change("data.train", value));
  const model = fileField("Model", "model", options["model.name"], (value) => change("model.name", value));
  const { fields } = await get("schema", {}, signal),
    of = new Map(fields.map((one) => [one.field, one]));
  const choice = (name, words) =>
    field(
      words,
      select(
        [["", `default (${of.get(name).default})`], ...of.get(name).choices],
        String(options[name] ?? ""),
        (value) => change(name, value),
      ),
    );
  const longest = h("input", {
    inputmode: "numeric",
    value: options["data.max_length"] ?? "",
    placeholder: String(of.get("data.max_length").default),
    on: { change: () => change("data.max_length", longest.value.trim()) },
  });
  put(
    place,
    h("div", { class: "line" }, h("h1", {}, "Data"), next),
    h(
      "div",
      { class: "form", style: { "margin-top": "1rem" } },
      h(
        "fieldset",
        {},
        h("legend", {}, "Which"),
        h(
          "div",
          { class: "fields" },
          train.element,
          model.element,
          field("Longest row, in tokens", longest),
          choice("data.overlong", "Longer rows"),
          choice("data.bad_rows", "Wrong rows"),
          choice("data.loss", "Trained on"),
        ),
      ),
    ),
    out,
  );

  async function load() {
    put(next, link(to("new", { options: JSON.stringify(options) }), "Plan a run with these", { class: "button main" }));
    if (!options["data.train"] || !options["model.name"]) {
      put(
        out,
        h("p", { class: "empty" }, "Choose a file of rows and a model. Nothing is trained; no weights are loaded."),
      );
      return;
    }
    const mine = (asked += 1);
    remember({ offset: offset || null, order: order === "file" ? null : order, part: part === "train" ? null : part });
    if (!out.children.length || out.querySelector(".empty")) put(out, h("p", { class: "empty" }, "Reading…"));
    out.setAttribute("aria-busy", "true");
    try {
      const found = await post("data", { options, offset, count: PAGE, order, part }, signal);
      if (mine === asked) draw(found);
    } catch (error) {
      if (error.name !== "AbortError" && mine === asked) put(out, fault(error));
    }
    out.removeAttribute("aria-busy");
  }

  function draw(found) {
    const whole = found.report,
      report = part === "eval" && whole.eval ? whole.eval : whole,
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
    dropped.set([...(report.dropped ?? []), ...(report.cut ?? []).map((one) => ({ ...one, reason: one.how }))]);
    const more = (report.dropped_left_out ?? 0) + (report.cut_left_out ?? 0);
    const doubles = found.repeats ?? [];
    const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
    put(
      out,
      found.refusal
        ? fault({ message: `A run would refuse this: ${found.refusal.message}`, fix: found.refusal.fix })
        : null,
      h(
        "dl",
        { class: "facts" },
        fact("rows read", count(rows.read)),
        fact("used", count(rows.used)),
        ["truncated", "split", "dropped"].map((name) => fact(name, count(rows[name]))),
        fact("tokens", count(tokens.all)),
        fact(
          "of them supervised",
          `${count(tokens.supervised)} (${percent(tokens.all ? tokens.supervised / tokens.all : 0, 0)})`,
        ),
        fact("length: half up to", count(tokens.p50)),
        fact("95 % up to", count(tokens.p95)),
        fact("longest", count(tokens.max)),
        fact("end with a stop token", percent(report.stop_token?.share, 0)),
        fact("duplicates", count(report.duplicates?.within)),
        report.padding
          ? fact(
              "padding, in batches / packed",
              `${percent(report.padding.batched, 0)} / ${percent(report.padding.packed, 0)}`,
            )
          : null,
        found.sharing?.prefix_saves ? fact("saved by shared prefixes", percent(found.sharing.prefix_saves, 0)) : null,
      ),
      (report.warnings ?? []).map((warning) => h("p", { class: "warn" }, `Warning: ${warning}`)),
      (report.template ?? []).map((line) => h("p", { class: "soft" }, line)),
      found.lengths?.counts?.length
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
            histogram(found.lengths),
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
            more ? h("p", { class: "soft" }, `and ${count(more)} more`) : null,
          ]
        : null,
      doubles.length
        ? h(
            "details",
            {},
            h("summary", {}, `${count(doubles.length)} rows that were there before`),
            h(
              "ul",
              {},
              doubles
                .slice(0, 200)
                .map((one) =>
                  h("li", {}, h("code", {}, `${one.file}:${one.line}`), " as ", h("code", {}, one.same_as)),
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
            ["file", "as in the file"],
            ["long", "the longest first"],
            ["short", "the shortest first"],
          ],
          order,
          (value) => {
            order = value;
            offset = 0;
            load();
          },
          { "aria-label": "Order of the rows", style: { width: "auto" } },
        ),
        whole.eval
          ? select(
              [
                ["train", "to train on"],
                ["eval", "held out"],
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
        found.rows.map((row) =>
          h(
            "article",
            { class: "card" },
            h(
              "div",
              { class: "line" },
              h("code", {}, `${row.file}:${row.line}`),
              h("span", { class: "soft" }, `${count(row.tokens)} tokens, ${count(row.supervised)} trained on`),
            ),
            h("div", { class: "tokens mono" }, tokensOf(row)),
          ),
        ),
      ),
      found.rows.length ? null : h("p", { class: "empty" }, "No such rows."),
      h(
        "div",
        { class: "line", style: { "margin-top": ".8rem" } },
        pager(found.num_rows, offset, PAGE, (at) => {
          offset = at;
          load();
        }),
      ),
    );
  }

  await load();
  return "Data";
}

/** A row, token by token: blanks and line ends are seen. The mask is stated once per stretch, for screen readers. */
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
