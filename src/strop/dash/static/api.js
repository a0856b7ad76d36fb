// The server's JSON and its streams. The token comes once, in the address that `strop dash` prints, and stays in this browser.

import { h } from "./dom.js";

const KEPT = "strop-dash-token";

/** Takes the token out of the address. */
export function takeToken() {
  const found = location.hash.match(/^#token=([^&]+)(?:&(.*))?$/s);
  if (!found) return;
  keepToken(decodeURIComponent(found[1]));
  history.replaceState(null, "", found[2] ? `#${found[2]}` : "#/");
}

export function keepToken(token) {
  localStorage.setItem(KEPT, token.trim());
}

const token = () => localStorage.getItem(KEPT) ?? "";

/** What the server said no with: message, fix, where: [{file, line, what}], status. */
export class Fault extends Error {
  constructor(status, told) {
    super(told.message ?? `the server answers ${status}`);
    Object.assign(this, { name: "Fault", status, kind: told.kind, fix: told.fix ?? "", where: told.where ?? [] });
  }
}

/** An error as an element: what, what to do, and where. */
export function fault(error) {
  const where = (error.where ?? []).slice(0, 50);
  return h(
    "div",
    { class: "verdict error", role: "alert" },
    h("div", { class: "error" }, error.message ?? String(error)),
    error.fix ? h("p", { class: "free" }, error.fix) : null,
    where.length
      ? h(
          "ul",
          {},
          where.map((place) =>
            h("li", {}, h("code", {}, place.line ? `${place.file}:${place.line}` : place.file), " ", place.what ?? ""),
          ),
        )
      : null,
  );
}

function url(path, params = {}) {
  const query = new URLSearchParams(
    Object.entries(params).filter(([, value]) => value !== null && value !== undefined && value !== ""),
  );
  return `/api/${path}${String(query) && `?${query}`}`;
}

/** A run's part of an address: runs/NAME. */
export const ofRun = (name, ...rest) => ["runs", encodeURIComponent(name), ...rest].join("/");

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { Authorization: `Bearer ${token()}`, ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault(0, {
      message: "The server is not there.",
      fix: "Start it again with `strop dash`: nothing is lost, all of it is in the run folders.",
    });
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Fault(response.status, told.error ?? {});
}

export async function get(path, params = {}, signal = undefined) {
  return (await ask(url(path, params), { signal })).json();
}

export async function post(path, body = {}, signal = undefined) {
  return (await raw(path, body, signal)).json();
}

/** The same, for an answer that is a stream. */
export function raw(path, body, signal) {
  return ask(url(path), {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
}

/** Server-sent events of a body: {event, data}. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      let event = "message",
        data = "";
      for (const line of part.split("\n")) {
        if (line.startsWith("event: ")) event = line.slice(7);
        else if (line.startsWith("data: ")) data += line.slice(6);
      }
      if (data && data !== "[DONE]") yield { event, data: JSON.parse(data) };
    }
  }
}

const lost = new Set();

function tell() {
  const place = document.getElementById("link");
  place.textContent = lost.size ? "Connection lost. Trying again…" : "";
  place.classList.toggle("bad", lost.size > 0);
}

/**
 * Follows a stream until `signal` ends it; a lost connection is made again, and each one begins with the whole state.
 * params may be a function: it is asked at each connection. handlers: {event: (data) => ...}.
 */
export async function listen(path, params, handlers, signal) {
  const me = {};
  let pause = 500;
  signal.addEventListener("abort", () => {
    lost.delete(me);
    tell();
  });
  while (!signal.aborted) {
    try {
      const response = await ask(url(path, typeof params === "function" ? params() : params), { signal });
      lost.delete(me);
      tell();
      for await (const { event, data } of events(response.body)) {
        if (signal.aborted) return;
        pause = 500;
        handlers[event]?.(data);
      }
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return;
      if (error.status >= 400 && error.status < 500) {
        handlers.fault?.(error);
        return;
      }
      if (!(error instanceof Fault || error instanceof TypeError)) throw error;
    }
    lost.add(me);
    tell();
    await new Promise((done) => {
      const timer = setTimeout(done, pause);
      const now = () => {
        clearTimeout(timer);
        done();
      };
      addEventListener("online", now, { once: true, signal });
      signal.addEventListener("abort", now, { once: true });
    });
    pause = Math.min(5000, pause * 2);
  }
}
