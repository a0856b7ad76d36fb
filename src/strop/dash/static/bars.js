// Bars: the memory of a plan by phase and part, and a histogram of row lengths.

import { h } from "./dom.js";
import { bytes, count, percent } from "./format.js";

const NAMES = { quantization_constants: "constants", saved_activations: "activations", mapped_files: "files" };
const PHASES = {
  teacher: "Another model answers the prompts before training.",
  load: "The base is read from disk.",
  draw: "The model generates answers to learn from.",
  train: "The adapter is trained.",
  evaluate: "strop eval: the base and the tuned model answer rows.",
  merge: "strop merge: the adapter is added to the base and the result is measured.",
  export: "strop export: a GGUF file is written.",
  serve: "strop serve and strop chat.",
};
const PARTS = {
  weights: "The base, in the type in which it is stored.",
  quantization_constants: "Scales of the quantized weights.",
  adapters: "The weights that are trained.",
  gradients: "One value for each trained weight.",
  optimizer: "The moments of each trained weight.",
  saved_activations: "What layers keep for the backward pass; when answering, the keys and values.",
  live_layer: "The layer that is being computed.",
  head: "The scores of all words of the vocabulary.",
  workspace: "Buffers of matrix multiplications.",
  mapped_files: "Pages of weight files, which the system can take back.",
  framework: "Code of the libraries and compiled kernels; on a GPU its context.",
};
const partName = (part) => NAMES[part] ?? part.replaceAll("_", " ");

/** Show memory by phase. phases: {name: {peak_bytes, parts}}; usable: available bytes, shown as a line. */
export function phaseBars(phases, usable) {
  const all = Object.values(phases),
    max = Math.max(
      ...all.map((phase) => phase.peak_bytes),
      Math.min(usable || 0, 1.6 * Math.max(...all.map((phase) => phase.peak_bytes))),
    );
  const names = [...new Set(all.flatMap((phase) => Object.keys(phase.parts)))],
    parts = names.filter((part) => all.some((phase) => phase.parts[part] > 0.002 * max));
  const at = new Map(names.map((part, index) => [part, `p${index % 11}`])); // the same colours in every plan
  return h(
    "div",
    { class: usable > max ? "bars zoomed" : "bars" },
    Object.entries(phases).map(([name, phase]) => {
      const present = parts.filter((part) => phase.parts[part] > 0);
      const label = `${name}: ${bytes(phase.peak_bytes)}, of which ${present.map((part) => `${partName(part)} ${bytes(phase.parts[part])}`).join(", ")}`;
      return h(
        "div",
        { class: "phase" },
        h("span", { title: PHASES[name] }, name),
        h(
          "span",
          { class: "parts", role: "img", "aria-label": label },
          present.map((part) =>
            h("i", {
              class: at.get(part),
              title: `${partName(part)}: ${bytes(phase.parts[part])}. ${PARTS[part] ?? ""}`,
              style: { width: `${(100 * phase.parts[part]) / max}%` },
            }),
          ),
          usable != null && usable <= max
            ? h("b", { title: `usable: ${bytes(usable)}`, style: { left: `${(100 * usable) / max}%` } })
            : null,
        ),
        h("span", { class: usable != null && phase.needed_bytes > usable ? "sum bad" : "sum" }, bytes(phase.peak_bytes)),
      );
    }),
    h(
      "p",
      { class: "key" },
      parts.map((part) => h("span", { title: PARTS[part] }, h("i", { class: `dot ${at.get(part)}` }), partName(part))),
      usable != null ? h("span", {}, `usable now: ${usable ? bytes(usable) : "nothing"}`) : null,
      usable > max
        ? h("span", {}, `the longest bar is ${percent(Math.max(...all.map((phase) => phase.peak_bytes)) / usable)} of that`)
        : null,
    ),
  );
}

/** Show row lengths: counts[i] rows have edges[i] to edges[i + 1] tokens; supervised: the same for trained tokens. */
export function histogram({ edges, counts, supervised }) {
  const max = Math.max(...counts, ...(supervised ?? []), 1);
  return h(
    "div",
    {
      class: "histogram",
      role: "img",
      "aria-label": `Rows by length: ${counts
        .map((number, index) =>
          number ? `${number} of ${edges[index]} to ${edges[index + 1] ?? "more"} tokens` : null,
        )
        .filter(Boolean)
        .join(", ")}`,
    },
    counts.map((number, index) =>
      h(
        "span",
        {
          class: "column",
          title: `${count(edges[index])} to ${count(edges[index + 1] ?? edges[index])} tokens: ${count(number)} rows${supervised ? `; trained on: ${count(supervised[index])} rows` : ""}`,
        },
        h("i", { style: { height: `${(100 * number) / max}%` } }),
        supervised ? h("i", { class: "tuned", style: { height: `${(100 * (supervised[index] ?? 0)) / max}%` } }) : null,
      ),
    ),
    h("span", { class: "from" }, count(edges[0])),
    h("span", { class: "until" }, `${count(edges.at(-1))} tokens`),
  );
}
