"use strict";
// Talks to the server that this page came from. Text of a model reaches the page as textContent only.

const at = (id) => document.getElementById(id);
const sides = [];
let running = 0;

function element(kind, className, text) {
  const made = document.createElement(kind);
  made.className = className;
  made.textContent = text;
  return made;
}

function say(text, bad = false) {
  at("state").textContent = text;
  at("state").classList.toggle("bad", bad);
}

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function fault(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers ${response.status}`;
  }
}

class Side {
  constructor(models, chosen) {
    const copy = at("side").content.cloneNode(true);
    this.root = copy.querySelector(".side");
    this.talk = copy.querySelector(".talk");
    this.rate = copy.querySelector(".rate");
    this.select = copy.querySelector("select");
    this.systems = new Map(models.map((model) => [model.id, model.system ?? ""]));
    for (const model of models) this.select.append(new Option(model.id, model.id, false, model.id === chosen));
    this.select.addEventListener("change", () => {
      this.clear();
      suggest();
    });
    at("sides").append(copy);
    this.clear();
  }

  get isBase() {
    return this.select.value === "base";
  }

  /** The system prompt that every training row had; the base is asked as the tuned model beside it. */
  get system() {
    const tuned = this.isBase ? sides.find((side) => !side.isBase) : this;
    return tuned ? tuned.systems.get(tuned.select.value) : "";
  }

  clear() {
    this.stop?.abort();
    this.turns = [];
    this.rate.textContent = "";
    this.talk.replaceChildren(element("p", "empty", `Answers of ${this.select.value} appear here.`));
  }

  show(part) {
    const near = this.talk.scrollHeight - this.talk.scrollTop - this.talk.clientHeight < 60;
    if (part) this.talk.append(part);
    if (near) this.talk.scrollTop = this.talk.scrollHeight;
  }

  async ask(text, options) {
    this.talk.querySelector(".empty")?.remove();
    this.show(element("p", "user", text));
    const answer = element("p", "answer waiting", "");
    this.show(answer);
    const turns = [...this.turns, { role: "user", content: text }];
    const system = at("system").value.trim() || (this.isBase ? this.system : ""); // the server adds a tuned model's own
    const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
    this.stop = new AbortController();
    let said = "", end = null;
    try {
      const response = await fetch("/v1/chat/completions", {
        method: "POST",
        headers: headers(),
        signal: this.stop.signal,
        body: JSON.stringify({
          model: this.select.value, messages, stream: true, stream_options: { include_usage: true }, ...options,
        }),
      });
      if (!response.ok) throw new Error(await fault(response));
      let first = 0;
      for await (const event of events(response.body)) {
        if (event.error) throw new Error(event.error.message);
        const choice = event.choices[0];
        if (choice?.delta.content) {
          first ||= performance.now();
          said += choice.delta.content;
          answer.textContent = said;
          this.show();
        }
        end = choice?.finish_reason ?? end;
        if (event.usage) this.count(event.usage.completion_tokens, first);
      }
      if (said === "") answer.textContent = "(nothing)";
      if (end === "length") this.show(element("p", "note", "cut off at the longest answer (Settings)"));
    } catch (error) {
      if (error.name === "AbortError") {
        this.show(element("p", "note", "stopped"));
      } else {
        answer.classList.add("failed");
        answer.textContent = error.message;
        return;
      }
    } finally {
      answer.classList.remove("waiting");
    }
    this.turns = [...turns, { role: "assistant", content: said }];
  }

  count(tokens, first) {
    const seconds = (performance.now() - first) / 1000;
    const rate = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    this.rate.textContent = `${tokens} token${tokens === 1 ? "" : "s"}${rate}`;
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

function options() {
  const found = {};
  for (const [id, name] of [["temperature", "temperature"], ["limit", "max_tokens"], ["seed", "seed"]]) {
    if (at(id).value !== "") found[name] = Number(at(id).value);
  }
  return found;
}

async function send() {
  const text = at("text").value;
  if (running || !text.trim() || !sides.length) return;
  at("text").value = "";
  grow();
  running = sides.length;
  at("send").textContent = "Stop";
  await Promise.all(sides.map((side) => side.ask(text, options()).finally(() => (running -= 1))));
  at("send").textContent = "Send";
}

function grow() {
  const box = at("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

/** Shows what is the system prompt where the reader writes none. */
function suggest() {
  const same = sides.every((side) => side.system === sides[0].system);
  const own = (side) => side.system || "none";
  at("system").placeholder = same
    ? own(sides[0])
    : sides.map((side) => `${side.select.value}: ${own(side)}`).join("\n");
}

async function start() {
  let response;
  try {
    response = await fetch("/v1/models", { headers: headers() });
  } catch {
    say("the server is not there", true);
    return;
  }
  if (!response.ok) {
    if (response.status === 401) at("settings").open = true;
    say(response.status === 401 ? "this server asks for its API key" : await fault(response), true);
    return;
  }
  const models = (await response.json()).data;
  say(`${models.map((model) => model.id).join(", ")} · ${models[0].max_model_len} tokens`);
  const chosen = models.length > 1 ? [models.at(-1).id, models[0].id] : [models[0].id];
  at("text").placeholder = chosen.length > 1 ? "Ask both…" : "Ask…";
  sides.splice(0);
  at("sides").replaceChildren();
  for (const id of chosen) sides.push(new Side(models, id));
  suggest();
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) sides.forEach((side) => side.stop?.abort());
  else send();
});
at("text").addEventListener("input", grow);
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
at("fresh").addEventListener("click", () => sides.forEach((side) => side.clear()));
at("key").addEventListener("change", start);
document.addEventListener("click", (event) => {
  if (!at("settings").contains(event.target)) at("settings").open = false;
});
start();
