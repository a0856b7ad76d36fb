"""Texts that no template tests for, rendered with one: which forms of tools, calls and reasoning it takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from strop.data.rendering.options import DAY, values_tested
from strop.data.rendering.sandbox import BoundedTemplate
from strop.data.rendering.tool_format import Dialect
from strop.data.row_errors import TEMPLATE_FAULTS
from strop.data.types import Message

USER, ANSWER, SYSTEM, TOOL = "Qzuserq", "Qzanswerq", "Qzsystemq", "qztoolq"
NEXT, THOUGHT, VALUE, OTHER = "Qznextq", "Qzthoughtq", "qzvalueq", "qzotherq"

_SWITCH = re.compile("think|reason|thought")  # names of options that may turn reasoning on and off
_REPR = re.compile(r"""["']type["']: ["'](thinking|thoughts)["']""")  # parts written as data: not what they are for

ASKED, LATER = Message("user", USER), Message("user", NEXT)
ANSWERED, THINKING = Message("assistant", ANSWER), Message("assistant", ANSWER, reasoning=THOUGHT)
RESULT = Message("tool", NEXT, name=TOOL, call_id="abcdefghi")
SCHEMA = {
    "type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"],
}  # fmt: skip
TOOL_SHOWN = {"type": "function", "function": {"name": TOOL, "description": "x", "parameters": SCHEMA}}


def a_call(value: str = VALUE, id: str | None = "abcdefghi") -> dict[str, Any]:
    call = {"type": "function", "function": {"name": TOOL, "arguments": {"x": value, "y": True}}}
    return call if id is None else {"id": id, **call}


def two_calls() -> Message:
    return Message("assistant", "", tool_calls=(a_call(), a_call(OTHER, "abcdefghj")))


class Probes:
    """Renders probes with one template. `dialect`: the forms that it takes, once they are found.

    added: the tokenizer's added tokens; fixed: options that the user has given, which are no switches.
    """

    def __init__(
        self, jinja: BoundedTemplate, source: str, read: frozenset[str], variables: Mapping[str, Any],
        added: Sequence[str], fixed: frozenset[str],
    ) -> None:  # fmt: skip
        self._jinja, self.source, self.variables = jinja, source, variables
        self._added = [token for token in added if not token.isspace()]
        self._read = read
        self._tree = jinja.environment.parse(source)
        self._fixed = fixed
        self.dialect = Dialect()

    # --- rendering ---------------------------------------------------------------------------------------------------

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] = (), generation: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        values = self.dialect.values(messages, reasoning=True)
        variables = {**self.variables, **self.dialect.variables(tools), **(options or {})}
        return self._jinja.render(messages=values, add_generation_prompt=generation, **variables)

    def shown(
        self, messages: Sequence[Message], text: str, options: Mapping[str, Any] | None = None,
        *, tools: Sequence[Any] = (), generation: bool = False,
    ) -> str:  # fmt: skip
        """The rendered messages where `text` is in them, else ''."""
        try:
            rendered = self.render(messages, tools=tools, generation=generation, options=options)
        except TEMPLATE_FAULTS:
            return ""
        return rendered if text in rendered else ""

    def tokens(self, text: str) -> list[tuple[int, int, str]]:
        """The added tokens in a text: start, end, token."""
        found = sorted((token for token in self._added if token in text), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, found)) or "(?!)")
        return [(match.start(), match.end(), match[0]) for match in pattern.finditer(text)]

    # --- the forms in which the template takes what it is given ----------------------------------------------------

    def plain_dialect(self) -> Dialect:
        """With what stands for `no tools`, and with the variables that the template cannot do without."""
        given: dict[str, Any] = {}
        while True:
            fault: Exception | None = None
            no_tools: Any
            for no_tools in (None, []):
                self.dialect = Dialect(no_tools=no_tools, given=dict(given))
                try:
                    self.render([ASKED, ANSWERED])
                    return self.dialect
                except TEMPLATE_FAULTS as error:
                    fault = fault or error
            assert fault is not None
            missing = re.match(r"'(\w+)' is undefined", str(fault))  # as Jinja says it
            if missing is None or missing[1] in given or missing[1] not in self._read:
                raise fault
            name = missing[1]
            given[name] = f"{DAY:%Y-%m-%d}" if "date" in name else "[]" if _of_tools(name) else ""

    def find_tools(self) -> bool:
        """Takes on the name, and the form, in which tools are shown; are they in any?"""
        plain = self.dialect
        for name in ["tools", *sorted(name for name in self._read if _of_tools(name))]:
            for as_text in (False, True):
                self.dialect = replace(plain, tools=name, tools_as_text=as_text)
                if self.shown([ASKED], TOOL, tools=[TOOL_SHOWN]):
                    return True
        self.dialect = plain
        return False

    def find_calls(self) -> bool:
        """Takes on the forms of ids and arguments; are calls shown in any?"""
        plain = self.dialect
        for ids in ("own", "made", "nine"):
            good: list[tuple[bool, Dialect]] = []
            for arguments in ("object", "text"):
                self.dialect = replace(plain, ids=ids, arguments=arguments)
                text = self._whole_exchange(ids)
                if text:
                    called = text[: text.rindex(VALUE) + len(VALUE) + 20]
                    badly = r"\"x\"" in called or "{'x'" in called  # JSON within JSON; Python's way to write an object
                    good.append((badly, self.dialect))
            if good:
                self.dialect = min(good, key=lambda one: one[0])[1]
                return True
        self.dialect = plain
        return False

    def call_fault(self) -> str:
        """What the template says to a call, where it refuses it."""
        try:
            self.render([ASKED, Message("assistant", "", tool_calls=(a_call(),))])
        except TEMPLATE_FAULTS as fault:
            return str(fault)
        return ""

    def _whole_exchange(self, ids: str) -> str:
        """A call, its result and an answer, where ids of this form are taken: '' where they are not."""
        forms = {"own": (None, "call_0123456789"), "made": ("call_0123456789", None), "nine": ("abcdefghi",)}[ids]
        text = ""
        for id in forms:
            result = Message("tool", NEXT, name=TOOL, call_id=id)
            said = [ASKED, Message("assistant", "", tool_calls=(a_call(id=id),))]
            text = self.shown([*said, result, ANSWERED], VALUE) or self.shown(said, VALUE)
            if not text or (ids != "nine" and not self.shown([*said, result], NEXT) and self._takes_results()):
                return ""
        return text

    def _takes_results(self) -> bool:
        """Is there any form of id with which a result is shown? Where there is none, that decides nothing."""
        said = [ASKED, Message("assistant", "", tool_calls=(a_call(),))]
        before, self.dialect = self.dialect, replace(self.dialect, ids="nine")
        shown = bool(self.shown([*said, RESULT], NEXT))
        self.dialect = before
        return shown

    def find_reasoning(self) -> bool:
        """Takes on the form in which reasoning is shown; is it in any?"""
        plain = self.dialect
        for form in ("fields", "parts", "blocks"):
            self.dialect = replace(plain, reasoning=form)
            for options in self.switches():
                text = self.shown([ASKED, THINKING], THOUGHT, options)
                if text.count(THOUGHT) == 1 and text.count(ANSWER) == 1 and not _REPR.search(text):
                    return True
        self.dialect = plain
        return False

    def switches(self) -> Iterator[dict[str, Any]]:
        """Options that may turn reasoning on or off, the template's own default first."""
        yield {}
        for name in sorted(self._read - self._fixed):
            if _SWITCH.search(name):
                for value in dict.fromkeys([True, False, *values_tested(self._tree, name)]):
                    yield {name: value}


def _of_tools(name: str) -> bool:
    return "tool" in name or "function" in name
