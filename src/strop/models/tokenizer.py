"""Load a model's tokenizer without its weights (usually without torch), and decode tokens as they are generated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from strop.config.schema import DataSection
from strop.data.images import FIRST_IMAGE_ID
from strop.data.rendering.image_encoder import attach_image_encoder, has_processor
from strop.data.types import DataKind
from strop.errors import ModelError, first_line
from strop.machine.memory import is_out_of_memory
from strop.models.source import Source, locate, read_config
from strop.runs.folder import build_once, cache_folder, new_folder

LOCAL_LOAD_OPTIONS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 5  # number of prompt tokens that are decoded together with the start of a completion


def load_tokenizer(source: Source) -> Any:
    """Load the model's fast tokenizer, whose character offsets are needed to find supervised tokens."""
    folder = config_folder(source)
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(folder, **LOCAL_LOAD_OPTIONS)
    except Exception as error:  # the tokenizers package raises plain Exception for a file that it cannot parse
        raise ModelError(f"{source.name}: its tokenizer cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        fix = "save the tokenizer with a current transformers"
        raise ModelError(f"{source.name}: no fast tokenizer (tokenizer.json)", fix=fix)
    if has_processor(folder):
        base = folder if (folder / "config.json").is_file() else config_folder(locate(source.name))  # of an adapter
        attach_image_encoder(tokenizer, folder, read_config(base))
    return tokenizer


def check_template(source: Source, data: DataSection, data_kind: DataKind) -> None:
    """Raise ModelError if the rows need a chat template and there is none, before a large tokenizer loads (10 s)."""
    from strop.data.prepare import need_template
    from strop.data.rendering.template_source import missing_template_error

    if data.template is None and not has_template(source) and need_template(data, data_kind):
        raise missing_template_error()


def has_template(source: Source) -> bool:
    """Return whether a model has a chat template, without loading its tokenizer."""
    if source.kind == "gguf":
        from strop.models.families.gguf_header import GgufReader

        with gguf_errors(source.path):
            return "tokenizer.chat_template" in GgufReader(source.path).fields
    from transformers.utils.hub import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE

    if any((source.path / name).exists() for name in (CHAT_TEMPLATE_FILE, CHAT_TEMPLATE_DIR)):
        return True
    file = source.path / "tokenizer_config.json"
    return not file.is_file() or '"chat_template"' in file.read_text(encoding="utf-8", errors="replace")


def _tokenizer_class(folder: Path) -> Any:
    """Return TokenizersBackend if the model declares it, else AutoTokenizer, which imports torch."""
    file = folder / "tokenizer_config.json"
    declared = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if isinstance(declared, dict) and declared.get("tokenizer_class") == "TokenizersBackend":
        from transformers import TokenizersBackend

        return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def trained_token_rows(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return {module name: embedding rows} of the rows that an adapter trains. config: its adapter_config.json."""
    rows = config.get("trainable_token_indices") or {}
    return {"embed_tokens": rows} if isinstance(rows, list) else dict(rows)


def trained_token_texts(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the texts of the tokens that an adapter trains, or their ids if the adapter has no tokenizer."""
    ids = dict.fromkeys(row for rows in trained_token_rows(config).values() for row in rows)
    file = folder / "tokenizer.json"
    added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"] if ids and file.is_file() else ()
    texts = {token["id"]: token["content"] for token in added}
    return [texts.get(token_id, str(token_id)) for token_id in ids]


def config_folder(source: Source) -> Path:
    """Return the folder with config and tokenizer. Those of a GGUF file are extracted into the cache once."""
    if source.kind == "folder":
        return source.path

    def extract(folder: Path) -> None:
        from unittest import mock  # imports asyncio

        import gguf
        from transformers import AutoConfig, AutoTokenizer

        from strop.models.families.gguf_header import GgufReader

        fast_reader = mock.patch.object(gguf, "GGUFReader", GgufReader)
        with gguf_errors(source.path), fast_reader, new_folder(folder) as temp:
            location = {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": source.path.name}
            AutoTokenizer.from_pretrained(**location).save_pretrained(temp)
            clear_gguf_quantization(AutoConfig.from_pretrained(**location)).save_pretrained(temp)

    return build_once(gguf_cache(source) / "head", lambda folder: (folder / "config.json").is_file(), extract)


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
    return cache_folder() / "gguf" / f"{digest}-{source.path.stat().st_size}"


def clear_gguf_quantization(config: Any) -> Any:
    """Remove the quantization entry, with which save_pretrained would fail, from a GGUF file's config. Returns it."""
    config.__dict__.pop("quantization_config", None)
    config._name_or_path = ""
    return config


class TextStream:
    """Decode one completion token by token.

    Text is returned once its characters are complete and it cannot be the beginning of a stop string. The first stop
    string sets `stopped`; it and the text after it are not returned. prompt: the ids of the text that the completion
    continues, without which a leading space would be lost.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: Sequence[int] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = [token for token in prompt[-CONTEXT_TOKENS:] if token < FIRST_IMAGE_ID]
        self._start = 0  # ids before it are not decoded again
        self._returned = len(self._ids)  # the text of the ids before it was returned
        if self._decode(self._returned).endswith(REPLACEMENT):  # the prompt ends within a character
            self._ids, self._returned = [], 0
        self._pending = ""
        self._length = 0
        self.stopped = False

    @property
    def offset(self) -> int:
        """The number of characters so far, including those that were not returned and replacement characters."""
        return self._length + len(self._new_text())

    def push(self, token: int) -> str:
        """Add a token. Returns the text that has become complete."""
        self._ids.append(token)
        new = self._new_text()
        if not new or new.endswith(REPLACEMENT):  # an incomplete character
            return ""
        self._start, self._returned = self._returned, len(self._ids)
        self._length += len(new)
        return self._cut_at_stop(new)

    def end(self) -> str:
        """Return the remaining text after the last token."""
        rest = self._cut_at_stop(self._new_text())
        pending, self._pending = self._pending, ""
        return rest + ("" if self.stopped else pending)

    def _new_text(self) -> str:
        """Return the text of the last tokens, which may end with an incomplete character."""
        return self._decode(len(self._ids))[len(self._decode(self._returned)) :]

    def _decode(self, end: int) -> str:
        ids = self._ids[self._start : end]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _cut_at_stop(self, new: str) -> str:
        text = self._pending + new
        positions = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if positions:
            self.stopped, self._pending = True, ""
            return text[: min(positions)]
        # keep back the longest suffix of the text that is a prefix of a stop string
        prefixes = {stop[:size] for stop in self._stops for size in range(1, len(stop))}
        overlap = max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
        self._pending = text[len(text) - overlap :]
        return text[: len(text) - overlap]


class TokenBytes:
    """Map tokens to their UTF-8 bytes, which may be part of a character, with the leading space."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]  # preserves leading spaces
        self._begin = len(self._decode_text(self._context))
        self.decode = cache(self._decode_token)

    def _decode_token(self, token: int) -> bytes:
        text = self._decode_text([*self._context, token])[self._begin :]
        if REPLACEMENT not in text:
            return text.encode()
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(match[1])
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        values = {character: byte for byte, character in bytes_to_unicode().items()}
        return bytes(values[character] for character in piece) if values.keys() >= set(piece) else text.encode()

    def _decode_text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
