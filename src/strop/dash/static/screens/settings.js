// Settings of a run: its recipe with the origin of each value, hashes, versions and machine.

import { command, count, facts, h, put, formatValue } from "../all.js";
import { recipeTable } from "../recipe.js";

export async function show(container, { run }) {
  const recipe = run.recipe ?? [],
    lock = run.lock ?? {};
  const table = (rows, label) => {
    const result = recipeTable({ label, file: `${run.name} ${label}.csv` });
    result.set(rows);
    return result;
  };
  const chosen = table(
      recipe.filter((item) => item.origin !== "default"),
      "settings",
    ),
    defaults = table(
      recipe.filter((item) => item.origin === "default"),
      "defaults",
    );
  const pairs = [
      ["seed", formatValue(lock.seed)],
      ["base", lock.base?.name],
      ["base fingerprint", lock.base?.fingerprint?.slice(0, 16)],
      ...Object.entries(lock.versions ?? {}),
    ];
  put(
    container,
    run.resume && run.can.includes("resume") ? [h("h2", {}, "Resume from a terminal"), command(run.resume)] : null,
    h("h2", {}, "Chosen values and reasons"),
    h("div", { class: "line", style: { "margin-bottom": ".6rem" } }, chosen.tools()),
    chosen.element,
    h(
      "details",
      {},
      h("summary", {}, `${count(recipe.length - chosen.rows.length)} fields with default values`),
      defaults.element,
    ),
    (lock.overrides ?? []).length
      ? [
          h("h2", {}, "Changed by a resume"),
          h(
            "ul",
            {},
            lock.overrides.map((item) =>
              h(
                "li",
                {},
                h("code", {}, item.field ?? item.name),
                ` ${formatValue(item.was)} → ${formatValue(item.now)}`,
              ),
            ),
          ),
        ]
      : null,
    run.report_page ? h("p", {}, "Report page: ", h("code", {}, run.report_page)) : null,
    run.row_counts.length
      ? [h("h2", {}, "Data", h("small", {}, " rows")), facts(run.row_counts.map(([name, rows]) => [name, count(rows)]))]
      : null,
    h("h2", {}, "Versions and base model"),
    facts(pairs),
    h("h2", {}, "Machine of the run"),
    h(
      "ul",
      {},
      (run.machine ?? []).map((line) => h("li", {}, line)),
    ),
    (run.checkpoints ?? []).length
      ? [
          h("h2", {}, "Checkpoints"),
          h(
            "ul",
            {},
            run.checkpoints.map((item) =>
              h("li", {}, `step ${count(item.step)} `, item.best ? h("span", { class: "tag good" }, "best") : null),
            ),
          ),
        ]
      : null,
  );
  return false;
}
