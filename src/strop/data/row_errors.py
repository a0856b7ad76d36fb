"""Reasons why a row cannot be used, their fixes, and the corresponding errors.

The keys of the tables are the reason codes of `by_reason` and `dropped` in `strop check --json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strop.errors import DataError, Location

# Why a row cannot be read.
READING_REASONS: dict[str, str] = {
    "broken-json": "the line is not valid JSON",
    "trailing-comma": "a comma after the row; JSON Lines has none",
    "truncated": "the file ends in the middle of this line",
    "not-an-object": "the row is JSON, but not an object",
    "duplicate-key": "an object has the same key twice",
    "not-json-number": "NaN, Infinity, or a number too large for a float",
    "lone-surrogate": "half of a surrogate pair, which is not a character",
    "encoding": "bytes that are not text in this encoding",
    "cells": "a CSV or TSV record that is malformed, or has more or fewer cells than the others",
}
# Why a row cannot be converted to a conversation.
FORMAT_REASONS: dict[str, str] = {
    "unknown-shape": "the row's columns match no format, although other rows of the file match one",
    "missing-column": "a column that the format or --data.columns names is missing",
    "bad-messages": "the messages are not a list of objects, or two texts are given for one, such as two system texts",
    "unknown-role": "an unknown role name",
    "no-content": "a text is null or missing (allowed only next to tool calls)",
    "not-text": "a text is a number, a list or an object",
    "bad-part": "a content part of unknown type, or reasoning, text and tool calls in another order",
    "no-assistant": "there is no assistant message to train on",
    "no-user-first": "the first message after the system message is not the user's",
    "empty-answer": "an assistant message is empty, which would train the model to stop at once",
    "empty-prompt": "a user message is empty",
    "empty-text": "a raw text is empty",
    "bad-tools": "tools are not a list of functions with names, or not JSON",
    "bad-tool-call": "a tool call without a name, or with arguments that are not an object",
    "bad-weight": "a message's weight is not a number of at least 0, or is given twice with different values",
    "answer-weight": "a message of a chosen, rejected or labelled answer has a weight other than 0 and 1",
    "no-prompt": "a preference pair of two strings without a prompt",
    "same-answers": "chosen and rejected are the same",
    "prompts-differ": "an answer contains another prompt than the row, or chosen and rejected answer different prompts",
    "no-question": "a prompt whose last message is the assistant's: there is nothing to answer",
    "bad-ranking": "a ranking without a score for each answer, or without two answers that differ in score",
    "bad-label": "a label that is neither good nor bad; in classification one that is not a string, an integer or a "
    "list of them, or a list if other rows have one label",
    "no-label": "a label is null or empty",
    "no-positive": "a row of texts to match without a positive text, or whose texts do not match",
    "same-texts": "a text is both a positive and a negative, or is the anchor itself",
    "media": "audio or video, which are not supported",
    "bad-image": "an image that is not given by a path, a data URL or bytes, or is in an assistant message",
    "image-count": "more or fewer places for images in the text (<image>, or parts of type image) than images",
    "image-missing": "the file of an image is not there",
    "image-url": "an image on the network, which is not downloaded",
    "image-unreadable": "an image that is empty, truncated, or of an unknown format",
    "image-too-large": "an image with too many pixels or bytes",
    "image-animated": "an image with several frames",
}
# Why a conversation cannot be rendered to an example.
RENDERING_REASONS: dict[str, str] = {
    "template-refused": "the chat template refuses this order or kind of messages",
    "system-unsupported": "the chat template does not support a system message",
    "tools-unsupported": "the chat template does not support tools or tool calls",
    "text-lost": "the chat template changes or omits the text of a message",
    "prompt-not-prefix": "the prompt at inference would not be a prefix of the training text",
    "turn-rewritten": "the chat template writes a turn with a call differently when its result follows",
    "no-stop-token": "an assistant message does not end with a stop token",
    "control-token": "text that looks like a control token cannot be separated from a real one",
    "reasoning-missing": "the row has no reasoning, and the chat template opens a reasoning block",
    "reasoning-not-shown": "the row has reasoning apart from the answer's text, which the chat template does not show",
    "reasoning-off": "the row has reasoning, and the chat template's prompt has none, as with a switch that is off",
    "reasoning-lost": "the text of an answer contains reasoning in think tags, which the chat template removes",
    "stop-inside": "a stop token is inside an assistant message",
    "nothing-supervised": "no token of the row is trained on",
    "other-weight": "a message that is not the assistant's has a weight, which data.loss all ignores",
    "answer-in-parts": "the chat template splits one answer into several examples, which cannot be compared as one",
    "prompt-tokens-differ": "chosen and rejected do not begin with the same prompt tokens",
    "prompt-lengths-differ": "only one answer begins with tokens that do not count: its first turn has weight 0, or "
    "the chat template adds to it",
    "same-tokens": "chosen and rejected have the same tokens",
    "no-tokens": "the text has no tokens",
    "no-images": "the row has an image, and the model reads only text",
    "image-lost": "the chat template does not show an image",
    "image-refused": "the model's image processor refuses an image",
}
TOO_LONG = "too-long"
ANSWER_TOO_LONG = "answer-too-long"  # no part of the row fits
LENGTH_REASONS = frozenset({TOO_LONG, ANSWER_TOO_LONG})
HAS_IMAGES = "a row with images is not shortened"  # the end of the text of an error
# Reasons that depend on the files of images, which may change while the rows do not.
IMAGE_FILE_REASONS = frozenset({"image-missing", "image-unreadable", "image-too-large", "image-animated"})
REASONS: dict[str, str] = {
    **READING_REASONS,
    **FORMAT_REASONS,
    **RENDERING_REASONS,
    TOO_LONG: "the row is longer than data.max_length",
    ANSWER_TOO_LONG: "one answer of the row is longer than data.max_length",
    "no-teacher-answer": "the teacher has not answered the row",
    "unknown-label": "a label that is not in train.labels, or that no training row has",
    "contradiction": "another row ranks the same answers the other way round, labels the same answer or text "
    "differently, or has the positive of this anchor as a negative",
}
FIXES: dict[str, str] = {
    "missing-column": "give all rows the same columns, because --data.columns and --data.format apply to every file",
    "system-unsupported": "move the system text into the first user message, or choose data.template",
    "tools-unsupported": "choose --data.template chatml, or a model whose template supports tools",
    "prompt-not-prefix": "choose --data.template chatml, or, if the template shows reasoning, --data.reasoning empty",
    "turn-rewritten": "choose --data.template chatml, or another model",
    "reasoning-missing": "choose --data.reasoning empty",
    "reasoning-not-shown": "choose --data.reasoning drop",
    "reasoning-off": "choose --data.reasoning drop to train without it, or turn it on in data.template_options",
    "reasoning-lost": "choose --data.reasoning drop to train without it, or a data.template that shows reasoning",
    "nothing-supervised": "give an assistant message a weight above 0",
    "prompt-lengths-differ": "count the first turn of each answer, or remove it",
    "image-count": "write <image> once for each image, or nowhere to have them at the start of the first message; "
    "where a text is about the tag, write it another way, such as <image/>",
    "image-url": "download the images, and give their paths",
    "image-missing": "give paths relative to the data file, or their folder with --data.image_folder",
    "image-unreadable": "save these images again, as PNG or JPEG, or remove their rows",
    "image-too-large": "make these images smaller",
    "image-animated": "save one frame of these images",
    "no-images": "choose a model that reads images, such as SmolVLM, or leave the images out with --data.columns",
    "image-lost": "use the model's own chat template",
    "no-teacher-answer": "raise --data.max_length if answers do not end, or choose another teacher",
    "other-weight": "choose --data.loss assistant, or remove these weights",
}


@dataclass(frozen=True)
class RowError:
    """A row that cannot be used. code: a key of REASONS."""

    code: str
    where: Location


class InvalidRow(ValueError):
    """Raised when a row cannot be converted. code: a key of FORMAT_REASONS."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code
        self.what = what


def type_name(value: Any) -> str:
    """Return what a value is, for an error."""
    if value is None:
        return "null"
    number = "a number"
    names = {bool: "true or false", int: number, float: number, str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


class RenderError(DataError):
    """Raised when a conversation cannot be rendered. code: a key of RENDERING_REASONS."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(RENDERING_REASONS[code] + (f" ({detail})" if detail else ""), fix=FIXES.get(code, ""))
        self.code, self.detail = code, detail


def file_error(path: str, what: str, fix: str = "", line: int | None = None) -> DataError:
    return DataError(f"{path}: {what}", fix=fix, where=[Location(path, line, what)])
