// The table of runs.

import { button, clock, h, link, prose, put } from "../dom.js";
import { errorBox, get, listen } from "../api.js";
import { ago, bytes, count, duration, isNumber, percent, lastPart, lossText, moment, scoreText, timeLeft } from "../format.js";
import { sparkline } from "../drawing.js";
import { Table } from "../table.js";
import { joinNames, splitNames, setQuery, to } from "../route.js";

export async function show(container, { query, signal }) {
  const hello = await get("hello", {}, signal);
  const runs = new Map(),
    chosen = new Set(splitNames(query.get("chosen")));
  const compare = button(
    "Compare",
    () => {
      location.hash = to("compare", { runs: joinNames(chosen) });
    },
    { disabled: true },
  );
  const [column, direction] = (query.get("sort") ?? "started-descending").split("-");
  const table = new Table(
    columns(chosen, update, (tag) => table.setFilter(tag)),
    {
      label: "Runs",
      file: "runs.csv",
      class: "runs",
      sort: [column, direction],
      filter: query.get("filter") ?? "",
      identity: (run) => run.name,
      empty: ["No runs yet. ", link("#/new", "Start a run"), ", or use ", h("code", {}, "strop train"), " in a terminal."],
      onChange: ({ sort, filter }) => setQuery({ sort: sort.join("-"), filter }),
    },
  );
  const sum = h("span", { class: "soft" }),
    ignored = h("p", { class: "soft" });

  function update() {
    compare.disabled = chosen.size < 2;
    compare.textContent = chosen.size < 2 ? "Compare (select two)" : `Compare ${chosen.size}`;
    setQuery({ chosen: joinNames(chosen) });
  }

  function draw() {
    const all = [...runs.values()],
      active = all.filter((run) => run.state === "running").length;
    sum.textContent = `${count(all.length)} run${all.length === 1 ? "" : "s"}${active ? `, ${active} running` : ""}`;
    table.set(all);
  }

  update();
  put(
    container,
    h(
      "div",
      { class: "line" },
      h("h1", {}, "Runs"),
      h("span", { class: "soft", title: hello.folder }, `in ${hello.shown}`),
      sum,
      h("span", { class: "push" }, link(to("new"), "New run", { class: "button main" })),
    ),
    h("div", { class: "line", style: { margin: ".9rem 0" } }, table.tools(), compare),
    table.element,
    ignored,
  );
  await new Promise((ready, failed) => {
    signal.addEventListener("abort", ready);
    listen(
      "runs/stream",
      {},
      {
        runs: (details) => {
          runs.clear();
          for (const run of details.runs) runs.set(run.name, run);
          ignored.textContent = details.ignored?.length ? `Not shown: ${details.ignored.join("; ")}` : "";
          draw();
          ready();
        },
        changed: (details) => {
          for (const run of details.runs) runs.set(run.name, run);
          for (const name of details.gone) {
            runs.delete(name);
            chosen.delete(name);
          }
          draw();
        },
        error: (error) => {
          put(container, errorBox(error));
          failed(error);
        },
      },
      signal,
    );
  });
  return "Runs";
}

function columns(chosen, update, onTag) {
  return [
    {
      key: "pick",
      name: "",
      plain: true,
      sortable: false,
      value: () => null,
      show: (run) => {
        if (run.kind === "sweep") return "";
        const box = h("input", {
          type: "checkbox",
          "aria-label": `Compare ${run.name}`,
          checked: chosen.has(run.name),
          on: {
            change: () => {
              if (box.checked) chosen.add(run.name);
              else chosen.delete(run.name);
              update();
            },
          },
        });
        return box;
      },
    },
    {
      key: "name",
      name: "run",
      head: true,
      value: (run) => run.name,
      show: (run) => [
        link(to(run.kind ?? "run", run.name), run.name, { title: run.note }),
        run.state === "failed" ? h("small", { class: "why" }, prose(run.why)) : null,
        run.tags.length
          ? h(
              "span",
              { class: "actions" },
              run.tags.map((tag) =>
                button(tag, () => onTag(tag), { class: "tag", title: "Show the runs with this tag" }),
              ),
            )
          : null,
      ],
    },
    { key: "tags", name: "tags", csvOnly: true, value: (run) => run.tags.join(", ") },
    {
      key: "state",
      name: "state",
      value: (run) => run.state,
      show: (run) => h("span", { class: `state ${run.state}`, title: run.why }, run.state),
    },
    {
      key: "step",
      name: "steps",
      number: true,
      value: (run) => run.step,
      show: (run) =>
        (run.step || run.steps) &&
        h(
          "span",
          {},
          run.steps ? `${count(run.step)} / ${count(run.steps)}` : count(run.step),
          run.state === "running"
            ? clock(() => ` ${timeLeft({ ...run, time: run.step_time }).split(",")[0]}`.trimEnd(), { class: "soft" })
            : null,
        ),
    },
    { key: "loss", name: "train loss", number: true, value: (run) => run.loss, show: (run, value) => lossText(value) },
    {
      key: "eval",
      name: "eval loss",
      number: true,
      value: (run) => run.eval_loss,
      show: (run, value) => lossText(value),
    },
    {
      key: "curve",
      name: "curve",
      plain: true,
      sortable: false,
      value: () => null,
      show: (run) =>
        sparkline(
          (run.sparkline ?? []).map(([, y]) => y),
          `loss of ${run.name}, ${lossText(run.loss)} at the end`,
        ),
    },
    {
      key: "score",
      name: "score",
      number: true,
      value: (run) => run.score?.value ?? null,
      show: (run) => score(run.score),
    },
    { key: "metric", name: "metric", csvOnly: true, value: (run) => run.score?.metric },
    { key: "caveat", name: "caveat", csvOnly: true, value: (run) => run.score?.caveat },
    {
      key: "model",
      name: "model",
      free: true,
      value: (run) => run.model,
      show: (run, value) => h("span", { title: value }, lastPart(value)),
    },
    {
      key: "data",
      name: "data",
      free: true,
      value: (run) => run.data,
      show: (run, value) => h("span", { title: value }, lastPart(value)),
    },
    {
      key: "how",
      name: "method",
      value: (run) => {
        const quantization = run.quantization === "none" ? null : run.quantization;
        return [run.objective, run.rank && `r\u00a0${run.rank}`, quantization].filter(Boolean).join(", ");
      },
    },
    {
      key: "seconds",
      name: "time",
      csvName: "seconds",
      number: true,
      value: (run) => run.seconds,
      show: (run) => duration(run.seconds),
    },
    {
      key: "bytes",
      name: "size",
      csvName: "bytes",
      number: true,
      value: (run) => run.bytes,
      show: (run) => bytes(run.bytes),
    },
    {
      key: "started",
      name: "started",
      number: true,
      value: (run) => run.started,
      csv: (run) => isNumber(run.started) && new Date(run.started * 1000).toISOString(),
      show: (run) =>
        h("span", { class: "soft", title: moment(run.started) }, ago(run.started).replace(/ \d\d:\d\d$/, "")),
    },
  ];
}

/** Show a score with its metric and interval. */
function score(result) {
  if (!result) return "";
  return h(
    "span",
    { title: result.words || result.metric },
    scoreText(result.value),
    h("small", { class: "under" }, result.metric),
    isNumber(result.low)
      ? h("small", { class: "under interval" }, `${percent(result.low, 0)} to ${percent(result.high, 0)}`)
      : null,
    result.caveat ? h("small", { class: "under warn" }, result.caveat) : null,
  );
}
