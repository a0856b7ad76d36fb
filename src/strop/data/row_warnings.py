"""What is odd about rows that can be trained on: for the account's warnings."""

from __future__ import annotations

from collections.abc import Iterator

from strop.data import formats
from strop.data.examples import Learning
from strop.data.rendering.render import Renderer, RenderError
from strop.data.types import Conversation, Example


def notes_of(
    conversation: Conversation, rendered: list[Example] | RenderError, renderer: Renderer, learning: Learning
) -> Iterator[tuple[str, str]]:
    """What is odd about a conversation, though it can be trained on, and an example of it."""
    turns = (*conversation.messages, *conversation.rejected)
    texts = [message.content for message in turns] or [conversation.text or ""]
    found = [name for text in texts if "{{" in text for name in formats.placeholders(text)]
    if found:
        yield "unfilled placeholders", f": {found[0]}"
    if lost := sorted(set().union(*map(renderer.lost_characters, texts))):
        yield (
            "characters that the tokenizer drops or changes",
            f": {', '.join(f'U+{ord(sign):04X}' for sign in lost[:3])}",
        )
    if any(renderer.control.found(text) for text in texts):
        yield "control tokens in the text, encoded as plain text", ""
    if not isinstance(rendered, RenderError) and any(example.parted for example in rendered):
        yield "answers that would share a token with the prompt's end, encoded apart from it, as serving does", ""
    said = conversation.messages
    if said and said[-1].role != "assistant" and learning != "prompts":
        yield "turns behind the last answer, which are left out", ""
    if names := [*_null_names(conversation)]:
        yield "null arguments or properties of tools, which datasets writes for names that are absent", f": {names[0]}"
    if any(message.reasoning for message in turns) and not renderer.chat.thinks(turns):
        choice = renderer.chat.reasoning == "drop"
        why = "data.reasoning drop leaves out" if choice else "the chat template does not show: it is not trained on"
        yield f"reasoning, which {why}", ""


def _null_names(conversation: Conversation) -> Iterator[str]:
    turns = (*conversation.messages, *conversation.rejected)
    calls = (call for turn in turns for call in turn.tool_calls)
    held = [call["function"]["arguments"] for call in calls]
    shapes = [tool["function"].get("parameters") for tool in conversation.tools]
    held += [shape.get("properties") for shape in shapes if isinstance(shape, dict)]
    return (name for one in held if isinstance(one, dict) for name, value in one.items() if value is None)
