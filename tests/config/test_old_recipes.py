"""Recipes in the words of earlier versions load, and mean what they meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from strop.config.load import resolve

RECIPES = sorted((Path(__file__).parent / "recipes").glob("*.yaml"))


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    sections = {"model", "data", "lora", "train"}
    return {
        name: value
        for head, held in tree.items()
        for name, value in (
            {f"{head}.{leaf}": one for leaf, one in held.items()} if head in sections else {head: held}
        ).items()
    }


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_an_old_recipe_loads_with_each_value_as_it_stands(file: Path) -> None:
    said = flat(yaml.safe_load(file.read_text(encoding="utf-8")))
    choices = resolve(file).choices
    assert len(said) > 40
    assert {name: choices[name].value for name in said} == said
    assert all(choices[name].origin == "recipe" for name in said)
