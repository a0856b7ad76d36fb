"""The forward pass of a model on the decoding kernels. They use the model's own weights and copies of the adapters.

Greedy decoding does not compute all logits. Approximate logits from an int8 copy of the head select candidates, whose
exact logits are compared. The argmax is exact, because the error of the approximate logits is bounded, and all tokens
within the bound are candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from strop.engine.decode.cache import BLOCK_SIZE
from strop.engine.decode.sampling import PassOutput
from strop.engine.kernels.dispatch import decode_kernels, sampling_kernels
from strop.engine.layers import DecoderLayers, LayerSpec, NormSpec, activation_parameters
from strop.engine.train.peft_modules import base_module
from strop.machine.memory import map_pages
from strop.models.families.layers import ACTIVATIONS
from strop.models.quantize import QuantizedLinear

NUM_WEIGHTS = 3  # of a fused linear layer: those of q, k and v
MIN_HEAD_SHARE = 0.1  # minimum share of the head in the bytes read per token for which ExactArgmax is faster
PAUSE_PASSES = 16  # number of passes with full logits after a pass with too many candidates
_CHUNK_ELEMENTS = 1 << 20  # elements of the head that are quantized at a time


class CompiledModel:
    """The forward pass of a model on a CPU, in fp32 or bf16, with a paged KV cache.

    num_blocks: number of cache blocks. adapters: names of the LoRA adapters. warm: compile the kernels ahead of time in
    another process.
    """

    def __init__(self, layers: DecoderLayers, num_blocks: int, adapters: Sequence[str], *, warm: bool = True) -> None:
        self._kernels: Any = decode_kernels(layers.head.weight.dtype if warm else None)
        self._layers = layers
        self._has_bf16_weights = layers.head.weight.dtype == torch.bfloat16
        self._dtype = activation_dtype(layers.head.weight.dtype)
        self._num_threads = torch.get_num_threads()
        specs = [layers.layer_spec(number) for number in range(len(layers))]
        self._rope_kinds = [spec.rope for spec in specs]
        self._act = self._kernels.KINDS[ACTIVATIONS[specs[0].activation]]
        width = padded_head_size(specs[0].size)
        shape = (num_blocks, specs[0].num_kv_heads, BLOCK_SIZE, width)
        self._keys, self._values = ([_lazy_zeros(shape, self._dtype) for _ in specs] for _ in range(2))
        self._cache = [(_to_numpy(k), _to_numpy(v)) for k, v in zip(self._keys, self._values, strict=True)]
        self._norm = self._build_norm(layers.norm)
        self._head = self._kernels.Dense(_to_numpy(layers.head.weight.data))
        self._logits = np.empty((0, 0), np.float32)
        self._query_width = specs[0].num_query_heads * width
        self._adapters = list(adapters)
        self._kernel_layers = [self._build_layer(spec) for spec in specs]
        heads = [layer.shape.num_query_heads * layer.shape.size for layer in self._kernel_layers]
        inner = [layer.inner for layer in self._kernel_layers]
        self._max_width = max(layers.config.hidden_size, *heads, *inner)
        linears = [linear for layer in self._kernel_layers for linear in layer[:4]]
        self._max_outputs = max(sum(_num_outputs(weight) for weight in linear.weights) for linear in linears)
        self._max_rank = max(int(linear.rows[:, 1].max(initial=0)) for linear in linears)
        weights = [weight for linear in linears for weight in linear.weights]
        packed = [weight for weight in weights if hasattr(weight, "code")]
        multiplies_int8 = self._kernels.INT8_DOTS and self._dtype == torch.bfloat16
        int8 = [weight for weight in packed if multiplies_int8 and weight.w.dtype == np.int8]
        self._quantizes_inputs = int(len(int8) > 0)
        self.unpacks_weights = len(int8) < len(packed)  # other packed weights are dequantized in each matmul
        self._num_rows, self._buffers, self._num_positions, self._num_spare = 0, None, 0, 0
        z = np.empty(0, np.uint16 if self._dtype == torch.bfloat16 else np.float32)
        num_bytes = sum(weight.w.nbytes + getattr(weight, "scale", weight.w[:0]).nbytes for weight in weights)
        self._exact_argmax = exact_argmax_for(
            layers.head, self._head.w, z, layers.logits_scale, layers.softcap, num_bytes
        )  # fmt: skip

    def __call__(
        self, ids: Any, rows: tuple[Any, ...], num_positions: int, output_rows: Any, *, logits: bool,
        space: Any | None = None,
    ) -> PassOutput:  # fmt: skip
        """Run the forward pass.

        Args:
            ids: token ids of all rows, (T,), int64.
            rows: the fields of decode_layer.Rows, except for `angles`.
            num_positions: the largest position of a row + 1.
            output_rows: indices of the rows whose outputs are needed, (P,).
            logits: whether logits are needed. Otherwise the output may contain only the argmax.
            space: the positions of the rows in time, rows and columns, (3, T), int64, if they differ from `positions`.
        """
        kernels, layers = self._kernels, self._layers
        angles = rows[0] if space is None else space[0].copy()
        in_space = np.empty(0, np.int64) if space is None else np.flatnonzero((space != space[0]).any(0))
        self._extend_rope(num_positions, len(in_space))
        if space is not None and len(in_space):
            angles[in_space] = self._num_positions + np.arange(len(in_space))
            self._add_angles(torch.from_numpy(space[:, in_space]))
        self._reserve_rows(len(ids))
        embeddings, later = layers.embed(torch.from_numpy(ids))
        hidden = embeddings.float().contiguous().numpy()
        if layers.family.embedding_norm:
            kernels.add_residual(self._norm, hidden.copy(), np.float32(1.0), np.zeros_like(hidden), hidden)
        for number, layer in enumerate(self._layers_with_cache, 1):
            if layers.cycle is not None:
                layers.cycle(number - 1)
            kernels.layer_forward(layer, self._buffers, hidden, *rows, angles, self._num_threads)
            if number < len(later):
                hidden[later[0].numpy()] += later[number].float().numpy()
        if not len(output_rows):
            return PassOutput(np.empty(0, np.int64), np.empty(0, np.bool_))
        z = _to_numpy(torch.empty(len(output_rows), hidden.shape[1], dtype=self._dtype))
        kernels.norm_input(self._norm, hidden[output_rows], z)
        if not logits and self._exact_argmax is not None and (argmax := self._exact_argmax.argmax(z)) is not None:
            return PassOutput(argmax, np.ones(len(argmax), np.bool_))
        if len(output_rows) > len(self._logits):  # reused, because new memory takes as long as computing the logits
            self._logits = np.empty((len(output_rows), len(self._head.w)), np.float32)
        all_logits = self._logits[: len(output_rows)]
        kernels.dense_matmul(self._head, z, all_logits, self._num_threads)
        return PassOutput.from_logits(self._transform_logits(all_logits))

    def copy_block(self, source: int, target: int) -> None:
        for buffer in (*self._keys, *self._values):
            buffer[target] = buffer[source]

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

    def _reserve_rows(self, count: int) -> None:
        """Allocate the buffers for a pass over `count` rows."""
        if count > self._num_rows:
            self._num_rows = count
            buffers = self._kernels.Buffers(
                inputs=_to_numpy(torch.zeros(count * self._max_width, dtype=self._dtype)),
                queries=_to_numpy(torch.zeros(count * self._query_width, dtype=self._dtype)),
                outputs=np.zeros(count * self._max_outputs, np.float32),
                lora_a_outputs=np.zeros(count * max(self._max_rank, 1), np.float32),
                weight_like=np.empty(0, np.uint16 if self._has_bf16_weights else np.float32),
                quantized_inputs=_to_numpy(
                    torch.zeros(count * self._max_width * self._quantizes_inputs, dtype=torch.int16)
                ),
                input_scales=np.zeros(count * self._quantizes_inputs, np.float32),
            )
            self._buffers = self._kernels.BuffersRef(buffers)

    def _extend_rope(self, num_positions: int, num_spare: int) -> None:
        """Extend the tables of the rotary embedding to at least `num_positions`, followed by spare rows."""
        if num_positions <= self._num_positions and num_spare <= self._num_spare:
            return
        if num_positions > self._num_positions:
            self._num_positions = max(512, 2 * num_positions)
        if num_spare > self._num_spare:
            self._num_spare = 2 * num_spare
        positions = torch.arange(self._num_positions + self._num_spare)
        scale = self._layers.family.query_scale
        factor = torch.empty(0) if scale is None else scale(self._layers.config, positions).float()
        self._tables = tables = {
            kind: self._kernels.RopeTables(_to_numpy(cos.float()), _to_numpy(sin.float()), _to_numpy(factor))
            for kind, (cos, sin) in self._layers.angles(positions).items()
        }
        self._layers_with_cache = [
            self._kernels.LayerRef(layer._replace(rope=tables[kind]), *cache)
            for layer, kind, cache in zip(self._kernel_layers, self._rope_kinds, self._cache, strict=True)
        ]

    def _add_angles(self, positions: Tensor) -> None:
        """Write the angles of positions in space (3, n) to the first spare rows of the tables."""
        rows = slice(self._num_positions, self._num_positions + positions.shape[1])
        for kind, values in self._layers.angles(positions).items():
            for table, new in zip(self._tables[kind][:2], values, strict=True):
                table[rows] = new.float().numpy()

    def _build_norm(self, spec: NormSpec | None) -> Any:
        empty = np.empty(0, np.float32)
        if spec is None:
            return self._kernels.Norm(self._kernels.NO_NORM, empty, empty, np.float32(0.0))
        weight = _to_numpy(spec.weight.float() + spec.offset)
        bias = empty if spec.bias is None else _to_numpy(spec.bias.float())
        kind = self._kernels.LAYER_NORM if spec.centered else self._kernels.RMS_NORM
        return self._kernels.Norm(kind, weight, bias, np.float32(spec.eps))

    def _build_layer(self, spec: LayerSpec) -> Any:
        fused = self._layers.family.fused_heads
        size, heads = spec.size, spec.num_query_heads
        shape = self._kernels.Shape(
            num_query_heads=heads, num_kv_heads=spec.num_kv_heads, size=size,
            k_at=size if fused else heads * size,
            v_at=2 * size if fused else (heads + spec.num_kv_heads) * size,
            step=3 * size if fused else size,
            interleaved=self._layers.family.rope_pairs == "interleaved",
            rope_before_norm=self._layers.family.rope_before_norm,
            window=spec.window, scale=np.float32(spec.scale), softcap=np.float32(spec.softcap),
        )  # fmt: skip
        inner, gated = base_module(spec.down[0]).in_features, self._layers.family.gated
        return self._kernels.Layer(
            *(self._build_linear(modules) for modules in (spec.qkv, spec.o, spec.gate_up, spec.down)),
            before_attention=self._build_norm(spec.before_attention),
            q_norm=self._build_norm(spec.q_norm),
            k_norm=self._build_norm(spec.k_norm),
            after_attention=self._build_norm(spec.after_attention),
            before_mlp=self._build_norm(spec.before_mlp),
            after_mlp=self._build_norm(spec.after_mlp),
            shape=shape, rope=None, inner=inner, gated=gated, act=self._act,
            xielu_parameters=tuple(map(np.float32, activation_parameters(spec.act))), parallel=self._layers.parallel,
            scale=np.float32(self._layers.residual_scale),
        )  # fmt: skip

    def _build_linear(self, modules: list[Any]) -> Any:
        bases = [base_module(module) for module in modules]
        weight_types = {(type(base), getattr(base, "scheme", None)) for base in bases}
        weights = [self._build_weight(base, dequantize=len(weight_types) > 1) for base in bases]
        # All layers have as many weights, so that the kernels are compiled for one number of them.
        weights += [_without_rows(weights[0])] * (NUM_WEIGHTS - len(weights))
        bias = np.empty(0, np.float32)
        if any(base.bias is not None for base in bases):
            bias = np.concatenate([
                np.zeros(base.out_features, np.float32) if base.bias is None else base.bias.detach().float().numpy()
                for base in bases
            ])  # fmt: skip
        return self._kernels.Linear(tuple(weights), bias, *self._build_adapters(modules, bases))

    def _build_adapters(self, modules: list[Any], bases: list[Any]) -> tuple[Any, ...]:
        """Return the fields a, rows, b, spans and gains of decode_layer.Linear for fused linear layers."""
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
                        gains[adapter, column : column + width] = _compute_dora_gains(module, name, base)
                column += width
            rows[adapter], num_rows = (num_rows, first), num_rows + first
        k = bases[0].in_features
        return (
            _to_numpy(torch.cat(a) if a else torch.empty(0, k, dtype=self._dtype)),
            rows,
            _to_numpy(torch.cat(b) if b else torch.empty(0)),
            np.array(spans, np.int64).reshape(-1, 6),
            np.empty((0, 0), np.float32) if gains is None else gains,
        )

    def _build_weight(self, base: Any, *, dequantize: bool) -> Any:
        if not isinstance(base, QuantizedLinear):
            return self._kernels.Dense(_to_numpy(base.weight.data))
        packed = None if dequantize else base.packed_weight()
        if packed is None:
            return self._kernels.Dense(_to_numpy(base.dequantize()))
        weight, scale = _to_numpy(packed.weight.flatten()), _to_numpy(packed.scale)
        n = len(weight) * (1 if packed.code is None else 2) // base.in_features
        if packed.code is None:
            return self._kernels.Quantized(weight, scale, np.empty(0, np.float32), base.in_features, n)
        return self._kernels.Quantized(weight, scale, _to_numpy(packed.code), packed.block_size, n)


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of matmul inputs and the cache: bf16 if the weights and the CPU allow it, else fp32."""
    return torch.bfloat16 if dtype == torch.bfloat16 and decode_kernels().HAS_BF16 else torch.float32


def padded_head_size(size: int) -> int:
    """Return the number of values per head in the cache: a multiple of the vector length."""
    lanes: int = decode_kernels().LANES
    return -(-size // lanes) * lanes


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros that take no memory until they are written, unlike torch.zeros."""
    return torch.frombuffer(map_pages(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def _to_numpy(x: Tensor) -> Any:
    x = x.detach().contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _without_rows(weight: Any) -> Any:
    if hasattr(weight, "code"):
        return weight._replace(w=weight.w[:0], scale=weight.scale[:0], n=0)
    return weight._replace(w=weight.w[:0])


def _num_outputs(weight: Any) -> int:
    return int(weight.n if hasattr(weight, "n") else len(weight.w))


def _compute_dora_gains(module: Any, name: str, base: Any) -> Any:
    """Return m / |W + s B A| of DoRA for each output feature."""
    weight = (base.dequantize() if isinstance(base, QuantizedLinear) else base.weight).detach().float()
    down, up = module.lora_A[name].weight.detach().float(), module.lora_B[name].weight.detach().float()
    norm = torch.linalg.vector_norm(weight + float(module.scaling[name]) * (up @ down), dim=1)
    return (module.lora_magnitude_vector[name].weight.detach().float() / norm).numpy()


class ExactArgmax:
    """Computes the argmax of logits. The int8 copy of the head is made at the first call.

    weight: the weight of the head, (V, h). array: the same weight as a NumPy array. scale: factor of the logits.
    """

    def __init__(self, weight: Tensor, array: Any, scale: float) -> None:
        self._kernels: Any = sampling_kernels()
        self._weight, self._array, self._scale = weight.detach(), array, np.float32(scale)
        self._num_threads = torch.get_num_threads()
        self._quantized: tuple[Any, Any] | None = None
        self._pause = 0

    def argmax(self, z: Any) -> Any:
        """Return the argmax of the logits of hidden states z (P, h), as (P,), or None if all logits are needed."""
        if self._pause:
            self._pause -= 1
            return None
        tokens = self._argmax(z)
        if tokens is None:
            self._pause = PAUSE_PASSES
        return tokens

    def _argmax(self, z: Any) -> Any:
        kernels, num_threads, num_rows = self._kernels, self._num_threads, len(z)
        if self._quantized is None:
            values, scales, bounds = quantize_head(self._weight, kernels.LANES)
            self._quantized = (
                kernels.Quantized(values, scales, np.empty(0, np.float32), z.shape[1], len(scales)), bounds,
            )  # fmt: skip
        head, bounds = self._quantized
        approximate = np.empty((num_rows, head.n), np.float32)
        if z.dtype == np.uint16:
            x, scales = np.empty(z.shape, np.int16), np.empty(num_rows, np.float32)
            kernels.quantize_rows(z, x, scales)
            kernels.int8_matmul(head, x, scales, approximate, 0, num_threads)
        else:
            kernels.quantized_matmul(head, z[:0, 0], z, approximate, 0, num_threads)
        norms, counts = np.empty(num_rows, np.float32), np.empty(num_rows, np.int64)
        chosen = np.empty((num_rows, kernels.MAX_CANDIDATES), np.int64)
        kernels.find_candidates(approximate, bounds, z, norms, chosen, counts)
        if not np.isfinite(norms).all() or not np.isfinite(bounds[0]) or counts.max() > kernels.MAX_CANDIDATES:
            return None
        tokens = np.unique(np.concatenate([row[:count] for row, count in zip(chosen, counts, strict=True)]))
        if not 0 < len(tokens) <= kernels.MAX_CANDIDATES:
            return None
        padded = np.append(tokens, np.repeat(tokens[-1:], -len(tokens) % kernels.LANES))
        logits = np.empty((num_rows, len(padded)), np.float32)
        kernels.dense_matmul(kernels.Dense(self._array[padded]), z, logits, num_threads)
        candidates = logits[:, : len(tokens)] * self._scale
        return tokens[candidates.argmax(1)] if np.isfinite(candidates).all() else None


def quantize_head(weight: Tensor, lanes: int) -> tuple[Any, Any, Any]:
    """Quantize a head (V, h) to int8, row by row, and bound the error of its logits.

    Returns:
        values: int8, (N * h,), where N is V rounded up to a multiple of `lanes`.
        scales: fp32, (N,).
        bounds: fp32, (V,), the maximum error of a logit for a hidden state of norm 1. It includes the errors from
            quantization, from sums in fp32, and from rounding the hidden state to 16 bits. All are NaN if one is not
            finite.
    """
    n, k = weight.shape
    num_rows = -(-n // lanes) * lanes
    values, scales = np.zeros((num_rows, k), np.int8), np.zeros(num_rows, np.float32)
    bounds = np.empty(n, np.float32)
    rounding, step = k * 2.0**-22 + k**0.5 / 65_534, max(1, _CHUNK_ELEMENTS // k)
    for begin in range(0, n, step):
        rows = slice(begin, min(n, begin + step))
        part = weight[rows].float()
        scale = part.abs().amax(1) / 127
        quantized = (part / torch.where(scale > 0, scale, 1.0)[:, None]).round_()
        values[rows], scales[rows] = quantized.to(torch.int8).numpy(), scale.numpy()
        error, norm = torch.linalg.vector_norm(part - quantized * scale[:, None], dim=1), part.norm(dim=1)
        bounds[rows] = (1.01 * (error + rounding * (norm + error))).numpy()
    if not np.isfinite(bounds).all():
        bounds[:] = np.nan
    return values.reshape(-1), scales, bounds


def exact_argmax_for(
    head: nn.Linear, array: Any, z: Any, scale: float, softcap: float | None, other_bytes: int
) -> ExactArgmax | None:
    """Return an ExactArgmax for a head if it is exact and faster than full logits, else None.

    z: an array with the dtype of the hidden states. other_bytes: size of all other weights.
    """
    kernels, (n, k) = sampling_kernels(), head.weight.shape
    is_linear = head.bias is None and not softcap and scale > 0
    is_exact = z.dtype == np.float32 or (
        kernels.INT8_DOTS and kernels.supports_width(k) and (not kernels.USES_AMX or n % kernels.LANES == 0)
    )
    is_faster = head.weight.nbytes > MIN_HEAD_SHARE * (head.weight.nbytes + other_bytes)
    return ExactArgmax(head.weight, array, scale) if is_linear and is_exact and is_faster else None
