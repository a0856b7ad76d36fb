// Answers of the base and tuned models to held-out rows, and a blind vote between them.

import {
  button,
  count,
  csv,
  download,
  get,
  h,
  isNumber,
  link,
  noAdapter,
  runPath,
  percent,
  prose,
  scoreText,
  post,
  put,
  setQuery,
  notify,
  select,
  to,
} from "../all.js";
import { field } from "../dom.js";
import { showFieldErrors, submitButton, submitOnEnter, withLabels } from "../fields.js";
import { fileField } from "../files.js";
import { jobCard, jobCards } from "../jobs.js";

const FILTERS = [
  ["all", "all rows"],
  ["lost", "lost: base right, tuned wrong"],
  ["gained", "gained: base wrong, tuned right"],
  ["changed", "different answers"],
  ["wrong", "tuned wrong"],
  ["right", "tuned right"],
  ["both", "both right"],
  ["neither", "neither right"],
];
const PAGE = 25;
const LONG_ANSWER = 240; // characters, from which an answer is folded
const SHADE = 40; // percent of colour behind a number, so that it stays readable

export async function show(container, { run, query, signal }) {
  if (query.get("blind")) {
    await blindVote(container, run, signal);
    return false;
  }
  let filter = query.get("filter") ?? "all",
    sort = query.get("sort") ?? "worst",
    search = query.get("search") ?? "",
    offset = Number(query.get("offset") ?? 0) || 0;
  const head = h("div"),
    rows = h("div", { class: "rows", "aria-live": "off" }),
    pages = h("div", { class: "line" });
  const input = h("input", {
    type: "search",
    value: search,
    placeholder: "Search prompts and answers",
    "aria-label": "Search the rows",
  });
  let typing;
  input.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      search = input.value;
      offset = 0;
      load();
    }, 250);
  });
  const comparesBase = !run.score || isNumber(run.score.base); // a classifier has no base
  const tools = h(
    "div",
    { class: "line", style: { margin: "1rem 0" } },
    select(
      comparesBase ? FILTERS : FILTERS.filter(([name]) => ["all", "wrong", "right"].includes(name)),
      filter,
      (value) => {
        filter = value;
        offset = 0;
        load();
      },
      { "aria-label": "Which rows", style: { width: "auto" } },
    ),
    select(
      [
        ["worst", "worst first"],
        ["row", "file order"],
      ],
      sort,
      (value) => {
        sort = value;
        offset = 0;
        load();
      },
      { "aria-label": "Order", style: { width: "auto" } },
    ),
    h("div", { class: "filter" }, input),
    button("Save CSV", save, { class: "small" }),
    comparesBase ? link(to("run", run.name, "answers", { blind: "1" }), "Vote blind", { class: "button" }) : null,
  );
  const evaluate = evaluation(run, query, signal, () => load());
  put(container, head, evaluate, tools, rows, pages);

  async function load() {
    setQuery({
      filter: filter === "all" ? null : filter,
      sort: sort === "worst" ? null : sort,
      search,
      offset: offset || null,
    });
    const response = await get(
      runPath(run.name, "answers"),
      { filter, order: sort, search, offset, count: PAGE },
      signal,
    );
    tools.hidden = !response.evaluation;
    put(head, summary(response, run));
    put(
      rows,
      response.rows.some((row) => row.marked)
        ? h(
            "p",
            {},
            "In answers, ",
            h("ins", {}, "this"),
            " is not expected, and ",
            h("del", {}, "this"),
            " is expected and missing.",
          )
        : null,
      response.rows.map((row) => sample(row)),
    );
    if (!response.rows.length && response.evaluation) put(rows, h("p", { class: "empty" }, "No matching rows."));
    put(
      pages,
      pager(response.total, offset, PAGE, (at) => {
        offset = at;
        load().then(() => tools.scrollIntoView());
      }),
    );
  }

  async function save() {
    const response = await get(
      runPath(run.name, "answers"),
      { filter, order: sort, search, offset: 0, count: 5000 },
      signal,
    );
    download(
      `${run.name} answers.csv`,
      "text/csv",
      csv(
        ["place", "prompt", "expected", "base", "tuned", "base right", "tuned right"],
        response.rows.map((row) => [row.place, row.prompt, row.gold, row.base, row.tuned, row.base_hit, row.tuned_hit]),
      ),
    );
  }

  await load();
  return false;
}

/** Return buttons for the pages of a list. */
export function pager(total, offset, size, onMove) {
  if (total <= size) return total ? h("span", { class: "soft" }, `${count(total)} row${total === 1 ? "" : "s"}`) : null;
  return [
    button("Back", () => onMove(Math.max(0, offset - size)), { disabled: offset === 0 }),
    h("span", { class: "soft" }, `${count(offset + 1)} to ${count(Math.min(total, offset + size))} of ${count(total)}`),
    button("Next", () => onMove(offset + size), { disabled: offset + size >= total }),
  ];
}

function summary(response, run) {
  const { evaluation, counts } = response;
  if (!evaluation)
    return h(
      "p",
      { class: "empty" },
      run.can?.includes("evaluate")
        ? "This run has not been evaluated. Start an evaluation below: it compares base and tuned on the same held-out rows."
        : noAdapter(run),
    );
  const name = evaluation.metric,
    rate = (side) => bar(evaluation[side]?.[name], side, response.intervals?.[side]);
  return h(
    "div",
    {},
    response.words ? h("p", { class: `verdict ${run.score?.verdict ?? ""}` }, response.words) : null,
    response.notes.map((text) => h("p", { class: "warn" }, prose(`${text}.`))),
    h(
      "section",
      { class: "card", style: { "margin-top": ".8rem" } },
      h("h3", {}, name, h("small", {}, ` on ${count(evaluation.rows)} rows`)),
      rate("base"),
      rate("baseline"),
      rate("tuned"),
      evaluation.base
        ? h(
            "p",
            { class: "soft" },
            `${count(counts.gained)} gained, ${count(counts.lost)} lost, ${count(counts.both)} right in both, ${count(counts.neither)} in neither.`,
          )
        : null,
      response.complete
        ? null
        : h("p", { class: "warn" }, "This evaluation stored only some of its rows. Evaluate again to see all."),
    ),
    evaluation.classes ? classTable(evaluation) : null,
    evaluation.confusion ? confusionMatrix(evaluation) : null,
  );
}

/** Return the precision and recall of each class of a classifier, with 95 % intervals. */
function classTable({ classes }) {
  const cell = (value, interval) =>
    h(
      "td",
      {},
      value === null ? "" : percent(value),
      interval ? h("small", {}, ` ${percent(interval[0])} to ${percent(interval[1])}`) : null,
    );
  const heads = ["class", "rows", "precision", "recall", "F1"];
  return h(
    "section",
    { class: "card", tabindex: 0, style: { "margin-top": ".8rem", "overflow-x": "auto" } },
    h("h3", {}, "Classes"),
    h(
      "table",
      { class: "classes" },
      h("thead", {}, h("tr", {}, heads.map((name) => h("th", { scope: "col" }, name)))),
      h(
        "tbody",
        {},
        classes.map((row) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, row.label),
            h("td", {}, count(row.rows)),
            cell(row.precision, row.precision_interval),
            cell(row.recall, row.recall_interval),
            cell(row.f1),
          ),
        ),
      ),
    ),
  );
}

/** Return the number of rows by label and predicted class, shaded by the share of the label's rows. */
function confusionMatrix({ classes, confusion }) {
  const shade = (share, right) => `color-mix(in srgb, var(--${right ? "good" : "bad"}) ${share}%, transparent)`;
  return h(
    "section",
    { class: "card", tabindex: 0, style: { "margin-top": ".8rem", "overflow-x": "auto" } },
    h("h3", {}, "Confusion matrix", h("small", {}, " rows: labels; columns: predicted classes, in the same order")),
    h(
      "table",
      { class: "confusion" },
      h(
        "thead",
        {},
        h("tr", {}, h("td"), classes.map((row, i) => h("th", { scope: "col", title: row.label }, String(i + 1)))),
      ),
      h(
        "tbody",
        {},
        confusion.map((counts, i) => {
          const total = Math.max(
            1,
            counts.reduce((sum, value) => sum + value, 0),
          );
          return h(
            "tr",
            {},
            h("th", { scope: "row" }, `${i + 1} ${classes[i].label}`),
            counts.map((value, j) =>
              h(
                "td",
                {
                  title: `${classes[i].label}, predicted as ${classes[j].label}: ${value}`,
                  style: { background: shade(Math.round((SHADE * value) / total), i === j) },
                },
                value ? count(value) : "",
              ),
            ),
          );
        }),
      ),
    ),
  );
}

function bar(share, side, interval) {
  if (typeof share !== "number") return null;
  return h(
    "div",
    { class: "phase" },
    h("span", {}, side),
    h(
      "span",
      { class: "bar" },
      share <= 1 ? h("i", { class: side, style: { width: `${100 * share}%` } }) : null,
      share <= 1 && interval
        ? h("b", {
            title: `95 % interval: ${percent(interval[0])} to ${percent(interval[1])}`,
            style: { left: `${100 * interval[0]}%`, right: `${100 - 100 * interval[1]}%` },
          })
        : null,
    ),
    h("span", { class: "sum" }, scoreText(share)),
  );
}

function sample(row) {
  const side = (name) =>
    row[name] === null || row[name] === undefined
      ? null
      : h(
          "section",
          { class: name },
          h(
            "h3",
            {},
            name,
            row[`${name}_hit`] === null || row[`${name}_hit`] === undefined
              ? null
              : h("b", { class: row[`${name}_hit`] ? "good" : "bad" }, row[`${name}_hit`] ? "✓ right" : "✗ wrong"),
          ),
          foldedText(markedAnswer(row, name), row[name].length, row[`${name}_cut`]),
        );
  const kind = { lost: "bad", gained: "good" }[row.kind];
  return h(
    "article",
    { class: "card sample" },
    h(
      "div",
      { class: "line" },
      row.place
        ? h("span", { class: "soft", title: row.place }, row.place.split("/").pop())
        : h("span", { class: "soft" }, `row ${count((row.row ?? 0) + 1)}`),
      kind ? h("span", { class: `tag ${kind}` }, row.kind) : null,
    ),
    h("p", { class: "prompt" }, row.prompt),
    h(
      "div",
      { class: "sides" },
      row.gold === null || row.gold === undefined
        ? null
        : h("section", {}, h("h3", {}, "expected"), h("pre", {}, row.gold)),
      side("base"),
      side("tuned"),
    ),
  );
}

/** Return a text, of which a long one is folded. cut: whether the limit has cut it. */
function foldedText(parts, length, cut) {
  const text = h("pre", {}, parts, cut ? h("span", { class: "soft" }, " … (cut at the limit)") : null);
  if (length <= LONG_ANSWER) return text;
  text.classList.add("folded");
  const more = button(
    "Show all",
    () => (more.textContent = text.classList.toggle("folded") ? "Show all" : "Show less"),
    { class: "small" },
  );
  return [text, more];
}

/** Return an answer with its differences from the expected text marked: added and missing parts. */
function markedAnswer(row, side) {
  const parts = row.marked?.[side];
  if (!parts) return row[side];
  return parts.map(([text, kind]) =>
    kind === "added" ? h("ins", {}, text) : kind === "missing" ? h("del", {}, text) : text,
  );
}

/** Return a button that copies the rows that the recipe held out into a file, or null if it names a file. */
function heldOutButton(run, share, onFile) {
  if (!share.endsWith("%")) return null;
  const copy = button(`Use the ${share} of rows that were held out`, async () => {
    copy.disabled = true;
    try {
      const { path, rows } = await post(runPath(run.name, "held-out"));
      notify(`Copied ${count(rows)} rows to ${path}.`);
      onFile(path);
    } catch (error) {
      notify([error.message, error.fix].filter(Boolean).join(": "), true);
    }
    copy.disabled = false;
  });
  return copy;
}

function evaluation(run, query, signal, onEnd) {
  if (!(run.can ?? []).includes("evaluate")) return null;
  const value = run.recipe?.find((item) => item.field === "data.eval")?.value,
    evalRows = typeof value === "string" ? value : "",
    evalFile = query.get("data") ?? (evalRows.endsWith("%") ? "" : evalRows),
    file = fileField("data", "File of held-out rows", "data", evalFile, () => {}),
    jobs = h("div");
  let metric = query.get("metric") ?? run.score?.spec ?? run.score?.metric ?? "",
    newest = null; // id of the job that this visit has started
  const metricField = h("div", { class: "field" });
  get("hello", {}, signal).then(({ metrics }) => {
    const all = metric.includes(".py:") ? [...metrics, metric] : metrics; // the user's own function
    if (!all.includes(metric)) metric = "";
    put(
      metricField,
      field(
        "Metric",
        select([["", "default"], ...all], metric, (value) => (metric = value), { data: { option: "metric" } }),
      ),
    );
  });
  const limit = { type: "number", min: 1, placeholder: "from the reference answers" };
  const maxTokens = h("input", {
    ...limit,
    value: query.get("max_new_tokens") ?? "",
    data: { option: "max-new-tokens" },
  });
  const evaluateButton = submitButton(
    "Evaluate",
    () => form,
    async () => {
      const job = await post(runPath(run.name, "evaluate"), {
        data: file.input.value.trim(),
        metric,
        max_new_tokens: maxTokens.value ? Number(maxTokens.value) : undefined,
      });
      newest = job.id;
      put(jobs, jobCard(job, signal, { onEnd: end, words: withLabels(form) }));
    },
  );
  const form = h(
    "details",
    { class: "card", style: { "margin-top": "1.2rem" }, open: !run.score || query.has("data") },
    h("summary", {}, run.score ? "Evaluate again" : "Evaluate on held-out rows"),
    h(
      "div",
      { class: "fields" },
      h(
        "div",
        { class: "wide" },
        file.element,
        heldOutButton(run, evalRows, (path) => (file.input.value = path)),
      ),
      metricField,
      field("Maximum answer length in tokens", maxTokens, "longer answers are cut, and then mostly wrong"),
    ),
    run.score ? h("p", { class: "soft" }, "The new result and its answers replace those below.") : null,
    h("div", { style: { margin: "1rem 0" } }, evaluateButton),
    jobs,
  );
  const end = (job) => {
    if (newest !== null && job.id !== newest) return;
    showFieldErrors(form, job.error);
    if (job.state !== "done") return;
    notify("The evaluation is done.");
    onEnd();
  };
  jobCards({ run: run.name, kind: "evaluate" }, signal, { onEnd: end, words: withLabels(form) }, 0).then((running) => {
    if (jobs.children.length) return;
    put(jobs, running);
    form.open ||= running.length > 0;
  });
  return submitOnEnter(form, evaluateButton[0]);
}

async function blindVote(container, run, signal) {
  const ballotBox = h("section", { class: "vote", tabIndex: -1 }),
    tally = h("p", { class: "soft", role: "status" });
  put(
    container,
    h("p", {}, link(to("run", run.name, "answers"), "Back to the rows")),
    h(
      "p",
      {},
      "Which answer is better? The sides are shuffled for each row. Keys: ",
      h("kbd", {}, "←"),
      " left, ",
      h("kbd", {}, "→"),
      " right, ",
      h("kbd", {}, "↓"),
      " tie.",
    ),
    tally,
    ballotBox,
  );
  let ballot = null,
    waiting = false;
  const showTally = (response) => (tally.textContent = response.words ?? "");

  async function next() {
    const response = await get(runPath(run.name, "ballot"), {}, signal);
    ballot = response.ballot;
    showTally(response.tally);
    if (!ballot) {
      put(
        ballotBox,
        h(
          "p",
          { class: "empty" },
          response.tally.votes ? "You have voted on all rows." : "No rows to vote on. Evaluate the run first.",
        ),
      );
      return;
    }
    const side = (key, name) => h("section", {}, h("h3", {}, name), h("pre", {}, response[key]));
    put(
      ballotBox,
      h(
        "article",
        { class: "card" },
        h("p", { class: "prompt" }, response.prompt),
        h("div", { class: "sides" }, side("a", "left"), side("b", "right")),
        response.gold ? h("details", {}, h("summary", {}, "Expected answer"), h("pre", {}, response.gold)) : null,
      ),
      h(
        "div",
        { class: "line" },
        button("← Left", () => vote("a")),
        button("↓ Tie", () => vote("tie")),
        button("Right →", () => vote("b")),
      ),
    );
  }

  async function vote(choice) {
    if (!ballot || waiting) return;
    waiting = true;
    try {
      const { was, tally: now } = await post(runPath(run.name, "vote"), { ballot, choice }, signal);
      notify(choice === "tie" ? "Vote saved." : `Vote saved: that was ${was[choice]}.`);
      showTally(now);
      await next();
    } finally {
      waiting = false;
    }
  }

  document.addEventListener(
    "keydown",
    (event) => {
      const choice = { ArrowLeft: "a", ArrowRight: "b", ArrowDown: "tie" }[event.key];
      if (!choice || event.target.closest("input, textarea, select")) return;
      event.preventDefault();
      vote(choice);
    },
    { signal },
  );
  await next();
}
