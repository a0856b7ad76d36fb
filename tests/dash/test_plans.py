"""The plan and the data report of the page equal those of the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import strop
from strop.config.schema import option_fields
from strop.dash.previews import DataReader, Planner, schema, typed_options
from strop.errors import InputError, RecipeError
from tests.support.tiny import write_rows


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner()


def get_plan(planner: Planner, options: dict[str, Any], **how: Any) -> dict[str, Any]:
    return planner.plan(options, **{"memory": None, "gpu": None, "out": None, "thorough": True, **how})


def without_free_memory(plan: dict[str, Any]) -> dict[str, Any]:
    """Remove fields that depend on free memory, which changes between two plans."""
    return json.loads(re.sub(r"[0-9.]+ (GiB|MiB) usable", "usable", json.dumps(plan)))  # type: ignore[no-any-return]


def test_plan_warns_of_evaluation_rows_that_are_trained_on(
    planner: Planner, tiny_folder: Path, rows_file: Path
) -> None:
    options = {"model": str(tiny_folder), "data": str(rows_file), "eval": str(rows_file)}
    assert get_plan(planner, options)["rows"]["warnings"] == ["24 evaluation rows are also training rows"]


@pytest.mark.parametrize("how", [{}, {"gpu": "RTX 4090"}, {"memory": "1.5GB"}])
def test_plan_equals_the_command(planner: Planner, tiny_folder: Path, rows_file: Path, how: Any) -> None:
    options = {"model": str(tiny_folder), "data": str(rows_file), "lora.r": "8", "train.max_steps": 5}
    result = get_plan(planner, options, **how)
    from strop.machine.memory import parse_memory

    memory = {"memory": parse_memory(how["memory"])} if "memory" in how else {}
    settings = {"model": str(tiny_folder), "data": str(rows_file), "lora": {"r": 8}, "train": {"max_steps": 5}}
    expected = strop.plan(**{**settings, **how, **memory}).as_json()
    depends_on_other_processes = {"rate", "memory_bytes", "usable_bytes", "largest"}
    same = set(expected) - depends_on_other_processes
    assert without_free_memory({name: result[name] for name in same}) == without_free_memory(
        {name: expected[name] for name in same}
    )
    rows = {"known": True, "number": 24, "measuring": False, "refused": None, "warnings": [], "why": ""}
    assert result["rows"] == rows and result["here"] == ("gpu" not in how)
    origins = {choice["field"]: choice["origin"] for choice in result["recipe"]}
    assert origins["lora.r"] == "option" and origins["train.weight_decay"] == "default" and len(origins) > 50
    again = get_plan(planner, options, **how, thorough=False)
    assert again["phases"] == result["phases"] and again["largest"] == {} and result["largest"]


def test_planned_command_is_accepted(
    planner: Planner, tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:  # fmt: skip
    more = write_rows(tmp_path / "more.jsonl", 3)
    options = {
        "model.name": str(tiny_folder), "data.train": [str(rows_file), f"{more}@2"], "lora.target_modules": ["q_proj"],
        "train.warmup": 3, "data.columns": None, "train.early_stopping": None, "lora.rank_pattern": {"q_proj": 2},
        "model.dtype": "fp32",  # otherwise each process measures which one is faster, and they may be about equal
    }  # fmt: skip
    result = get_plan(planner, options, out="runs/x")
    assert result["command"].startswith("strop train --model.name=") and result["command"].endswith("--out=runs/x")
    words = [sys.executable, "-m", "strop.cli", *result["argv"], "--print-recipe", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    printed = {choice["field"]: choice["value"] for choice in json.loads(done.stdout)["choices"]}
    mine = {choice["field"]: choice["value"] for choice in result["recipe"]}
    assert (mine.pop("train.keep"), printed.pop("train.keep")) == ("off", "auto")  # the rows decide; one reads them
    assert {
        field: (mine[field], printed[field]) for field in mine if mine[field] != printed[field] and field != "out"
    } == {}


def test_errors_equal_those_of_the_command(planner: Planner, tiny_folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        get_plan(planner, {"model.name": str(tiny_folder), "lora.rank": 3})
    assert "--lora.rank: unknown key" in str(caught.value.where[0])
    with pytest.raises(InputError):
        get_plan(planner, {"model.name": str(tiny_folder), "lora.r": "many"})
    with pytest.raises(InputError):
        get_plan(planner, {"lora.r": 8})
    with pytest.raises(InputError):
        get_plan(planner, {"model.name": str(tiny_folder)}, gpu="no such card")


def test_a_changed_file_is_read_again(planner: Planner, tiny_folder: Path, tmp_path: Path) -> None:
    options = {"model.name": str(tiny_folder), "data.train": str(write_rows(tmp_path / "rows.jsonl", 5))}
    assert get_plan(planner, options)["rows"]["number"] == 5
    write_rows(tmp_path / "rows.jsonl", 9)
    assert get_plan(planner, options)["rows"]["number"] == 9


def test_the_form_has_every_option() -> None:
    result = {field["field"]: field for field in schema()["fields"]}
    assert list(result) == [name for name, _ in option_fields()]
    assert (result["lora.r"]["type"], result["lora.r"]["minimum"], result["lora.r"]["default"]) == (
        "integer",
        1,
        None or result["lora.r"]["default"],
    )
    assert result["model.quantization"]["choices"] == ["none", "nf4", "fp4", "int8", "auto"]
    assert result["model.name"]["required"] and result["train.learning_rate"]["type"] == "number"
    assert json.dumps(schema())


def test_text_is_parsed_as_on_the_command_line() -> None:
    result = typed_options(
        {"model": "demo", "lora.target_modules": "q_proj,v_proj", "train.max_steps": "none", "data.train": ["a", "b"]}
    )
    assert result == {
        "model.name": "demo", "lora.target_modules": ["q_proj", "v_proj"], "train.max_steps": None,
        "data.train": ["a", "b"],
    }  # fmt: skip


def rows(reader: DataReader, options: dict[str, Any], **how: Any) -> dict[str, Any]:
    return reader.rows(options, **{"part": "train", "order": "file", "offset": 0, "count": 5, "ids": True, **how})


def test_rows_are_returned_as_tokens(tiny_folder: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 12)
    long = {"messages": [{"role": "user", "content": "why " * 90}, {"role": "assistant", "content": "because"}]}
    with file.open("a") as out:
        out.write(file.read_text().splitlines()[3] + "\n" + json.dumps(long) + "\n" + "{broken\n")
    options = {"model.name": str(tiny_folder), "data.train": str(file), "data.max_length": 64}
    options |= {"data.overlong": "truncate-start", "data.bad_rows": "drop"}
    reader = DataReader()
    result = rows(reader, options)
    report = strop.check(
        model=str(tiny_folder),
        data={"train": str(file), "max_length": 64, "overlong": "truncate-start", "bad_rows": "drop"},
    )
    assert result["report"] == report
    assert (
        report["rows"] == {"read": 15, "used": 13, "truncated": 0, "split": 0, "dropped": 2}
        or report["rows"]["truncated"] == 1
    )
    assert [(one["line"], one["reason"]) for one in report["dropped"]][-1][0] == 15
    assert result["repeats"] == [{"file": str(file), "line": 13, "same_as": f"{file}:4"}]
    first = result["rows"][0]
    assert "".join(text for text, _, _ in first["pieces"]).startswith("<|im_start|>user\nwhat is 0<|im_end|>")
    assert "".join(text for text, weight, _ in first["pieces"] if weight) == "it is 0<|im_end|>"
    assert [stop for _, _, stop in first["pieces"]].count(True) == 1 and first["pieces"][-1][2]
    assert sum(map(len, first["ids"])) == first["tokens"] and first["supervised"] == 5
    assert sum(result["lengths"]["counts"]) == result["num_rows"]
    lengths = [row["tokens"] for row in rows(reader, options, order="long")["rows"]]
    assert lengths == sorted(lengths, reverse=True)
    assert [row["row"] for row in rows(reader, options, offset=4, count=2)["rows"]] == [4, 5]
    assert 0 < result["sharing"]["prefix_saves"] < 1 and result["sharing"]["prefix_tokens"] >= 4


def test_truncated_rows_are_listed(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    output = [
        {"role": role, "content": f"{role} says {n} and more"} for n in range(8) for role in ("user", "assistant")
    ]
    file.write_text(json.dumps({"messages": output}) + "\n")
    options = {"model.name": str(tiny_folder), "data.train": str(file), "data.max_length": 100}
    for how in ("truncate-start", "split"):
        result = rows(DataReader(), {**options, "data.overlong": how})
        outcome = "truncated" if how == "truncate-start" else "split"
        assert result["report"]["rows"][outcome] == 1
        [cut] = result["report"]["cut"]
        assert (cut["how"], cut["file"], cut["line"]) == (outcome, str(file), 1) and "tokens, now" in cut["what"]


def test_the_workers_need_no_torch() -> None:
    code = "import sys, strop.dash.previews; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_unreadable_rows_are_reported_at_once(planner: Planner, tiny_folder: Path) -> None:
    """The reading thread may end before it is joined."""
    for number in range(20):
        with pytest.raises(InputError, match="no such file"):
            get_plan(planner, {"model": str(tiny_folder), "data": f"nothing{number}.jsonl"})
    state = get_plan(planner, {"model": str(tiny_folder), "data": "owner/name"})["rows"]
    assert state["why"] == "the data is on the Hub" and not state["known"]
