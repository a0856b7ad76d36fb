"""Rows -> conversations: which shape the rows of a file have, and what each row says.

A new format is one function in shapes.py and one entry of FORMATS.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from strop.data import converters
from strop.data import converters as preferences
from strop.data.converters import MEDIA, METADATA, BadRow, Keys, Said, Value
from strop.data.reading import files
from strop.data.reading.files import RowFault
from strop.data.types import Conversation, Row
from strop.errors import DataError, Where, nearest

REASONS: dict[str, str] = {
    **files.REASONS,
    "unknown-shape": "the row's columns are those of no format, though other rows of the file have one",
    "missing-column": "a column that the format or --data.columns names is not there",
    "bad-messages": "the turns are not a list of objects, or contradict each other",
    "unknown-role": "a role that is none of the known names",
    "no-content": "a text is null or missing (allowed only beside tool calls)",
    "not-text": "a text is a number, a list or an object",
    "bad-part": "a typed part of unknown type, or reasoning, text and tool calls in another order",
    "no-assistant": "there is no assistant turn, so nothing to learn",
    "no-user-first": "the first turn behind the system's is not the user's",
    "empty-answer": "an assistant turn is empty, which trains to stop at once",
    "empty-prompt": "a user turn is empty",
    "empty-text": "a raw text is empty",
    "bad-tools": "tools are not a list of functions with names, or not JSON",
    "bad-tool-call": "a tool call without a name, or with arguments that are not an object",
    "bad-weight": "a message's weight is not a number from 0 up, or is given twice and differs",
    "answer-weight": "a turn of an answer that is compared or judged has a weight other than 0 and 1",
    "no-prompt": "a preference pair of two strings without a prompt",
    "same-answers": "chosen and rejected are the same",
    "prompts-differ": "chosen and rejected do not answer the same prompt",
    "no-question": "a prompt (or `messages` beside a pair) whose last turn is not the user's",
    "bad-ranking": "a ranking without a score for each answer, or without two answers that differ in it",
    "bad-label": "a label that is neither good nor bad",
    "media": "images, audio or video, which are not trained on",
}


@dataclass(frozen=True)
class Format:
    """A shape of rows: it has all columns of one of `keys`, maybe some of `optional`.

    exact: whether other columns that may hold content make the shape unclear (`text` beside `summary`).
    """

    name: str
    keys: tuple[Keys, ...]
    optional: Keys
    convert: Callable[[Value, Keys], list[Said]]
    what: str
    example: dict[str, Any]
    exact: bool = False
    fits: Callable[[Value, Keys], bool] | None = None  # whether values fit the shape, where names alone do not tell

    def found_in(self, present: Iterable[str]) -> Keys | None:
        """Those of `keys` that are all present."""
        present = set(present)
        return next((keys for keys in self.keys if present.issuperset(keys)), None)


DOCUMENT = "document"  # asked for by name alone: `text`, and a plain text file is one
_HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]

# In order: a row with the columns of several formats has the first.
FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            "preference",
            (
                ("chosen", "rejected"),
                ("chosen_messages", "rejected_messages"),
                ("messages", "rejected_messages"),
                ("messages", "rejected_response"),
            ),
            (
                *("prompt", "question", "instruction", "input", "messages", "conversation", "conversations"),
                *("history", "system", "tools"),
            ),
            preferences.preference,
            "pairs of a better and a worse answer, as strings, messages, or whole conversations with a common "
            "beginning: [preferences.md](preferences.md)",
            {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        ),
        Format(
            "ranking",
            preferences.RANKED,
            ("system", "tools"),
            preferences.ranking,
            "answers to one prompt, each with a score; each two whose scores differ make a pair",
            {"prompt": "hi", "answers": ["yo", "no"], "scores": [1, 0]},
        ),
        Format(
            "labelled",
            preferences.LABELLED,
            ("system", "tools", "input", "context", "history"),
            preferences.labelled,
            "an answer that was judged good or bad (true, false, up, down, ...; 1 and 0 not in `label`)",
            {"prompt": "hi", "completion": "yo", "label": True},
            fits=preferences.is_labelled,
        ),
        Format(
            "messages",
            (("messages",),),
            ("system", "tools"),
            converters.messages,
            "turns with role and content (a string, or parts of type text, reasoning, tool_call), maybe tool_calls, "
            "reasoning_content, and a weight (weight, loss_weight or train)",
            {"messages": _HI},
        ),
        Format(
            "sharegpt",
            (("conversations",), ("conversation",)),
            ("system", "tools"),
            converters.messages,
            "the same with from and value, or human and assistant in one object; function_call and observation turns; "
            "tools as a list or as JSON in a string",
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        ),
        Format(
            "self-instruct",
            (("instruction", "instances"),),
            ("system",),
            converters.instances,
            "an instruction with a list of input and output; each makes one conversation",
            {"instruction": "Add.", "instances": [{"input": "1 1", "output": "2"}]},
        ),
        Format(
            "alpaca",
            (("instruction", "output"), ("instruction", "response")),
            ("input", "context", "system", "history", "tools"),
            converters.alpaca,
            "instruction, maybe input (added after a blank line), output; maybe history, a list of [prompt, answer]",
            {"instruction": "Add.", "input": "1 1", "output": "2"},
        ),
        Format(
            "prompt-completion",
            (("prompt", "completion"),),
            ("system", "history", "tools"),
            converters.columns,
            "two strings, or two lists of messages; turns of the prompt are not trained on",
            {"prompt": "hi", "completion": "yo"},
            exact=True,
        ),
        Format(
            "question-answer",
            (("question", "answer"), ("query", "response"), ("prompt", "response"), ("input", "output")),
            ("system", "history", "tools"),
            converters.columns,
            "the same under other names, maybe with a history; any two columns: `--data.columns prompt=A,completion=B`",
            {"question": "hi", "answer": "yo"},
            exact=True,
        ),
        Format(
            "prompt",
            (("prompt",),),
            ("system", "history", "tools"),
            converters.prompt_alone,
            "a prompt without an answer, a string or messages: for `train.objective grpo`, where the model answers",
            {"prompt": "hi"},
            exact=True,
            fits=converters.is_prompt_alone,
        ),
        Format(
            "text",
            (("text",),),
            (),
            converters.text,
            "raw text, trained on as it is (continued pretraining)",
            {"text": "Once upon a time ..."},
            exact=True,
        ),
    )
}

PICTURE = "<image>"
PAIRED = frozenset({"preference", "ranking"})  # formats of pairs

# Not content beside two columns, but beside `text` they may be the answer (banking77: text, category).
_TOPICS = frozenset({"category", "subject", "topic", "domain", "difficulty", "level", "type", "task", "tags", "tag"})


def shape_of(value: Value) -> str | None:
    """The name of the format that a row has, or None. A column that is null counts as absent."""
    present = {key for key, held in value.items() if held is not None}
    for entry in FORMATS.values():
        keys = entry.found_in(present)
        if keys and (entry.fits is None or entry.fits(value, keys)) and not (entry.exact and _unclear(value, entry)):
            return entry.name
    return None


def _unclear(value: Value, entry: Format) -> list[str]:
    """Columns that may hold content and that the format would leave out."""
    used = {*(entry.found_in(value) or ()), *entry.optional} | METADATA | (_TOPICS if entry.name != "text" else set())
    return [
        key
        for key, held in value.items()
        if key.lower() not in used
        and not key.lower().endswith("_id")
        and isinstance(held, bool | str | list | dict)
        and held != ""
    ]


class Conversations(Iterator[Conversation]):
    """The conversations of rows, one by one, and what was found so far:

    found: the format by file (whether to train on pairs or judged answers is for the caller to say).
    unused: by column that is not read, how many rows have it.
    num_rows, num_used: rows taken in, and rows that gave conversations; the difference is in `bad`.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        format: str,
        columns: Mapping[str, str] | None,
        bad: list[RowFault],
        answerless: bool = False,
    ) -> None:
        self.found: dict[str, str] = {}
        self.unused: Counter[str] = Counter()
        self.num_rows = 0
        self.num_used = 0
        self._bad = bad
        self._answerless = answerless
        self._columns = columns or {}
        self._asked = _asked(format, self._columns)
        self._first: Row | None = None  # the first row of this file that has a shape
        self._odd: Row | None = None  # the first row of this file that has none
        self._made = self._convert_all(rows)

    def __next__(self) -> Conversation:
        return next(self._made)

    def _convert_all(self, rows: Iterable[Row]) -> Iterator[Conversation]:
        file: str | None = None
        for row in rows:
            if row.file != file:
                self._end_of_file()
                file = row.file
            self.num_rows += 1
            try:
                said = self._convert(row)
            except BadRow as error:
                self._bad.append(RowFault(error.code, Where(row.file, row.line, error.what)))
                continue
            self.num_used += 1
            for one in said:
                judged = (one.rejected, one.desirable)
                yield Conversation(row.file, row.line, one.messages, one.tools, one.text, *judged)
        self._end_of_file()

    def _end_of_file(self) -> None:
        if self._odd and not self._first:  # no row had a shape: a fault of the file, not of each row
            what = f"no format has the columns {_listed(self._odd.value)}"
            raise files.refuse(self._odd.file, what, _options(self._odd.value), self._odd.line)
        self._first = self._odd = None

    def _convert(self, row: Row) -> list[Said]:
        value = self._renamed(row.value)
        entry = self._asked or self._format_of(row)
        self.found[row.file] = entry.name
        keys = entry.found_in(key for key, held in value.items() if held is not None) or entry.found_in(value)
        if keys is None:
            needed = " or ".join("+".join(keys) for keys in entry.keys)
            raise BadRow("missing-column", f"format {entry.name} needs {needed}; the row has {_listed(row.value)}")
        self.unused.update(set(value) - {*keys, *entry.optional})
        if seen := [name for name in MEDIA if value.get(name)]:
            raise BadRow(
                "media", f"{seen[0]} holds what is seen or heard, which is not read; without it: --data.columns"
            )
        said = self._said(entry, value, keys)
        if any(PICTURE in turn.content for one in said for turn in (*one.messages, *one.rejected)):
            raise BadRow("media", f"the text holds {PICTURE}, the place of a picture, and pictures are not read")
        return said

    def _said(self, entry: Format, value: Value, keys: Keys) -> list[Said]:
        try:
            return entry.convert(value, keys)
        except BadRow as fault:
            if not self._answerless or fault.code != "no-assistant" or entry.convert is not converters.messages:
                raise
        return converters.prompt_alone(value, keys)

    def _renamed(self, value: dict[str, Any]) -> dict[str, Any]:
        for name in self._columns.values():
            if name not in value:
                raise BadRow("missing-column", f"no column {name!r}{nearest(name, value)}")
        if self._columns:
            self.unused.update(set(value) - set(self._columns.values()))
            return {key: value[name] for key, name in self._columns.items()}
        return value

    def _format_of(self, row: Row) -> Format:
        shape = shape_of(row.value)
        if self._first is None:
            if shape is None:
                self._odd = self._odd or row
                raise BadRow("unknown-shape", f"no format has the columns {_listed(row.value)}")
            self._first = row
            return FORMATS[shape]
        expected = FORMATS[self.found[row.file]]
        if shape is None and not expected.found_in(row.value):  # with its columns null, it is that shape, and faulty
            raise BadRow("unknown-shape", f"not {expected.name}, nor another format: columns {_listed(row.value)}")
        if shape not in (None, expected.name):
            places = [(self._first.line, expected.name), (row.line, shape)]
            raise DataError(
                f"rows of two formats in one file: {expected.name} and {shape}",
                fix="write a file for each, or say which all rows have with --data.format",
                where=[Where(row.file, line, f"a row of format {name}") for line, name in places],
            )
        return expected


def conversations(
    rows: Iterable[Row],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    bad: list[RowFault],
    answerless: bool = False,
) -> Conversations:
    """Conversations of `rows`, in order; a self-instruct row may give several. Row faults go to `bad`.

    `columns` maps a format's names to those of the file, and then no other column is read. answerless: conversations
    without an answer are prompts. Raises DataError: an
    unknown format or column name, two formats in one file, or a file no row of which has a known one.
    """
    return Conversations(rows, format, columns, bad, answerless)


def _asked(format: str, columns: Mapping[str, str]) -> Format | None:
    """The format that the options fix, if any."""
    known_formats = ("auto", DOCUMENT, *FORMATS)
    if format not in known_formats:
        what = f"--data.format {format}: no such format{nearest(format, known_formats)}"
        raise DataError(what, fix=", ".join(known_formats))
    named = FORMATS.get("text" if format == DOCUMENT else format)
    if not columns:
        return named
    known = {key for entry in FORMATS.values() for keys in (*entry.keys, entry.optional) for key in keys}
    for key in columns:
        if key not in known:
            fix = f"the name of a format's column stands left: {', '.join(sorted(known))}"
            raise DataError(f"--data.columns {key}={columns[key]}: no format has {key}{nearest(key, known)}", fix=fix)
    for entry in [named] if named else FORMATS.values():
        if entry.found_in(columns):
            return entry
    raise DataError(
        f"--data.columns names {', '.join(columns)}: that makes no format", fix="name two, as prompt=A,completion=B"
    )


def _listed(value: Value) -> str:
    names = [key[:40] + (" (null)" if held is None else "") for key, held in list(value.items())[:12]]
    return (", ".join(names) or "(none)") + (", ..." if len(value) > 12 else "")


def _options(value: Value) -> str:
    """The options that make a row of no format load."""
    options = [
        f"--data.format {entry.name} (without {', '.join(left)})"
        for entry in FORMATS.values()
        if entry.found_in(key for key, held in value.items() if held is not None) and (left := _unclear(value, entry))
    ]
    texts = [key for key, held in value.items() if isinstance(held, str)]
    if len(texts) > 1:
        options.insert(0, f"--data.columns prompt={texts[0]},completion={texts[1]} (or other columns)")
    elif texts:
        options.append(f"--data.columns text={texts[0]}")
    return " or ".join(options) or f"known are {'; '.join('+'.join(entry.keys[0]) for entry in FORMATS.values())}"


def placeholders(text: str) -> list[str]:
    """The unfilled `{{name}}` in a text, in order."""
    return re.findall(r"\{\{\s*[A-Za-z_][\w.-]*\s*\}\}", text)


# ---- from strop.data.format_docs ----
"""The tables of docs/data.md, made from the code."""

from __future__ import annotations

import json

from strop.data import converters
from strop.data.formats import FORMATS, REASONS, Format
from strop.data.reading import files


def tables() -> str:
    """The Markdown tables of docs/data.md: formats, file types, reasons, roles."""
    roles = [
        *converters.ROLES.items(),
        *((name, "assistant; its content is the call, as JSON") for name in converters.CALL_ROLES),
    ]
    blocks: list[tuple[str, list[tuple[str, ...]]]] = [
        ("| format | columns | what | example |", [_described(entry) for entry in FORMATS.values()]),
        ("| file type | what |", [(f"`{suffix}`", what) for suffix, (_, what) in files.TYPES.items()]),
        ("| reason | why the row is not used |", [(f"`{code}`", what) for code, what in REASONS.items()]),
        ("| role in the file | role |", [(f"`{name}`", role) for name, role in roles]),
    ]
    return "\n\n".join(
        "\n".join([head, "|" + "---|" * (head.count("|") - 1), *("| " + " | ".join(cells) + " |" for cells in rows)])
        for head, rows in blocks
    )


def _described(entry: Format) -> tuple[str, ...]:
    columns = " or ".join(" + ".join(f"`{key}`" for key in keys) for keys in entry.keys)
    maybe = f"; maybe {', '.join(f'`{key}`' for key in entry.optional)}" if entry.optional else ""
    return f"`{entry.name}`", columns + maybe, entry.what, f"`{json.dumps(entry.example)}`"
