// Chat with the base and tuned models side by side, through a `strop serve` that is started and stopped here.

import {
  button,
  count,
  readEvents,
  errorBox,
  field,
  get,
  h,
  lastPart,
  lasting,
  link,
  post,
  put,
  postStream,
  setQuery,
  notify,
  select,
} from "../all.js";

import { checkNumbers, showFieldErrors } from "../fields.js";

const BASE = "\t"; // precedes the name of a base, and is in no name of a run
const EMPTY = "(empty answer)";
const CHAT_KEY = "strop-dash-chat"; // of the conversations of this tab, which survive a reload

let screen = null; // stays when another screen is shown, with its answers and what is being generated

export async function show(container, { query, signal }) {
  screen ??= createScreen();
  put(container, h("h1", {}, "Chat"), screen.elements);
  await screen.follow(query.get("run"), signal);
  return "Chat";
}

function createScreen() {
  let signal = null; // of the visit
  const controls = h("div"),
    state = h("div", { role: "status" }),
    sides = h("div", { class: "chats" }),
    composer = h("form", { class: "composer" });
  let servable = [],
    chosen = "",
    drawnKey = "",
    drawnControls = "",
    loaded = "", // which models
    columns = [],
    systems = new Map(),
    running = 0;
  const box = h("textarea", { rows: 1, "aria-label": "Your message", placeholder: "Ask both models…" }),
    send = h("button", { type: "submit", class: "main" }, "Send");
  const setting = (option, props) => h("input", { type: "number", ...props, data: { option } }),
    limit = setting("max_tokens", { min: 1, value: 256 }),
    temperature = setting("temperature", { min: 0, max: 2, step: "any", placeholder: "the model's default" }),
    seed = setting("seed", { step: 1, placeholder: "random" }),
    system = h("textarea", { rows: 2 }),
    problem = h("div");
  const options = h(
    "details",
    {},
    h("summary", {}, "Options"),
    h(
      "div",
      { class: "fields" },
      field("Maximum answer length in tokens", limit),
      field("Temperature", temperature),
      field("Seed", seed),
      h("div", { class: "wide" }, field("System prompt", system)),
    ),
  );
  put(composer, h("div", { class: "message" }, box), send);
  composer.hidden = true;

  async function change(path, body) {
    try {
      draw(await post(path, body, signal));
    } catch (error) {
      if (error.name !== "AbortError") put(state, errorBox(error));
    }
  }

  async function draw(server) {
    drawControls(server);
    const key = JSON.stringify([
      server.state,
      server.names,
      server.activity,
      server.activity_since,
      server.state === "off" && servable.length > 0,
    ]);
    if (key === drawnKey) return;
    drawnKey = key;
    put(
      state,
      server.state === "starting"
        ? h(
            "p",
            {},
            h("span", { class: "state running" }, "starting"),
            ` ${server.activity ?? "loading the models"}`,
            lasting(server.activity_since ?? server.started),
          )
        : server.error
          ? errorBox(server.error)
          : server.state === "off" && servable.length
            ? h("p", { class: "soft" }, "No model is loaded. A loaded model uses memory until you unload it.")
            : null,
    );
    composer.hidden = true;
    put(sides);
    columns = [];
    if (server.state !== "ready") return;
    const { data } = await get("chat/v1/models", {}, signal).catch((error) => {
      drawnKey = ""; // try again
      throw error;
    });
    systems = new Map(data.map((model) => [model.id, model.system ?? ""]));
    const names = data.length > 1 ? [data.at(-1).id, data[0].id] : [data[0].id];
    loaded = JSON.stringify([server.names, [...systems.keys()]]);
    const stored = JSON.parse(sessionStorage.getItem(CHAT_KEY) ?? "{}");
    columns = stored.loaded === loaded ? stored.chats.map(({ name, turns }) => column(name, turns)) : names.map((name) => column(name));
    showDefaultPrompt();
    put(
      sides,
      columns.map((chat) => chat.element),
    );
    composer.hidden = false;
    box.focus();
  }

  const isLoaded = (name) => (chosen.startsWith(BASE) ? name === chosen.slice(1) : lastPart(name) === chosen);
  const chosenModel = () => (chosen.startsWith(BASE) ? { model: chosen.slice(1) } : { names: [chosen] });

  /** Draw the choice of a run, if it has changed: runs finish and are renamed while the page is open. */
  function drawControls(server) {
    const off = server.state === "off" || server.state === "failed",
      current = servable.some(([value]) => value === chosen) ? chosen : (servable[0]?.[0] ?? ""),
      key = JSON.stringify([server.state, server.names, servable, current]);
    chosen = current;
    if (key === drawnControls) return;
    drawnControls = key;
    const picker = select(
      servable,
      chosen,
      (value) => {
        chosen = value;
        setQuery({ run: value });
        drawControls(server);
        controls.querySelector("select").focus();
      },
      { "aria-label": "Run", style: { width: "auto" } },
    );
    put(
      controls,
      servable.some(([value]) => !value.startsWith(BASE))
        ? null
        : h("p", { class: "soft" }, "No run has an adapter to chat with yet. ", link("#/new", "Start a run"), "."),
      servable.length
        ? h(
            "div",
            { class: "line", style: { margin: ".8rem 0" } },
            picker,
            button(off ? "Start" : "Load this model", () => change("chat/start", chosenModel()), {
              class: off ? "main" : "",
              disabled: !off && server.names.length === 1 && isLoaded(server.names[0]),
            }),
            off ? null : button("Unload the model", () => change("chat/stop")),
          )
        : null,
      server.state === "ready" && !server.names.some(isLoaded)
        ? h("p", { class: "warn", role: "status" }, `${server.names.map(lastPart).join(", ")} is loaded and answers.`)
        : null,
      server.state === "ready" ? options : null,
    );
  }

  /** Return the system prompt of training; the base model uses that of the tuned model next to it. */
  function trainedPrompt(chat) {
    const tuned = chat.name === "base" ? columns.find((candidate) => candidate.name !== "base") : chat;
    return tuned ? systems.get(tuned.name) : "";
  }

  /** Show the default system prompts as placeholder. */
  function showDefaultPrompt() {
    const same = columns.every((chat) => trainedPrompt(chat) === trainedPrompt(columns[0])),
      promptText = (chat) => trainedPrompt(chat) || "that of the chat template, if it has one";
    system.placeholder = same
      ? promptText(columns[0])
      : columns.map((chat) => `${chat.name}: ${promptText(chat)}`).join("\n");
  }

  /** Store the conversations for a reload of the page. */
  function storeChats() {
    const chats = columns.map(({ name, turns }) => ({ name, turns }));
    sessionStorage.setItem(CHAT_KEY, JSON.stringify({ loaded, chats }));
  }

  /** Create the chat with a model. stored: turns to begin with. */
  function column(name, stored = []) {
    const messages = h("div", { class: "chat", role: "log", tabIndex: 0 }),
      rate = h("span", { class: "soft push" });
    const chat = { turns: [], stop: null, name };
    const clear = () => {
      chat.stop?.abort();
      chat.turns = [];
      rate.textContent = "";
      put(messages, h("p", { class: "soft" }, `Answers of ${chat.name} appear here.`));
      messages.setAttribute("aria-label", `Answers of ${chat.name}`);
    };
    const picker = select(
      [...systems.keys()],
      name,
      (value) => {
        chat.name = value;
        clear();
        storeChats();
        showDefaultPrompt();
      },
      { "aria-label": "Model", style: { width: "auto" } },
    );
    clear();
    if (stored.length) {
      chat.turns = stored;
      put(messages, stored.map(({ role, content }) => h("p", { class: role === "user" ? "user" : "" }, content || EMPTY)));
    }
    const follow = (part) => {
      const near = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 60;
      if (part) messages.append(part);
      if (near) messages.scrollTop = messages.scrollHeight;
    };
    chat.clear = clear;
    chat.element = h("section", { class: "card" }, h("div", { class: "line" }, picker, rate), messages);
    chat.ask = async (text, settings) => {
      if (!chat.turns.length) put(messages);
      rate.textContent = "";
      const question = h("p", { class: "user" }, text);
      follow(question);
      const answer = h("p", { class: "waiting" });
      follow(answer);
      messages.scrollTop = messages.scrollHeight;
      const turns = [...chat.turns, { role: "user", content: text }],
        // the server adds that of a tuned model
        systemText = system.value.trim() || (chat.name === "base" ? trainedPrompt(chat) : "");
      chat.stop = new AbortController();
      let answerText = "",
        finishReason = null,
        first = 0;
      try {
        const response = await postStream(
          "chat/v1/chat/completions",
          {
            model: chat.name,
            messages: systemText ? [{ role: "system", content: systemText }, ...turns] : turns,
            stream: true,
            stream_options: { include_usage: true },
            ...settings,
          },
          chat.stop.signal,
        );
        for await (const { data } of readEvents(response.body)) {
          if (data.error) throw new Error(data.error.message);
          const choice = data.choices?.[0];
          if (choice?.delta?.content) {
            first ||= performance.now();
            answerText += choice.delta.content;
            answer.textContent = answerText;
            follow();
          }
          finishReason = choice?.finish_reason ?? finishReason;
          if (data.usage) {
            const seconds = (performance.now() - first) / 1000,
              tokens = data.usage.completion_tokens;
            rate.textContent = `${count(tokens)} tokens${tokens > 1 && seconds > 0.05 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : ""}`;
          }
        }
        if (!answerText) answer.textContent = EMPTY;
        if (finishReason === "length")
          follow(h("p", { class: "soft" }, "cut off at the maximum answer length (see Options)"));
        chat.turns = [...turns, { role: "assistant", content: answerText }];
        storeChats();
      } catch (error) {
        if (error.name === "AbortError") follow(h("p", { class: "soft" }, "stopped"));
        else {
          answer.classList.add("bad");
          answer.textContent = error.message;
          return { error, remove: () => [question, answer].forEach((part) => part.remove()) };
        }
      } finally {
        answer.classList.remove("waiting");
      }
      return null;
    };
    return chat;
  }

  const stop = () => columns.forEach((chat) => chat.stop?.abort());
  composer.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stop();
  });
  composer.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) {
      stop();
      return;
    }
    const text = box.value;
    if (!text.trim() || !columns.length) return;
    const invalid = checkNumbers(options);
    showFieldErrors(options, invalid);
    put(problem);
    if (invalid) return;
    box.value = "";
    const settings = {};
    for (const input of [limit, temperature, seed])
      if (input.value !== "") settings[input.dataset.option] = Number(input.value);
    running = columns.length;
    send.textContent = "Stop";
    const failures = await Promise.all(columns.map((chat) => chat.ask(text, settings).finally(() => (running -= 1))));
    send.textContent = "Send";
    if (!failures.every(Boolean) || new Set(failures.map(({ error }) => error.message)).size > 1) return;
    // the same error in all columns is shown once, and the message can be sent again
    failures.forEach(({ remove }) => remove());
    box.value ||= text;
    if (!showFieldErrors(options, failures[0].error).length) put(problem, errorBox(failures[0].error));
  });
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    composer.requestSubmit();
  });
  const newChat = button("New chat", () => {
    columns.forEach((chat) => chat.clear());
    storeChats();
  });
  composer.append(newChat);
  const refresh = async () => {
    try {
      const [server, { runs }] = await Promise.all([get("chat", {}, signal), get("runs", {}, signal)]);
      const bases = new Set(runs.map((run) => run.model).filter(Boolean));
      servable = [
        ...runs.filter((run) => run.can.includes("chat")).map((run) => [run.name, run.name]),
        ...[...bases].map((base) => [`${BASE}${base}`, `${lastPart(base)}, the base alone`]),
      ];
      draw(server);
    } catch (error) {
      if (error.name !== "AbortError") notify(error.message, true);
    }
  };
  const follow = async (run, visit) => {
    signal = visit;
    chosen = run ?? chosen;
    await refresh();
    if (visit.aborted) return;
    const timer = setInterval(() => !document.hidden && refresh(), 1500);
    visit.addEventListener("abort", () => clearInterval(timer));
  };
  return { elements: [controls, state, sides, problem, composer], follow };
}
