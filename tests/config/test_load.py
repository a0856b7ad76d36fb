"""Recipes: layers, origins, and errors for invalid keys and values."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import yaml

from strop.config.load import Choice, parse_option, read_resolved, resolve
from strop.config.schema import Recipe, option_fields
from strop.errors import RecipeError

MINIMAL = {"model": "demo", "data": "rows.jsonl"}


def test_later_layers_win_and_origins_are_recorded(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {name: other}\ndata: {train: rows.jsonl}\npreset: low-memory\nlora: {r: 4}\nseed: 7\n")
    resolved = resolve(file, {"model": "demo", "train.epochs": "2"})
    recipe, origin = resolved.recipe, {name: choice.origin for name, choice in resolved.choices.items()}
    assert (recipe.model.name, origin["model.name"]) == ("demo", "option")
    assert (recipe.lora.r, origin["lora.r"]) == (4, "recipe")
    assert (recipe.lora.target_modules, origin["lora.target_modules"]) == ("attention", "preset")
    assert (recipe.train.epochs, origin["train.epochs"]) == (2.0, "option")
    assert (recipe.train.batch_size, origin["lora.dropout"]) == (8, "default")
    assert recipe.seed == 7


def test_resolved_recipe_survives_a_round_trip_through_yaml(tmp_path: Path) -> None:
    ranks = {"q_proj": 4, "k_proj": 2}  # in the order in which they apply
    decided = resolve(None, {**MINIMAL, "lora.rank_pattern": ranks, "track": ["tensorboard"], "out": "a: b"})
    decided = decided.decide([Choice("lora.alpha", 32.0, "plan", "twice the rank")])
    file = tmp_path / "recipe.yaml"
    file.write_text(decided.as_yaml())
    assert "alpha: 32.0  # plan: twice the rank" in decided.as_yaml()
    assert read_resolved(file).recipe == decided.recipe
    assert [*read_resolved(file).recipe.lora.rank_pattern] == ["q_proj", "k_proj"]


@pytest.mark.parametrize(
    "mark", ["\n", "\n\n", "\r\n", "\x85", "\u2028", "'\n#", "2024-07-26", "word " * 9_000, "é \n" * 9_000]
)
def test_line_breaks_and_dates_survive_a_round_trip_through_yaml(tmp_path: Path, mark: str) -> None:
    texts = {"lora.new_tokens": [f"a{mark}b", mark], "data.template_options": {"system": f"one{mark}two", "day": mark}}
    decided = resolve(None, {**MINIMAL, **texts, "out": f"x{mark}y"}).decide(
        [Choice("seed", 1, "plan", f"with{mark}reason")]
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(decided.as_yaml(), encoding="utf-8", newline="")
    assert read_resolved(file).recipe == decided.recipe


def test_preset_without_effect_raises(tmp_path: Path) -> None:
    """The recipe.yaml of a run sets every field."""
    file = tmp_path / "recipe.yaml"
    file.write_text(resolve(None, {**MINIMAL, "preset": "balanced"}).as_yaml())
    assert resolve(file).recipe.preset == "balanced" and resolve(file, {"preset": "auto"}).recipe.lora.r == 16
    with pytest.raises(RecipeError, match="preset max-quality") as raised:
        resolve(file, {"preset": "max-quality"})
    assert "lora.r" in raised.value.fix
    file.write_text("model: {name: demo}\ndata: {train: rows.jsonl}\nlora: {r: 4}\n")
    assert resolve(file, {"preset": "max-quality"}).recipe.lora.target_modules == "all-linear"


def test_date_in_a_recipe_is_text(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {name: demo}\ndata: {train: rows.jsonl, template_options: {date_string: 2024-07-26}}\n")
    assert resolve(file).recipe.data.template_options == {"date_string": "2024-07-26"}
    assert parse_option("data.template_options", "date_string=2024-07-26,n=3") == {"date_string": "2024-07-26", "n": 3}


def test_labels_that_are_whole_numbers_in_yaml_are_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "{model: m, data: d, train: {objective: classify, labels: [0, 1], class_weights: {1: 5, 0: 0}}}"
    )
    train = resolve(tmp_path / "r.yaml").recipe.train
    assert (train.labels, train.class_weights) == (["0", "1"], {"1": 5.0, "0": 0.0})
    for name, value in (("labels", [True, False]), ("class_weights", {True: 5, False: 0})):
        with pytest.raises(RecipeError, match="must be text"):
            resolve(None, {**MINIMAL, "train.objective": "classify", f"train.{name}": value})


def test_keys_of_a_map_that_yaml_reads_as_booleans_are_named_with_their_cause(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("{model: m, data: d, train: {objective: classify, class_weights: {yes: 5, b: 1}}}")
    with pytest.raises(RecipeError) as raised:
        resolve(file)
    cause = "True: must be text: put it in quotes (YAML reads yes, no, on and off as true and false)"
    assert str(raised.value.where[0]) == f"{file}: train.class_weights: {cause} (got True)"
    assert len(raised.value.where) == 1 and "none" not in raised.value.fix


def test_template_option_that_is_not_yaml_raises() -> None:
    with pytest.raises(RecipeError, match=r"data.template_options tools=\[1: not YAML"):
        parse_option("data.template_options", "tools=[1")


@pytest.mark.parametrize("text", ["lora.r: 8\nlora: {r: 4}\n", "lora: {r: 4}\nlora.r: 8\n"])
def test_key_in_its_section_and_as_dotted_name_raises(tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {name: demo}\ndata: {train: rows.jsonl}\n" + text)
    with pytest.raises(RecipeError) as raised:
        resolve(file)
    assert raised.value.lines()[0].startswith(f"{file}: lora.r ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lora.rnk": 4}, "did you mean lora.r"),
        ({"train.learning_rte": 4}, "did you mean train.learning_rate"),
        ({"ranks": 4}, "--ranks: unknown key (did you mean rank?)"),
        ({"lora.r": 0}, "must be at least 1"),
        ({"train.epochs": 0}, "must be above 0 (got"),
        ({"train.learning_rate": -1}, "must be above 0"),
        ({"train.learning_rate": "nan"}, "--train.learning_rate"),
        ({"train.learning_rate": 1e9}, "must be at most 1"),
        ({"train.batch_size": 0}, "must be at least 1"),
        ({"train.max_time": "soon"}, "--train.max_time"),
        ({"model.device": "gpu"}, "--model.device"),
        ({"preset": "best"}, "must be auto, low-memory, balanced or max-quality"),
        ({"train.micro_batch": 9}, "larger than --train.batch_size"),
        ({"train.early_stopping": 2}, "needs --data.eval"),
        ({"train.micro_batch": 2, "train.micro_batch_tokens": 99}, "not both"),
        ({"lora.init": "loftq", "lora.use_dora": True}, "cannot be combined with --lora.use_dora"),
        ({"lora.r": True}, "must be a number, not true or false"),
        ({"lora.alpha": True}, "must be a number, not true or false"),
        ({"train.save_steps": False}, "must be a number, not true or false"),
        ({"lora.rank_pattern": {"v_proj": 4, "q_proj": 0}}, "q_proj: must be at least 1"),
        ({"lora.rank_pattern": {"q_proj": True}}, "must be a number"),
        ({"lora.alpha_pattern": {"q_proj": -3}}, "must be above 0"),
        ({"lora.alpha_pattern": {"q_proj": "nan"}}, "a finite number"),
        ({"lora.rank_pattern": {"q_proj(": 3}}, "q_proj( is not a regular expression"),
        ({"lora.alpha_pattern": {"[": 3}}, "[ is not a regular expression"),
        ({"lora.target_modules": []}, "--lora.target_modules"),
        ({"lora.new_tokens": ["a", ""]}, "a token is empty"),
        ({"lora.new_tokens": ["a", "b", "a"]}, "duplicate tokens: a"),
    ],
)
def test_invalid_option_raises_an_error_of_one_line(options: dict[str, object], expected: str) -> None:
    with pytest.raises(RecipeError) as raised:
        resolve(None, {**MINIMAL, **options})
    assert raised.value.exit_code == 2
    assert len([line for line in raised.value.lines() if not line.startswith("Fix: ")]) == 1
    assert expected in raised.value.lines()[0]


def test_alpha_pattern_accepts_fractions() -> None:
    recipe = resolve(None, {**MINIMAL, "lora.alpha_pattern": {"q_proj": "1.5"}}).recipe
    assert recipe.lora.alpha_pattern == {"q_proj": 1.5}


def test_all_invalid_fields_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {name: demo}\ndata: {train: rows.jsonl}\nlora: {r: 0, target_modules: 3, dropout: 2}\n")
    with pytest.raises(RecipeError) as raised:
        resolve(file)
    *places, last, fix = raised.value.lines()
    assert [place.removeprefix(f"{file}: ").partition(":")[0] for place in places] == [
        "lora.r",
        "lora.dropout",
        "lora.target_modules",
    ]
    assert last == "the recipe is not valid"
    assert fix == "Fix: for example lora.r: 16, lora.dropout: 0"


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("model: {name: demo}\ntrain: {epochs: 1}\ntrain: {batch_size: 4}\n", 3, "train"),
        ("lora: {r: 8, r: 16}\n", 1, "r"),
    ],
)
def test_duplicate_key_raises_with_both_lines(tmp_path: Path, text: str, line: int, key: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as raised:
        resolve(file)
    assert raised.value.lines()[0].startswith(f"{file}:{line}: not YAML: duplicate key {key}, first in line ")


def test_deeply_nested_recipe_raises(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"model: {'[' * 5000}")
    with pytest.raises(RecipeError, match="too deep"):
        resolve(file)


def test_missing_field_is_named() -> None:
    with pytest.raises(RecipeError) as raised:
        resolve(None, {"model": "demo"})
    assert raised.value.lines() == [
        "--data.train is required", "Fix: give --data.train, or a recipe file",
    ]  # fmt: skip
    assert str(raised.value) == "data is required\nFix: give data=..., or a recipe file"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("model: [", "r.yaml:1"), ("- a\n", "map of sections"), ("lora: 3\nmodel: {name: a}\ndata: {train: b}\n", "lora")],
)
def test_invalid_recipe_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as raised:
        resolve(file, {})
    assert expected in " ".join(raised.value.lines())


def test_option_text_is_converted() -> None:
    assert parse_option("lora.target_modules", "q_proj,v_proj") == ["q_proj", "v_proj"]
    assert parse_option("lora.target_modules", "all-linear") == "all-linear"
    assert parse_option("lora.target_modules", "[q_proj, v_proj]") == ["q_proj", "v_proj"]
    assert parse_option("lora.modules_to_save", "norm") == ["norm"]
    assert parse_option("lora.new_tokens", "[INST],[/INST]") == ["[INST]", "[/INST]"]
    assert parse_option("lora.new_tokens", "[CITE]") == ["[CITE]"]
    assert parse_option("data.columns", "prompt=question,completion=answer") == {
        "prompt": "question",
        "completion": "answer",
    }
    assert parse_option("train.max_steps", "none") is None
    assert parse_option("model.name", "none") == "none"
    with pytest.raises(RecipeError):
        parse_option("lora.rank_pattern", "q_proj")


@pytest.mark.parametrize("preset", ["low-memory", "balanced", "max-quality"])
def test_every_shipped_preset_is_valid(preset: str) -> None:
    file = resources.files("strop.config") / "presets" / f"{preset}.yaml"
    assert yaml.safe_load(file.read_text(encoding="utf-8"))
    resolved = resolve(None, {**MINIMAL, "preset": preset})
    assert any(choice.origin == "preset" for choice in resolved.choices.values())


def test_every_option_has_help_and_a_schema() -> None:
    assert all(info.description for _, info in option_fields())
    schema = Recipe.model_json_schema()
    assert schema["additionalProperties"] is False
    assert "LoraSection" in schema["$defs"]


def test_run_as_model_means_its_base_and_its_adapter(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    recipe = resolve(None, {**MINIMAL, "model.name": "owner/base", "model.revision": "v1"})
    (run / "recipe.yaml").write_text(recipe.as_yaml(), encoding="utf-8")
    (run / "lock.json").write_text("{}", encoding="utf-8")
    model = resolve(None, {**MINIMAL, "model": str(run)}).recipe.model
    assert (model.name, model.revision, model.adapter) == ("owner/base", "v1", str(run))
    assert resolve(None, {**MINIMAL, "model": str(run), "adapter": "a"}).recipe.model.adapter == "a"
    assert resolve(run / "recipe.yaml", {"train.epochs": 4}).recipe.model.adapter is None  # a resumed run


def test_durations_are_read_as_people_write_them() -> None:
    spoken = {"30 min": "30m", "2 hours": "2h", "90 sec": "90s", "1.5 days": "1.5d", "45 minutes": "45m", "1h": "1h"}
    times = {text: resolve(None, {**MINIMAL, "train.max_time": text}).recipe.train.max_time for text in spoken}
    assert times == spoken
    for wrong in ("500ms", "1hs", "1ss"):  # a final s is a plural only after a word
        with pytest.raises(RecipeError, match="90s"):
            resolve(None, {**MINIMAL, "train.max_time": wrong})
