"""Why a conversation cannot be rendered, and what a template may raise."""

from __future__ import annotations

import jinja2

from strop.errors import DataError, Where

REASONS = {
    "template-refused": "the chat template refuses this order or kind of messages",
    "system-unsupported": "the chat template has no system turn",
    "tools-unsupported": "the chat template cannot show tools or tool calls",
    "text-lost": "the chat template does not show the text of a message as it is",
    "prompt-not-prefix": "the prompt at serving would not be a prefix of the training text",
    "no-stop-token": "an assistant turn does not end with a stop token",
    "control-token": "text that looks like a control token cannot be told from one here",
    "reasoning-missing": "the row has no reasoning, and the chat template opens a block for it",
    "reasoning-not-shown": "the row has reasoning, which the chat template does not show",
    "reasoning-lost": "the chat template cuts the reasoning out of the text of an answer",
    "stop-inside": "a token that stops generation stands within an assistant turn",
    "nothing-supervised": "no token of the row is trained on",
    "other-weight": "a turn that is not the assistant's has a weight, which data.loss all does not read",
    "answer-in-parts": "the chat template makes several rows of one answer, which cannot be compared as one",
    "prompt-tokens-differ": "chosen and rejected do not begin with the same tokens of the prompt",
    "same-tokens": "chosen and rejected are the same tokens",
}
FIXES = {
    "system-unsupported": "move the system text into the first user turn, or choose data.template",
    "tools-unsupported": "choose --data.template chatml, or a model whose own template shows them",
    "prompt-not-prefix": "choose --data.reasoning empty, or another data.template",
    "reasoning-missing": "choose --data.reasoning empty",
    "reasoning-not-shown": "choose --data.reasoning drop",
    "reasoning-lost": "choose --data.reasoning drop, to train without it, or a data.template that shows reasoning",
    "nothing-supervised": "give an assistant turn a weight above 0",
    "other-weight": "choose --data.loss assistant, or leave these weights out",
}

# What a template may raise on an input it was not written for.
TEMPLATE_FAULTS: tuple[type[Exception], ...] = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


class RenderError(DataError):
    """A conversation that cannot be rendered; `code` is a key of REASONS."""

    def __init__(self, code: str, detail: str = "", *, file: str = "", line: int | None = None) -> None:
        what = REASONS[code] + (f" ({detail})" if detail else "")
        where = [Where(file, line, what)] if file else []
        super().__init__(what, fix=FIXES.get(code, ""), where=where)
        self.code = code
        self.detail = detail
