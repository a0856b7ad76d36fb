"""Read and write the tensors and settings of GGUF files in llama.cpp's layout."""

# llama.cpp interleaves the rows of Llama's q and k, and adds 1 to Gemma's norms; `families.table` has the differences.

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from strop.errors import ModelError
from strop.models.families.table import FAMILIES, Family, GgufFormat, find_gguf_family


def read_gguf_tensors(file: Path, meta_model: nn.Module, config: Any) -> Iterator[tuple[str, Tensor]] | None:
    """Return an iterator over (parameter name, fp32 tensor), dequantized one at a time, or None."""
    # None: the family is not supported, or the file lacks a parameter. Surplus layer tensors raise ModelError.
    reader = gguf.GGUFReader(file)
    found = find_gguf_family(str(reader.fields["general.architecture"].contents()))
    if found is None or found[1].gguf is None or not found[1].gguf.reads_weights:
        return None
    family = found[1]
    names = gguf.get_tensor_name_map(_model_arch(found[1].gguf), config.num_hidden_layers)
    in_file = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: list(weight.shape) for name, weight in meta_model.named_parameters()}
    tensors = {name: in_file.get(names.get_name(name, (".weight", ".bias"))) for name in shapes}
    if any(tensor is None or tensor.shape.tolist()[::-1] != shapes[name] for name, tensor in tensors.items()):
        return None
    used = {tensor.name for tensor in tensors.values() if tensor is not None}
    if unused := sorted(name for name in in_file if name.startswith("blk.") and name not in used):
        what = f"{len(unused)} tensors are not part of the model described by its header"
        raise ModelError(f"{file}: {what}, first {unused[0]}", fix="download it again")
    return ((name, _read_tensor(tensor, family, config)) for name, tensor in tensors.items())


def _read_tensor(tensor: Any, family: Family, config: Any) -> Tensor:
    """Dequantize a tensor and undo llama.cpp's layout."""
    assert family.gguf is not None
    values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    part = tensor.name.split(".")[-2]
    if family.gguf.permutes and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        pairs = values.view(heads, len(values) // heads // 2, 2, *values.shape[1:])
        return pairs.transpose(1, 2).reshape(values.shape)
    return values - family.norm_offset if family.norm_offset and part.endswith("norm") else values


def _model_arch(gguf_format: GgufFormat) -> Any:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == gguf_format.arch)


class GgufLayout:
    """Write one model's settings, and map its tensors to llama.cpp's names and layout, or raise ModelError."""

    def __init__(self, config: Any) -> None:
        family = FAMILIES.get(str(config.model_type))
        if family is None or family.gguf is None:
            raise ModelError(f"GGUF: no exporter for {config.model_type} models", fix="use strop merge")
        self.config = config
        self.family, self._format = family, family.gguf
        self.arch = self._format.arch
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.notes: list[str] = []
        self._names = gguf.get_tensor_name_map(_model_arch(self._format), config.num_hidden_layers)
        parameters = dict(config.rope_parameters)  # of full-attention and, if they differ, of sliding-window layers
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
        if self._ropes.get("sliding_attention", {"rope_type": "default"})["rope_type"] != "default":
            self._refuse("rope scaling of sliding layers", self._ropes["sliding_attention"]["rope_type"])
        is_sliding = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()]
        if gguf_format.sliding_window == "pattern":
            pattern = gguf_format.window_pattern
            if is_sliding != [(layer + 1) % pattern != 0 for layer in range(config.num_hidden_layers)]:
                self._refuse("order of sliding-window layers", "layer_types")
            per_head = config.hidden_size // config.num_attention_heads
            expected = per_head if config.num_hidden_layers == gguf_format.double_scale_layers else self.head_dim
            if config.query_pre_attn_scalar != expected:
                self._refuse("query_pre_attn_scalar", config.query_pre_attn_scalar)
        elif gguf_format.sliding_window == "refused" and any(is_sliding):
            self._refuse("sliding window", config.sliding_window)
        window = getattr(config, "sliding_window", None)
        if gguf_format.sliding_window == "ignored" and window:
            note = f"after {window} tokens it attends further back"
            self.notes.append(f"llama.cpp has no sliding window for this family: {note}")

    def _refuse(self, what: str, value: object) -> None:
        problem = f"GGUF: llama.cpp's {self.arch} does not support this model's {what} ({value})"
        raise ModelError(problem, fix="use strop merge")

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        rope = self._ropes["full_attention"]
        writer.add_rope_dimension_count(int(self.head_dim * rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(rope["rope_theta"])
        if self._format.sliding_window == "pattern":
            writer.add_sliding_window(config.sliding_window)
            for cap, add in (
                ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
                ("final_logit_softcapping", writer.add_final_logit_softcapping),
            ):
                if getattr(config, cap, None):
                    add(getattr(config, cap))
            if "sliding_attention" in self._ropes:
                writer.add_rope_freq_base_swa(self._ropes["sliding_attention"]["rope_theta"])
        elif self.arch == "phi3":
            writer.add_sliding_window(config.sliding_window or 0)  # 0 marks Phi-4 in llama.cpp
        self._write_rope(writer, rope)

    def _write_rope(self, writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
        rope_type = rope["rope_type"]
        field, longest = "original_max_position_embeddings", self.config.max_position_embeddings
        original = rope.get(field) or getattr(self.config, field, longest)
        if rope_type in ("linear", "yarn"):
            is_linear = rope_type == "linear"
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if is_linear else gguf.RopeScalingType.YARN)
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
            scaling = self.config.max_position_embeddings / original
            factor = rope.get("attention_factor")
            if factor is None:  # the default in transformers and in the model's own code
                factor = math.sqrt(1 + math.log(scaling) / math.log(original)) if scaling > 1 else 1.0
            writer.add_rope_scaling_attn_factors(factor)

    def extra_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors for settings that transformers keeps in the config: the divisors of the rope frequencies."""
        rope = self._ropes["full_attention"]
        if rope["rope_type"] == "llama3":
            yield "rope_freqs.weight", _llama3_factors(rope, self.head_dim)
        elif rope["rope_type"] == "longrope":
            for length in ("long", "short"):
                yield f"rope_factors_{length}.weight", torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)

    def name(self, tensor: str) -> str | None:
        """Return llama.cpp's name of a tensor; None if it stores none. Raises ModelError if it is unknown."""
        if tensor == "lm_head.weight" and self.config.tie_word_embeddings:
            return None
        if tensor.endswith("rotary_emb.inv_freq"):
            return None
        name: str | None = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if name is None:
            self._refuse("tensor", tensor)
        return name

    def convert(self, tensor: str, weight: Tensor) -> Tensor:
        """Return a weight in llama.cpp's layout; a LoRA B matrix has the layout of the adapted weight."""
        if self.family.norm_offset and tensor.endswith("norm.weight"):
            return weight.float() + self.family.norm_offset
        if self._format.permutes:
            module = tensor.rpartition(".")[0].rpartition(".")[2]
            if module == "q_proj":
                return interleave_heads(weight, self.config.num_attention_heads)
            if module == "k_proj":
                return interleave_heads(weight, self.config.num_key_value_heads)
        return weight


def interleave_heads(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from transformers' rotary layout (halves) to llama.cpp's (interleaved pairs)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Return the divisor of each frequency (Llama 3.1): 1 for short waves, the factor for long ones, smooth between."""
    wave = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((original / wave - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - share) / factor + share)
    return factors
