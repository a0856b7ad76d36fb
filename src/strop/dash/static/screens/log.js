// What the run's processes printed, and its events.

import { button, count, download, figure, get, h, isNumber, ofRun, put } from "../all.js";
import { jobCards } from "../jobs.js";

export async function show(place, { run, signal }) {
  const printed = h("pre", { class: "log", tabIndex: 0, "aria-label": "What it printed" }),
    events = h("pre", { class: "log", tabIndex: 0, "aria-label": "Events" }),
    jobs = h("div");
  put(
    place,
    jobs,
    h("h2", {}, "Printed"),
    h("div", { class: "card" }, printed),
    h(
      "div",
      { class: "line" },
      h("h2", {}, "Events"),
      h(
        "span",
        { class: "push" },
        button(
          "Save",
          () => download(`${run.name} log.txt`, "text/plain", `${printed.textContent}\n${events.textContent}`),
          { class: "small" },
        ),
      ),
    ),
    h("div", { class: "card" }, events),
  );
  put(jobs, await jobCards({ run: run.name }, signal, {}, 1));
  const load = async () => {
    const found = await get(ofRun(run.name, "log"), { tail: 65536 }, signal);
    for (const [where, text] of [
      [printed, found.text || "This run was started in a terminal: what it printed is there."],
      [events, found.events.split("\n").map(inWords).filter(Boolean).join("\n")],
    ]) {
      if (where.textContent === text) continue;
      const near = where.scrollHeight - where.scrollTop - where.clientHeight < 40;
      where.textContent = text;
      if (near) where.scrollTop = where.scrollHeight;
    }
  };
  await load();
  const timer = setInterval(() => !document.hidden && run.state === "running" && load(), 2000);
  signal.addEventListener("abort", () => clearInterval(timer));
  return false;
}

/** A line of events.jsonl as a person reads it; long lists are left out. */
function inWords(line) {
  let event;
  try {
    event = JSON.parse(line);
  } catch {
    return ""; // the first line of what was asked for is cut
  }
  const { event: kind, time, step, steps, text, ...rest } = event,
    at = new Date(time * 1000).toTimeString().slice(0, 8);
  const more = Object.entries(rest).filter(
    ([, value]) => isNumber(value) || (typeof value === "string" && value) || typeof value === "boolean",
  );
  const fieldTexts = more.map(
    ([name, value]) =>
      `${name.replaceAll("_", " ")} ${isNumber(value) ? (Number.isInteger(value) ? count(value) : figure(value)) : value}`,
  );
  return [
    at,
    kind,
    isNumber(step) ? (steps ? `${count(step)} of ${count(steps)}` : count(step)) : "",
    text ?? "",
    fieldTexts.join(", "),
  ]
    .filter(Boolean)
    .join("  ");
}
