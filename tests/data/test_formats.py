"""Rows -> conversations: every shape, every reason, and the shared files with counts worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.data.converters import ROLES
from strop.data.formats import FORMATS, ConversationReader, conversations, detect_format, tables
from strop.data.reading import files
from strop.data.row_errors import REASONS, RowError
from strop.data.types import Conversation, Message, Row
from strop.errors import DataError
from tests import ROOT

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SPOKEN = (Message("user", "hi"), Message("assistant", "yo"))
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def convert(*values: dict[str, Any], **options: Any) -> tuple[list[Conversation], list[RowError], ConversationReader]:
    bad: list[RowError] = []
    reader = conversations([Row("d", n, value) for n, value in enumerate(values, 1)], bad=bad, **options)
    return list(reader), bad, reader


def one(value: dict[str, Any], **options: Any) -> Conversation:
    made, bad, _ = convert(value, **options)
    assert bad == []
    (conversation,) = made
    return conversation


def reason(value: dict[str, Any], **options: Any) -> str:
    """The one reason why the row is not used; a good row before it fixes the file's format."""
    made, bad, reader = convert(value, **options)
    assert (made, len(bad), reader.num_used) == ([], 1, 0)
    assert bad[0].code in REASONS
    return bad[0].code


def refusal(*values: dict[str, Any], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        convert(*values, **options)
    return "\n".join(caught.value.lines())


# --- the shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", FORMATS.values(), ids=FORMATS.keys())
def test_the_example_of_each_format_is_that_format(entry: Any) -> None:
    assert detect_format(entry.example) == entry.name
    made, bad, reader = convert(entry.example)
    assert (len(made), bad, reader.formats) == (1, [], {"d": entry.name})


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
def test_every_shape_says_the_same(value: dict[str, Any]) -> None:
    said = one(value)
    assert said.sides[0] == Conversation("d", 1, SPOKEN)
    if "rejected" in value:
        worse = (SPOKEN[0], dataclasses.replace(SPOKEN[1], content="no"))
        assert said.sides[1] == Conversation("d", 1, worse)


def test_optional_columns_are_read() -> None:
    value = {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["d", "e"]]}
    said = [(m.role, m.content) for m in one(value).messages]
    assert said == [("system", "s"), ("user", "d"), ("assistant", "e"), ("user", "a\n\nb"), ("assistant", "c")]
    assert one({"text": " as\nit is\n", "url": "x", "timestamp": "y"}).text == " as\nit is\n"
    several, _, reader = convert({"instruction": "i", "instances": [{"output": "a"}, {"input": "x", "output": "b"}]})
    assert [c.messages[0].content for c in several] == ["i", "i\n\nx"]
    assert (reader.num_rows, reader.num_used) == (1, 1)


def test_system_text_among_pairs_comes_first() -> None:
    said = one({"conversations": [{"human": "hi", "assistant": "yo", "System": "be good"}]}).messages
    assert said == (Message("system", "be good"), *SPOKEN)


def test_turns_of_a_prompt_are_not_trained_on() -> None:
    prompt = [U, A, {**U, "content": "more"}]
    for value in (
        {"prompt": prompt, "completion": [A]},
        {"prompt": prompt, "chosen": [*prompt, A], "rejected": [*prompt, {**A, "content": "no"}]},
    ):
        assert [m.weight for m in one(value).messages] == [1.0, 0.0, 1.0, 1.0]
    assert [m.weight for m in one({"messages": [*prompt, A]}).messages] == [1.0, 1.0, 1.0, 1.0]


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
def test_tool_calls_come_out_in_one_form(turn: dict[str, Any]) -> None:
    said = one({"messages": [U, turn, {"role": "tool", "content": ""}, A], "tools": [TOOL]})
    assert said.messages[1] == Message("assistant", "", tool_calls=(CALL,))
    assert said.tools == (TOOL,)


def test_tools_come_out_in_one_form_and_results_are_named() -> None:
    for tools in ([TOOL["function"]], json.dumps([TOOL]), [TOOL]):
        assert one({"messages": [U, A], "tools": tools}).tools == (TOOL,)
    assert one({"messages": [U, A], "tools": ""}).tools == ()
    turns = [
        U,
        {"role": "assistant", "tool_calls": [{"id": "c1", **CALL}]},
        {"role": "tool", "tool_call_id": "c1", "content": "r"},
    ]
    said = one({"messages": [*turns, A]}).messages
    assert said[1].tool_calls == ({"id": "c1", **CALL},)
    assert said[2] == Message("tool", "r", name="f", call_id="c1")


def test_reasoning_and_weights_are_read() -> None:
    parts = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "yo"}]
    for turn in ({**A, "reasoning_content": "t"}, {**A, "thinking": "t"}, {**A, "content": parts}):
        assert one({"messages": [U, turn]}).messages[1] == Message("assistant", "yo", "t")
    weights = [
        ({"weight": 0}, 0.0),
        ({"loss_weight": 0.5}, 0.5),
        ({"train": False}, 0.0),
        ({"train": True, "weight": 1}, 1.0),
    ]
    for given_, weight in weights:
        assert one({"messages": [U, {**A, **given_}]}).messages[1].weight == weight
    assert one({"messages": [U, {**A, "content": " ", "weight": 0}, U, A]}).messages[1].content == " "  # not trained on


def test_every_role_of_the_table_is_mapped() -> None:
    for name, role in ROLES.items():
        turns = {"user": [{"role": name, "content": "hi"}, A], "assistant": [U, {"role": name, "content": "yo"}]}
        more = {"system": [{"role": name, "content": "s"}, U, A], "tool": [U, {"role": name, "content": "r"}, A]}
        said = one({"messages": {**turns, **more}[role]}).messages
        assert role in [m.role for m in said], name


def _with(turn: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [U, turn]}


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("bad-messages", {"messages": "hello"}),
        ("bad-messages", {"messages": ["hello"]}),
        ("bad-messages", {"messages": [{"role": "system", "content": "a"}, U, A], "system": "b"}),
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
        ("bad-part", _with({"role": "assistant", "content": [{"type": "image"}]})),
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
        ("media", {"messages": [{**U, "images": ["a.png"]}, A]}),
        ("media", {"prompt": "hi", "chosen": "yo", "rejected": "no <image>"}),
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
def test_each_wrong_row_has_its_reason(code: str, value: dict[str, Any]) -> None:
    assert reason(value) == code


# --- which shape -------------------------------------------------------------------------------------------------


def test_rows_of_two_formats_in_one_file_are_refused_with_both_lines() -> None:
    message = refusal({"messages": [U, A]}, {"messages": "bad"}, {"text": "a"})
    assert "d:1: a row of format messages\nd:3: a row of format text" in message
    with pytest.raises(DataError, match="two formats"):
        convert({"text": "a"}, {"messages": [U, A]})


def test_each_file_has_a_format_of_its_own() -> None:
    rows = [Row("a", 1, {"text": "x"}), Row("b", 1, {"messages": [U, A]}), Row("b", 2, {"messages": [U, A]})]
    reader = conversations(rows, bad=[])
    assert (len(list(reader)), reader.formats) == (3, {"a": "text", "b": "messages"})


def test_a_row_without_a_format_among_others_is_a_fault_of_that_row() -> None:
    for values in ([{"a": 1}, {"text": "x"}], [{"text": "x"}, {"a": 1}], [{"text": "x"}, {}]):
        made, bad, reader = convert(*values)
        assert (len(made), [fault.code for fault in bad], reader.num_rows) == (1, ["unknown-shape"], 2)
    made, bad, _ = convert({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None})
    assert (len(made), [fault.code for fault in bad]) == (1, ["no-content"])


def test_a_file_without_a_format_is_refused_once_with_the_option() -> None:
    message = refusal({"frage": "a", "antwort": "b"}, {"frage": "c", "antwort": "d"})
    assert message.startswith(
        "d:1: no format has the columns frage, antwort: --data.columns prompt=frage,completion=antwort"
    )
    assert "--data.columns text=body" in refusal({"body": "a"})
    assert "messages" in refusal({"n": 1})


@pytest.mark.parametrize(
    "value",
    [
        {"text": "a", "category": "b"},
        {"text": "a", "summary": "b"},
        {"question": "a", "answer": "b", "context": "c"},
        {"question": "a", "answer": "b", "choices": ["c"]},
    ],
)
def test_columns_that_may_matter_make_the_shape_unclear(value: dict[str, Any]) -> None:
    assert detect_format(value) is None
    option = "text" if "text" in value else "question-answer" if "question" in value else "prompt-completion"
    assert f"--data.format {option} (without {list(value)[-1]})" in refusal(value)
    made, _, reader = convert(value, format=option)
    assert (len(made), reader.unused[list(value)[-1]]) == (1, 1)


def test_options_name_format_and_columns() -> None:
    two = {"frage": "hi", "antwort": "yo", "system": "s"}
    assert one(two, columns={"prompt": "frage", "completion": "antwort"}).messages == SPOKEN
    three = {"prompt": "frage", "completion": "antwort", "system": "system"}
    assert one(two, columns=three).messages == (Message("system", "s"), *SPOKEN)
    assert one({"dialog": [U, A]}, columns={"messages": "dialog"}).messages == SPOKEN
    assert one({"body": "a"}, columns={"text": "body"}).text == "a"
    assert (
        one({"prompt": "x", "messages": [U, A], "completion": "y"}, format="prompt-completion").messages[0].content
        == "x"
    )
    assert reason({"frage": "hi"}, columns={"prompt": "frage", "completion": "antwort"}) == "missing-column"
    assert reason({"text": "hi"}, format="messages") == "missing-column"
    assert "did you mean alpaca?" in refusal(format="alpacca")
    assert "no format has promt (did you mean prompt?)" in refusal(columns={"promt": "a", "completion": "b"})
    assert "makes no format" in refusal(columns={"answer": "a"})


# --- laws --------------------------------------------------------------------------------------------------------

KEYS = ["arguments", "content", "from", "function", "function_call", "id", "input", "name", "output", "reasoning"]
KEYS += ["role", "text", "tool_call", "tool_call_id", "tool_calls", "train", "type", "value", "weight"]
TEXTS = ["", " ", "hi", "user", "gpt", "assistant", "tool", "text", "tool_call", "[", '{"name": "f"}']
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
ROWS = st.dictionaries(st.sampled_from(sorted(files.COLUMN_NAMES | {"id", "title"})), JSON, max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.lists(ROWS, max_size=4), st.sampled_from(["auto", *FORMATS]))
def test_every_row_is_used_or_named_whatever_it_holds(values: list[dict[str, Any]], format: str) -> None:
    bad: list[RowError] = []
    rows: Iterable[Row] = (Row("d", n, value) for n, value in enumerate(values, 1))
    reader = conversations(rows, format=format, bad=bad)
    try:
        made = list(reader)
    except DataError as error:
        assert error.where  # two formats, or none
        return
    used, named = {c.line for c in made}, [fault.where.line for fault in bad]
    assert sorted([*used, *named]) == list(range(1, len(values) + 1))
    assert (reader.num_rows, reader.num_used) == (len(values), len(used))
    assert {fault.code for fault in bad} <= REASONS.keys()
    for conversation in made:
        assert (conversation.text is None) == bool(conversation.messages)
        assert all(isinstance(m.content, str) and m.weight >= 0 for m in conversation.messages)


def test_every_key_of_a_format_is_a_known_column_name() -> None:
    assert {
        key for entry in FORMATS.values() for keys in (*entry.keys, entry.optional) for key in keys
    } <= files.COLUMN_NAMES


def test_every_reason_is_given_somewhere() -> None:
    code = "".join(path.read_text() for path in Path(files.__file__).parent.parent.rglob("*.py"))
    for name in REASONS:
        assert code.count(f'"{name}"') > 1, name


def test_the_tables_of_the_docs_are_made_from_the_code() -> None:
    assert tables() in (ROOT / "docs" / "data.md").read_text()
