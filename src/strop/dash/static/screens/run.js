// One run: what it is, what can be done with it, and its own screens.

import { button, fault, get, h, link, listen, ofRun, post, put, say, to } from "../all.js";

const TABS = {
  live: ["Training", () => import("./live.js")],
  answers: ["Before and after", () => import("./answers.js")],
  settings: ["Settings", () => import("./settings.js")],
  take: ["Export", () => import("./take.js")],
  log: ["Log", () => import("./log.js")],
};

export async function show(place, { parts, query, signal }) {
  const [name, tab = "live"] = parts;
  const run = await get(ofRun(name), {}, signal);
  const head = h("div"),
    body = h("div");
  const chosen = TABS[tab] ? tab : "live";
  put(
    place,
    head,
    h(
      "nav",
      { class: "tabs", "aria-label": "This run" },
      Object.entries(TABS).map(([key, [words]]) =>
        link(
          key === "live" ? to("run", name) : to("run", name, key),
          words,
          key === chosen ? { "aria-current": "page" } : {},
        ),
      ),
    ),
    body,
  );
  const title = h("h1", {}, run.name),
    state = h("div", { class: "line" }),
    actions = h("div", { class: "actions push" }),
    why = h("p", { class: "soft" });
  put(
    head,
    h("p", { class: "crumb" }, link("#/runs", "Runs"), " / "),
    h("div", { class: "line" }, title, state, actions),
    why,
  );
  const draw = (now) => {
    Object.assign(run, now);
    const before = actions.contains(document.activeElement) ? document.activeElement.textContent : null;
    put(
      state,
      h("span", { class: `state ${run.state}` }, run.state),
      run.state === "running" && run.phase ? h("span", { class: "soft" }, run.phase) : null,
    );
    why.textContent = run.why ?? "";
    why.hidden = !run.why;
    put(actions, deeds(run));
    if (before) [...actions.querySelectorAll("button, a")].find((one) => one.textContent === before)?.focus();
  };
  draw(run);
  const { show: showTab } = await TABS[chosen][1]();
  const followed = await showTab(body, { run, query, signal, draw });
  if (!followed) listen(ofRun(name, "stream"), { points: 50 }, { run: draw }, signal); // a screen without curves still tells the state
  return `${chosen === "live" ? "" : `${TABS[chosen][0]} · `}${run.name}`;
}

function deeds(run) {
  const may = new Set(run.can ?? []),
    made = [];
  if (may.has("stop"))
    made.push(
      button("Stop and save", async () => {
        await post(ofRun(run.name, "stop"));
        say("It will finish its step, save, and stop.");
      }),
    );
  if (may.has("stop") && run.state === "stalled")
    made.push(
      button(
        "Stop at once",
        async () => {
          await post(ofRun(run.name, "stop"), { force: true });
          say("It is ended. What was saved before stays.");
        },
        { class: "danger", title: "For a run that answers to nothing: what was not saved is lost" },
      ),
    );
  if (may.has("resume"))
    made.push(
      button(
        "Resume",
        async () => {
          await post(ofRun(run.name, "resume"));
          say("It goes on from its newest checkpoint.");
          location.hash = to("run", run.name, "log");
        },
        { class: "main" },
      ),
    );
  made.push(
    button(
      "Duplicate",
      async () => {
        const { options } = await get(ofRun(run.name, "duplicate"));
        location.hash = to("new", { options: JSON.stringify(options) });
      },
      { title: "A new run with the same settings, to change" },
    ),
  );
  if (may.has("talk")) made.push(link(to("talk", { run: run.name }), "Chat", { class: "button" }));
  if (may.has("delete")) made.push(button("Delete", () => confirmDeletion(run), { class: "danger" }));
  return made;
}

/** Names what is deleted, and wants the run's name typed. */
async function confirmDeletion(run) {
  const { files, num_files: number, bytes: size, path } = await get(ofRun(run.name, "contents"));
  const { bytes, count, field } = await import("../all.js");
  const input = h("input", { autocomplete: "off", spellcheck: "false" });
  const trouble = h("div");
  const really = button(
    "Delete it",
    async () => {
      try {
        await post(ofRun(run.name, "delete"), { confirm: input.value });
        dialog.close();
        say(`${run.name} is being deleted.`);
        location.hash = "#/runs";
      } catch (error) {
        put(trouble, fault(error));
      }
    },
    { class: "danger", disabled: true },
  );
  input.addEventListener("input", () => (really.disabled = input.value !== run.name));
  const dialog = h(
    "dialog",
    { "aria-label": `Delete ${run.name}`, on: { close: () => dialog.remove() } },
    h("h2", {}, `Delete ${run.name}?`),
    h("p", {}, `This deletes ${path}: ${count(number)} files, ${bytes(size)}. It cannot be taken back.`),
    h(
      "details",
      {},
      h("summary", {}, "The files"),
      h(
        "ul",
        {},
        files.map((file) => h("li", {}, h("code", {}, file.path), " ", h("small", {}, bytes(file.bytes)))),
      ),
    ),
    field("Type the run's name", input),
    trouble,
    h(
      "div",
      { class: "line", style: { "margin-top": "1rem" } },
      button("Keep it", () => dialog.close()),
      really,
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
  input.focus();
}
