"""The answers of the base and the tuned model, blind votes between them, and comparisons of runs."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, NamedTuple

from strop.dash.files import read_bytes, read_json
from strop.dash.jobs import Busy
from strop.dash.runs import evaluation_score
from strop.display.numbers import format_percent
from strop.errors import DiskError, InputError
from strop.evaluation.metrics import (
    describe_change,
    describe_few,
    format_number,
    format_score,
    list_notes,
    mark_differences,
    paired_difference,
    wilson_interval,
)
from strop.runs.folder import RunFolder

FILTERS = ("all", "gained", "lost", "changed", "both", "neither", "wrong", "right")
VOTES = "votes.jsonl"
MAX_PAGE_ROWS = 500
MAX_BALLOTS = 1000
MAX_MARKED_CHARACTERS = 4000  # differences of longer answers are not highlighted


class Lead(NamedTuple):
    """How far a run scores above another one on their common rows."""

    value: float
    low: float  # lower end of the interval
    rows: int


Leads = dict[str, dict[str, Lead]]  # by run and other run


def answers(folder: RunFolder, filter_: str, order: str, search: str, offset: float, count: float) -> dict[str, Any]:
    """Return a page of rows of the last evaluation. order: "row", or "worst" for the rows that got worse first."""
    if filter_ not in FILTERS or order not in ("row", "worst"):
        raise InputError(f"filter is one of {', '.join(FILTERS)}; order is row or worst")
    report = read_json(folder.report)
    all_rows, complete = _rows(folder, report)
    all_kinds = [row["kind"] for row in all_rows]
    counts = {kind: all_kinds.count(kind) for kind in ("gained", "lost", "both", "neither")}
    groups = {
        "changed": ("gained", "lost"), "wrong": ("lost", "neither", "wrong"), "right": ("gained", "both", "right")
    }  # fmt: skip
    rows = [row for row in all_rows if filter_ == "all" or row["kind"] in groups.get(filter_, (filter_,))]
    if search:
        text = search.casefold()
        rows = [row for row in rows if any(text in str(row.get(key) or "").casefold() for key in _SEARCHED)]
    if order == "worst":
        rank = {"lost": 0, "wrong": 0, "neither": 1, "gained": 2, "both": 3}
        rows.sort(key=lambda row: rank.get(row["kind"], 4))
    score, start = evaluation_score(report), max(0, int(offset))
    return {
        "evaluation": report.get("evaluation"), "intervals": report.get("intervals"),
        "words": score["words"] if score else None, "notes": list_notes(report["evaluation"]) if score else [],
        "complete": complete, "counts": {"all": len(all_rows), **counts}, "total": len(rows),
        "rows": [_mark_answers(row) for row in rows[start : start + min(max(0, int(count)), MAX_PAGE_ROWS)]],
    }  # fmt: skip


_SEARCHED = ("prompt", "gold", "base", "tuned", "chosen", "rejected", "place")


def _rows(folder: RunFolder, report: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """Return rows of the last evaluation, and whether all rows are there, since report.json has only a few."""
    samples = read_json(folder.answers).get("samples")
    complete = isinstance(samples, list)
    if not complete:
        samples = report.get("samples")
    rows = []
    for index, sample in enumerate(samples if isinstance(samples, list) else []):
        if not isinstance(sample, dict):
            continue
        base_hit, tuned_hit, kind = sample.get("base_hit"), sample.get("tuned_hit"), ""
        if isinstance(base_hit, bool) and isinstance(tuned_hit, bool):
            kind = ("both" if tuned_hit else "lost") if base_hit else "gained" if tuned_hit else "neither"
        elif isinstance(tuned_hit, bool):  # of a classifier or reward model, which has no base
            kind = "right" if tuned_hit else "wrong"
        rows.append({**sample, "row": index, "kind": kind})
    return rows, complete


def _mark_answers(row: dict[str, Any]) -> dict[str, Any]:
    """Add field `marked`: both answers as (text, kind) pieces that are equal to the reference, added or missing."""
    gold, marked = row.get("gold"), {}
    for model in ("base", "tuned"):
        if isinstance(answer := row.get(model), str):
            comparable = isinstance(gold, str) and len(gold) + len(answer) <= MAX_MARKED_CHARACTERS
            marked[model] = mark_differences(str(gold), answer) if comparable else [(answer, "same")]
    return {**row, "marked": marked}


class Votes:
    """Blind votes between answers of the base and the tuned model, stored in the run folder.

    Only this object knows which model gave answer a of an open ballot.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, tuple[str, dict[str, Any], str]] = OrderedDict()  # folder, row, model of answer a

    def ballot(self, folder: RunFolder) -> dict[str, Any]:
        """Return a random pair of different answers without a vote; `ballot` is None if all pairs have votes."""
        pairs = _different_pairs(folder)
        voted = {vote["key"] for vote in _read_votes(folder)}
        remaining = [row for row in pairs if row["key"] not in voted]
        result: dict[str, Any] = {"tally": tally(folder), "left": len(remaining), "pairs": len(pairs), "ballot": None}
        if not remaining:
            return result
        row, name = secrets.choice(remaining), secrets.token_urlsafe(12)
        model_a = secrets.choice(("base", "tuned"))
        self._open[name] = (str(folder.path), row, model_a)
        while len(self._open) > MAX_BALLOTS:
            self._open.popitem(last=False)
        shown = {"prompt": row.get("prompt"), "gold": row.get("gold"), "a": row[model_a], "b": row[_OTHER[model_a]]}
        return {**result, "ballot": name, "row": row["row"], **shown}

    def vote(self, folder: RunFolder, ballot: str, choice: str) -> dict[str, Any]:
        """Store a vote: a, b or tie. Raises Busy for a ballot that was used or is from before a restart."""
        if choice not in ("a", "b", "tie"):
            raise InputError(f"choice: {choice}", fix="a, b or tie")
        path, row, model_a = self._open.pop(ballot, ("", {}, ""))
        if path != str(folder.path):
            raise Busy("this ballot is no longer open", fix="ask for a new one")
        models = {"a": model_a, "b": _OTHER[model_a]}
        line = {"time": round(time.time(), 3), "row": row["row"], "key": row["key"], "a": model_a}
        _append(folder.path / VOTES, {**line, "choice": models.get(choice, "tie")})
        return {"was": models, "tally": tally(folder)}


_OTHER = {"base": "tuned", "tuned": "base"}


def tally(folder: RunFolder) -> dict[str, Any]:
    """Count the last votes on the current answers. The share of the tuned model is among votes that are not ties."""
    keys = {row["key"] for row in _different_pairs(folder)}
    choices = list({vote["key"]: vote["choice"] for vote in _read_votes(folder) if vote["key"] in keys}.values())
    tuned, base, ties = (choices.count(choice) for choice in ("tuned", "base", "tie"))
    result: dict[str, Any] = {"votes": len(choices), "tuned": tuned, "base": base, "ties": ties}
    decided = tuned + base
    if not decided:
        return {**result, "share": None, "low": None, "high": None, "words": "no decided votes yet"}
    low, high = wilson_interval(tuned, decided)
    verdict = "tuned is preferred" if low > 0.5 else "base is preferred" if high < 0.5 else "no clear preference"
    share = tuned / decided
    few = describe_few(decided, "vote") if verdict != "no clear preference" else ""
    words = f"{verdict}{few}: tuned won {tuned} of {decided} ({format_percent(share)}, "
    words += f"95 % interval {format_percent(low)} to {format_percent(high)})"
    return {**result, "share": share, "low": low, "high": high, "words": words}


def _different_pairs(folder: RunFolder) -> list[dict[str, Any]]:
    """Return rows whose two answers differ, each with a key derived from its prompt and its answers."""
    pairs = []
    for row in _rows(folder, read_json(folder.report))[0]:
        base, tuned = row.get("base"), row.get("tuned")
        if isinstance(base, str) and isinstance(tuned, str) and base != tuned:
            text = json.dumps([row.get("prompt"), row.get("gold"), base, tuned])
            pairs.append({**row, "key": hashlib.sha256(text.encode()).hexdigest()[:16]})
    return pairs


def _read_votes(folder: RunFolder) -> Iterator[dict[str, Any]]:
    for line in read_bytes(folder.path / VOTES).split(b"\n"):
        try:
            vote = json.loads(line)
        except ValueError:
            continue
        has_key = isinstance(vote, dict) and isinstance(vote.get("key"), str)
        if has_key and vote.get("choice") in ("base", "tuned", "tie"):
            yield vote


def _append(file: Path, value: dict[str, Any]) -> None:
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(file, flags, 0o644), "a", encoding="utf-8") as out:
            out.write(json.dumps(value) + "\n")
    except OSError as error:
        raise DiskError(f"{file}: cannot be written: {error.strerror}", fix="free some space, and vote again") from None


def compare(rows: list[dict[str, Any]], recipes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare the settings and scores of runs, and each pair on its common rows. rows: the runs in the table."""
    names = [row["name"] for row in rows]
    fields = dict.fromkeys(field for name in names for field in recipes[name])
    settings = []
    for field in fields:
        values = {name: recipes[name].get(field) for name in names}
        if field == "train.epochs":  # train.max_steps replaces it
            values = {name: None if recipes[name].get("train.max_steps") else values[name] for name in names}
        if field != "out" and len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            settings.append({"field": field, "values": values})
    evaluations = {row["name"]: _read_evaluation(RunFolder(Path(row["path"]))) for row in rows}
    evaluated = [name for name in names if evaluations[name].metric]
    pairs = [_compare_pair(evaluations[a], evaluations[b], a, b, recipes) for a, b in combinations(evaluated, 2)]
    scores = [
        {
            "run": name, **(row["score"] or {}), "loss": row["eval_loss"], "notes": evaluations[name].notes,
            **evaluations[name].limits,
        }
        for name, row in zip(names, rows, strict=True)
    ]  # fmt: skip
    unevaluated = [name for name in names if name not in evaluated]
    verdict = _describe_comparison(rows, pairs, recipes)
    if unevaluated and verdict.startswith("Not comparable"):
        verdict = f"Not comparable yet: evaluate {' and '.join(unevaluated)}, all runs on the same rows."
    elif unevaluated and evaluated:
        verdict = f"{verdict} Not evaluated: {', '.join(unevaluated)}."
    return {
        "runs": rows, "settings": settings, "scores": scores, "pairs": pairs, "verdict": verdict,
        "unevaluated": unevaluated, "evaluate": evaluations[evaluated[0]].options if evaluated else {},
    }  # fmt: skip


@dataclass(frozen=True)
class _Evaluation:
    """The last evaluation of a run."""

    metric: str  # "" without an evaluation
    hits: dict[str, bool]  # whether the tuned model is right on each different row
    rows: int  # with repeated rows
    notes: list[str]
    limits: dict[str, Any]  # max_tokens of an answer, and how many answers of both models were cut
    settings: dict[str, Any]  # of the loaded model
    options: dict[str, Any]  # with which another run is evaluated in the same way


def _read_evaluation(folder: RunFolder) -> _Evaluation:
    report = read_json(folder.report)
    evaluation = report.get("evaluation") or {}
    rows = [row for row in _rows(folder, report)[0] if isinstance(row.get("tuned_hit"), bool)]
    hits = {
        json.dumps([row.get(name) for name in ("prompt", "gold", "chosen", "rejected")]): row["tuned_hit"]
        for row in rows
    }
    limit = evaluation.get("answers") or {}
    limits = {"max_tokens": limit.get("max_tokens"), "cut": limit.get("tuned_cut"), "base_cut": limit.get("base_cut")}
    settings = {name: evaluation.get(name) for name in ("quantization", "dtype")}
    metric = str(evaluation.get("metric") or "")
    files = {str(row.get("place")).rpartition(":")[0] for row in rows}
    options: dict[str, Any] = {"data": next(iter(files), "") if len(files) == 1 else ""}
    options["metric"] = evaluation.get("metric_spec") or metric
    options["max_new_tokens"] = limits["max_tokens"]
    notes = list_notes(evaluation) if metric else []
    return _Evaluation(metric, hits, len(rows), notes, limits, settings, options)


def _why_unfair(
    a: _Evaluation, b: _Evaluation, names: tuple[str, str], recipes: dict[str, dict[str, Any]]
) -> list[str]:
    """Return how the evaluations of two runs differ, apart from what differs between the runs themselves."""
    reasons = []
    limits = [evaluation.limits for evaluation in (a, b)]
    if limits[0]["max_tokens"] != limits[1]["max_tokens"] and any(limit["cut"] for limit in limits):
        parts = (
            f"{name} with answers of at most {limit['max_tokens']} tokens ({limit['cut'] or 0} of {it.rows} cut)"
            for name, limit, it in zip(names, limits, (a, b), strict=True)
        )
        reasons.append(" and ".join(parts))
    for setting in ("quantization", "dtype"):
        values = [evaluation.settings[setting] for evaluation in (a, b)]
        trained = {json.dumps(recipes[name].get(f"model.{setting}")) for name in names}
        if values[0] != values[1] and len(trained) == 1:
            reasons.append(f"{names[0]} with {setting} {values[0]} and {names[1]} with {values[1]}")
    return reasons


def _compare_pair(
    of_a: _Evaluation, of_b: _Evaluation, a: str, b: str, recipes: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    (metric, hits_a), (metric_b, hits_b) = (of_a.metric, of_a.hits), (of_b.metric, of_b.hits)
    common = sorted(hits_a.keys() & hits_b.keys())
    result: dict[str, Any] = {"a": a, "b": b, "rows": len(common), "difference": None, "verdict": "unclear"}
    if not common or metric != metric_b:
        no_rows = "no rows in common: evaluate both on the same data"
        why = no_rows if metric == metric_b else f"{metric} against {metric_b}"
        return {**result, "words": f"{a} and {b} cannot be compared: {why}"}
    difference = vars(paired_difference([hits_a[key] for key in common], [hits_b[key] for key in common]))
    kind, words = describe_change({"difference": difference, "rows": len(common)})
    repeated = max(of_a.rows - len(hits_a), of_b.rows - len(hits_b))
    repeats = f" (of {max(of_a.rows, of_b.rows):,}; {repeated:,} repeated, which count once)" if repeated else ""
    text = f"{b} against {a}, {metric} on {len(common):,} rows in common{repeats}: {words}"
    if unfair := _why_unfair(of_a, of_b, (a, b), recipes):
        text = f"Not a fair comparison: {'; '.join(unfair)}. {text}"
        return {**result, "unfair": unfair, "words": text}
    limits = [it.limits["max_tokens"] for it in (of_a, of_b)]
    if limits[0] != limits[1]:
        text += f"; their answer limits, {limits[0]} and {limits[1]} tokens, cut no tuned answer"
    return {**result, "difference": difference, "verdict": kind, "words": text}


def _describe_comparison(
    rows: list[dict[str, Any]], pairs: list[dict[str, Any]], recipes: dict[str, dict[str, Any]]
) -> str:
    """Describe which runs score highest, above which runs clearly, and which runs are not comparable."""
    scores = {row["name"]: row["score"] for row in rows if row["score"]}
    leads: Leads = {name: {} for name in scores}
    unfair = dict.fromkeys(reason for pair in pairs for reason in pair.get("unfair", ()))
    warning = f"Not a fair comparison: evaluated were {'; '.join(unfair)}. " if unfair else ""
    caveats = [f"{name}: {score['caveat']}" for name, score in scores.items() if score["caveat"]]
    for pair in pairs:
        a, b, difference = pair["a"], pair["b"], pair["difference"]
        if difference and a in scores and b in scores:
            leads[a][b] = Lead(-difference["value"], -difference["high"], pair["rows"])
            leads[b][a] = Lead(difference["value"], difference["low"], pair["rows"])
    if not any(leads.values()):
        return f"{warning}{_describe_losses(rows, recipes)}"
    best = [name for name, others in leads.items() if others and min(others.values()).value >= 0]
    sentences = []
    while best:  # runs that are not comparable with each other may each be the best of their group
        equal = [best[0], *(name for name in best if name in leads[best[0]])]
        sentences.append(_describe_best(equal, leads, scores, [row["name"] for row in rows]))
        best = [name for name in best if name not in equal]
    sentences = sentences or ["No run is above all others: see the pairs."]
    return warning + " ".join(
        [*sentences, *([f"No test of what it learned: {'; '.join(caveats)}."] if caveats else [])]
    )


def _describe_best(equal: list[str], leads: Leads, scores: dict[str, dict[str, Any]], names: list[str]) -> str:
    """Describe how the best runs, which score equal, compare with all runs in `names`."""
    first, others = scores[equal[0]], [name for name in leads[equal[0]] if name not in equal]
    text = f"{equal[0]} scores highest" if len(equal) == 1 else f"{' and '.join(equal)} score equal"
    are_equal = all(scores[name]["value"] == first["value"] for name in equal)
    if are_equal and all(scores[name]["value"] <= first["value"] for name in others):
        text += f" ({first['metric']} {format_score(first['metric'], first['value'])})"
    else:  # some runs have additional rows
        text += " on the rows in common"
    groups: dict[tuple[str, str], list[str]] = {}  # by relation, and by a caveat on few rows
    for name in others:
        lead = min((leads[best].get(name, Lead(0, 0, 0)) for best in equal), key=lambda lead: lead.low)
        few = describe_few(lead.rows) if lead.low > 0 else ""
        relation = "not clearly above" if lead.low <= 0 else "above" if few else "clearly above"
        groups.setdefault((relation, few), []).append(name)
    if rest := [name for name in names if name not in (*equal, *others)]:
        groups["not comparable with", ""] = rest
    parts = [f"{relation} {', '.join(runs)}{few}" for (relation, few), runs in groups.items()]
    if len(equal) > 1:  # the widest of their intervals
        a, b = min(permutations(equal, 2), key=lambda pair: leads[pair[0]].get(pair[1], Lead(0, 0, 0)).low)
        lead = leads[a].get(b, Lead(0, 0, 0))
        difference = {"value": 0.0, "low": lead.low, "high": -leads[b].get(a, Lead(0, 0, 0)).low}
        parts.insert(0, describe_change({"difference": difference, "rows": lead.rows})[1])
    return f"{text}: {'; '.join(parts)}." if parts else f"{text}."


def _describe_losses(rows: list[dict[str, Any]], recipes: dict[str, dict[str, Any]]) -> str:
    losses = {row["name"]: row["eval_loss"] for row in rows if isinstance(row["eval_loss"], (int, float))}
    if len(losses) < 2 or len({_evaluation_key(recipes[name]) for name in losses}) > 1:
        return "Not comparable: evaluate the runs on the same rows, with the same settings."
    lowest = min(losses.values())
    best = [name for name, loss in losses.items() if loss == lowest]
    text = f"{' and '.join(best)} {'has' if len(best) == 1 else 'have'} the lowest evaluation loss"
    advice = "To compare answers, evaluate the runs on the same rows, with the same settings."
    return f"{text} ({format_number('loss', lowest)}). {advice}"


def _evaluation_key(recipe: dict[str, Any]) -> str:
    """Return a key of the base model and the evaluation rows. Losses of runs with equal keys are comparable."""
    rows = recipe.get("data.eval")
    return json.dumps([recipe.get("base"), rows, recipe.get("rows") if str(rows).endswith("%") else None])
