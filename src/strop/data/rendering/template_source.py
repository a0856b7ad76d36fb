"""The text of a chat template: the model's own, a named one or a file; and options and the date written into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from strop.errors import ModelError, nearest

# ChatML; tools and their calls as Hermes and Qwen write them; reasoning shown in every turn
CHATML = r"""BOS
{%- if tools %}
{{- '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- 'You can call these functions:\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
{{- '\n</tools>\nA call is written as <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>STOP\n' }}
{%- endif %}
{%- for message in (messages[1:] if tools and messages[0].role == 'system' else messages) %}
{%- if message.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- else %}{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '\n</tool_call>' }}
{%- endfor %}{% endif %}{{ 'STOP\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
NAMED = {"chatml": CHATML}


def adds_bos(tokenizer: Any) -> bool:
    """Does the tokenizer begin a plain text with its bos token?"""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def template_source(tokenizer: Any, choice: str | None) -> str | None:
    """The template to use: `choice` (chatml, or a file) or the tokenizer's own; None where there is none.

    Raises ModelError for a choice that is neither a name nor a file.
    """
    if choice in NAMED:
        stop = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        if stop is None:
            raise ModelError(
                "the tokenizer has neither <|im_end|> nor an eos token", fix="choose another data.template"
            )
        start = "{{ bos_token }}" if adds_bos(tokenizer) else ""
        return NAMED[choice].replace("BOS", start).replace("STOP", stop)
    if choice is not None:
        path = Path(choice).expanduser()
        if not path.is_file():
            raise ModelError(
                f"data.template: no such template or file: {choice}{nearest(choice, NAMED)}",
                fix=f"give {' or '.join(NAMED)}, or the path of a Jinja file",
            )
        return path.read_text(encoding="utf-8")
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return own or None


# ---- from strop.data.rendering.options ----
"""What a chat template can be told beside the messages: the names that it reads, and values written into its text.

A value that is written into the text is the template's own default from then on: the adapter's tokenizer, a GGUF file,
vLLM and `strop serve` all have it, the template's hash covers it, and a request may still say otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from typing import Any

from jinja2 import meta, nodes

from strop.errors import ModelError, nearest

CLOCK = "strftime_now"  # the function by which a template asks for the date
DAY = date(2026, 1, 1)  # what the clock says in training, unless data.template_options gives another day
_FIXED = re.compile(rf'{{%- macro {CLOCK}\(form, day="([0-9-]+)"\) -%}}.*?{{%- endmacro %}}\n')
_GIVEN = {"messages", "tools", "add_generation_prompt", "continue_final_message"}


def names_read(tree: nodes.Template) -> frozenset[str]:
    """The variables that a template reads, and that whoever renders it may give: `enable_thinking`, `date_string`."""
    free = meta.find_undeclared_variables(tree)
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    asked_for = {
        test.node.name
        for test in tree.find_all((nodes.Test, nodes.Filter))
        if isinstance(test.node, nodes.Name) and test.name in ("defined", "undefined", "default", "d")
    }
    own = {name for name in free if name not in assigned or name in asked_for} - _GIVEN
    own = {name for name in own if not name.endswith("_token")}  # bos_token, ...: the tokenizer's
    return frozenset(own | ({CLOCK} if day_formats(tree) else set()))


def values_tested(tree: nodes.Template, name: str) -> list[Any]:
    """The constants that a template compares a variable with, in its order."""
    found: list[Any] = []
    for test in tree.find_all(nodes.Compare):
        sides = [test.expr, *(operand.expr for operand in test.ops)]
        if any(isinstance(part, nodes.Name) and part.name == name for side in sides for part in _all_of(side)):
            found += [part.value for side in sides for part in _all_of(side) if isinstance(part, nodes.Const)]
    return list(dict.fromkeys(value for value in found if isinstance(value, (str, bool))))


def _all_of(side: nodes.Node) -> list[nodes.Node]:
    return [side, *side.find_all((nodes.Name, nodes.Const))]


def day_formats(tree: nodes.Template) -> list[str]:
    """The formats in which a template asks for the date."""
    calls = [(call.node, call.args[0]) for call in tree.find_all(nodes.Call) if call.args]
    asked = [form for node, form in calls if isinstance(node, nodes.Name) and node.name == CLOCK]
    return sorted({form.value for form in asked if isinstance(form, nodes.Const)})


def fixed_day(source: str) -> str | None:
    """The day that was written into a template in place of its clock."""
    found = _FIXED.search(source)
    return found[1] if found else None


def check_options(options: Mapping[str, Any], read: frozenset[str], where: str) -> None:
    """Raises ModelError for an option, given in `where`, that the template does not read."""
    for name in options:
        if name not in read:
            known = ", ".join(sorted(read)) or "no option at all"
            raise ModelError(
                f"{where}: the chat template reads no {name}{nearest(name, sorted(read))}",
                fix=f"it reads {known}",
            )


def with_options(source: str, options: Mapping[str, Any], formats: list[str]) -> str:
    """The template with these values as its defaults; formats: those of the date, which is fixed.

    What is written into it already stays, and is not written twice. Raises ModelError.
    """
    lines = [
        f"{{%- set {name} = {name} | default({literal(value)}) %}}\n"
        for name, value in options.items()
        if name != CLOCK
    ]
    if formats and (CLOCK in options or not fixed_day(source)):
        given = options.get(CLOCK, DAY)
        try:
            day = date.fromisoformat(str(given))
        except ValueError:
            raise ModelError(
                f"data.template_options: {CLOCK}: {given} is no day", fix="write it as 2026-01-31"
            ) from None
        days = ", ".join(f"{literal(form)}: {literal(day.strftime(form))}" for form in formats)
        head = f'{{%- macro {CLOCK}(form, day="{day}") -%}}'
        source = _FIXED.sub("", source)
        lines.insert(0, f"{head}{{{{- {{{days}}}[form] -}}}}{{%- endmacro %}}\n")
    # templates are compiled with trim_blocks: the line break behind a block is no text
    return "".join(line for line in lines if line not in source) + source


def literal(value: Any) -> str:
    """A value in Jinja's language."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{literal(str(key))}: {literal(inner)}' for key, inner in value.items())}}}"
    return repr(value)


# ---- from strop.data.template_lint ----
"""Signs of a chat template that does more than lay out messages (instructions hidden in one: arXiv:2602.04653)."""

from __future__ import annotations

import re

from jinja2 import nodes

_KEYS = {"content", "role", "system", "user", "assistant", "tool", "type", "text", "reasoning_content"}
_TESTS = {"startswith", "endswith", "find", "index", "count"}


def suspicions(tree: nodes.Template, source: str) -> list[str]:
    """Sentences on what is odd about a template: web addresses, tests of message text, the date."""
    found = []
    if urls := sorted(set(re.findall(r"https?://[^\s'\"{}]+", source))):
        found.append(f"the chat template holds web addresses: {', '.join(urls[:3])}")
    tested = sorted(
        {
            repr(constant.value)
            for test in tree.find_all((nodes.Compare, nodes.Call))
            if _reads_content(test)
            for constant in test.find_all(nodes.Const)
            if isinstance(constant.value, str) and constant.value.strip() and constant.value not in _KEYS
        }
    )
    if tested:
        found.append(f"the chat template tests the text of messages for {', '.join(tested[:5])}")
    if "strftime_now" in source and "macro strftime_now" not in source:  # which fixes it: rendering/options.py
        found.append("the chat template writes today's date: it asks otherwise from one day to the next")
    return found


def _reads_content(test: nodes.Node) -> bool:
    """Does this comparison, or call such as content.startswith(...), look into the text of a message?"""
    if isinstance(test, nodes.Call) and not (isinstance(test.node, nodes.Getattr) and test.node.attr in _TESTS):
        return False
    named = any(name.name == "content" for name in test.find_all(nodes.Name))
    attribute = any(item.attr == "content" for item in test.find_all(nodes.Getattr))
    keyed = any(
        isinstance(item.arg, nodes.Const) and item.arg.value == "content" for item in test.find_all(nodes.Getitem)
    )
    return named or attribute or keyed
