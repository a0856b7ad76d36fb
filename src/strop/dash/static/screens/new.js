// Before a run: what it will take, what was decided and why, the command, and the start.

import {
  button,
  bytes,
  command,
  count,
  duration,
  fault,
  field,
  get,
  h,
  link,
  post,
  put,
  remember,
  say,
  select,
  shown,
  to,
} from "../all.js";
import { phaseBars } from "../bars.js";
import { fieldList, slider } from "../fields.js";
import { fileField } from "../files.js";
import { jobCard } from "../jobs.js";
import { given, keep, set } from "../options.js";
import { recipeTable } from "../recipe.js";

const POWERS = (low, high) => Array.from({ length: Math.log2(high / low) + 1 }, (_, power) => low * 2 ** power);
const SLIDERS = [
  ["lora.r", "rank", POWERS(1, 512)],
  ["data.max_length", "longest row, in tokens", POWERS(32, 32768)],
  ["train.batch_size", "effective batch, in rows", POWERS(1, 256)],
];

export async function show(place, { query, signal }) {
  const { fields } = await get("schema", {}, signal),
    of = new Map(fields.map((one) => [one.field, one]));
  const options = given(),
    plan = h("div", { class: "stay", "aria-live": "off" }),
    trouble = h("div"),
    job = h("div");
  const taken = new Set(["model.name", "data.train", "data.eval", "preset", "out"]); // what has its place in the form
  const dials = SLIDERS.map(([name, words, values]) => {
    taken.add(name);
    return { name, ...slider(words, values, options[name] ?? of.get(name).default, (value) => change(name, value)) };
  });
  const model = fileField(
    "Model",
    "model",
    options["model.name"],
    (value) => change("model.name", value),
    "a folder, a .gguf file, a run, a Hub id, or `demo`",
  );
  const train = fileField("Rows to train on", "data", options["data.train"], (value) => change("data.train", value));
  const evalField = fileField(
    "Rows to evaluate on",
    "data",
    options["data.eval"],
    (value) => change("data.eval", value),
    "a file, or a share such as 5%",
  );
  const choice = (name, words, choices = of.get(name).choices) => {
    taken.add(name);
    const now = String(options[name] ?? ""),
      more = now && !choices.includes(now) ? [now] : [];
    return field(
      words,
      select([["", `default (${of.get(name).default})`], ...choices, ...more], now, (value) => change(name, value)),
    );
  };
  const number = (name, words, hint) => {
    taken.add(name);
    const input = h("input", {
      inputmode: "decimal",
      value: options[name] ?? "",
      placeholder: "as decided",
      on: { change: () => change(name, input.value.trim()) },
    });
    return field(words, input, hint);
  };
  const memory = h("input", {
    value: query.get("memory") ?? "",
    placeholder: "this machine",
    on: { input: () => soon() },
  });
  const runName = h("input", { spellcheck: "false", placeholder: "a free name", on: { input: () => soon() } });
  const dataLink = link(to("data"), "Look at the data first");
  const verdict = h("div"),
    bars = h("div"),
    trained = h("span", { class: "push soft" }),
    rungs = h("div"),
    line = h("div"),
    traffic = h("ul"),
    decided = h("div"),
    untouched = h("ul", { class: "plain" });
  const go = button("Start", start, { class: "main start" }),
    missing = h("p", { class: "soft" }, "Choose the rows to train on, then it can start.");
  const whole = h(
    "div",
    {}, // its fields stay in their place when a plan comes: somebody may be typing in them
    h(
      "section",
      { class: "card", style: { "margin-top": ".8rem" } },
      h("div", { class: "line" }, h("h3", {}, "Peak memory by phase"), trained),
      bars,
      field("Plan for this much memory", memory, "such as 8GB"),
    ),
    rungs,
    h(
      "section",
      { class: "card", style: { "margin-top": ".8rem" } },
      h("h3", {}, "Command"),
      line,
      h("div", { class: "line" }, h("div", { style: { flex: "1 1 10rem" } }, field("Name of the run", runName)), go),
      missing,
    ),
    h("section", { class: "card" }, h("h3", {}, "Downloads and writes"), traffic),
    h("h2", {}, "Decided, with reasons"),
    decided,
    h("details", {}, h("summary", {}, "Fields at their defaults"), untouched),
  );
  put(
    place,
    h("h1", {}, "New run"),
    h(
      "div",
      { class: "two", style: { "margin-top": "1rem" } },
      h(
        "div",
        { class: "form" },
        h(
          "fieldset",
          {},
          h("legend", {}, "What"),
          h(
            "div",
            { class: "fields" },
            h("div", { class: "wide" }, model.element),
            h("div", { class: "wide" }, train.element),
            h("div", { class: "wide" }, evalField.element),
            field(
              "Preset",
              select([["", "default (auto)"], ...of.get("preset").choices], options.preset ?? "", (value) =>
                change("preset", value),
              ),
            ),
            choice("train.objective", "Objective"),
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
            dials.map((dial) => h("div", { class: "wide" }, dial.element)),
            choice("model.quantization", "Quantization of the base"),
            choice("lora.target_modules", "Layers with an adapter", ["all-linear", "attention", "gate", "experts"]),
          ),
        ),
        h(
          "fieldset",
          {},
          h("legend", {}, "Length and rate"),
          h(
            "div",
            { class: "fields" },
            number("train.epochs", "Epochs"),
            number("train.max_steps", "Steps, at most"),
            number("train.learning_rate", "Learning rate"),
            number("train.eval_steps", "Evaluate every … steps"),
            number("train.max_time", "Time, at most", "such as 30m"),
            number("seed", "Seed"),
          ),
        ),
        fieldList(
          fields.filter((one) => !taken.has(one.field)),
          options,
          change,
        ),
      ),
      plan,
    ),
    trouble,
    job,
  );

  function change(name, value) {
    set(options, name, value);
    keep(options);
    ask();
  }

  let typing = 0;
  /** A plan once the typing rests. */
  function soon() {
    clearTimeout(typing);
    remember({ memory: memory.value.trim() });
    typing = setTimeout(ask, 250);
  }

  let under = false,
    again = false,
    rest = 0;
  async function ask(thorough = false) {
    dataLink.href = to("data", { options: JSON.stringify(options) });
    if (!options["model.name"]) {
      put(
        plan,
        h("p", { class: "card empty" }, "Choose a model. The plan needs no weights: it reads the model's sizes only."),
      );
      return;
    }
    if (under) {
      again = true;
      return;
    }
    under = true;
    if (!plan.children.length) put(plan, h("p", { class: "card empty" }, "Counting…"));
    do {
      again = false;
      plan.setAttribute("aria-busy", "true");
      try {
        const latest = await post(
          "plan",
          { options, memory: memory.value.trim() || null, gpu: null, name: runName.value.trim() || null, thorough },
          signal,
        );
        if (!again) draw(latest);
        clearTimeout(rest);
        if (!again && (latest.rows.measuring || (!latest.fits && !thorough)))
          rest = setTimeout(() => ask(!latest.fits && !latest.rows.measuring), latest.rows.measuring ? 1000 : 400);
      } catch (error) {
        if (error.name === "AbortError") return;
        if (!again) {
          put(verdict, fault(error));
          if (!whole.isConnected) put(plan, verdict);
          go.disabled = true;
        }
      }
    } while (again);
    plan.removeAttribute("aria-busy");
    under = false;
  }

  function draw(found) {
    const resolved = new Map(found.recipe.map((one) => [one.field, one.value]));
    for (const dial of dials)
      if (options[dial.name] === undefined && resolved.has(dial.name)) dial.draw(resolved.get(dial.name));
    const chosen = recipeTable({ label: "Recipe", file: "recipe.csv" });
    chosen.set(found.recipe.filter((one) => one.origin !== "default"));
    const defaults = found.recipe.filter((one) => one.origin === "default");
    if (!runName.value) runName.placeholder = found.name;
    put(
      verdict,
      h(
        "p",
        { class: `verdict ${found.fits ? "better" : "worse"}`, role: "status" },
        found.fits ? "It fits" : "It does not fit",
        ` on ${found.device}.`,
        found.fits && over(found).length ? ` Not here: ${over(found).join(", ")}.` : "",
        found.rows.measuring ? " The rows are being measured…" : "",
        found.seconds
          ? ` About ${duration(found.seconds)}, ${count(found.tokens_per_s)} tokens/s.`
          : found.tokens_per_s
            ? ` ${count(found.tokens_per_s)} tokens/s.`
            : "",
      ),
    );
    put(trained, `${count(found.trainable_parameters)} of ${count(found.parameters)} trained`);
    put(bars, phaseBars(found.phases, found.usable_bytes));
    put(rungs, found.fits || !found.ladder?.length ? null : ladder(found));
    put(line, command(found.command));
    go.disabled = !options["data.train"];
    missing.hidden = Boolean(options["data.train"]);
    put(
      traffic,
      found.downloads.map((one) =>
        h("li", {}, `downloads ${one.what}: ${one.about ? "about " : ""}${bytes(one.bytes)}`),
      ),
      found.downloads.length ? null : h("li", {}, "downloads nothing"),
      h(
        "li",
        {},
        `writes about ${bytes(found.writes.bytes)} to ${found.out}; ${bytes(found.writes.free_bytes)} are free`,
      ),
    );
    put(decided, chosen.element);
    put(
      untouched,
      defaults.map((one) => h("li", {}, h("code", {}, one.field), ` ${shown(one.value)}`)),
    );
    if (!whole.isConnected) put(plan, verdict, whole);
  }

  function ladder(found) {
    return h(
      "section",
      { class: "card" },
      h("h3", {}, "Ways to make it fit, the cheapest first"),
      h(
        "ul",
        {},
        found.ladder.map((rung) =>
          h(
            "li",
            {},
            h("b", {}, rung.what),
            `: ${rung.fits ? "fits" : bytes(rung.peak_bytes)}, ${rung.time?.toFixed?.(2) ?? "?"} times the time; gives up: ${rung.gives_up} `,
            button(
              "Take it",
              () => {
                Object.assign(options, rung.options);
                keep(options);
                dispatchEvent(new Event("hashchange"));
              },
              { class: "small" },
            ),
          ),
        ),
      ),
    );
  }

  async function start() {
    go.disabled = true;
    put(trouble);
    try {
      const made = await post("start", {
        options,
        ...(runName.value.trim() ? { name: runName.value.trim() } : {}),
        ...(memory.value.trim() ? { memory: memory.value.trim() } : {}),
      });
      put(job, jobCard(made.job, signal, { onEnd: (now) => now.state === "failed" && (go.disabled = false) }));
      await appears(made.run, signal);
      say(`${made.run} is under way.`);
      location.hash = to("run", made.run);
    } catch (error) {
      if (error.name === "AbortError") return;
      put(trouble, fault(error));
      trouble.scrollIntoView({ block: "nearest" });
      go.disabled = false;
    }
  }

  await ask();
  return "New run";
}

/** Waits for a run that was started to show up; a refusal is shown by its job's card. */
async function appears(name, signal) {
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

/** Phases that a plan which fits for training has no room for. */
function over({ phases, usable_bytes: usable }) {
  return Object.keys(phases).filter((name) => phases[name].peak_bytes > usable);
}
