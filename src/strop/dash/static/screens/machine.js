// This machine: facts, the doctor's findings, and what runs here.

import { button, bytes, facts, fault, get, h, moment, post, put, shown } from "../all.js";
import { jobCard, jobCards } from "../jobs.js";

export async function show(place, { signal }) {
  const details = h("div"),
    jobs = h("div"),
    recent = h("div");
  put(place, h("h1", {}, "This machine"), details, jobs, h("h2", {}, "Started from here"), recent);
  async function load() {
    const found = await get("machine", {}, signal);
    const { doctor } = found;
    const go = button(
      doctor ? "Examine again" : "Examine this machine",
      async () => {
        try {
          follow(await post("machine/doctor"));
        } catch (error) {
          put(jobs, fault(error));
        }
      },
      { class: doctor ? "" : "main" },
    );
    put(
      details,
      facts(
        Object.entries(found.facts).map(([name, value]) => [
          name.replace(/_bytes$/, "").replaceAll("_", " "),
          name.endsWith("_bytes") ? bytes(value) : shown(value),
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
            doctor.findings.map((one) =>
              h(
                "div",
                { class: "finding" },
                h("b", { class: { error: "bad", warning: "warn", ok: "good" }[one.level] }, one.level),
                h(
                  "div",
                  {},
                  one.what,
                  one.level === "ok"
                    ? null
                    : [h("p", { class: "soft" }, one.why), one.fix ? h("p", {}, h("code", {}, one.fix)) : null],
                ),
              ),
            ),
          )
        : h(
            "p",
            { class: "soft" },
            "The doctor does one real 4-bit training step and measures the rates of this machine. It takes about a minute.",
          ),
    );
    if (found.job?.state === "running") follow(found.job);
  }
  const follow = (job) => put(jobs, jobCard(job, signal, { onEnd: (now) => now.state === "done" && load() }));
  await load();
  const cards = await jobCards({}, signal, {}, 8);
  put(recent, cards.length ? cards : h("p", { class: "soft" }, "Nothing yet."));
  return "This machine";
}
