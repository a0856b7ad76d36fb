"""What llama.cpp wants to know of each model family, and how it wants the tensors. Nothing is guessed: a setting that
llama.cpp has no field for is refused.

Checked against llama.cpp at 0c1e57098 (in llama-cpp-python 0.3.36): its loaders under src/models/ read these keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from strop.errors import ModelError


@dataclass(frozen=True)
class Family:
    """arch: llama.cpp's name. permutes: rows of q and k lie in pairs there. norm_offset: what is added to norm weights.

    window_pattern: every how many layers one attends to everything, where the others have a window; 0: no windows.
    double_scale_layers: models of this depth scale attention by hidden size / heads rather than by head size.
    """

    arch: gguf.MODEL_ARCH
    activation: str = "silu"
    permutes: bool = False
    norm_offset: float = 0.0
    window_pattern: int = 0
    double_scale_layers: int = 0
    ropes: tuple[str, ...] = ("default", "linear", "yarn")


_GEMMA: dict[str, Any] = {"activation": "gelu_pytorch_tanh", "norm_offset": 1.0}
FAMILIES = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, permutes=True, ropes=("default", "linear", "yarn", "llama3")),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, permutes=True),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3),
    "gemma2": Family(gguf.MODEL_ARCH.GEMMA2, window_pattern=2, double_scale_layers=46, ropes=("default",), **_GEMMA),
    "gemma3_text": Family(
        gguf.MODEL_ARCH.GEMMA3, window_pattern=6, double_scale_layers=62, ropes=("default", "linear"), **_GEMMA
    ),
    "phi3": Family(gguf.MODEL_ARCH.PHI3, ropes=("default", "longrope")),
}


class GgufLayout:
    """One model's tensors and settings as llama.cpp has them. Raises ModelError for what it has no place for."""

    def __init__(self, config: Any) -> None:
        kind = str(config.model_type)
        if kind not in FAMILIES:
            raise ModelError(f"GGUF: no exporter for {kind} models", fix="use strop merge")
        self.config = config
        self.family = FAMILIES[kind]
        self.arch: str = gguf.MODEL_ARCH_NAMES[self.family.arch]
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.notes: list[str] = []
        self._names = gguf.get_tensor_name_map(self.family.arch, config.num_hidden_layers)
        self._ropes = _ropes(config)
        self._check()

    def _check(self) -> None:
        config, family = self.config, self.family
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation != family.activation:
            self._refuse("activation", activation)
        for rope in self._ropes.values():
            if rope["rope_type"] not in family.ropes:
                self._refuse("rope scaling", rope["rope_type"])
        if self._ropes.get("sliding_attention", {"rope_type": "default"})["rope_type"] != "default":
            self._refuse("rope scaling of sliding layers", self._ropes["sliding_attention"]["rope_type"])
        windows = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()]
        if family.window_pattern:
            expected = [(layer + 1) % family.window_pattern != 0 for layer in range(config.num_hidden_layers)]
            if windows != expected:
                self._refuse("order of layers with a window", "layer_types")
            self._check_attention_scale()
        elif config.model_type in ("qwen2", "qwen3") and any(windows):
            self._refuse("sliding window", config.sliding_window)
        window = getattr(config, "sliding_window", None)
        if not family.window_pattern and config.model_type in ("mistral", "phi3") and window:
            self.notes.append(
                f"llama.cpp gives this family no sliding window: past {window} tokens it attends further back"
            )

    def _check_attention_scale(self) -> None:
        config = self.config
        own = config.hidden_size // config.num_attention_heads
        expected = own if config.num_hidden_layers == self.family.double_scale_layers else self.head_dim
        if config.query_pre_attn_scalar != expected:
            self._refuse("query_pre_attn_scalar", config.query_pre_attn_scalar)

    def _refuse(self, what: str, value: object) -> None:
        raise ModelError(
            f"GGUF: llama.cpp's {self.arch} has no place for this model's {what} ({value})", fix="use strop merge"
        )

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Writes the model's settings."""
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
        if self.family.window_pattern:
            writer.add_sliding_window(config.sliding_window)
            for cap, add in (
                ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
                ("final_logit_softcapping", writer.add_final_logit_softcapping),
            ):
                if getattr(config, cap, None):
                    add(getattr(config, cap))
            if "sliding_attention" in self._ropes:
                writer.add_rope_freq_base_swa(self._ropes["sliding_attention"]["rope_theta"])
        elif config.model_type == "phi3":
            writer.add_sliding_window(config.sliding_window or 0)  # 0 tells Phi-4 from Phi-3
        self._describe_rope(writer, rope)

    def _describe_rope(self, writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
        kind = rope["rope_type"]
        original = rope.get("original_max_position_embeddings") or getattr(
            self.config, "original_max_position_embeddings", self.config.max_position_embeddings
        )
        if kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            odd = {"attention_factor", "mscale", "mscale_all_dim"} & {key for key, value in rope.items() if value}
            odd |= {"truncate: false"} if not rope.get("truncate", True) else set()  # llama.cpp always rounds the range
            if odd:
                self._refuse("rope scaling", f"yarn with {min(odd)}")
            writer.add_rope_scaling_orig_ctx_len(original)
            writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
            writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)
        if self.config.model_type == "phi3":
            writer.add_rope_scaling_orig_ctx_len(original)
        if kind == "longrope":
            stretch = self.config.max_position_embeddings / original
            factor = rope.get("attention_factor")
            if factor is None:  # as transformers and the model's own code have it
                factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
            writer.add_rope_scaling_attn_factors(factor)

    def extra_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that are settings in the config: how much each rope frequency is slowed down."""
        rope = self._ropes["full_attention"]
        if rope["rope_type"] == "llama3":
            yield "rope_freqs.weight", _llama3_factors(rope, self.head_dim)
        elif rope["rope_type"] == "longrope":
            for length in ("long", "short"):
                yield f"rope_factors_{length}.weight", torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)

    def name(self, tensor: str) -> str | None:
        """llama.cpp's name of a tensor; None for one that it does not store. Raises ModelError for an unknown one."""
        if tensor == "lm_head.weight" and self.config.tie_word_embeddings:
            return None
        if tensor.endswith("rotary_emb.inv_freq"):
            return None
        found: str | None = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            self._refuse("tensor", tensor)
        return found

    def arrange(self, tensor: str, weight: Tensor) -> Tensor:
        """A weight as llama.cpp has it; a LoRA B matrix is arranged like the weight it adds to."""
        if self.family.norm_offset and tensor.endswith("norm.weight"):
            return weight.float() + self.family.norm_offset
        if self.family.permutes:
            module = tensor.rpartition(".")[0].rpartition(".")[2]
            if module == "q_proj":
                return interleave_heads(weight, self.config.num_attention_heads)
            if module == "k_proj":
                return interleave_heads(weight, self.config.num_key_value_heads)
        return weight


def interleave_heads(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head as (first half, second half), which transformers rotates, laid in pairs, as llama.cpp does."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """The rope settings of layers with full attention, and of those with a window where they have their own."""
    found = dict(config.rope_parameters)
    per_kind = found if "full_attention" in found else {"full_attention": found}
    return {kind: {"rope_type": "default", **settings} for kind, settings in per_kind.items() if settings}


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """By what each frequency is divided (Llama 3.1): short waves by 1, long ones by the factor, smoothly between."""
    wave = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((original / wave - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - share) / factor + share)
    return factors


# ---- from strop.models.families.gguf_weights ----
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


def read_gguf_tensors(file: Path, bare: nn.Module, config: Any) -> Iterator[tuple[str, Tensor]] | None:
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
