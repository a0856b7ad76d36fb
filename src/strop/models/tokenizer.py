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
from strop.runs.folder import build_once, cache_folder, new_folder

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_tokenizer(source: Source) -> Any:
    """The model's own tokenizer (fast ones only: offsets are needed to find the supervised tokens).

    Raises ModelError where the folder holds none.
    """
    folder = head_folder(source)
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


def new_rows(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The embedding rows that an adapter (with this adapter_config.json) trains, by the last part of their module's
    name."""
    rows = config.get("trainable_token_indices") or {}
    return {"embed_tokens": rows} if isinstance(rows, list) else dict(rows)


def new_tokens(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The tokens of these rows, as the adapter's folder has them; the number of one that it has no text for."""
    ids = dict.fromkeys(number for rows in new_rows(config).values() for number in rows)
    file = folder / "tokenizer.json"
    added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"] if ids and file.is_file() else ()
    texts = {token["id"]: token["content"] for token in added}
    return [texts.get(number, str(number)) for number in ids]


def head_folder(source: Source) -> Path:
    """The folder with config and tokenizer; for a GGUF file they are taken out of it once, without its weights."""
    if source.kind == "folder":
        return source.path

    def make(folder: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        with gguf_faults(source.path), new_folder(folder) as temp:
            where = {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": source.path.name}
            AutoTokenizer.from_pretrained(**where).save_pretrained(temp)
            plain_config(AutoConfig.from_pretrained(**where)).save_pretrained(temp)

    return build_once(gguf_cache(source) / "head", lambda folder: (folder / "config.json").is_file(), make)


@contextmanager
def gguf_faults(file: Path) -> Iterator[None]:
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


def plain_config(config: Any) -> Any:
    """A config that no longer says its weights are packed GGUF blocks (save_pretrained would refuse)."""
    config.__dict__.pop("quantization_config", None)
    config._name_or_path = ""
    return config
