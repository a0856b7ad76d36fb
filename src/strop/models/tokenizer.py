"""Load a model's tokenizer without its weights (mostly without torch), and decode tokens as they are generated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from strop.errors import ModelError, first_line
from strop.machine.memory import is_out_of_memory
from strop.models.source import Source
from strop.runs.folder import build_once, cache_folder, new_folder

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 5  # last tokens of a prompt with which the first word of a completion is decoded


def load_tokenizer(source: Source) -> Any:
    """Load the model's fast tokenizer, whose offsets find the supervised tokens, or raise ModelError."""
    folder = config_folder(source)
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(folder, **LOCAL)
    except Exception as error:  # the tokenizers package raises plain Exception for a file that it cannot parse
        raise ModelError(f"{source.name}: its tokenizer cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        fix = "save the tokenizer with a current transformers"
        raise ModelError(f"{source.name}: no fast tokenizer (tokenizer.json)", fix=fix)
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """Return AutoTokenizer, or the class it would choose: importing AutoTokenizer imports torch."""
    file = folder / "tokenizer_config.json"
    declared = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if isinstance(declared, dict) and declared.get("tokenizer_class") == "TokenizersBackend":
        from transformers import TokenizersBackend

        return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def trained_token_rows(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the embedding rows that an adapter (its adapter_config.json) trains, by the leaf name of their module."""
    rows = config.get("trainable_token_indices") or {}
    return {"embed_tokens": rows} if isinstance(rows, list) else dict(rows)


def trained_token_texts(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the tokens of `trained_token_rows`; the id of a token whose text is not in the adapter's folder."""
    ids = dict.fromkeys(row for rows in trained_token_rows(config).values() for row in rows)
    file = folder / "tokenizer.json"
    added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"] if ids and file.is_file() else ()
    texts = {token["id"]: token["content"] for token in added}
    return [texts.get(token_id, str(token_id)) for token_id in ids]


def config_folder(source: Source) -> Path:
    """Return the folder with config and tokenizer; those of a GGUF file are extracted once into the cache."""
    if source.kind == "folder":
        return source.path

    def make(folder: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        with gguf_errors(source.path), new_folder(folder) as temp:
            where = {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": source.path.name}
            AutoTokenizer.from_pretrained(**where).save_pretrained(temp)
            unpacked_config(AutoConfig.from_pretrained(**where)).save_pretrained(temp)

    return build_once(gguf_cache(source) / "head", lambda folder: (folder / "config.json").is_file(), make)


@contextmanager
def gguf_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        what = f"{file}: not a readable GGUF file ({type(error).__name__}: {first_line(error)})"
        raise ModelError(what, fix="download it again, or use the model as safetensors") from None


def gguf_cache(source: Source) -> Path:
    digest = source.name.partition("#sha256=")[2][:16] or source.name.removeprefix("demo:").replace("/", "-")
    stat = source.path.stat()
    return cache_folder() / "gguf" / f"{digest}-{stat.st_size}"


def unpacked_config(config: Any) -> Any:
    """Remove from a config that its weights are packed GGUF blocks, which save_pretrained would refuse."""
    config.__dict__.pop("quantization_config", None)
    config._name_or_path = ""
    return config


class TextStream:
    """Decode one completion token by token."""

    # Only whole characters are returned, and no text that may become a stop string. `stopped` is set when one is
    # complete; neither it nor what follows is returned.

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: Sequence[int] = ()) -> None:
        """Start a stream. prompt: token ids whose text the completion continues, so its leading space is kept."""
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._start, self._shown = 0, len(self._ids)  # ids are decoded from `_start`; up to `_shown` they are returned
        if self._decode(self._shown).endswith(REPLACEMENT):  # the prompt ends within a character
            self._ids, self._shown = [], 0
        self._pending = ""
        self._length = 0
        self.stopped = False

    @property
    def length(self) -> int:
        """Whole characters of all tokens, returned or not."""
        new = self._decode(len(self._ids))[len(self._decode(self._shown)) :]
        return self._length + len(new.rstrip(REPLACEMENT))

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now."""
        self._ids.append(token)
        before, now = self._decode(self._shown), self._decode(len(self._ids))
        if len(now) <= len(before) or now.endswith(REPLACEMENT):  # an incomplete character
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        self._length += len(now) - len(before)
        return self._cut_at_stop(now[len(before) :])

    def end(self) -> str:
        """Return the remaining text after the last token."""
        rest = self._cut_at_stop(self._decode(len(self._ids))[len(self._decode(self._shown)) :])
        pending, self._pending = self._pending, ""
        return rest + ("" if self.stopped else pending)

    def _decode(self, end: int) -> str:
        ids = self._ids[self._start : end]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _cut_at_stop(self, new: str) -> str:
        text = self._pending + new
        positions = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if positions:
            self.stopped, self._pending = True, ""
            return text[: min(positions)]
        # The longest suffix of the text that is a prefix of a stop string.
        starts = {stop[:size] for stop in self._stops for size in range(1, len(stop))}
        overlap = max((len(start) for start in starts if text.endswith(start)), default=0)
        self._pending = text[len(text) - overlap :]
        return text[: len(text) - overlap]


class TokenBytes:
    """Map tokens to their (possibly partial) UTF-8 bytes inside a text, with their leading space."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._begin = len(self._decode(self._context))
        self._cache: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        if token not in self._cache:
            self._cache[token] = self._bytes_of(token)
        return self._cache[token]

    def _bytes_of(self, token: int) -> bytes:
        text = self._decode([*self._context, token])[self._begin :]
        if REPLACEMENT not in text:
            return text.encode()
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(match[1])
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        values = {character: byte for byte, character in bytes_to_unicode().items()}
        return bytes(values[character] for character in piece) if values.keys() >= set(piece) else text.encode()

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
