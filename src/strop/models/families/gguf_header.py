"""Read a GGUF file's metadata, with the field names of a transformers config, without torch."""

# Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Lists of strings are skipped. The gguf package
# makes an array of each of the tokenizer's strings, which takes 13 s for SmolLM2's file; this module takes 0.2 s.

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

from strop.errors import ModelError
from strop.models.families.table import find_gguf_family

_STRING, _LIST = 8, 9
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # struct formats by GGUF type
_MAX_STRING = 1 << 16  # bytes; longer strings are skipped
# metadata key without the name of the architecture -> field of config.json
_CONFIG_FIELDS = {
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


def read_gguf_config(file: Path) -> dict[str, Any]:
    """Return the model's sizes under the names of config.json. Raises ModelError for a damaged file."""
    try:
        with file.open("rb") as handle:
            return _config(*_read_header(handle))
    except FileNotFoundError:
        raise ModelError(f"{file}: no such GGUF file") from None
    except (struct.error, IndexError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{file}: not a readable GGUF file ({error})", fix="download it again") from None


def _config(values: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    arch = str(values["general.architecture"])
    config = {field: values[f"{arch}.{name}"] for name, field in _CONFIG_FIELDS.items() if f"{arch}.{name}" in values}
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if blocks and len(blocks) != config.get("num_hidden_layers"):
        raise ValueError(f"tensors of {len(blocks)} layers, {config.get('num_hidden_layers')} expected")
    if embedding_shape := tensors.get("token_embd.weight"):
        config["vocab_size"] = embedding_shape[1]
    if arch == "llama" and "head_dim" not in config:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    model_type, _ = find_gguf_family(arch) or (arch, None)
    return {"model_type": model_type, **config}


def _read_header(handle: BinaryIO) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return the metadata values and the tensors' shapes. Raises ValueError for a damaged file."""
    magic, version, num_tensors, num_values = struct.unpack("<4sIQQ", handle.read(24))
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"begins with {magic!r}, version {version}")
    values: dict[str, Any] = {}
    for _ in range(num_values):
        key = _read_string(handle)
        value = _read_value(handle, *struct.unpack("<I", handle.read(4)))
        if value is not None:
            values[key] = value
    import gguf

    block_sizes = {int(kind): (block, size) for kind, (block, size) in gguf.GGML_QUANT_SIZES.items()}
    tensors, end = {}, 0
    for _ in range(num_tensors):
        name = _read_string(handle)
        (rank,) = struct.unpack("<I", handle.read(4))
        tensors[name] = struct.unpack(f"<{rank}Q", handle.read(8 * rank))
        type_id, offset = struct.unpack("<IQ", handle.read(12))
        elements = math.prod(tensors[name])
        block, size = block_sizes.get(type_id, (elements or 1, 1))  # 1 byte for a type that gguf does not know yet
        end = max(end, offset + -(-elements // block) * size)
    alignment = int(values.get("general.alignment", 32))
    needed = -(-handle.tell() // alignment) * alignment + end  # weights begin at a multiple of the alignment
    if (file_size := handle.seek(0, 2)) < needed:
        raise ValueError(f"cut short: {file_size} bytes, {needed} expected")
    return values, tensors


def _read_value(handle: BinaryIO, type_id: int) -> Any:
    if type_id == _STRING:
        return _read_string(handle)
    if type_id == _LIST:
        item_type, count = struct.unpack("<IQ", handle.read(12))
        if item_type == _STRING:
            for _ in range(count):
                handle.seek(struct.unpack("<Q", handle.read(8))[0], 1)
        else:
            handle.seek(count * struct.calcsize(_NUMBERS[item_type]), 1)
        return None
    code = f"<{_NUMBERS[type_id]}"
    return struct.unpack(code, handle.read(struct.calcsize(code)))[0]


def _read_string(handle: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", handle.read(8))
    if length > _MAX_STRING:
        handle.seek(length, 1)
        return ""
    return handle.read(length).decode("utf-8", "replace")
