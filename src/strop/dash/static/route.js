// Addresses of the page: #/runs, #/run/NAME/answers?filter=lost, ...

/** An address: parts of the path, and what follows the question mark. */
export function address() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const parts = path.split("/").filter(Boolean).map(decoded);
  return { parts, query: new URLSearchParams(query), path };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** The address of a screen: to("run", name, "answers"), to("compare", {runs: joined(["a", "b"])}). */
export function to(...parts) {
  const query =
    typeof parts.at(-1) === "object"
      ? new URLSearchParams(
          Object.entries(parts.pop()).filter(([, value]) => value !== "" && value !== null && value !== undefined),
        )
      : "";
  const path = parts.map(encodeURIComponent).join("/");
  return `#/${path}${String(query) && `?${query}`}`;
}

/** Names of runs as one part of an address; a comma in a name is written `\,`: no name holds a backslash. */
export const joined = (names) => [...names].map((name) => name.replaceAll(",", "\\,")).join(",");

/** The names again. */
export const parted = (text) =>
  (text ?? "")
    .split(/(?<!\\),/)
    .filter(Boolean)
    .map((name) => name.replaceAll("\\,", ","));

/** Puts what the reader chose into the address, so that a reload and another tab show the same. */
export function remember(choices) {
  const { path, query } = address();
  for (const [name, value] of Object.entries(choices)) {
    if (value === null || value === undefined || value === "") query.delete(name);
    else query.set(name, value);
  }
  history.replaceState(null, "", `#/${path}${String(query) && `?${query}`}`);
}
