"""Answers of base and tuned model, blind votes, and comparisons of runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from strop.dash.answers import Votes, answers, compare, tally
from strop.dash.jobs import Busy
from strop.dash.runs import RunTable
from strop.errors import DiskError, InputError
from strop.evaluation.metrics import paired_difference, wilson_interval
from strop.runs.folder import RunFolder, write_json
from tests.support.dash import evaluated, make_run, sample, session, step

HITS = [(True, True), (True, False), (False, True), (False, False), (False, True)]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = make_run(tmp_path, "one", [*session(), step(1)], {"exit": 0})
    evaluated(folder, [sample(number, *hits) for number, hits in enumerate(HITS)])
    return RunFolder(folder)


def test_filters_and_orders(run: RunFolder) -> None:
    def rows(wanted: str = "all", order: str = "row", search: str = "") -> list[int]:
        return [row["row"] for row in answers(run, wanted, order, search, 0, 50)["rows"]]

    assert rows() == [0, 1, 2, 3, 4] and rows(order="worst") == [1, 3, 2, 4, 0]
    assert (rows("gained"), rows("lost"), rows("changed"), rows("both")) == ([2, 4], [1], [1, 2, 4], [0])
    assert (rows("wrong"), rows("right"), rows("neither"), rows(search="WHAT IS 3")) == ([1, 3], [0, 2, 4], [3], [3])
    result = answers(run, "all", "row", "", 1, 2)
    assert result["counts"] == {"all": 5, "gained": 2, "lost": 1, "both": 1, "neither": 1} and result["complete"]
    assert [row["row"] for row in result["rows"]] == [1, 2] and result["total"] == 5
    assert result["rows"][0]["marked"]["tuned"] == [
        ("it ", "same"),
        ("is", "missing"),
        ("was", "added"),
        (" 1", "same"),
    ]
    with pytest.raises(InputError):
        answers(run, "best", "row", "", 0, 50)


def test_an_older_report_has_some_rows(run: RunFolder) -> None:
    run.answers.unlink()
    report = json.loads(run.report.read_text())
    run.report.write_text(json.dumps({**report, "samples": [sample(0, True, True), "odd", {"prompt": 3}]}))
    result = answers(run, "all", "worst", "", 0, 50)
    assert not result["complete"] and result["counts"]["all"] == 2


def test_blind_vote_is_stored_by_model_and_counted_once(run: RunFolder) -> None:
    votes, won = Votes(), 0
    for _ in range(4):  # one of five rows has two equal answers
        ballot = votes.ballot(run)
        assert not {"base", "tuned", "base_hit", "tuned_hit", "kind"} & set(ballot)
        shown = votes.vote(run, ballot["ballot"], "a")
        won += shown["was"]["a"] == "tuned"
    assert votes.ballot(run)["ballot"] is None
    result = tally(run)
    assert (result["votes"], result["tuned"], result["base"]) == (4, won, 4 - won)
    assert (result["low"], result["high"]) == wilson_interval(won, 4)
    with pytest.raises(Busy):
        votes.vote(run, ballot["ballot"], "b")  # used
    evaluated(run.path, [sample(7, False, True)])  # votes on the previous answers do not count
    assert tally(run)["votes"] == 0 and tally(run)["share"] is None
    with pytest.raises(InputError):
        votes.vote(run, votes.ballot(run)["ballot"], "left")


def test_sides_are_shuffled(run: RunFolder) -> None:
    votes = Votes()
    evaluated(run.path, [sample(number, False, True) for number in range(60)])
    first = {votes.vote(run, votes.ballot(run)["ballot"], "tie")["was"]["a"] for _ in range(60)}
    assert first == {"base", "tuned"}  # the probability that only one side occurs is 2^-59


def test_votes_are_not_written_through_a_link(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (run.path / "votes.jsonl").symlink_to(tmp_path / "precious")
    votes = Votes()
    with pytest.raises(DiskError):
        votes.vote(run, votes.ballot(run)["ballot"], "a")
    assert (tmp_path / "precious").read_text() == "mine"


def test_compare_two_runs(tmp_path: Path) -> None:
    for name, good in (("low", 20), ("high", 55), ("other", 30)):
        folder = make_run(tmp_path, name, [*session(), step(1)], {"exit": 0})
        rows = [sample(number, False, number < good) for number in range(60)]
        evaluated(folder, rows if name != "other" else [{**row, "prompt": f"other {row['prompt']}"} for row in rows])
    rows = RunTable(tmp_path).rows()
    recipes = {"low": {"lora.r": 4, "seed": 0}, "high": {"lora.r": 16, "seed": 0}, "other": {"lora.r": 4, "seed": 0}}
    result = compare(rows, recipes)
    assert result["settings"] == [
        {"field": "lora.r", "values": {row["name"]: recipes[row["name"]]["lora.r"] for row in rows}}
    ]
    pairs = {frozenset((pair["a"], pair["b"])): pair for pair in result["pairs"]}
    pair = pairs[frozenset(("low", "high"))]
    hits = {"low": [n < 20 for n in range(60)], "high": [n < 55 for n in range(60)]}
    expected = paired_difference(hits[pair["a"]], hits[pair["b"]])
    assert pair["rows"] == 60 and pair["difference"]["value"] == pytest.approx(expected.value)
    assert pair["difference"]["low"] == pytest.approx(expected.low)
    assert pairs[frozenset(("low", "other"))]["difference"] is None
    assert result["verdict"].startswith(
        "high scores highest (exact 91.7%): clearly above low; not comparable with other."
    )


def test_compare_names_runs_without_evaluation(tmp_path: Path) -> None:
    for name in ("scored", "bare"):
        folder = make_run(tmp_path, name, [*session(), step(1)], {"exit": 0})
        if name == "scored":
            evaluated(folder, [sample(number, False, True) for number in range(5)])
    result = compare(RunTable(tmp_path).rows(), {"scored": {}, "bare": {}})
    assert result["pairs"] == [] and result["unevaluated"] == ["bare"]
    assert result["verdict"] == "Not comparable yet: evaluate bare, all runs on the same rows."


def test_compare_warns_of_different_answer_limits(tmp_path: Path) -> None:
    """One run was evaluated with answers of at most 24 tokens, which cut all of them."""
    for name, limit, cut in (("long", 80, 0), ("short", 24, 16)):
        folder = make_run(tmp_path, name, [*session(), step(1)], {"exit": 0})
        rows = [sample(number % 15, False, name == "long") for number in range(16)]
        evaluated(folder, rows)
        report = RunFolder(folder).read_report()
        report["evaluation"]["answers"] = {"max_tokens": limit, "references_cut": 0, "tuned_cut": cut}
        write_json(RunFolder(folder).report, report)
    result = compare(RunTable(tmp_path).rows(), {"long": {}, "short": {}})
    for part in ("long with answers of at most 80 tokens (0 of 16 cut)", "short with answers of at most 24 tokens (16"):
        assert part in result["verdict"]
    assert result["verdict"].startswith("Not a fair comparison: ") and "clearly above" not in result["verdict"]
    (pair,) = result["pairs"]
    assert pair["verdict"] == "unclear" and pair["words"].startswith("Not a fair comparison: ")
    assert "exact on 15 rows in common (of 16; 1 repeated, which count once)" in pair["words"]
    assert {item["run"]: (item["max_tokens"], item["cut"]) for item in result["scores"]} == {
        "long": (80, 0), "short": (24, 16)
    }  # fmt: skip


def verdict_of(root: Path, **hits: list[dict[str, Any]]) -> str:
    """Return the verdict on runs with these rows, in this order."""
    for name, rows in hits.items():
        evaluated(make_run(root, name, [*session(), step(1)], {"exit": 0}), rows)
    rows = {row["name"]: row for row in RunTable(root).rows()}
    return str(compare([rows[name] for name in hits], {name: {} for name in hits})["verdict"])


def rows_of(start: int, stop: int, right: int) -> list[dict[str, Any]]:
    return [sample(number, False, number < start + right) for number in range(start, stop)]


def test_best_run_is_comparable(tmp_path: Path) -> None:
    two = {"A": rows_of(0, 100, 50), "B": rows_of(0, 100, 20)}
    verdict = verdict_of(tmp_path / "1", **two, C=rows_of(200, 210, 9))
    assert verdict == "A scores highest (exact 50.0%): clearly above B; not comparable with C."
    verdict = verdict_of(tmp_path / "2", **two, C=rows_of(200, 210, 9), D=rows_of(200, 210, 8))
    assert verdict == (
        "A scores highest (exact 50.0%): clearly above B; not comparable with C, D. "
        "C scores highest (exact 90.0%): not clearly above D; not comparable with A, B."
    )
    easy = verdict_of(tmp_path / "3", A=rows_of(0, 100, 40), B=rows_of(0, 50, 30))  # A: 40 of these 50
    assert easy == "A scores highest on the rows in common: clearly above B."


def test_answer_limits_that_cut_only_the_base_are_named(tmp_path: Path) -> None:
    for name, limit in (("long", 80), ("short", 10)):
        folder = make_run(tmp_path, name, [*session(), step(1)], {"exit": 0})
        evaluated(folder, rows_of(0, 30, 9))
        report = RunFolder(folder).read_report()
        report["evaluation"]["answers"] = {"max_tokens": limit, "references_cut": 0, "base_cut": 7, "tuned_cut": 0}
        write_json(RunFolder(folder).report, report)
    result = compare(RunTable(tmp_path).rows(), {"long": {}, "short": {}})
    assert re.search("answer limits, (80 and 10|10 and 80) tokens, cut no tuned answer$", result["pairs"][0]["words"])
    assert [score["base_cut"] for score in result["scores"]] == [7, 7]
    (shown,) = answers(RunFolder(tmp_path / "short"), "all", "row", "", 0, 1)["notes"]
    assert shown.startswith("7 of 30 base answers were cut at 10 tokens")


def test_epochs_are_not_compared_with_a_run_of_a_number_of_steps(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path, name, [*session(), step(1)], {"exit": 0})
    recipes: dict[str, dict[str, Any]] = {"a": {"train.epochs": 30}, "b": {"train.epochs": 3, "train.max_steps": 5}}
    settings = {item["field"]: item["values"] for item in compare(RunTable(tmp_path).rows(), recipes)["settings"]}
    assert settings["train.epochs"] == {"a": 30, "b": None}


def test_lead_on_few_rows_is_not_called_clear(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path / "1", b=rows_of(0, 12, 9), a=rows_of(0, 12, 5))
    assert verdict == "b scores highest (exact 75.0%): above a, but only 12 rows."
    result = compare(RunTable(tmp_path / "1").rows(), {"a": {}, "b": {}})
    assert re.search(": (better|worse), but only 12 rows: .33.3 points", result["pairs"][0]["words"])


def test_vote_on_few_pairs_is_hedged(run: RunFolder) -> None:
    votes = Votes()
    while (ballot := votes.ballot(run))["ballot"]:
        tuned = answers(run, "all", "row", "", ballot["row"], 1)["rows"][0]["tuned"]
        votes.vote(run, ballot["ballot"], "a" if ballot["a"] == tuned else "b")
    words = tally(run)["words"]
    assert words.startswith("tuned is preferred, but only 4 votes: tuned won 4 of 4 (100.0%, ")


def test_equal_runs_share_the_best_score(tmp_path: Path) -> None:
    none = rows_of(0, 20, 0)
    same = "no clear difference: +0.0 points, 95 % interval -16.1 to +16.1"
    assert verdict_of(tmp_path / "1", a=none, b=none) == f"a and b score equal (exact 0.0%): {same}."
    verdict = verdict_of(tmp_path / "2", a=rows_of(0, 20, 15), b=none, c=rows_of(0, 20, 15))
    assert verdict == (
        "a and c score equal (exact 75.0%): no clear difference: +0.0 points, 95 % interval -12.1 to +12.1; "
        "clearly above b."
    )
    few = verdict_of(tmp_path / "3", a=rows_of(0, 19, 9), b=rows_of(0, 19, 9))
    assert few.startswith("a and b score equal (exact 47.4%): no clear difference, but only 19 rows: +0.0 points, ")


def test_losses_on_different_rows_are_not_compared() -> None:
    rows = [
        {"name": name, "path": "nowhere", "score": None, "eval_loss": loss} for name, loss in (("a", 1.0), ("b", 2.0))
    ]
    same, other = {"data.eval": "x.jsonl"}, {"data.eval": "y.jsonl"}
    assert compare(rows, {"a": same, "b": same})["verdict"].startswith("a has the lowest evaluation loss (1.000)")
    assert compare(rows, {"a": same, "b": other})["verdict"].startswith("Not comparable")
    parts = {"data.eval": "5%"}
    assert compare(rows, {"a": {**parts, "rows": "f"}, "b": {**parts, "rows": "g"}})["verdict"].startswith(
        "Not comparable"
    )


def test_notes_of_an_evaluation_are_shown_with_its_verdict(tmp_path: Path) -> None:
    note = "1 of 20 rows repeat an earlier one: the intervals are too narrow, as they assume different rows"
    for name in ("a", "b"):
        folder = make_run(tmp_path, name, [*session(), step(1)], {"exit": 0})
        evaluated(folder, [*rows_of(0, 19, 9), sample(0, False, True)], notes=[note] if name == "a" else [])
    assert answers(RunFolder(tmp_path / "a"), "all", "row", "", 0, 1)["notes"] == [note]
    result = compare(RunTable(tmp_path).rows(), {"a": {}, "b": {}})
    assert {score["run"]: score["notes"] for score in result["scores"]} == {"a": [note], "b": []}
    assert "on 19 rows in common (of 20; 1 repeated, which count once)" in result["pairs"][0]["words"]
