"""Compiled CPU kernels for one decoder layer during generation.

Each row is one token of one sequence: the next token of a completion, or a prompt token during prefill. Inputs of
matmuls are rounded to the dtype of `Buffers.z`; everything else is computed in fp32. A row's result is the same bit
for bit, whatever the other rows are.
"""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

import numpy as np
from numba import prange, types
from numba.experimental import structref

from strop.engine.kernels.cpu.cached_attention import BLOCK, attend, key_index
from strop.engine.kernels.cpu.compiled import HAS_BF16, from_fp32, kernel, kernel_sequence, sigmoid, subroutine
from strop.engine.kernels.cpu.decode_matmul import Dense, Linear, Quantized, columns_of, dense_matmul, linear_forward
from strop.engine.kernels.cpu.dots import LANES
from strop.engine.kernels.cpu.elementwise import GELU, GELU_CUBIC, GELU_SCALE, GELU_TANH, KINDS, RELU, RELU2, SILU, gelu
from strop.engine.kernels.cpu.int8_dots import INT8_DOTS

__all__ = [
    "HAS_BF16", "INT8_DOTS", "KINDS", "LANES", "LAYER_NORM", "NO_NORM", "RMS_NORM", "Buffers", "BuffersRef", "Dense",
    "Layer", "LayerRef", "Linear", "Norm", "Quantized", "RopeTables", "Rows", "Shape", "add_residual", "dense_matmul",
    "layer_forward", "norm_input",
]  # fmt: skip

NO_NORM, RMS_NORM, LAYER_NORM = 0, 1, 2

# A norm. kind: NO_NORM, RMS_NORM or LAYER_NORM. weight: (n,). bias: (n,) or empty. All are fp32.
Norm = namedtuple("Norm", "kind weight bias eps")

# The shape and options of attention. size: head size. k_at, v_at: offsets of the first k and v head in a row of qkv.
# step: distance between heads in that row. interleaved: the rotary embedding pairs adjacent elements instead of halves.
# rope_before_norm: the rotary embedding precedes the norms of q and k.
Shape = namedtuple(
    "Shape", "num_query_heads num_kv_heads size k_at v_at step interleaved rope_before_norm window scale softcap"
)

# The rows of a forward pass. positions (T,): the position of each row in its sequence. sequences (T,): the sequence of
# each row, an index into block_table, which lists the cache blocks of each sequence. chunks (C, 4): consecutive rows of
# one sequence, as (first row, number of rows, position of the first row, sequence). adapter_rows (adapters, 2): the
# range of rows that use each adapter. key_ends (T,): the position after the last key that each row attends to. angles
# (T,): the row of RopeTables' cos and sin of each row.
Rows = namedtuple("Rows", "positions sequences block_table chunks adapter_rows key_ends angles")

# Tables of the rotary embedding. cos, sin: (angles, m). factor: scale of queries, (positions,) or empty.
RopeTables = namedtuple("RopeTables", "cos sin factor")


@subroutine
def _normalize(kind: Any, weight: Any, bias: Any, eps: Any, x: Any, out: Any) -> None:
    """Write norm(x) to `out`, which may be x. kind, weight, bias, eps: the fields of a Norm."""
    n = len(x)
    mean = np.float32(0.0)
    if kind == LAYER_NORM:
        for j in range(n):
            mean += x[j]
        mean /= np.float32(n)
    sum_squares = np.float32(0.0)
    for j in range(n):
        sum_squares += (x[j] - mean) * (x[j] - mean)
    rstd = np.float32(1.0) / np.sqrt(sum_squares / np.float32(n) + eps)
    for j in range(n):
        out[j] = (x[j] - mean) * rstd * weight[j]
    if len(bias):
        for j in range(n):
            out[j] += bias[j]


@kernel
def norm_input(norm: Any, hidden: Any, z: Any) -> None:
    """Write norm(hidden), rounded to the dtype of z, to z."""
    rows, n = z.shape
    kind, weight, bias, eps = norm
    for i in prange(rows):
        buffer = np.empty(n, np.float32)
        if kind != NO_NORM:
            _normalize(kind, weight, bias, eps, hidden[i], buffer)
        else:
            buffer[:] = hidden[i]
        for j in range(n):
            z[i, j] = from_fp32(buffer[j], z)


@kernel
def add_residual(norm: Any, y: Any, scale: Any, hidden: Any, out: Any) -> None:
    """Write hidden + scale * norm(y) to `out`."""
    rows, n = hidden.shape
    kind, weight, bias, eps = norm
    for i in prange(rows):
        if kind != NO_NORM:
            _normalize(kind, weight, bias, eps, y[i], y[i])
        for j in range(n):
            out[i, j] = hidden[i, j] + scale * y[i, j]


@subroutine
def _rotate(x: Any, cos: Any, sin: Any, interleaved: Any) -> None:
    """Apply the rotary embedding to one head in place."""
    m = len(cos)
    for j in range(m):
        first, second = (2 * j, 2 * j + 1) if interleaved else (j, j + m)
        a, b = x[first], x[second]
        x[first] = a * cos[j] - b * sin[j]
        x[second] = b * cos[j] + a * sin[j]


@subroutine
def _load_heads(
    x: Any, begin: Any, step: Any, heads: Any, size: Any, kind: Any, weight: Any, bias: Any, eps: Any, cos: Any,
    sin: Any, interleaved: Any, rope_before_norm: Any, out: Any,
) -> None:  # fmt: skip
    """Normalize and rotate the heads of q or k in one row of qkv (x), and write them to `out` (heads * size,)."""
    for head in range(heads):
        for d in range(size):
            out[head * size + d] = x[begin + head * step + d]
    if rope_before_norm:
        for head in range(heads):
            _rotate(out[head * size : (head + 1) * size], cos, sin, interleaved)
    if kind != NO_NORM:
        width = len(weight)
        for start in range(0, heads * size, width):
            _normalize(kind, weight, bias, eps, out[start : start + width], out[start : start + width])
    if not rope_before_norm:
        for head in range(heads):
            _rotate(out[head * size : (head + 1) * size], cos, sin, interleaved)


@kernel
def split_qkv(
    qkv: Any, shape: Any, q_norm: Any, k_norm: Any, rope: Any, rows: Any, q: Any, keys: Any, values: Any
) -> None:  # fmt: skip
    """Apply norms and the rotary embedding to qkv (T, n). Write q (num_kv_heads, T, group, width) and update the cache.

    keys, values: the cache, (blocks, num_kv_heads, BLOCK, width). `key_index` describes the order of keys in a block.
    """
    num_query_heads, num_kv_heads, size, k_at, v_at, step, interleaved, rope_before_norm, _, _, _ = shape
    q_kind, q_weight, q_bias, q_eps = q_norm
    k_kind, k_weight, k_bias, k_eps = k_norm
    all_cos, all_sin, factors = rope
    positions, sequences, block_table = rows.positions, rows.sequences, rows.block_table
    group = num_query_heads // num_kv_heads
    width, flat_keys = q.shape[3], keys.reshape(-1)
    for i in prange(len(qkv)):
        x, position = qkv[i], positions[i]
        cos, sin = all_cos[rows.angles[i]], all_sin[rows.angles[i]]
        heads = np.empty(num_query_heads * size, np.float32)
        _load_heads(
            x, 0, step, num_query_heads, size, q_kind, q_weight, q_bias, q_eps, cos, sin, interleaved,
            rope_before_norm, heads,
        )  # fmt: skip
        factor = factors[position] if len(factors) else np.float32(1.0)
        for head in range(num_query_heads):
            for d in range(size):
                q[head // group, i, head % group, d] = from_fp32(heads[head * size + d] * factor, q)
            for d in range(size, width):  # the buffer may hold values of an earlier pass
                q[head // group, i, head % group, d] = 0
        _load_heads(
            x, k_at, step, num_kv_heads, size, k_kind, k_weight, k_bias, k_eps, cos, sin, interleaved,
            rope_before_norm, heads
        )  # fmt: skip
        block, slot = block_table[sequences[i], position // BLOCK], position % BLOCK
        for head in range(num_kv_heads):
            begin = (block * num_kv_heads + head) * BLOCK * width
            for d in range(size):
                flat_keys[key_index(begin, slot, d, keys)] = from_fp32(heads[head * size + d], keys)
                values[block, head, slot, d] = from_fp32(x[v_at + head * step + d], values)


@subroutine
def _activation(x: Any, kind: Any, xielu_parameters: Any) -> Any:
    if kind == GELU:
        return gelu(x)[0]
    if kind == RELU2:
        return x * x if x > 0 else np.float32(0.0)
    if kind == RELU:
        return x if x > 0 else np.float32(0.0)
    positive, negative, beta, eps = xielu_parameters  # xIELU, arXiv:2411.13010
    if x > 0:
        return positive * x * x + beta * x
    return (np.float32(math.expm1(min(x, eps))) - x) * negative + beta * x


@subroutine
def _silu_or_gelu(x: Any, gelu: Any) -> Any:
    z = GELU_SCALE * (x + GELU_CUBIC * x * x * x) if gelu else x
    sigmoid_z, _ = sigmoid(z)
    return x * sigmoid_z


@subroutine
def _activate_row(x: Any, gelu: Any, z: Any) -> None:
    for j in range(len(z)):
        z[j] = from_fp32(_silu_or_gelu(x[j], gelu), z)


@subroutine
def _activate_gated_row(gate: Any, up: Any, gelu: Any, z: Any) -> None:
    for j in range(len(z)):
        z[j] = from_fp32(_silu_or_gelu(gate[j], gelu) * up[j], z)


@kernel
def activate_mlp(y: Any, kind: Any, xielu_parameters: Any, z: Any, threads: Any) -> None:
    """Write activation(gate) * up to z (T, n) if y is (T, 2 n) with gate and up, or activation(y) if y is (T, n).

    kind: as in elementwise.KINDS. xielu_parameters: as in protocols.ActivationParameters.
    """
    rows, n = z.shape
    gated = y.shape[1] > n
    for thread in prange(threads):
        low, high = columns_of(thread, threads, n)
        for i in range(rows):
            first_up = n if gated else 0
            gate, up, out = y[i, low:high], y[i, first_up + low : first_up + high], z[i, low:high]
            if kind == SILU and gated:  # numba vectorizes a call only if this argument is a constant
                _activate_gated_row(gate, up, False, out)
            elif kind == GELU_TANH and gated:
                _activate_gated_row(gate, up, True, out)
            elif kind == SILU:
                _activate_row(gate, False, out)
            elif kind == GELU_TANH:
                _activate_row(gate, True, out)
            else:
                for j in range(len(out)):
                    value = _activation(gate[j], kind, xielu_parameters)
                    out[j] = from_fp32(value * up[j] if gated else value, z)


# A decoder layer. qkv, o, gate_up, down: a Linear each. before_attention to after_mlp: a Norm each. inner: the MLP's
# intermediate size. gated: whether the MLP has a gate. act, xielu_parameters: its activation, as in `activate_mlp`.
# parallel: attention and MLP have the same input. scale: multiplies their outputs before the residual is added.
Layer = namedtuple(
    "Layer",
    "qkv o gate_up down before_attention q_norm k_norm after_attention before_mlp after_mlp shape rope inner gated act "
    "xielu_parameters parallel scale",
)

# One-dimensional buffers of a forward pass. inputs, outputs: of linear layers; outputs and lora_a_outputs are fp32.
# weight_like: an empty array with the dtype of dense weights. quantized_inputs (int16), input_scales: for int8 weights.
Buffers = namedtuple("Buffers", "inputs queries outputs lora_a_outputs weight_like quantized_inputs input_scales")


class _LayerRefType(types.StructRef):  # type: ignore[misc]
    def preprocess_fields(self, fields: Any) -> Any:
        return tuple((name, types.unliteral(kind)) for name, kind in fields)


structref.register(_LayerRefType)


class LayerRef(structref.StructRefProxy):  # type: ignore[misc]
    """A Layer with its part of the KV cache, as an object that compiled functions take without unpacking.

    Unpacking the tuples in each call would take 1 % of a small model's forward pass.
    """

    def __new__(cls, layer: Any, keys: Any, values: Any) -> LayerRef:
        ref: LayerRef = _make_layer_ref(layer, keys, values)
        return ref


structref.define_proxy(LayerRef, _LayerRefType, ["layer", "keys", "values"])


class BuffersRef(structref.StructRefProxy):  # type: ignore[misc]
    """Buffers as an object that compiled functions take without unpacking."""

    def __new__(cls, buffers: Any) -> BuffersRef:
        ref: BuffersRef = _make_buffers_ref(buffers)
        return ref


class _BuffersRefType(types.StructRef):  # type: ignore[misc]
    pass


structref.register(_BuffersRefType)
structref.define_proxy(BuffersRef, _BuffersRefType, ["buffers"])


# StructRefProxy.__new__ does the same, but numba does not cache it, and compiling it takes 0.5 s in each process.
@kernel_sequence
def _make_layer_ref(layer: Any, keys: Any, values: Any) -> Any:
    return LayerRef(layer, keys, values)


@kernel_sequence
def _make_buffers_ref(buffers: Any) -> Any:
    return BuffersRef(buffers)


@kernel_sequence
def layer_forward(
    layer_ref: Any, buffers_ref: Any, hidden: Any, positions: Any, sequences: Any, block_table: Any, chunks: Any,
    adapter_rows: Any, key_ends: Any, angles: Any, threads: Any,
) -> None:  # fmt: skip
    """Apply one layer to hidden (T, h) fp32, in place. positions to angles: the fields of Rows."""
    layer, keys, values, buffers = layer_ref.layer, layer_ref.keys, layer_ref.values, buffers_ref.buffers
    rows = Rows(positions, sequences, block_table, chunks, adapter_rows, key_ends, angles)
    count, width = hidden.shape
    shape = layer.shape
    query_size, group = shape.num_query_heads * shape.size, shape.num_query_heads // shape.num_kv_heads
    z = buffers.inputs[: count * width].reshape(count, width)
    inner = buffers.inputs[: count * layer.inner].reshape(count, layer.inner)
    norm_input(layer.before_attention, hidden, z)
    qkv_size = query_size + 2 * shape.num_kv_heads * shape.size
    qkv = buffers.outputs[: count * qkv_size].reshape(count, qkv_size)
    linear_forward(layer.qkv, buffers, z, adapter_rows, qkv, threads)
    head_width = keys.shape[3]
    q = buffers.queries[: count * shape.num_query_heads * head_width].reshape(
        shape.num_kv_heads, count, group, head_width
    )
    split_qkv(qkv, shape, layer.q_norm, layer.k_norm, layer.rope, rows, q, keys, values)
    attention_out = buffers.inputs[: count * query_size].reshape(count, query_size)
    attend(q, keys, values, shape, rows, attention_out, threads)
    y = buffers.outputs[: count * width].reshape(count, width)
    linear_forward(layer.o, buffers, attention_out, adapter_rows, y, threads)
    if layer.parallel:
        norm_input(layer.before_mlp, hidden, z)
        add_residual(layer.after_attention, y, layer.scale, hidden, hidden)
    else:
        add_residual(layer.after_attention, y, layer.scale, hidden, hidden)
        norm_input(layer.before_mlp, hidden, z)
    gate_up_size = layer.inner * (2 if layer.gated else 1)
    gate_up = buffers.outputs[: count * gate_up_size].reshape(count, gate_up_size)
    linear_forward(layer.gate_up, buffers, z, adapter_rows, gate_up, threads)
    activate_mlp(gate_up, layer.act, layer.xielu_parameters, inner, threads)
    linear_forward(layer.down, buffers, inner, adapter_rows, y, threads)
    add_residual(layer.after_mlp, y, layer.scale, hidden, hidden)
