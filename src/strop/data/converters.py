"""Convert a row to conversations, with one function per row format. All of them raise InvalidRow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, permutations, product
from pathlib import Path
from typing import Any, cast

from strop.data.images import MAX_PIXELS, read_image
from strop.data.reading.json_reader import JsonError, loads
from strop.data.row_errors import InvalidRow, type_name
from strop.data.types import MARK, Image, Label, Message, Role, shared_prefix_length
from strop.errors import suggest

RowValue = Mapping[str, Any]  # column -> value
Keys = tuple[str, ...]  # the columns that determine a row's format

# Role names of LLaMA-Factory, ShareGPT, OpenAI, OpenAssistant and Llama. Other names are an error.
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
# Columns that are ignored, because their values are not training data.
METADATA = frozenset((
    "id", "idx", "index", "uuid", "uid", "hash", "url", "source", "dataset", "split", "subset", "title", "name", "date",
    "timestamp", "created", "lang", "language", "license", "meta", "metadata", "model", "author", "version",
))  # fmt: skip
TURNS = ("messages", "conversations")  # columns with messages to classify
CLASSIFIED: tuple[Keys, ...] = tuple(
    product(
        ("text", "sentence", "content", "query", "utterance", *TURNS),
        ("label", "labels", "intent", "category", "class", "sentiment"),
    )
)
ANSWERS_OF_PAIR = ("chosen", "rejected")
TRIPLETS: tuple[Keys, ...] = (
    *product(
        ("anchor", "query", "question", "sentence1", "prompt"),
        ("positive", "pos", "answer", "document", "sentence2", "response", "chosen", "completion"),
    ),
    ANSWERS_OF_PAIR,
)
NEGATIVES = ("negative", "negatives", "neg", "hard_negatives", "rejected", "rejected_response")
SCORES = ("label", "is_duplicate", "score")  # of a pair of texts: 1 if they match
SYSTEM = ("system", "system_prompt", "system_message")  # columns with the text of the system message
IMAGES = ("images", "image")  # columns, and keys of a message
MEDIA = ("audio", "audios", "video", "videos")  # the same, which are not supported
IMAGE_PLACEHOLDER = "<image>"  # in a text: the place of an image that is in a column
_IMAGE_OF_ASSISTANT = "an assistant message has an image, which no model here writes"
_MARKED = re.compile(MARK)
_PLACE = re.compile(f"{MARK}|\n?{IMAGE_PLACEHOLDER}\n|\n?{IMAGE_PLACEHOLDER}")
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT: an assistant message whose content is a call as JSON


@dataclass(frozen=True)
class ImageSource:
    """An image of a row that has not been read.

    value: None in a message: the next image in a column of the row. index: the index of that image, if the row has it.
    """

    value: Any
    location: str = field(compare=False)  # the prompts of a pair are equal
    index: int | None = None


@dataclass(frozen=True)
class ParsedRow:
    """A conversation without file and line. The fields are those of Conversation."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    rejected: tuple[Message, ...] = ()
    desirable: bool | None = None
    label: Label | None = None
    passages: tuple[str, ...] = ()


def convert_messages(row: RowValue, keys: Keys) -> list[ParsedRow]:
    """Convert a column with a list of messages, or of objects such as {"human": ..., "assistant": ...}, or its JSON."""
    if isinstance(row[keys[0]], str):  # a cell of a table
        row = {**row, keys[0]: _parse_json(row[keys[0]], "bad-messages", keys[0])}
    turns = row[keys[0]]
    without_role = isinstance(turns, list) and all(isinstance(t, dict) and not {"role", "from"} & set(t) for t in turns)
    if without_role and turns:
        turns = [turn for i, exchange in enumerate(turns) for turn in _parse_exchange(exchange, f"{keys[0]}[{i}]")]
        row = {**row, keys[0]: turns}
    return [_make_row(_parse_turns(row, keys[0]), row)]


def _parse_exchange(exchange: dict[str, Any], location: str) -> list[dict[str, Any]]:
    """Return the turns of {"human": ..., "assistant": ...}, the system turn first."""
    turns = []
    for key, content in exchange.items():
        if key.lower() in ROLES:
            turns.append({"role": key, "content": content})
        elif isinstance(content, str | list | dict) and content and key.lower() not in METADATA:
            what = f"{key[:40]!r} has content and is not a known role; write such messages with role and content"
            raise InvalidRow("unknown-role", f"{location}: {what}")
    return sorted(turns, key=lambda turn: ROLES[turn["role"].lower()] != "system")


def parse_request(row: RowValue) -> ParsedRow:
    """Parse the messages and tools of a chat completion request. The order of roles is not checked."""
    return ParsedRow(tuple(_parse_turns(row, "messages")), _parse_tools(row))


def _parse_turns(row: RowValue, key: str) -> list[Message]:
    turns = row[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InvalidRow("bad-messages", f"{key} is {type_name(turns)}, not a list of objects")
    parsed = [_parse_message(turn, f"{key}[{i}]") for i, turn in enumerate(turns)]
    names = {call["id"]: call["function"]["name"] for turn in parsed for call in turn.tool_calls if "id" in call}
    return _sort_results([
        replace(turn, name=names.get(str(raw.get("tool_call_id")))) if turn.role == "tool" and not turn.name else turn
        for turn, raw in zip(parsed, turns, strict=True)
    ])  # fmt: skip


def _sort_results(turns: list[Message]) -> list[Message]:
    """Put the results of a turn's calls into the order of the calls, as many templates show no ids.

    Results without id and name are those of the calls in turn, and get their names.
    """
    result: list[Message] = []
    calls: tuple[dict[str, Any], ...] = ()  # of the last assistant turn
    for is_result, group in groupby(turns, lambda turn: turn.role == "tool"):
        block = list(group)
        order = {call["id"]: i for i, call in enumerate(calls) if "id" in call}
        if is_result and len({turn.call_id for turn in block} & order.keys()) == len(block):
            block.sort(key=lambda turn: order[turn.call_id])
        elif is_result and len(block) <= len(calls) and not any(turn.call_id or turn.name for turn in block):
            names = (call["function"]["name"] for call in calls)
            block = [replace(turn, name=name) for turn, name in zip(block, names, strict=False)]
        result += block
        calls = block[-1].tool_calls
    return result


def _make_row(turns: list[Message], row: RowValue) -> ParsedRow:
    """Return the turns with the row's system text and tools. Raises InvalidRow if the dialogue is invalid."""
    turns = _prepend_system(row, turns)
    dialogue = [turn for turn in turns if turn.role != "system"]
    if not any(turn.role == "assistant" for turn in dialogue):
        raise InvalidRow("no-assistant", "no assistant message" if turns else "no messages")
    if dialogue[0].role != "user":
        raise InvalidRow("no-user-first", f"the first message is the {dialogue[0].role}'s, not the user's")
    for turn in dialogue:
        blank = not turn.content.strip()
        if blank and turn.role == "assistant" and not turn.tool_calls and turn.weight:
            raise InvalidRow("empty-answer", "an assistant message is empty: it would train the model to stop at once")
    _check_user_messages(dialogue, row)
    return ParsedRow(tuple(turns), _parse_tools(row))


def _check_user_messages(dialogue: Sequence[Message], row: RowValue) -> None:
    """Raise InvalidRow for an empty user message, unless it is where the images of the row's columns are put."""
    has_images = any(row.get(key) for key in IMAGES) and not any(IMAGE_PLACEHOLDER in x.content for x in dialogue)
    users = [turn for turn in dialogue if turn.role == "user"]
    if any(not turn.content.strip() for turn in users[1 if has_images else 0 :]):
        raise InvalidRow("empty-prompt", "a user message is empty")


def _parse_message(turn: dict[str, Any], location: str) -> Message:
    role_key = "role" if turn.get("role") is not None else "from"
    role_name = turn.get(role_key)
    if role_name is None and not {"content", "value"} & turn.keys():
        raise InvalidRow("not-text", f"{location} is an object: write it as a text (json.dumps), or as a message")
    if not isinstance(role_name, str):
        raise InvalidRow("unknown-role", f"{location}.{role_key} is {type_name(role_name)}, not a string")
    if media := [key for key in MEDIA if turn.get(key)]:
        raise InvalidRow("media", f"{location}: {media[0]} is not supported")
    content = turn["content"] if "content" in turn else turn.get("value")
    weight = _parse_weight(turn, location)
    images = find_images(turn, f"{location}.")
    if role_name.lower() in CALL_ROLES:
        if images:
            raise InvalidRow("bad-image", f"{location}: {_IMAGE_OF_ASSISTANT}")
        return Message("assistant", "", tool_calls=_parse_calls(content, location), weight=weight)
    role = ROLES.get(role_name.lower())
    if role is None:
        hint = suggest(role_name, [*ROLES, *CALL_ROLES])
        raise InvalidRow("unknown-role", f"{location}: unknown role {role_name[:40]!r}{hint}")
    calls = _parse_calls(turn["tool_calls"], location) if turn.get("tool_calls") else ()
    calls += _parse_calls(turn["function_call"], location) if turn.get("function_call") else ()
    reasoning = [turn[key] for key in ("reasoning_content", "reasoning", "thinking") if turn.get(key)]
    if len(reasoning) > 1 or not all(isinstance(text, str) for text in reasoning):
        raise InvalidRow("bad-part", f"{location}: the reasoning must be one string")
    parts: Sequence[ImageSource] = ()
    if isinstance(content, list):
        content, reasoning_parts, call_parts, parts = _parse_parts(content, location)
        reasoning, calls = reasoning + reasoning_parts, calls + call_parts
    if images and isinstance(content, str | None):
        content, parts = _place_images(content or "", parts, images, location)
    if content is None:
        if not calls:
            raise InvalidRow("no-content", f"{location}: content is null or missing (allowed only next to tool calls)")
        content = ""
    content = _check_string(content, f"{location}: content")
    if role != "assistant" and (calls or reasoning):
        raise InvalidRow("bad-part", f"{location}: only an assistant message can have reasoning or tool calls")
    if parts and role == "assistant":
        raise InvalidRow("bad-image", f"{location}: {_IMAGE_OF_ASSISTANT}")
    name = turn.get("name")
    if name is not None:
        _check_string(name, f"{location}: name")
    id = turn.get("tool_call_id") if role == "tool" else None
    call_id = id if isinstance(id, str) else None
    text = "".join(reasoning) if reasoning else None
    return Message(role, content, text, calls, name, weight, call_id, cast(Any, tuple(parts)))


def _place_images(
    content: str, parts: Sequence[ImageSource], images: Sequence[ImageSource], location: str
) -> tuple[str, list[ImageSource]]:
    """Put the images of a message's key where its text and its parts have places for them, or at the start.

    Returns the text with a mark for each image, and all images of the message.
    """
    places = content.count(IMAGE_PLACEHOLDER) + sum(part.value is None for part in parts)
    if not places and not parts:
        return MARK * len(images) + content, list(images)
    _check_count(places, len(images), f"{location}: ")
    return _fill_places(content, parts, iter(images))


def _check_count(places: int, images: int, location: str = "") -> None:
    if places != images:
        counts = [f"{n} {noun}{'s' * (n != 1)}" for n, noun in ((places, "place"), (images, "image"))]
        raise InvalidRow("image-count", f"{location}{counts[0]} in the text for {counts[1]}")


def _check_marks(content: str, parts: Sequence[ImageSource]) -> None:
    if content.count(MARK) != len(parts):
        raise InvalidRow("bad-image", "a text with an image contains the character U+FFFC")


def _fill_places(
    content: str, parts: Sequence[ImageSource], images: Iterator[ImageSource], *, placeholders: bool = True
) -> tuple[str, list[ImageSource]]:
    """Return a text with a mark in each place of an image, and the images in these places.

    parts: the images of marks; those without a value, and placeholders, are places for the next of `images`.
    placeholders: whether there are any; otherwise `<image>` is text.
    """
    _check_marks(content, parts)
    rest, found = iter(parts), list[ImageSource]()

    def fill(place: re.Match[str]) -> str:
        part = next(rest) if MARK in place[0] else None
        found.append(next(images) if part is None or part.value is None else part)
        return MARK

    return (_PLACE if placeholders else _MARKED).sub(fill, content), found


def find_images(value: Mapping[str, Any], prefix: str = "") -> list[ImageSource]:
    """Return the images of a row's columns or of a message's keys. prefix: of their location."""
    columns = [images for key in IMAGES if (images := list_images(value.get(key), prefix + key))]
    if len(columns) > 1:
        what = f"{prefix}image and {prefix}images both have images, in an unclear order: leave one out"
        raise InvalidRow("image-count", what)
    return columns[0] if columns else []


def list_images(value: Any, location: str) -> list[ImageSource]:
    """Return the images of a column or of a message's key: none, one, or a list, which may be the JSON of one."""
    if isinstance(value, str) and re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL):  # a cell of a table
        value = _parse_json(value, "bad-image", location)
    if value is None or value == "" or value == []:
        return []
    values = value if isinstance(value, list | tuple) else [value]
    sources = [ImageSource(x, location if len(values) == 1 else f"{location}[{i}]") for i, x in enumerate(values)]
    for source in sources:
        if source.value is None or source.value == "":
            raise InvalidRow("bad-image", f"{source.location} is {'null' if source.value is None else 'empty'}")
    return sources


def attach_images(
    turns: Sequence[Message], values: Sequence[ImageSource], read: Callable[[Any, str], Image], *, placeholders: bool
) -> tuple[Message, ...]:
    """Return the messages with their images read, and the placeholder `<image>` replaced by marks.

    A newline next to a placeholder belongs to it, as in LLaVA's files. Without any place for them, the row's images
    are at the start of the first user message.

    Args:
        turns: messages whose `images` are of type ImageSource; those without a value are the row's next images.
        values: the images in columns of the row.
        read: returns the image of a value at a location.
        placeholders: whether `<image>` in a text is a place, and not text.

    Raises:
        InvalidRow: if there are not as many places as images, or an image cannot be used.
    """
    sources = [source for turn in turns for source in _sources(turn)]
    places = sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in turns) if placeholders else 0
    places += sum(source.value is None for source in sources)
    if values and not places:
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None:
            raise InvalidRow("image-count", "the row has an image and no user message")
        if sources:
            raise InvalidRow("image-count", "images in a column and in the messages, and no places for the column's")
        turn = turns[first]
        with_places = replace(turn, content=IMAGE_PLACEHOLDER * len(values) + turn.content)
        turns = [*turns[:first], with_places, *turns[first + 1 :]]
    else:
        _check_count(places, len(values))
    indices = [source.index for source in sources if source.index is not None]
    if indices != list(range(len(indices))):
        raise InvalidRow("bad-image", "the parts of type image are not in the order of their index")
    rest = iter(values)

    def attach(turn: Message) -> Message:
        if not turn.images and not (placeholders and IMAGE_PLACEHOLDER in turn.content):
            return turn
        if turn.role == "assistant":
            raise InvalidRow("bad-image", _IMAGE_OF_ASSISTANT)
        content, found = _fill_places(turn.content, _sources(turn), rest, placeholders=placeholders)
        return replace(turn, content=content, images=tuple(read(source.value, source.location) for source in found))

    return tuple([attach(turn) for turn in turns])


def read_images(
    parsed: ParsedRow, folder: Path | None, values: Sequence[ImageSource] = (), *, conversation: bool = False
) -> ParsedRow:
    """Return a row with its images read and their marks in its messages. Arguments as of read_image, attach_images.

    The images of a request to a server (folder None) have at most MAX_PIXELS together. conversation: these are messages
    to answer, in which `<image>` is text without `values`, and not a row that may lack an image.
    """
    pixels = 0

    def read(value: Any, location: str) -> Image:
        nonlocal pixels
        image = read_image(value, folder, location)
        pixels += image.width * image.height
        if folder is None and pixels > MAX_PIXELS:
            what = f"the images have more than {MAX_PIXELS // 1_000_000} million pixels together"
            raise InvalidRow("image-too-large", what)
        return image

    if parsed.text is not None and values:
        raise InvalidRow("image-count", "images need messages, and the row has a text without them")
    messages, rejected = (
        attach_images(turns, values, read, placeholders=bool(values) or not conversation) if turns else ()
        for turns in (parsed.messages, parsed.rejected)
    )
    return replace(parsed, messages=messages, rejected=rejected)


def _sources(turn: Message) -> tuple[ImageSource, ...]:
    return cast(tuple[ImageSource, ...], turn.images)


def _parse_weight(turn: dict[str, Any], location: str) -> float:
    weights = [turn[key] for key in ("weight", "loss_weight", "train") if turn.get(key) is not None]
    if not weights:
        return 1.0
    if not all(isinstance(weight, int | float) and 0 <= weight <= 1e6 for weight in weights) or len(set(weights)) > 1:
        what = f"{location}: weight, loss_weight and train must be one number of at least 0, or true or false"
        raise InvalidRow("bad-weight", what)
    return float(weights[0])


IMAGE_PARTS = ("image", "image_url", "input_image")
_NOT_OF_IMAGES = ("type", "detail", "index", "text")  # keys of such a part that do not name the image
# type of a content part -> order in a message
_PART_ORDER = {
    "reasoning": 0, "thinking": 0, "text": 1, "input_text": 1, **dict.fromkeys(IMAGE_PARTS, 1), "tool_call": 2,
}  # fmt: skip


def _parse_parts(
    parts: list[Any], location: str
) -> tuple[str | None, list[str], tuple[dict[str, Any], ...], tuple[ImageSource, ...]]:
    """Return the text, reasoning, calls and images of typed content parts, in the order of chat templates."""
    texts: list[str] = []
    images: list[ImageSource] = []
    reasoning: list[str] = []
    calls: tuple[dict[str, Any], ...] = ()
    previous = 0
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _PART_ORDER:
            shown = repr(kind[:40]) if isinstance(kind, str) else type_name(part)
            raise InvalidRow("bad-part", f"{location}: a part of type {shown}; known are {', '.join(_PART_ORDER)}")
        if _PART_ORDER[kind] < previous:
            what = f"{location}: {kind} after a later part; the order is reasoning, text, tool calls"
            raise InvalidRow("bad-part", what)
        previous = _PART_ORDER[kind]
        if kind in IMAGE_PARTS:
            fields = {key: item for key, item in part.items() if key not in _NOT_OF_IMAGES and item is not None}
            value = fields.get("image_url", fields.get("image", fields or None))
            images.append(ImageSource(value, f"{location}: an image", part.get("index")))
            texts.append(MARK)
            continue
        content = next((part[key] for key in ("text", "value", kind) if part.get(key) is not None), None)
        if kind == "tool_call":
            calls += _parse_calls(content, location)
        else:
            text = _check_string(content, f"{location}: the content of a part of type {kind}")
            (texts if kind in ("text", "input_text") else reasoning).append(text)
    return "".join(texts) if texts else None, reasoning, calls, tuple(images)


def _parse_calls(raw: Any, location: str) -> tuple[dict[str, Any], ...]:
    """Convert a call or a list of calls to the form {type, function: {name, arguments}}.

    Calls may be objects or JSON strings, with or without the outer `function`.
    """
    items = _parse_json(raw, "bad-tool-call", location)
    calls = []
    for item in items if isinstance(items, list) else [items]:
        function = _get_function(item, "bad-tool-call", f"{location}: a tool call needs a name and arguments")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = {} if arguments is None or arguments == "" else _parse_json(arguments, "bad-tool-call", location)
        if not isinstance(arguments, dict):
            what = f"{location}: the arguments of a tool call are {type_name(arguments)}, not an object"
            raise InvalidRow("bad-tool-call", what)
        _check_json(arguments, "bad-tool-call", f"{location}: the arguments of a tool call")
        call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append({"id": item["id"], **call} if isinstance(item.get("id"), str) else call)
    return tuple(calls)


def _parse_tools(row: RowValue) -> tuple[dict[str, Any], ...]:
    raw = row.get("tools")
    if raw is None or raw == "":
        return ()
    items = _parse_json(raw, "bad-tools", "tools")
    if not isinstance(items, list):
        raise InvalidRow("bad-tools", f"tools is {type_name(items)}, not a list")
    tools = []
    for tool in items:
        function = _get_function(tool, "bad-tools", "a tool needs a name")
        _check_json(tool, "bad-tools", "a tool")
        tools.append(tool if function is not tool else {"type": "function", "function": tool})
    return tuple(tools)


def _get_function(item: Any, code: str, what: str) -> dict[str, Any]:
    """Return the named function of a tool or call. Raises InvalidRow with `code` and `what` if there is none."""
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRow(code, what)
    return function


def _parse_json(raw: Any, code: str, location: str) -> Any:
    if not isinstance(raw, str):
        return raw
    try:
        return loads(raw)
    except JsonError as error:
        raise InvalidRow(code, f"{location}: the string is not JSON: {error.what}") from error


def _check_json(value: Any, code: str, what: str) -> None:
    """Raise InvalidRow for a value that templates cannot write as JSON, such as a date or bytes from Parquet."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRow(code, f"{what} cannot be written as JSON: {error}") from error


def convert_columns(row: RowValue, keys: Keys) -> list[ParsedRow]:
    """Convert two columns with strings or lists of messages. Assistant turns of the prompt are not trained on."""
    prompt, answer = _parse_column(row, keys[0], "user"), _parse_column(row, keys[1], "assistant")
    num_context = _count_repeated(prompt, answer) or len(prompt)
    turns = _prepend_prompt(prompt, answer)
    return [_make_row([*_parse_history(row), *_as_context(turns[:num_context]), *turns[num_context:]], row)]


def _as_context(turns: list[Message]) -> list[Message]:
    return [replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in turns]


def _parse_column(row: RowValue, key: str, role: Role) -> list[Message]:
    content = row[key]
    if isinstance(content, dict):
        return [_parse_message(content, key)]
    return _parse_turns(row, key) if isinstance(content, list) else [Message(role, _require_text(row, key))]


def convert_alpaca(row: RowValue, keys: Keys) -> list[ParsedRow]:
    """Convert instruction, optional input, and output. The input follows the instruction after a blank line."""
    prompt = [*_parse_history(row), Message("user", _join_instruction(row))]
    return [_make_row([*prompt, Message("assistant", _require_text(row, keys[1]))], row)]


def _parse_history(row: RowValue) -> list[Message]:
    turns: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise InvalidRow("bad-messages", f"history is {type_name(history)}, not a list of [prompt, answer]")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InvalidRow("bad-messages", "an item of history is not [prompt, answer]")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def convert_instances(row: RowValue, keys: Keys) -> list[ParsedRow]:
    """Convert a Self-Instruct row: each input and output of the list becomes a conversation."""
    items = row["instances"]
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise InvalidRow("bad-messages", "instances is not a list of objects with input and output")
    shared = {name: row.get(name) for name in ("instruction", *SYSTEM)}
    return [parsed for item in items for parsed in convert_alpaca({**item, **shared}, ("instruction", "output"))]


def _join_instruction(row: RowValue) -> str:
    inputs = [text for key in ("input", "context") if (text := _optional_text(row, key)).strip()]
    if len(inputs) > 1:
        what = "input and context both have text: name the columns to read with --data.columns"
        raise InvalidRow("bad-messages", what)
    return "\n\n".join(text for text in (_require_text(row, "instruction"), *inputs) if text.strip())


def convert_prompt(row: RowValue, keys: Keys) -> list[ParsedRow]:
    """Convert a prompt without an answer: a string, or messages that end with a user or tool message."""
    turns = [*_parse_history(row), *_as_context(_parse_column(row, keys[0], "user"))]
    turns = _prepend_system(row, turns)
    dialogue = [turn for turn in turns if turn.role != "system"]
    if not dialogue or dialogue[-1].role not in ("user", "tool"):
        raise InvalidRow("no-question", "the last message is not the user's: there is nothing to answer")
    _check_user_messages(dialogue, row)
    return [ParsedRow(tuple(turns), _parse_tools(row))]


def convert_text(row: RowValue, keys: Keys) -> list[ParsedRow]:
    content = _require_text(row, keys[0])
    if not content.strip():
        raise InvalidRow("empty-text", "the text is empty")
    return [ParsedRow(text=content)]


def convert_classified(row: RowValue, keys: Keys) -> list[ParsedRow]:
    """Convert a text, or messages, with its label or a list of labels."""
    content, column = keys
    label = row[column]
    if isinstance(label, str) and (label.strip() == "[]" or label.strip().startswith('["')):  # a cell of a table
        label = _parse_json(label, "bad-label", column)
    parsed: Label
    if isinstance(label, list):
        parsed = tuple(sorted(_parse_class(name, column) for name in label))
        if len(set(parsed)) < len(parsed):
            raise InvalidRow("bad-label", f"{column} has the same label twice")
    else:
        parsed = _parse_class(label, column)
    convert = convert_prompt if content in TURNS else convert_text
    if content in TURNS and isinstance(row[content], str):  # a cell of a table
        row = {**row, content: _parse_json(row[content], "bad-messages", content)}
    return [replace(converted, label=parsed) for converted in convert(row, (content,))]


def convert_triplet(row: RowValue, keys: Keys) -> list[ParsedRow]:
    """Convert an anchor, its positives and its negatives. Each positive becomes a triplet with all negatives."""
    if any(isinstance(row[key], dict | list) and key in ("prompt", *ANSWERS_OF_PAIR, "completion") for key in keys):
        row, keys = _flatten_messages(row, keys), ("prompt", "chosen")
    if keys == ANSWERS_OF_PAIR:
        raise InvalidRow("no-prompt", "chosen is a string and there is no prompt")
    anchors = _list_texts(row, keys[0])
    if len(anchors) != 1:
        raise InvalidRow("not-text", f"{keys[0]} is a list of {len(anchors)} texts: give one text")
    anchor = anchors[0]
    positives = _list_texts(row, keys[1])
    names = [name for name in row if is_negative(name) and name not in keys and row[name] not in (None, "")]
    negatives = tuple(dict.fromkeys(text for name in names for text in _list_texts(row, name)))
    if not positives:
        raise InvalidRow("no-positive", f"{keys[1]} is an empty list")
    for name in SCORES:
        # A score may be that of a reranker, unless the columns are those of a data set of similarities.
        is_read = name != "score" or keys[0] == "sentence1"
        if is_read and row.get(name) not in (None, "", 1, "1", "1.0", "true", "True"):
            what = f"{name} is {str(row[name])[:40]!r}: the texts of a row must match"
            raise InvalidRow("no-positive", f"{what}; leave out rows whose {name} is not 1")
    if anchor in positives or anchor in negatives:
        side = keys[1] if anchor in positives else "a negative"
        raise InvalidRow("same-texts", f"{keys[0]} and {side} are the same text")
    if both := [text for text in positives if text in negatives]:
        raise InvalidRow("same-texts", f"{both[0][:40]!r} is both a positive and a negative")
    return [ParsedRow(text=anchor, passages=(positive, *negatives)) for positive in dict.fromkeys(positives)]


def is_negative(name: str) -> bool:
    """Return whether a column has texts that do not match the anchor of its row."""
    stem, _, number = name.rpartition("_")
    return name in NEGATIVES or (stem == "negative" and number.isdecimal())


def _list_texts(row: RowValue, key: str) -> list[str]:
    """Return the text of a column in a list, or the texts of its list, which may be the JSON of one."""
    value = row.get(key)
    if isinstance(value, str) and re.fullmatch(r"""\s*\[\s*["'].*\]\s*""", value, re.S):  # a cell of a table
        value = _parse_json(value, "not-text", key)
    texts = value if isinstance(value, list) else [_require_text(row, key)]
    for index, text in enumerate(texts):
        name = key if texts is not value else f"{key}[{index}]"
        if not _check_string(text, name).strip():
            raise InvalidRow("empty-text", f"{name} is empty")
    return texts


def _flatten_messages(row: RowValue, keys: Keys) -> dict[str, Any]:
    """Return the texts of preference pairs and prompts whose columns hold messages: one of the user, one answer."""
    parsed = convert_preference(row, ANSWERS_OF_PAIR) if row.get("rejected") else convert_columns(row, keys)
    sides = [[turn for turn in side if turn.role != "system"] for side in (parsed[0].messages, parsed[0].rejected)]
    if any(side and [turn.role for turn in side] != ["user", "assistant"] for side in sides):
        raise InvalidRow("bad-messages", "more than one message of the user and one answer: give texts instead")
    (anchor, positive), *others = ([turn.content for turn in side] for side in sides if side)
    return {"prompt": anchor, "chosen": positive, "rejected": [other[1] for other in others]}


def _parse_class(value: Any, column: str) -> str:
    """Return the name of a class, without surrounding white space. An integer is named by its digits."""
    if value is None or str(value).strip() == "":
        raise InvalidRow("no-label", f"{column} is {'null' if value is None else 'empty'}")
    if not isinstance(value, str | int):
        raise InvalidRow("bad-label", f"{column} is {type_name(value)}, not a string, an integer or a list of them")
    return str(value).strip().lower() if isinstance(value, bool) else str(value).strip()


def _require_text(row: RowValue, key: str) -> str:
    content = row.get(key)
    if content is None:
        raise InvalidRow("no-content", f"{key} is null or missing")
    return _check_string(content, key)


def _check_string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        how = ' (write 4 as "4")' if isinstance(value, int | float) and not isinstance(value, bool) else ""
        raise InvalidRow("not-text", f"{name} is {type_name(value)}, not a string{how}")
    return value


def _prepend_system(row: RowValue, turns: list[Message]) -> list[Message]:
    """Return the turns after the row's system text. Raises InvalidRow if the turns have one too."""
    texts = {text: name for name in SYSTEM if (text := _optional_text(row, name))}
    if not texts:
        return turns
    sources = [f"the column `{name}`" for name in texts.values()]
    sources += ["the first message"] if turns and turns[0].role == "system" else []
    if len(sources) > 1:
        raise InvalidRow("bad-messages", f"two system texts: {' and '.join(sources)}")
    return [Message("system", next(iter(texts))), *turns]


def _optional_text(row: RowValue, key: str) -> str:
    return "" if row.get(key) is None else _require_text(row, key)


# Values of a label, case-insensitive
GOOD = frozenset({"true", "up", "thumbs_up", "good", "desirable", "chosen", "\N{THUMBS UP SIGN}", "+1"})
BAD = frozenset({"false", "down", "thumbs_down", "bad", "undesirable", "rejected", "\N{THUMBS DOWN SIGN}", "-1"})
RANKED: tuple[Keys, ...] = tuple(product(("prompt", "question"), ("answers", "responses", "completions"), ("scores",)))
LABELS = ("label", "kto_tag", "thumbs")
_CONTEXT_KEYS = ("messages", "conversation")  # used as the prompt unless the answers include their prompt
_PROMPT_KEYS = ("conversations", "prompt", "question", "instruction", *_CONTEXT_KEYS)
_LABELLED_CONVERTERS: dict[Keys, Any] = {
    **dict.fromkeys((("messages",), ("conversations",)), convert_messages),
    **dict.fromkeys((("prompt", "completion"), ("prompt", "response")), convert_columns),
    **dict.fromkeys((("query", "response"), ("question", "answer")), convert_columns),
    ("instruction", "output"): convert_alpaca,
}
LABELLED: tuple[Keys, ...] = tuple((*keys, label) for keys in _LABELLED_CONVERTERS for label in LABELS)


def convert_preference(row: RowValue, keys: Keys) -> list[ParsedRow]:
    """Convert a chosen and a rejected answer to a prompt, or two whole conversations with a shared prefix."""
    chosen_key, rejected_key = keys
    if rejected_key == "rejected_response":  # the chosen answer is the last turn of the other column
        turns = _parse_column(row, chosen_key, "assistant")
        return [_make_pair(turns, [*turns[:-1], *_parse_column(row, rejected_key, "assistant")], row)]
    prompt = _parse_pair_prompt(row, row[chosen_key])
    chosen, rejected = (_prepend_prompt(prompt, _parse_column(row, key, "assistant")) for key in keys)
    return [_make_pair(chosen, rejected, row)]


def unread_pair_columns(row: RowValue, keys: Keys) -> set[str]:
    """Return the columns that could be in the prompt of a pair, but are not read because another one is the prompt."""
    prompts = [key for key in _PROMPT_KEYS if row.get(key) and key not in keys]
    if keys[1] != "rejected_response":
        inputs = ["input"] if row.get("input") and prompts[:1] != ["instruction"] else []
        return {*prompts[1:], *inputs}
    return {*prompts, *(key for key in ("input", "history") if row.get(key))}


def convert_ranking(row: RowValue, keys: Keys) -> list[ParsedRow]:
    """Convert scored answers to one prompt: any two answers with different scores make a pair."""
    prompt, answers, scores = (row[key] for key in keys)
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        raise InvalidRow("bad-ranking", f"{keys[1]} and {keys[2]} are not two lists of the same length")
    if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
        raise InvalidRow("bad-ranking", f"{keys[2]} has an item that is not a number")
    prompt = _parse_pair_prompt(row, prompt)
    sides = [_prepend_prompt(prompt, _parse_column({"answer": answer}, "answer", "assistant")) for answer in answers]
    pairs = [(i, j) for i, j in permutations(range(len(sides)), 2) if scores[i] > scores[j] and sides[i] != sides[j]]
    if not pairs:
        raise InvalidRow("bad-ranking", "no two different answers have different scores")
    return [_make_pair(sides[i], sides[j], row) for i, j in pairs]


def convert_labelled(row: RowValue, keys: Keys) -> list[ParsedRow]:
    """Convert an answer with a label, which applies to the last turn. Earlier answers are not trained on."""
    *columns, label = keys
    desirable = _parse_label(row[label], allow_numbers=True)
    if desirable is None:
        what = f"{label} is {str(row[label])[:40]!r}, not good or bad (true, false, up, down, ...)"
        raise InvalidRow("bad-label", what)
    rows = []
    for parsed in _LABELLED_CONVERTERS[tuple(columns)](row, tuple(columns)):
        if parsed.messages[-1].role != "assistant":
            raise InvalidRow("no-assistant", "the last message, to which the label belongs, is not the assistant's")
        answer = _check_weights([parsed.messages[-1]])
        turns = (*_as_context([*parsed.messages[:-1]]), *answer)
        rows.append(replace(parsed, messages=turns, desirable=desirable))
    return rows


def is_labelled(row: RowValue, keys: Keys) -> bool:
    """Return whether the label is good or bad. A number in `label` does not count, because it may be a class."""
    return _parse_label(row[keys[-1]], allow_numbers=keys[-1] != "label") is not None


def _parse_label(label: Any, *, allow_numbers: bool) -> bool | None:
    if isinstance(label, bool):
        return label
    text = str(label).strip().casefold() if isinstance(label, str | int) else ""
    numbers = {"1": True, "0": False} if allow_numbers else {}
    return {**dict.fromkeys(GOOD, True), **dict.fromkeys(BAD, False), **numbers}.get(text)


def _parse_pair_prompt(row: RowValue, answer: Any) -> list[Message]:
    key = next((key for key in _PROMPT_KEYS if row.get(key) is not None), "")
    if key in _CONTEXT_KEYS and _is_whole_conversation(answer):  # the column is often a copy of an answer
        sides = _parse_column(row, key, "user"), _parse_column({"chosen": answer}, "chosen", "assistant")
        first, *others = ([turn.content.strip() for turn in side if turn.role != "system"][:1] for side in sides)
        if first and [first] != others:
            raise InvalidRow("prompts-differ", f"chosen begins with another message than {key}")
        key = ""
    if not key and isinstance(answer, str):
        raise InvalidRow("no-prompt", "chosen is a string and there is no prompt")
    if key == "instruction":
        return [*_parse_history(row), Message("user", _join_instruction(row))]
    return [*_parse_history(row), *(_parse_column(row, key, "user") if key else [])]


def _is_whole_conversation(answer: Any) -> bool:
    """Return whether an answer includes its prompt."""
    first = answer[0] if isinstance(answer, list) and answer else answer
    role = first.get("role", first.get("from")) if isinstance(first, dict) else "assistant"
    return role in ("system", "user", "human")


def _prepend_prompt(prompt: list[Message], side: list[Message]) -> list[Message]:
    """Prepend the prompt unless the side already begins with it, possibly after a system turn."""
    return side if not prompt or _count_repeated(prompt, side) else [*prompt, *side]


def _count_repeated(prompt: list[Message], answer: list[Message]) -> int:
    """Return the number of turns with which an answer repeats its prompt. Raises InvalidRow if it does not follow it.

    An answer may have a system turn before the prompt.
    """
    num_system = 1 if answer and answer[0].role == "system" and (not prompt or prompt[0].role != "system") else 0
    dialogue = answer[num_system:]
    if prompt and _stripped(dialogue[: len(prompt)]) == _stripped(prompt):
        return num_system + len(prompt)
    roles = (prompt[-1].role, dialogue[0].role) if prompt and dialogue else ()
    if roles == ("user", "user"):
        raise InvalidRow("prompts-differ", "an answer begins with a user message that is not the prompt's")
    if roles == ("assistant", "assistant"):
        raise InvalidRow("no-question", "the prompt ends with an answer, so it is unclear what the next one answers")
    return 0


def _stripped(turns: Sequence[Message]) -> list[Message]:
    return [replace(turn, content=turn.content.strip()) for turn in turns]


def _make_pair(chosen: list[Message], rejected: list[Message], row: RowValue) -> ParsedRow:
    if chosen == rejected:
        raise InvalidRow("same-answers", "chosen and rejected are the same")
    num_shared = shared_prefix_length(chosen, rejected)
    sides = [_make_side(side, num_shared, row) for side in (chosen, rejected)]
    return replace(sides[0], rejected=sides[1].messages)


def _make_side(side: Sequence[Message], num_prompt: int, row: RowValue) -> ParsedRow:
    if len(side) == num_prompt or side[num_prompt].role != "assistant":
        raise InvalidRow("prompts-differ", "chosen and rejected do not answer the same prompt")
    return _make_row([*_as_context([*side[:num_prompt]]), *_check_weights(side[num_prompt:])], row)


def _check_weights(answer: Sequence[Message]) -> Sequence[Message]:
    """Raise InvalidRow for weights other than 0 and 1, which would scale the log-probability in the loss."""
    for turn in answer:
        if turn.role == "assistant" and turn.weight not in (0.0, 1.0):
            what = f"a message of the answer has the weight {turn.weight:g}; here it must be 1 or 0"
            raise InvalidRow("answer-weight", what)
    return answer
