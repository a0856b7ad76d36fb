// One run: its state, actions and screens.

import { address, button, errorBox, field, get, h, link, listen, runPath, post, prose, put, notify, to } from "../all.js";

const TABS = {
  live: ["Training", () => import("./live.js")],
  answers: ["Answers", () => import("./answers.js")],
  settings: ["Settings", () => import("./settings.js")],
  export: ["Export", () => import("./export.js")],
  log: ["Log", () => import("./log.js")],
};

export async function show(container, { parts, query, signal }) {
  const [name, tab = "live"] = parts;
  const run = await get(runPath(name), {}, signal);
  const head = h("div"),
    body = h("div");
  const chosen = TABS[tab] ? tab : "live";
  put(
    container,
    head,
    h(
      "nav",
      { class: "tabs", "aria-label": "This run" },
      Object.entries(TABS).map(([key, [label]]) =>
        link(
          key === "live" ? to("run", name) : to("run", name, key),
          label,
          key === chosen ? { "aria-current": "page" } : {},
        ),
      ),
    ),
    body,
  );
  const title = h("h1", {}, run.name),
    state = h("div", { class: "line" }),
    actions = h("div", { class: "actions push" }),
    why = h("p", { class: "soft" }),
    failure = h("div"),
    notes = h("div");
  put(
    head,
    h("p", { class: "crumb" }, link("#/runs", "← Runs")),
    h("div", { class: "line" }, title, state, actions),
    why,
    failure,
    notes,
  );
  let shownFailure = null;
  const draw = (now) => {
    Object.assign(run, now);
    const focused = actions.contains(document.activeElement) ? document.activeElement.textContent : null;
    put(
      state,
      h("span", { class: `state ${run.state}` }, run.state),
      run.state === "running" && run.phase ? h("span", { class: "soft" }, run.phase) : null,
    );
    const last = (run.jobs ?? []).find((job) => ["train", "resume"].includes(job.kind));
    const error = ["failed", "crashed"].includes(run.state) ? (last?.error ?? null) : null;
    put(why, prose(run.why ?? ""));
    why.hidden = !run.why || Boolean(error);
    if (JSON.stringify(error) !== shownFailure) put(failure, error ? errorBox(error) : null); // announced once
    shownFailure = JSON.stringify(error);
    put(
      notes,
      run.tags?.length
        ? h(
            "div",
            { class: "line" },
            run.tags.map((tag) => h("span", { class: "tag" }, tag)),
          )
        : null,
      run.note ? h("p", { class: "note" }, run.note) : null,
    );
    if (!run.can?.includes("stop")) run.stopping = false;
    else if (last?.state === "running" && last.asked) run.stopping = true; // also after the page is loaded again
    put(
      actions,
      actionButtons(run, () => draw({})),
    );
    if (focused) [...actions.querySelectorAll("button, a")].find((element) => element.textContent === focused)?.focus();
  };
  draw(run);
  const { show: showTab } = await TABS[chosen][1]();
  const hasStream = await showTab(body, { run, query, signal, draw });
  if (!hasStream) {
    const update = (now) => {
      const before = `${run.can} ${run.has_adapter}`;
      draw(now);
      if (`${run.can} ${run.has_adapter}` !== before) dispatchEvent(new Event("hashchange")); // the screen offers other actions
    };
    listen(runPath(name, "stream"), { points: 50 }, { run: update }, signal);
  }
  return `${chosen === "live" ? "" : `${TABS[chosen][0]} · `}${run.name}`;
}

function actionButtons(run, redraw) {
  const allowed = new Set(run.can ?? []),
    buttons = [];
  if (allowed.has("stop"))
    buttons.push(
      button(
        run.stopping ? "Stopping…" : "Stop and save",
        async () => {
          run.stopping = true;
          redraw();
          await post(runPath(run.name, "stop"));
          notify(
            run.step
              ? "The run will finish its step, save, and stop."
              : "The run has no step to save yet: it stops, and its folder is removed.",
          );
        },
        { disabled: run.stopping },
      ),
    );
  if (allowed.has("stop") && run.state === "stalled")
    buttons.push(
      button(
        "Stop at once",
        async () => {
          await post(runPath(run.name, "stop"), { force: true });
          notify("The run was killed. Its last checkpoint remains.");
        },
        { class: "danger", title: "Kill a run that does not respond; progress since the last checkpoint is lost" },
      ),
    );
  if (allowed.has("resume"))
    buttons.push(
      button(
        "Resume",
        async () => {
          await post(runPath(run.name, "resume"));
          notify("Resuming from the newest checkpoint.");
          location.hash = to("run", run.name);
        },
        { class: "main" },
      ),
    );
  buttons.push(
    button(
      "Duplicate",
      async () => {
        const { options, name } = await get(runPath(run.name, "duplicate"));
        location.hash = to("new", { options: JSON.stringify(options), name });
      },
      { title: "Start a new run from these settings" },
    ),
  );
  if (run.state !== "failed")
    buttons.push(button("Edit", () => edit(run), { title: "Change the name, the tags and the note" }));
  if (allowed.has("chat")) buttons.push(link(to("chat", { run: run.name }), "Chat", { class: "button" }));
  if (allowed.has("delete")) buttons.push(button("Delete", () => confirmDeletion(run), { class: "danger" }));
  return buttons;
}

/** Show a dialog that changes the name, the tags and the note of a run. */
function edit(run) {
  const name = h("input", { value: run.name, autocomplete: "off", spellcheck: "false" }),
    tags = h("input", { value: (run.tags ?? []).join(", "), autocomplete: "off" }),
    note = h("textarea", { rows: 5, value: run.note ?? "" }),
    problem = h("div");
  const before = run.name; // the stream renames the run too
  const save = async (event) => {
    event.preventDefault();
    const { parts, query } = address();
    const renamed = to("run", name.value, ...parts.slice(2), Object.fromEntries(query));
    put(problem);
    try {
      await post(runPath(before, "notes"), { note: note.value, tags: tags.value.split(","), to: name.value });
      if (name.value !== before) location.hash = renamed;
      dialog.close();
    } catch (error) {
      put(problem, errorBox(error));
    }
  };
  const dialog = h(
    "dialog",
    { "aria-label": `Edit ${run.name}`, on: { close: () => dialog.remove() } },
    h(
      "form",
      { class: "form", on: { submit: save } },
      h("h2", { style: { margin: 0 } }, "Edit the run"),
      field("Name", name, "renames the folder; not while a process uses the run"),
      field("Tags", tags, "separated by commas; the table of runs can be filtered by them"),
      field("Note", note, "plain text"),
      problem,
      h(
        "div",
        { class: "line" },
        button("Cancel", () => dialog.close()),
        h("button", { type: "submit", class: "main" }, "Save"),
      ),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
}

/** List the files to delete, and ask for the run's name. */
async function confirmDeletion(run) {
  const { files, num_files: number, bytes: size, path } = await get(runPath(run.name, "contents"));
  const { bytes, count } = await import("../all.js");
  const input = h("input", { autocomplete: "off", spellcheck: "false" });
  const problem = h("div");
  const deleteButton = h("button", { type: "submit", class: "danger", disabled: true }, "Delete run");
  const remove = async (event) => {
    event.preventDefault();
    try {
      await post(runPath(run.name, "delete"), { confirm: input.value });
      dialog.close();
      notify(`${run.name} is being deleted.`);
      location.hash = "#/runs";
    } catch (error) {
      put(problem, errorBox(error));
    }
  };
  input.addEventListener("input", () => (deleteButton.disabled = input.value !== run.name));
  const dialog = h(
    "dialog",
    { "aria-label": `Delete ${run.name}`, on: { close: () => dialog.remove() } },
    h("h2", {}, `Delete ${run.name}?`),
    h("p", {}, `This deletes ${path}: ${count(number)} files, ${bytes(size)}. This cannot be undone.`),
    number
      ? h(
          "details",
          {},
          h("summary", {}, "Files"),
          h(
            "ul",
            {},
            files.map((file) => h("li", {}, h("code", {}, file.path), " ", h("small", {}, bytes(file.bytes)))),
          ),
        )
      : null,
    h(
      "form",
      { on: { submit: remove } },
      field("Type the run's name", input),
      problem,
      h(
        "div",
        { class: "line", style: { "margin-top": "1rem" } },
        button("Cancel", () => dialog.close()),
        deleteButton,
      ),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
  input.focus();
}
