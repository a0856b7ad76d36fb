// Format numbers and times, with the rules of display/numbers.py.

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

const rounding = (digits) =>
  new Intl.NumberFormat("en-US", {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
    roundingMode: "halfEven", // as Python
  });
const integers = rounding(0),
  formats = [integers, rounding(1), rounding(2), rounding(3)];

export const count = (value) => (isNumber(value) ? integers.format(value) : "");

/** Format a value with significant digits; below 0.01, as most learning rates, and from 1e6 on with an exponent. */
export function figure(value, digits = 4) {
  if (!isNumber(value)) return "";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-2 || size >= 1e6) return Number(value.toPrecision(3)).toExponential();
  if (size >= 1000) return integers.format(value);
  return String(Number(value.toPrecision(digits)));
}

/** Format a loss with three decimals, and as other values if it is below 0.1 or above 1,000. */
export const lossText = (value) =>
  value === 0 || (Math.abs(value) >= 0.1 && Math.abs(value) < 1000) ? formats[3].format(value) : figure(value, 3);

export const percent = (share, digits = 1) => (isNumber(share) ? `${formats[digits].format(100 * share)}%` : "");

/** Return one sentence on what a metric measures, for a title; "" for a user's own metric. */
export const describeMetric = (name) =>
  ({
    exact: "Share of the answers that are equal to the reference answer, apart from spaces.",
    exact_json: "Share of the answers that are the same JSON object as the reference, without other text.",
    contains: "Share of the answers that contain the reference answer, in any case.",
    regex: "Share of the answers that match the row's pattern.",
    choice: "Share of the rows whose reference is the most likely of all references.",
    preference: "Share of the pairs whose preferred answer is more likely.",
    accuracy: "Share of the texts with the right class.",
    accuracy_at_1: "Share of the texts whose nearest passage is the right one.",
    mean_reward: "Mean reward of the traces.",
  })[name] ?? "";

/** Format a score: a share as a percentage, other values as they are. */
export const scoreText = (value) => (isNumber(value) && value >= 0 && value <= 1 ? percent(value) : figure(value));

export function bytes(size) {
  if (!isNumber(size)) return "";
  if (size >= 2 ** 30) return `${(size / 2 ** 30).toFixed(2)} GiB`;
  if (size >= 2 ** 20) return `${(size / 2 ** 20).toFixed(size < 10 * 2 ** 20 ? 1 : 0)} MiB`;
  if (size >= 1024) return `${Math.round(size / 1024)} KiB`;
  return `${size} B`;
}

export function duration(seconds) {
  if (!isNumber(seconds)) return "";
  if (Math.round(seconds) < 60) return seconds < 9.95 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds)} s`;
  const rest = Math.round(seconds) % 60;
  if (Math.round(seconds) < 3600) return `${Math.floor(Math.round(seconds) / 60)} min${rest ? ` ${rest} s` : ""}`;
  const minutes = Math.round(seconds / 60);
  const hours = Math.floor(minutes / 60);
  return hours < 48
    ? `${hours} h ${String(minutes % 60).padStart(2, "0")} min`
    : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** Format a time that is counted each second: without fractions of a second. */
export const elapsed = (seconds) => (seconds < 60 ? `${Math.max(0, Math.floor(seconds))} s` : duration(Math.floor(seconds)));

/** Format a Unix time in seconds: "2026-11-26 14:05". */
export function moment(time) {
  if (!isNumber(time)) return "";
  const at = new Date(time * 1000),
    pad = (number) => String(number).padStart(2, "0");
  return `${at.getFullYear()}-${pad(at.getMonth() + 1)}-${pad(at.getDate())} ${pad(at.getHours())}:${pad(at.getMinutes())}`;
}

export function ago(time, now = Date.now() / 1000) {
  if (!isNumber(time)) return "";
  const age = now - time;
  return age < 5
    ? "now"
    : age < 3600
      ? `${age < 60 ? elapsed(age) : `${Math.round(age / 60)} min`} ago`
      : age < 48 * 3600
        ? `${Math.round(age / 3600)} h ago`
        : moment(time);
}

/** Return the last part of a path. */
export const lastPart = (path) => (typeof path === "string" ? (path.split("/").filter(Boolean).at(-1) ?? path) : path);

/** Return the time left of a run and when it ends, by the forecast at its last step; "" where that is not known. */
export function timeLeft({ step, steps, time, seconds_left: seconds }) {
  if (!(step >= MIN_STEPS) || step >= steps || !isNumber(seconds) || !isNumber(time)) return "";
  const left = time + seconds - Date.now() / 1000;
  return left >= 1 ? `${elapsed(left)} left, until about ${moment(time + seconds).slice(11)}` : "";
}
const MIN_STEPS = 3; // the first ones are slower

/** Describe why a run has no adapter to evaluate or export, and what to do. */
export const noAdapter = (run) =>
  run.has_adapter
    ? "This run is training again. Its adapter is still the one from before. You can evaluate and export it when the run has ended or is stopped."
    : `This run has no adapter yet: it is written at the end of training. ${run.can?.includes("resume") ? "Resume the run to finish it." : ""}`;

/** Return the name of a kind of event. */
export const eventName = (kind) => ({ rehearsal: "dry run" })[kind] ?? kind;

/** Format a value of a recipe. */
export function formatValue(value) {
  if (value === null || value === undefined) return "-";
  if (isNumber(value)) return Number.isInteger(value) ? String(value) : figure(value);
  if (Array.isArray(value)) return value.map(formatValue).join(", ") || "-";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** Format rows as CSV (RFC 4180). Cells that a spreadsheet would run as a formula are prefixed with a quote. */
export function csv(head, rows) {
  const cell = (value) => {
    let text = value === null || value === undefined ? "" : String(value);
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [head, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}
