"""Chat templates in the style of model families that call tools, and their tokenizers.

TOOL_TEMPLATES: name -> (family of tests.support.families, template or None for its own, further control tokens).
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from tests.support import families

_LLAMA3 = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' and loop.first and tools %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nUse these functions:\\n' }}
{%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}{{ m.content | trim + '<|eot_id|>' }}
{%- elif m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson + '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}
{%- else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

_MISTRAL = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{% if tools and loop.first %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
{{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}
{{- ', ' if not loop.last else '' }}{% endfor %}{{ ']' + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] ' + {'content': m.content, 'call_id': m.tool_call_id} | tojson + '[/TOOL_RESULTS]' }}
{%- else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"""

_NAMED = """{% if tools %}<|im_start|>tools
{{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.tool_calls %}<|calls|>{% for call in m.tool_calls %}<|call|>{{ call.function.name }}<|sep|>
{{ call.function.arguments | tojson }}<|called|>{% endfor %}<|end of calls|>{% else %}{{ m.content }}
{%- endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# writes a block of reasoning into the last turn only, as Qwen 3 does
_THINKING = families.QWEN3.replace("{{- m.content }}", (
    "{%- if m.role == 'assistant' and loop.last and not m.reasoning_content %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}{{- m.content }}"
))  # fmt: skip

_XML = families.QWEN3.replace("call.function | tojson", (
    "'<function=' + call.function.name + '>\\n' }}{% for key, value in call.function.arguments | items %}"
    "{{ '<parameter=' + key + '>\\n' }}"
    "{{ value | tojson if value is mapping or value is sequence and value is not string else value }}"
    "{{ '\\n</parameter>\\n' }}{% endfor %}{{ '</function>'"
))  # fmt: skip

_PAIRS = families.QWEN3.replace("call.function | tojson", (
    "call.function.name }}{% for key, value in call.function.arguments | items %}"
    "{{ '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' }}{{ value if value is string else value | tojson }}"
    "{{ '</arg_value>' }}{% endfor %}{{ ''"
))  # fmt: skip

_NOTATION = families.QWEN3.replace("call.function | tojson", (
    "'call:' + call.function.name + '{' }}{% for key, value in call.function.arguments | items %}"
    "{{ key + ':' + value | string + ',' }}{% endfor %}{{ '}'"
))  # fmt: skip

TOOL_TEMPLATES: dict[str, tuple[str, str | None, list[str]]] = {
    "qwen3": ("qwen3", None, []),
    "qwen3-thinking": ("qwen3", _THINKING, []),
    "llama3": ("llama3", _LLAMA3, []),
    "mistral": (
        "mistral",
        _MISTRAL,
        [
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ],
    ),
    "named": ("chatml", _NAMED, ["<|calls|>", "<|call|>", "<|sep|>", "<|called|>", "<|end of calls|>"]),
    "xml": ("qwen3", _XML, []),
    "pairs": ("qwen3", _PAIRS, []),
    "notation": ("qwen3", _NOTATION, []),
}


@cache
def tokenizer(name: str) -> Any:
    family, template, control = TOOL_TEMPLATES[name]
    copied = copy.deepcopy(families.tokenizer(family))
    if control:
        copied.add_special_tokens({"additional_special_tokens": control}, replace_extra_special_tokens=False)
    if template is not None:
        copied.chat_template = template
    return copied
