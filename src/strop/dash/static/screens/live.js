// Training: curves, events, memory and time of a run.

import {
  ago,
  button,
  bytes,
  clock,
  count,
  duration,
  eventName,
  facts,
  errorBox,
  figure,
  get,
  h,
  isNumber,
  lasting,
  link,
  listen,
  lossText,
  moment,
  runPath,
  percent,
  put,
  select,
  setQuery,
  notify,
  lastPart,
  timeLeft,
  to,
} from "../all.js";
import { TITLES } from "../labels.js";
import { append, AXES, BYTES, withPositions, isSmoothed, joinSeries, smoothedLoss, smoothingSlider } from "../curves.js";
import { Plot } from "../plot.js";
import { Table } from "../table.js";

const POINTS = 800;
const LOSSES = ["loss", "loss_mean", "eval_loss", "undone"];
/** Kinds of events that curves have no line for. */
const WITHOUT_LINE = new Set(["save", "start", "note", "end", "rehearsal", "reference", "reference-check"]);

export async function show(container, { run, query, signal, draw }) {
  let by = AXES[query.get("by")] ? query.get("by") : "step",
    history = null,
    marks = run.marks ?? [],
    requests = 0;
  let range = query.get("range")?.split("~").map(Number) ?? null;
  if (range && !range.every(Number.isFinite)) range = null;
  const axes = h(
    "div",
    { class: "group", role: "group", "aria-label": "Curves by" },
    Object.keys(AXES).map((name) =>
      button(
        name,
        () => {
          by = name;
          range = null;
          setQuery({ by: name === "step" ? null : name, range: null });
          follow();
        },
        { class: "small", data: { name } },
      ),
    ),
  );
  const smoothing = smoothingSlider(query, () => history && drawLoss());
  const progress = h("div", { class: "progress" }),
    top = h("div"),
    plots = h("div", { class: "plots" });
  const details = h("div"),
    samples = h("section", { class: "card samples", hidden: true }),
    memory = h("div"),
    systems = h("div");
  const onZoom = (response) => {
    range = response;
    setQuery({ range: range?.map((value) => Number(value.toPrecision(7))).join("~") });
    for (const plot of all()) plot.zoomTo(range);
    detail();
  };
  const loss = new Plot({
    title: "Loss",
    show: lossText,
    file: `${run.name} loss`,
    group: run.name,
    log: true,
    height: 320,
    onZoom,
    series: [
      { name: "training, each step", colour: "base", opacity: 0.5, width: 1 },
      { name: "training, smoothed", colour: "base", width: 2.2 },
      { name: "evaluation", colour: "tuned", width: 2, points: true },
      { name: "undone by a resume or rollback", colour: "bad", opacity: 0.5, width: 1 },
    ],
  });
  const tools = h(
    "div",
    { class: "line", style: { margin: "1.2rem 0 .7rem" } },
    h("span", { class: "soft" }, "Curves by"),
    axes,
    smoothing.element,
    h("span", { class: "soft mouse" }, "Drag over a curve to zoom in."),
  );
  let process = null,
    system = null;
  const small = new Map();
  const all = () => [loss, ...small.values()];
  signal.addEventListener("abort", () => all().forEach((plot) => plot.destroy()));
  tools.hidden = loss.element.hidden = true;
  put(
    container,
    progress,
    top,
    tools,
    loss.element,
    samples,
    details,
    plots,
    h("div", { class: "grid", style: { "margin-top": ".8rem" } }, memory, systems),
  );

  function drawLoss() {
    const { loss: raw, eval_loss: evaluation, undone } = history.series;
    const smoothed = isSmoothed(history, smoothing.weight());
    smoothing.element.hidden = !isSmoothed(history, 1);
    loss.rename(1, smoothed ? "training, smoothed" : "training");
    loss.set(
      joinSeries([smoothed ? raw : null, smoothedLoss(history, smoothing.weight()), evaluation, undone]),
      shownMarks(),
      AXES[by],
    );
  }

  function drawCurves() {
    const isEmpty = !range && !Object.values(history.series).some((series) => series.x.length);
    for (const element of [loss.element, tools]) element.hidden = isEmpty;
    const { series } = history,
      x = AXES[by];
    drawLoss();
    for (const name of Object.keys(series).filter((item) => !LOSSES.includes(item))) {
      if (!small.has(name)) {
        const plot = new Plot({
          title: TITLES[name] ?? name.replaceAll("_", " "),
          file: `${run.name} ${name}`,
          group: run.name,
          height: 170,
          onZoom,
          ...(name.endsWith("_bytes") ? BYTES : {}),
          zero: Math.min(...series[name].y.slice(0, 50)) >= 0,
          log: name === "grad_norm",
          series: [{ name: TITLES[name] ?? name.replaceAll("_", " "), colour: "tuned", width: 1.3 }],
        });
        small.set(name, plot);
        plots.append(plot.element);
      }
      small.get(name).set(joinSeries([series[name]]), shownMarks(), x);
    }
    for (const plot of all()) plot.zoomTo(range);
  }

  const shownMarks = () => withPositions(marks, by).filter((mark) => !WITHOUT_LINE.has(mark.kind));

  function drawFacts() {
    const last = history?.last ?? {},
      steps = last.steps ?? run.steps,
      step = last.step ?? run.step,
      share = steps ? step / steps : 0;
    const active = run.state === "running",
      job = run.jobs?.find((item) => item.activity && ["train", "resume"].includes(item.kind)),
      // the forecast does not know how long these take
      isWaiting = /^(compiling|waiting for) /.test(job?.activity ?? ""),
      isLast = active && run.phase === "training" && steps && step >= steps,
      next = run.recipe?.find((item) => item.field === "data.eval")?.value ? "evaluating, then saving" : "saving",
      doing = job?.activity ?? (isLast ? next : null),
      seconds = active ? (last.seconds ?? run.seconds) : (run.seconds ?? last.seconds),
      planned = last.planned_seconds;
    put(
      progress,
      h(
        "div",
        { class: "line" },
        h(
          "span",
          {},
          steps
            ? `${run.phase === "preparing" ? "Preparing to continue after step" : "Step"} ${count(step)} of ${count(steps)}`
            : active
              ? "Preparing the model and the rows. The curves begin with the first step."
              : "No step yet",
        ),
        active && run.stopping ? h("span", {}, "stopping: the step is finished and saved first") : null,
        doing ? h("span", { class: "soft" }, doing, job ? lasting(job.activity_since) : null) : null,
        active && run.phase === "training" && !run.stopping && !isWaiting ? clock(() => timeLeft(last)) : null,
        run.updated ? clock(() => `last event ${ago(run.updated)}`, { class: "soft push" }) : null,
      ),
      active && last.is_slow
        ? h("p", { class: "warn" }, `Slower than planned: ${duration(seconds)} instead of ${duration(planned)}${otherPrograms()}.`)
        : null,
      h(
        "div",
        {
          class: "bar",
          role: "progressbar",
          "aria-label": "Steps",
          "aria-valuemin": 0,
          "aria-valuemax": 100,
          "aria-valuenow": Math.round(100 * share),
        },
        h("i", { class: "tuned", style: { width: `${100 * share}%` } }),
      ),
    );
    const s = run.score;
    put(
      top,
      s?.words
        ? h("p", { class: `verdict ${s.verdict}` }, s.words, " ", link(to("run", run.name, "answers"), "See the answers"))
        : null,
      (run.report?.diagnosis ?? []).map((text) => h("p", { class: "verdict unclear" }, text)),
      facts([
        ["training loss", lossText(last.loss ?? run.loss)],
        [
          !active && isNumber(run.adapter?.step) ? `evaluation loss, best step ${count(run.adapter.step)}` : "evaluation loss",
          lossText(active ? (last.eval_loss ?? run.eval_loss) : run.eval_loss),
        ],
        [
          "epoch",
          isNumber(last.epoch ?? run.epoch)
            ? `${count(1 + (last.epoch ?? run.epoch))}${isNumber(last.epochs) ? ` of ${count(Math.ceil(last.epochs))}` : ""}`
            : null,
        ],
        ["learning rate", figure(last.learning_rate)],
        ["tokens", count(last.tokens ?? run.tokens)],
        ["tokens/s, mean", count(run.report && !active ? run.tokens_per_s : last.tokens_per_s)],
        ["training time", duration(seconds)],
        ["planned for these steps, on an idle machine", duration(planned)],
        ["evaluation and samples", duration((active ? last.eval_seconds : run.report?.eval_seconds) || null)],
        ["model", run.model && h("span", { title: run.model }, lastPart(run.model))],
        ["data", run.data && h("span", { title: run.data }, lastPart(run.data))],
        [
          "trained parameters",
          run.parameters ? `${count(run.parameters.trainable)} of ${count(run.parameters.all)}` : null,
        ],
        ["training step", { fast: "fast: strop's own kernels", plain: "plain: the model's own code" }[run.engine?.name]],
      ]),
    );
    drawMarks();
    drawMemory();
  }

  let showSaves = false,
    drawnKey = "";
  const list = h("ul", { class: "marks", tabIndex: 0, "aria-label": "Events" }),
    noMarks = h("p", { class: "soft" }, "No events besides steps.");
  const toggle = button(
    "Show saves",
    () => {
      showSaves = !showSaves;
      toggle.setAttribute("aria-pressed", String(showSaves));
      drawMarks();
    },
    { class: "small", "aria-pressed": "false" },
  );
  put(
    details,
    h(
      "section",
      { class: "card", style: { "margin-top": ".8rem" } },
      h("div", { class: "line" }, h("h3", {}, "Events"), h("span", { class: "push" }, toggle)),
      list,
      noMarks,
    ),
  );

  function drawMarks() {
    const shown = marks.filter((mark) => showSaves || mark.kind !== "save"),
      onCurve = shownMarks(),
      key = `${shown.length} ${shown.at(-1)?.time} ${by}`;
    if (key === drawnKey) return; // do not move the list while it is read
    drawnKey = key;
    list.hidden = !shown.length;
    noMarks.hidden = shown.length > 0;
    put(
      list,
      [...shown]
        .reverse()
        .map((mark) =>
          h(
            "li",
            {
              on: {
                mouseenter: () => loss.choose(onCurve.findIndex((item) => item.event === mark.event)),
                mouseleave: () => loss.choose(-1),
              },
            },
            h(
              "span",
              { class: "soft" },
              isNumber(mark.step) ? `step ${count(mark.step)}` : moment(mark.time).slice(11),
            ),
            h(
              "span",
              { class: `kind ${{ bad: "bad", warning: "warn", good: "good" }[mark.level] ?? ""}` },
              eventName(mark.kind),
            ),
            h("span", {}, mark.text),
          ),
        ),
    );
  }

  const ending = ({ cut, reward }) => (cut ? " … (cut)" : "") + (isNumber(reward) ? ` (reward ${lossText(reward)})` : "");
  const sampleTable = new Table(
    ["prompt", "reference", "completion"].map((key) => ({
      key,
      name: key,
      free: true,
      value: (row) => row[key] + (key === "completion" ? ending(row) : ""),
    })),
    { label: "Sample completions", empty: "No completions at this step." },
  );
  let sampleStep = Number(query.get("sample")) || null,
    drawnSamples = "";

  /** Show the completions that were sampled at an evaluation. */
  async function drawSamples() {
    const steps = run.sample_steps ?? [],
      step = steps.includes(sampleStep) ? sampleStep : steps[0],
      key = `${step} ${steps}`;
    samples.hidden = !steps.length;
    if (!steps.length || key === drawnSamples) return;
    drawnSamples = key;
    const response = await get(runPath(run.name, "samples"), { step }, signal);
    if (key !== drawnSamples) return;
    const chooser = select(
      steps.map((item) => [String(item), `step ${count(item)}`]),
      String(step),
      (value) => {
        sampleStep = value === String(steps[0]) ? null : Number(value); // the newest step is followed
        setQuery({ sample: sampleStep });
        drawSamples();
      },
      { "aria-label": "Step of the samples", style: { width: "auto" } },
    );
    const focused = samples.contains(document.activeElement) && document.activeElement.matches("select");
    put(
      samples,
      h("div", { class: "line" }, h("h3", {}, "Sample completions"), h("span", { class: "push" }, chooser)),
      sampleTable.element,
    );
    if (focused) chooser.focus();
    sampleTable.set(response.samples);
  }

  /** Return ": other programs use 1.7 cores; one is training too", or "" if they use few. */
  const otherPrograms = () => {
    if (!(system?.other_cores >= 0.5) || onGpu()) return "";
    const names = system.other_runs ?? [],
      runs = names.length ? `; ${names.join(", ")} ${names.length > 1 ? "are" : "is"} training too` : "";
    return `: other programs use ${system.other_cores.toFixed(1)} cores${runs}`;
  };

  const onGpu = () => String(run.recipe?.find((item) => item.field === "model.device")?.value).startsWith("cuda");

  /** Return what training has added to the process up to now, which the plan predicts; null if that is unknown. */
  function trainingBytes() {
    const before = run.memory?.resident_bytes;
    return !onGpu() && process && isNumber(before) ? Math.max(0, process.rss - process.library_bytes - before) : null;
  }

  function drawMemory() {
    const m = run.memory ?? {},
      now = trainingBytes(),
      sizes = [m.predicted_peak_bytes, m.dry_run_bytes, now, m.measured_peak_bytes].filter(isNumber),
      max = Math.max(...sizes, 1);
    const bar = (label, size, kind) =>
      isNumber(size)
        ? h(
            "div",
            { class: "phase" },
            h("span", {}, label),
            h("span", { class: "bar" }, h("i", { class: kind, style: { width: `${(100 * size) / max}%` } })),
            h("span", { class: "sum" }, bytes(size)),
          )
        : null;
    const error =
      m.predicted_peak_bytes && m.measured_peak_bytes ? m.measured_peak_bytes / m.predicted_peak_bytes - 1 : null;
    put(
      memory,
      h(
        "section",
        { class: "card" },
        h("h3", {}, "Training memory"),
        bar("planned", m.predicted_peak_bytes, ""),
        bar("dry run", m.dry_run_bytes, "tuned"),
        bar("now", now, "tuned"),
        bar("measured", m.measured_peak_bytes, "tuned"),
        h(
          "p",
          { class: "soft" },
          onGpu()
            ? "PyTorch's memory on the GPU, without the CUDA context. "
            : "What training adds to the process, without Python and its libraries. ",
          error === null
            ? "The peak is measured at the end of the run."
            : `The measured peak is ${percent(Math.abs(error))} ${error < 0 ? "below" : "above"} the plan.`,
          isNumber(m.usable_bytes) ? ` Available at the start: ${bytes(m.usable_bytes)}.` : "",
        ),
      ),
    );
  }

  function drawSystem(update) {
    system = update;
    process = run.pid ? update.process : null;
    drawMemory();
    const share = (label, part, text, full = false) =>
      isNumber(part)
        ? h(
            "div",
            { class: "phase" },
            h("span", {}, label),
            h(
              "span",
              { class: "bar" },
              h("i", {
                class: full && part > 0.95 ? "over" : "tuned",
                style: { width: `${Math.min(100, 100 * part)}%` },
              }),
            ),
            h("span", { class: "sum" }, text),
          )
        : null;
    const ram = update.memory ?? {},
      gpus = update.gpus ?? [],
      training = trainingBytes();
    put(
      systems,
      h(
        "section",
        { class: "card" },
        h("h3", {}, "This machine"),
        share("CPU", update.cpu, percent(update.cpu, 0)),
        share("memory", ram.used / ram.total, bytes(ram.used), true),
        gpus.map((gpu) => [
          share("GPU", gpu.utilization, percent(gpu.utilization, 0)),
          share("GPU memory", gpu.memory_used / gpu.memory_total, bytes(gpu.memory_used)),
        ]),
        h(
          "p",
          { class: "soft" },
          process
            ? [
                `The run's process (${process.pid}) uses ${bytes(process.rss)} of memory`,
                isNumber(training) ? `, of which ${bytes(process.rss - training)} for Python and its libraries` : "",
                isNumber(process.cpu)
                  ? `, and ${process.cpu.toFixed(1)} cores${process.children ? " with its child processes" : ""}`
                  : "",
                otherPrograms(),
                ". ",
              ]
            : "",
          update.disk ? `Disk: ${bytes(update.disk.free)} free.` : "",
        ),
      ),
    );
  }

  async function detail() {
    const request = (requests += 1);
    const response = await get(
      runPath(run.name, "history"),
      { points: POINTS, by, from: range?.[0], to: range?.[1] },
      signal,
    );
    if (request !== requests || signal.aborted) return;
    history = response;
    drawCurves();
  }

  let stop = null,
    refreshed = Date.now(),
    pending = 0;
  async function follow() {
    for (const axisButton of axes.children)
      axisButton.setAttribute("aria-pressed", String(axisButton.dataset.name === by));
    stop?.abort();
    stop = new AbortController();
    signal.addEventListener("abort", () => stop.abort(), { once: true });
    await new Promise((ready) => {
      signal.addEventListener("abort", ready, { once: true });
      listen(
        runPath(run.name, "stream"),
        () => ({ by, points: POINTS }),
        {
          run: (update) => {
            draw(update);
            if (!run.pid && process) drawSystem(system);
            marks = update.marks;
            drawFacts();
            drawSamples();
          },
          history: (response) => {
            if (range) {
              history ??= response;
              history.last = response.last;
              detail().then(ready);
            } else {
              history = response;
              drawCurves();
            }
            drawFacts();
            ready();
          },
          steps: (update) => {
            if (!history) return;
            const known = new Set(marks.map((mark) => JSON.stringify(mark.event))); // of details that were sent before
            marks.push(...(update.marks ?? []).filter((mark) => !known.has(JSON.stringify(mark.event))));
            if (range) history.last = { ...history.last, ...update.last };
            else {
              append(history, update);
              drawCurves();
            }
            pending += update.rows?.length ?? 0;
            drawFacts();
            if (!range && pending && Date.now() - refreshed > 10000) {
              refreshed = Date.now();
              pending = 0;
              detail();
            } // reduce the points again
          },
          system: drawSystem,
          gone: () => {
            notify(
              run.stopping
                ? "The run was stopped before its first step. Nothing was saved."
                : "This run was deleted or renamed.",
            );
            location.hash = "#/runs";
          },
          error: (error) => {
            put(top, errorBox(error));
            ready();
          },
        },
        stop.signal,
      );
    });
  }
  await follow();
  return true;
}
