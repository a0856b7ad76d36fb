"""Read a GGUF file's metadata, with the field names of a transformers config, without torch."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from strop.errors import ModelError
from strop.models.families.table import find_gguf_family

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


class GgufReader(gguf.GGUFReader):  # type: ignore[misc]
    """gguf's reader, but fast for large vocabularies: it reads the elements of an array together."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        # gguf makes two or three numpy.memmap views per element, which takes 15 s for 262,144 tokens.
        ValueType = gguf.GGUFValueType
        if raw_type != ValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        item_type, length = (int(self._get(orig_offs + at, kind)[0]) for at, kind in ((0, np.uint32), (4, np.uint64)))
        data, start, types = self.data.view(np.ndarray), orig_offs + 12, [ValueType.ARRAY, ValueType(item_type)]
        if (number := self.gguf_scalar_to_np.get(item_type)) is not None:
            numbers = self._get(start, number, length).view(np.ndarray)
            size, parts = numbers.nbytes, list(numbers.reshape(length, 1))
        elif item_type == ValueType.STRING:
            end, parts = start, []
            for _ in range(length):
                begin = end + 8
                end = begin + struct.unpack_from("=Q", data, end)[0]
                parts.append(data[begin:end])
            size = end - start
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return 12 + size, parts, list(range(length)), types if length else types[:1]

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        needed = start_offs
        for _, _, _, dims, type_id, offset in (field.parts for field in fields):
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id[0])]
            needed = max(needed, start_offs + int(offset[0]) + math.prod(dims.tolist()) // block * size)
        if len(self.data) < needed:
            raise ValueError(f"cut short: {len(self.data)} bytes, {needed} expected")
        super()._build_tensors(start_offs, fields)


def read_gguf_config(file: Path) -> dict[str, Any]:
    """Return the model's sizes under the names of config.json. Raises ModelError for a damaged file."""
    try:
        reader = GgufReader(file)
        values = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types and field.types[0] != gguf.GGUFValueType.ARRAY
        }
        return _config(values, {tensor.name: tuple(tensor.shape.tolist()) for tensor in reader.tensors})
    except FileNotFoundError:
        raise ModelError(f"{file}: no such GGUF file") from None
    except (struct.error, IndexError, ValueError, KeyError, TypeError, OverflowError, ZeroDivisionError) as error:
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
