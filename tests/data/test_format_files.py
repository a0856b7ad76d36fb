"""Real data files: each loads with the counts verified by hand, or its refusal names the option that loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strop.data.formats import ConversationReader, find_placeholders
from strop.data.reading.sources import read_rows
from strop.data.row_errors import RowError
from strop.errors import DataError
from tests.support.shared_data import shared

TWO = {"prompt": "1", "completion": "2"}
USED = [  # file, options, format, rows, conversations
    ("alpaca.json", {}, "alpaca", 999, 999),
    ("alpaca_placeholders.json", {}, "alpaca", 91, 91),
    ("sharegpt.json", {}, "sharegpt", 500, 500),
    ("sharegpt_tools.json", {}, "sharegpt", 300, 300),
    ("messages_tools_reasoning.jsonl", {}, "messages", 50, 50),
    ("messages_parts_lossweight.jsonl", {}, "messages", 500, 500),
    ("preference_sharegpt.json", {}, "preference", 300, 300),
    ("question_answer.jsonl", {}, "question-answer", 1319, 1319),
    ("text_category.csv", {"columns": {"prompt": "text", "completion": "category"}}, "prompt-completion", 3080, 3080),
    ("text_category.csv", {"format": "text"}, "text", 3080, 3080),
    ("pairs_noheader.tsv", {"columns": TWO}, "prompt-completion", 250, 250),
    ("parallel.nl", {"columns": TWO}, "prompt-completion", 12588, 12588),
    ("selfinstruct_nested.jsonl", {}, "self-instruct", 175, 175),
    ("text.jsonl", {}, "text", 300, 300),
    ("plain.txt", {}, "text", 7222, 7222),  # paragraphs, of 40,000 lines
]
REFUSED = [  # file, the option that its refusal names; each is used in USED
    ("text_category.csv", "--data.columns prompt=text,completion=category"),
    ("text_category.csv", "--data.format text"),
    ("pairs_noheader.tsv", "--data.columns prompt=1,completion=2"),
    ("parallel.nl", "--data.columns prompt=1,completion=2"),
]


def load(
    name: str, *, format: str = "auto", columns: dict[str, str] | None = None
) -> tuple[ConversationReader, list[RowError]]:
    path = shared(f"formats/{name}")
    spec = f"{path}+{shared('formats/parallel.cm')}" if name == "parallel.nl" else path
    bad: list[RowError] = []
    return ConversationReader(
        read_rows(spec, columns=columns, errors=bad), format=format, columns=columns, errors=bad
    ), bad


@pytest.mark.parametrize(("name", "options", "format", "rows", "num_conversations"), USED)
def test_each_shared_file_gives_all_its_rows(
    name: str, options: dict[str, Any], format: str, rows: int, num_conversations: int
) -> None:
    reader, bad = load(name, **options)
    assert sum(1 for _ in reader) == num_conversations
    assert (reader.num_rows, reader.num_used, bad) == (rows, rows, [])
    assert set(reader.formats.values()) == {format}


@pytest.mark.parametrize(("name", "option"), REFUSED)
def test_refusal_names_the_option_that_loads_the_file(name: str, option: str) -> None:
    with pytest.raises(DataError) as caught:
        list(load(name)[0])
    assert option in "\n".join(caught.value.lines())


def test_no_text_of_the_shared_files_is_lost_or_changed() -> None:
    """Check all texts of the three files whose texts are parts or columns."""
    reader, _ = load("messages_tools_reasoning.jsonl")
    lines = Path(shared("formats/messages_tools_reasoning.jsonl")).read_text().split("\n")
    raw = [json.loads(line)["messages"] for line in lines if line]
    for conversation, turns in zip(reader, raw, strict=True):
        for message, turn in zip(conversation.messages, turns, strict=True):
            texts = {kind: [p["value"] for p in turn["content"] if p["type"] == kind] for kind in ("text", "reasoning")}
            calls = [json.loads(p["value"]) for p in turn["content"] if p["type"] == "tool_call"]
            assert (message.content, message.reasoning or "") == ("".join(texts["text"]), "".join(texts["reasoning"]))
            assert [call["function"] for call in message.tool_calls] == calls
    reader, _ = load("messages_parts_lossweight.jsonl")
    assert {(m.role, m.weight) for c in reader for m in c.messages} == {("user", 0.0), ("assistant", 1.0)}
    reader, _ = load("sharegpt_tools.json")
    roles = [message.role for conversation in reader for message in conversation.messages]
    assert (len(roles), roles.count("tool")) == (1914, 211)
    reader, _ = load("pairs_noheader.tsv", columns=TWO)
    assert [c.messages[1].content for c in reader][:3] == ["18", "3", "70000"]


def test_placeholders_are_found() -> None:
    reader, _ = load("alpaca_placeholders.json")
    placeholders = {name for c in reader for m in c.messages for name in find_placeholders(m.content)}
    assert placeholders == {"{{name}}", "{{author}}"}
    assert find_placeholders("{{ user_name }} {x} {{}} {{1 + 1}} ${{a.b}}") == ["{{ user_name }}", "{{a.b}}"]
