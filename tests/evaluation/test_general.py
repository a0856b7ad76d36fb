"""The general set: the answers its rows accept, and the reported change."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import strop
from strop.data.rendering.render import Renderer
from strop.evaluation.general import compare_general, load_questions
from strop.evaluation.metrics import describe_cut, describe_general, paired_difference
from tests.support import tiny
from tests.support.families import tokenizer
from tests.support.runs import run


def test_set_has_ten_kinds_of_questions_with_valid_patterns() -> None:
    general = load_questions()
    assert len(general) == 340 and len({row.messages for row in general}) == len(general)
    assert set(Counter(row.kind for row in general).values()) == {34}
    for row in general:
        re.compile(row.pattern)
        assert row.messages[-1].role == "user" and not re.search(row.pattern, "")
        assert row.kind == "instructions" or not re.search(row.pattern, '{"intent": "GetWeather", "timeRange": "soon"}')


GOOD_AND_BAD = {
    "What is the capital of France?": ("The capital of France is Paris.", "It is Lyon."),
    "What is my name?": ("Your name is Anna.", "I do not know."),
    "Why is the sky blue?": ("Because air scatters blue light.", '{"intent": "Weather", "colour": "blue"}'),
    "Count from one to five in digits.": ("1, 2, 3, 4, 5", "5, 4, 3, 2, 1"),
    "Put these numbers in rising order: 9, 2, 5.": ("2, 5, 9", "9, 5, 2"),
    "What is the freezing point of water in degrees Celsius?": ("It is 0 degrees.", "It is 100 degrees."),
}


@pytest.mark.parametrize("question", GOOD_AND_BAD)
def test_patterns_accept_good_answers_and_reject_bad_ones(question: str) -> None:
    row = next(row for row in load_questions() if row.messages[-1].content == question)
    good, bad = GOOD_AND_BAD[question]
    assert re.search(row.pattern, good) and not re.search(row.pattern, bad)


def test_copying_and_arithmetic_accept_only_the_exact_answer() -> None:
    for row in load_questions():
        prompt = row.messages[-1].content
        if prompt.startswith("Repeat exactly: "):
            words = prompt.removeprefix("Repeat exactly: ")
            assert re.search(row.pattern, words) and not re.search(row.pattern, " ".join(reversed(words.split())))
        if row.kind == "arithmetic" and len(parts := re.findall(r"\d+|plus|minus|times", prompt)) == 3:
            a, operation, b = parts
            value = {"plus": int(a) + int(b), "minus": int(a) - int(b), "times": int(a) * int(b)}[operation]
            assert re.search(row.pattern, f"It is {value}.") and not re.search(row.pattern, f"It is {value}1.")


def test_general_set_is_compared_and_stored_in_the_report(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, few_questions: int, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = strop.train(model=str(tiny_folder), data=str(rows_file), out=tmp_path / "r", train={"max_steps": 2})
    held_out = tiny.write_rows(tmp_path / "held.jsonl", 3)
    words = ["--data", held_out, "--max-new-tokens", "2", "--general", "--json"]
    code, out, err = run("eval", trained.folder, *words, capsys=capsys)
    assert code == 0 and "on the general set: " in err
    result = json.loads(out)["general"]
    assert result["rows"] == few_questions == sum(kind["rows"] for kind in result["kinds"].values())
    assert result["difference"]["value"] == pytest.approx(result["tuned"] - result["base"])
    assert json.loads((trained.folder / "report.json").read_text())["general"] == result
    page = (trained.folder / "report.html").read_text()
    assert "General abilities" in page and "exact over the general set, before and after" in page
    code, _, err = run("eval", tiny_folder, "--data", held_out, "--general", capsys=capsys)
    assert code == 2 and "nothing to compare" in err


class Fake:
    """A model that loses plain text."""

    def __init__(self, renderer: Any) -> None:
        self.renderer = renderer

    def answer(self, prompts: Any, *, both: bool, **options: Any) -> Any:
        assert both
        texts = ["This is plain text, said well."] * len(prompts) + ['{"intent": "x"}'] * len(prompts)
        return [SimpleNamespace(text=text, stopped=text[0] == "{") for text in texts]


def test_questions_with_system_prompts_are_left_out_where_the_template_has_none() -> None:
    result = compare_general(Fake(Renderer(tokenizer("gemma"))))  # type: ignore[arg-type]
    assert result["rows"] == 306 and len(result["kinds"]) == 9 and "system prompts" not in result["kinds"]


def test_model_that_answers_only_in_json_loses_plain_text() -> None:
    result = compare_general(Fake(SimpleNamespace(prompt=lambda messages: messages)))  # type: ignore[arg-type]
    kind = result["kinds"]["plain text"]
    assert (kind["rows"], kind["base"], kind["tuned"], kind["difference"]["value"]) == (34, 1.0, 0.0, -1.0)
    assert result["answers"] == {"max_tokens": 48, "references_cut": 0, "base_cut": 340, "tuned_cut": 0}
    assert describe_cut(result) == ["340 of 340 base answers were cut at 48 tokens or the model's context"]
    assert result["difference"]["high"] < 0 and len(result["lost"]) >= 20


def test_verdict_lists_kinds_when_a_gain_hides_a_loss() -> None:
    def kind(before: int, after: int) -> dict[str, Any]:
        pairs = [[number < hits for number in range(20)] for hits in (before, after)]
        return {"rows": 20, "difference": vars(paired_difference(*pairs))}

    hidden = {"difference": vars(paired_difference([True, False], [False, True]))}
    kinds = {"facts": kind(15, 2), "memory": kind(3, 18), "copying": kind(10, 11)}
    assert "no clear difference" in describe_general({**hidden, "kinds": kinds})
    assert describe_general({**hidden, "kinds": kinds}).endswith("by kind: worse at facts; better at memory")
    assert "by kind" not in describe_general({**hidden, "kinds": {"copying": kind(10, 11)}})
