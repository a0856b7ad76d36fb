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
