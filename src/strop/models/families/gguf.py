"""Read and write the tensors and settings of GGUF files in llama.cpp's layout."""

# llama.cpp interleaves the rows of Llama's q and k, and adds 1 to Gemma's norms; see GgufFormat in `families.table`.

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import gguf
import torch
from torch import Tensor, nn

from strop.errors import ModelError
from strop.models.families.gguf_header import GgufReader
from strop.models.families.table import FAMILIES, Family, GgufFormat, find_gguf_family

DEQUANTIZED_AT_ONCE = 1 << 22  # weights


def read_gguf_tensors(
    file: Path, meta_model: nn.Module, config: Any, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]] | None:
    """Return an iterator over (parameter name, dequantized tensor), read one at a time, or None if unsupported."""
    # None: strop does not read the family's weights, or a parameter is missing. Raises ModelError for unused tensors.
    reader = GgufReader(file)
    _, family = find_gguf_family(str(reader.fields["general.architecture"].contents())) or ("", Family())
    if family.gguf is None or not family.gguf.reads_weights:
        return None
    names = gguf.get_tensor_name_map(_model_arch(family.gguf), config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: list(weight.shape) for name, weight in meta_model.named_parameters()}
    tensors = {name: stored.get(names.get_name(name, (".weight", ".bias"))) for name in shapes}
    if any(tensor is None or tensor.shape.tolist()[::-1] != shapes[name] for name, tensor in tensors.items()):
        return None
    used = {tensor.name for tensor in tensors.values() if tensor is not None}
    if unused := sorted(name for name in stored if name.startswith("blk.") and name not in used):
        what = f"{len(unused)} tensors are not part of the model described by its header"
        raise ModelError(f"{file}: {what}, first {unused[0]}", fix="download it again")
    return ((name, _read_tensor(tensor, family, config, dtype)) for name, tensor in tensors.items())


def _read_tensor(tensor: Any, family: Family, config: Any, dtype: torch.dtype) -> Tensor:
    """Return a tensor dequantized, in transformers' layout."""
    assert family.gguf is not None
    module = tensor.name.split(".")[-2]
    offset = family.norm_offset if module.endswith("norm") else 0
    values = torch.empty(tensor.shape.tolist()[::-1], dtype=dtype)
    rows = max(1, DEQUANTIZED_AT_ONCE * len(tensor.data) // tensor.n_elements)
    for row in range(0, len(tensor.data), rows):  # a whole embedding in fp32 can be larger than all weights in 16 bit
        block = gguf.quants.dequantize(tensor.data[row : row + rows], tensor.tensor_type)
        values[row : row + rows] = torch.from_numpy(block - offset)
    if family.gguf.permutes and module in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if module == "attn_q" else config.num_key_value_heads
        pairs = values.view(heads, len(values) // heads // 2, 2, *values.shape[1:])
        return pairs.transpose(1, 2).reshape(values.shape)
    return values


def _model_arch(gguf_format: GgufFormat) -> Any:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == gguf_format.arch)


class GgufLayout:
    """Write a model's GGUF metadata, and convert tensor names and weights. Raises ModelError if it is unsupported."""

    def __init__(self, config: Any) -> None:
        family = FAMILIES.get(str(config.model_type))
        if family is None or family.gguf is None:
            raise ModelError(f"GGUF: no exporter for {config.model_type} models", fix="use `strop merge`")
        self.config = config
        self.family, self._format = family, family.gguf
        self.arch = self._format.arch
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.notes: list[str] = []
        self._names = gguf.get_tensor_name_map(_model_arch(self._format), config.num_hidden_layers)
        parameters = dict(config.rope_parameters)  # by layer type, if full-attention and sliding-window layers differ
        by_layer_type = parameters if "full_attention" in parameters else {"full_attention": parameters}
        self._ropes: dict[str, dict[str, Any]] = {
            kind: {"rope_type": "default", **settings} for kind, settings in by_layer_type.items() if settings
        }
        self._check()

    def _check(self) -> None:
        config, gguf_format = self.config, self._format
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation != gguf_format.activation:
            self._refuse("activation", activation)
        for rope in self._ropes.values():
            if rope["rope_type"] not in gguf_format.ropes:
                self._refuse("rope scaling", rope["rope_type"])
        sliding_rope = self._ropes.get("sliding_attention", {}).get("rope_type", "default")
        if sliding_rope != "default":
            self._refuse("rope scaling of sliding layers", sliding_rope)
        is_sliding = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()]
        if gguf_format.sliding_window == "pattern":
            pattern = gguf_format.window_pattern
            if is_sliding != [(layer + 1) % pattern != 0 for layer in range(config.num_hidden_layers)]:
                self._refuse("order of sliding-window layers", "layer_types")
            is_hidden_scaled = config.num_hidden_layers == gguf_format.hidden_scaled_at_num_layers
            expected = config.hidden_size // config.num_attention_heads if is_hidden_scaled else self.head_dim
            if config.query_pre_attn_scalar != expected:
                self._refuse("query_pre_attn_scalar", config.query_pre_attn_scalar)
        elif gguf_format.sliding_window == "refused" and any(is_sliding):
            self._refuse("sliding window", config.sliding_window)
        window = getattr(config, "sliding_window", None)
        if gguf_format.sliding_window == "ignored" and window:
            note = f"beyond {window} tokens its attention also covers earlier tokens"
            self.notes.append(f"llama.cpp has no sliding window for this family: {note}")

    def _refuse(self, what: str, value: object) -> None:
        problem = f"GGUF: llama.cpp's {self.arch} does not support this model's {what} ({value})"
        raise ModelError(problem, fix="use `strop merge`")

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        config = self.config
        for add, field in (
            (writer.add_block_count, "num_hidden_layers"), (writer.add_context_length, "max_position_embeddings"),
            (writer.add_embedding_length, "hidden_size"), (writer.add_feed_forward_length, "intermediate_size"),
            (writer.add_head_count, "num_attention_heads"), (writer.add_head_count_kv, "num_key_value_heads"),
            (writer.add_layer_norm_rms_eps, "rms_norm_eps"), (writer.add_vocab_size, "vocab_size"),
        ):  # fmt: skip
            add(getattr(config, field))
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        rope = self._ropes["full_attention"]
        writer.add_rope_dimension_count(int(self.head_dim * rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(rope["rope_theta"])
        if self._format.sliding_window == "pattern":
            writer.add_sliding_window(config.sliding_window)
            if attention_cap := getattr(config, "attn_logit_softcapping", None):
                writer.add_attn_logit_softcapping(attention_cap)
            if final_cap := getattr(config, "final_logit_softcapping", None):
                writer.add_final_logit_softcapping(final_cap)
            if "sliding_attention" in self._ropes:
                writer.add_rope_freq_base_swa(self._ropes["sliding_attention"]["rope_theta"])
        elif self.arch == "phi3":
            writer.add_sliding_window(config.sliding_window or 0)  # 0 marks Phi-4 in llama.cpp
        self._write_rope(writer, rope)

    def _write_rope(self, writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
        rope_type = rope["rope_type"]
        field, context = "original_max_position_embeddings", self.config.max_position_embeddings
        original = rope.get(field) or getattr(self.config, field, context)
        if rope_type in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope_type))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope_type == "yarn":
            unsupported = {name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name)}
            unsupported |= set() if rope.get("truncate", True) else {"truncate: false"}  # llama.cpp always truncates
            if unsupported:
                self._refuse("rope scaling", f"yarn with {min(unsupported)}")
            writer.add_rope_scaling_orig_ctx_len(original)
            writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
            writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)
        if self.arch == "phi3":
            writer.add_rope_scaling_orig_ctx_len(original)
        if rope_type == "longrope":
            scaling = context / original
            factor = rope.get("attention_factor")
            if factor is None:  # the default in transformers and in the model's own code
                factor = math.sqrt(1 + math.log(scaling) / math.log(original)) if scaling > 1 else 1.0
            writer.add_rope_scaling_attn_factors(factor)

    def extra_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the divisors of the rope frequencies, which GGUF stores as tensors and transformers in the config."""
        rope = self._ropes["full_attention"]
        if rope["rope_type"] == "llama3":
            yield "rope_freqs.weight", _llama3_factors(rope, self.head_dim)
        elif rope["rope_type"] == "longrope":
            for length in ("long", "short"):
                yield f"rope_factors_{length}.weight", torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)

    def name(self, tensor: str) -> str | None:
        """Return llama.cpp's name of a tensor, or None for one that is not stored. Raises ModelError if unknown."""
        is_tied_head = tensor == "lm_head.weight" and self.config.tie_word_embeddings
        if is_tied_head or tensor.endswith("rotary_emb.inv_freq"):
            return None
        name: str | None = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if name is None:
            self._refuse("tensor", tensor)
        return name

    def convert(self, tensor: str, weight: Tensor) -> Tensor:
        """Return a weight, or the LoRA B matrix of a weight, in llama.cpp's layout."""
        if self.family.norm_offset and tensor.endswith("norm.weight"):
            return weight.float() + self.family.norm_offset
        if self._format.permutes:
            heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
            module = tensor.rpartition(".")[0].rpartition(".")[2]
            if module in heads:
                return interleave_heads(weight, heads[module])
        return weight


def interleave_heads(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head: transformers rotates rows i and i + n/2 together, llama.cpp rows 2i and 2i + 1."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Return the divisor of each rope frequency: 1 for short wavelengths, `factor` for long ones, smooth in between."""
    # As in transformers' _compute_llama3_parameters.
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return cast(Tensor, 1 / ((1 - smooth) / factor + smooth))
