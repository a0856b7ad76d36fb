"""Render chat templates with bounded time and memory.

Templates come from model files. transformers' sandbox protects the machine from them, but allows endless loops.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from transformers.utils import chat_template_utils

MAX_CHARS = 100_000_000  # of one rendered conversation
MAX_ITERATIONS = 10_000_000  # of all loops together while one conversation is rendered
CALL_COST = 10  # iterations that a call counts as
MAX_BITS = 10_000  # of a power

# What a template may raise for an input that it was not written for.
TEMPLATE_ERRORS: tuple[type[Exception], ...] = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


class BoundedTemplate:
    """A template, compiled as transformers compiles it.

    Raises jinja2.TemplateError if it does not compile, and TEMPLATE_ERRORS when it is rendered.
    """

    def __init__(self, source: str) -> None:
        # The environment of an empty template: compiling evaluates constants such as 'x' * 10**10, which must be
        # bounded too.
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
        for concat in list(tree.find_all(nodes.Concat)):  # a ~ b: repeated doubling would exhaust memory
            parts = nodes.List(concat.nodes, lineno=concat.lineno)
            concat.nodes = [nodes.Filter(parts, "strop_joined", [], [], None, None, lineno=concat.lineno)]
        tree.set_environment(self.environment)
        self._template = self.environment.from_string(tree)

    def render(self, **variables: Any) -> str:
        """Render the template. Raises jinja2.TemplateRuntimeError beyond MAX_CHARS or MAX_ITERATIONS."""
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
    """Join values like the operator ~ of Jinja."""
    parts = [str(value) for value in values]
    _check_size(sum(map(len, parts)))
    return "".join(parts)


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise jinja2.TemplateRuntimeError(f"a text of more than {MAX_CHARS} characters")
