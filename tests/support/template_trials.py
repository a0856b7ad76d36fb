"""Whether a template renders a conversation right, and the table of docs/templates.md.

`python -m tests.support.template_trials` prints the table; the real templates must be there (real_templates.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from strop.data.rendering.render import Renderer
from strop.data.row_errors import RenderError
from strop.data.types import Conversation
from strop.errors import ModelError
from tests.support import real_templates
from tests.support.templates import KINDS, TRAITS, tokenizer


def trained(renderer: Renderer, conversation: Conversation) -> list[str]:
    """The supervised text of each assistant turn, after all that must hold was checked. Raises RenderError.

    The prompt that the server sends, with the template as it is saved after such rows, is the beginning of the row,
    token for token; the turn is all that is supervised; it holds the assistant's words, and ends with a stop token,
    of which there is no other in it; nothing of another's turn is in it.
    """
    decode, messages = renderer.tokenizer.decode, conversation.messages
    shows_reasoning = renderer.chat.shows_reasoning(messages)
    served = renderer.for_serving(thinking=int(shows_reasoning), rows=1)
    examples = renderer.render(conversation)
    found = []
    for example in examples:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], example.weights > 0, [0]])))
        found += [(example, int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    turns = [place for place, message in enumerate(messages) if message.role == "assistant"]
    assert len(found) == len(turns)
    texts = []
    for (example, begin, end), turn in zip(found, turns, strict=True):
        message = messages[turn]
        prompt = served.prompt(messages[:turn], conversation.tools)
        assert prompt.tolist() == example.ids[:begin].tolist(), (decode(prompt), decode(example.ids[:begin]))
        text = decode(example.ids[begin:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert message.content in text
        for one in message.tool_calls:
            assert one["function"]["name"] in text and one["function"]["arguments"]["city"] in text
        if shows_reasoning and message.reasoning and (renderer.chat.traits.reasoning or message.tool_calls):
            assert text.index(message.reasoning) < (text.index(message.content) if message.content else len(text))
        stops = [int(token) in served.stop_ids for token in example.ids[begin:end]]
        assert stops[-1] and sum(stops) == 1
        assert not any(other.content in text for other in messages if other.role in ("user", "tool"))
        texts.append(text)
    return texts


def outcome(renderer: Renderer, conversation: Conversation) -> str:
    """`yes`, `not shown` for reasoning that the template leaves out, or why the row is refused."""
    try:
        trained(renderer, conversation)
    except RenderError as fault:
        return fault.what.removeprefix("the chat template ")
    asked = any(message.reasoning for message in conversation.messages)
    return "not shown" if asked and not renderer.chat.shows_reasoning(conversation.messages) else "yes"


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """rows: names and tokenizers. A Markdown table of what works, and under it what is refused, and why."""
    lines = ["| template | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    refused: dict[str, list[str]] = {}
    for name, own in rows:
        try:
            renderer = Renderer(own, options={})
        except ModelError as fault:
            lines.append(f"| {name} | " + " | ".join(["no"] * len(KINDS)) + " |")
            refused.setdefault(fault.what, []).append(name)
            continue
        cells = []
        for conversation in KINDS.values():
            found = outcome(renderer, conversation)
            cells.append(found if found in ("yes", "not shown") else "no")
            if cells[-1] == "no" and name not in refused.setdefault(found, []):
                refused[found].append(name)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    reasons = [f"- {why}: {', '.join(names)}" for why, names in refused.items()]
    return "\n".join([*lines, "", "What is refused, and why:", "", *reasons])


def written_table() -> str:
    return table((name, tokenizer(name)) for name in TRAITS)


def real_table() -> str:
    return table((name, real_templates.tokenizer_for(name)) for name in real_templates.names())


if __name__ == "__main__":
    print(written_table(), real_table(), sep="\n\n")
