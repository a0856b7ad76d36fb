"""The tokenizer of a Source, without its weights and, for most folders, without an import of torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from strop.errors import ModelError, first_line
from strop.machine.memory import is_out_of_memory
from strop.models.source import Source
from strop.runs.folder import cache_folder, made_once, new_folder

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_tokenizer(source: Source) -> Any:
    """The model's own tokenizer (fast ones only: offsets are needed to find the supervised tokens).

    Raises ModelError where the folder holds none.
    """
    folder = config_folder(source)
    try:
        tokenizer = _class_of(folder).from_pretrained(folder, **LOCAL)
    except Exception as error:  # the tokenizers package has no other type for a file that it does not understand
        raise ModelError(f"{source.name}: no tokenizer that loads: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"{source.name}: no fast tokenizer (tokenizer.json)", fix="save the tokenizer with a current transformers"
        )
    return tokenizer


def _class_of(folder: Path) -> Any:
    """AutoTokenizer, or the class it would choose where the folder names it: AutoTokenizer costs an import of torch."""
    file = folder / "tokenizer_config.json"
    declared = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if isinstance(declared, dict) and declared.get("tokenizer_class") == "TokenizersBackend":
        from transformers import TokenizersBackend

        return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def trained_token_rows(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The embedding rows that an adapter (with this adapter_config.json) trains, by the last part of their module's
    name."""
    rows = config.get("trainable_token_indices") or {}
    return {"embed_tokens": rows} if isinstance(rows, list) else dict(rows)


def trained_token_texts(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The tokens of these rows, as the adapter's folder has them; the number of one that it has no text for."""
    ids = dict.fromkeys(number for rows in trained_token_rows(config).values() for number in rows)
    file = folder / "tokenizer.json"
    added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"] if ids and file.is_file() else ()
    texts = {token["id"]: token["content"] for token in added}
    return [texts.get(number, str(number)) for number in ids]


def config_folder(source: Source) -> Path:
    """The folder with config and tokenizer; for a GGUF file they are taken out of it once, without its weights."""
    if source.kind == "folder":
        return source.path

    def make(folder: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        with gguf_errors(source.path), new_folder(folder) as temp:
            where = {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": source.path.name}
            AutoTokenizer.from_pretrained(**where).save_pretrained(temp)
            unpacked_config(AutoConfig.from_pretrained(**where)).save_pretrained(temp)

    return made_once(gguf_cache(source) / "head", lambda folder: (folder / "config.json").is_file(), make)


@contextmanager
def gguf_errors(file: Path) -> Iterator[None]:
    """Around what reads a GGUF file by gguf and transformers: what they cannot read is no fault of strop's."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        what = f"{file}: not a GGUF file that can be read ({type(error).__name__}: {first_line(error)})"
        raise ModelError(what, fix="fetch it again, or use the model as safetensors") from None


def gguf_cache(source: Source) -> Path:
    digest = source.name.partition("#sha256=")[2][:16] or source.name.removeprefix("demo:").replace("/", "-")
    stat = source.path.stat()
    return cache_folder() / "gguf" / f"{digest}-{stat.st_size}"


def unpacked_config(config: Any) -> Any:
    """A config that no longer says its weights are packed GGUF blocks (save_pretrained would refuse)."""
    config.__dict__.pop("quantization_config", None)
    config._name_or_path = ""
    return config


# ---- from strop.models.detokenizer ----
"""Tokens as text, piece by piece: whole characters only, and nothing that may turn out to be a stop string.

And tokens one by one, as the bytes that they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 5  # tokens at the end of a prompt that the first word of an answer is decoded with


class TextStream:
    """The text of one answer. `stopped`: a stop string came; it and what follows are not shown.

    prompt: its ids, where the answer goes on with its text: the blank before the first word is shown then.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: Sequence[int] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = list(prompt[-CONTEXT:])
        self._start, self._shown = 0, len(self._ids)  # decoded together from `start` on; given out up to `shown`
        if self._decode(self._shown).endswith(REPLACEMENT):  # the answer may begin within a character
            self._ids, self._shown = [], 0
        self._held = ""
        self._length = 0
        self.stopped = False

    @property
    def length(self) -> int:
        """Whole characters of the tokens so far, given out or not."""
        new = self._decode(len(self._ids))[len(self._decode(self._shown)) :]
        return self._length + len(new.rstrip(REPLACEMENT))

    def push(self, token: int) -> str:
        """The text that is certain with this token."""
        self._ids.append(token)
        before, now = self._decode(self._shown), self._decode(len(self._ids))
        if len(now) <= len(before) or now.endswith(REPLACEMENT):  # a character that is not whole yet
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        self._length += len(now) - len(before)
        return self._certain(now[len(before) :])

    def end(self) -> str:
        """The rest, when no token follows."""
        rest = self._certain(self._decode(len(self._ids))[len(self._decode(self._shown)) :])
        held, self._held = self._held, ""
        return rest + ("" if self.stopped else held)

    def _decode(self, end: int) -> str:
        ids = self._ids[self._start : end]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _certain(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class TokenBytes:
    """What tokens stand for in the midst of a text: with their blank; of a part of a character, that part."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._begin = len(self._decode(self._before))
        self._known: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._found(token)
        return self._known[token]

    def _found(self, token: int) -> bytes:
        text = self._decode([*self._before, token])[self._begin :]
        if REPLACEMENT not in text:
            return text.encode()
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if single := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(single[1])
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        values = {character: byte for byte, character in bytes_to_unicode().items()}
        return bytes(values[character] for character in piece) if values.keys() >= set(piece) else text.encode()

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
