// Base and tuned at once. The server behind it is `strop serve`, started and stopped from here.

import { button, count, events, fault, field, get, h, post, put, raw, remember, say, select } from "../all.js";

export async function show(place, { query, signal }) {
  const controls = h("div"),
    state = h("div", { role: "status" }),
    sides = h("div", { class: "talks" }),
    composer = h("form", { class: "composer" });
  put(place, h("h1", {}, "Chat"), controls, state, sides, composer);
  const { runs } = await get("runs", {}, signal),
    able = runs.filter((run) => run.can.includes("talk"));
  let chosen = query.get("run") ?? able[0]?.name ?? "",
    drawn = "",
    columns = [],
    systems = new Map(),
    running = 0;
  const box = h("textarea", { rows: 1, "aria-label": "Your message", placeholder: "Ask both…" }),
    send = h("button", { type: "submit", class: "main" }, "Send");
  const limit = h("input", { type: "number", min: 1, value: 256 }),
    temperature = h("input", { type: "number", min: 0, max: 2, step: 0.1, placeholder: "the model's own" }),
    seed = h("input", { type: "number", step: 1, placeholder: "random" }),
    system = h("textarea", { rows: 2 });
  const options = h(
    "details",
    {},
    h("summary", {}, "Options"),
    h(
      "div",
      { class: "fields" },
      field("Longest answer, in tokens", limit),
      field("Temperature", temperature),
      field("Seed", seed),
      h("div", { class: "wide" }, field("System prompt", system)),
    ),
  );
  put(composer, h("div", { style: { flex: 1 } }, box), send);
  composer.hidden = true;

  async function change(path, body) {
    try {
      draw(await post(path, body, signal));
    } catch (error) {
      put(state, fault(error));
    }
  }

  async function draw(now) {
    const off = now.state === "off" || now.state === "failed";
    const picker = select(
      able.map((run) => run.name),
      chosen,
      (value) => {
        chosen = value;
        remember({ run: value });
      },
      { "aria-label": "Run", style: { width: "auto" } },
    );
    const key = JSON.stringify([now.state, now.names]);
    if (key === drawn) return;
    drawn = key;
    put(
      controls,
      !able.length
        ? h("p", { class: "empty" }, "A run that has an adapter can be talked to. There is none yet.")
        : h(
            "div",
            { class: "line", style: { margin: ".8rem 0" } },
            picker,
            button(off ? "Start" : "Start this one instead", () => change("talk/start", { names: [chosen] }), {
              class: off ? "main" : "",
            }),
            off ? null : button("Stop the server", () => change("talk/stop")),
          ),
      now.state === "ready" ? options : null,
    );
    put(
      state,
      now.state === "starting"
        ? h("p", {}, h("span", { class: "state running" }, "starting"), " The models are being loaded.")
        : now.error
          ? fault(now.error)
          : now.state === "off" && able.length
            ? h(
                "p",
                { class: "soft" },
                "No model is loaded. It takes as much memory as serving it does, until you stop it.",
              )
            : null,
    );
    composer.hidden = true;
    put(sides);
    columns = [];
    if (now.state !== "ready") return;
    const { data } = await get("talk/v1/models", {}, signal);
    systems = new Map(data.map((model) => [model.id, model.system ?? ""]));
    const names = data.length > 1 ? [data.at(-1).id, data[0].id] : [data[0].id];
    columns = names.map((name) => column(name));
    suggest();
    put(
      sides,
      columns.map((one) => one.element),
    );
    composer.hidden = false;
    box.focus();
  }

  /** The system prompt that every training row had; the base is asked as the tuned model beside it. */
  function trained(one) {
    const tuned = one.name === "base" ? columns.find((other) => other.name !== "base") : one;
    return tuned ? systems.get(tuned.name) : "";
  }

  /** Shows what is the system prompt where the reader writes none. */
  function suggest() {
    const same = columns.every((one) => trained(one) === trained(columns[0])),
      own = (one) => trained(one) || "none";
    system.placeholder = same ? own(columns[0]) : columns.map((one) => `${one.name}: ${own(one)}`).join("\n");
  }

  function column(name) {
    const talk = h("div", { class: "chat", role: "log", tabIndex: 0 }),
      rate = h("span", { class: "soft push" });
    const one = { turns: [], stop: null, name };
    const clear = () => {
      one.stop?.abort();
      one.turns = [];
      rate.textContent = "";
      put(talk, h("p", { class: "soft" }, `Answers of ${one.name} appear here.`));
      talk.setAttribute("aria-label", `Answers of ${one.name}`);
    };
    const picker = select(
      [...systems.keys()],
      name,
      (value) => {
        one.name = value;
        clear();
        suggest();
      },
      { "aria-label": "Model", style: { width: "auto" } },
    );
    clear();
    const follow = (part) => {
      const near = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
      if (part) talk.append(part);
      if (near) talk.scrollTop = talk.scrollHeight;
    };
    one.clear = clear;
    one.element = h("section", { class: "card" }, h("div", { class: "line" }, picker, rate), talk);
    one.ask = async (text, more) => {
      if (!one.turns.length) put(talk);
      follow(h("p", { class: "user" }, text));
      const answer = h("p", { class: "waiting" });
      follow(answer);
      talk.scrollTop = talk.scrollHeight;
      const turns = [...one.turns, { role: "user", content: text }],
        // the server adds a tuned model's own
        systemText = system.value.trim() || (one.name === "base" ? trained(one) : "");
      one.stop = new AbortController();
      let whole = "",
        end = null,
        first = 0;
      try {
        const response = await raw(
          "talk/v1/chat/completions",
          {
            model: one.name,
            messages: systemText ? [{ role: "system", content: systemText }, ...turns] : turns,
            stream: true,
            stream_options: { include_usage: true },
            ...more,
          },
          AbortSignal.any([one.stop.signal, signal]),
        );
        for await (const { data } of events(response.body)) {
          if (data.error) throw new Error(data.error.message);
          const choice = data.choices?.[0];
          if (choice?.delta?.content) {
            first ||= performance.now();
            whole += choice.delta.content;
            answer.textContent = whole;
            follow();
          }
          end = choice?.finish_reason ?? end;
          if (data.usage) {
            const seconds = (performance.now() - first) / 1000,
              tokens = data.usage.completion_tokens;
            rate.textContent = `${count(tokens)} tokens${tokens > 1 && seconds > 0.05 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : ""}`;
          }
        }
        if (!whole) answer.textContent = "(nothing)";
        if (end === "length") follow(h("p", { class: "soft" }, "cut off at the longest answer (Options)"));
        one.turns = [...turns, { role: "assistant", content: whole }];
      } catch (error) {
        if (error.name === "AbortError") follow(h("p", { class: "soft" }, "stopped"));
        else {
          answer.classList.add("bad");
          answer.textContent = error.message;
        }
      } finally {
        answer.classList.remove("waiting");
      }
    };
    return one;
  }

  composer.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) {
      columns.forEach((one) => one.stop?.abort());
      return;
    }
    const text = box.value;
    if (!text.trim() || !columns.length) return;
    box.value = "";
    const more = {};
    for (const [input, name] of [
      [limit, "max_tokens"],
      [temperature, "temperature"],
      [seed, "seed"],
    ])
      if (input.value !== "") more[name] = Number(input.value);
    running = columns.length;
    send.textContent = "Stop";
    await Promise.all(columns.map((one) => one.ask(text, more).finally(() => (running -= 1))));
    send.textContent = "Send";
  });
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    composer.requestSubmit();
  });
  const fresh = button("New chat", () => columns.forEach((one) => one.clear()));
  composer.append(fresh);
  const look = async () => {
    try {
      draw(await get("talk", {}, signal));
    } catch (error) {
      if (error.name !== "AbortError") say(error.message, true);
    }
  };
  await look();
  const timer = setInterval(() => !document.hidden && look(), 1500);
  signal.addEventListener("abort", () => clearInterval(timer));
  return "Chat";
}
