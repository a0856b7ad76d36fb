"""A chat template that cannot run for ever: its loops, its calls and its arithmetic are bounded.

Templates come from model files. transformers' sandbox keeps them from the machine, but lets them loop.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from transformers.utils import chat_template_utils

MAX_CHARS = 100_000_000  # of one rendered conversation; beyond it the template loops or the row is absurd
MAX_ROUNDS = 10_000_000  # of all loops together while one conversation is rendered
CALL = 10  # rounds that a call takes as long as
MAX_BITS = 10_000  # of a power


class BoundedTemplate:
    """The template `source`, compiled as transformers compiles it.

    Raises jinja2.TemplateError for one that does not compile, and what its expressions raise while it renders.
    """

    def __init__(self, source: str) -> None:
        # of an empty template: compiling computes constants, such as 'x' * 10**10, and these must be bounded too
        self.environment: Any = copy.copy(chat_template_utils._compile_jinja_template("").environment)
        self.environment.filters = {**self.environment.filters, "strop_rounds": self._counted, "strop_joined": _joined}
        self._rounds = 0
        self._call, self._binary = self.environment.call, self.environment.call_binop
        self.environment.call = self._counted_call
        self.environment.intercepted_binops = frozenset({"*", "**", "+"})
        self.environment.call_binop = self._bounded_binary
        tree = self.environment.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "strop_rounds", [], [], None, None, lineno=loop.lineno)
        for text in list(tree.find_all(nodes.Concat)):  # a ~ b: a text that is doubled again and again takes all memory
            parts = nodes.List(text.nodes, lineno=text.lineno)
            text.nodes = [nodes.Filter(parts, "strop_joined", [], [], None, None, lineno=text.lineno)]
        tree.set_environment(self.environment)
        self._template = self.environment.from_string(tree)

    def render(self, **variables: Any) -> str:
        """Raises jinja2.TemplateRuntimeError beyond MAX_CHARS or MAX_ROUNDS."""
        self._rounds = 0
        parts, size = [], 0
        for part in self._template.generate(**variables):
            parts.append(part)
            size += len(part)
            if size > MAX_CHARS:
                raise jinja2.TemplateRuntimeError(f"more than {MAX_CHARS} characters")
        return "".join(parts)

    def _count(self, rounds: int = 1) -> None:
        self._rounds += rounds
        if self._rounds > MAX_ROUNDS:
            raise jinja2.TemplateRuntimeError(f"more than {MAX_ROUNDS} rounds of its loops")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._count()
            yield value

    def _counted_call(self, *arguments: Any, **named: Any) -> Any:
        self._count(CALL)
        return self._call(*arguments, **named)

    def _bounded_binary(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_size(len(left) + len(right))
        for one, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(times, int) and hasattr(one, "__len__"):
                _check_size(len(one) * times)
        if (
            operator == "**"
            and isinstance(left, int)
            and isinstance(right, int)
            and left.bit_length() * right > MAX_BITS
        ):
            raise jinja2.TemplateRuntimeError(f"a number of more than {MAX_BITS} bits")
        return self._binary(context, operator, left, right)


def _joined(values: Iterable[Any]) -> str:
    """As jinja joins what stands around ~."""
    parts = [str(value) for value in values]
    _check_size(sum(map(len, parts)))
    return "".join(parts)


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise jinja2.TemplateRuntimeError(f"a text of more than {MAX_CHARS} characters")
