"""Every format of rows, and every reason why a row is not used."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shlex
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import strop
from strop.data.converters import ROLES
from strop.data.formats import FORMATS, ConversationReader, detect_format
from strop.data.reading import files
from strop.data.reading.sources import read_rows
from strop.data.row_errors import FORMAT_REASONS, READING_REASONS, REASONS, RENDERING_REASONS, RowError
from strop.data.store import dump_conversation, load_conversation
from strop.data.types import Conversation, Message, Row
from strop.errors import DataError

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
TURNS = (Message("user", "hi"), Message("assistant", "yo"))
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def convert(*values: dict[str, Any], **options: Any) -> tuple[list[Conversation], list[RowError], ConversationReader]:
    bad: list[RowError] = []
    reader = ConversationReader([Row("d", n, value) for n, value in enumerate(values, 1)], errors=bad, **options)
    return list(reader), bad, reader


def convert_one(value: dict[str, Any], **options: Any) -> Conversation:
    converted, bad, _ = convert(value, **options)
    assert bad == []
    (conversation,) = converted
    return conversation


def reason(value: dict[str, Any], **options: Any) -> str:
    """Return the reason why the row is not used."""
    converted, bad, reader = convert(value, **options)
    assert (converted, len(bad), reader.num_used) == ([], 1, 0)
    assert bad[0].code in REASONS
    return bad[0].code


def refusal(*values: dict[str, Any], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        convert(*values, **options)
    return "\n".join(caught.value.lines())


# --- formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", FORMATS.values(), ids=FORMATS.keys())
def test_example_of_each_format_is_detected_as_it(entry: Any) -> None:
    kinds = {"classification": "classes", "triplet": "triplets"}  # otherwise an error: they train on no answer
    is_read_by_objective = entry.name in kinds
    assert detect_format(entry.example) == (None if is_read_by_objective else entry.name)
    options = {"data_kind": kinds[entry.name]} if is_read_by_objective else {}
    converted, bad, reader = convert(entry.example, **options)
    assert (len(converted), bad, reader.formats) == (1, [], {"d": entry.name})


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [U, A]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "id": 1},
        {"conversation": [U, A]},
        {"messages": [{**U, "tool_calls": None, "name": None, "weight": None}, {**A, "tool_calls": []}], "tools": None},
        {
            "messages": [
                {"role": "Human", "content": [{"type": "text", "text": "h"}, {"type": "text", "value": "i"}]},
                A,
            ]
        },
        {"conversations": [{"Human": "hi", "ASSISTANT": "yo", "id": "x"}]},
        {"instruction": "hi", "input": "", "output": "yo"},
        {"instruction": "", "input": "hi", "output": "yo"},
        {"instruction": "hi", "context": None, "response": "yo", "category": "open_qa"},
        {"instruction": "hi", "instances": [{"input": "", "output": "yo"}]},
        {"prompt": "hi", "completion": "yo", "source": "x", "score": 0.5, "prompt_id": "p", "extra": ""},
        {"prompt": [U], "completion": [A]},
        {"prompt": [U], "completion": A},
        {"question": "hi", "answer": "yo", "subject": "maths"},
        {"query": "hi", "response": "yo", "system": ""},
        {"prompt": "hi", "messages": [U, A]},
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        {"chosen": [U, A], "rejected": [U, {**A, "content": "no"}]},
        {"prompt": "hi", "chosen": [U, A], "rejected": [U, {**A, "content": "no"}], "messages": [U, A]},
        {"prompt": [U], "chosen": [A], "rejected": [{**A, "content": "no"}]},
        {"conversations": [U], "chosen": A, "rejected": {"from": "gpt", "value": "no"}},
        {"instruction": "hi", "input": "", "chosen": "yo", "rejected": "no"},
    ],
)
def test_every_format_gives_the_same_conversation(value: dict[str, Any]) -> None:
    turns_read = convert_one(value)
    assert turns_read.sides[0] == Conversation("d", 1, TURNS)
    if "rejected" in value:
        worse = (TURNS[0], dataclasses.replace(TURNS[1], content="no"))
        assert turns_read.sides[1] == Conversation("d", 1, worse)


def test_optional_columns_are_read() -> None:
    value = {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["d", "e"]]}
    turns_read = [(m.role, m.content) for m in convert_one(value).messages]
    assert turns_read == [("system", "s"), ("user", "d"), ("assistant", "e"), ("user", "a\n\nb"), ("assistant", "c")]
    assert convert_one({"text": " as\nit is\n", "url": "x", "timestamp": "y"}).text == " as\nit is\n"
    several, _, reader = convert({"instruction": "i", "instances": [{"output": "a"}, {"input": "x", "output": "b"}]})
    assert [c.messages[0].content for c in several] == ["i", "i\n\nx"]
    assert (reader.num_rows, reader.num_used) == (1, 1)


def test_system_text_in_an_exchange_comes_first() -> None:
    turns_read = convert_one({"conversations": [{"human": "hi", "assistant": "yo", "System": "be good"}]}).messages
    assert turns_read == (Message("system", "be good"), *TURNS)


def test_assistant_turns_of_a_prompt_are_not_trained_on() -> None:
    prompt = [U, A, {**U, "content": "more"}]
    for value in (
        {"prompt": prompt, "completion": [A]},
        {"prompt": prompt, "chosen": [*prompt, A], "rejected": [*prompt, {**A, "content": "no"}]},
    ):
        assert [m.weight for m in convert_one(value).messages] == [1.0, 0.0, 1.0, 1.0]
    assert [m.weight for m in convert_one({"messages": [*prompt, A]}).messages] == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"role": "tool_call", "content": '[{"name": "f", "parameters": {"x": 1}}]'},
        {"role": "assistant", "content": [{"type": "tool_call", "value": {"name": "f", "arguments": {"x": 1}}}]},
    ],
)
def test_tool_calls_are_normalized(turn: dict[str, Any]) -> None:
    turns_read = convert_one({"messages": [U, turn, {"role": "tool", "content": ""}, A], "tools": [TOOL]})
    assert turns_read.messages[1] == Message("assistant", "", tool_calls=(CALL,))
    assert turns_read.tools == (TOOL,)


def test_tools_are_normalized_and_results_get_the_name_of_their_call() -> None:
    for tools in ([TOOL["function"]], json.dumps([TOOL]), [TOOL]):
        assert convert_one({"messages": [U, A], "tools": tools}).tools == (TOOL,)
    assert convert_one({"messages": [U, A], "tools": ""}).tools == ()
    turns = [
        U,
        {"role": "assistant", "tool_calls": [{"id": "c1", **CALL}]},
        {"role": "tool", "tool_call_id": "c1", "content": "r"},
    ]
    turns_read = convert_one({"messages": [*turns, A]}).messages
    assert turns_read[1].tool_calls == ({"id": "c1", **CALL},)
    assert turns_read[2] == Message("tool", "r", name="f", call_id="c1")


def test_results_are_put_into_the_order_of_their_calls() -> None:
    calls = {"role": "assistant", "tool_calls": [{"id": f"c{n}", **CALL} for n in range(3)]}
    results = [{"role": "tool", "tool_call_id": f"c{n}", "content": f"r{n}"} for n in range(3)]
    unknown = {"role": "tool", "tool_call_id": "other", "content": "x"}
    for given_, expected in (
        ([results[2], results[0], results[1]], ["r0", "r1", "r2"]),
        ([results[1], results[0]], ["r0", "r1"]),
        ([results[1], unknown, results[0]], ["r1", "x", "r0"]),  # which call the second belongs to is unknown
        ([results[1], results[1], results[0]], ["r1", "r1", "r0"]),
        ([{"role": "tool", "content": f"r{n}"} for n in (2, 1)], ["r2", "r1"]),
    ):
        messages = convert_one({"messages": [U, calls, *given_, A, U, calls, *given_, A]}).messages
        assert [message.content for message in messages if message.role == "tool"] == 2 * expected


@pytest.mark.parametrize("ids", [("a", "b"), ("x8", "k2"), None])
def test_conversations_that_differ_only_in_ids_of_calls_are_equal(ids: tuple[str, str] | None) -> None:
    calls = [CALL, {**CALL, "function": {**CALL["function"], "name": "g"}}]
    results: list[dict[str, Any]] = [{"role": "tool", "content": "r"}, {"role": "tool", "content": "s"}]
    plain = convert_one({"messages": [U, {"role": "assistant", "tool_calls": calls}, *results, A]})
    if ids is not None:
        calls = [{"id": id, **call} for id, call in zip(ids, calls, strict=True)]
        results = [{**result, "tool_call_id": id} for id, result in zip(ids, results, strict=True)][::-1]
    turns = convert_one({"messages": [U, {"role": "assistant", "tool_calls": calls}, *results, A]})
    assert [turn.name for turn in turns.messages if turn.role == "tool"] == ["f", "g"]
    assert dump_conversation(turns) == dump_conversation(plain)
    assert load_conversation(dump_conversation(turns, whole=True), turns.file, turns.line) == turns


def test_reasoning_and_weights_are_read() -> None:
    parts = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "yo"}]
    for turn in ({**A, "reasoning_content": "t"}, {**A, "thinking": "t"}, {**A, "content": parts}):
        assert convert_one({"messages": [U, turn]}).messages[1] == Message("assistant", "yo", "t")
    weights = [
        ({"weight": 0}, 0.0),
        ({"loss_weight": 0.5}, 0.5),
        ({"train": False}, 0.0),
        ({"train": True, "weight": 1}, 1.0),
    ]
    for given_, weight in weights:
        assert convert_one({"messages": [U, {**A, **given_}]}).messages[1].weight == weight
    assert (
        convert_one({"messages": [U, {**A, "content": " ", "weight": 0}, U, A]}).messages[1].content == " "
    )  # not trained on


def test_every_role_of_the_table_is_mapped() -> None:
    for name, role in ROLES.items():
        turns = {"user": [{"role": name, "content": "hi"}, A], "assistant": [U, {"role": name, "content": "yo"}]}
        more = {"system": [{"role": name, "content": "s"}, U, A], "tool": [U, {"role": name, "content": "r"}, A]}
        turns_read = convert_one({"messages": {**turns, **more}[role]}).messages
        assert role in [m.role for m in turns_read], name


def _with(turn: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [U, turn]}


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("bad-messages", {"messages": "hello"}),
        ("bad-messages", {"messages": ["hello"]}),
        ("bad-messages", {"messages": [{"role": "system", "content": "a"}, U, A], "system": "b"}),
        ("bad-messages", {"prompt": [{"role": "system", "content": "a"}, U], "system": "b"}),
        ("bad-messages", {"instruction": "a", "output": "b", "history": ["x"]}),
        ("bad-messages", {"instruction": "a", "instances": []}),
        ("bad-messages", {"instruction": "a", "input": "b", "context": "c", "output": "d"}),
        ("unknown-role", {"conversations": [{"user": "a", "bot": "b", "function_call": '{"name": "f"}'}]}),
        ("unknown-role", {"conversations": [{"human": "a", "assistant": "b", "asistant": "c"}]}),
        ("unknown-role", _with({"role": "usr", "content": "a"})),
        ("unknown-role", _with({"content": "a"})),
        ("unknown-role", _with({"role": 5, "content": "a"})),
        ("no-content", _with({"role": "assistant", "content": None})),
        ("no-content", _with({"role": "assistant"})),
        ("no-content", {"instruction": "a", "instances": [{"input": "x"}]}),
        ("not-text", _with({"role": "assistant", "content": 5})),
        ("not-text", _with({"role": "assistant", "content": {"a": 1}})),
        ("not-text", _with({"role": "assistant", "content": [{"type": "text", "text": 5}]})),
        ("not-text", _with({**A, "name": 5})),
        ("not-text", {"question": "a", "answer": 5}),
        ("bad-part", _with({"role": "assistant", "content": ["a"]})),
        ("bad-image", _with({"role": "assistant", "content": [{"type": "image"}]})),
        (
            "bad-part",
            _with(
                {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "reasoning", "text": "b"}]}
            ),
        ),
        ("bad-part", _with({**A, "reasoning": 5})),
        ("bad-part", {"messages": [{**U, "tool_calls": [CALL]}, A]}),
        ("no-assistant", {"messages": [U]}),
        ("no-assistant", {"messages": []}),
        ("no-user-first", {"messages": [A, U]}),
        ("no-user-first", {"messages": [{"role": "system", "content": "s"}, A, U]}),
        ("empty-answer", _with({**A, "content": " \n"})),
        ("empty-answer", _with({**A, "content": "", "reasoning": "t"})),
        ("empty-answer", {"instruction": "a", "output": ""}),
        ("empty-prompt", {"prompt": "", "completion": "a"}),
        ("empty-text", {"text": " \n"}),
        ("image-missing", {"messages": [{**U, "images": ["a.png"]}, A]}),
        ("image-count", {"prompt": "hi", "chosen": "yo", "rejected": "no <image>"}),
        ("bad-tools", {"messages": [U, A], "tools": "[oops"}),
        ("bad-tools", {"messages": [U, A], "tools": {"name": "f"}}),
        ("bad-tools", {"messages": [U, A], "tools": [{"description": "f"}]}),
        ("bad-tools", {"messages": [U, A], "tools": '[{"name": "f", "name": "g"}]'}),
        ("bad-tool-call", _with({"role": "function_call", "content": "f(x)"})),
        ("bad-tool-call", _with({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]})),
        ("bad-tool-call", _with({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]})),
        ("bad-tool-call", _with({"role": "assistant", "tool_calls": [{"arguments": {}}]})),
        *(
            ("bad-tool-call", _with({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"d": [odd]}}]}))
            for odd in (date(2026, 1, 1), float("nan"), b"x")  # as Parquet may hold them
        ),
        ("bad-tools", {"messages": [U, A], "tools": [{"name": "f", "since": date(2026, 1, 1)}]}),
        ("bad-weight", _with({**A, "weight": -1})),
        ("bad-weight", _with({**A, "weight": "1"})),
        ("bad-weight", _with({**A, "weight": 10**400})),
        ("bad-weight", _with({**A, "weight": float("inf")})),
        ("bad-weight", _with({**A, "weight": 1, "train": False})),
        ("no-prompt", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}),
        ("same-answers", {"prompt": "a", "chosen": "b", "rejected": "b"}),
    ],
)
def test_invalid_row_has_its_reason_code(code: str, value: dict[str, Any]) -> None:
    assert reason(value) == code


# --- detection -------------------------------------------------------------------------------------------------


def test_two_formats_in_one_file_are_refused_with_both_lines() -> None:
    message = refusal({"messages": [U, A]}, {"messages": "bad"}, {"text": "a"})
    assert "d:1: a row of format messages\nd:3: a row of format text" in message
    with pytest.raises(DataError, match="two formats"):
        convert({"text": "a"}, {"messages": [U, A]})


def test_files_may_have_different_formats() -> None:
    rows = [Row("a", 1, {"text": "x"}), Row("b", 1, {"messages": [U, A]}), Row("b", 2, {"messages": [U, A]})]
    reader = ConversationReader(rows, errors=[])
    assert (len(list(reader)), reader.formats) == (3, {"a": "text", "b": "messages"})


def test_single_row_without_a_format_is_an_error_of_that_row() -> None:
    for values in ([{"a": 1}, {"text": "x"}], [{"text": "x"}, {"a": 1}], [{"text": "x"}, {}]):
        converted, bad, reader = convert(*values)
        assert (len(converted), [fault.code for fault in bad], reader.num_rows) == (1, ["unknown-shape"], 2)
    converted, bad, _ = convert({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None})
    assert (len(converted), [fault.code for fault in bad]) == (1, ["no-content"])


def test_file_without_a_format_is_refused_once_with_the_option() -> None:
    message = refusal({"frage": "a", "antwort": "b"}, {"frage": "c", "antwort": "d"})
    assert message.startswith(
        "d:1: no format has the columns frage, antwort\nFix: --data.columns prompt=frage,completion=antwort"
    )
    assert "--data.columns text=body" in refusal({"body": "a"})
    assert "messages" in refusal({"n": 1})
    message = refusal({"prompt": "a", "completion": None}, {"prompt": "b", "completion": None})
    assert message.endswith("Fix: fill in completion, which is null")


NAMED = ("question", "answer"), ("query", "reply"), ("Prompt", "Target"), ("text", "label"), ("frage", "antwort")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
@pytest.mark.parametrize("extra", ["", "context", "input", "explanation", "index", "choices and explanation"])
@pytest.mark.parametrize(("prompt", "answer"), NAMED)
def test_every_suggested_option_reads_the_right_columns(
    prompt: str, answer: str, extra: str, suffix: str, tmp_path: Path
) -> None:
    """Each option in the error is applied to the file that caused it."""
    others = {"": [], "index": [""]}.get(extra, extra.split(" and "))
    names = [*others, answer, prompt] if extra == "explanation" else [*others, prompt, answer]
    value = {name: "0" if name == "" else f"the {name}" for name in names}
    file = tmp_path / f"rows.{suffix}"
    separator = "\t" if suffix == "tsv" else ","
    lines = [separator.join(names), separator.join(value.values())] if suffix != "jsonl" else [json.dumps(value)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def read(**options: Any) -> list[Conversation]:
        errors: list[RowError] = []
        columns = options.get("columns")
        found = list(ConversationReader(read_rows(str(file), columns=columns, errors=errors), errors=errors, **options))
        assert not errors, errors
        return found

    try:
        suggested = [{}] if read() else []
    except DataError as error:
        texts = re.findall(r"--data\.(columns|format) ('[^']*'|\S+)( \(if| \(no header)?", str(error.fix))
        suggested = [
            {"columns": dict(pair.split("=") for pair in shlex.split(text)[0].split(","))} if kind == "columns"
            else {"format": text}
            for kind, text, condition in texts
            if not condition and "prompt=A" not in text and not (kind == "format" and text == "text")
        ]  # fmt: skip
        assert suggested or "with the names of your columns" in str(error.fix) or "frage" in prompt, error.fix
        assert "=," not in str(error.fix), error.fix
    for options in suggested:
        [conversation] = read(**options)
        [*context, last] = conversation.messages
        asked = "\n".join(message.content for message in context)
        assert last.content == f"the {answer}" and f"the {prompt}" in asked and f"the {answer}" not in asked, options
        if extra in ("context", "input") and "columns" in options:
            assert f"the {extra}" in asked


def test_question_of_an_instruction_is_its_input() -> None:
    value = {"instruction": "Translate.", "output": "b", "question": "c"}
    assert "--data.columns instruction=instruction,input=question,output=output" in refusal(value)
    columns = {"instruction": "instruction", "input": "question", "output": "output"}
    assert convert_one(value, columns=columns).messages[0].content == "Translate.\n\nc"
    assert detect_format({"instruction": "a", "output": "b", "text": "the whole prompt of alpaca"}) == "alpaca"


def test_names_of_two_prompts_are_no_prompt_and_answer() -> None:
    message = refusal({"context": "c", "question": "q", "answers": {"text": ["a"]}})
    assert "prompt=A,completion=B with the names of your columns" in message and "completion=question" not in message


def test_row_numbers_of_pandas_are_ignored(tmp_path: Path) -> None:
    for name in ("", "Unnamed: 0", "__index_level_0__"):
        value = {name: "7", "prompt": "hi", "completion": "yo"}
        assert detect_format(value) == "prompt-completion"
        assert detect_format({**value, name: "seven"}) is None
    file = tmp_path / "rows.csv"
    file.write_text(",prompt,completion\n0,hi,yo\n1,hi,yo\n")
    errors: list[RowError] = []
    first, second = ConversationReader(read_rows(str(file), errors=errors), errors=errors)
    assert not errors and first.messages == second.messages == TURNS


def test_header_is_suggested_for_the_numbers_that_were_given(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("answer,question\nyo,hi\n")
    with pytest.raises(DataError, match="looks like a header") as raised:
        list(read_rows(str(file), columns={"prompt": "2", "completion": "1"}, errors=[]))
    assert raised.value.fix == "--data.columns prompt=question,completion=answer"


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_system_column_is_the_system_message(column: str) -> None:
    rows = [
        {"instruction": "hi", "output": "yo"}, {"prompt": "hi", "completion": "yo"}, {"question": "hi", "answer": "yo"},
        {"messages": [U, A]}, {"instruction": "hi", "instances": [{"input": "", "output": "yo"}]},
    ]  # fmt: skip
    for value in rows:
        assert convert_one({column: "be brief", **value}).messages == (Message("system", "be brief"), *TURNS)
    both = {"system": "a", "system_prompt": "b", "instruction": "hi", "output": "yo"}
    assert reason(both) == "bad-messages"
    assert convert_one({**both, "system_prompt": "a"}).messages[0] == Message("system", "a")
    assert convert_one({**both, "system_prompt": ""}).messages[0] == Message("system", "a")


@pytest.mark.parametrize(
    "value",
    [
        {"text": "a", "category": "b"},
        {"text": "a", "summary": "b"},
        {"question": "a", "answer": "b", "context": "c"},
        {"question": "a", "answer": "b", "choices": ["c"]},
        {"text": "a", "label": 1},
        {"instruction": "a", "output": "b", "question": "c"},
    ],
)
def test_columns_with_content_make_the_format_unclear(value: dict[str, Any]) -> None:
    assert detect_format(value) is None
    option = "text" if "text" in value else "alpaca" if "instruction" in value else "question-answer"
    assert f"--data.format {option} (without {list(value)[-1]})" in refusal(value)
    converted, _, reader = convert(value, format=option)
    assert (len(converted), reader.unused[list(value)[-1]]) == (1, 1)


@pytest.mark.parametrize(
    ("value", "trained", "scored"),
    [
        ({"prompt": "p", "gold": "4"}, "completion=gold (if gold is the answer to prompt)", None),
        ({"text": "a", "label": "b"}, "or --train.objective classify, to train a classifier", "completion=label"),
        ({"anchor": "a", "positive": ["b"], "negative": "c"}, "--train.objective embed, to train a model of embeddings",
         "evaluate a run of --train.objective embed"),
    ],
)  # fmt: skip
def test_fix_for_unknown_columns_is_one_that_the_command_can_follow(
    value: dict[str, Any], trained: str, scored: str | None
) -> None:
    """Not a format without answers, an option of training where rows are scored, or a column that does not match."""
    for trains, expected in ((True, trained), (False, scored or trained)):
        reader = ConversationReader([Row("f", 1, value)], errors=[], trains=trains)
        with pytest.raises(DataError) as caught:
            list(reader)
        fix = str(caught.value.fix)
        assert fix.endswith(expected) and "--data.format prompt" not in fix and "completion=negative" not in fix


def test_options_set_format_and_columns() -> None:
    two = {"frage": "hi", "antwort": "yo", "system": "s"}
    assert convert_one(two, columns={"prompt": "frage", "completion": "antwort"}).messages == TURNS
    three = {"prompt": "frage", "completion": "antwort", "system": "system"}
    assert convert_one(two, columns=three).messages == (Message("system", "s"), *TURNS)
    assert convert_one({"dialog": [U, A]}, columns={"messages": "dialog"}).messages == TURNS
    assert convert_one({"body": "a"}, columns={"text": "body"}).text == "a"
    assert (
        convert_one({"prompt": "x", "messages": [U, A], "completion": "y"}, format="prompt-completion")
        .messages[0]
        .content
        == "x"
    )
    assert reason({"frage": "hi"}, columns={"prompt": "frage", "completion": "antwort"}) == "missing-column"
    assert reason({"text": "hi"}, format="messages") == "missing-column"
    assert "did you mean alpaca?" in refusal(format="alpacca")
    assert "no format has promt (did you mean prompt?)" in refusal(columns={"promt": "a", "completion": "b"})
    assert "no format has these columns" in refusal(columns={"answer": "a"})
    swapped = refusal(columns={"frage": "prompt", "antwort": "completion"})
    assert "the other way round: --data.columns prompt=frage,completion=antwort" in swapped


# --- properties -------------------------------------------------------------------------------------------------------

KEYS = ["arguments", "content", "from", "function", "function_call", "id", "input", "name", "output", "reasoning"]
KEYS += ["role", "text", "tool_call", "tool_call_id", "tool_calls", "train", "type", "value", "weight"]
TEXTS = ["", " ", "hi", "user", "gpt", "assistant", "tool", "text", "tool_call", "[", '{"name": "f"}']
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
ROWS = st.dictionaries(st.sampled_from(sorted(files.COLUMN_NAMES | {"id", "title"})), JSON, max_size=4)


@settings(max_examples=100)
@given(st.lists(ROWS, max_size=4), st.sampled_from(["auto", *FORMATS]))
def test_every_row_is_used_or_reported_whatever_its_values(values: list[dict[str, Any]], format: str) -> None:
    bad: list[RowError] = []
    rows: Iterable[Row] = (Row("d", n, value) for n, value in enumerate(values, 1))
    reader = ConversationReader(rows, format=format, errors=bad)
    try:
        converted = list(reader)
    except DataError as error:
        assert error.where  # two formats, or none
        return
    used, named = {c.line for c in converted}, [fault.where.line for fault in bad]
    assert sorted([*used, *named]) == list(range(1, len(values) + 1))
    assert (reader.num_rows, reader.num_used) == (len(values), len(used))
    assert {fault.code for fault in bad} <= REASONS.keys()
    for conversation in converted:
        assert (conversation.text is None) == bool(conversation.messages)
        assert all(isinstance(m.content, str) and m.weight >= 0 for m in conversation.messages)


def test_every_key_of_a_format_is_a_known_column_name() -> None:
    keys = {key for entry in FORMATS.values() for keys in (*entry.keys, entry.optional) for key in keys}
    assert keys - files.COLUMN_NAMES == {"positive", "negative", "pos", "neg"}  # labels of sentiment, without a header


def test_every_reason_is_raised_somewhere() -> None:
    code = "".join(path.read_text() for path in Path(files.__file__).parent.parent.rglob("*.py"))
    for name in READING_REASONS | FORMAT_REASONS | RENDERING_REASONS:
        assert code.count(f'"{name}"') > 1, name


def test_a_broken_line_is_named_before_the_formats(tmp_path: Path, tiny_folder: Path) -> None:
    """In `strop check`, whose file has rows of two formats and, after them, a line that is not JSON."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"instruction": "c", "output": "d"}\n{"prompt": "c"\n')
    with pytest.raises(DataError) as raised:
        strop.check(model=tiny_folder, data=file)
    assert str(raised.value).startswith(f"{file}:3: column 15: not valid JSON")
    assert "rows of two formats" in str(raised.value)


def test_columns_of_one_file_are_not_a_reason_to_drop_another(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "other.csv").write_text("Question;Answer\nx;y\n")
    data = [str(tmp_path / "good.jsonl"), str(tmp_path / "other.csv")]
    with pytest.raises(DataError) as raised:
        strop.train(model="demo", data=data, columns={"prompt": "Question", "completion": "Answer"})
    assert "apply to every file" in raised.value.fix and "drop" not in raised.value.fix


def test_a_column_may_be_a_number(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("Wo?;Hier, da\n")
    checked = strop.check(model="demo", data=str(tmp_path / "rows.csv"), columns={"prompt": 1, "completion": 2})
    assert checked["rows"]["used"] == 1


def test_messages_in_a_table_are_json(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": 'say "hi", please'}, {"role": "assistant", "content": "hi"}]
    file = tmp_path / "chats.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([["messages"], [json.dumps(turns)], [str(turns)]])
    errors: list[RowError] = []
    (conversation,) = ConversationReader(read_rows(str(file), errors=errors), errors=errors)
    assert [(turn.role, turn.content) for turn in conversation.messages] == [tuple(turn.values()) for turn in turns]
    assert [error.code for error in errors] == ["bad-messages"] and "the string is not JSON" in errors[0].where.what


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
@pytest.mark.parametrize(
    ("columns", "filled", "option"),
    [
        ({"question": "q", "answer": "a"}, {"context": "Oslo is in Norway."}, "--data.format question-answer"),
        ({"prompt": "p", "completion": "c"}, {"notes": "fine"}, "--data.format prompt-completion"),
        ({"text": "t"}, {"summary": "s"}, "--data.columns prompt=text,completion=summary"),
        ({"instruction": "i", "output": "o"}, {"question": "q"}, "--data.format alpaca"),
    ],
)
@pytest.mark.parametrize("empty", [None, ""])
def test_column_with_content_is_ambiguous_in_any_order_of_rows(
    columns: dict[str, str], filled: dict[str, str], option: str, empty: str | None, order: slice
) -> None:
    values = [columns | dict.fromkeys(filled, empty), columns | filled, columns | filled]
    rows = [Row("f.jsonl", line + 1, value) for line, value in enumerate(values[order])]
    with pytest.raises(DataError) as caught:
        list(ConversationReader(rows, errors=[]))
    assert option in caught.value.fix and "no format has the columns" in str(caught.value)


@pytest.mark.parametrize("answers", [{"prompt": "completion"}, {"prompt": "response"}, {"question": "answer"}])
def test_row_without_its_answer_is_one_bad_row(answers: dict[str, str]) -> None:
    ((prompt, answer),) = answers.items()
    rows = [Row("f.jsonl", line, {prompt: "p", answer: "a"}) for line in (1, 3)]
    rows.insert(1, Row("f.jsonl", 2, {prompt: "p"}))
    errors: list[RowError] = []
    assert len(list(ConversationReader(rows, errors=errors))) == 2
    assert [(error.where.line, error.code) for error in errors] == [
        (2, "no-content" if prompt == "prompt" else "unknown-shape")
    ]
    assert prompt != "prompt" or errors[0].where.what.startswith("no ")
