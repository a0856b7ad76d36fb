"""What a chat template does, found by rendering: where turns end, where reasoning goes. No family is known by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from strop.data.rendering.prober import (
    ANSWER,
    ANSWERED,
    ASKED,
    LATER,
    NEXT,
    OTHER,
    RESULT,
    SYSTEM,
    THINKING,
    THOUGHT,
    TOOL,
    USER,
    VALUE,
    Probes,
    a_call,
    two_calls,
)
from strop.data.rendering.traits import Ending, Join, Mode, Traits
from strop.data.types import Message

_BLOCK = re.compile(r"<([^<>/]*(?:think|thought|reason)[^<>/]*)>\s*$", re.IGNORECASE)  # an opened one at the end


class Prober(Probes):
    """Reads the traits of a template off its probes."""

    def traits(self) -> Traits | None:
        """None where the template shows no assistant turn, or ends it with nothing. Raises TEMPLATE_FAULTS."""
        self.dialect = self.plain_dialect()
        ended = self.render([ASKED, ANSWERED])
        if ANSWER not in ended:
            return None
        tools = self.find_tools()
        calls = self.find_calls()
        self.find_reasoning()
        beside = [ASKED, replace(THINKING, content="", tool_calls=(a_call(),))]
        switches = list(self.switches())
        shown = [text for options in switches if (text := self.shown(beside, THOUGHT, options))]
        self._leads = list(dict.fromkeys(self._find_leads(switches)))
        self._inner_tokens = self._inner(switches, calls)
        self._calls = calls
        default, state = self._joins({}, ANSWERED)
        bare = self._mode({}, tuple(join for join in default if join.by_place))
        if bare is None:
            return None
        texts = (
            ended, self.shown([ASKED, ANSWERED, LATER], NEXT), self.shown([Message("system", SYSTEM), ASKED], USER),
        )  # fmt: skip
        return Traits(
            dialect=self.dialect,
            opening=self.render([ASKED], generation=True),
            texts=texts,
            system=bool(self.shown([Message("system", SYSTEM), ASKED], SYSTEM, generation=True)),
            tools=tools,
            calls=calls,
            call_fault="" if calls else self.call_fault(),
            parallel=calls and bool(self.shown([ASKED, two_calls()], OTHER)),
            reasoning=bool(self._leads),
            reasoning_beside_calls=bool(shown),
            closes=tuple(dict.fromkeys(close for _, close in self._leads)),
            marks=tuple(dict.fromkeys(self._marks())),
            needs_empty=state in ("opened", "closed"),
            bare=bare,
            empty=self._empty(switches, replace(bare, plain=default), state),
            thinking=self._thinking(switches, replace(bare, plain=default)),
        )

    # --- where turns end ---------------------------------------------------------------------------------------------

    def _inner(self, switches: Sequence[dict[str, Any]], calls: bool) -> set[str]:
        """Tokens that the template writes within an assistant turn, after reasoning and between calls: no ends."""
        inner: set[str] = set()
        for options in switches:
            text = self.shown([ASKED, THINKING], THOUGHT, options)
            if text.count(THOUGHT) == 1 and text.count(ANSWER) == 1 and text.index(THOUGHT) < text.index(ANSWER):
                inner |= {token for *_, token in self.tokens(text[text.index(THOUGHT) : text.index(ANSWER)])}
        text = self.shown([ASKED, two_calls()], OTHER) if calls else ""
        said = [ASKED, Message("assistant", "", tool_calls=(a_call(),))]
        prompt, called = self.shown([ASKED], USER, generation=True), self.shown(said, VALUE)
        if calls and called.startswith(prompt):
            inner |= {token for *_, token in self.tokens(called[len(prompt) : called.rindex(VALUE)])}
        if VALUE in text:
            inner |= {token for *_, token in self.tokens(text[text.rindex(VALUE) : text.rindex(OTHER)])}
        return inner

    def _ending(
        self, said: list[Message], mark: str, later: Message, options: dict[str, Any], usual: Ending | None = None
    ) -> Ending | None:
        """How the last turn of `said` ends, whose text ends with `mark`, and which `later` follows; usual: how others
        end."""
        inner = self._inner_tokens
        alone, followed = self.shown(said, mark, options), self.shown([*said, later], NEXT, options)
        if not alone:
            return None
        tail, follow = alone[alone.rindex(mark) + len(mark) :], ""
        end = followed.rfind(NEXT)
        if mark in followed[: max(end, 0)]:
            follow = followed[followed.rindex(mark, 0, end) + len(mark) : end]
            ends = self._ends(alone, tail, follow)
            if ends:
                start, _, stop = ends[-1]
                return Ending(tail[start:], stop, stop, "written")
        for text in (tail, follow):
            first = next((place for place in self.tokens(text) if place[2] not in inner), None)
            if first is None:
                continue
            start, end, stop = first
            if usual is not None and usual.stop != stop == self._opener(alone):
                return replace(usual, cut=text[start:], add=usual.stop)
            if text is tail:
                return Ending(tail[start:], stop, stop, "written")
            how = "role" if alone.partition(USER)[0].rstrip().endswith(stop) else "later"
            rest = follow[len(tail) : end] if follow.startswith(tail) else follow[:end]
            return Ending("" if follow.startswith(tail) else tail, rest, stop, how)
        eos = self.variables.get("eos_token")
        asks = self.shown([ASKED], USER, generation=True) != self.shown([ASKED], USER)
        return Ending("", str(eos), str(eos), "eos") if eos and asks else None

    def _ends(self, alone: str, tail: str, follow: str) -> list[tuple[int, int, str]]:
        """The tokens that end a turn, whatever follows it; not those that open the next, as some templates do."""
        opener = self._opener(alone)
        shared = _alike(tail, follow)
        found = []
        for place in self.tokens(tail):
            if place[1] > shared or place[2] == opener:
                break
            if place[2] not in self._inner_tokens:
                found.append(place)
        return found

    def _opener(self, text: str) -> str:
        bos = self.variables.get("bos_token")
        return next((token for *_, token in self.tokens(text) if token != bos), "")

    # --- reasoning ---------------------------------------------------------------------------------------------------

    def _find_leads(self, switches: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        for options in switches:
            for said, mark in self._contexts():
                text = self.shown([*said, THINKING], THOUGHT, options)
                at = text.find(THOUGHT)
                if text.count(THOUGHT) == 1 and ANSWER in text[at:] and mark in text[:at]:
                    begin = text.rindex(mark, 0, at) + len(mark)
                    yield text[begin:at], text[at + len(THOUGHT) : text.index(ANSWER, at)]

    def _marks(self) -> Iterator[tuple[str, str]]:
        for lead, close in self._leads:
            found = re.search(r"([<\[])([^<>\[\]/]+)([>\]])\s*$", lead)
            if found and close.lstrip().startswith(end := f"{found[1]}/{found[2]}{found[3]}"):
                yield found[0].rstrip(), end

    def _contexts(self) -> list[tuple[list[Message], str]]:
        """What an assistant turn may follow, and the last text in it."""
        return [([ASKED], USER), ([ASKED, Message("assistant", "", tool_calls=(a_call(),)), RESULT], NEXT)]

    def _joins(self, options: dict[str, Any], last: Message) -> tuple[tuple[Join, ...], str]:
        """The joins of turns like `last` with these options, and how its prompt goes with the training text after a
        user's turn: whole (a prefix, and nothing is open), closed, opened (a block of reasoning), apart."""
        joins: dict[Join, None] = {}
        states = []
        header = ""
        call = replace(last, content="", tool_calls=(a_call(),))
        for said, mark in self._contexts():
            prompt = self.shown(said, mark, options, generation=True)
            for turn, first in ((last, ANSWER), (call, TOOL)):
                first = THOUGHT if turn.reasoning else first
                text = self.shown([*said, turn], first, options)
                if not prompt or not text or text.rfind(mark) < 0 or first not in text[text.rindex(mark) :]:
                    continue
                begin = text.rindex(mark) + len(mark)
                written = text[begin : text.index(first, begin)]
                if mark not in prompt:
                    continue
                asked = prompt[prompt.rindex(mark) + len(mark) :]
                join, state = self._join(asked, written, bool(turn.reasoning), header)
                states.append(state)
                if join is not None:
                    joins[join] = None
            if states[:1] == ["whole"]:
                header = header or prompt[prompt.rfind(mark) + len(mark) :]
        ordered = sorted(joins, key=lambda join: -len(join.prompt + join.drop))
        return tuple(ordered), states[0] if states else "apart"

    def _join(self, prompt: str, written: str, reasons: bool, header: str) -> tuple[Join | None, str]:
        """prompt, written: what comes after the last text in the prompt, and in the training text before the answer;
        header: the former after a user's turn, where this is another ('' where it is that).
        """
        head = self._shared(prompt, written)
        rest, more = written[len(head) :], prompt[len(head) :]
        if reasons:
            if not more:
                return None, "whole"
            if (at := rest.find(more)) > 0:
                return Join(prompt, head, rest[: at + len(more)], "", by_place=True), "whole"
            if header.endswith(more) and more != header:
                return Join(prompt, head, "", "", by_place=True), "whole"
            return (Join(prompt, head, "", ""), "opened") if not rest else (None, "apart")
        close = self._left_open(prompt, written)
        if close is None:
            if not more:
                return None, "whole"
            if rest.endswith(more):  # written otherwise once an answer follows
                return Join(prompt, head, rest, "", by_place=True), "whole"
            if header.endswith(more) and not rest:  # the template goes on with the turn, and asks for a new one
                return Join(prompt, head, "", "", by_place=True), "whole"
            marks = len(self.tokens(more)) or len(re.findall(r"<[^<>]+>", more))
            if "</" not in more and marks < 2:  # text of which nothing tells what it is
                return None, "apart"
            return Join(prompt, head, rest if more.endswith(rest) else "", ""), "closed"
        mark = close.strip() if not (tokens := self.tokens(close)) else tokens[0][2]
        if not more and mark in rest:
            return None, "opened"
        if rest and close.endswith(rest):
            return Join(prompt, head, "", close.removesuffix(rest)), "opened"
        return Join(prompt, head, rest if mark in rest else "", close), "opened"

    def _shared(self, prompt: str, written: str) -> str:
        """The beginning that two texts share, up to where a token of either is cut."""
        end = _alike(prompt, written)
        for text in (prompt, written):
            end = min([end, *(start for start, stop, _ in self.tokens(text) if start < end < stop)])
        return prompt[:end]

    def _left_open(self, prompt: str, written: str) -> str | None:
        """What closes the block of reasoning that a prompt opens; None where it opens none."""
        for lead, close in self._leads:
            mark = close.strip() if not (tokens := self.tokens(close)) else tokens[0][2]
            if prompt.startswith(lead) and mark not in prompt[len(lead) :] and not prompt == lead == written:
                return close
            if prompt == lead.rstrip() and prompt != written:
                return lead[len(prompt) :] + close
        found = _BLOCK.search(prompt)
        if found and f"</{found[1]}>" in self.source:
            return f"\n</{found[1]}>\n\n" if prompt.endswith("\n") else f"</{found[1]}>"
        return None

    def _mode(self, options: dict[str, Any], plain: tuple[Join, ...], thinking: tuple[Join, ...] = ()) -> Mode | None:
        """None where no ending is to be seen with these options."""
        ending = self._ending([ASKED, ANSWERED], ANSWER, LATER, options)
        if ending is None:
            return None
        call_ending = None
        if self._calls:
            said = [ASKED, Message("assistant", "", tool_calls=(a_call(),))]
            call_ending = self._ending(said, VALUE, RESULT, options, ending)
        return Mode(options, ending, call_ending, plain, thinking)

    def _empty(self, switches: Sequence[dict[str, Any]], default: Mode, state: str) -> Mode:
        """Of rows without reasoning: a switch that writes an empty block into the prompt, else the default's joins."""
        prompt = self.shown([ASKED], USER, generation=True)
        own = prompt[prompt.rfind(USER) :]
        if state != "closed":
            for options in switches[1:]:
                other = self.shown([ASKED], USER, options, generation=True)
                joins, found = self._joins(options, ANSWERED)
                if other and other[other.rfind(USER) :] != own and found in ("whole", "closed"):
                    return self._mode(options, joins) or default
        return default

    def _thinking(self, switches: Sequence[dict[str, Any]], default: Mode) -> Mode:
        for wanted in ("whole", "opened"):
            for options in switches:
                joins, state = self._joins(options, THINKING)
                if state == wanted and (mode := self._mode(options, self._joins(options, ANSWERED)[0], joins)):
                    return mode
        return default


def _alike(left: str, right: str) -> int:
    """The number of characters with which both begin."""
    differ = (i for i, (one, other) in enumerate(zip(left, right, strict=False)) if one != other)
    return next(differ, min(len(left), len(right)))


# ---- from strop.data.rendering.probes ----
"""Texts that no template tests for, rendered with one: which forms of tools, calls and reasoning it takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from strop.data.rendering.sandbox import BoundedTemplate
from strop.data.rendering.template_source import DAY, values_tested
from strop.data.rendering.traits import Dialect
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
