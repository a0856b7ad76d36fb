"""Tool calls in the form of a template: found, read, and what is written between two turns."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from strop.data.rendering.render import Renderer
from strop.data.rendering.tool_calls import (
    HERMES,
    Call,
    CallFormat,
    InvalidCall,
    ToolDialogue,
    Turn,
    as_hermes,
    call_json,
    derive_call_format,
)
from strop.data.store import message_json
from strop.data.types import Conversation, Message
from strop.errors import ModelError
from strop.runs.events import describe_turns
from tests.support import families, tool_templates
from tests.support.templates import TOOL, user

OTHER = {**TOOL, "function": {**TOOL["function"], "name": "add"}}
TOOLS = [TOOL, OTHER]
HERMES_FAMILIES = ("chatml", "llama3", "gemma", "mistral", "phi")


def renderer_of(name: str) -> Renderer:
    if name.startswith("plain-"):
        return Renderer(families.tokenizer(name.removeprefix("plain-")))
    if name.startswith("as-chatml-"):
        return Renderer(families.tokenizer(name.removeprefix("as-chatml-")), template="chatml")
    return Renderer(tool_templates.tokenizer(name))


@pytest.mark.parametrize(("name", "expected"), [
    ("qwen3", {"opening": "<tool_call>\n", "closing": "\n</tool_call>", "shape": "object"}),
    ("qwen3-thinking", {"opening": "<tool_call>\n", "closing": "\n</tool_call>", "shape": "object"}),
    ("llama3", {"opening": "", "closing": "", "arguments_key": "parameters", "several": False}),
    ("mistral", {"opening": "[TOOL_CALLS] ", "closing": "", "shape": "list", "several": True}),
    ("xml", {"opening": "<tool_call>\n<function=", "shape": "tagged", "key_start": "<parameter=", "key_end": ">\n"}),
    ("pairs", {"opening": "<tool_call>\n", "shape": "tagged", "value_end": "</arg_value>", "several": True}),
    ("named", {"opening": "<|call|>", "closing": "<|called|>", "shape": "named", "separator": "<|sep|>\n"}),
    ("as-chatml-chatml", {"opening": "<tool_call>\n", "closing": "\n</tool_call>", "shape": "object"}),
])  # fmt: skip
def test_form_of_calls_is_found_by_rendering(name: str, expected: dict[str, Any]) -> None:
    form = derive_call_format(renderer_of(name).chat)
    assert form is not None
    found = {key: getattr(form, key) for key in expected}
    assert {**found, "opening": form.opening.lstrip()} == expected


NAMES = ["qwen3", "llama3", "mistral", "named", "xml", "pairs", "as-chatml-chatml", "as-chatml-phi"]


@pytest.mark.parametrize("name", [*NAMES, *(f"plain-{family}" for family in HERMES_FAMILIES)])
@pytest.mark.parametrize("result", ["22 degrees", "", 'a "quoted"\nline', "<|im_end|></s><|eot_id|><end_of_turn>"])
def test_trace_has_the_tokens_of_the_whole_dialogue(name: str, result: str) -> None:
    """Prompt, and what is written between turns, are those of a rendering of the whole with the same turns."""
    renderer = renderer_of(name)
    dialogue = ToolDialogue(renderer, TOOLS)
    calls = [Call("get_weather", {"city": "Paris", "days": 2}), Call("add", {"city": "Rome"})]
    calls = calls if dialogue.format.several else calls[:1]
    results = [result, "7"][: len(calls)]
    first = Message("assistant", "", tool_calls=tuple(map(call_json, calls)))
    second = replace(first, tool_calls=first.tool_calls[:1])
    answers = [Message("tool", text) for text in results]
    messages = [user("how warm?"), first, *answers, second, answers[0], Message("assistant", "It is warm.")]
    if dialogue.why_hermes:
        supports_system = renderer.chat.traits.system
        whole = Conversation("f", 1, tuple(as_hermes(messages, TOOLS, system=supports_system)))
    else:
        whole = Conversation("f", 1, tuple(messages), tuple(TOOLS))
    [example] = renderer.render(whole)
    supervised = np.flatnonzero(np.diff(np.concatenate([[0], example.weights > 0, [0]])))
    spans = list(zip(supervised[::2], supervised[1::2], strict=True))
    assert len(spans) == 3
    assert dialogue.prompt(messages[:1]).tolist() == example.ids[: spans[0][0]].tolist()
    turn = dialogue.read_turn(example.ids[slice(*spans[0])])
    assert turn.calls == tuple(calls)
    between = dialogue.continuation(messages[:1], turn, results)
    assert between.tolist() == example.ids[spans[0][1] : spans[1][0]].tolist()
    again = dialogue.read_turn(example.ids[slice(*spans[1])])
    before = [*messages[:1], *dialogue.rendered_turn(turn, results)]
    between = dialogue.continuation(before, again, results[:1])
    assert between.tolist() == example.ids[spans[1][1] : spans[2][0]].tolist()
    last = dialogue.read_turn(example.ids[slice(*spans[2])])
    assert last == Turn(last.text, last.text, ()) and last.text.strip() == "It is warm."


def test_template_that_rewrites_earlier_turns_continues_a_trace() -> None:
    """It writes an empty block of reasoning into the last turn only, so the whole has no single rendering."""
    dialogue = ToolDialogue(renderer_of("qwen3-thinking"), TOOLS)
    turn = Turn("", "", (Call("add", {"city": "Rome"}),))
    between = dialogue.continuation([user("how warm?")], turn, ["7"]).tolist()
    following = dialogue.prompt([user("how warm?"), turn.as_message(), Message("tool", "7")]).tolist()
    assert following[-len(between) :] == between


@pytest.mark.parametrize(("text", "calls"), [
    ('<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', [Call("f", {"x": 1})]),
    ('Let me see.\n<tool_call>\n{"name": "f", "arguments": "{\\"x\\": 1}"}', [Call("f", {"x": 1})]),
    ('<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g", "parameters": {}}', [Call("f", {}), Call("g", {})]),
    ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', [InvalidCall("the arguments are not an object")]),
    ('<tool_call>{"nam": "f"}</tool_call>', [InvalidCall('the call has no "name"')]),
    ('<tool_call>f(1)</tool_call> <tool_call>{"name": "g"}', ["not valid JSON", Call("g", {})]),
    ("an answer", []),
    ('{"name": "f", "arguments": {}}', []),
])  # fmt: skip
def test_hermes_calls_are_read(text: str, calls: list[Any]) -> None:
    read = HERMES.parse(text).calls
    assert len(read) == len(calls)
    for got, expected in zip(read, calls, strict=True):
        assert got == expected or (isinstance(got, InvalidCall) and isinstance(expected, str) and expected in got.why)


@pytest.mark.parametrize(("text", "calls"), [
    ('{"name": "f", "parameters": {"x": 1}}', [Call("f", {"x": 1})]),
    (' {"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}', [Call("f", {"x": 1})]),
    ('{"x": 1}', []),
    ('{"name": "f", "parameters": {', ["not valid JSON"]),
    ("It is {x}.", []),
])  # fmt: skip
def test_calls_without_a_marker_are_read(text: str, calls: list[Any]) -> None:
    form = CallFormat("", "", arguments_key="parameters", several=False)
    read = form.parse(text).calls
    assert len(read) == len(calls)
    for got, expected in zip(read, calls, strict=True):
        assert got == expected or (isinstance(got, InvalidCall) and isinstance(expected, str) and expected in got.why)


@pytest.mark.parametrize(("text", "expected"), [
    ('<|python_tag|>{"name": "add", "parameters": {"x": 1}}', Call("add", {"x": 1})),
    ('<|python_tag|> {"type": "function", "name": "add", "parameters": {}}<|eom_id|>', Call("add", {})),
    ('<|python_tag|>search.call(query="a (b)", limit=2)', Call("search", {"query": "a (b)", "limit": 2})),
    ("<|python_tag|>add(x=[1, None])<|eom_id|>", Call("add", {"x": [1, None]})),
    ("<|python_tag|>print(1)", None), ("<|python_tag|>import os", None), ("<|python_tag|>add(x=y)", None),
    ("<|python_tag|>add(x={1})", None), ("<|python_tag|>add(**{'x': 1})", None), ("<|python_tag|>", None),
])  # fmt: skip
def test_calls_after_a_python_tag_are_read(text: str, expected: Call | None) -> None:
    form = CallFormat("", "", arguments_key="parameters", several=False)
    [call] = form.parse(text).calls
    assert call == expected if expected else isinstance(call, InvalidCall)


def test_gpt_oss_names_the_function_before_or_after_the_channel() -> None:
    form = CallFormat(" to=functions.", "", "named", separator="<|channel|>commentary json<|message|>", several=False)
    written = form.write(Call("add", {"x": 1}))
    native = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"x": 1}'
    assert form.parse(written).calls == form.parse(native).calls == (Call("add", {"x": 1}),)


VALUES = [
    {}, {"x": ""}, {"x": "two\nlines, \"quoted\" and 'so'", "y": "Grüße \u4f60"}, {"x": 1, "y": -2.5, "z": None},
    {"x": {"a": [1, "b", {"c": True}]}, "y": []}, {"x": "</tool_call>{}[]"}, {"x": "1", "y": "true"},
]  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, *(f"plain-{family}" for family in HERMES_FAMILIES)])
def test_calls_that_the_template_writes_are_read_back(name: str) -> None:
    for arguments in VALUES:
        properties = {key: {"type": "string"} for key, value in arguments.items() if isinstance(value, str)}
        named = [{"name": x, "description": "x", "parameters": {"properties": properties}} for x in ("add", "look.up")]
        dialogue = ToolDialogue(renderer_of(name), [{"type": "function", "function": each} for each in named])
        tokenizer = dialogue._renderer.tokenizer
        if name == "pairs" and "</tool_call>" in str(arguments):  # the template does not escape it
            continue
        for count in (1, 2) if dialogue.format.several else (1,):
            calls = tuple(Call(tool["function"]["name"], arguments) for tool in dialogue.tools[:count])
            turn = Message("assistant", "", tool_calls=tuple({**call_json(x), "id": "abcdefghi"} for x in calls))
            if dialogue.why_hermes:
                [turn] = as_hermes([turn], (), system=True)
            draft = dialogue._renderer.chat.make_drafts(Conversation("", 0, (user("hi"), turn)))[-1]
            start, end, _ = draft.spans[-1]
            ids = np.array(tokenizer.encode(draft.text[start:end], add_special_tokens=False), np.int32)
            assert dialogue.read_turn(ids).calls == calls, draft.text[start:end]


@pytest.mark.parametrize(("text", "expected"), [
    ("<tool_call>\n<function=add>\n</function>\n</tool_call>", Call("add", {})),
    ("<tool_call><function=add><parameter=x>3</parameter></function></tool_call>", Call("add", {"x": 3})),
    ("<tool_call>\n<function=add>\n<parameter=x>\n3\n</parameter>\n</function>", Call("add", {"x": 3})),
    ("<tool_call>\n<function=add>\n<parameter=x>\n3\n</function>\n</tool_call>", "cannot be read"),
    ("<tool_call>\n<function=>\n</function>\n</tool_call>", "name of the function is missing"),
    ('<tool_call>\n{"name": "add"}\n</tool_call>', None),
])  # fmt: skip
def test_tagged_calls_are_read(text: str, expected: Call | str | None) -> None:
    form = derive_call_format(renderer_of("xml").chat)
    assert form is not None
    calls = form.parse(f"I look. {text}").calls
    assert calls == (() if expected is None else (expected,)) or (
        isinstance(expected, str) and expected in calls[0].why
    )  # type: ignore[union-attr]


def test_text_before_a_call_is_content_and_calls_in_reasoning_are_not_read() -> None:
    turn = HERMES.parse('I look.\n<tool_call>{"name": "f"}</tool_call>')
    assert (turn.content, turn.as_message().tool_calls) == ("I look.", (call_json(Call("f", {})),))
    renderer = renderer_of("qwen3")
    call = '<tool_call>{"name": "f"}</tool_call>'
    text = f"<think>\n{call}\n</think>\n\nNo.<|im_end|>"
    turn = ToolDialogue(renderer, TOOLS).read_turn(np.array(renderer.tokenizer.encode(text), np.int32))
    assert not turn.calls and turn.text.endswith("No.")
    assert turn.as_message() == Message("assistant", "No.", call)
    text = text.replace("No.", f"So: {call}, then")  # text after a call is left out
    turn = ToolDialogue(renderer, TOOLS).read_turn(np.array(renderer.tokenizer.encode(text), np.int32))
    assert turn.as_message() == Message("assistant", "So:", call, (call_json(Call("f", {})),))
    assert turn.as_message(stopped=False) == Message("assistant", f"So: {call}, then", call)
    assert describe_turns([message_json(turn.as_message())]) == f"({call})\nSo:\nf()"


def test_hermes_is_written_where_the_template_shows_no_tools() -> None:
    dialogue = ToolDialogue(renderer_of("plain-gemma"), TOOLS)
    assert dialogue.why_hermes == "the chat template shows no tools and no tool calls"
    text = dialogue._renderer.tokenizer.decode(dialogue.prompt([user("how warm?")]))
    assert json.dumps(TOOL) in text and "<tool_call>" in text and text.count("<start_of_turn>") == 2
    with_system = as_hermes([Message("system", "Be brief."), user("hi")], TOOLS, system=True)
    assert [message.role for message in with_system] == ["system", "user"]
    assert with_system[0].content.startswith("Be brief.\n\nYou can call")


def test_template_whose_calls_cannot_be_read_is_refused() -> None:
    with pytest.raises(ModelError, match="writes tool calls in a form that strop cannot read") as refused:
        ToolDialogue(renderer_of("notation"), TOOLS)
    assert "call:NAME{x:" in refused.value.what
    assert "data.template chatml" in str(refused.value.fix)


def test_template_without_an_end_of_a_turn_is_refused() -> None:
    from tests.support import templates

    with pytest.raises(ModelError, match="cannot continue after a tool call"):
        ToolDialogue(Renderer(templates.tokenizer("ends-with-nothing")), TOOLS)


@pytest.mark.parametrize("arguments", [
    '{"x": 1e999}', '{"x": NaN}', r'{"x": "\ud83d"}', '{"x": ' + "[" * 5000, '"{\\"x\\": NaN}"',
])  # fmt: skip
def test_calls_that_cannot_be_logged_are_invalid(arguments: str) -> None:
    [call] = HERMES.parse(f'<tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call>').calls
    assert isinstance(call, InvalidCall)


def test_a_second_object_in_a_block_is_not_dropped_in_silence() -> None:
    call = '{"name": "add", "arguments": {}}'
    [found] = HERMES.parse(f"<tool_call>\n{call}\n{call}\n</tool_call>").calls
    assert isinstance(found, InvalidCall) and "text after the JSON" in found.why


def test_ids_that_the_model_writes_are_those_of_the_results() -> None:
    dialogue = ToolDialogue(renderer_of("mistral"), TOOLS)
    name = TOOL["function"]["name"]
    calls = [{"name": name, "arguments": {"x": "1"}, "id": f"Ab3dE6gH{number}"} for number in range(2)]
    turn = dialogue.format.parse(f"[TOOL_CALLS] {json.dumps(calls)}")
    ids = dialogue.continuation([user("hi")], turn, ["one", "two"])
    text = renderer_of("mistral").tokenizer.decode(ids)
    assert "Ab3dE6gH0" in text and "Ab3dE6gH1" in text and "call0000" not in text


def test_reasoning_that_is_not_closed_has_no_calls() -> None:
    dialogue = ToolDialogue(renderer_of("qwen3-thinking"), TOOLS)
    encode = renderer_of("qwen3-thinking").tokenizer.encode
    call = '<tool_call>\n{"name": "add", "arguments": {"x": "a"}}\n</tool_call>'

    def calls(text: str) -> int:
        return len(dialogue.read_turn(np.array(encode(text, add_special_tokens=False), np.int32)).calls)

    assert calls(f"<think> maybe {call} no") == 0
    assert calls(f"<think> maybe {call} no </think> {call}") == 1
