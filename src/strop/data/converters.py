"""One row -> what it says: a function for each shape that rows have in the field. Each raises BadRow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from strop.data.reading.json_reader import Refused, loads
from strop.data.types import Message, Role
from strop.errors import nearest

Value = Mapping[str, Any]
Keys = tuple[str, ...]  # the columns by which a row has its shape

# Every name of a role, as LLaMA-Factory, ShareGPT, OpenAI, OpenAssistant and Llama write them. Others are refused.
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
# Columns that are not content, so that leaving them out changes nothing that could have been meant.
METADATA = frozenset(
    {
        *("id", "idx", "index", "uuid", "uid", "hash", "url", "source", "dataset", "split", "subset", "title", "name"),
        *("date", "timestamp", "created", "lang", "language", "license", "meta", "metadata", "model", "author"),
        *("version",),
    }
)
MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # columns, and names in a turn
_SPEAKER = frozenset({"role", "from"})
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT: the assistant's turn is the call itself, as JSON


class BadRow(ValueError):
    """The row cannot be used, for the reason `code` of formats.REASONS."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code
        self.what = what


@dataclass(frozen=True)
class Said:
    """What a row says once: messages (and tools), or text. rejected, desirable: as in Conversation."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    rejected: tuple[Message, ...] = ()
    desirable: bool | None = None


# --- messages ----------------------------------------------------------------------------------------------------


def messages(value: Value, keys: Keys) -> list[Said]:
    """One column: a list of turns, or of {"human": ..., "assistant": ...}."""
    turns = value[keys[0]]
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and not _SPEAKER & set(turn) for turn in turns):
        turns = [turn for place, pairs in enumerate(turns) for turn in _spoken(pairs, f"{keys[0]}[{place}]")]
        value = {**value, keys[0]: turns}
    return [row_of(_turns(value, keys[0]), value)]


def _spoken(pairs: dict[str, Any], at: str) -> list[dict[str, Any]]:
    """The turns of {"human": ..., "assistant": ...}, the system's first.

    Raises BadRow for content beside them, which would be lost.
    """
    turns = []
    for key, said in pairs.items():
        if key.lower() in ROLES:
            turns.append({"role": key, "content": said})
        elif isinstance(said, str | list | dict) and said and key.lower() not in METADATA:
            what = f"{at}: {key[:40]!r} holds content and is no known role; write such turns with role and content"
            raise BadRow("unknown-role", what)
    return sorted(turns, key=lambda turn: ROLES[turn["role"].lower()] != "system")


def asked(value: Value) -> Said:
    """A request for an answer: its messages and tools. Whose turn comes last is the template's concern."""
    return Said(tuple(_turns(value, "messages")), _tools(value))


def _turns(value: Value, key: str) -> list[Message]:
    turns = value[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("bad-messages", f"{key} is {kind_of(turns)}, not a list of objects")
    said = [_message(turn, f"{key}[{place}]") for place, turn in enumerate(turns)]
    names = {call["id"]: call["function"]["name"] for turn in said for call in turn.tool_calls if "id" in call}
    return [
        replace(turn, name=names.get(str(raw.get("tool_call_id")))) if turn.role == "tool" and not turn.name else turn
        for turn, raw in zip(said, turns, strict=True)
    ]


def row_of(turns: list[Message], value: Value) -> Said:
    """The turns behind the row's own system text, with its tools. Raises BadRow for turns that teach nothing."""
    system = _optional_text(value, "system")
    if system:
        if turns and turns[0].role == "system":
            raise BadRow("bad-messages", "two system texts: the column `system` and the first turn")
        turns = [Message("system", system), *turns]
    spoken = [turn for turn in turns if turn.role != "system"]
    if not any(turn.role == "assistant" for turn in spoken):
        raise BadRow("no-assistant", "no assistant turn" if turns else "no turns")
    if spoken[0].role != "user":
        raise BadRow("no-user-first", f"the first turn is the {spoken[0].role}'s, not the user's")
    for turn in spoken:
        blank = not turn.content.strip()
        if blank and turn.role == "assistant" and not turn.tool_calls and turn.weight:
            raise BadRow("empty-answer", "an assistant turn is empty: it trains to stop at once")
        if blank and turn.role == "user":
            raise BadRow("empty-prompt", "a user turn is empty")
    return Said(tuple(turns), _tools(value))


def _message(turn: dict[str, Any], at: str) -> Message:
    role_key = "role" if turn.get("role") is not None else "from"
    named = turn.get(role_key)
    if not isinstance(named, str):
        raise BadRow("unknown-role", f"{at}.{role_key} is {kind_of(named)}, not a string")
    if seen := [name for name in MEDIA if turn.get(name)]:
        raise BadRow("media", f"{at}: {seen[0]} holds what is seen or heard, which is not read")
    content = turn["content"] if "content" in turn else turn.get("value")
    weight = _weight(turn, at)
    if named.lower() in CALL_ROLES:
        return Message("assistant", "", tool_calls=_calls(content, at), weight=weight)
    role = ROLES.get(named.lower())
    if role is None:
        raise BadRow("unknown-role", f"{at}: unknown role {named[:40]!r}{nearest(named, [*ROLES, *CALL_ROLES])}")
    calls = _calls(turn["tool_calls"], at) if turn.get("tool_calls") else ()
    calls += _calls(turn["function_call"], at) if turn.get("function_call") else ()
    thoughts = [turn[key] for key in ("reasoning_content", "reasoning", "thinking") if turn.get(key)]
    if len(thoughts) > 1 or not all(isinstance(thought, str) for thought in thoughts):
        raise BadRow("bad-part", f"{at}: the reasoning must be one string")
    if isinstance(content, list):
        content, within, more = _parts(content, at)
        thoughts, calls = thoughts + within, calls + more
    if content is None:
        if not calls:
            raise BadRow("no-content", f"{at}: content is null or missing (allowed only beside tool calls)")
        content = ""
    if not isinstance(content, str):
        raise BadRow("not-text", f"{at}: content is {kind_of(content)}, not a string")
    if role != "assistant" and (calls or thoughts):
        raise BadRow("bad-part", f"{at}: only an assistant turn can hold reasoning or tool calls")
    name = turn.get("name")
    if name is not None and not isinstance(name, str):
        raise BadRow("not-text", f"{at}: name is {kind_of(name)}, not a string")
    id = turn.get("tool_call_id") if role == "tool" else None
    call_id = id if isinstance(id, str) else None
    return Message(role, content, "".join(thoughts) if thoughts else None, calls, name, weight, call_id)


def _weight(turn: dict[str, Any], at: str) -> float:
    given = [turn[key] for key in ("weight", "loss_weight", "train") if turn.get(key) is not None]
    if not given:
        return 1.0
    if not all(isinstance(weight, int | float) and 0 <= weight <= 1e6 for weight in given) or len(set(given)) > 1:
        raise BadRow("bad-weight", f"{at}: weight, loss_weight and train are one number from 0 up, or true or false")
    return float(given[0])


_PARTS = {"reasoning": 0, "thinking": 0, "text": 1, "tool_call": 2}  # type -> place in the turn


def _parts(parts: list[Any], at: str) -> tuple[str | None, list[str], tuple[dict[str, Any], ...]]:
    """Typed parts -> (text, reasoning, calls), in that order only, since a template can render no other."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: tuple[dict[str, Any], ...] = ()
    last = 0
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _PARTS:
            shown = repr(kind[:40]) if isinstance(kind, str) else kind_of(part)
            raise BadRow("bad-part", f"{at}: a part of type {shown}; known are {', '.join(_PARTS)}")
        if _PARTS[kind] < last:
            raise BadRow("bad-part", f"{at}: {kind} behind a later part; the order is reasoning, text, tool calls")
        last = _PARTS[kind]
        held = [part[key] for key in ("text", "value", kind) if part.get(key) is not None]
        content = held[0] if held else None
        if kind == "tool_call":
            calls += _calls(content, at)
        elif isinstance(content, str):
            (texts if kind == "text" else thoughts).append(content)
        else:
            raise BadRow("not-text", f"{at}: a part of type {kind} holds {kind_of(content)}, not a string")
    return "".join(texts) if texts else None, thoughts, calls


# --- tools -------------------------------------------------------------------------------------------------------


def _calls(raw: Any, at: str) -> tuple[dict[str, Any], ...]:
    """One call or a list, objects or JSON, flat or as OpenAI has it -> {type, function: {name, arguments: object}}."""
    items = _parsed(raw, "bad-tool-call", at)
    calls = []
    for item in items if isinstance(items, list) else [items]:
        inner = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow("bad-tool-call", f"{at}: a tool call needs a name and arguments")
        arguments = inner.get("arguments", inner.get("parameters"))
        arguments = {} if arguments is None or arguments == "" else _parsed(arguments, "bad-tool-call", at)
        if not isinstance(arguments, dict):
            raise BadRow("bad-tool-call", f"{at}: the arguments of a tool call are {kind_of(arguments)}, not an object")
        _check_json(arguments, "bad-tool-call", f"{at}: the arguments of a tool call")
        call = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
        calls.append({"id": item["id"], **call} if isinstance(item.get("id"), str) else call)
    return tuple(calls)


def _tools(value: Value) -> tuple[dict[str, Any], ...]:
    raw = value.get("tools")
    if raw is None or raw == "":
        return ()
    tools = _parsed(raw, "bad-tools", "tools")
    if not isinstance(tools, list):
        raise BadRow("bad-tools", f"tools is {kind_of(tools)}, not a list")
    full = []
    for tool in tools:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow("bad-tools", "a tool needs a name")
        _check_json(tool, "bad-tools", "a tool")
        full.append(tool if inner is not tool else {"type": "function", "function": tool})
    return tuple(full)


def _parsed(raw: Any, code: str, at: str) -> Any:
    """JSON where it is a string, else as it is."""
    if not isinstance(raw, str):
        return raw
    try:
        return loads(raw)
    except Refused as error:
        raise BadRow(code, f"{at}: the string is not JSON: {error.what}") from error


def _check_json(value: Any, code: str, what: str) -> None:
    """Raises BadRow for dates, bytes, NaN and the like in an object of a Parquet file: templates write JSON."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRow(code, f"{what} cannot be written as JSON: {error}") from error


# --- columns -----------------------------------------------------------------------------------------------------


def columns(value: Value, keys: Keys) -> list[Said]:
    """Two columns, strings or lists of messages. The prompt is given: its assistant turns are not trained on."""
    asked = [*earlier(value), *given(turns_of(value, keys[0], "user"))]
    return [row_of([*asked, *turns_of(value, keys[1], "assistant")], value)]


def given(turns: list[Message]) -> list[Message]:
    return [replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in turns]


def turns_of(value: Value, key: str, role: Role) -> list[Message]:
    held = value[key]
    if isinstance(held, dict):
        return [_message(held, key)]
    return _turns(value, key) if isinstance(held, list) else [Message(role, text_of(value, key))]


def alpaca(value: Value, keys: Keys) -> list[Said]:
    """instruction, maybe input; output. The input follows the instruction after a blank line."""
    turns = earlier(value)
    return [row_of([*turns, Message("user", task_of(value)), Message("assistant", text_of(value, keys[1]))], value)]


def earlier(value: Value) -> list[Message]:
    """The turns of `history`, a list of [prompt, answer]."""
    turns: list[Message] = []
    history = value.get("history") or []
    if not isinstance(history, list):
        raise BadRow("bad-messages", f"history is {kind_of(history)}, not a list of [prompt, answer]")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow("bad-messages", "history holds something else than [prompt, answer]")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def instances(value: Value, keys: Keys) -> list[Said]:
    """Self-instruct: an instruction and a list of input and output. Each makes a conversation of its own."""
    items = value["instances"]
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise BadRow("bad-messages", "instances is not a list of objects with input and output")
    rows = ({**item, "instruction": value["instruction"], "system": value.get("system")} for item in items)
    return [said for row in rows for said in alpaca(row, ("instruction", "output"))]


def task_of(value: Value) -> str:
    given = [text for key in ("input", "context") if (text := _optional_text(value, key)).strip()]
    if len(given) > 1:
        raise BadRow("bad-messages", "input and context both hold text: name the columns to read with --data.columns")
    return "\n\n".join(text for text in (text_of(value, "instruction"), *given) if text.strip())


def prompt_alone(value: Value, keys: Keys) -> list[Said]:
    """A prompt, a string or a list of messages, whose last turn is the user's: it has no answer."""
    turns = [*earlier(value), *given(turns_of(value, keys[0], "user"))]
    system = _optional_text(value, "system")
    turns = [*([Message("system", system)] if system else []), *turns]
    spoken = [turn for turn in turns if turn.role != "system"]
    if not spoken or spoken[-1].role not in ("user", "tool"):
        raise BadRow("no-question", "the last turn is not the user's: there is nothing to answer")
    if any(turn.role == "user" and not turn.content.strip() for turn in spoken):
        raise BadRow("empty-prompt", "a user turn is empty")
    return [Said(tuple(turns), _tools(value))]


def is_prompt_alone(value: Value, keys: Keys) -> bool:
    """Whether a row is meant to have no answer: a column that is null may be one that is missing."""
    return all(held is not None for held in value.values())


def text(value: Value, keys: Keys) -> list[Said]:
    """Raw text."""
    content = text_of(value, "text")
    if not content.strip():
        raise BadRow("empty-text", "the text is empty")
    return [Said(text=content)]


def text_of(value: Value, key: str) -> str:
    held = value.get(key)
    if held is None:
        raise BadRow("no-content", f"{key} is null or missing")
    if not isinstance(held, str):
        raise BadRow("not-text", f"{key} is {kind_of(held)}, not a string")
    return held


def _optional_text(value: Value, key: str) -> str:
    return "" if value.get(key) is None else text_of(value, key)


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


# ---- from strop.data.preferences ----
"""Rows that compare or judge answers -> what they say: pairs, rankings, answers with a label. Each raises BadRow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

from strop.data import converters
from strop.data.converters import BadRow, Keys, Said, Value, given, row_of, task_of, turns_of
from strop.data.types import Message

# What a label may be, case aside. Numbers count only in a column that can hold nothing else.
GOOD = frozenset({"true", "up", "thumbs_up", "good", "desirable", "chosen", "\N{THUMBS UP SIGN}", "+1"})
BAD = frozenset({"false", "down", "thumbs_down", "bad", "undesirable", "rejected", "\N{THUMBS DOWN SIGN}", "-1"})
RANKED: tuple[Keys, ...] = tuple(
    (asked, said, "scores") for asked in ("prompt", "question") for said in ("answers", "responses", "completions")
)
LABELS = ("label", "kto_tag", "thumbs")
_EARLIER = ("messages", "conversation")  # a prompt only where the answers do not hold it themselves
_PROMPTS = ("conversations", "prompt", "question", "instruction", *_EARLIER)
_JUDGED: dict[Keys, Any] = {
    ("messages",): converters.messages,
    ("conversations",): converters.messages,
    ("prompt", "completion"): converters.columns,
    ("prompt", "response"): converters.columns,
    ("query", "response"): converters.columns,
    ("question", "answer"): converters.columns,
    ("instruction", "output"): converters.alpaca,
}
LABELLED: tuple[Keys, ...] = tuple((*keys, label) for keys in _JUDGED for label in LABELS)


def preference(value: Value, keys: Keys) -> list[Said]:
    """A better and a worse answer to a prompt or a conversation, or whole conversations with a common beginning."""
    better, worse = keys
    if worse == "rejected_response":  # beside the messages whose last turn is the better one
        turns = turns_of(value, better, "assistant")
        return [_pair(turns, [*turns[:-1], *turns_of(value, worse, "assistant")], value)]
    asked = _asked(value, value[better])
    chosen, rejected = (_whole(asked, turns_of(value, name, "assistant")) for name in keys)
    return [_pair(chosen, rejected, value)]


def ranking(value: Value, keys: Keys) -> list[Said]:
    """Several answers to a prompt, each with its score: a pair of each two whose scores differ."""
    prompt, answers, scores = (value[key] for key in keys)
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        raise BadRow("bad-ranking", f"{keys[1]} and {keys[2]} are not two lists of one length")
    if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
        raise BadRow("bad-ranking", f"{keys[2]} holds something else than numbers")
    asked = _asked(value, prompt)
    said = [_whole(asked, turns_of({"answer": answer}, "answer", "assistant")) for answer in answers]
    ordered = [(i, j) for i, j in permutations(range(len(said)), 2) if scores[i] > scores[j] and said[i] != said[j]]
    if not ordered:
        raise BadRow("bad-ranking", "no two answers that differ have scores that differ")
    return [_pair(said[i], said[j], value) for i, j in ordered]


def labelled(value: Value, keys: Keys) -> list[Said]:
    """One answer that was judged good or bad. Only the last turn was judged: earlier answers are given."""
    *columns, label = keys
    judged = _judgement(value[label], numbers=True)
    if judged is None:
        raise BadRow(
            "bad-label", f"{label} is {str(value[label])[:40]!r}, not good or bad (true, false, up, down, ...)"
        )
    found = []
    for said in _JUDGED[tuple(columns)](value, tuple(columns)):
        if said.messages[-1].role != "assistant":
            raise BadRow("no-assistant", "the last turn, which the label judges, is not the assistant's")
        answer = _unweighted([said.messages[-1]])
        found.append(replace(said, messages=(*given([*said.messages[:-1]]), *answer), desirable=judged))
    return found


def is_labelled(value: Value, keys: Keys) -> bool:
    """Whether the label of a row can only be a judgement; a number in `label` may be a class."""
    return value[keys[-1]] is not None and _judgement(value[keys[-1]], numbers=keys[-1] != "label") is not None


def _judgement(label: Any, *, numbers: bool) -> bool | None:
    if isinstance(label, bool):
        return label
    word = str(label).strip().casefold() if isinstance(label, str | int) else ""
    known = {**dict.fromkeys(GOOD, True), **dict.fromkeys(BAD, False)}
    return known.get(word, {"1": True, "0": False}.get(word) if numbers else None)


def _asked(value: Value, answer: Any) -> list[Message]:
    key = next((key for key in _PROMPTS if value.get(key) is not None), "")
    if key in _EARLIER and _begins_itself(answer):
        key = ""
    if not key and isinstance(answer, str):
        raise BadRow("no-prompt", "chosen is a string and there is no prompt")
    if key == "instruction":
        return [*converters.earlier(value), Message("user", task_of(value))]
    turns = turns_of(value, key, "user") if key else []
    if key in _EARLIER and turns and turns[-1].role == "assistant":
        raise BadRow("no-question", f"{key} ends with an answer, so what chosen and rejected answer is not clear")
    return turns


def _begins_itself(answer: Any) -> bool:
    """Whether an answer is a whole conversation: beside it `messages` often repeats one side, answer included."""
    first = answer[0] if isinstance(answer, list) and answer else answer
    role = first.get("role", first.get("from")) if isinstance(first, dict) else "assistant"
    return role in ("system", "user", "human")


def _whole(asked: list[Message], side: list[Message]) -> list[Message]:
    """The prompt and one side, which in many sets repeats the prompt (and may put a system text before it). Raises
    BadRow where a side asks something else than the prompt does."""
    system = 1 if side and side[0].role == "system" and (not asked or asked[0].role != "system") else 0
    own = side[system:]
    if _trimmed(own[: len(asked)]) == _trimmed(asked):
        return side
    if asked[-1].role == "user" and own and own[0].role == "user":
        raise BadRow("prompts-differ", "an answer begins with a user's turn that is not the prompt's")
    return [*asked, *side]


def _trimmed(turns: Sequence[Message]) -> list[Message]:
    return [replace(turn, content=turn.content.strip()) for turn in turns]


def _pair(better: list[Message], worse: list[Message], value: Value) -> Said:
    if better == worse:
        raise BadRow("same-answers", "chosen and rejected are the same")
    common = next(
        (i for i, (a, b) in enumerate(zip(better, worse, strict=False)) if a != b), min(len(better), len(worse))
    )
    sides = [_answered(side, common, value) for side in (better, worse)]
    return replace(sides[0], rejected=sides[1].messages)


def _answered(side: Sequence[Message], common: int, value: Value) -> Said:
    """One side whose first `common` turns are the prompt."""
    if len(side) == common or side[common].role != "assistant":
        raise BadRow("prompts-differ", "chosen and rejected do not answer the same prompt")
    return row_of([*given([*side[:common]]), *_unweighted(side[common:])], value)


def _unweighted(answer: Sequence[Message]) -> Sequence[Message]:
    """The turns of an answer as they are: a weight would multiply its log-probability, and the loss be another one."""
    for turn in answer:
        if turn.role == "assistant" and turn.weight not in (0.0, 1.0):
            raise BadRow("answer-weight", f"a turn of the answer has the weight {turn.weight:g}; here it is 1 or 0")
    return answer
