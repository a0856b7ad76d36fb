// Requests to the server, and its event streams. The browser stores the token of the address that `strop dash` prints.

import { h, prose } from "./dom.js";

const TOKEN_KEY = "strop-dash-token";

/** Move the token from the address to the browser's storage. */
export function takeToken() {
  const match = location.hash.match(/^#token=([^&]+)(?:&(.*))?$/s);
  if (!match) return;
  storeToken(decodeURIComponent(match[1]));
  history.replaceState(null, "", match[2] ? `#${match[2]}` : "#/");
}

export function storeToken(token) {
  localStorage.setItem(TOKEN_KEY, token.trim());
}

const token = () => localStorage.getItem(TOKEN_KEY) ?? "";

export const hasToken = () => token() !== "";

/** An error response: message, fix, where: [{file, line, what}], status. */
export class ApiError extends Error {
  constructor(status, details) {
    super(details.message ?? `the server responded with status ${status}`);
    Object.assign(this, {
      name: "ApiError",
      status,
      kind: details.kind,
      fix: details.fix ?? "",
      where: details.where ?? [],
    });
  }
}

/** Return an element that shows an error: what is wrong, how to fix it, and where. words: returns nodes for a text. */
export function errorBox(error, words = prose) {
  const groups = new Map(); // places of each problem: one cause may concern all rows
  for (const place of error.where ?? []) {
    const text = place.what ?? "";
    if (!error.message?.endsWith(`${place.file}: ${text}`)) groups.set(text, [...(groups.get(text) ?? []), place]);
  }
  const shown = [...groups.values()].flatMap((places) => (places.length > 3 ? [places] : places.map((place) => [place])));
  return h(
    "div",
    { class: "verdict error", role: "alert" },
    h("div", { class: "error" }, words(error.message ?? error)),
    error.fix ? h("p", { class: "free" }, words(error.fix)) : null,
    shown.length
      ? h(
          "ul",
          {},
          shown.slice(0, 50).map(([{ file, line, what }, ...more]) =>
            h(
              "li",
              {},
              h("code", {}, words(file), line ? `:${line}` : ""),
              more.length ? ` and ${more.length} more: ` : " ",
              words(what ?? ""),
            ),
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

/** The path of a run in the API: runs/NAME. */
export const runPath = (name, ...rest) => ["runs", encodeURIComponent(name), ...rest].join("/");

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { Authorization: `Bearer ${token()}`, ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, {
      message: "The server does not respond.",
      fix: "Start it again with `strop dash`. Nothing is lost: everything is in the run folders.",
    });
  }
  if (response.ok) return response;
  if (response.status === 401) dispatchEvent(new Event("signedout")); // after a restart, the server has another key
  const details = await response.json().catch(() => ({}));
  throw new ApiError(response.status, details.error ?? {});
}

export async function get(path, params = {}, signal = undefined) {
  return (await ask(url(path, params), { signal })).json();
}

export async function post(path, body = {}, signal = undefined) {
  return (await postStream(path, body, signal)).json();
}

/** Post a request and return the response, whose body is a stream. */
export function postStream(path, body, signal) {
  return ask(url(path), {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
}

/** Return a file of the server. */
export async function getBlob(path, signal) {
  return (await ask(url(path), { signal })).blob();
}

/** Upload a file into the data folder: {path, bytes}. */
export async function upload(file, signal) {
  const headers = { "Content-Type": "application/octet-stream" };
  return (await ask(url("upload", { name: file.name }), { method: "POST", signal, headers, body: file })).json();
}

/** Yield the server-sent events of a response body: {event, data}. */
export async function* readEvents(body) {
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

const disconnected = new Set();

function showConnection() {
  const element = document.getElementById("link");
  element.textContent = disconnected.size ? "Connection lost. Reconnecting…" : "";
  element.classList.toggle("bad", disconnected.size > 0);
}

/**
 * Follow a stream until `signal` ends it. A lost connection is opened again; each connection starts with the whole state.
 * params may be a function, which is called for each connection. handlers: {event: (data) => ..., error: (error) => ...}.
 */
export async function listen(path, params, handlers, signal) {
  const stream = {};
  let pause = 500;
  signal.addEventListener("abort", () => {
    disconnected.delete(stream);
    showConnection();
  });
  while (!signal.aborted) {
    try {
      const response = await ask(url(path, typeof params === "function" ? params() : params), { signal });
      disconnected.delete(stream);
      showConnection();
      for await (const { event, data } of readEvents(response.body)) {
        if (signal.aborted) return;
        pause = 500;
        handlers[event]?.(data);
      }
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return;
      if (error.status >= 400 && error.status < 500) {
        disconnected.delete(stream);
        showConnection();
        handlers.error?.(error);
        return;
      }
      if (!(error instanceof ApiError || error instanceof TypeError)) throw error;
    }
    disconnected.add(stream);
    showConnection();
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
