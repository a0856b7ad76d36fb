"""Check how templates render conversations, and make the tables of docs/templates.md.

`python -m tests.support.template_trials` prints the tables; it needs the real templates (real_templates.py).
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


def supervised_texts(renderer: Renderer, conversation: Conversation) -> list[str]:
    """Check the examples of a conversation and return the supervised text of each assistant turn.

    The serving prompt must be a prefix of the example, token for token. Exactly the turns are supervised. Each has the
    assistant's content and ends with its only stop token, without text of other turns. Raises RenderError.
    """
    decode, messages = renderer.tokenizer.decode, conversation.messages
    shows_reasoning = renderer.chat.shows_reasoning(messages)
    served = renderer.for_serving(thinking=int(shows_reasoning), rows=1)
    examples = renderer.render(conversation)
    turn_spans = []
    for example in examples:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], example.weights > 0, [0]])))
        turn_spans += [(example, int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    assert len(turn_spans) == len(turns)
    texts = []
    for (example, begin, end), turn in zip(turn_spans, turns, strict=True):
        message = messages[turn]
        prompt = served.prompt(messages[:turn], conversation.tools)
        assert prompt.tolist() == example.ids[:begin].tolist(), (decode(prompt), decode(example.ids[:begin]))
        text = decode(example.ids[begin:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert message.content in text
        for call in message.tool_calls:
            assert call["function"]["name"] in text and call["function"]["arguments"]["city"] in text
        if shows_reasoning and message.reasoning and (renderer.chat.traits.reasoning or message.tool_calls):
            assert text.index(message.reasoning) < (text.index(message.content) if message.content else len(text))
        stops = [int(token) in served.stop_ids for token in example.ids[begin:end]]
        assert stops[-1] and sum(stops) == 1
        assert not any(turn.content in text for turn in messages if turn.role in ("user", "tool"))
        texts.append(text)
    return texts


def outcome(renderer: Renderer, conversation: Conversation) -> str:
    """Return `yes`, `not shown` for reasoning that the template leaves out, or why the row is refused."""
    try:
        supervised_texts(renderer, conversation)
    except RenderError as error:
        return error.what.removeprefix("the chat template ")
    has_reasoning = any(message.reasoning for message in conversation.messages)
    return "not shown" if has_reasoning and not renderer.chat.shows_reasoning(conversation.messages) else "yes"


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Return a Markdown table of the outcomes, and a list of refusals. rows: names and tokenizers."""
    lines = ["| template | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    refused: dict[str, list[str]] = {}
    for name, template_tokenizer in rows:
        try:
            renderer = Renderer(template_tokenizer, options={})
        except ModelError as error:
            lines.append(f"| {name} | " + " | ".join(["no"] * len(KINDS)) + " |")
            refused.setdefault(error.what, []).append(name)
            continue
        cells = []
        for conversation in KINDS.values():
            result = outcome(renderer, conversation)
            cells.append(result if result in ("yes", "not shown") else "no")
            if cells[-1] == "no" and name not in refused.setdefault(result, []):
                refused[result].append(name)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    reasons = [f"- {why}: {', '.join(names)}" for why, names in refused.items()]
    return "\n".join([*lines, "", "What is refused, and why:", "", *reasons])


def written_table() -> str:
    return table((name, tokenizer(name)) for name in TRAITS)


def real_table() -> str:
    return table((name, real_templates.tokenizer_for(name)) for name in real_templates.names())


if __name__ == "__main__":
    print(written_table(), real_table(), sep="\n\n")
