// A text field for a file, a model or a folder, with a list to choose from.

import { button, field, fresh, h, put } from "./dom.js";
import { fault, get } from "./api.js";
import { bytes } from "./format.js";

/** {element, input}: kind is data or model; onChange(text) is called when the text stands. */
export function fileField(label, kind, value, onChange, hint = null) {
  const input = h("input", {
    value: value ?? "",
    spellcheck: "false",
    autocomplete: "off",
    on: { change: () => onChange(input.value.trim()) },
  });
  input.id = fresh("file");
  const choose = button(
    "Choose",
    () =>
      browse(kind, (path) => {
        input.value = path;
        onChange(path);
      }),
    { "aria-label": `Choose: ${label}` },
  );
  const made = field(label, input, hint);
  const line = h("div", { class: "choose" });
  input.replaceWith(line);
  line.append(input, choose);
  return { element: made, input };
}

async function browse(kind, onPick) {
  const list = h("ul", { class: "files" }),
    where = h("p", { class: "mono soft" });
  const dialog = h(
    "dialog",
    { "aria-label": "Choose a file", on: { close: () => dialog.remove() } },
    h("h2", {}, kind === "model" ? "Choose a model" : "Choose a file"),
    where,
    list,
    h(
      "p",
      {},
      button("Cancel", () => dialog.close()),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
  const pick = (entry) => {
    dialog.close();
    onPick(entry.path);
  };
  async function open(path) {
    try {
      const found = await get("files", { path }),
        kinds = kind === "data" ? ["data"] : ["model", "run"];
      const entries = found.entries.filter((entry) => entry.kind === "folder" || kinds.includes(entry.kind));
      where.textContent = found.path;
      put(
        list,
        found.parent !== null && found.parent !== undefined
          ? h(
              "li",
              {},
              button("↑ up", () => open(found.parent)),
            )
          : null,
        entries.map((entry) =>
          h(
            "li",
            {},
            entry.kind === "folder"
              ? button(`${entry.name}/`, () => open(entry.path))
              : button(entry.name, () => pick(entry), { class: "pickable" }),
            " ",
            h("small", {}, entry.kind === "folder" ? "" : [entry.kind, bytes(entry.bytes)].filter(Boolean).join(", ")),
          ),
        ),
      );
      if (!entries.length) list.append(h("li", { class: "soft" }, "Nothing of this kind here."));
      list.querySelector("button")?.focus();
    } catch (error) {
      put(list, h("li", {}, fault(error)));
    }
  }
  await open("");
}
