// Jobs: commands that the server runs as child processes, with their progress, log and result.

import { button, command, h, lasting, put } from "./dom.js";
import { errorBox, get, listen, post } from "./api.js";
import { duration } from "./format.js";

const NAMES = {
  train: "Training",
  resume: "Resume",
  evaluate: "Evaluation",
  merge: "Merge",
  gguf: "GGUF export",
  ollama: "Ollama export",
  adapter: "Adapter",
  delete: "Deletion",
  doctor: "Doctor",
  serve: "Server",
};

/**
 * Show a job and follow it. `onEnd(job)` is called once it has ended. `result(job)` returns an element for its result.
 * words: returns nodes for a text of its error, see errorBox.
 */
export function jobCard(job, signal, { onEnd = null, result = null, words = undefined } = {}) {
  const head = h("div", { class: "line" }),
    body = h("div"),
    log = h("pre", { class: "log", tabIndex: 0, "aria-label": "Log" });
  const logged = h("details", {}, h("summary", {}, "Log"), log);
  const card = h("section", { class: "card job", data: { kind: job.kind } }, head, command(job.command), body, logged);
  let ended = false;

  function draw(update) {
    const finished = update.state !== "running";
    const state = { running: "running", done: "finished", failed: "failed", stopped: "stopped" }[update.state];
    put(
      head,
      h("h3", {}, NAMES[update.kind] ?? update.kind),
      h("span", { class: `state ${state}` }, update.state),
      finished && update.ended
        ? h("span", { class: "soft" }, duration(update.ended - update.started))
        : h(
            "span",
            { class: "soft" },
            update.activity ?? (update.progress?.text || "starting"),
            update.activity || !update.progress?.text ? lasting(update.activity_since ?? update.started) : null,
          ),
      finished
        ? null
        : h(
            "span",
            { class: "push" },
            button(
              update.asked ? "Stopping…" : "Stop",
              async () => {
                draw({ ...update, asked: true });
                await post(`jobs/${encodeURIComponent(update.id)}/stop`);
              },
              { class: "small", disabled: Boolean(update.asked) },
            ),
          ),
    );
    put(
      body,
      update.progress?.share < 1 && update.progress.share !== null && !finished // work follows the last part
        ? h("div", { class: "bar" }, h("i", { class: "tuned", style: { width: `${100 * update.progress.share}%` } }))
        : null,
      !update.error
        ? null
        : update.state === "stopped"
          ? h("p", { class: "soft" }, "Stopped on request.")
          : errorBox(update.error, words),
      finished && update.result && result ? result(update) : null,
    );
    if (finished && !ended) {
      ended = true;
      onEnd?.(update);
    }
  }

  draw(job);
  const follow = new AbortController();
  signal.addEventListener("abort", () => follow.abort());
  listen(
    `jobs/${encodeURIComponent(job.id)}/stream`,
    {},
    {
      job: (update) => {
        draw(update);
        if (update.state !== "running") setTimeout(() => follow.abort(), 300); // the last output may still arrive
      },
      log: ({ text }) => {
        const near = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        log.append(text);
        if (near) log.scrollTop = log.scrollHeight;
      },
      error: (error) => put(body, errorBox(error)),
    },
    follow.signal,
  );
  return card;
}

/** Return cards of jobs, newest first: all that are running, and the `limit` newest. kinds: names of the kinds, or null. */
export async function jobCards(params, signal, options = {}, limit = 4, kinds = null) {
  const { jobs } = await get("jobs", params, signal);
  return jobs
    .filter((job) => kinds === null || kinds.includes(job.kind))
    .filter((job, index) => job.state === "running" || index < limit)
    .map((job) => jobCard(job, signal, options));
}
