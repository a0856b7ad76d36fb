"""Detect the format of rows and convert them to conversations.

A new format is one entry of FORMATS, and a function in converters.py if no existing one fits.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from strop.data import converters
from strop.data.converters import (
    IMAGES,
    MEDIA,
    METADATA,
    SYSTEM,
    Keys,
    ParsedRow,
    RowValue,
    find_images,
    read_images,
)
from strop.data.reading.in_memory import describe_file
from strop.data.reading.tables import describe_mapping, is_row_number, suggest_mapping
from strop.data.row_errors import InvalidRow, RowError, file_error
from strop.data.types import Conversation, DataKind, Row
from strop.errors import DataError, Location, suggest


@dataclass(frozen=True)
class Format:
    """A row format: its columns and their conversion."""

    name: str  # value of data.format
    keys: tuple[Keys, ...]  # alternative sets of required columns
    optional: Keys  # other columns that `convert` reads
    convert: Callable[[RowValue, Keys], list[ParsedRow]]
    description: str  # for the documentation
    example: dict[str, Any]  # a row, for the documentation and a test
    exact: bool = False  # not detected if other columns may have content, such as `summary` next to `text`
    matches: Callable[[RowValue, Keys], bool] | None = None  # additional condition on the values of a detected row

    def matching_keys(self, columns: Iterable[str]) -> Keys | None:
        """Return the first of `keys` whose columns are all in `columns`."""
        present = set(columns)
        return next((keys for keys in self.keys if present.issuperset(keys)), None)


DOCUMENT = "document"  # value of data.format: `text`, with a plain text file as one row
_HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]

# In order of priority: a row that matches several formats has the first of them.
FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            "preference",
            (
                ("chosen", "rejected"), ("chosen_messages", "rejected_messages"), ("messages", "rejected_messages"),
                ("messages", "rejected_response"),
            ),
            (
                "prompt", "question", "instruction", "input", "messages", "conversation", "conversations", "history",
                *SYSTEM, "tools",
            ),
            converters.convert_preference,
            "pairs of a chosen and a rejected answer, as strings, messages, or whole conversations with a shared "
            "prefix: [preferences](preferences.md)",
            {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        ),
        Format(
            "ranking", converters.RANKED, (*SYSTEM, "tools"), converters.convert_ranking,
            "answers to one prompt, each with a score; any two answers with different scores make a pair",
            {"prompt": "hi", "answers": ["yo", "no"], "scores": [1, 0]},
        ),
        Format(
            "labelled", converters.LABELLED, (*SYSTEM, "tools", "input", "context", "history"),
            converters.convert_labelled,
            "an answer that was judged good or bad (true, false, up, down, ...; 1 and 0 not in `label`)",
            {"prompt": "hi", "completion": "yo", "label": True},
            matches=converters.is_labelled,
        ),
        Format(
            "messages", (("messages",),), (*SYSTEM, "tools"), converters.convert_messages,
            "messages with role and content (a string, or parts of type text, reasoning, tool_call), optionally "
            "tool_calls, reasoning_content, and a weight (weight, loss_weight or train); or their JSON",
            {"messages": _HI},
        ),
        Format(
            "sharegpt", (("conversations",), ("conversation",)), (*SYSTEM, "tools"), converters.convert_messages,
            "the same with from and value, or human and assistant in one object; function_call and observation "
            "messages; tools as a list or as JSON in a string",
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        ),
        Format(
            "self-instruct", (("instruction", "instances"),), (*SYSTEM,), converters.convert_instances,
            "an instruction with a list of input and output; each item is one conversation",
            {"instruction": "Add.", "instances": [{"input": "1 1", "output": "2"}]},
        ),
        Format(
            "alpaca", (("instruction", "output"), ("instruction", "response")),
            ("input", "context", *SYSTEM, "history", "tools"), converters.convert_alpaca,
            "instruction, optional input (added after a blank line), output; optional history, "
            "a list of [prompt, answer]",
            {"instruction": "Add.", "input": "1 1", "output": "2"},
        ),
        Format(
            "prompt-completion", (("prompt", "completion"),), (*SYSTEM, "history", "tools"),
            converters.convert_columns,
            "two strings, or two lists of messages; the prompt does not end with an answer, and is not trained on",
            {"prompt": "hi", "completion": "yo"},
            exact=True,
        ),
        Format(
            "question-answer",
            (("question", "answer"), ("query", "response"), ("prompt", "response"), ("input", "output")),
            (*SYSTEM, "history", "tools"), converters.convert_columns,
            "the same under other names, optionally with a history; for any two columns: "
            "`--data.columns prompt=A,completion=B`",
            {"question": "hi", "answer": "yo"},
            exact=True,
        ),
        Format(
            "prompt", (("prompt",),), (*SYSTEM, "history", "tools"), converters.convert_prompt,
            "a prompt without an answer, a string or messages: for `train.objective grpo`, which samples completions",
            {"prompt": "hi"},
            exact=True,
            matches=lambda value, _: None not in value.values(),  # a null column may be a missing answer
        ),
        Format(
            "classification", converters.CLASSIFIED, (*SYSTEM, "tools"), converters.convert_classified,
            "a text, or messages (with a system prompt and tools), with a label (a string or an integer) or a list of "
            "labels: "
            "for `train.objective classify`",
            {"text": "book a table for two", "label": "BookRestaurant"},
            matches=lambda *_: False,  # read by data.format, or by the objective
        ),
        Format(
            "triplet", converters.TRIPLETS, converters.NEGATIVES, converters.convert_triplet,
            "an anchor, a text that matches it (or a list), and texts that do not (optional; a text, a list, or "
            "negative_1, negative_2, ...): for `train.objective embed`",
            {"anchor": "a taxi", "positive": "a cab", "negative": "a train"},
            matches=lambda *_: False,  # read by data.format, or by the objective
        ),
        Format(
            "text", (("text",),), (), converters.convert_text,
            "raw text, trained on unchanged (continued pretraining)",
            {"text": "Once upon a time ..."},
            exact=True,
        ),
    )
}  # fmt: skip
_ALL_KEYS = {key for entry in FORMATS.values() for keys in entry.keys for key in keys}

# the usual format of the rows of each kind
USUAL_FORMATS: dict[DataKind, str] = {
    "turns": "prompt-completion", "pairs": "preference", "labels": "labelled", "prompts": "prompt",
    "classes": "classification", "triplets": "triplet",
}  # fmt: skip
_MESSAGE_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "weight"})
PAIRED = frozenset({"preference", "ranking"})  # formats of preference pairs
TEXT_FORMATS: dict[DataKind, str] = {"classes": "classification", "triplets": "triplet"}

# Columns that are metadata next to a prompt and an answer. Next to `text` they may be the answer, as in banking77.
_TOPICS = frozenset({"category", "subject", "topic", "domain", "difficulty", "level", "type", "task", "tags", "tag"})

_QUESTIONS = frozenset(
    {"question", "query", "problem", "passage", "document", "article"}
)  # not read next to instruction
_CLASSES = frozenset({"label", "labels", "class", "target"})  # a number in them is the answer to `text`
NEWLY_READ = frozenset(SYSTEM[1:]) | _QUESTIONS | _CLASSES  # columns that version 0.1 left out


def detect_format(value: RowValue) -> str | None:
    """Return the name of the format that a row has, or None. A null column counts as absent."""
    for entry in FORMATS.values():
        keys = entry.matching_keys(_present_columns(value))
        if keys is None or (entry.matches is not None and not entry.matches(value, keys)):
            continue
        if not _ambiguous_columns(value, entry):
            return entry.name
    return None


def _present_columns(value: RowValue) -> list[str]:
    return [key for key, item in value.items() if item is not None]


def _ambiguous_columns(value: RowValue, entry: Format) -> list[str]:
    """Return the columns because of which a row with the columns of this format may be of another one."""
    unread = _unread_columns(value, entry)
    return unread if entry.exact else [name for name in unread if entry.name == "alpaca" and name in _QUESTIONS]


def _unread_columns(value: RowValue, entry: Format) -> list[str]:
    """Return the columns that the format does not read although they may be training data."""
    used = {*(entry.matching_keys(value) or ()), *entry.optional, *IMAGES} | METADATA
    used |= _TOPICS if entry.name != "text" else set()
    columns = [key for key, item in value.items() if isinstance(item, bool | str | list | dict) and item != ""]
    columns = [key for key in columns if not is_row_number(key, value[key])]
    if entry.name == "text":
        columns += [key for key, item in value.items() if type(item) in (int, float) and key.lower() in _CLASSES]
    return [key for key in columns if key.lower() not in used and not key.lower().endswith("_id")]


def image_folder(file: str, chosen: str | None) -> Path:
    """Return the folder in which relative paths of images start. chosen: value of data.image_folder."""
    if chosen is not None:
        return Path(chosen).expanduser()
    return Path() if describe_file(file) else Path(file).parent


class ConversationReader:
    """Iterate over the conversations of rows, in order. Self-instruct and ranking rows may have several.

    format: name of a format, or `auto`. columns: a format's column names -> names in the file; other columns are then
    ignored. errors: receives the errors of single rows. data_kind: for "prompts", conversations without an answer are
    prompts; for "classes" and "triplets", format `auto` means `classification` and `triplet`. image_folder: where
    relative paths of images start, by default the folder of each file. trains: whether the rows are to train on, or to
    evaluate on, for errors.

    Raises DataError for an unknown format or column name, two formats in one file, or a file without a row of known
    format.
    """

    def __init__(
        self, rows: Iterable[Row], *, format: str = "auto", columns: Mapping[str, str] | None = None,
        errors: list[RowError], data_kind: DataKind = "turns", image_folder: str | None = None,
        trains: bool = True,
    ) -> None:  # fmt: skip
        self._image_folder = image_folder
        self.formats: dict[str, str] = {}  # file -> name of its format
        self.unlabelled: dict[str, str] = {}  # file with labelled answers -> name of the format without the label
        self.chosen: dict[str, str] = {}  # file with pairs -> data.columns that reads only their better answers
        self.unused: Counter[str] = Counter()  # column that is not read -> number of rows with it
        self.num_rows = self.num_used = 0  # rows read, and rows converted without an error
        self._errors = errors
        self._answerless = data_kind == "prompts"
        self._trained_kind = data_kind if trains else None
        self._columns = columns or {}
        self._is_implied = format == "auto" and data_kind in TEXT_FORMATS  # the format of the objective, not the user's
        format = TEXT_FORMATS[data_kind] if self._is_implied else format
        self._requested = _requested_format(format, self._columns)
        self._first_known: Row | None = None  # first row of the current file with a known format
        self._first_unknown: Row | None = None  # first row of the current file with an unknown format
        self._rows = rows

    def __iter__(self) -> Iterator[Conversation]:
        for _, rows_of_file in groupby(self._rows, lambda row: row.file):
            self._first_known = self._first_unknown = None
            first, num_used_before = None, self.num_used
            for row in rows_of_file:
                self.num_rows += 1
                first = first or row
                try:
                    parsed_rows = self._convert(row)
                except InvalidRow as error:
                    self._errors.append(RowError(error.code, Location(row.file, row.line, error.what)))
                    continue
                self.num_used += 1
                for parsed in parsed_rows:
                    yield Conversation(row.file, row.line, **vars(parsed))
            if self._first_unknown and not self._first_known:  # no row of the file has a known format
                raise self._unknown_format(self._first_unknown)
            if (
                self._is_implied
                and first
                and self.num_used == num_used_before
                and (other := detect_format(first.value))
            ):
                self.formats[first.file] = other  # rows for another objective

    def _convert(self, row: Row) -> list[ParsedRow]:
        value = self._rename_columns(row.value)
        entry = self._requested or self._find_format(row)
        self.formats[row.file] = entry.name
        keys = entry.matching_keys(_present_columns(value)) or entry.matching_keys(value)
        if keys is None:
            needed = " or ".join("+".join(keys) for keys in entry.keys)
            if entry.name in TEXT_FORMATS.values():
                pairs = [keys for keys in entry.keys if keys != converters.ANSWERS_OF_PAIR]
                names = (", ".join(dict.fromkeys(columns)) for columns in zip(*pairs, strict=True))
                needed = " and ".join(f"one of {listed}" for listed in names)
            what = f"format {entry.name} needs {needed}; the row has {_list_columns(row.value)}"
            raise InvalidRow("missing-column", what)
        if entry.name == "labelled":
            self.unlabelled[row.file] = next(name for name, other in FORMATS.items() if keys[:-1] in other.keys)
        if entry.name == "preference" and row.file not in self.chosen and (columns := _chosen_columns(value, keys)):
            self.chosen[row.file] = columns
        unread = converters.unread_pair_columns(value, keys) if entry.name == "preference" else set()
        if entry.name == "classification" and keys[0] not in converters.TURNS:  # a text is used alone
            unread = {name for name in entry.optional if value.get(name)}
        used = {*keys, *entry.optional, *(filter(converters.is_negative, value) if entry.name == "triplet" else ())}
        used |= set(IMAGES)
        self.unused.update(set(value) - used | unread)
        if media := [name for name in MEDIA if value.get(name)]:
            what = f"the column {media[0]} is not supported; to read the row without it, set --data.columns"
            raise InvalidRow("media", what)
        try:
            parsed_rows = entry.convert(value, keys)
        except InvalidRow as error:
            if not self._answerless or error.code != "no-assistant" or entry.convert is not converters.convert_messages:
                raise
            parsed_rows = converters.convert_prompt(value, keys)
        folder, images = image_folder(row.file, self._image_folder), find_images(value)
        return [read_images(parsed, folder, images) for parsed in parsed_rows]

    def _rename_columns(self, value: dict[str, Any]) -> dict[str, Any]:
        for name in self._columns.values():
            if name not in value:
                raise InvalidRow(
                    "missing-column", f"no column {name!r}, which data.columns names{suggest(name, value)}"
                )
        if self._columns:
            self.unused.update(set(value) - set(self._columns.values()))
            return {key: value[name] for key, name in self._columns.items()}
        return value

    def _find_format(self, row: Row) -> Format:
        detected = detect_format(row.value)
        if detected is None:
            present = _present_columns(row.value)
            candidates = FORMATS.values() if self._first_known is None else [FORMATS[self.formats[row.file]]]
            if any(entry.matching_keys(present) and _ambiguous_columns(row.value, entry) for entry in candidates):
                raise self._unknown_format(row)  # also if this column is empty in other rows
        if self._first_known is None:
            if detected is None:
                self._first_unknown = self._first_unknown or row
                raise InvalidRow("unknown-shape", f"no format has the columns {_list_columns(row.value)}")
            self._first_known = row
            return FORMATS[detected]
        expected = FORMATS[self.formats[row.file]]
        if detected is None and not expected.matching_keys(row.value):  # with null values, it is a row of the format
            what = f"not {expected.name}, nor another format: columns {_list_columns(row.value)}"
            raise InvalidRow("unknown-shape", what)
        if detected == "prompt" and not self._answerless:
            missing = " or ".join(sorted({key for keys in expected.keys if keys[0] == "prompt" for key in keys[1:]}))
            if missing or expected.name != "prompt":
                raise InvalidRow("no-content", f"no {missing or 'answer'}, which other rows of the file have")
        if expected.name == "prompt" and detected not in (None, "prompt") and not self._answerless:
            where = Location(row.file, self._first_known.line, f"no completion, which row {row.line} has")
            fix = "give each row a completion, or remove the rows without one"
            raise DataError("rows with and without a completion in one file", fix=fix, where=[where])
        if detected not in (None, expected.name):
            rows = [(self._first_known.line, expected.name), (row.line, detected)]
            raise DataError(
                f"rows of two formats in one file: {expected.name} and {detected}",
                fix="write one file for each, and give both",
                where=[Location(row.file, line, f"a row of format {name}") for line, name in rows],
            )
        return expected

    def _unknown_format(self, row: Row) -> DataError:
        what = f"no format has the columns {_list_columns(row.value)}"
        fix = _suggest_options(row.value, self._trained_kind)
        if self.formats.keys() - {row.file}:
            fix = f"rename or remove columns of this file, because options apply to every file (alone it needs {fix})"
        return file_error(row.file, what, fix, row.line)


def _chosen_columns(value: Mapping[str, Any], keys: Keys) -> str | None:
    """Return a value of data.columns that reads the better answer of a pair alone, or None if it is ambiguous."""
    chosen, prompts = value.get(keys[0]), [name for name in ("prompt", "question") if value.get(name)]
    if keys[0] == "messages" or (isinstance(chosen, list) and not prompts):
        return f"messages={keys[0]}"
    return f"prompt={prompts[0]},completion={keys[0]}" if isinstance(chosen, str) and len(prompts) == 1 else None


def _requested_format(format: str, columns: Mapping[str, str]) -> Format | None:
    """Return the format that data.format or data.columns select, if any. Raises DataError for unknown names."""
    known_formats = ("auto", DOCUMENT, *FORMATS)
    if format not in known_formats:
        what = f"--data.format {format}: no such format{suggest(format, known_formats)}"
        raise DataError(what, fix=", ".join(known_formats))
    named = FORMATS.get("text" if format == DOCUMENT else format)
    if not columns:
        return named
    known = {key for entry in FORMATS.values() for keys in (*entry.keys, entry.optional) for key in keys} | {*IMAGES}
    candidates = [named] if named else [*FORMATS.values()]
    found = next((entry for entry in candidates if entry.matching_keys(columns)), None)
    if found is None:
        reverse = {theirs: ours for ours, theirs in columns.items()}
        if known.issuperset(reverse) and any(entry.matching_keys(reverse) for entry in candidates):
            what = f"--data.columns names {', '.join(columns)} before the =: no format has these columns"
            mapping = ",".join(f"{ours}={theirs}" for ours, theirs in reverse.items())
            raise DataError(what, fix=f"write it the other way round: --data.columns {shlex.quote(mapping)}")
    for key in columns:
        if key not in known:
            fix = f"use a column of a format before the =: {', '.join(sorted(known))}"
            raise DataError(f"--data.columns {key}={columns[key]}: no format has {key}{suggest(key, known)}", fix=fix)
    if found is not None:
        return found
    what = f"--data.columns names {', '.join(columns)}: no format has these columns"
    raise DataError(what, fix="give two columns, for example --data.columns prompt=A,completion=B")


def _list_columns(value: RowValue) -> str:
    names = [(key[:40] or "(unnamed)") + (" (null)" if item is None else "") for key, item in list(value.items())[:12]]
    return (", ".join(names) or "(none)") + (", ..." if len(value) > 12 else "")


def _suggest_options(value: RowValue, trained_kind: DataKind | None) -> str:
    """Return the options with which a row without a format can be read. trained_kind: None for rows to evaluate on."""
    present = _present_columns(value)
    if is_message(value):
        return 'a row is a whole conversation: {"messages": [{"role": ..., "content": ...}, ...]}'
    if "anchor" in present and FORMATS["triplet"].matching_keys(present):
        embed = "--train.objective embed, to train a model of embeddings"
        return embed if trained_kind is not None else f"evaluate a run of {embed.partition(',')[0]}"
    unread = {
        entry.name: columns
        for entry in FORMATS.values()
        if entry.matching_keys(present) and (columns := _unread_columns(value, entry))
    }
    if len(unread) > 1 or trained_kind != "prompts":
        unread.pop("prompt", None)  # has no answer, and the row or the objective does
    if trained_kind is None:
        unread.pop("text", None)
    for name in TEXT_FORMATS.values():
        unread.pop(name, None)
    options = [f"--data.format {name} (without {', '.join(columns)})" for name, columns in unread.items()]
    names = [key for key, item in value.items() if isinstance(item, str) and not is_row_number(key, item)]
    mapping = suggest_mapping(names)
    if mapping is not None and not (unread.keys() - {"text"} and mapping.count("=") == 2):
        options.insert(0, f"--data.columns {mapping}")
    elif len(names) > 1 and not options:
        contents = [name for name in names if name.lower() not in METADATA]
        options.append(describe_mapping(contents if len(contents) > 1 else names))
    elif nulls := [key for key, item in value.items() if item is None and key in _ALL_KEYS]:
        options.append(f"fill in {' and '.join(nulls)}, which {'is' if len(nulls) == 1 else 'are'} null")
    elif len(names) == 1 and not options:
        options.append(f"--data.columns {shlex.quote(f'text={names[0]}')}")
    if trained_kind is not None and FORMATS["classification"].matching_keys(present):
        options.append("--train.objective classify, to train a classifier")
    return " or ".join(options) or f"known are {'; '.join('+'.join(entry.keys[0]) for entry in FORMATS.values())}"


def is_message(value: Mapping[str, Any]) -> bool:
    """Return whether a row is a message of a conversation, and not a conversation."""
    return value.keys() <= _MESSAGE_KEYS and str(value.get("role")) in converters.ROLES and "content" in value


def example_row(data_kind: DataKind) -> str:
    """Return a row of the usual format of a kind of data, as JSON."""
    return json.dumps(FORMATS[USUAL_FORMATS[data_kind]].example)


def find_placeholders(text: str) -> list[str]:
    """Return the unfilled `{{name}}` in a text, in order."""
    return re.findall(r"\{\{\s*[A-Za-z_][\w.-]*\s*\}\}", text)
