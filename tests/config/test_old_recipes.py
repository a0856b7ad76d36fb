"""Recipes of earlier versions load with the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from strop.config.load import resolve

RECIPES = sorted((Path(__file__).parent / "recipes").glob("*.yaml"))


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for head, value in tree.items():
        is_section = head in {"model", "data", "lora", "train"}
        flat |= {f"{head}.{leaf}": inner for leaf, inner in value.items()} if is_section else {head: value}
    return flat


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_old_recipe_loads_with_unchanged_values(file: Path) -> None:
    values = flatten(yaml.safe_load(file.read_text(encoding="utf-8")))
    choices = resolve(file).choices
    assert len(values) > 40
    assert {name: choices[name].value for name in values} == values
    assert all(choices[name].origin == "recipe" for name in values)
