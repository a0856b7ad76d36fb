// Export a run: merged model, GGUF or Ollama, each compared with the tuned model.

import {
  button,
  bytes,
  command,
  download,
  get,
  getBlob,
  facts,
  errorBox,
  figure,
  h,
  lastPart,
  link,
  noAdapter,
  runPath,
  percent,
  post,
  prose,
  put,
  select,
  to,
} from "../all.js";
import { field } from "../dom.js";
import { showFieldErrors, submitButton, submitOnEnter, withLabels } from "../fields.js";
import { jobCard, jobCards } from "../jobs.js";

const GGUF_TYPES = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"];
const needsLlamaCpp = (type) => type.includes("_k");

const BITS = { f32: 32, fp32: 32, f16: 16, fp16: 16, bf16: 16, q8_0: 8.5, q6_k: 6.6, q5_k_m: 5.7, q4_k_m: 4.9 }; // a weight

const KINDS = {
  merge: [
    "Merged model",
    "A model folder that transformers and vLLM can load.",
    "bf16",
    ["bf16", "fp16", "fp32"],
    "dtype",
  ],
  gguf: ["GGUF file", "For llama.cpp and programs based on it.", "q8_0", GGUF_TYPES, "type"],
  ollama: ["Ollama", "A folder for `ollama create`: GGUF, template, parameters.", "q8_0", GGUF_TYPES, "type"],
};

/** Return the exports of a run. One that trained all weights has nothing to merge. */
const kindsOf = (run) => Object.entries(KINDS).filter(([kind]) => kind !== "merge" || run.adapter?.kind !== "model");

export async function show(container, { run, signal }) {
  const jobs = h("div", { style: { "margin-top": "1rem" } }),
    forms = h("div", { class: "grid" });
  put(container, downloads(run, signal), forms, h("h2", {}, "Exports"), jobs);
  const refresh = async () => {
    const cards = await jobCards({ run: run.name }, signal, { result: parity }, 8, Object.keys(KINDS));
    put(jobs, cards.length ? cards : h("p", { class: "soft" }, "No exports yet."));
  };
  const canExport = (run.can ?? []).includes("export"),
    { has_llama_cpp: hasLlamaCpp } = await get("hello", {}, signal);
  put(
    forms,
    canExport
      ? kindsOf(run).map(([kind, details]) =>
          form(run, kind, details, hasLlamaCpp, (job, shown) => {
            jobs.querySelector(":scope > p")?.remove();
            jobs.prepend(jobCard(job, signal, { ...shown, result: parity }));
            jobs.firstElementChild.scrollIntoView({ block: "nearest" });
          }),
        )
      : h("p", { class: "empty" }, noAdapter(run)),
  );
  if (canExport && run.can.includes("chat"))
    container.append(h("p", {}, "Or serve it and ", link(to("chat", { run: run.name }), "chat with it"), "."));
  await refresh();
  return false;
}

/** Return buttons that download files of the run. */
function downloads(run, signal) {
  const files = [
    run.adapter?.kind === "adapter" && ["adapter", `Adapter (zip, ${bytes(run.adapter.bytes)})`, `${run.name} adapter.zip`],
    run.report_page && ["report", "Report (HTML)", `${run.name} report.html`],
    ["recipe", "Recipe (YAML)", `${run.name} recipe.yaml`],
  ].filter(Boolean);
  return h(
    "section",
    { class: "card", style: { "margin-bottom": ".8rem" } },
    h("h2", {}, "Download"),
    h(
      "div",
      { class: "actions" },
      files.map(([kind, text, name]) =>
        button(text, async () =>
          download(name, "application/octet-stream", await getBlob(runPath(run.name, "download", kind), signal)),
        ),
      ),
    ),
    run.adapter
      ? h(
          "p",
          { class: "soft" },
          run.adapter.kind === "model" ? `Model folder (${bytes(run.adapter.bytes)}): ` : "Adapter in PEFT format: ",
          h("code", {}, run.adapter.path),
        )
      : null,
  );
}

function form(run, kind, [name, description, preset, types, option], hasLlamaCpp, onStart) {
  const out = h("input", {
    value: `${run.path}/${kind === "gguf" ? `${run.name}.gguf` : kind === "merge" ? "merged" : "ollama"}`,
    spellcheck: "false",
    data: { option: "out" },
  });
  let type = preset;
  const weights = run.parameters?.all,
    sizes = types.map((name) => [name, weights ? `${name}, about ${bytes((weights * BITS[name]) / 8)}` : name]),
    missing = hasLlamaCpp ? [] : types.filter(needsLlamaCpp),
    typeList = select(sizes, preset, (value) => (type = value), { data: { option } });
  for (const item of typeList.options) item.disabled = missing.includes(item.value);
  const exportButton = submitButton(
    "Export",
    () => element,
    async () => {
      const job = await post(runPath(run.name, "export"), { kind, out: out.value.trim(), [option]: type });
      onStart(job, { onEnd: (now) => showFieldErrors(element, now.error), words: withLabels(element) });
    },
    { "aria-label": `Export: ${name}` },
  );
  const element = h(
    "section",
    { class: "card form" },
    h("div", {}, h("h2", {}, name), h("p", { class: "soft" }, prose(description))),
    field("Output path", out),
    field(
      "Data type",
      typeList,
      missing.length ? `${missing.join(", ")}: after \`pip install llama-cpp-python\`` : null,
    ),
    h("div", {}, exportButton),
  );
  return submitOnEnter(element, exportButton[0]);
}

/** Show how an export compares with the tuned model. */
function parity(job) {
  const details = job.result,
    measured = details.parity,
    text = details.text,
    problem = h("div");
  if (job.error && !measured) return null; // nothing was written
  return h(
    "div",
    {},
    h("p", {}, "Wrote ", h("code", {}, details.out ?? "")),
    job.kind === "gguf" && job.state === "done"
      ? button("Download the GGUF file", async () => {
          put(problem);
          try {
            const file = await getBlob(`jobs/${encodeURIComponent(job.id)}/download`);
            download(lastPart(details.out), "application/octet-stream", file);
          } catch (error) {
            put(problem, errorBox(error));
          }
        })
      : null,
    problem,
    measured
      ? [
          h(
            "p",
            { class: `verdict ${measured.passed ? "better" : "worse"}` },
            measured.passed
              ? "The export matches the tuned model."
              : "The export differs from the tuned model beyond the limit.",
          ),
          facts([
            ["positions compared", measured.positions],
            ["clear flips (another most likely token, no near tie)", measured.clear_flips],
            ["same most likely token, near ties included", percent(measured.top1_agreement, 2)],
            ["KL divergence, mean", figure(measured.kl_mean)],
            ["KL divergence, largest", figure(measured.kl_max)],
            ["loss difference", figure(measured.loss_difference)],
            ["lowest cosine of a text's vectors", measured.cosine_min == null ? null : measured.cosine_min.toFixed(6)],
          ]),
          measured.limits ? h("p", { class: "soft" }, `Limits: ${measured.limits}.`) : null,
        ]
      : h("p", { class: "soft" }, `Parity was ${details.not_measured ?? "not measured"}.`),
    text ? facts(textFacts(text)) : null,
    (details.notes ?? []).map((note) => h("p", { class: "soft" }, note)),
    details.commands?.length ? [h("p", {}, "Next, in a terminal:"), details.commands.map(command)] : null,
  );
}

/** Return how llama.cpp's tokens and answers compare. */
function textFacts(text) {
  return [
    ["strings tokenized identically", `${text.strings} of 200`],
    ["prompts equal", text.conversations],
    ["greedy answers equal", `${text.answers_equal} of ${text.answers}`],
    ["answers that stopped", text.answers_stopped],
  ];
}
