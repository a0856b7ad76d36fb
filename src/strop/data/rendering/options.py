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
