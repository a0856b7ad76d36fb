"""The split into training, selection and test rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from strop.config.load import Resolved, resolve
from strop.errors import DataError, FolderError, RecipeError
from strop.evaluation.run import read_conversations
from strop.sweeping.split import PARTS, Split, data_options, hash_sources, split_rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(number: int, start: int = 0) -> list[dict[str, Any]]:
    """Return rows of which two have each prompt."""
    return [{"prompt": f"question {i // 2}", "completion": f"answer {i}"} for i in range(start, start + number)]


def recipe(model: Path, data: Path | list[str], **options: Any) -> Resolved:
    return resolve(
        None, {"model.name": str(model), "data.train": data if isinstance(data, list) else str(data), **options}
    )


def split(resolved: Resolved, folder: Path, **options: Any) -> Split:
    return split_rows(resolved, folder, **{"selection": None, "test": None, "metric": "exact", **options})


def read(part: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for file in part for line in Path(file).read_text(encoding="utf-8").splitlines()]


def test_rows_are_split_by_prompt_and_unchanged(tiny_folder: Path, tmp_path: Path) -> None:
    given = rows(400)
    result = split(recipe(tiny_folder, write(tmp_path / "rows.jsonl", given)), tmp_path / "data")
    parts = {name: read(result.files[name]) for name in PARTS}
    assert sorted(str(row) for part in parts.values() for row in part) == sorted(map(str, given))
    prompts = [{row["prompt"] for row in part} for part in parts.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts))  # no prompt in two parts
    assert {name: len(part) for name, part in parts.items()} == result.rows
    assert 40 <= result.rows["selection"] <= 80 and 40 <= result.rows["test"] <= 80 and not result.notes


def test_further_rows_do_not_move_others_and_another_seed_does(tiny_folder: Path, tmp_path: Path) -> None:
    few = split(recipe(tiny_folder, write(tmp_path / "few.jsonl", rows(300))), tmp_path / "a")
    more = split(recipe(tiny_folder, write(tmp_path / "more.jsonl", rows(400))), tmp_path / "b")
    for name in PARTS:
        texts = set(map(str, read(more.files[name])))
        assert set(map(str, read(few.files[name]))) <= texts
    other = split(recipe(tiny_folder, tmp_path / "few.jsonl", seed=1), tmp_path / "c")
    assert read(other.files["test"]) != read(few.files["test"])


def test_a_wrong_row_is_refused_with_its_place_in_the_users_file(tiny_folder: Path, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [*rows(100), {"prompt": "no answer"}, *rows(100, 100)]
    data = write(tmp_path / "rows.jsonl", given)
    with pytest.raises(DataError) as error:
        split(recipe(tiny_folder, data), tmp_path / "data")
    assert [(place.file, place.line) for place in error.value.where] == [(str(data), 101)]
    assert not (tmp_path / "data").exists()
    dropped = split(recipe(tiny_folder, data, **{"data.bad_rows": "drop"}), tmp_path / "data")
    assert sum(dropped.rows.values()) == 200


def test_an_unscorable_row_is_refused_with_its_place_in_the_users_file(tiny_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows(100))
    with pytest.raises(DataError) as error:
        split(recipe(tiny_folder, data), tmp_path / "data", metric="exact_json")
    assert {place.file for place in error.value.where} == {str(data)}
    assert "not a JSON object" in error.value.where[0].what


def test_repeated_held_out_rows_count_once(tiny_folder: Path, tmp_path: Path) -> None:
    once = rows(300)
    result = split(recipe(tiny_folder, write(tmp_path / "rows.jsonl", once * 3)), tmp_path / "data")
    for name in ("selection", "test"):
        texts = list(map(str, read(result.files[name])))
        assert len(texts) == len(set(texts))
    assert result.rows["train"] == 3 * len(set(map(str, read(result.files["train"]))))


def test_files_give_the_held_out_rows(tiny_folder: Path, tmp_path: Path) -> None:
    held_out = {name: write(tmp_path / f"{name}.jsonl", rows(40, start)) for name, start in (("s", 1000), ("t", 2000))}
    data = write(tmp_path / "rows.jsonl", rows(100))
    resolved = recipe(tiny_folder, data, **{"data.eval": str(held_out["s"])})
    result = split(resolved, tmp_path / "data", test=str(held_out["t"]))
    assert result.rows == {"train": 100, "selection": 40, "test": 40}
    assert read(result.files["test"]) == rows(40, 2000)


def test_training_rows_among_held_out_rows_are_reported(tiny_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows(100))
    result = split(recipe(tiny_folder, data), tmp_path / "data", selection=str(data), test="20%")
    assert any("selection rows have the prompt of a training row" in note for note in result.notes)
    other = write(tmp_path / "other.jsonl", [{**row, "completion": "another"} for row in rows(40)])
    result = split(recipe(tiny_folder, data), tmp_path / "more", selection=str(other), test=str(other))
    assert any("test rows have the prompt of a selection row" in note for note in result.notes)
    assert any("test rows have the prompt of a training row" in note for note in result.notes)


def test_rows_of_a_weighted_source_are_repeated(tiny_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows(100))
    once = split(recipe(tiny_folder, str(data)), tmp_path / "once")
    thrice = split(recipe(tiny_folder, f"{data}@3"), tmp_path / "thrice")
    assert thrice.rows == {**once.rows, "train": 3 * once.rows["train"]}


def test_moved_and_changed_parts(tiny_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows(100))
    result = split(recipe(tiny_folder, data), tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = Split.from_json(result.as_json(), tmp_path / "moved")
    assert moved.files["test"] == [str(tmp_path / "moved" / "test.jsonl")]
    (tmp_path / "moved" / "test.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(FolderError, match="has changed since"):
        Split.from_json(result.as_json(), tmp_path / "moved")


def test_rows_with_several_prompts_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    instances = [{"input": "", "output": "x"}, {"input": "more", "output": "y"}]
    data = write(tmp_path / "rows.jsonl", [{"instruction": f"do {n}", "instances": instances} for n in range(60)])
    with pytest.raises(DataError, match="60 rows have several prompts"):
        split(recipe(tiny_folder, data), tmp_path / "data")


@pytest.mark.parametrize(
    ("number", "options", "expected"),
    [
        (20, {}, "more rows, or --selection FILE with at least 10 rows"),
        (40, {}, "--selection 30%, more rows, or --selection FILE with at least 10 rows"),
        (40, {}, "--test 30% --selection 30%, more rows"),
        (100, {"selection": "0.2"}, "neither a share of the rows with % nor a file\nFix: --selection 20%"),
        (100, {"selection": "10"}, "neither a share of the rows with % nor a file\nFix: --selection 10%"),
        (100, {"selection": "100%"}, "leaves no rows"),
        (100, {"selection": "50%", "test": "50%"}, "no rows are left for training"),
        (100, {"test": "nowhere.jsonl"}, "no such file"),
    ],
)
def test_splits_that_cannot_work_are_refused(
    number: int, options: dict[str, str], expected: str, tiny_folder: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", rows(number))
    with pytest.raises((DataError, RecipeError)) as error:
        split(recipe(tiny_folder, data), tmp_path / "data", **options)
    assert expected in "\n".join(error.value.lines())


def test_advice_on_too_few_rows_of_an_evaluation_share_works(tiny_folder: Path, tmp_path: Path) -> None:
    resolved = recipe(tiny_folder, write(tmp_path / "rows.jsonl", rows(100)), **{"data.eval": "5%"})
    with pytest.raises(DataError) as error:
        split(resolved, tmp_path / "data", test="30%")
    advised = re.search(r"--selection (\d+%)", error.value.fix)
    assert advised
    result = split(resolved, tmp_path / "data", test="30%", selection=advised[1])
    assert result.rows["selection"] >= 10
    assert f"data.eval 5% is not used: --selection {advised[1]} gives the selection rows" in result.notes


def test_few_held_out_rows_are_reported(tiny_folder: Path, tmp_path: Path) -> None:
    result = split(recipe(tiny_folder, write(tmp_path / "rows.jsonl", rows(120))), tmp_path / "data")
    assert [note.split(": ")[1] for note in result.notes] == ["only large differences can be seen"] * 2


def test_labelled_answers_cannot_be_scored(tiny_folder: Path, tmp_path: Path) -> None:
    given = [row | {"label": bool(i % 3)} for i, row in enumerate(rows(200))]
    resolved = recipe(tiny_folder, write(tmp_path / "rows.jsonl", given), **{"train.objective": "kto"})
    with pytest.raises(DataError, match="labelled good or bad cannot be scored"):
        split(resolved, tmp_path / "data")


def test_tables_texts_and_columns_keep_their_meaning(tiny_folder: Path, tmp_path: Path) -> None:
    """CSV without a header and JSONL of another format are read from the written files as from the original ones."""
    table = tmp_path / "rows.csv"
    table.write_text("".join(f"question {i},answer {i}\n" for i in range(100)), encoding="utf-8")
    columns = {"prompt": "1", "completion": "2"}
    resolved = recipe(tiny_folder, table, **{"data.columns": columns})
    result = split(resolved, tmp_path / "data")
    original = {row.messages for row in read_conversations(str(table), columns=columns)}
    again = [row.messages for name in PARTS for row in read_conversations(result.files[name], columns=columns)]
    assert set(again) == original and len(again) == 100

    chats = [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yo"}]}
        for i in range(100)
    ]
    files = [str(write(tmp_path / "a.jsonl", rows(100))), str(write(tmp_path / "b.jsonl", chats))]
    mixed = split(recipe(tiny_folder, files), tmp_path / "mixed")
    assert {Path(file).name for file in mixed.files["test"]} == {"test-prompt-completion.jsonl", "test-messages.jsonl"}
    assert len(read_conversations(mixed.files["train"])) == mixed.rows["train"]
    options = data_options(mixed, resolved.recipe.data)
    assert options["data.train"] == mixed.files["train"] and options["data.encoding"] == "utf-8"


def test_all_classes_are_known_to_every_trial(tiny_folder: Path, tmp_path: Path) -> None:
    given = [{"text": f"text {i}", "label": "rare" if i == 7 else str(i % 2)} for i in range(200)]
    data = write(tmp_path / "rows.jsonl", given)
    resolved = recipe(tiny_folder, data, **{"train.objective": "classify"})
    result = split(resolved, tmp_path / "data")
    assert data_options(result, resolved.recipe.data)["train.labels"] == ["0", "1", "rare"]
    assert Split.from_json(result.as_json(), tmp_path / "data") == result


def test_hash_changes_with_the_content_of_a_file(tiny_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows(4))
    section = recipe(tiny_folder, data).recipe.data
    before = hash_sources(section, None, "15%")
    assert hash_sources(section, None, "20%") == before
    write(data, rows(5))
    assert hash_sources(section, None, "15%") != before
