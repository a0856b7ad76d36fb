// Compare runs: curves, settings that differ, scores, and a verdict.

import {
  button,
  count,
  describeMetric,
  duration,
  errorBox,
  get,
  h,
  joinNames,
  link,
  lossText,
  runPath,
  splitNames,
  percent,
  prose,
  scoreText,
  put,
  setQuery,
  formatValue,
  to,
} from "../all.js";
import { AXES, BYTES, isSmoothed, joinSeries, smoothedLoss, smoothingSlider } from "../curves.js";
import { FIELD_COLUMN, TITLES } from "../labels.js";
import { Plot } from "../plot.js";
import { Table } from "../table.js";

const FIELDS = [
  "accuracy",
  "margin",
  "reward",
  "kl",
  "grad_norm",
  "learning_rate",
  "tokens_per_s",
  "resident_bytes",
  "allocated_bytes",
];
const MAX_RUNS = 6; // limited by the number of colours

/** Return the colours of runs, which depend on their names and not on their order. */
function coloursOf(names) {
  const free = new Set(Array.from({ length: MAX_RUNS }, (_, index) => index)),
    colours = new Map();
  for (const name of [...names].sort()) {
    const wanted = [...name].reduce((sum, letter) => (31 * sum + letter.codePointAt(0)) % 9973, 7) % MAX_RUNS,
      colour = free.has(wanted) ? wanted : Math.min(...free);
    free.delete(colour);
    colours.set(name, `c${colour}`);
  }
  return colours;
}

export async function show(container, { query, signal }) {
  const { runs: all } = await get("runs", {}, signal),
    runs = all.filter((run) => run.state !== "failed" && run.kind !== "sweep"),
    names = new Set(runs.map((run) => run.name));
  let chosen = splitNames(query.get("runs"))
      .filter((name) => names.has(name))
      .slice(0, MAX_RUNS),
    by = AXES[query.get("by")] ? query.get("by") : "step";
  const picker = h("div"),
    out = h("div");
  const named = splitNames(query.get("runs")).filter((name) => names.has(name)).length;
  put(
    container,
    h("h1", {}, "Compare"),
    named > chosen.length
      ? h("p", { class: "warn", role: "status" }, `${chosen.length} of ${named} runs are shown, the most that fit.`)
      : null,
    picker,
    out,
  );
  let plots = [],
    drawLoss = () => {},
    requests = 0;
  const smoothing = smoothingSlider(query, () => drawLoss());
  signal.addEventListener("abort", () => plots.forEach((plot) => plot.destroy()));

  function pick() {
    put(
      picker,
      h(
        "details",
        { open: chosen.length < 2 },
        h("summary", {}, chosen.length ? `${chosen.join(", ")}` : "Choose the runs"),
        runs.length < 2
          ? h("p", { class: "empty" }, "There are fewer than two runs.")
          : h(
              "fieldset",
              { class: "card choice" },
              h("legend", {}, `Runs (at most ${MAX_RUNS})`),
              runs.map((run) => {
                const box = h("input", {
                  type: "checkbox",
                  checked: chosen.includes(run.name),
                  on: {
                    change: () => {
                      if (box.checked && chosen.length >= MAX_RUNS) {
                        box.checked = false;
                        return;
                      }
                      chosen = box.checked ? [...chosen, run.name] : chosen.filter((name) => name !== run.name);
                      picker.querySelector("summary").textContent = chosen.join(", ") || "Choose the runs";
                      setQuery({ runs: joinNames(chosen) });
                      load();
                    },
                  },
                });
                return h(
                  "label",
                  { class: "pick" },
                  box,
                  " ",
                  run.name,
                  " ",
                  h(
                    "small",
                    {},
                    [run.model, run.score && `${run.score.metric} ${scoreText(run.score.value)}`, run.score?.caveat]
                      .filter(Boolean)
                      .join(", "),
                  ),
                );
              }),
            ),
      ),
    );
  }

  async function load() {
    const request = (requests += 1);
    if (chosen.length < 2) {
      put(out);
      return;
    }
    let comparison, histories;
    try {
      [comparison, ...histories] = await Promise.all([
        get("compare", { runs: joinNames(chosen) }, signal),
        ...chosen.map((name) => get(runPath(name, "history"), { points: 400, by }, signal)),
      ]);
    } catch (error) {
      if (error.name !== "AbortError") put(out, errorBox(error));
      return;
    }
    if (request !== requests) return;
    const axes = h(
      "div",
      { class: "group", role: "group", "aria-label": "Curves by" },
      Object.keys(AXES).map((name) =>
        button(
          name,
          () => {
            by = name;
            setQuery({ by: name === "step" ? null : name });
            load();
          },
          { class: "small", "aria-pressed": String(name === by) },
        ),
      ),
    );
    plots.forEach((plot) => plot.destroy());
    const colours = coloursOf(chosen);
    const curve = (field, title, more = {}) => {
      const series = histories.map((history) => history.series[field]);
      if (!series.some((item) => item?.x.length)) return null;
      const plot = new Plot({
        title,
        file: `comparison ${title}`,
        group: "compare",
        height: 230,
        x: AXES[by],
        onZoom: (range) => plots.forEach((other) => other.zoomTo(range)),
        series: chosen.map((name) => ({ name, colour: colours.get(name), width: 1.8 })),
        ...more,
      });
      if (!more.series) plot.set(joinSeries(series), [], AXES[by]);
      return plot;
    };
    const raw = histories.map((history) => history.series.loss);
    const canSmooth = histories.some((history) => isSmoothed(history, 1));
    smoothing.element.hidden = !canSmooth;
    const loss = curve("loss", canSmooth ? "Training loss, smoothed" : "Training loss", {
      log: true,
      show: lossText,
      series: [
        ...chosen.map((name, index) => ({
          name: `${name}, each step`,
          colour: colours.get(name),
          width: 1,
          opacity: 0.35,
          of: chosen.length + index,
        })),
        ...chosen.map((name) => ({ name, colour: colours.get(name), width: 2 })),
      ],
    });
    drawLoss = () => {
      const smoothed = histories.map((history) => smoothedLoss(history, smoothing.weight()));
      loss?.set(joinSeries([...raw, ...smoothed]), [], AXES[by]);
    };
    drawLoss();
    plots = [
      loss,
      curve("eval_loss", "Evaluation loss", { log: true, show: lossText }),
      ...FIELDS.map((field) => curve(field, TITLES[field], field.endsWith("_bytes") ? BYTES : {})),
    ].filter(Boolean);
    put(
      out,
      comparison.verdict ? h("p", { class: "verdict" }, comparison.verdict) : null,
      comparison.unevaluated.length
        ? h(
            "p",
            { class: "actions" },
            comparison.unevaluated.map((name) =>
              comparison.evaluating.includes(name)
                ? link(to("run", name, "answers"), `${name} is being evaluated`)
                : link(to("run", name, "answers", comparison.evaluate), `Evaluate ${name}`, { class: "button" }),
            ),
          )
        : null,
      notes(comparison),
      scores(comparison),
      pairs(comparison),
      h(
        "div",
        { class: "line", style: { margin: "1.6rem 0 .4rem" } },
        h("h2", { style: { margin: 0 } }, "Curves"),
        axes,
        smoothing.element,
      ),
      h(
        "div",
        { class: "plots" },
        plots.map((plot) => plot.element),
      ),
      settings(comparison, chosen),
    );
  }

  pick();
  await load();
  return chosen.length ? `Compare ${chosen.join(", ")}` : "Compare";
}

function scores(comparison) {
  const of = new Map(comparison.scores.map((item) => [item.run, item]));
  const table = new Table(
    [
      {
        key: "run",
        name: "run",
        head: true,
        value: (run) => run.name,
        show: (run) => link(to("run", run.name), run.name),
      },
      {
        key: "state",
        name: "state",
        value: (run) => run.state,
        show: (run) => h("span", { class: `state ${run.state}` }, run.state),
      },
      {
        key: "metric",
        name: "metric",
        value: (run) => of.get(run.name)?.metric,
        show: (run, value) => h("span", { title: describeMetric(value) }, value ?? ""),
      },
      { key: "caveat", name: "caveat", csvOnly: true, value: (run) => of.get(run.name)?.caveat },
      {
        key: "score",
        name: "score",
        number: true,
        value: (run) => of.get(run.name)?.value ?? null,
        show: (run, value) => [scoreText(value), caveat(of.get(run.name))],
      },
      {
        key: "interval",
        name: "interval",
        plain: true,
        sortable: false,
        value: () => null,
        show: (run) => interval(of.get(run.name)),
      },
      {
        key: "limit",
        name: "answer limit",
        csvName: "max_tokens",
        number: true,
        value: (run) => of.get(run.name)?.max_tokens ?? null,
        show: (run, value) => (value === null ? "" : `${count(value)} tokens${cutAnswers(of.get(run.name))}`),
      },
      {
        key: "eval",
        name: "evaluation loss",
        number: true,
        value: (run) => run.eval_loss,
        show: (run, value) => lossText(value),
      },
      {
        key: "loss",
        name: "training loss",
        number: true,
        value: (run) => run.loss,
        show: (run, value) => lossText(value),
      },
      {
        key: "seconds",
        name: "time",
        csvName: "seconds",
        number: true,
        value: (run) => run.seconds,
        show: (run, value) => duration(value),
      },
      { key: "tokens", name: "tokens", number: true, value: (run) => run.tokens, show: (run, value) => count(value) },
    ],
    { label: "Scores", file: "scores.csv" },
  );
  table.set(comparison.runs);
  return [
    h(
      "div",
      { class: "line", style: { margin: "1.4rem 0 .6rem" } },
      h("h2", { style: { margin: 0 } }, "Scores"),
      h("span", { class: "push" }, table.tools()[1]),
    ),
    table.element,
  ];
}

/** Return how many answers of each model were cut at the limit. */
function cutAnswers({ cut, base_cut: baseCut }) {
  const sides = [
    ["base", baseCut],
    ["tuned", cut],
  ].filter(([, number]) => typeof number === "number");
  return sides.length ? `; cut: ${sides.map(([side, number]) => `${count(number)} ${side}`).join(", ")}` : "";
}

const caveat = (score) => (score?.caveat ? h("small", { class: "under warn" }, score.caveat) : null);

function interval(item) {
  if (!item || typeof item.low !== "number") return "";
  return h(
    "span",
    {},
    h(
      "span",
      { class: "bar", style: { width: "9rem" } },
      h("i", { class: "tuned", style: { width: `${100 * item.value}%` } }),
      h("b", { style: { left: `${100 * item.low}%`, right: `${100 - 100 * item.high}%` } }),
    ),
    h("small", {}, `${percent(item.low)} to ${percent(item.high)}`),
  );
}

/** Return the notes on the evaluations, each with the runs that it concerns. */
function notes(comparison) {
  const runs = new Map();
  for (const { run, notes } of comparison.scores) for (const text of notes) runs.set(text, [...(runs.get(text) ?? []), run]);
  return [...runs].map(([text, names]) => h("p", { class: "warn" }, `${names.join(", ")}: `, prose(`${text}.`)));
}

function pairs(comparison) {
  if (!comparison.pairs?.length)
    return comparison.unevaluated.length
      ? null
      : h("p", { class: "soft" }, "No paired comparison: no two of these runs were evaluated on the same rows.");
  return h(
    "ul",
    {},
    comparison.pairs.map((pair) =>
      h("li", {}, h("span", { class: { better: "good", worse: "bad", unclear: "warn" }[pair.verdict] }, pair.words)),
    ),
  );
}

function settings(comparison, chosen) {
  if (!comparison.settings.length)
    return [h("h2", {}, "Settings"), h("p", { class: "soft" }, "All settings are the same.")];
  const table = new Table(
    [
      FIELD_COLUMN,
      ...chosen.map((name) => ({
        key: `=${name}`,
        name,
        free: true,
        value: (row) => formatValue(row.values[name]),
        show: (row, value) =>
          /^[0-9a-f]{40,}$/.test(value) ? h("code", { title: value }, `${value.slice(0, 12)}…`) : value,
      })),
    ],
    { label: "Settings that differ", file: "settings.csv" },
  );
  table.set(comparison.settings);
  return [
    h(
      "div",
      { class: "line", style: { margin: "1.6rem 0 .6rem" } },
      h("h2", { style: { margin: 0 } }, "Settings that differ"),
      h("span", { class: "push" }, table.tools()[1]),
    ),
    table.element,
  ];
}
