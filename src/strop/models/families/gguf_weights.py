"""The weights of a GGUF file, dequantized one at a time by gguf's own functions; llama.cpp's layout undone.

Names are gguf's. llama.cpp lays the rows of Llama's q and k in pairs, and adds 1 to Gemma's norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from strop.errors import ModelError

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")  # as llama.cpp calls them


def read_tensors(file: Path, bare: nn.Module, config: Any) -> Iterator[tuple[str, Tensor]] | None:
    """Each of the model's parameters by name, in fp32. bare: the model without weights.

    None for another family, or where a parameter is not in the file as the model has it. Raises ModelError where a
    layer in the file has a tensor that the model has not.
    """
    reader = gguf.GGUFReader(file)
    family = str(reader.fields["general.architecture"].contents())
    if family not in FAMILIES:
        return None
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    found = {name: theirs.get(names.get_name(name, (".weight", ".bias"))) for name, _ in bare.named_parameters()}
    sizes = {name: list(weight.shape) for name, weight in bare.named_parameters()}
    if any(tensor is None or tensor.shape.tolist()[::-1] != sizes[name] for name, tensor in found.items()):
        return None
    used = {tensor.name for tensor in found.values() if tensor is not None}
    if left := sorted(name for name in theirs if name.startswith("blk.") and name not in used):
        what = (
            f"{file}: {len(left)} of its tensors have no place in the model that its header describes, first {left[0]}"
        )
        raise ModelError(what, fix="fetch it again")
    return ((name, _read(tensor, family, config)) for name, tensor in found.items())


def _read(tensor: Any, family: str, config: Any) -> Tensor:
    values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    part = tensor.name.split(".")[-2]
    if family == "llama" and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        pairs = values.view(heads, len(values) // heads // 2, 2, *values.shape[1:])
        return pairs.transpose(1, 2).reshape(values.shape)
    return values - 1 if family.startswith("gemma") and part.endswith("norm") else values
