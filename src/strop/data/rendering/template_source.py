"""Find the text of a chat template, write options and the date into it, check it, and render it within limits.

An option written into the text becomes the template's default, which requests may override. It is then part of the
template's hash, and of every copy of the template: the adapter's tokenizer, a GGUF file, vLLM and `strop serve`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from transformers.utils import chat_template_utils

from strop.errors import ModelError, suggest

# ChatML, with tools and calls in the format of Hermes and Qwen, and reasoning in every turn
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

DATE_OPTION = "strftime_now"  # template option for the date; in a template, a function that returns it
DEFAULT_DAY = date(2026, 1, 1)  # date to write into a template if data.template_options does not set one
_FIXED_DAY = re.compile(rf'{{%- macro {DATE_OPTION}\(form, day="([0-9-]+)"\) -%}}.*?{{%- endmacro %}}\n')
_STANDARD_VARIABLES = {"messages", "tools", "add_generation_prompt", "continue_final_message"}


def adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def missing_template_error() -> ModelError:
    return ModelError(
        "the model has no chat template: it is a base model, which was not trained to answer",
        fix="train it with --data.template chatml or a Jinja file, or on rows of plain text (docs/base_models.md)",
    )


def template_source(tokenizer: Any, choice: str | None) -> str | None:
    """Return the template `choice` (chatml, or a file), by default the tokenizer's template if it has one.

    Raises ModelError for an unknown choice.
    """
    if choice == "chatml":
        stop = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        if stop is None:
            what = "the tokenizer has neither <|im_end|> nor an eos token"
            raise ModelError(what, fix="choose another data.template")
        start = "{{ bos_token }}" if adds_bos(tokenizer) else ""
        return CHATML.replace("BOS", start).replace("STOP", stop)
    if choice is not None:
        path = Path(choice).expanduser()
        if not path.is_file():
            what = f"data.template: no such template or file: {choice}{suggest(choice, ['chatml'])}"
            raise ModelError(what, fix="give chatml, or the path of a Jinja file")
        return path.read_text(encoding="utf-8")
    template = tokenizer.chat_template
    return (template.get("default") if isinstance(template, dict) else template) or None


def read_variables(tree: nodes.Template) -> frozenset[str]:
    """Return the variables that a template reads and a caller may set, such as `enable_thinking`."""
    undeclared = meta.find_undeclared_variables(tree)
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    with_default = {
        test.node.name
        for test in tree.find_all((nodes.Test, nodes.Filter))
        if isinstance(test.node, nodes.Name) and test.name in ("defined", "undefined", "default", "d")
    }
    options = {name for name in undeclared if name not in assigned or name in with_default} - _STANDARD_VARIABLES
    options = {name for name in options if not name.endswith("_token")}  # bos_token, ... are set from the tokenizer
    return frozenset(options | ({DATE_OPTION} if day_formats(tree) else set()))


def compared_values(tree: nodes.Template, name: str) -> list[Any]:
    """Return the constants that a template compares a variable with, in order."""
    values: list[Any] = []
    for comparison in tree.find_all(nodes.Compare):
        if any(variable.name == name for variable in comparison.find_all(nodes.Name)):
            values += [constant.value for constant in comparison.find_all(nodes.Const)]
    return list(dict.fromkeys(value for value in values if isinstance(value, (str, bool))))


def day_formats(tree: nodes.Template) -> list[str]:
    """Return the formats in which a template writes the date."""
    calls = [call for call in tree.find_all(nodes.Call) if getattr(call.node, "name", "") == DATE_OPTION and call.args]
    return sorted({call.args[0].value for call in calls if isinstance(call.args[0], nodes.Const)})


def fixed_day(source: str) -> str | None:
    """Return the date that `write_options` wrote into a template, or None."""
    return match[1] if (match := _FIXED_DAY.search(source)) else None


def check_options(options: Mapping[str, Any], variables: frozenset[str], source: str) -> None:
    """Raise ModelError for an option that is not a variable of the template. source: where the options were given."""
    for name in options:
        if name not in variables:
            known = ", ".join(sorted(variables)) or "no option"
            what = f"{source}: the chat template reads no {name}{suggest(name, sorted(variables))}"
            raise ModelError(what, fix=f"leave {name} out: the template reads {known}")


def write_options(source: str, options: Mapping[str, Any], formats: list[str]) -> str:
    """Return the template with the options as defaults and, if it has date `formats`, a fixed date.

    Options that are already written are not written again. Raises ModelError for an invalid date.
    """
    settings = {name: jinja_literal(value) for name, value in options.items() if name != DATE_OPTION}
    lines = [f"{{%- set {name} = {name} | default({value}) %}}\n" for name, value in settings.items()]
    if formats and (DATE_OPTION in options or not fixed_day(source)):
        requested = options.get(DATE_OPTION, DEFAULT_DAY)
        try:
            day = date.fromisoformat(str(requested))
        except ValueError:
            what = f"data.template_options: {DATE_OPTION}: {requested} is not a date"
            raise ModelError(what, fix="write it as 2026-01-31") from None
        days = jinja_literal({form: day.strftime(form) for form in formats})
        head = f'{{%- macro {DATE_OPTION}(form, day="{day}") -%}}'
        source = _FIXED_DAY.sub("", source)
        lines.insert(0, f"{head}{{{{- {days}[form] -}}}}{{%- endmacro %}}\n")
    # templates are compiled with trim_blocks, so the line break after a block is not rendered
    return "".join(line for line in lines if line not in source) + source


def jinja_literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(jinja_literal, value))}]"
    if isinstance(value, Mapping):
        items = (f"{jinja_literal(str(key))}: {jinja_literal(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    return repr(value)


# A template may contain hidden instructions (arXiv:2602.04653).

_FIELD_NAMES = {"content", "role", "system", "user", "assistant", "tool", "type", "text", "reasoning_content"}
_STRING_TESTS = {"startswith", "endswith", "find", "index", "count"}


def lint_template(tree: nodes.Template, source: str) -> list[str]:
    """Return warnings about web addresses, tests of message texts, and the current date in a template."""
    warnings = []
    if urls := sorted(set(re.findall(r"https?://[^\s'\"{}]+", source))):
        warnings.append(f"the chat template contains web addresses: {', '.join(urls[:3])}")
    tested = sorted(
        {
            repr(constant.value)
            for test in tree.find_all((nodes.Compare, nodes.Call))
            if _reads_content(test)
            for constant in test.find_all(nodes.Const)
            if isinstance(constant.value, str) and constant.value.strip() and constant.value not in _FIELD_NAMES
        }
    )
    if tested:
        warnings.append(f"the chat template tests the text of messages for {', '.join(tested[:5])}")
    if DATE_OPTION in source and f"macro {DATE_OPTION}" not in source:  # the macro of write_options fixes the date
        warnings.append("the chat template writes today's date: the prompt changes from day to day")
    return warnings


def _reads_content(test: nodes.Node) -> bool:
    """Return whether a comparison, or a call such as content.startswith(...), reads the text of a message."""
    if isinstance(test, nodes.Call) and not (isinstance(test.node, nodes.Getattr) and test.node.attr in _STRING_TESTS):
        return False
    names = [name.name for name in test.find_all(nodes.Name)]
    names += [item.attr for item in test.find_all(nodes.Getattr)]
    names += [item.arg.value for item in test.find_all(nodes.Getitem) if isinstance(item.arg, nodes.Const)]
    return "content" in names


# Templates come from model files. The sandbox of transformers protects the machine, but allows endless loops.

MAX_CHARS = 100_000_000  # characters of a rendered conversation
MAX_ITERATIONS = 10_000_000  # total iterations of all loops in rendering a conversation
CALL_COST = 10  # a call counts as this number of iterations
MAX_BITS = 10_000  # bits of the result of a power

# Errors that a template may raise for an input that it does not support
TEMPLATE_ERRORS: tuple[type[Exception], ...] = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError, MemoryError),
)


class BoundedTemplate:
    """A chat template compiled like in transformers, with limits on its output and its loops.

    The constructor raises jinja2.TemplateError for an invalid template, and `render` raises TEMPLATE_ERRORS.
    """

    def __init__(self, source: str) -> None:
        # The limits are set in the environment of an empty template before the source is compiled, because compiling
        # evaluates constants such as 'x' * 10**10.
        self.environment: Any = copy.copy(chat_template_utils._compile_jinja_template("").environment)
        filters = {"strop_counted": self._count_iterations, "strop_joined": _join}
        self.environment.filters = {**self.environment.filters, **filters}
        self._iterations = 0
        self._call, self._binary = self.environment.call, self.environment.call_binop
        self.environment.call = self._counted_call
        self.environment.intercepted_binops = frozenset({"*", "**", "+"})
        self.environment.call_binop = self._bounded_binary
        tree = self.environment.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "strop_counted", [], [], None, None, lineno=loop.lineno)
        for concat in list(tree.find_all(nodes.Concat)):  # a ~ b, which could double a text repeatedly
            parts = nodes.List(concat.nodes, lineno=concat.lineno)
            concat.nodes = [nodes.Filter(parts, "strop_joined", [], [], None, None, lineno=concat.lineno)]
        tree.set_environment(self.environment)
        self._template = self.environment.from_string(tree)

    def render(self, **variables: Any) -> str:
        self._iterations = 0
        parts, size = [], 0
        for part in self._template.generate(**variables):
            parts.append(part)
            size += len(part)
            if size > MAX_CHARS:
                raise jinja2.TemplateRuntimeError(f"more than {MAX_CHARS} characters")
        return "".join(parts)

    def _count(self, iterations: int = 1) -> None:
        self._iterations += iterations
        if self._iterations > MAX_ITERATIONS:
            raise jinja2.TemplateRuntimeError(f"more than {MAX_ITERATIONS} iterations of its loops")

    def _count_iterations(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._count()
            yield value

    def _counted_call(self, *arguments: Any, **named: Any) -> Any:
        self._count(CALL_COST)
        return self._call(*arguments, **named)

    def _bounded_binary(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_size(len(left) + len(right))
        for sequence, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(times, int) and hasattr(sequence, "__len__"):
                _check_size(len(sequence) * times)
        is_power = operator == "**" and isinstance(left, int) and isinstance(right, int)
        if is_power and left.bit_length() * right > MAX_BITS:
            raise jinja2.TemplateRuntimeError(f"a number of more than {MAX_BITS} bits")
        return self._binary(context, operator, left, right)


def _join(values: Iterable[Any]) -> str:
    """Join values like the Jinja operator ~, up to MAX_CHARS."""
    parts = [str(value) for value in values]
    _check_size(sum(map(len, parts)))
    return "".join(parts)


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise jinja2.TemplateRuntimeError(f"a text of more than {MAX_CHARS} characters")
