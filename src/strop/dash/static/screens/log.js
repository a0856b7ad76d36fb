// Log: terminal output of the run's processes, and its events.

import { button, count, download, eventName, figure, get, h, isNumber, lossText, runPath, put } from "../all.js";
import { jobCards } from "../jobs.js";

export async function show(container, { run, signal }) {
  const printed = h("pre", { class: "log", tabIndex: 0, "aria-label": "Terminal output" }),
    events = h("pre", { class: "log", tabIndex: 0, "aria-label": "Events" }),
    jobs = h("div");
  put(
    container,
    jobs,
    h("h2", {}, "Terminal output"),
    h("div", { class: "card" }, printed),
    h(
      "div",
      { class: "line", style: { margin: "1.6rem 0 .6rem" } },
      h("h2", { style: { margin: 0 } }, "Events"),
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
    const logs = await get(runPath(run.name, "log"), {}, signal);
    for (const [element, text] of [
      [printed, logs.text || "This run was started in a terminal, which has its output."],
      [events, logs.events.split("\n").map(describeEvent).filter(Boolean).join("\n")],
    ]) {
      if (element.textContent === text) continue;
      const atEnd = element.scrollHeight - element.scrollTop - element.clientHeight < 40;
      element.textContent = text;
      if (atEnd) element.scrollTop = element.scrollHeight;
    }
  };
  await load();
  const timer = setInterval(() => !document.hidden && run.state === "running" && load(), 2000);
  signal.addEventListener("abort", () => clearInterval(timer));
  return false;
}

/** Return a line of events.jsonl as readable text, without lists. */
function describeEvent(line) {
  let event;
  try {
    event = JSON.parse(line);
  } catch {
    return ""; // the first line may be incomplete
  }
  if (!event || typeof event !== "object") return ""; // a damaged line
  const { event: kind, time, step, steps, text, ...rest } = event,
    at = new Date(time * 1000).toTimeString().slice(0, 8);
  const details = Object.entries(rest).filter(
    ([, value]) => isNumber(value) || (typeof value === "string" && value) || typeof value === "boolean",
  );
  const fieldTexts = details.map(
    ([name, value]) =>
      `${name.replaceAll("_", " ")} ${isNumber(value) ? (Number.isInteger(value) ? count(name === "epoch" ? value + 1 : value) : name === "loss" ? lossText(value) : figure(value)) : value}`,
  );
  return [
    at,
    eventName(kind),
    isNumber(step) ? (steps ? `${count(step)} of ${count(steps)}` : count(step)) : "",
    text ?? "",
    fieldTexts.join(", "),
  ]
    .filter(Boolean)
    .join("  ");
}
