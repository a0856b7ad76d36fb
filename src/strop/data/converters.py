"""Convert a row to conversations, with one function for each row format. Each raises InvalidRow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any

from strop.data.reading.json_reader import JsonError, loads
from strop.data.row_errors import InvalidRow
from strop.data.types import Message, Role
from strop.errors import nearest

Value = Mapping[str, Any]
Keys = tuple[str, ...]  # the columns that determine a row's format

# Role names of LLaMA-Factory, ShareGPT, OpenAI, OpenAssistant and Llama. Others are an error.
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
# Columns that are ignored, because they have no content to train on.
METADATA = frozenset(
    {
        *("id", "idx", "index", "uuid", "uid", "hash", "url", "source", "dataset", "split", "subset", "title", "name"),
        *("date", "timestamp", "created", "lang", "language", "license", "meta", "metadata", "model", "author"),
        "version",
    }
)
MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # columns, and keys of a message
_SPEAKER = frozenset({"role", "from"})
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT: the assistant's message is the call itself, as JSON


@dataclass(frozen=True)
class ParsedRow:
    """The content of one conversation of a row: messages (and tools), or text. Other fields: see Conversation."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    rejected: tuple[Message, ...] = ()
    desirable: bool | None = None


# --- messages ----------------------------------------------------------------------------------------------------


def messages(value: Value, keys: Keys) -> list[ParsedRow]:
    """Convert one column: a list of messages, or of {"human": ..., "assistant": ...}."""
    turns = value[keys[0]]
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and not _SPEAKER & set(turn) for turn in turns):
        turns = [turn for i, exchange in enumerate(turns) for turn in _exchange_turns(exchange, f"{keys[0]}[{i}]")]
        value = {**value, keys[0]: turns}
    return [parsed_row(_turns(value, keys[0]), value)]


def _exchange_turns(exchange: dict[str, Any], at: str) -> list[dict[str, Any]]:
    """Return the turns of {"human": ..., "assistant": ...}, the system's first. Other content is an error."""
    turns = []
    for key, content in exchange.items():
        if key.lower() in ROLES:
            turns.append({"role": key, "content": content})
        elif isinstance(content, str | list | dict) and content and key.lower() not in METADATA:
            what = f"{at}: {key[:40]!r} has content and is not a known role; write such messages with role and content"
            raise InvalidRow("unknown-role", what)
    return sorted(turns, key=lambda turn: ROLES[turn["role"].lower()] != "system")


def parse_request(value: Value) -> ParsedRow:
    """Parse the messages and tools of a chat completion request. The order of roles is not checked."""
    return ParsedRow(tuple(_turns(value, "messages")), _tools(value))


def _turns(value: Value, key: str) -> list[Message]:
    turns = value[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InvalidRow("bad-messages", f"{key} is {type_name(turns)}, not a list of objects")
    parsed = [_message(turn, f"{key}[{i}]") for i, turn in enumerate(turns)]
    names = {call["id"]: call["function"]["name"] for turn in parsed for call in turn.tool_calls if "id" in call}
    return [
        replace(turn, name=names.get(str(raw.get("tool_call_id")))) if turn.role == "tool" and not turn.name else turn
        for turn, raw in zip(parsed, turns, strict=True)
    ]


def parsed_row(turns: list[Message], value: Value) -> ParsedRow:
    """Return the turns with the row's system text and tools. Raises InvalidRow if there is nothing to train on."""
    turns = [*_system_turn(value, turns), *turns]
    dialogue = [turn for turn in turns if turn.role != "system"]
    if not any(turn.role == "assistant" for turn in dialogue):
        raise InvalidRow("no-assistant", "no assistant message" if turns else "no messages")
    if dialogue[0].role != "user":
        raise InvalidRow("no-user-first", f"the first message is the {dialogue[0].role}'s, not the user's")
    for turn in dialogue:
        blank = not turn.content.strip()
        if blank and turn.role == "assistant" and not turn.tool_calls and turn.weight:
            raise InvalidRow("empty-answer", "an assistant message is empty: it would train the model to stop at once")
        if blank and turn.role == "user":
            raise InvalidRow("empty-prompt", "a user message is empty")
    return ParsedRow(tuple(turns), _tools(value))


def _system_turn(value: Value, turns: Sequence[Message]) -> list[Message]:
    system = _optional_text(value, "system")
    if system and turns and turns[0].role == "system":
        raise InvalidRow("bad-messages", "two system texts: the column `system` and the first message")
    return [Message("system", system)] if system else []


def _message(turn: dict[str, Any], at: str) -> Message:
    role_key = "role" if turn.get("role") is not None else "from"
    role_name = turn.get(role_key)
    if not isinstance(role_name, str):
        raise InvalidRow("unknown-role", f"{at}.{role_key} is {type_name(role_name)}, not a string")
    if media := [key for key in MEDIA if turn.get(key)]:
        raise InvalidRow("media", f"{at}: {media[0]} is not supported")
    content = turn["content"] if "content" in turn else turn.get("value")
    weight = _weight(turn, at)
    if role_name.lower() in CALL_ROLES:
        return Message("assistant", "", tool_calls=_calls(content, at), weight=weight)
    role = ROLES.get(role_name.lower())
    if role is None:
        hint = nearest(role_name, [*ROLES, *CALL_ROLES])
        raise InvalidRow("unknown-role", f"{at}: unknown role {role_name[:40]!r}{hint}")
    calls = _calls(turn["tool_calls"], at) if turn.get("tool_calls") else ()
    calls += _calls(turn["function_call"], at) if turn.get("function_call") else ()
    reasoning = [turn[key] for key in ("reasoning_content", "reasoning", "thinking") if turn.get(key)]
    if len(reasoning) > 1 or not all(isinstance(text, str) for text in reasoning):
        raise InvalidRow("bad-part", f"{at}: the reasoning must be one string")
    if isinstance(content, list):
        content, reasoning_parts, call_parts = _parts(content, at)
        reasoning, calls = reasoning + reasoning_parts, calls + call_parts
    if content is None:
        if not calls:
            raise InvalidRow("no-content", f"{at}: content is null or missing (allowed only next to tool calls)")
        content = ""
    if not isinstance(content, str):
        raise InvalidRow("not-text", f"{at}: content is {type_name(content)}, not a string")
    if role != "assistant" and (calls or reasoning):
        raise InvalidRow("bad-part", f"{at}: only an assistant message can have reasoning or tool calls")
    name = turn.get("name")
    if name is not None and not isinstance(name, str):
        raise InvalidRow("not-text", f"{at}: name is {type_name(name)}, not a string")
    id = turn.get("tool_call_id") if role == "tool" else None
    call_id = id if isinstance(id, str) else None
    return Message(role, content, "".join(reasoning) if reasoning else None, calls, name, weight, call_id)


def _weight(turn: dict[str, Any], at: str) -> float:
    weights = [turn[key] for key in ("weight", "loss_weight", "train") if turn.get(key) is not None]
    if not weights:
        return 1.0
    if not all(isinstance(weight, int | float) and 0 <= weight <= 1e6 for weight in weights) or len(set(weights)) > 1:
        what = f"{at}: weight, loss_weight and train must be one number of at least 0, or true or false"
        raise InvalidRow("bad-weight", what)
    return float(weights[0])


_PARTS = {"reasoning": 0, "thinking": 0, "text": 1, "tool_call": 2}  # type of a content part -> order in the message


def _parts(parts: list[Any], at: str) -> tuple[str | None, list[str], tuple[dict[str, Any], ...]]:
    """Convert typed content parts to (text, reasoning, calls). Templates render them in that order only."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: tuple[dict[str, Any], ...] = ()
    last = 0
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _PARTS:
            shown = repr(kind[:40]) if isinstance(kind, str) else type_name(part)
            raise InvalidRow("bad-part", f"{at}: a part of type {shown}; known are {', '.join(_PARTS)}")
        if _PARTS[kind] < last:
            raise InvalidRow("bad-part", f"{at}: {kind} after a later part; the order is reasoning, text, tool calls")
        last = _PARTS[kind]
        content = next((part[key] for key in ("text", "value", kind) if part.get(key) is not None), None)
        if kind == "tool_call":
            calls += _calls(content, at)
        elif isinstance(content, str):
            (texts if kind == "text" else reasoning).append(content)
        else:
            raise InvalidRow("not-text", f"{at}: a part of type {kind} has {type_name(content)}, not a string")
    return "".join(texts) if texts else None, reasoning, calls


# --- tools -------------------------------------------------------------------------------------------------------


def _calls(raw: Any, at: str) -> tuple[dict[str, Any], ...]:
    """Convert one call or a list, objects or JSON, flat or nested, to {type, function: {name, arguments: object}}."""
    items = _parse_json(raw, "bad-tool-call", at)
    calls = []
    for item in items if isinstance(items, list) else [items]:
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRow("bad-tool-call", f"{at}: a tool call needs a name and arguments")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = {} if arguments is None or arguments == "" else _parse_json(arguments, "bad-tool-call", at)
        if not isinstance(arguments, dict):
            what = f"{at}: the arguments of a tool call are {type_name(arguments)}, not an object"
            raise InvalidRow("bad-tool-call", what)
        _check_json(arguments, "bad-tool-call", f"{at}: the arguments of a tool call")
        call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append({"id": item["id"], **call} if isinstance(item.get("id"), str) else call)
    return tuple(calls)


def _tools(value: Value) -> tuple[dict[str, Any], ...]:
    raw = value.get("tools")
    if raw is None or raw == "":
        return ()
    items = _parse_json(raw, "bad-tools", "tools")
    if not isinstance(items, list):
        raise InvalidRow("bad-tools", f"tools is {type_name(items)}, not a list")
    tools = []
    for tool in items:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRow("bad-tools", "a tool needs a name")
        _check_json(tool, "bad-tools", "a tool")
        tools.append(tool if function is not tool else {"type": "function", "function": tool})
    return tuple(tools)


def _parse_json(raw: Any, code: str, at: str) -> Any:
    if not isinstance(raw, str):
        return raw
    try:
        return loads(raw)
    except JsonError as error:
        raise InvalidRow(code, f"{at}: the string is not JSON: {error.what}") from error


def _check_json(value: Any, code: str, what: str) -> None:
    """Raise InvalidRow for dates, bytes, NaN and the like, which Parquet allows and templates cannot write as JSON."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRow(code, f"{what} cannot be written as JSON: {error}") from error


# --- columns -----------------------------------------------------------------------------------------------------


def columns(value: Value, keys: Keys) -> list[ParsedRow]:
    """Convert two columns, strings or lists of messages. Assistant turns of the prompt are not trained on."""
    prompt = [*_history(value), *_as_context(_column_turns(value, keys[0], "user"))]
    return [parsed_row([*prompt, *_column_turns(value, keys[1], "assistant")], value)]


def _as_context(turns: list[Message]) -> list[Message]:
    return [replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in turns]


def _column_turns(value: Value, key: str, role: Role) -> list[Message]:
    content = value[key]
    if isinstance(content, dict):
        return [_message(content, key)]
    return _turns(value, key) if isinstance(content, list) else [Message(role, _text(value, key))]


def alpaca(value: Value, keys: Keys) -> list[ParsedRow]:
    """Convert instruction, optional input, and output. The input follows the instruction after a blank line."""
    prompt = [*_history(value), Message("user", _instruction(value))]
    return [parsed_row([*prompt, Message("assistant", _text(value, keys[1]))], value)]


def _history(value: Value) -> list[Message]:
    turns: list[Message] = []
    history = value.get("history") or []
    if not isinstance(history, list):
        raise InvalidRow("bad-messages", f"history is {type_name(history)}, not a list of [prompt, answer]")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InvalidRow("bad-messages", "an item of history is not [prompt, answer]")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def instances(value: Value, keys: Keys) -> list[ParsedRow]:
    """Convert Self-instruct: an instruction and a list of input and output, each a separate conversation."""
    items = value["instances"]
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise InvalidRow("bad-messages", "instances is not a list of objects with input and output")
    rows = ({**item, "instruction": value["instruction"], "system": value.get("system")} for item in items)
    return [parsed for row in rows for parsed in alpaca(row, ("instruction", "output"))]


def _instruction(value: Value) -> str:
    inputs = [text for key in ("input", "context") if (text := _optional_text(value, key)).strip()]
    if len(inputs) > 1:
        what = "input and context both have text: name the columns to read with --data.columns"
        raise InvalidRow("bad-messages", what)
    return "\n\n".join(text for text in (_text(value, "instruction"), *inputs) if text.strip())


def prompt_alone(value: Value, keys: Keys) -> list[ParsedRow]:
    """Convert a prompt without an answer: a string, or messages whose last is the user's or a tool's."""
    turns = [*_history(value), *_as_context(_column_turns(value, keys[0], "user"))]
    system = _optional_text(value, "system")
    turns = [*([Message("system", system)] if system else []), *turns]
    dialogue = [turn for turn in turns if turn.role != "system"]
    if not dialogue or dialogue[-1].role not in ("user", "tool"):
        raise InvalidRow("no-question", "the last message is not the user's: there is nothing to answer")
    if any(turn.role == "user" and not turn.content.strip() for turn in dialogue):
        raise InvalidRow("empty-prompt", "a user message is empty")
    return [ParsedRow(tuple(turns), _tools(value))]


def is_prompt_alone(value: Value, keys: Keys) -> bool:
    """Return whether a row has no null column, which may be a missing answer."""
    return all(item is not None for item in value.values())


def text(value: Value, keys: Keys) -> list[ParsedRow]:
    content = _text(value, "text")
    if not content.strip():
        raise InvalidRow("empty-text", "the text is empty")
    return [ParsedRow(text=content)]


def _text(value: Value, key: str) -> str:
    content = value.get(key)
    if content is None:
        raise InvalidRow("no-content", f"{key} is null or missing")
    if not isinstance(content, str):
        raise InvalidRow("not-text", f"{key} is {type_name(content)}, not a string")
    return content


def _optional_text(value: Value, key: str) -> str:
    return "" if value.get(key) is None else _text(value, key)


def type_name(value: Any) -> str:
    if value is None:
        return "null"
    number = "a number"
    names = {bool: "true or false", int: number, float: number, str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


# --- preference pairs and labelled answers --------------------------------------------------------------------------

# Values of a label, case-insensitive. A format is not detected by a number in `label`.
GOOD = frozenset({"true", "up", "thumbs_up", "good", "desirable", "chosen", "\N{THUMBS UP SIGN}", "+1"})
BAD = frozenset({"false", "down", "thumbs_down", "bad", "undesirable", "rejected", "\N{THUMBS DOWN SIGN}", "-1"})
RANKED: tuple[Keys, ...] = tuple(product(("prompt", "question"), ("answers", "responses", "completions"), ("scores",)))
LABELS = ("label", "kto_tag", "thumbs")
_CONTEXT_KEYS = ("messages", "conversation")  # used as the prompt only if the answers do not include it
_PROMPT_KEYS = ("conversations", "prompt", "question", "instruction", *_CONTEXT_KEYS)
_LABELLED_CONVERTERS: dict[Keys, Any] = {
    ("messages",): messages,
    ("conversations",): messages,
    ("prompt", "completion"): columns,
    ("prompt", "response"): columns,
    ("query", "response"): columns,
    ("question", "answer"): columns,
    ("instruction", "output"): alpaca,
}
LABELLED: tuple[Keys, ...] = tuple((*keys, label) for keys in _LABELLED_CONVERTERS for label in LABELS)


def preference(value: Value, keys: Keys) -> list[ParsedRow]:
    """Convert a chosen and a rejected answer to a prompt, or two whole conversations with a shared prefix."""
    chosen_key, rejected_key = keys
    if rejected_key == "rejected_response":  # next to messages whose last turn is the chosen answer
        turns = _column_turns(value, chosen_key, "assistant")
        return [_pair(turns, [*turns[:-1], *_column_turns(value, rejected_key, "assistant")], value)]
    prompt = _preference_prompt(value, value[chosen_key])
    chosen, rejected = (_with_prompt(prompt, _column_turns(value, key, "assistant")) for key in keys)
    return [_pair(chosen, rejected, value)]


def ranking(value: Value, keys: Keys) -> list[ParsedRow]:
    """Convert scored answers to one prompt, with a pair for any two answers with different scores."""
    prompt, answers, scores = (value[key] for key in keys)
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        raise InvalidRow("bad-ranking", f"{keys[1]} and {keys[2]} are not two lists of the same length")
    if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
        raise InvalidRow("bad-ranking", f"{keys[2]} has an item that is not a number")
    prompt = _preference_prompt(value, prompt)
    sides = [_with_prompt(prompt, _column_turns({"answer": answer}, "answer", "assistant")) for answer in answers]
    pairs = [(i, j) for i, j in permutations(range(len(sides)), 2) if scores[i] > scores[j] and sides[i] != sides[j]]
    if not pairs:
        raise InvalidRow("bad-ranking", "no two different answers have different scores")
    return [_pair(sides[i], sides[j], value) for i, j in pairs]


def labelled(value: Value, keys: Keys) -> list[ParsedRow]:
    """Convert an answer with a label. The label is for the last turn only; earlier answers are context."""
    *columns, label = keys
    desirable = _parse_label(value[label], numbers=True)
    if desirable is None:
        what = f"{label} is {str(value[label])[:40]!r}, not good or bad (true, false, up, down, ...)"
        raise InvalidRow("bad-label", what)
    rows = []
    for parsed in _LABELLED_CONVERTERS[tuple(columns)](value, tuple(columns)):
        if parsed.messages[-1].role != "assistant":
            raise InvalidRow("no-assistant", "the last message, to which the label belongs, is not the assistant's")
        answer = _check_weights([parsed.messages[-1]])
        turns = (*_as_context([*parsed.messages[:-1]]), *answer)
        rows.append(replace(parsed, messages=turns, desirable=desirable))
    return rows


def is_labelled(value: Value, keys: Keys) -> bool:
    """Return whether a row's label means good or bad; a number in `label` may be a class instead."""
    return value[keys[-1]] is not None and _parse_label(value[keys[-1]], numbers=keys[-1] != "label") is not None


def _parse_label(label: Any, *, numbers: bool) -> bool | None:
    if isinstance(label, bool):
        return label
    word = str(label).strip().casefold() if isinstance(label, str | int) else ""
    known = {**dict.fromkeys(GOOD, True), **dict.fromkeys(BAD, False)}
    return known.get(word, {"1": True, "0": False}.get(word) if numbers else None)


def _preference_prompt(value: Value, answer: Any) -> list[Message]:
    key = next((key for key in _PROMPT_KEYS if value.get(key) is not None), "")
    if key in _CONTEXT_KEYS and _is_whole_conversation(answer):
        key = ""
    if not key and isinstance(answer, str):
        raise InvalidRow("no-prompt", "chosen is a string and there is no prompt")
    if key == "instruction":
        return [*_history(value), Message("user", _instruction(value))]
    turns = _column_turns(value, key, "user") if key else []
    if key in _CONTEXT_KEYS and turns and turns[-1].role == "assistant":
        what = f"{key} ends with an answer, so it is unclear what chosen and rejected answer"
        raise InvalidRow("no-question", what)
    return turns


def _is_whole_conversation(answer: Any) -> bool:
    """Return whether an answer includes its prompt; `messages` is then often a copy of one of the answers."""
    first = answer[0] if isinstance(answer, list) and answer else answer
    role = first.get("role", first.get("from")) if isinstance(first, dict) else "assistant"
    return role in ("system", "user", "human")


def _with_prompt(prompt: list[Message], side: list[Message]) -> list[Message]:
    """Prepend the prompt, unless the side repeats it, as in many data sets (maybe after a system text)."""
    num_system = 1 if side and side[0].role == "system" and (not prompt or prompt[0].role != "system") else 0
    dialogue = side[num_system:]
    if _stripped(dialogue[: len(prompt)]) == _stripped(prompt):
        return side
    if prompt[-1].role == "user" and dialogue and dialogue[0].role == "user":
        raise InvalidRow("prompts-differ", "an answer begins with a user message that is not the prompt's")
    return [*prompt, *side]


def _stripped(turns: Sequence[Message]) -> list[Message]:
    return [replace(turn, content=turn.content.strip()) for turn in turns]


def _pair(chosen: list[Message], rejected: list[Message], value: Value) -> ParsedRow:
    if chosen == rejected:
        raise InvalidRow("same-answers", "chosen and rejected are the same")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    num_shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    sides = [_answer_turns(side, num_shared, value) for side in (chosen, rejected)]
    return replace(sides[0], rejected=sides[1].messages)


def _answer_turns(side: Sequence[Message], num_prompt: int, value: Value) -> ParsedRow:
    if len(side) == num_prompt or side[num_prompt].role != "assistant":
        raise InvalidRow("prompts-differ", "chosen and rejected do not answer the same prompt")
    return parsed_row([*_as_context([*side[:num_prompt]]), *_check_weights(side[num_prompt:])], value)


def _check_weights(answer: Sequence[Message]) -> Sequence[Message]:
    """Raise InvalidRow for weights other than 0 and 1, which would scale the log-probability in the loss."""
    for turn in answer:
        if turn.role == "assistant" and turn.weight not in (0.0, 1.0):
            what = f"a message of the answer has the weight {turn.weight:g}; here it must be 1 or 0"
            raise InvalidRow("answer-weight", what)
    return answer
