// New run: the plan of a recipe, the reasons for its values, the command, and the start.

import {
  address,
  button,
  bytes,
  command,
  count,
  duration,
  errorBox,
  field,
  get,
  h,
  link,
  post,
  put,
  notify,
  select,
  formatValue,
  to,
} from "../all.js";
import { phaseBars } from "../bars.js";
import { confirmTyping, defaultText, fieldList, showChosen, showFieldErrors, slider, withLabels } from "../fields.js";
import { fileField } from "../files.js";
import { jobCard } from "../jobs.js";
import { labelOfField } from "../labels.js";
import { clearForm, readOptions, restoreForm, storeForm, storeOptions, setOption } from "../options.js";
import { recipeTable } from "../recipe.js";

const POWERS = (low, high) => Array.from({ length: Math.log2(high / low) + 1 }, (_, power) => low * 2 ** power);
const SLIDERS = [
  ["lora.r", POWERS(1, 512)],
  ["data.max_length", POWERS(32, 32768)],
  ["train.batch_size", POWERS(1, 256)],
];

export async function show(container, { signal }) {
  const { fields, without_option: withoutOption } = await get("schema", {}, signal),
    byName = new Map(fields.map((item) => [item.field, item]));
  restoreForm(["options", "memory", "name"]);
  const { query } = address(),
    options = readOptions(),
    plan = h("div", { class: "stay", "aria-live": "off" }),
    problem = h("div"),
    job = h("div");
  const placedFields = new Set(["model.name", "data.train", "data.eval", "preset", "out"]); // fields with their own control
  const sliders = SLIDERS.map(([name, values]) => {
    placedFields.add(name);
    return {
      name,
      ...slider(name, labelOfField(name), values, options[name] ?? byName.get(name).default, (value) => change(name, value)),
    };
  });
  const model = fileField(
    "model.name",
    labelOfField("model.name"),
    "model",
    options["model.name"],
    (value) => change("model.name", value),
    "a folder, a .gguf file, a run, a Hub id, or `demo`",
  );
  const train = fileField("data.train", labelOfField("data.train"), "data", options["data.train"], (value) =>
    change("data.train", value),
  );
  const evalField = fileField(
    "data.eval",
    labelOfField("data.eval"),
    "data",
    options["data.eval"],
    (value) => change("data.eval", value),
    "a file, or a share of the training rows such as 5%; their content decides which, so it is not exact",
  );
  const choice = (name, choices = byName.get(name).choices) => {
    placedFields.add(name);
    const now = String(options[name] ?? ""),
      more = now && !choices.includes(now) ? [now] : [];
    return field(
      labelOfField(name),
      select(
        [["", `default (${byName.get(name).default})`], ...choices, ...more],
        now,
        (value) => change(name, value),
        { data: { option: name } },
      ),
    );
  };
  const number = (name, hint) => {
    placedFields.add(name);
    const input = h("input", {
      inputmode: "decimal",
      value: options[name] ?? "",
      placeholder: name === "train.learning_rate" ? "auto" : defaultText(byName.get(name).default),
      data: { option: name },
      on: { change: () => change(name, input.value.trim()) },
    });
    return field(labelOfField(name), input, hint);
  };
  const memory = h("input", {
    value: query.get("memory") ?? "",
    placeholder: "this machine",
    data: { option: "memory" },
    on: {
      change: () => {
        storeForm({ memory: memory.value.trim() });
        planAgain();
      },
    },
  });
  const runName = h("input", {
    value: query.get("name") ?? "",
    spellcheck: "false",
    placeholder: "auto",
    data: { option: "name" },
    on: {
      change: () => {
        storeForm({ name: runName.value.trim() });
        planAgain();
      },
    },
  });
  const clear = button(
    "Clear the form",
    () => {
      clearForm();
      if (address().query.size) location.hash = to("new");
    },
    { class: "push" },
  );
  const dataLink = link(to("data"), "Inspect the data");
  const verdict = h("div", { class: "first" }),
    bars = h("div"),
    trainedShare = h("span", { class: "push soft" }),
    barsHead = h("div", { class: "line" }, h("h3", {}, "Peak memory by phase", h("small", {}, " for these rows")), trainedShare),
    ladderBox = h("div"),
    commandBox = h("div"),
    traffic = h("ul"),
    chosenBox = h("div"),
    defaultsList = h("ul", { class: "plain" });
  const commandParts = h("div", {}, h("h3", {}, "Command"), commandBox),
    trafficCard = h("section", { class: "card" }, h("h3", {}, "Downloads and writes"), traffic),
    values = h(
      "div",
      {},
      h("h2", {}, "Chosen values and reasons"),
      chosenBox,
      h("details", {}, h("summary", {}, "Fields with default values"), defaultsList),
    ),
    results = [barsHead, bars, ladderBox, commandParts, trafficCard, values]; // hidden while the recipe has an error
  const startButton = button("Start", start, { class: "main", disabled: true }),
    summary = h("span", {}),
    bar = h("div", { class: "card startbar" }, summary, startButton);
  const planBox = h(
    "div",
    {}, // stays in place when a plan arrives, because a field may be in use
    h(
      "section",
      { class: "card", style: { "margin-top": ".8rem" } },
      barsHead,
      bars,
      field("Memory limit", memory, "such as 8GB"),
    ),
    ladderBox,
    h("section", { class: "card", style: { "margin-top": ".8rem" } }, commandParts),
    trafficCard,
    values,
  );
  put(
    container,
    h("div", { class: "line" }, h("h1", {}, "New run"), clear),
    h(
      "div",
      { class: "two", style: { "margin-top": "1rem" } },
      h(
        "div",
        { class: "form" },
        h(
          "fieldset",
          {},
          h("legend", {}, "Model and data"),
          h(
            "div",
            { class: "fields" },
            h("div", { class: "wide" }, model.element),
            h("div", { class: "wide" }, train.element),
            h("div", { class: "wide" }, evalField.element),
            field("Run name", runName),
            field(
              "Preset",
              select(
                [["", "default (auto)"], ...byName.get("preset").choices],
                options.preset ?? "",
                (value) => change("preset", value),
                { data: { option: "preset" } },
              ),
            ),
            choice("train.objective"),
            choice("data.bad_rows"),
            choice("data.overlong"),
          ),
          h("p", {}, dataLink),
        ),
        h(
          "fieldset",
          {},
          h("legend", {}, "Size"),
          h(
            "div",
            { class: "fields" },
            sliders.map((control) => h("div", { class: "wide" }, control.element)),
            choice("model.quantization"),
            choice("lora.target_modules", ["all-linear", "attention", "gate", "experts"]),
          ),
        ),
        h(
          "fieldset",
          {},
          h("legend", {}, "Training"),
          h(
            "div",
            { class: "fields" },
            number("train.epochs"),
            number("train.max_steps", "replaces the epochs"),
            number("train.learning_rate"),
            number("train.eval_steps"),
            number("train.max_time", "such as 30 min; a number without a unit is in seconds"),
            number("seed"),
          ),
        ),
        fieldList(
          fields.filter((item) => !placedFields.has(item.field)),
          options,
          change,
          fields.filter((item) => placedFields.has(item.field)),
          withoutOption,
        ),
      ),
      plan,
    ),
    problem,
    job,
    bar,
  );

  function change(name, value) {
    setOption(options, name, value);
    storeOptions(options);
    planAgain();
  }

  const shownValues = () => JSON.stringify([options, memory.value.trim(), runName.value.trim()]);
  let plannedValues = shownValues();

  /** Plan changed values. They cannot be started before their plan is shown. */
  function planAgain() {
    if (shownValues() === plannedValues) return; // a field is left whose text was already read
    plannedValues = shownValues();
    summary.textContent = "Planning…";
    startButton.disabled = true;
    requestPlan();
  }

  confirmTyping(container);
  let busy = false,
    changed = false,
    retryTimer = 0;
  async function requestPlan(thorough = false) {
    dataLink.href = to("data", { options: JSON.stringify(options) });
    if (!options["model.name"]) {
      put(plan, h("p", { class: "card empty" }, "Choose a model. The plan reads only its config, no weights."));
      summary.textContent = "Choose a model and training rows";
      startButton.disabled = true;
      return;
    }
    if (busy) {
      changed = true;
      return;
    }
    busy = true;
    if (!plan.children.length) put(plan, h("p", { class: "card empty" }, "Planning…"));
    do {
      changed = false;
      plan.setAttribute("aria-busy", "true");
      try {
        const latest = await post(
          "plan",
          { options, memory: memory.value.trim() || null, gpu: null, name: runName.value.trim() || null, thorough },
          signal,
        );
        if (!changed) draw(latest);
        clearTimeout(retryTimer);
        if (!changed && (latest.rows.measuring || (!latest.fits && !thorough)))
          retryTimer = setTimeout(
            () => requestPlan(!latest.fits && !latest.rows.measuring),
            latest.rows.measuring ? 1000 : 400,
          );
      } catch (error) {
        if (error.name === "AbortError") return;
        if (!changed) showError(error);
      }
    } while (changed);
    plan.removeAttribute("aria-busy");
    busy = false;
  }

  /** Show an error of the recipe at its fields, without the plan of earlier values. */
  function showError(error) {
    put(verdict, errorBox(error, withLabels(container)));
    if (!planBox.isConnected) put(plan, verdict, planBox);
    for (const element of results) element.hidden = true;
    plannedValues = null; // the same values may be tried again
    runName.placeholder = "auto"; // the name in the plan of earlier values
    const labels = showFieldErrors(container, error);
    fixFirst(labels);
    startButton.disabled = true;
  }

  /** Name the fields with errors in the bar, each as a link to it. */
  function fixFirst(labels) {
    const invalid = [...container.querySelectorAll("[aria-errormessage]")];
    const links = labels.map((label, index) => [
      index ? ", " : "",
      button(label, () => invalid[index].focus(), { class: "link" }),
    ]);
    put(summary, labels.length ? ["Fix: ", links] : "The recipe has an error");
  }

  function draw(planned) {
    showFieldErrors(container, null);
    showChosen(container, planned.recipe);
    for (const element of results) element.hidden = false;
    const resolved = new Map(planned.recipe.map((item) => [item.field, item.value]));
    for (const control of sliders)
      if (options[control.name] === undefined && resolved.has(control.name)) control.draw(resolved.get(control.name));
    const chosen = recipeTable({ label: "Recipe", file: "recipe.csv" });
    chosen.set(planned.recipe.filter((item) => item.origin !== "default"));
    const defaults = planned.recipe.filter((item) => item.origin === "default");
    if (!runName.value) runName.placeholder = planned.name;
    const shade = !planned.fits ? "worse" : planned.beyond.length ? "unclear" : "better";
    const { evaluations, evaluation_seconds } = planned.data,
      evaluating = evaluations
        ? `, plus ${duration(evaluation_seconds)} for ${evaluations > 1 ? `${count(evaluations)} evaluations` : "the evaluation"}`
        : "";
    const refusal = planned.rows.refused ?? (planned.refused ? { message: planned.refused } : null),
      labels = refusal ? showFieldErrors(container, refusal) : [];
    put(
      verdict,
      refusal
        ? errorBox({ ...refusal, message: `A run would be refused: ${refusal.message}` }, withLabels(container))
        : h(
            "p",
            { class: `verdict ${planned.rows.measuring ? "" : shade}`, role: "status" },
            `On ${planned.device}: ${planned.verdict}.`,
            planned.rows.measuring ? " Measuring the rows…" : rowsText(planned.data),
            planned.seconds
              ? ` ${planned.steps > 1 ? `The ${count(planned.steps)} training steps take` : "The training step takes"} about ${duration(planned.seconds)}, ${count(planned.tokens_per_s)} tokens/s${evaluating}, on an otherwise idle machine. Loading and the first compilation of kernels are not included.`
              : planned.tokens_per_s
                ? ` ${count(planned.tokens_per_s)} tokens/s, on an otherwise idle machine.`
                : "",
            planned.here && planned.training.length
              ? ` It takes longer now: ${planned.training.join(", ")} ${planned.training.length > 1 ? "are" : "is"} training.`
              : "",
          ),
    );
    verdict.append(...(planned.rows.warnings ?? []).map((text) => h("p", { class: "warn" }, `Warning: ${text}`)));
    put(trainedShare, `${count(planned.trainable_parameters)} of ${count(planned.parameters)} trained`);
    put(bars, phaseBars(planned.phases, planned.usable_bytes));
    put(ladderBox, planned.fits || !planned.ladder?.length ? null : ladder(planned));
    put(commandBox, command(planned.command));
    if (refusal) plannedValues = null; // as in showError
    startButton.disabled = !planned.fits || !options["data.train"] || refusal !== null || planned.rows.measuring;
    summary.textContent = [
      !planned.fits ? "Training does not fit" : planned.beyond.length ? "Training fits" : "It fits",
      planned.fits && planned.seconds
        ? `about ${duration(planned.seconds + (evaluation_seconds ?? 0))} on an otherwise idle machine`
        : null,
      options["data.train"] ? null : "choose training rows to start",
    ]
      .filter(Boolean)
      .join(", ");
    if (planned.rows.measuring) summary.textContent = "Measuring the rows…";
    if (refusal) fixFirst(labels);
    put(
      traffic,
      planned.downloads.map((item) =>
        h("li", {}, `downloads ${item.what}: ${item.about ? "about " : ""}${bytes(item.bytes)}`),
      ),
      planned.downloads.length ? null : h("li", {}, "downloads nothing"),
      h(
        "li",
        {},
        `writes at most ${bytes(planned.writes.bytes)} to ${planned.out} and the cache; ${bytes(planned.writes.free_bytes)} free`,
      ),
    );
    put(chosenBox, chosen.element);
    put(
      defaultsList,
      defaults.map((item) => h("li", {}, h("code", {}, item.field), ` ${formatValue(item.value)}`)),
    );
    if (!planBox.isConnected) put(plan, verdict, planBox);
  }

  function ladder(planned) {
    const helps = planned.ladder.at(-1).fits;
    if (planned.ladder.length === 1 && !helps) // below what the libraries take, settings make no difference
      return h("p", { class: "card warn", style: { "margin-top": ".8rem" } }, `What is needed: ${planned.ladder[0].what}.`);
    return h(
      "section",
      { class: "card", style: { "margin-top": ".8rem" } },
      h("h3", {}, helps ? "Changes that make it fit" : "No change to these settings makes it fit"),
      h(
        "p",
        { class: "soft" },
        `Peak memory with each change and all those above it; ${bytes(planned.usable_bytes)} is usable.`,
      ),
      h(
        "ul",
        {},
        planned.ladder.map((option) =>
          h(
            "li",
            {},
            h("b", {}, option.what),
            !helps && option === planned.ladder.at(-1)
              ? " would fit."
              : `: ${option.fits ? "fits" : bytes(option.peak_bytes)}, ${option.time?.toFixed?.(2) ?? "?"} times the duration; trade-off: ${option.gives_up} `,
            option.fits
              ? button(
                  "Apply all",
                  () => {
                    Object.assign(options, option.options);
                    storeOptions(options);
                    dispatchEvent(new Event("hashchange"));
                  },
                  { class: "small" },
                )
              : null,
          ),
        ),
      ),
    );
  }

  async function start() {
    startButton.disabled = true;
    put(problem);
    try {
      const started = await post("start", {
        options,
        ...(runName.value.trim() ? { name: runName.value.trim() } : {}),
        ...(memory.value.trim() ? { memory: memory.value.trim() } : {}),
      });
      put(
        job,
        jobCard(started.job, signal, {
          onEnd: (now) => {
            showFieldErrors(container, now.error);
            startButton.disabled = now.state !== "failed";
          },
        }),
      );
      job.scrollIntoView({ block: "nearest" });
      await waitForRun(started.run, signal);
      clearForm();
      notify(`${started.run} has started.`);
      location.hash = to("run", started.run);
    } catch (error) {
      if (error.name === "AbortError") return;
      put(problem, errorBox(error, withLabels(container)));
      showFieldErrors(container, error);
      problem.scrollIntoView({ block: "nearest" });
      startButton.disabled = false;
    }
  }

  await requestPlan();
  return "New run";
}

/** Return a sentence on the numbers of rows of a plan, or "" if they are unknown. */
function rowsText({ rows, held_out: heldOut }) {
  const number = (value) => `${count(value)} ${value === 1 ? "row" : "rows"}`;
  return rows ? ` ${number(rows)} to train on${heldOut ? ` and ${number(heldOut)} to evaluate on` : ""}.` : "";
}

/** Wait until a started run is listed. A failure is shown by its job's card. */
async function waitForRun(name, signal) {
  for (;;) {
    const { runs } = await get("runs", {}, signal);
    if (runs.some((run) => run.name === name)) return;
    const { jobs } = await get("jobs", { run: name }, signal);
    if (jobs[0]?.state === "failed") {
      const error = new Error();
      error.name = "AbortError";
      throw error;
    }
    await new Promise((done) => setTimeout(done, 400));
  }
}
