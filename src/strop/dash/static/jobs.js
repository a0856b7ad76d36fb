// A child process of the command line, as the page shows it: its command, how far it is, its log, what came of it.

import { button, command, h, put, say } from "./dom.js";
import { fault, get, listen, post } from "./api.js";
import { duration } from "./format.js";

const NAMES = {
  train: "Training",
  resume: "Going on",
  evaluate: "Evaluation",
  merge: "Merge",
  gguf: "GGUF export",
  ollama: "Ollama export",
  adapter: "Adapter",
  delete: "Deletion",
  doctor: "Doctor",
  serve: "Server",
};

/** Follows a job; `onEnd(job)` is called once it is done or failed; `result(job)` gives an element for what came of it. */
export function jobCard(job, signal, { onEnd = null, result = null } = {}) {
  const head = h("div", { class: "line" }),
    body = h("div"),
    log = h("pre", { class: "log", tabIndex: 0, "aria-label": "Log" });
  const logged = h("details", {}, h("summary", {}, "Log"), log);
  const card = h("section", { class: "card job", data: { kind: job.kind } }, head, command(job.command), body, logged);
  let ended = false;

  function draw(now) {
    const over = now.state !== "running";
    const state = { running: "running", done: "finished", failed: "failed", stopped: "stopped" }[now.state];
    put(
      head,
      h("h3", {}, NAMES[now.kind] ?? now.kind),
      h("span", { class: `state ${state}` }, now.state),
      over && now.ended
        ? h("span", { class: "soft" }, duration(now.ended - now.started))
        : h("span", { class: "soft" }, now.progress?.text ?? ""),
      over
        ? null
        : h(
            "span",
            { class: "push" },
            button(
              "Stop",
              async () => {
                await post(`jobs/${encodeURIComponent(now.id)}/stop`);
                say("Asked to stop.");
              },
              { class: "small" },
            ),
          ),
    );
    put(
      body,
      now.progress?.share !== null && now.progress?.share !== undefined && !over
        ? h("div", { class: "bar" }, h("i", { class: "tuned", style: { width: `${100 * now.progress.share}%` } }))
        : null,
      now.error ? fault(now.error) : null,
      over && now.result && result ? result(now) : null,
    );
    if (over && !ended) {
      ended = true;
      onEnd?.(now);
    }
  }

  draw(job);
  const follow = new AbortController();
  signal.addEventListener("abort", () => follow.abort());
  listen(
    `jobs/${encodeURIComponent(job.id)}/stream`,
    {},
    {
      job: (now) => {
        draw(now);
        if (now.state !== "running") setTimeout(() => follow.abort(), 300); // what it said last may still be on its way
      },
      log: ({ text }) => {
        const near = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        log.append(text);
        if (near) log.scrollTop = log.scrollHeight;
      },
      fault: (error) => put(body, fault(error)),
    },
    follow.signal,
  );
  return card;
}

/** The jobs of a run (or of all), newest first, as cards; only what still runs and the newest few. */
export async function jobCards(params, signal, options = {}, most = 4) {
  const { jobs } = await get("jobs", params, signal);
  return jobs
    .filter((job, place) => job.state === "running" || place < most)
    .map((job) => jobCard(job, signal, options));
}
