"use strict";
// Chat with the models of this page's server. Model output is inserted as textContent only, never as HTML.

const byId = (id) => document.getElementById(id);
const sides = [];
let running = 0;

function element(tag, className, text) {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

function showStatus(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

function headers() {
  const key = byId("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function errorMessage(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `HTTP error ${response.status}`;
  }
}

/** One conversation with one model, next to the others. */
class Side {
  constructor(models, selected) {
    const content = byId("side").content.cloneNode(true);
    this.root = content.querySelector(".side");
    this.messages = content.querySelector(".messages");
    this.rate = content.querySelector(".rate");
    this.select = content.querySelector("select");
    this.systems = new Map(models.map((model) => [model.id, model.system ?? ""]));
    for (const model of models) this.select.append(new Option(model.id, model.id, false, model.id === selected));
    this.select.addEventListener("change", () => {
      this.clear();
      showDefaultSystem();
    });
    byId("sides").append(content);
    this.clear();
  }

  get isBase() {
    return this.select.value === "base";
  }

  /** The system prompt of the training rows. The base gets that of the tuned model next to it. */
  get system() {
    const tuned = this.isBase ? sides.find((side) => !side.isBase) : this;
    return tuned ? tuned.systems.get(tuned.select.value) : "";
  }

  clear() {
    this.stop?.abort();
    this.turns = [];
    this.rate.textContent = "";
    this.messages.replaceChildren(element("p", "empty", `Responses of ${this.select.value} appear here.`));
  }

  show(node) {
    const isAtEnd = this.messages.scrollHeight - this.messages.scrollTop - this.messages.clientHeight < 60;
    if (node) this.messages.append(node);
    if (isAtEnd) this.messages.scrollTop = this.messages.scrollHeight;
  }

  async send(text, options) {
    this.messages.querySelector(".empty")?.remove();
    this.show(element("p", "user", text));
    const answer = element("p", "answer waiting", "");
    this.show(answer);
    const turns = [...this.turns, { role: "user", content: text }];
    // the server adds the default system prompt of a tuned model
    const system = byId("system").value.trim() || (this.isBase ? this.system : "");
    const messages = system ? [{ role: "system", content: system }, ...turns] : turns;
    this.stop = new AbortController();
    let output = "", finishReason = null;
    try {
      const response = await fetch("/v1/chat/completions", {
        method: "POST",
        headers: headers(),
        signal: this.stop.signal,
        body: JSON.stringify({
          model: this.select.value, messages, stream: true, stream_options: { include_usage: true }, ...options,
        }),
      });
      if (!response.ok) throw new Error(await errorMessage(response));
      let firstTokenTime = 0;
      for await (const event of events(response.body)) {
        if (event.error) throw new Error(event.error.message);
        const choice = event.choices[0];
        if (choice?.delta.content) {
          firstTokenTime ||= performance.now();
          output += choice.delta.content;
          answer.textContent = output;
          this.show();
        }
        finishReason = choice?.finish_reason ?? finishReason;
        if (event.usage) this.showRate(event.usage.completion_tokens, firstTokenTime);
      }
      if (output === "") answer.textContent = "(empty response)";
      if (finishReason === "length") this.show(element("p", "note", "stopped at max new tokens (see Settings)"));
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
    this.turns = [...turns, { role: "assistant", content: output }];
  }

  showRate(tokens, firstTokenTime) {
    const seconds = (performance.now() - firstTokenTime) / 1000;
    const rate = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    this.rate.textContent = `${tokens} token${tokens === 1 ? "" : "s"}${rate}`;
  }
}

/** Parse a stream of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (buffer + value).split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

function options() {
  const values = {};
  for (const [id, name] of [["temperature", "temperature"], ["limit", "max_tokens"], ["seed", "seed"]]) {
    if (byId(id).value !== "") values[name] = Number(byId(id).value);
  }
  return values;
}

async function send() {
  const text = byId("text").value;
  if (running || !text.trim() || !sides.length) return;
  byId("text").value = "";
  fitHeight();
  running = sides.length;
  byId("send").textContent = "Stop";
  await Promise.all(sides.map((side) => side.send(text, options()).finally(() => (running -= 1))));
  byId("send").textContent = "Send";
}

function fitHeight() {
  const box = byId("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

/** Show the default system prompts as the placeholder. */
function showDefaultSystem() {
  const same = sides.every((side) => side.system === sides[0].system);
  const text = (side) => side.system || "none";
  byId("system").placeholder = same
    ? text(sides[0])
    : sides.map((side) => `${side.select.value}: ${text(side)}`).join("\n");
}

async function start() {
  let response;
  try {
    response = await fetch("/v1/models", { headers: headers() });
  } catch {
    showStatus("cannot reach the server", true);
    return;
  }
  if (!response.ok) {
    if (response.status === 401) byId("settings").open = true;
    showStatus(response.status === 401 ? "API key required" : await errorMessage(response), true);
    return;
  }
  const models = (await response.json()).data;
  showStatus(`${models.map((model) => model.id).join(", ")} · ${models[0].max_model_len} tokens`);
  const selected = models.length > 1 ? [models.at(-1).id, models[0].id] : [models[0].id];
  byId("text").placeholder = selected.length > 1 ? "Message both models…" : "Message…";
  sides.splice(0);
  byId("sides").replaceChildren();
  for (const id of selected) sides.push(new Side(models, id));
  showDefaultSystem();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) sides.forEach((side) => side.stop?.abort());
  else send();
});
byId("text").addEventListener("input", fitHeight);
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("new-chat").addEventListener("click", () => sides.forEach((side) => side.clear()));
byId("key").addEventListener("change", start);
document.addEventListener("click", (event) => {
  if (!byId("settings").contains(event.target)) byId("settings").open = false;
});
start();
