// What the run was made of: its recipe with the origin of each value, hashes, versions, machine.

import { command, count, facts, h, put, shown } from "../all.js";
import { recipeTable } from "../recipe.js";

export async function show(place, { run }) {
  const recipe = run.recipe ?? [],
    lock = run.lock ?? {};
  const table = (rows, label) => {
    const made = recipeTable({ label, file: `${run.name} ${label}.csv` });
    made.set(rows);
    return made;
  };
  const chosen = table(
      recipe.filter((one) => one.origin !== "default"),
      "settings",
    ),
    defaults = table(
      recipe.filter((one) => one.origin === "default"),
      "defaults",
    );
  const data = run.data_report,
    pairs = [
      ["seed", shown(lock.seed)],
      ["base", lock.base?.name],
      ["fingerprint of the base", lock.base?.fingerprint?.slice(0, 16)],
      ...Object.entries(lock.versions ?? {}),
    ];
  put(
    place,
    run.resume && run.can.includes("resume") ? [h("h2", {}, "To go on from a terminal"), command(run.resume)] : null,
    h("h2", {}, "Chosen, with reasons"),
    h("div", { class: "line", style: { "margin-bottom": ".6rem" } }, chosen.tools()),
    chosen.element,
    h(
      "details",
      {},
      h("summary", {}, `${count(recipe.length - chosen.rows.length)} fields at their defaults`),
      defaults.element,
    ),
    (lock.overrides ?? []).length
      ? [
          h("h2", {}, "Changed on the way"),
          h(
            "ul",
            {},
            lock.overrides.map((one) =>
              h("li", {}, h("code", {}, one.field ?? one.name), ` ${shown(one.was)} → ${shown(one.now)}`),
            ),
          ),
        ]
      : null,
    run.report_page ? h("p", {}, "Its report, a file that opens anywhere: ", h("code", {}, run.report_page)) : null,
    data ? [h("h2", {}, "Data"), facts(Object.entries(data.rows).map(([name, value]) => [name, count(value)]))] : null,
    h("h2", {}, "Made with"),
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
            run.checkpoints.map((one) =>
              h("li", {}, `step ${count(one.step)}`, one.best ? h("span", { class: "tag good" }, "best") : null),
            ),
          ),
        ]
      : null,
  );
  return false;
}
