// Out of strop: merge, GGUF, Ollama, each with its measured parity.

import { button, command, facts, fault, figure, h, link, ofRun, percent, post, put, select, to } from "../all.js";
import { field } from "../dom.js";
import { jobCard, jobCards } from "../jobs.js";

const GGUF_TYPES = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]; // those with k want llama.cpp

const KINDS = {
  merge: [
    "Merged model",
    "The adapter in its base: a folder that transformers and vLLM load.",
    "bf16",
    ["bf16", "fp16", "fp32"],
    "dtype",
  ],
  gguf: [
    "GGUF file",
    "For llama.cpp and what is built on it.",
    "q8_0",
    GGUF_TYPES,
    "type",
  ],
  ollama: [
    "Ollama",
    "A folder for `ollama create`: GGUF, template, parameters.",
    "q8_0",
    GGUF_TYPES,
    "type",
  ],
};

export async function show(place, { run, signal }) {
  const jobs = h("div", { style: { "margin-top": "1rem" } }),
    forms = h("div", { class: "grid" });
  put(
    place,
    run.adapter ? h("p", {}, "The adapter itself, in PEFT's format: ", h("code", {}, run.adapter.path)) : null,
    forms,
    h("h2", {}, "What was exported"),
    jobs,
  );
  const refresh = async () => {
    const cards = (
      await Promise.all(Object.keys(KINDS).map((kind) => jobCards({ run: run.name, kind }, signal, { result: parity })))
    ).flat();
    put(jobs, cards.length ? cards : h("p", { class: "soft" }, "Nothing yet."));
  };
  const may = (run.can ?? []).includes("export");
  put(
    forms,
    may
      ? Object.entries(KINDS).map(([kind, details]) =>
          form(run, kind, details, (job) => {
            jobs.querySelector(":scope > p")?.remove();
            jobs.prepend(jobCard(job, signal, { result: parity }));
          }),
        )
      : h("p", { class: "empty" }, "This run has no adapter to export yet."),
  );
  if (may && run.can.includes("talk"))
    place.append(h("p", {}, "Or serve it, and ", link(to("talk", { run: run.name }), "talk to it"), "."));
  await refresh();
  return false;
}

function form(run, kind, [name, words, preset, types, option], onStart) {
  const out = h("input", {
    value: `${run.path}/${kind === "gguf" ? `${run.name}.gguf` : kind === "merge" ? "merged" : "ollama"}`,
    spellcheck: "false",
  });
  let type = preset;
  const trouble = h("div");
  const go = button(
    "Make it",
    async () => {
      put(trouble);
      go.disabled = true;
      try {
        onStart(await post(ofRun(run.name, "export"), { kind, out: out.value.trim(), [option]: type }));
      } catch (error) {
        put(trouble, fault(error));
      }
      go.disabled = false;
    },
    { "aria-label": `Make it: ${name}`, class: "main" },
  );
  return h(
    "section",
    { class: "card form" },
    h("div", {}, h("h2", {}, name), h("p", { class: "soft" }, words)),
    field("Where", out),
    field(
      "Number format",
      select(types, preset, (value) => (type = value)),
    ),
    h("div", {}, go),
    trouble,
  );
}

/** What the measurement of an export says. */
function parity(job) {
  const details = job.result,
    found = details.parity,
    text = details.text;
  return h(
    "div",
    {},
    h("p", {}, "Wrote ", h("code", {}, details.out ?? "")),
    found
      ? [
          h(
            "p",
            { class: `verdict ${found.passed ? "better" : "worse"}` },
            found.passed ? "The same model, as measured." : "Not the same model: beyond the limit.",
          ),
          facts([
            ["positions compared", found.positions],
            ["same most likely token", percent(found.top1_agreement, 2)],
            ["KL divergence, mean", figure(found.kl_mean)],
            ["KL divergence, largest", figure(found.kl_max)],
            ["difference of loss", figure(found.loss_difference)],
            [
              "limit",
              found.limit ? `KL ${figure(found.limit.kl_mean)}, same token ${percent(found.limit.agreement, 1)}` : null,
            ],
          ]),
        ]
      : h("p", { class: "soft" }, `Parity was ${details.not_measured ?? "not measured"}.`),
    text ? facts(ofText(text)) : null,
    (details.notes ?? []).map((note) => h("p", { class: "soft" }, note)),
    details.commands?.length ? [h("p", {}, "Now, in a terminal:"), details.commands.map(command)] : null,
  );
}

/** What llama.cpp made of the same words. */
function ofText(text) {
  return [
    ["strings tokenized alike", `${text.strings} of 200`],
    ["prompts equal", text.conversations],
    ["greedy answers equal", `${text.answers_equal} of ${text.answers}`],
    ["answers that stopped", text.answers_stopped],
  ];
}
