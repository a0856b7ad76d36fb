// The page: addresses (#/runs, #/run/NAME/answers, ...) and the screens behind them.

import { button, field, h, link, put, say } from "./dom.js";
import { fault, get, keepToken, takeToken } from "./api.js";
import { address, to } from "./route.js";

const SCREENS = {
  runs: ["Runs", () => import("./screens/runs.js")],
  new: ["New run", () => import("./screens/new.js")],
  data: ["Data", () => import("./screens/data.js")],
  compare: ["Compare", () => import("./screens/compare.js")],
  talk: ["Chat", () => import("./screens/talk.js")],
  machine: ["Machine", () => import("./screens/machine.js")],
  run: [null, () => import("./screens/run.js")],
};
const main = document.getElementById("main"),
  nav = document.getElementById("nav");
let leave = new AbortController(),
  first = true,
  shownPath = "";

/** `strop dash RUN` opens that run. */
async function opened() {
  const { open } = await get("hello").catch(() => ({}));
  if (open) location.replace(to("run", open));
  return Boolean(open);
}

async function go() {
  const { parts, query, path } = address();
  if (!parts.length && (await opened())) return;
  const [screen, load] = SCREENS[parts[0]] ? [parts[0], SCREENS[parts[0]][1]] : ["runs", SCREENS.runs[1]];
  leave.abort();
  leave = new AbortController();
  const { signal } = leave;
  drawNav(screen);
  const place = h("div", { class: "screen" });
  place.setAttribute("aria-busy", "true");
  try {
    const { show } = await load();
    if (signal.aborted) return;
    put(main, place);
    const title = await show(place, { parts: parts.slice(1), query, signal });
    if (signal.aborted) return;
    document.title = title ? `${title} · strop` : "strop";
  } catch (error) {
    if (signal.aborted || error.name === "AbortError") return;
    if (error.status === 401) askToken();
    else put(main, h("h1", {}, "This cannot be shown"), fault(error), h("p", {}, link("#/runs", "To the runs")));
  }
  place.removeAttribute("aria-busy");
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
        const here = screen === current || (screen === "runs" && current === "run");
        return link(to(screen), name, here ? { "aria-current": "page" } : {});
      }),
  );
}

/** Without the token nothing is shown: the terminal where `strop dash` runs has it. */
function askToken() {
  const input = h("input", { type: "password", autocomplete: "off", spellcheck: "false" });
  const form = h(
    "form",
    {
      class: "card form",
      on: {
        submit: (event) => {
          event.preventDefault();
          keepToken(input.value.replace(/^.*#token=/, ""));
          go();
        },
      },
    },
    h("p", {}, "Open the address that ", h("code", {}, "strop dash"), " printed, or give the token from its end."),
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
  go();
});
addEventListener("unhandledrejection", (event) => {
  if (event.reason?.name === "AbortError") event.preventDefault();
  else say(event.reason?.message ?? "Something failed.", true);
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
takeToken();
go();
