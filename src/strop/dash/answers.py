"""Answers of base and tuned per row, blind votes between them, and comparisons of runs."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from strop.dash.files import read_bytes, read_json
from strop.dash.jobs import Busy
from strop.dash.runs import evaluation_score
from strop.errors import DiskError, InputError
from strop.evaluation.metrics import Difference, mark_differences, paired_difference, verdict, wilson
from strop.runs.folder import RunFolder

FILTERS = ("all", "gained", "lost", "changed", "both", "neither", "wrong", "right")
VOTES = "votes.jsonl"
MOST_BALLOTS = 1000
MOST_MARKED = 4000  # characters up to which differences are highlighted
Leads = dict[str, dict[str, tuple[float, float]]]  # lead of a run over each comparable run: value and lower bound


def answers(folder: RunFolder, wanted: str, order: str, search: str, offset: int, count: int) -> dict[str, Any]:
    """Return rows of the last evaluation. order: row, or worst (lost, then never right) first."""
    if wanted not in FILTERS or order not in ("row", "worst"):
        raise InputError(f"filter is one of {', '.join(FILTERS)}; order is row or worst")
    report = read_json(folder.report)
    rows, complete = _rows(folder, report)
    found = [row["kind"] for row in rows]
    counts = {kind: found.count(kind) for kind in ("gained", "lost", "both", "neither")}
    kinds = {"changed": ("gained", "lost"), "wrong": ("lost", "neither"), "right": ("gained", "both")}
    chosen = rows if wanted == "all" else [row for row in rows if row["kind"] in kinds.get(wanted, (wanted,))]
    if search:
        low = search.casefold()
        chosen = [row for row in chosen if any(low in str(row.get(key) or "").casefold() for key in _TEXTS)]
    if order == "worst":
        rank = {"lost": 0, "neither": 1, "gained": 2, "both": 3}
        chosen = sorted(chosen, key=lambda row: rank.get(row["kind"], 4))
    score = evaluation_score(report)
    return {
        "evaluation": report.get("evaluation"), "intervals": report.get("intervals"),
        "words": score["words"] if score else None,
        "complete": complete, "counts": {"all": len(rows), **counts}, "total": len(chosen),
        "rows": [_with_marked_answers(row) for row in chosen[offset : offset + count]],
    }  # fmt: skip


_TEXTS = ("prompt", "gold", "base", "tuned", "chosen", "rejected", "place")


def _rows(folder: RunFolder, report: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """Return rows of the last evaluation, and whether they are complete (report.json keeps only a few)."""
    kept = read_json(folder.answers)
    samples = kept.get("samples")
    whole = isinstance(samples, list)
    if not whole:
        samples = report.get("samples")
    rows = []
    for number, sample in enumerate(samples if isinstance(samples, list) else []):
        if not isinstance(sample, dict):
            continue
        was, now, kind = sample.get("base_hit"), sample.get("tuned_hit"), ""
        if isinstance(was, bool) and isinstance(now, bool):
            kind = ("both" if now else "lost") if was else "gained" if now else "neither"
        rows.append({**sample, "row": number, "kind": kind})
    return rows, whole


def _with_marked_answers(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its answers split into pieces that are the same as the reference, added or missing."""
    gold, marked = row.get("gold"), {}
    for side in ("base", "tuned"):
        if isinstance(answer := row.get(side), str):
            comparable = isinstance(gold, str) and len(gold) + len(answer) <= MOST_MARKED
            marked[side] = mark_differences(str(gold), answer) if comparable else [(answer, "same")]
    return {**row, "marked": marked}


class Votes:
    """Blind votes between base and tuned, stored in the run folder. Only this object knows the sides."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, tuple[str, dict[str, Any], str]] = OrderedDict()

    def ballot(self, folder: RunFolder) -> dict[str, Any]:
        """Return the next pair of different answers without a vote; `ballot` is None if there is none."""
        rows = _pairs(folder)
        voted = {vote["key"] for vote in _votes(folder)}
        left = [row for row in rows if row["key"] not in voted]
        result: dict[str, Any] = {"tally": tally(folder), "left": len(left), "pairs": len(rows), "ballot": None}
        if not left:
            return result
        row, name = secrets.choice(left), secrets.token_urlsafe(12)
        first = secrets.choice(("base", "tuned"))
        self._open[name] = (str(folder.path), row, first)
        while len(self._open) > MOST_BALLOTS:
            self._open.popitem(last=False)
        other = "tuned" if first == "base" else "base"
        shown = {"prompt": row.get("prompt"), "gold": row.get("gold"), "a": row[first], "b": row[other]}
        return {**result, "ballot": name, "row": row["row"], **shown}

    def vote(self, folder: RunFolder, ballot: str, choice: str) -> dict[str, Any]:
        """Record a vote: a, b or tie. Raises Busy for a ballot that was used or is older than a restart."""
        if choice not in ("a", "b", "tie"):
            raise InputError(f"choice: {choice}", fix="a, b or tie")
        path, row, first = self._open.pop(ballot, ("", {}, ""))
        if path != str(folder.path):
            raise Busy("this ballot is no longer open", fix="ask for a new one")
        sides = {"a": first, "b": "tuned" if first == "base" else "base"}
        line = {"time": round(time.time(), 3), "row": row["row"], "key": row["key"], "a": first}
        _append(folder.path / VOTES, {**line, "choice": sides.get(choice, "tie")})
        return {"was": sides, "tally": tally(folder)}


def tally(folder: RunFolder) -> dict[str, Any]:
    """Return the votes on the current answers, and tuned's share of decided votes with a 95 % interval."""
    keys = {row["key"] for row in _pairs(folder)}
    last = {vote["key"]: vote["choice"] for vote in _votes(folder) if vote["key"] in keys}
    tuned, base, ties = (list(last.values()).count(side) for side in ("tuned", "base", "tie"))
    result: dict[str, Any] = {"votes": len(last), "tuned": tuned, "base": base, "ties": ties}
    chose = tuned + base
    if not chose:
        return {**result, "share": None, "low": None, "high": None, "words": "no decided votes yet"}
    low, high = wilson(tuned, chose)
    judged = "tuned is preferred" if low > 0.5 else "base is preferred" if high < 0.5 else "no clear preference"
    share = tuned / chose
    words = f"{judged}: tuned won {tuned} of {chose} ({share:.0%}, 95 % interval {low:.0%} to {high:.0%})"
    return {**result, "share": share, "low": low, "high": high, "words": words}


def _pairs(folder: RunFolder) -> list[dict[str, Any]]:
    """Return rows whose two answers differ, each with a key of prompt and answers."""
    found = []
    for row in _rows(folder, read_json(folder.report))[0]:
        base, tuned = row.get("base"), row.get("tuned")
        if isinstance(base, str) and isinstance(tuned, str) and base != tuned:
            text = json.dumps([row.get("prompt"), row.get("gold"), base, tuned])
            found.append({**row, "key": hashlib.sha256(text.encode()).hexdigest()[:16]})
    return found


def _votes(folder: RunFolder) -> Iterator[dict[str, Any]]:
    for line in read_bytes(folder.path / VOTES).split(b"\n"):
        try:
            vote = json.loads(line)
        except ValueError:
            continue
        complete = isinstance(vote, dict) and isinstance(vote.get("key"), str)
        if complete and vote.get("choice") in ("base", "tuned", "tie"):
            yield vote


def _append(file: Path, value: dict[str, Any]) -> None:
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(file, flags, 0o644), "a", encoding="utf-8") as out:
            out.write(json.dumps(value) + "\n")
    except OSError as error:
        raise DiskError(f"{file}: cannot be written: {error.strerror}", fix="free some space, and vote again") from None


def compare(rows: list[dict[str, Any]], recipes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare runs, given as rows of the table: settings that differ, scores, and each pair on its common rows."""
    names = [row["name"] for row in rows]
    fields = dict.fromkeys(field for name in names for field in recipes[name])
    settings = []
    for field in fields:
        values = {name: recipes[name].get(field) for name in names}
        if field != "out" and len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            settings.append({"field": field, "values": values})
    hits = {row["name"]: _hits(RunFolder(Path(row["path"]))) for row in rows}
    pairs = [_pair(a, b, hits) for place, a in enumerate(names) for b in names[place + 1 :]]
    scores = [{"run": row["name"], **(row["score"] or {}), "loss": row["eval_loss"]} for row in rows]
    return {
        "runs": rows,
        "settings": settings,
        "scores": scores,
        "pairs": pairs,
        "verdict": _describe_comparison(rows, pairs, recipes),
    }


def _hits(folder: RunFolder) -> tuple[str, dict[str, bool]]:
    """Return the metric of the last evaluation, and whether tuned is right by row."""
    report = read_json(folder.report)
    hits = {
        json.dumps([row.get(name) for name in ("prompt", "gold", "chosen", "rejected")]): row["tuned_hit"]
        for row in _rows(folder, report)[0]
        if isinstance(row.get("tuned_hit"), bool)
    }
    return str((report.get("evaluation") or {}).get("metric") or ""), hits


def _pair(a: str, b: str, hits: dict[str, tuple[str, dict[str, bool]]]) -> dict[str, Any]:
    (metric, first), (metric_b, second) = hits[a], hits[b]
    common = sorted(first.keys() & second.keys())
    result: dict[str, Any] = {"a": a, "b": b, "rows": len(common), "difference": None, "verdict": "unclear"}
    if not common or metric != metric_b:
        unscored = [name for name, known in ((a, metric), (b, metric_b)) if not known]
        why = (
            f"{' and '.join(unscored)}: not evaluated" if unscored
            else "no rows in common: evaluate both on the same data" if metric == metric_b
            else f"{metric} against {metric_b}"
        )  # fmt: skip
        return {**result, "words": f"{a} and {b} cannot be compared: {why}"}
    found = paired_difference([first[key] for key in common], [second[key] for key in common])
    kind, words = verdict(Difference(found.value, found.low, found.high))
    text = f"{b} against {a}, {metric} on {len(common):,} rows in common: {words}"
    return {**result, "difference": vars(found), "verdict": kind, "words": text}


def _describe_comparison(
    rows: list[dict[str, Any]], pairs: list[dict[str, Any]], recipes: dict[str, dict[str, Any]]
) -> str:
    """Describe which run is best among those with the same rows and metric, and whether it could be chance."""
    scores = {row["name"]: row["score"] for row in rows if row["score"]}
    leads: Leads = {name: {} for name in scores}
    for pair in pairs:
        a, b, found = pair["a"], pair["b"], pair["difference"]
        if found and a in scores and b in scores:
            leads[a][b], leads[b][a] = (-found["value"], -found["high"]), (found["value"], found["low"])
    if not any(leads.values()):
        return _describe_losses(rows, recipes)
    best = [name for name, others in leads.items() if others and min(others.values())[0] >= 0]
    text = []
    while best:
        equal = [best[0], *(name for name in best if name in leads[best[0]])]
        text.append(_describe_best(equal, leads, scores, [row["name"] for row in rows]))
        best = [name for name in best if name not in equal]
    return " ".join(text) or "No run is above all others: see the pairs."


def _describe_best(equal: list[str], leads: Leads, scores: dict[str, dict[str, Any]], names: list[str]) -> str:
    """Describe the best runs. equal: the best and those as good. names: all runs."""
    first, others = scores[equal[0]], [name for name in leads[equal[0]] if name not in equal]
    text = f"{equal[0]} scores highest" if len(equal) == 1 else f"{' and '.join(equal)} score equal"
    same = all(scores[name]["value"] == first["value"] for name in equal)
    if same and all(scores[name]["value"] <= first["value"] for name in others):
        text += f" ({first['metric']} {first['value']:.1%})"
    else:  # some runs have additional rows
        text += " on the rows in common"
    clear = [name for name in others if all(leads[best_].get(name, (0, 0))[1] > 0 for best_ in equal)]
    groups = {
        "clearly above": clear,
        "not clearly above": [name for name in others if name not in clear],
        "not comparable with": [name for name in names if name not in (*equal, *others)],
    }
    parts = [f"{words} {', '.join(some)}" for words, some in groups.items() if some]
    return f"{text}: {'; '.join(parts)}." if parts else f"{text}."


def _describe_losses(rows: list[dict[str, Any]], recipes: dict[str, dict[str, Any]]) -> str:
    losses = {row["name"]: row["eval_loss"] for row in rows if isinstance(row["eval_loss"], (int, float))}
    if len(losses) < 2 or len({_evaluation_key(recipes[name]) for name in losses}) > 1:
        return "Not comparable: evaluate the runs on the same rows."
    lowest = min(losses.values())
    best = [name for name, loss in losses.items() if loss == lowest]
    text = f"{' and '.join(best)} {'has' if len(best) == 1 else 'have'} the lowest evaluation loss"
    return f"{text} ({lowest:.4g}); no rows were evaluated by all."


def _evaluation_key(recipe: dict[str, Any]) -> str:
    """Return a key of base and evaluation rows; losses of runs with the same key are comparable."""
    rows = recipe.get("data.eval")
    return json.dumps([recipe.get("base"), rows, recipe.get("rows") if str(rows).endswith("%") else None])
