// A text field for a path, with a dialog to choose a file or folder.

import { button, field, uniqueId, h, notify, prose, put } from "./dom.js";
import { errorBox, get, upload } from "./api.js";
import { bytes } from "./format.js";

/** Return {element, input}. kind: data or model. option: its name. onChange(text) is called when the text is confirmed. */
export function fileField(option, label, kind, value, onChange, hint = null) {
  const input = h("input", {
    value: value ?? "",
    data: { option },
    spellcheck: "false",
    autocomplete: "off",
    on: { change: () => onChange(input.value.trim()) },
  });
  input.id = uniqueId("file");
  const enter = (path) => {
    input.value = path;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };
  const choose = button("Choose", () => browse(kind, enter), { "aria-label": `Choose: ${label}` });
  const element = field(label, input, hint);
  const line = h("div", { class: "choose" }),
    problem = h("div", { class: "bad", role: "alert" });
  input.replaceWith(line);
  line.append(input, choose);
  if (kind === "data") {
    const add = button("Add", () => browse(kind, (path) => enter(JSON.stringify([...listed(input.value), path]))), {
      "aria-label": `Add another file: ${label}`,
      title: "Add another file",
    });
    const showAdd = () => (add.hidden = !input.value.trim());
    input.addEventListener("change", showAdd);
    showAdd();
    line.append(add, uploadButton(label, problem, enter));
  }
  input.addEventListener("change", () => put(problem));
  line.after(problem);
  return { element, input };
}

/** Return the names of files in the text of a field: one name, or several as JSON. */
function listed(text) {
  try {
    const names = JSON.parse(text);
    if (Array.isArray(names)) return names;
  } catch {
    // a name
  }
  return [text.trim()];
}

/**
 * Return a button that uploads a file from the browser's machine. problem: shows why it failed. onDone(path) receives its
 * path on the server.
 */
function uploadButton(label, problem, onDone) {
  const chooser = h("input", { type: "file", hidden: true });
  const start = button("Upload", () => chooser.click(), { "aria-label": `Upload: ${label}` });
  chooser.addEventListener("change", async () => {
    const [file] = chooser.files;
    if (!file) return;
    put(problem);
    start.disabled = true;
    start.textContent = "Uploading…";
    try {
      const { max_upload_bytes: limit } = await get("hello");
      if (file.size > limit) throw new Error(`${file.name} is larger than ${bytes(limit)}.`);
      const { path } = await upload(file);
      notify(`Uploaded to ${path}.`);
      onDone(path);
    } catch (error) {
      put(problem, prose(`Not uploaded: ${[error.message, error.fix].filter(Boolean).join(": ")}`));
    }
    chooser.value = "";
    start.disabled = false;
    start.textContent = "Upload";
  });
  return h("span", {}, start, chooser);
}

async function browse(kind, onPick) {
  const list = h("ul", { class: "files" }),
    where = h("p", { class: "soft" });
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
      const folder = await get("files", { path, kind }),
        { entries } = folder;
      put(where, folder.path === "." ? "The folder in which strop dash was started" : h("code", {}, folder.path));
      put(
        list,
        folder.parent !== null && folder.parent !== undefined
          ? h(
              "li",
              {},
              button("↑ up", () => open(folder.parent)),
            )
          : null,
        kind === "model"
          ? h(
              "li",
              {},
              button("demo", () => pick({ path: "demo" }), { class: "pickable" }),
              h("small", {}, " a small model to try strop with"),
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
      if (!entries.length) list.append(h("li", { class: "soft" }, "No matching files in this folder."));
      list.querySelector("button")?.focus();
    } catch (error) {
      put(list, h("li", {}, errorBox(error)));
    }
  }
  await open("");
}
