"""Parsing of --over: choices, ranges, names of fields, and refusals."""

from __future__ import annotations

from typing import Any

import pytest

from strop.config.load import resolve
from strop.errors import RecipeError
from strop.sweeping.space import MAX_CORNERS, as_yaml, corners, format_setting, grid, make_space, read_over

RESOLVED = resolve(None, {"model.name": "m", "data.train": "d.jsonl"})


def space(*texts: str) -> list[dict[str, Any]]:
    return [{"field": dimension.field, **dimension.as_json()} for dimension in make_space(read_over(texts), RESOLVED)]


@pytest.mark.parametrize(
    ("text", "field", "choices"),
    [
        ("lora.r=8,16,32", "lora.r", [8, 16, 32]),
        ("r=8, 16", "lora.r", [8, 16]),
        ("rank=8,16", "lora.r", [8, 16]),
        ("lr=1e-4,2e-4", "train.learning_rate", [1e-4, 2e-4]),
        ("batch-size=4,8", "train.batch_size", [4, 8]),
        ("batch_size=4,8", "train.batch_size", [4, 8]),
        ("lora.target_modules=attention,all-linear", "lora.target_modules", ["attention", "all-linear"]),
        (
            'lora.target_modules=["attention", ["q_proj", "v_proj"]]', "lora.target_modules",
            ["attention", ["q_proj", "v_proj"]],
        ),
        ("lora.use_dora=true,false", "lora.use_dora", [True, False]),
        ("train.lr_scheduler=cosine,constant", "train.lr_scheduler", ["cosine", "constant"]),
        ("lora.alpha=none,16", "lora.alpha", [None, 16.0]),
        ("seed=0,1,2", "seed", [0, 1, 2]),
        ("model.quantization=none,nf4", "model.quantization", ["none", "nf4"]),
    ],
)  # fmt: skip
def test_choices_are_read_as_the_recipe_reads_them(text: str, field: str, choices: list[Any]) -> None:
    assert space(text) == [{"field": field, "choices": choices}]


@pytest.mark.parametrize(
    ("text", "low", "high", "log", "integer"),
    [
        ("train.learning_rate=1e-4..1e-3", 1e-4, 1e-3, True, False),
        ("lr=1e-4 .. 5e-4", 1e-4, 5e-4, False, False),
        ("lora.dropout=0..0.2", 0, 0.2, False, False),
        ("lora.r=4..64", 4, 64, True, True),
        ("lora.r=8..32", 8, 32, False, True),
        ("train.epochs=1..3", 1, 3, False, False),
    ],
)
def test_ranges_are_logarithmic_from_a_factor_of_ten(
    text: str, low: float, high: float, log: bool, integer: bool
) -> None:
    [dimension] = space(text)
    del dimension["field"]
    assert dimension == {"low": low, "high": high, "log": log, "integer": integer}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["lora.rr=1,2"], "lora.rr: no such recipe field (did you mean lora.r?)"),
        (["learningrate=1,2"], "did you mean train.learning_rate?"),
        (["lora.r"], "not a field and its values"),
        (["lora.r="], "not a field and its values"),
        (["lora.r=8"], "fewer than two values"),
        (["lora.r=8,8"], "8 is given twice"),
        (["lora.r=0,8"], "--over lora.r=0: must be at least 1 (got '0')"),
        (["lora.r=8,many"], "--over lora.r=many: must be a whole number"),
        (["lora.r=8..4"], "the first number is not below the second"),
        (["lora.r=0..4"], "must be at least 1"),
        (["lora.r=1.5..4"], "must be a whole number"),
        (["model.quantization=1..4"], "must be none, nf4"),
        (["model.revision=1..4"], "must be text"),
        (["lora.r=[8,"], "not a JSON list"),
        (["lora.r=8,16", "rank=4,2"], "--over lora.r: given twice"),
        (["out=a,b"], "out: cannot be swept: every trial has its own folder"),
        (["data=a,b"], "data.train: cannot be swept"),
        (["eval=a,b"], "data.eval: cannot be swept"),
        (["track=wandb,trackio"], "it does not change the results"),
        ([], "--over is required"),
    ],
)
def test_wrong_values_are_refused_by_name(texts: list[str], expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        space(*texts)
    assert expected in "\n".join(error.value.lines()) and error.value.fix


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (8, "neither a list of choices nor a range"),
        ((1e-4,), "not a range of two numbers"),
        ((1, 2, 3), "not a range of two numbers"),
        ((True, 2), "not a range of two numbers"),
        ((1.0, float("inf")), "not a range of two numbers"),
        ({"low": 1}, "neither a list"),
    ],
)
def test_wrong_values_in_python_are_refused(values: Any, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        make_space({"lora.r": values}, RESOLVED)


def test_values_that_contradict_the_recipe_are_refused() -> None:
    with pytest.raises(RecipeError, match="larger than"):
        make_space({"train.micro_batch": [4, 16]}, RESOLVED)


def test_grid_has_every_combination() -> None:
    dimensions = make_space({"lora.r": [8, 16], "train.lr_scheduler": ["cosine", "linear", "constant"]}, RESOLVED)
    settings = list(grid(dimensions))
    assert len(settings) == 6 and settings[1] == {"lora.r": 8, "train.lr_scheduler": "linear"}


def test_corners_of_a_large_space_are_limited_and_have_all_extremes() -> None:
    over = {field: list(range(1, 40)) for field in ("lora.r", "train.batch_size", "train.max_steps")}
    settings = corners(make_space(over, RESOLVED))
    assert len(settings) == MAX_CORNERS
    assert {"lora.r": 39, "train.batch_size": 39, "train.max_steps": 39} in settings


def test_settings_as_text_and_as_a_recipe() -> None:
    setting = {"lora.r": 8, "train.learning_rate": 3e-4, "lora.target_modules": ["q_proj"]}
    assert format_setting(setting) == 'lora.r 8, learning_rate 0.0003, lora.target_modules ["q_proj"]'
    assert as_yaml({"lora.r": 8, "seed": 1}) == "lora:\n  r: 8\nseed: 1\n"
