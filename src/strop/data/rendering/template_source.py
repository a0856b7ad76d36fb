"""The text of a chat template: the model's own, a named one or a file; and options and the date written into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from strop.errors import ModelError, nearest

# ChatML; tools and their calls as Hermes and Qwen write them; reasoning shown in every turn
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
NAMED = {"chatml": CHATML}


def adds_bos(tokenizer: Any) -> bool:
    """Does the tokenizer begin a plain text with its bos token?"""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def template_source(tokenizer: Any, choice: str | None) -> str | None:
    """The template to use: `choice` (chatml, or a file) or the tokenizer's own; None where there is none.

    Raises ModelError for a choice that is neither a name nor a file.
    """
    if choice in NAMED:
        stop = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        if stop is None:
            raise ModelError(
                "the tokenizer has neither <|im_end|> nor an eos token", fix="choose another data.template"
            )
        start = "{{ bos_token }}" if adds_bos(tokenizer) else ""
        return NAMED[choice].replace("BOS", start).replace("STOP", stop)
    if choice is not None:
        path = Path(choice).expanduser()
        if not path.is_file():
            raise ModelError(
                f"data.template: no such template or file: {choice}{nearest(choice, NAMED)}",
                fix=f"give {' or '.join(NAMED)}, or the path of a Jinja file",
            )
        return path.read_text(encoding="utf-8")
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return own or None
