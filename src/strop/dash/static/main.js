// The page: its addresses (#/runs, #/run/NAME/answers, ...) and their screens.

import { button, field, h, link, put, notify, select } from "./dom.js";
import { errorBox, get, hasToken, storeToken, takeToken } from "./api.js";
import { TITLES } from "./labels.js";
import { address, to } from "./route.js";

const SCREENS = {
  runs: ["Runs", () => import("./screens/runs.js")],
  new: ["New run", () => import("./screens/new.js")],
  data: ["Data", () => import("./screens/data.js")],
  compare: ["Compare", () => import("./screens/compare.js")],
  chat: ["Chat", () => import("./screens/chat.js")],
  machine: ["Machine", () => import("./screens/machine.js")],
  run: [null, () => import("./screens/run.js")],
  sweep: [null, () => import("./screens/sweep.js")],
};
/** Addresses of earlier versions, such as bookmarks. */
const MOVED = [
  [/^#\/talk(?=\?|$)/, "#/chat"],
  [/^(#\/run\/[^/?]+)\/take(?=\?|$)/, "$1/export"],
];
const main = document.getElementById("main"),
  nav = document.getElementById("nav");
let current = new AbortController(),
  first = true,
  shownPath = "";

/** Open the run that was given to `strop dash RUN`. */
async function openGivenRun() {
  const { open } = await get("hello").catch(() => ({}));
  if (open) location.replace(to("run", open));
  return Boolean(open);
}

async function navigate() {
  for (const [old, now] of MOVED) {
    if (!old.test(location.hash)) continue;
    location.replace(location.hash.replace(old, now)); // calls navigate again
    return;
  }
  const { parts, query, path } = address();
  if (!parts.length && (await openGivenRun())) return;
  const screen = parts[0] ?? "runs";
  current.abort();
  current = new AbortController();
  const { signal } = current;
  document.querySelector("dialog[open]")?.close(); // of the page before
  drawNav(screen);
  const container = h("div", { class: "screen" });
  container.setAttribute("aria-busy", "true");
  try {
    if (!Object.hasOwn(SCREENS, screen)) throw new Error(`There is no page at #/${path}.`);
    if (!Object.keys(TITLES).length) Object.assign(TITLES, (await get("hello")).titles);
    const { show } = await SCREENS[screen][1]().catch(async (error) => {
      await get("hello"); // if the server does not respond, this is the error
      throw error;
    });
    if (signal.aborted) return;
    put(main, put(container, h("p", { class: "soft loading", role: "status" }, "Loading…")));
    const title = await show(container, { parts: parts.slice(1), query, signal });
    if (signal.aborted) return;
    document.title = title ? `${title} · strop` : "strop";
  } catch (error) {
    if (signal.aborted || error.name === "AbortError") return;
    put(
      main,
      h("h1", {}, "This page cannot be shown"),
      errorBox(error),
      h(
        "div",
        { class: "line" },
        button("Try again", navigate),
        screen === "runs" ? null : link("#/runs", "Back to the runs"),
      ),
    );
  }
  container.removeAttribute("aria-busy");
  if (!first && path !== shownPath) {
    const head = main.querySelector("h1") ?? main;
    head.tabIndex = -1;
    head.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  first = false;
  shownPath = path;
}

function drawNav(current) {
  put(
    nav,
    Object.entries(SCREENS)
      .filter(([, [name]]) => name)
      .map(([screen, [name]]) => {
        const here = screen === current || (screen === "runs" && ["run", "sweep"].includes(current));
        return link(to(screen), name, here ? { "aria-current": "page" } : {});
      }),
  );
}

/** Ask for the token, which `strop dash` prints in the terminal. */
function askToken() {
  current.abort();
  document.querySelector("dialog")?.close();
  const input = h("input", { type: "password", autocomplete: "off", spellcheck: "false" });
  const form = h(
    "form",
    {
      class: "card form",
      on: {
        submit: (event) => {
          event.preventDefault();
          storeToken(input.value.replace(/^.*#token=/, ""));
          navigate();
        },
      },
    },
    hasToken() ? h("p", {}, "The token of this browser is not valid, as after a restart of the server.") : null,
    h("p", {}, "Open the address that ", h("code", {}, "strop dash"), " printed, or enter the token at its end."),
    field("Token", input),
    h(
      "div",
      {},
      button("Open", () => form.requestSubmit(), { class: "main" }),
    ),
  );
  put(main, h("h1", {}, "Sign in"), form);
}

addEventListener("hashchange", () => {
  takeToken();
  navigate();
});
addEventListener("signedout", askToken);
addEventListener("unhandledrejection", (event) => {
  if (event.reason?.name === "AbortError") event.preventDefault();
  else notify(event.reason?.message ?? "Something failed.", true);
});
const { theme } = globalThis; // of theme.js
document.getElementById("theme").append(
  select(
    theme.names.map((name) => [name, `${name} theme`]),
    theme.get(),
    theme.set,
    { "aria-label": "Theme", class: "theme" },
  ),
);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
takeToken();
navigate();
