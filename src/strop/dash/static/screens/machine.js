// This machine: hardware facts, the findings of `strop doctor`, and recent jobs.

import { button, bytes, facts, errorBox, get, h, moment, post, prose, put, formatValue } from "../all.js";
import { jobCard, jobCards } from "../jobs.js";

const NAMES = {
  python: "Python",
  cpu: "CPU",
  vector: "CPU instructions",
  memory_bytes: "memory",
  free_bytes: "free memory",
  gpus: "GPUs",
};

export async function show(container, { signal }) {
  const details = h("div"),
    jobs = h("div"),
    recent = h("div");
  put(container, h("h1", {}, "This machine"), details, jobs, h("h2", {}, "Recent jobs"), recent);
  async function load() {
    const response = await get("machine", {}, signal);
    const { doctor } = response;
    const go = button(
      doctor ? "Check again" : "Check this machine",
      async () => {
        try {
          follow(await post("machine/doctor"));
        } catch (error) {
          put(jobs, errorBox(error));
        }
      },
      { class: doctor ? "" : "main" },
    );
    put(
      details,
      facts(
        Object.entries(response.facts).map(([name, value]) => [
          NAMES[name] ?? name.replaceAll("_", " "),
          name.endsWith("_bytes") ? bytes(value) : formatValue(value?.length === 0 ? "none" : value),
        ]),
      ),
      h(
        "div",
        { class: "line", style: { "margin-top": "1.4rem" } },
        h("h2", { style: { margin: 0 } }, "Doctor"),
        doctor?.when ? h("span", { class: "soft" }, moment(doctor.when)) : null,
        h("span", { class: "push" }, go),
      ),
      doctor
        ? h(
            "div",
            { class: "card", style: { "margin-top": ".6rem" } },
            doctor.findings.map((finding) =>
              h(
                "div",
                { class: "finding" },
                h("b", { class: { error: "bad", warning: "warn", ok: "good" }[finding.level] }, finding.level),
                h(
                  "div",
                  {},
                  finding.what,
                  finding.level === "ok"
                    ? null
                    : [
                        h("p", { class: "soft" }, finding.why),
                        finding.fix ? h("p", {}, h("code", {}, finding.fix)) : null,
                      ],
                ),
              ),
            ),
          )
        : h(
            "p",
            { class: "soft" },
            prose(
              "`strop doctor` runs one 4-bit training step and measures the speed of this machine. It takes about a minute.",
            ),
          ),
    );
    if (response.job?.state === "running") follow(response.job);
  }
  const follow = (job) => {
    put(jobs, jobCard(job, signal, { onEnd: (now) => now.state === "done" && load() }));
    recent.querySelector(":scope > p")?.remove();
  };
  const cards = await jobCards({}, signal, {}, 8);
  put(recent, cards.length ? cards : h("p", { class: "soft" }, "No jobs yet."));
  await load();
  return "This machine";
}
