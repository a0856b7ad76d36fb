"""Ten chat templates, each with a trait of real templates, and conversations to render with them.

TRAITS: name -> (template, control tokens); every second control token, from the first, is not marked special.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from strop.data.types import Conversation, Message
from tests.support import families

_TURN = "{{- '<|open|>' + m.role + '\\n' + m.content + '<|close|>\\n' }}"
_THINK = "{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' if m.reasoning_content else '' }}"
_OPENING = "{%- if add_generation_prompt %}{{ '<|open|>assistant\\n' }}"

TRAITS: dict[str, tuple[str, list[str]]] = {
    "opens-with-switch": (
        "{%- for m in messages %}{%- if m.role != 'assistant' %}" + _TURN + "{%- else %}"
        "{{- '<|open|>assistant\\n<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}"
        "{{- m.content + '<|close|>\\n' }}{%- endif %}{%- endfor %}" + _OPENING + "{{ '<think>\\n' }}"
        "{%- if enable_thinking is defined and not enable_thinking %}{{ '\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
        ["<|open|>", "<|close|>", "<think>", "</think>"],
    ),
    "opens-always": (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}"
        "{{- '<|open|>assistant\\n' + m.content.split('</think>')[-1] + '<|close|>\\n' }}"
        "{%- else %}" + _TURN + "{%- endif %}{%- endfor %}" + _OPENING + "{{ '<think>\\n' }}{%- endif %}",
        ["<|open|>", "<|close|>", "<think>", "</think>"],
    ),
    "writes-an-empty-block": (
        "{%- for m in messages %}" + _TURN + "{%- endfor %}" + _OPENING + "{{ '<think>\\n\\n</think>\\n\\n' }}"
        "{%- endif %}",
        ["<|open|>", "<|close|>", "<think>", "</think>"],
    ),
    "ends-where-another-turn-follows": (
        "{%- for m in messages %}{{ '<|open|>' + m.role + '\\n' + m.content }}"
        "{{- '<|close|>' if m.role != 'assistant' or not loop.last }}{%- endfor %}" + _OPENING + "{%- endif %}",
        ["<|open|>", "<|close|>"],
    ),
    "ends-with-the-next-role": (
        "{{- '<|start|>' }}{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{%- endif %}",
        ["<|start|>", "<|system|>", "<|user|>", "<|assistant|>"],
    ),
    "ends-with-nothing": (
        "{%- for m in messages %}{{ m.role + ': ' + m.content + '\\n\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ 'assistant:' }}{%- endif %}",
        [],
    ),
    "clock": (
        "{{- '<|open|>system\\nToday is ' + strftime_now('%d %B %Y') + '.' }}"
        "{%- if city is defined %}{{ ' You are in ' + city + '.' }}{%- endif %}{{ '<|close|>\\n' }}"
        "{%- for m in messages %}" + _TURN + "{%- endfor %}" + _OPENING + "{%- endif %}",
        ["<|open|>", "<|close|>"],
    ),
    "tools-as-text-under-another-name": (
        "{{- '<|open|>functions\\n' + functions + '<|close|>\\n' }}{%- for m in messages %}"
        "{{- '<|open|>' + m.role + '\\n' + m.content }}"
        "{%- for call in m.tool_calls or [] %}"
        "{{- '<|call|>' + call.function.name + call.function.arguments + '<|called|>' }}{%- endfor %}"
        "{{- '<|close|>\\n' }}{%- endfor %}" + _OPENING + "{%- endif %}",
        ["<|open|>", "<|close|>", "<|call|>", "<|called|>"],
    ),
    "ids-of-nine": (
        "{{- '<|tools|>' + tools | tojson + '<|close|>' if tools else '' }}{%- for m in messages %}"
        "{{- '<|open|>' + m.role + '\\n' }}"
        "{%- for call in m.tool_calls or [] %}{%- if call.id is not defined or call.id | length != 9 %}"
        "{{ raise_exception('ids have nine signs') }}{%- endif %}"
        "{{- {'id': call.id, 'call': call.function} | tojson }}{%- endfor %}"
        "{%- if m.role == 'tool' %}{{ m.tool_call_id + '=' }}{%- endif %}"
        "{{- m.content + '<|close|>\\n' }}{%- endfor %}" + _OPENING + "{%- endif %}",
        ["<|open|>", "<|close|>", "<|tools|>"],
    ),
    "channels": (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}"
        "{%- if m.thinking and loop.last %}"
        "{{- '<|open|>assistant<|part|>thought\\n' + m.thinking + '<|end|>' }}{%- endif %}"
        "{{- '<|open|>assistant<|part|>final\\n' + m.content + ('<|done|>' if loop.last else '<|end|>') }}"
        "{%- else %}{{ '<|open|>' + m.role + '\\n' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|open|>assistant' }}{%- endif %}",
        ["<|open|>", "<|part|>", "<|end|>", "<|done|>"],
    ),
}  # fmt: skip


def tokenizer(name: str) -> Any:
    template, control = TRAITS[name]
    backend = families.byte_level("traits")
    backend.add_special_tokens(["<eos>", *control[1::2]])
    backend.add_tokens(control[::2])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=template)


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "which"},
                "days": {"type": "integer", "description": "n"},
            },
            "required": ["city"],
        },
    },
}


def chat(*turns: Message, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation("rows.jsonl", 1, turns, tools)


def user(text: str) -> Message:
    return Message("user", text)


def answer(text: str, reasoning: str | None = None) -> Message:
    return Message("assistant", text, reasoning)


def call(city: str, id: str | None, *, text: str = "", reasoning: str | None = None) -> Message:
    function = {"name": "get_weather", "arguments": {"city": city, "days": 2}}
    call: dict[str, Any] = {"type": "function", "function": function}
    return Message("assistant", text, reasoning, ({**call, "id": id} if id else call,))


def result(text: str, id: str | None) -> Message:
    return Message("tool", text, call_id=id)


_two = Message("assistant", "", None, (*call("Paris", "call_1").tool_calls, *call("Rome", "call_2").tool_calls))
_sky, _sunny = '{"sky": "sunny"}', answer("It is sunny.")

# kind of conversation -> example
KINDS = {
    "plain": chat(user("What is it?"), answer("A stone.")),
    "system": chat(Message("system", "Be brief."), user("Hello there"), answer("Hi."), user("Rain?"), answer("No.")),
    "several turns": chat(user("Hello there"), answer("Hi."), user("And now?"), answer("It rains.")),
    "reasoning": chat(user("Why?"), answer("Because.", "I should think."), user("So?"), answer("Thus.", "Once more.")),
    "some reasoning": chat(user("Why?"), answer("Because.", "I should think."), user("So?"), answer("Thus.")),
    "tools": chat(user("Paris?"), call("Paris", "call_1234567"), result(_sky, "call_1234567"), _sunny, tools=(TOOL,)),
    "no ids": chat(user("Paris?"), call("Paris", None), result(_sky, None), _sunny, tools=(TOOL,)),
    "two calls": chat(
        user("Paris, Rome?"), _two, result("9 degrees", "call_1"), result("11 degrees", "call_2"),
        answer("Grey, blue."), tools=(TOOL,),
    ),
    "text and call": chat(user("Paris?"), call("Paris", "call_1", text="I look."), result(_sky, "call_1"), _sunny,
                          tools=(TOOL,)),
    "reasoning and call": chat(
        user("Paris?"), call("Paris", "call_1", reasoning="Look it up."), result(_sky, "call_1"),
        answer("It is sunny.", "Now I know."), tools=(TOOL,),
    ),
}  # fmt: skip
