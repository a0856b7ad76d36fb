"""The metadata of a GGUF file, as a transformers config names it; lists of strings are passed over, unread.

gguf's own reader makes an array of each of the tokenizer's strings: 13 s on SmolLM2's file, where this takes 0.2 s.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

from strop.errors import ModelError

_STRING, _LIST = 8, 9
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # struct's code of a type
_LONGEST = 1 << 16  # bytes of a string that is read
# config.json's name of what the header calls ARCHITECTURE.name
_NAMES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "context_length": "max_position_embeddings",
}
_FAMILIES = {"gemma3": "gemma3_text"}


def read_gguf_config(file: Path) -> dict[str, Any]:
    """What config.json would say of the model's shape. Raises ModelError where the file is not GGUF or is cut short."""
    try:
        with file.open("rb") as handle:
            return _config(*_read(handle))
    except FileNotFoundError:
        raise ModelError(f"{file}: no such GGUF file") from None
    except (struct.error, IndexError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{file}: not a GGUF file that can be read ({error})", fix="fetch it again") from None


def _config(values: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    family = str(values["general.architecture"])
    config = {ours: values[f"{family}.{name}"] for name, ours in _NAMES.items() if f"{family}.{name}" in values}
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if blocks and len(blocks) != config.get("num_hidden_layers"):
        raise ValueError(f"tensors of {len(blocks)} layers, {config.get('num_hidden_layers')} expected")
    vocabulary = tensors.get("token_embd.weight")
    if vocabulary:
        config["vocab_size"] = vocabulary[1]
    if family == "llama" and "head_dim" not in config:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    return {"model_type": _FAMILIES.get(family, family), **config}


def _read(handle: BinaryIO) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    magic, version, num_tensors, num_values = struct.unpack("<4sIQQ", handle.read(24))
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"begins with {magic!r}, version {version}")
    values: dict[str, Any] = {}
    for _ in range(num_values):
        key = _string(handle)
        value = _value(handle, *struct.unpack("<I", handle.read(4)))
        if value is not None:
            values[key] = value
    tensors, end = {}, 0
    for _ in range(num_tensors):
        name = _string(handle)
        (rank,) = struct.unpack("<I", handle.read(4))
        tensors[name] = struct.unpack(f"<{rank}Q", handle.read(8 * rank))
        kind, offset = struct.unpack("<IQ", handle.read(12))
        end = max(end, offset + _bytes(kind, math.prod(tensors[name])))
    unit = int(values.get("general.alignment", 32))
    needed = -(-handle.tell() // unit) * unit + end  # weights begin at a multiple of it
    if (size := handle.seek(0, 2)) < needed:
        raise ValueError(f"cut short: {size} bytes, {needed} expected")
    return values, tensors


def _bytes(kind: int, numbers: int) -> int:
    """What this many numbers of a type take; 1 for a type that is newer than the package gguf."""
    import gguf

    sizes: dict[int, tuple[int, int]] = {int(name): size for name, size in gguf.GGML_QUANT_SIZES.items()}
    block, size = sizes.get(kind, (numbers or 1, 1))
    return -(-numbers // block) * size


def _value(handle: BinaryIO, kind: int) -> Any:
    """A number or a string; None for a list, which no shape needs."""
    if kind == _STRING:
        return _string(handle)
    if kind == _LIST:
        of, count = struct.unpack("<IQ", handle.read(12))
        if of == _STRING:
            for _ in range(count):
                handle.seek(struct.unpack("<Q", handle.read(8))[0], 1)
        else:
            handle.seek(count * struct.calcsize(_NUMBERS[of]), 1)
        return None
    code = f"<{_NUMBERS[kind]}"
    return struct.unpack(code, handle.read(struct.calcsize(code)))[0]


def _string(handle: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", handle.read(8))
    if length > _LONGEST:
        handle.seek(length, 1)
        return ""
    return handle.read(length).decode("utf-8", "replace")
