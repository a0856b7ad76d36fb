"""How a recipe names its rewards."""

from __future__ import annotations

import pytest

from strop.errors import RecipeError
from strop.evaluation.rewards import rewards_of


@pytest.mark.parametrize("given", ["exact_json, contains=0.2", ["exact_json", "contains=0.2"]])
def test_several_in_a_list_or_behind_commas(given: str | list[str]) -> None:
    assert [(one.name, one.weight) for one in rewards_of(given)] == [("exact_json", 1), ("contains", 0.2)]


@pytest.mark.parametrize("given", ["exact=x", "exact,exact", "choice", "exact,"])
def test_what_names_none(given: str) -> None:
    with pytest.raises(RecipeError):
        rewards_of(given)
