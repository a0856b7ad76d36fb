"""How a recipe names its rewards."""

from __future__ import annotations

from pathlib import Path

import pytest

from strop.errors import DataError, RecipeError
from strop.evaluation.rewards import check_rewards, rewards_of


@pytest.mark.parametrize("given", ["exact_json, contains=0.2", ["exact_json", "contains=0.2"]])
def test_several_in_a_list_or_behind_commas(given: str | list[str]) -> None:
    assert [(one.name, one.weight) for one in rewards_of(given)] == [("exact_json", 1), ("contains", 0.2)]


@pytest.mark.parametrize("given", ["exact=x", "exact,exact", "choice", "exact,"])
def test_what_names_none(given: str) -> None:
    with pytest.raises(RecipeError):
        rewards_of(given)


def test_a_function_that_fails_on_right_answers_is_what_to_mend(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def own(gold, answer): return {}[gold]", encoding="utf-8")
    with pytest.raises(DataError, match="1 rows cannot be scored with") as found:
        check_rewards(rewards_of(f"{file}:own"), ["yes", None], [("rows.jsonl", 1), ("rows.jsonl", 2)])
    assert "mend own, which gets (right answer, answer)" in found.value.fix
