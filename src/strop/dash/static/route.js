// Addresses of the page: #/runs, #/run/NAME/answers?filter=lost, ...

/** Return the current address: parts of the path, the query, and the path. */
export function address() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const parts = path.split("/").filter(Boolean).map(decode);
  return { parts, query: new URLSearchParams(query), path };
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** Return the address of a screen: to("run", name, "answers"), to("compare", {runs: joinNames(["a", "b"])}). */
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

/** Join names of runs with commas; a comma in a name is escaped as `\,` (no name contains a backslash). */
export const joinNames = (names) => [...names].map((name) => name.replaceAll(",", "\\,")).join(",");

/** Split what joinNames joined. */
export const splitNames = (text) =>
  (text ?? "")
    .split(/(?<!\\),/)
    .filter(Boolean)
    .map((name) => name.replaceAll("\\,", ","));

/** Store choices in the address, so that a reload or another tab shows the same. */
export function setQuery(choices) {
  const { path, query } = address();
  for (const [name, value] of Object.entries(choices)) {
    if (value === null || value === undefined || value === "") query.delete(name);
    else query.set(name, value);
  }
  history.replaceState(null, "", `#/${path}${String(query) && `?${query}`}`);
}
