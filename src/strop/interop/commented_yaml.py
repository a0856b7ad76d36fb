"""YAML with comments: PyYAML writes the values, the comments go in front of the keys they are about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


class Text(str):
    """Written as a block of lines, where YAML can."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)  # lists stand inside their key


def _represented(dumper: _Dumper, value: str) -> Any:
    """YAML 1.1 reads three more characters as ends of a line; PyYAML keeps them apart between double quotes alone."""
    breaks = any(mark in value for mark in "\x85\u2028\u2029")
    style = '"' if breaks else "|" if isinstance(value, Text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style=style)


_Dumper.add_representer(str, _represented)
_Dumper.add_representer(Text, _represented)


def document(tree: Mapping[str, Any], comments: Mapping[tuple[str, ...], str]) -> str:
    """One YAML document. comments: by the path of keys (and of places in lists, as text) that they stand above.

    Raises KeyError for a comment about a key that is not there.
    """
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    lines, places = text.removesuffix("\n").split("\n"), dict(_places(yaml.compose(text, Loader=yaml.SafeLoader), ()))
    for path in sorted(comments, key=lambda path: places[path], reverse=True):
        line, column = places[path]
        lines[line:line] = [f"{' ' * column}# {said}" for said in comments[path].splitlines()]
    return "\n".join(lines) + "\n"


def _places(node: Any, path: tuple[str, ...]) -> Any:
    """(path, (line, column)) of every key."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            yield inner, (key.start_mark.line, key.start_mark.column)
            yield from _places(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _places(value, (*path, str(number)))
