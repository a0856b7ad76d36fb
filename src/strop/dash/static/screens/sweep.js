// One sweep: its trials as parallel coordinates and as a table, the verdict, and training the winner on all rows.

import {
  button,
  count,
  duration,
  errorBox,
  facts,
  lossText,
  formatValue,
  get,
  h,
  isNumber,
  link,
  listen,
  percent,
  post,
  prose,
  put,
  scoreText,
  to,
} from "../all.js";
import { command } from "../dom.js";
import { parallel } from "../parallel.js";
import { Table } from "../table.js";

const path = (name, ...rest) => ["sweeps", encodeURIComponent(name), ...rest].join("/");
const shortName = (field) => field.replace(/^(train|model)\./, "");
const isWide = (values) => {
  const numbers = values.filter(isNumber);
  return (
    numbers.length === values.length && Math.min(...numbers) > 0 && Math.max(...numbers) / Math.min(...numbers) >= 10
  );
};

export async function show(container, { parts, signal }) {
  const [name] = parts;
  let sweep = await get(path(name), {}, signal);
  const fields = Object.keys(sweep.request.over);
  const state = h("span"),
    verdict = h("p"),
    about = h("div"),
    plot = h("div", { class: "card" }),
    next = h("div"),
    failure = h("div");
  const table = new Table(
    columns(fields, sweep.metric, () => sweep),
    {
      label: "Trials",
      file: `${name}.csv`,
      sort: ["score", "descending"],
      identity: (trial) => trial.number,
      empty: "No trials yet.",
    },
  );
  put(
    container,
    h("p", { class: "crumb" }, link("#/runs", "← Runs")),
    h("div", { class: "line" }, h("h1", {}, name), state),
    verdict,
    failure,
    about,
    h("h2", {}, "Settings and scores"),
    plot,
    h("h2", {}, "Trials"),
    h("div", { class: "line", style: { margin: ".9rem 0" } }, table.tools()),
    table.element,
    next,
  );

  function draw() {
    const { trials, result, split } = sweep;
    const ended = trials.filter((trial) => !["waiting", "running"].includes(trial.state)).length;
    put(
      state,
      h("span", { class: `state ${sweep.state}` }, sweep.state),
      h("span", { class: "soft" }, ` ${ended} of ${trials.length} trials`),
    );
    put(verdict, result ? h("strong", {}, `Verdict: ${result.sentence}`) : "");
    put(
      about,
      facts([
        ["metric", sweep.metric],
        ["sampler", sweep.request.sampler],
        ...["train", "selection", "test"].map((part) => [`${part} rows`, count(split[part].rows)]),
        ...Object.entries(result?.test ?? {}).map(([side, score]) => [
          `test score, ${side}`,
          `${percent(score.value)} (${Math.round(100 * score.low)} to ${percent(score.high, 0)})`,
        ]),
        ["seeds of the final check", sweep.request.seeds],
      ]),
    );
    const shown = trials.filter((trial) => trial.setting);
    const order = { finished: 1, running: 0, waiting: 0 };
    shown.sort((a, b) => (order[a.state] ?? -1) - (order[b.state] ?? -1) || (a.score ?? 0) - (b.score ?? 0));
    put(
      plot,
      parallel(
        [
          ...fields.map((field) => ({
            name: shortName(field),
            value: (trial) => trial.setting?.[field],
            log: isWide(shown.map((trial) => trial.setting[field])),
          })),
          { name: "loss", value: (trial) => trial.loss, show: lossText },
          { name: sweep.metric, value: (trial) => trial.score, show: (value) => percent(value) },
        ],
        shown,
        {
          label: `${shown.length} trials by setting, loss and ${sweep.metric}`,
          kind: (trial) => standing(sweep, trial),
          describe: (trial) => `${trialName(trial)}: ${settingText(trial)}; ${sweep.metric} ${percent(trial.score)}`,
        },
      ),
      h(
        "p",
        { class: "key" },
        [
          ["best", "best, or as good"],
          ["default", "default"],
          ["worse", "worse or pruned"],
        ].map(([kind, text]) => h("span", {}, h("i", { class: `dot trial ${kind}` }), text)),
      ),
    );
    table.set(trials);
    drawNext();
  }

  let drawn = null;
  function drawNext() {
    if (drawn === sweep.winner) return;
    drawn = sweep.winner;
    if (!sweep.winner) return;
    const start = button(
      "Train the winner on all rows",
      async () => {
        start.disabled = true;
        put(failure);
        try {
          const { job } = await post(path(name, "train"));
          location.hash = to("run", job.run);
        } catch (error) {
          put(failure, errorBox(error));
          start.disabled = false;
        }
      },
      { class: "main" },
    );
    put(
      next,
      h("h2", {}, "Next"),
      h("div", { class: "line" }, start),
      h("p", { class: "soft" }, "Or in a terminal:"),
      command(`strop train ${sweep.winner} --out runs/mine`),
    );
  }

  draw();
  listen(
    path(name, "stream"),
    {},
    {
      sweep: (now) => {
        sweep = now;
        draw();
      },
      gone: ({ error }) => put(failure, errorBox(error)),
      error: (error) => put(failure, errorBox(error)),
    },
    signal,
  );
  return name;
}

const trialName = (trial) => `trial ${String(trial.number).padStart(3, "0")}`;
const settingText = (trial) =>
  Object.entries(trial.setting ?? {})
    .map(([field, value]) => `${shortName(field)} ${formatValue(value)}`)
    .join(", ");

/** Return how a trial compares: default, best, equal, worse, or its state. */
function standing(sweep, trial) {
  if (trial.number === 0) return "default";
  const entry = (sweep.selection?.ranking ?? []).find((one) => one.trials.includes(trial.number));
  return entry?.standing ?? trial.state;
}

function columns(fields, metric, sweep) {
  return [
    {
      key: "number",
      name: "trial",
      head: true,
      value: (trial) => trial.number,
      show: (trial) => String(trial.number).padStart(3, "0") + (trial.number === 0 ? " (default)" : ""),
    },
    {
      key: "state",
      name: "state",
      value: (trial) => trial.state,
      show: (trial) => [
        h("span", { class: `state ${trial.state}` }, trial.state),
        ["running", "stopped"].includes(trial.state) && trial.steps
          ? h("span", { class: "soft" }, ` step ${count(trial.step ?? 0)} of ${count(trial.steps)}`)
          : null,
        trial.error ? h("small", { class: "why" }, prose(trial.error.message)) : null,
      ],
    },
    ...fields.map((field) => ({
      key: field,
      name: shortName(field),
      number: true,
      value: (trial) => trial.setting?.[field],
      show: (trial, value) => (trial.setting ? formatValue(value) : ""),
    })),
    {
      key: "score",
      name: metric,
      number: true,
      value: (trial) => trial.score,
      show: (trial, value) =>
        isNumber(value)
          ? [
              scoreText(value),
              h("small", { class: "under interval" }, `${Math.round(100 * trial.low)} to ${percent(trial.high, 0)}`),
            ]
          : "",
    },
    { key: "loss", name: "loss", number: true, value: (trial) => trial.loss, show: (trial, value) => lossText(value) },
    {
      key: "standing",
      name: "compared",
      value: (trial) =>
        trial.same_as === null
          ? (sweep().selection?.ranking ?? []).find((one) => one.trials.includes(trial.number))?.standing
          : `as ${String(trial.same_as).padStart(3, "0")}`,
    },
    {
      key: "seconds",
      name: "time",
      csvName: "seconds",
      number: true,
      value: (trial) => trial.seconds,
      show: (trial, value) => duration(value),
    },
  ];
}
