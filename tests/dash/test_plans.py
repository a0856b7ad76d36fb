"""The plan and the data that the page shows are those of the command line."""

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


def asked(planner: Planner, options: dict[str, Any], **how: Any) -> dict[str, Any]:
    return planner.plan(options, **{"memory": None, "gpu": None, "out": None, "thorough": True, **how})


def without_free_memory(plan: dict[str, Any]) -> dict[str, Any]:
    """What other programs leave free changes between two plans."""
    return json.loads(re.sub(r"[0-9.]+ GiB usable", "usable", json.dumps(plan)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", [{}, {"gpu": "RTX 4090"}, {"memory": "600MB"}])
def test_plan_equals_the_command(planner: Planner, tiny_folder: Path, rows_file: Path, how: Any) -> None:
    options = {"model": str(tiny_folder), "data": str(rows_file), "lora.r": "8", "train.max_steps": 5}
    found = asked(planner, options, **how)
    from strop.machine.memory import parse_bytes

    memory = {"memory": parse_bytes(how["memory"])} if "memory" in how else {}
    given = {"model": str(tiny_folder), "data": str(rows_file), "lora": {"r": 8}, "train": {"max_steps": 5}}
    expected = strop.plan(**{**given, **how, **memory}).as_json()
    same = set(expected) - {"rate", "memory_bytes", "usable_bytes", "largest"}  # of a machine that others use too
    assert without_free_memory({name: found[name] for name in same}) == without_free_memory(
        {name: expected[name] for name in same}
    )
    assert found["rows"] == {"known": True, "number": 24, "measuring": False, "why": ""} and found["here"] == (
        "gpu" not in how
    )
    origins = {choice["field"]: choice["origin"] for choice in found["recipe"]}
    assert origins["lora.r"] == "option" and origins["train.weight_decay"] == "default" and len(origins) > 50
    again = asked(planner, options, **how, thorough=False)
    assert again["phases"] == found["phases"] and again["largest"] == {} and found["largest"]


def test_planned_command_is_accepted(
    planner: Planner, tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:  # fmt: skip
    more = write_rows(tmp_path / "more.jsonl", 3)
    options = {
        "model.name": str(tiny_folder), "data.train": [str(rows_file), f"{more}@2"], "lora.target_modules": ["q_proj"],
        "train.warmup": 3, "data.columns": None, "train.early_stopping": None, "lora.rank_pattern": {"q_proj": 2},
    }  # fmt: skip
    found = asked(planner, options, out="runs/x")
    assert found["command"].startswith("strop train --model.name=") and found["command"].endswith("--out=runs/x")
    words = [sys.executable, "-m", "strop.cli", *found["argv"], "--print-recipe", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    printed = {choice["field"]: choice["value"] for choice in json.loads(done.stdout)["choices"]}
    mine = {choice["field"]: choice["value"] for choice in found["recipe"]}
    assert {
        field: (mine[field], printed[field]) for field in mine if mine[field] != printed[field] and field != "out"
    } == {}


def test_errors_equal_those_of_the_command(planner: Planner, tiny_folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        asked(planner, {"model.name": str(tiny_folder), "lora.rank": 3})
    assert "unknown key lora.rank" in caught.value.where[0].what
    with pytest.raises(InputError):
        asked(planner, {"model.name": str(tiny_folder), "lora.r": "many"})
    with pytest.raises(InputError):
        asked(planner, {"lora.r": 8})
    with pytest.raises(InputError):
        asked(planner, {"model.name": str(tiny_folder)}, gpu="no such card")


def test_a_changed_file_is_read_again(planner: Planner, tiny_folder: Path, tmp_path: Path) -> None:
    options = {"model.name": str(tiny_folder), "data.train": str(write_rows(tmp_path / "rows.jsonl", 5))}
    assert asked(planner, options)["rows"]["number"] == 5
    write_rows(tmp_path / "rows.jsonl", 9)
    assert asked(planner, options)["rows"]["number"] == 9


def test_the_form_has_every_option() -> None:
    found = {field["field"]: field for field in schema()["fields"]}
    assert list(found) == [name for name, _ in option_fields()]
    assert (found["lora.r"]["type"], found["lora.r"]["minimum"], found["lora.r"]["default"]) == (
        "integer",
        1,
        None or found["lora.r"]["default"],
    )
    assert found["model.quantization"]["choices"] == ["none", "nf4", "fp4", "int8", "auto"]
    assert found["model.name"]["required"] and found["train.learning_rate"]["type"] == "number"
    assert json.dumps(schema())


def test_text_is_parsed_as_on_the_command_line() -> None:
    found = typed_options(
        {"model": "demo", "lora.target_modules": "q_proj,v_proj", "train.max_steps": "none", "data.train": ["a", "b"]}
    )
    assert found == {
        "model.name": "demo", "lora.target_modules": ["q_proj", "v_proj"], "train.max_steps": None,
        "data.train": ["a", "b"],
    }  # fmt: skip


def rows(reader: DataReader, options: dict[str, Any], **how: Any) -> dict[str, Any]:
    return reader.rows(options, **{"part": "train", "order": "file", "offset": 0, "count": 5, "ids": True, **how})


def test_rows_as_tokens(tiny_folder: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 12)
    long = {"messages": [{"role": "user", "content": "why " * 90}, {"role": "assistant", "content": "because"}]}
    with file.open("a") as out:
        out.write(file.read_text().splitlines()[3] + "\n" + json.dumps(long) + "\n" + "{broken\n")
    options = {"model.name": str(tiny_folder), "data.train": str(file), "data.max_length": 64}
    options |= {"data.overlong": "truncate-start", "data.bad_rows": "drop"}
    reader = DataReader()
    found = rows(reader, options)
    report = strop.check(
        model=str(tiny_folder),
        data={"train": str(file), "max_length": 64, "overlong": "truncate-start", "bad_rows": "drop"},
    )
    assert found["report"] == report
    assert (
        report["rows"] == {"read": 15, "used": 13, "truncated": 0, "split": 0, "dropped": 2}
        or report["rows"]["truncated"] == 1
    )
    assert [(one["line"], one["reason"]) for one in report["dropped"]][-1][0] == 15
    assert found["repeats"] == [{"file": str(file), "line": 13, "same_as": f"{file}:4"}]
    first = found["rows"][0]
    assert "".join(text for text, _, _ in first["pieces"]).startswith("<|im_start|>user\nwhat is 0<|im_end|>")
    assert "".join(text for text, weight, _ in first["pieces"] if weight) == "it is 0<|im_end|>"
    assert [stop for _, _, stop in first["pieces"]].count(True) == 1 and first["pieces"][-1][2]
    assert sum(map(len, first["ids"])) == first["tokens"] and first["supervised"] == 5
    assert sum(found["lengths"]["counts"]) == found["num_rows"]
    lengths = [row["tokens"] for row in rows(reader, options, order="long")["rows"]]
    assert lengths == sorted(lengths, reverse=True)
    assert [row["row"] for row in rows(reader, options, offset=4, count=2)["rows"]] == [4, 5]
    assert 0 < found["sharing"]["prefix_saves"] < 1 and found["sharing"]["prefix_tokens"] >= 4


def test_truncated_rows_are_listed(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    said = [{"role": role, "content": f"{role} says {n} and more"} for n in range(8) for role in ("user", "assistant")]
    file.write_text(json.dumps({"messages": said}) + "\n")
    options = {"model.name": str(tiny_folder), "data.train": str(file), "data.max_length": 100}
    for how in ("truncate-start", "split"):
        found = rows(DataReader(), {**options, "data.overlong": how})
        outcome = "truncated" if how == "truncate-start" else "split"
        assert found["report"]["rows"][outcome] == 1
        [cut] = found["report"]["cut"]
        assert (cut["how"], cut["file"], cut["line"]) == (outcome, str(file), 1) and "tokens, now" in cut["what"]


def test_the_workers_need_no_torch() -> None:
    code = "import sys, strop.dash.previews; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_unreadable_rows_are_reported_at_once(planner: Planner, tiny_folder: Path) -> None:
    """The reading thread may end before it is joined."""
    for number in range(20):
        with pytest.raises(InputError, match="no such file"):
            asked(planner, {"model": str(tiny_folder), "data": f"nothing{number}.jsonl"})
    told = asked(planner, {"model": str(tiny_folder), "data": "owner/name"})["rows"]
    assert told["why"] == "the data is on the Hub" and not told["known"]
