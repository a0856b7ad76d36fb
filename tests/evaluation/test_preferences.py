"""Evaluation on pairs: preferences of base and tuned model, scores of reward models, and diagnoses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import strop
from strop.data.formats import ConversationReader
from strop.data.reading.sources import read_rows
from strop.data.row_errors import RowError
from strop.engine.train.plain import PlainLoss
from strop.evaluation.diagnosis import diagnose
from strop.evaluation.preferences import compare_preferences, summarize_rewards
from tests.support import preferences, tiny
from tests.support.runs import QUICK, run


def trained(objective: str, model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    rows, out = preferences.write_pairs(folder / "train.jsonl", 40), folder / objective
    words = ["train", "--model", model, "--data", rows, "--out", out, *QUICK, "--train.objective", objective]
    code, _, err = run(*words, "--train.learning_rate", "0.01", "--train.max_steps", "30", capsys=capsys)
    assert code == 0, err
    return out


def test_base_and_tuned_are_compared_on_pairs(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, held_out = trained("dpo", tiny_folder, tmp_path, capsys), preferences.write_pairs(tmp_path / "held.jsonl", 12)
    code, printed, err = run("eval", out, "--data", held_out, "--json", capsys=capsys)
    assert code == 0, err
    result = json.loads(printed)
    assert result["rows"] == 12 and result["metric"] == "preference"
    assert result["tuned"]["preference"] == 1.0 and result["rewards"]["accuracy"] == 1.0
    low, high = result["rewards"]["margin_interval"]
    assert low <= result["rewards"]["margin"] <= high and low > 0
    gained, lost = (len(result["changed"][name]) for name in ("gained", "lost"))
    assert gained - lost == round(12 * result["difference"]["value"])
    assert "ranked" in err and "margin" in err
    report = json.loads((out / "report.json").read_text())
    assert report["evaluation"]["tuned"] == result["tuned"] and "preference" in (out / "report.html").read_text()
    assert "preference" in (out / "adapter" / "README.md").read_text()


def test_log_probabilities_equal_the_plain_step(tiny_folder: Path, tmp_path: Path) -> None:
    bad: list[RowError] = []
    rows = list(
        ConversationReader(read_rows(str(preferences.write_pairs(tmp_path / "a.jsonl", 5)), errors=bad), errors=bad)
    )
    model = strop.load(tiny_folder, dtype="fp32")
    result = compare_preferences(model, rows)
    plain, hits, total, tokens = PlainLoss(model.module), 0, 0.0, 0
    with torch.no_grad():
        for row in rows:
            (chosen,), (rejected,) = (model.renderer.render(side) for side in row.sides)
            losses = [float(plain.token_loss([example])) for example in (chosen, rejected)]
            hits += losses[0] / chosen.supervised < losses[1] / rejected.supervised
            total, tokens = total + losses[0], tokens + chosen.supervised
    assert result["base"]["preference"] == hits / 5 and "tuned" not in result
    assert result["base"]["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_reward_model_is_evaluated_by_its_scores(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, held_out = (
        trained("reward", tiny_folder, tmp_path, capsys),
        preferences.write_pairs(tmp_path / "held.jsonl", 12),
    )
    code, printed, err = run("eval", out, "--data", held_out, "--json", capsys=capsys)
    assert code == 0, err
    result = json.loads(printed)
    assert [row["place"] for row in result["samples"]] == [f"{held_out}:{line}" for line in range(1, 13)]
    assert result["tuned"]["preference"] == 1.0 and "base" not in result and result["rewards"]["margin"] > 0
    assert "AutoModelForSequenceClassification" in (out / "adapter" / "README.md").read_text()
    code, printed, err = run("eval", out, out, "--data", held_out, "--json", capsys=capsys)
    assert code == 0, err
    assert [(line["score"], line["loss"]) for line in json.loads(printed)["leaderboard"]] == [(1.0, None)] * 2


def test_options_that_pairs_do_not_allow_are_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, turns = preferences.write_pairs(tmp_path / "a.jsonl", 4), tiny.write_rows(tmp_path / "b.jsonl", 4)
    labelled = preferences.write_labelled(tmp_path / "c.jsonl", 4)
    for words, message in (
        ([pairs, "--metric", "contains"], "--metric preference"),
        ([pairs, "--metric", "exact"], "--metric preference"),
        ([turns, "--metric", "preference"], "not pairs"),
        ([labelled], "labelled good or bad"),
        ([pairs, "--data", turns], "pairs and other rows"),
        ([pairs, "--general"], "--general"),
    ):
        code, _, err = run("eval", tiny_folder, "--data", *words, capsys=capsys)
        assert code == 2 and message in err, err


def test_rewards_have_intervals() -> None:
    result = summarize_rewards([(1.0, 0.0), (3.0, 0.0), (0.0, 1.0), (2.0, 0.0)])
    assert result["accuracy"] == 0.75 and result["margin"] == 1.25
    assert result["accuracy_interval"][0] < 0.75 < result["accuracy_interval"][1]
    assert summarize_rewards([(1.0, 0.0)])["margin_interval"] is None


def test_chosen_answers_that_become_less_likely_are_reported() -> None:
    events = [
        {"event": "step", "step": n, "loss": 0.69 - 0.01 * n, "chosen_change": -0.01 * n, "rejected_change": -0.03 * n}
        for n in range(1, 41)
    ]
    assert any("became less likely too, by 0.36 nats" in finding for finding in diagnose(events, 0.1))
    for event in events:
        event["chosen_change"] = 0.01
    assert not any("less likely" in finding for finding in diagnose(events, 0.1))


def test_policy_is_diagnosed_by_its_rewards() -> None:
    def findings(**figures: Any) -> list[str]:
        steps = [
            {
                "event": "step",
                "step": n,
                "loss": 0.0,
                "stop_rate": 1.0,
                "equal_groups": 0.2,
                "reward": 0.1 + 0.01 * (n % 3),
            }
            | {name: value(n) for name, value in figures.items()}
            for n in range(40)
        ]
        return diagnose(steps, 0.1)

    assert findings(reward=lambda n: 0.1 + 0.01 * n) == []
    assert "its noise" in findings()[0]
    assert "equal rewards" in findings(equal_groups=lambda n: 1.0)[0]
    assert "answer_tokens" in findings(stop_rate=lambda n: 0.0)[0]
    rising = findings(stop_rate=lambda n: 0.96, reward=lambda n: 0.1 + 0.01 * n)
    assert rising == ["4.0% of the completions were cut off; train.answer_tokens sets the limit"]
