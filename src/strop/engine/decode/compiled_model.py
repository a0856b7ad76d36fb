"""A model in the form that the decoding kernels take: its own weights in place, the adapters in contiguous copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from strop.engine.decode.cache import BLOCK_SIZE
from strop.engine.decode.exact_argmax import ExactArgmax, exact_argmax_for
from strop.engine.decode.sampling import PassOutput
from strop.engine.kernels.dispatch import decode_kernels
from strop.engine.layers import DecoderLayers, NormSpec, activation_parameters
from strop.engine.train.linear import Quantized
from strop.engine.train.peft_modules import base_of
from strop.machine.malloc import own_pages
from strop.models.families.layers import ACTIVATIONS


class CompiledModel:
    """The forward pass of a model on a CPU, in fp32 or bf16, with a paged KV cache.

    num_blocks: of the cache. adapters: names of the LoRA adapters, whose weights are copied. warm: compile the kernels
    in another process first.
    """

    def __init__(self, layers: DecoderLayers, num_blocks: int, adapters: Sequence[str], *, warm: bool = True) -> None:
        self._kernels: Any = decode_kernels(layers.head.weight.dtype if warm else None)
        self._layers = layers
        self._half = layers.head.weight.dtype == torch.bfloat16
        self._dtype = activation_dtype(layers.head.weight.dtype)
        self._num_threads = torch.get_num_threads()
        parts = [layers.part(number) for number in range(len(layers))]
        self._rope_kinds = [part.rope for part in parts]
        self._act = self._kernels.KINDS[ACTIVATIONS[parts[0].activation]]
        width = padded_head_size(parts[0].size)
        shape = (num_blocks, parts[0].key_value, BLOCK_SIZE, width)
        self._keys, self._values = ([_lazy_zeros(shape, self._dtype) for _ in parts] for _ in range(2))
        self._cache = [(_array(k), _array(v)) for k, v in zip(self._keys, self._values, strict=True)]
        self._norm = self._build_norm(layers.norm)
        self._head = self._kernels.Dense(_array(layers.head.weight.data))
        self._logits = np.empty((0, 0), np.float32)
        self._query_width = parts[0].query * width
        self._adapters = list(adapters)
        self._built = [self._build_layer(part) for part in parts]
        heads = [layer.shape.query * layer.shape.size for layer in self._built]
        inner = [layer.inner for layer in self._built]
        self._max_width = max(layers.config.hidden_size, *heads, *inner)
        linears = [linear for layer in self._built for linear in layer[:4]]
        self._max_outputs = max(sum(_num_outputs(weight) for weight in linear.weights) for linear in linears)
        self._max_rank = max(int(linear.rows[:, 1].max(initial=0)) for linear in linears)
        packed = [weight for linear in linears for weight in linear.weights if hasattr(weight, "code")]
        multiplies_int8 = self._kernels.INT8_DOTS and self._dtype == torch.bfloat16
        int8 = [weight for weight in packed if multiplies_int8 and weight.w.dtype == np.int8]
        self._quantizes_inputs = int(len(int8) > 0)
        self.unpacks_weights = len(int8) < len(packed)  # other quantized weights are dequantized for each product
        self._num_rows, self._buffers, self._num_positions = 0, None, 0
        self._exact_argmax = self._make_exact_argmax(layers)

    def __call__(self, ids: Any, rows: tuple[Any, ...], num_positions: int, picked: Any, *, logits: bool) -> PassOutput:
        """Run the forward pass.

        Args:
            ids: token ids of all rows, (T,), int64.
            rows: the fields of decode_layer.Rows.
            num_positions: largest position of a row + 1.
            picked: the rows that give outputs, (P,).
            logits: whether logits are needed; if not, the output may have the argmax only.
        """
        kernels, layers = self._kernels, self._layers
        self._extend_rope(num_positions)
        self._reserve_rows(len(ids))
        hidden = layers.embedded(torch.from_numpy(ids)).float().contiguous().numpy()
        if layers.family.embedding_norm:
            kernels.add_residual(self._norm, hidden.copy(), np.float32(1.0), np.zeros_like(hidden), hidden)
        for layer in self._layers_with_cache:
            kernels.layer_forward(layer, self._buffers, hidden, *rows, self._num_threads)
        if not len(picked):
            return PassOutput(np.empty(0, np.int64), np.empty(0, np.bool_))
        z = _array(torch.empty(len(picked), hidden.shape[1], dtype=self._dtype))
        kernels.norm_input(self._norm, hidden[picked], z)
        if not logits and self._exact_argmax is not None and (argmax := self._exact_argmax.argmax(z)) is not None:
            return PassOutput(argmax, np.ones(len(argmax), np.bool_))
        if len(picked) > len(self._logits):  # reused: fresh memory takes as long as computing the logits
            self._logits = np.empty((len(picked), len(self._head.w)), np.float32)
        all_logits = self._logits[: len(picked)]
        kernels.dense_matmul(self._head, z, all_logits, self._num_threads)
        return PassOutput.from_logits(self._transform_logits(all_logits))

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block of the cache, in all layers."""
        for part in (*self._keys, *self._values):
            part[target] = part[source]

    def _transform_logits(self, logits: Any) -> Any:
        """Apply the scale, the bias and the softcap of the head."""
        layers = self._layers
        if layers.logits_scale != 1:
            logits *= np.float32(layers.logits_scale)
        if layers.head.bias is not None:
            logits += layers.head.bias.detach().float().numpy()
        if layers.softcap:
            logits = np.tanh(logits / np.float32(layers.softcap)) * np.float32(layers.softcap)
        return logits

    def _make_exact_argmax(self, layers: DecoderLayers) -> ExactArgmax | None:
        weights = [weight for layer in self._built for linear in layer[:4] for weight in linear.weights]
        num_bytes = sum(weight.w.nbytes + getattr(weight, "scale", weight.w[:0]).nbytes for weight in weights)
        z = np.empty(0, np.uint16 if self._dtype == torch.bfloat16 else np.float32)
        return exact_argmax_for(layers.head, self._head.w, z, layers.logits_scale, layers.softcap, num_bytes)

    def _reserve_rows(self, count: int) -> None:
        """Allocate the buffers of a pass over `count` rows."""
        if count > self._num_rows:
            self._num_rows = count
            buffers = self._kernels.Buffers(
                z=_array(torch.zeros(count * self._max_width, dtype=self._dtype)),
                q=_array(torch.zeros(count * self._query_width, dtype=self._dtype)),
                y=np.zeros(count * self._max_outputs, np.float32),
                u=np.zeros(count * max(self._max_rank, 1), np.float32),
                like=np.empty(0, np.uint16 if self._half else np.float32),
                x=torch.zeros(count * self._max_width * self._quantizes_inputs, dtype=torch.int16).numpy(),
                scales=np.zeros(count * self._quantizes_inputs, np.float32),
            )
            self._buffers = self._kernels.BuffersRef(buffers)

    def _extend_rope(self, num_positions: int) -> None:
        """Make the tables of the rotary embedding cover `num_positions`."""
        if num_positions <= self._num_positions:
            return
        self._num_positions = max(512, 2 * num_positions)
        at = torch.arange(self._num_positions)
        scale = self._layers.family.query_scale
        factor = torch.empty(0) if scale is None else scale(self._layers.config, at).float()
        tables = {
            kind: self._kernels.RopeTables(_array(cos.float()), _array(sin.float()), _array(factor))
            for kind, (cos, sin) in self._layers.angles(at).items()
        }
        self._layers_with_cache = [
            self._kernels.LayerRef(layer._replace(rope=tables[kind]), *cache)
            for layer, kind, cache in zip(self._built, self._rope_kinds, self._cache, strict=True)
        ]

    def _build_norm(self, part: NormSpec | None) -> Any:
        empty = np.empty(0, np.float32)
        if part is None:
            return self._kernels.Norm(0, empty, empty, np.float32(0.0))
        weight = _array(part.weight.float() + part.offset)
        bias = empty if part.bias is None else _array(part.bias.float())
        return self._kernels.Norm(2 if part.centered else 1, weight, bias, np.float32(part.eps))

    def _build_layer(self, part: Any) -> Any:
        fused = self._layers.family.fused_heads
        size, heads = part.size, part.query
        shape = self._kernels.Shape(
            query=heads, key_value=part.key_value, size=size,
            k_at=size if fused else heads * size,
            v_at=2 * size if fused else (heads + part.key_value) * size,
            step=3 * size if fused else size,
            neighbours=self._layers.family.pairs == "neighbours",
            turned_first=self._layers.family.turned_first,
            window=part.window, scale=np.float32(part.scale), softcap=np.float32(part.softcap),
        )  # fmt: skip
        inner, gated = base_of(part.down[0]).in_features, self._layers.family.gated
        return self._kernels.Layer(
            *(self._build_linear(modules) for modules in (part.qkv, part.o, part.gate_up, part.down)),
            before_attention=self._build_norm(part.before_attention),
            q_norm=self._build_norm(part.q_norm),
            k_norm=self._build_norm(part.k_norm),
            after_attention=self._build_norm(part.after_attention),
            before_mlp=self._build_norm(part.before_mlp),
            after_mlp=self._build_norm(part.after_mlp),
            shape=shape, rope=None, inner=inner, gated=gated, act=self._act,
            about=tuple(map(np.float32, activation_parameters(part.act))), parallel=self._layers.parallel,
            scale=np.float32(self._layers.residual_scale),
        )  # fmt: skip

    def _build_linear(self, modules: list[Any]) -> Any:
        bases = [base_of(module) for module in modules]
        kinds = {(type(base), getattr(base, "scheme", None)) for base in bases}
        weights = tuple(self._build_weight(base, dequantize=len(kinds) > 1) for base in bases)
        bias = np.empty(0, np.float32)
        if any(base.bias is not None for base in bases):
            bias = np.concatenate([
                np.zeros(base.out_features, np.float32) if base.bias is None else base.bias.detach().float().numpy()
                for base in bases
            ])  # fmt: skip
        return self._kernels.Linear(weights, bias, *self._build_adapters(modules, bases))

    def _build_adapters(self, modules: list[Any], bases: list[Any]) -> tuple[Any, ...]:
        """Return the fields a, rows, b, spans and gains of a kernel's Linear: the adapters of fused linear layers."""
        a, b, spans, rows = [], [], [], np.zeros((len(self._adapters), 2), np.int64)
        num_outputs = sum(base.out_features for base in bases)
        gains, offset, num_rows = None, 0, 0
        for adapter, name in enumerate(self._adapters):
            column, first = 0, 0
            for module, base in zip(modules, bases, strict=True):
                width = base.out_features
                if isinstance(module, LoraLayer) and name in module.lora_A:
                    down, up = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
                    a.append(down.to(self._dtype))
                    b.append((up.float().t() * float(module.scaling[name])).contiguous().flatten())
                    spans.append((adapter, first, len(down), column, width, offset))
                    first, offset = first + len(down), offset + up.numel()
                    if name in module.lora_magnitude_vector:
                        if gains is None:
                            gains = np.ones((len(self._adapters), num_outputs), np.float32)
                        gains[adapter, column : column + width] = _dora_gains(module, name, base)
                column += width
            rows[adapter], num_rows = (num_rows, first), num_rows + first
        k = bases[0].in_features
        return (
            _array(torch.cat(a) if a else torch.empty(0, k, dtype=self._dtype)),
            rows,
            _array(torch.cat(b) if b else torch.empty(0)),
            np.array(spans, np.int64).reshape(-1, 6),
            np.empty((0, 0), np.float32) if gains is None else gains,
        )

    def _build_weight(self, base: Any, *, dequantize: bool) -> Any:
        if not isinstance(base, Quantized):
            return self._kernels.Dense(_array(base.weight.data))
        packed = None if dequantize else base.packed()
        if packed is None:
            return self._kernels.Dense(_array(base.dequantized()))
        weight, scale = _array(packed.weight.flatten()), _array(packed.scale)
        n = len(weight) * (1 if packed.code is None else 2) // base.in_features
        if packed.code is None:
            return self._kernels.Quantized(weight, scale, np.empty(0, np.float32), base.in_features, n)
        return self._kernels.Quantized(weight, scale, _array(packed.code), packed.share, n)


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of matmul inputs and the cache: bf16 if the weights are and the CPU multiplies it, else fp32."""
    return torch.bfloat16 if dtype == torch.bfloat16 and decode_kernels().HAS_BF16 else torch.float32


def padded_head_size(size: int) -> int:
    """Return the values that a head takes in the cache: a multiple of the vector length."""
    lanes: int = decode_kernels().LANES
    return -(-size // lanes) * lanes


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros that take no memory until they are written (torch.zeros writes them all)."""
    return torch.frombuffer(own_pages(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def _array(x: Tensor) -> Any:
    x = x.detach().contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _num_outputs(weight: Any) -> int:
    return int(weight.n if hasattr(weight, "n") else len(weight.w))


def _dora_gains(module: Any, name: str, base: Any) -> Any:
    """Return DoRA's m / |W + s B A| for each output."""
    weight = (base.dequantized() if isinstance(base, Quantized) else base.weight).detach().float()
    down, up = module.lora_A[name].weight.detach().float(), module.lora_B[name].weight.detach().float()
    norm = torch.linalg.vector_norm(weight + float(module.scaling[name]) * (up @ down), dim=1)
    return (module.lora_magnitude_vector[name].weight.detach().float() / norm).numpy()
