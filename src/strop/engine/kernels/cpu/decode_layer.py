"""One decoder layer for a few rows of many texts, as compiled kernels: where decoding on a CPU spends its time.

A row is a token of a text: the next one of a completion, or one of a prompt that is being prefilled. Everything between
matmuls is in fp32; inputs of matmuls are rounded to the type of `z`. The values of a row do not depend on the other
rows, to the last bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import prange, types
from numba.experimental import structref

from strop.engine.kernels.cpu.cached_attention import BLOCK, attend, key_at
from strop.engine.kernels.cpu.compiled import HAS_BF16, from_fp32, kernel, sequence, sigmoid, subroutine
from strop.engine.kernels.cpu.decode_matmul import Dense, Linear, Quantized, columns_of, dense_matmul, linear_forward
from strop.engine.kernels.cpu.dots import LANES
from strop.engine.kernels.cpu.elementwise import CUBIC, GELU, GELU_TANH, KINDS, RELU, RELU2, SILU, TWO_ROOT, gelu
from strop.engine.kernels.cpu.int8_dots import INT8_DOTS

__all__ = [
    "HAS_BF16", "INT8_DOTS", "KINDS", "LANES", "Buffers", "BuffersRef", "Dense", "Layer", "LayerRef", "Linear", "Norm",
    "Quantized", "RopeTables", "Rows", "Shape", "add_residual", "dense_matmul", "layer_forward", "norm_input",
]  # fmt: skip


class Norm(NamedTuple):
    """A norm: kind 0 (none), 1 (RMS norm) or 2 (LayerNorm); weight (n,), bias (n,) or (0,), all fp32."""

    kind: Any
    weight: Any
    bias: Any
    eps: Any


class Shape(NamedTuple):
    """Shape and options of attention.

    query, key_value: numbers of heads; size: of a head. In a row of qkv, k begins at k_at and v at v_at, and heads are
    `step` elements apart. interleaved: the rotary embedding rotates adjacent elements instead of halves;
    rope_before_norm: it is applied before the norms of q and k.
    """

    query: Any
    key_value: Any
    size: Any
    k_at: Any
    v_at: Any
    step: Any
    interleaved: Any
    rope_before_norm: Any
    window: Any
    scale: Any
    softcap: Any


class Rows(NamedTuple):
    """The rows of a forward pass.

    at (T,): position of each row; text (T,): its text, a row of `table`, which holds the cache blocks of the text's
    positions. chunks (C, 4): rows of attention computed together: first row, how many, position of the first, text.
    adapter_rows (adapters, 2): the range of rows of each adapter.
    """

    at: Any
    text: Any
    table: Any
    chunks: Any
    adapter_rows: Any


class RopeTables(NamedTuple):
    """Tables of the rotary embedding: cos, sin (positions, m); factor (positions,) or (0,) multiplies queries."""

    cos: Any
    sin: Any
    factor: Any


@subroutine
def _normalize(kind: Any, weight: Any, bias: Any, eps: Any, x: Any, out: Any) -> None:
    """Write norm(x) to `out`, which may be x; kind, weight, bias, eps: of a Norm."""
    n = len(x)
    mean = np.float32(0.0)
    if kind == 2:
        for j in range(n):
            mean += x[j]
        mean /= np.float32(n)
    total = np.float32(0.0)
    for j in range(n):
        total += (x[j] - mean) * (x[j] - mean)
    rstd = np.float32(1.0) / np.sqrt(total / np.float32(n) + eps)
    for j in range(n):
        out[j] = (x[j] - mean) * rstd * weight[j]
    if len(bias):
        for j in range(n):
            out[j] += bias[j]


@kernel
def norm_input(norm: Any, hidden: Any, z: Any) -> None:
    """Write norm(hidden), rounded, to z."""
    rows, n = z.shape
    kind, weight, bias, eps = norm
    for i in prange(rows):
        buffer = np.empty(n, np.float32)
        if kind:
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
        if kind:
            _normalize(kind, weight, bias, eps, y[i], y[i])
        for j in range(n):
            out[i, j] = hidden[i, j] + scale * y[i, j]


@subroutine
def _rotate(x: Any, cos: Any, sin: Any, interleaved: Any) -> None:
    """Apply the rotary embedding to one head (size,), in place."""
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
    """Write the heads of q or k of a row of qkv, normalized and rotated, to out (heads * size,)."""
    for head in range(heads):
        for d in range(size):
            out[head * size + d] = x[begin + head * step + d]
    if rope_before_norm:
        for head in range(heads):
            _rotate(out[head * size : (head + 1) * size], cos, sin, interleaved)
    if kind:
        width = len(weight)
        for at in range(0, heads * size, width):
            _normalize(kind, weight, bias, eps, out[at : at + width], out[at : at + width])
    if not rope_before_norm:
        for head in range(heads):
            _rotate(out[head * size : (head + 1) * size], cos, sin, interleaved)


@kernel
def split_qkv(
    qkv: Any, shape: Any, q_norm: Any, k_norm: Any, rope: Any, rows: Any, q: Any, keys: Any, values: Any
) -> None:  # fmt: skip
    """Write q (key_value, T, group, width) of qkv (T, ..), and the keys and values of all rows to the cache.

    keys, values (blocks, key_value, BLOCK, width), keys stored as `key_at` describes.
    """
    query, key_value, size, k_at, v_at, step, interleaved, rope_before_norm, _, _, _ = shape
    q_kind, q_weight, q_bias, q_eps = q_norm
    k_kind, k_weight, k_bias, k_eps = k_norm
    all_cos, all_sin, factors = rope
    position, text, table, group = rows.at, rows.text, rows.table, query // key_value
    width, flat = q.shape[3], keys.reshape(-1)
    for i in prange(len(qkv)):
        x, at = qkv[i], position[i]
        cos, sin = all_cos[at], all_sin[at]
        heads = np.empty(query * size, np.float32)
        _load_heads(
            x, 0, step, query, size, q_kind, q_weight, q_bias, q_eps, cos, sin, interleaved, rope_before_norm, heads
        )  # fmt: skip
        factor = factors[at] if len(factors) else np.float32(1.0)
        for head in range(query):
            for d in range(size):
                q[head // group, i, head % group, d] = from_fp32(heads[head * size + d] * factor, q)
            for d in range(size, width):  # it may hold values of another pass
                q[head // group, i, head % group, d] = 0
        _load_heads(
            x, k_at, step, key_value, size, k_kind, k_weight, k_bias, k_eps, cos, sin, interleaved,
            rope_before_norm, heads
        )  # fmt: skip
        where, slot = table[text[i], at // BLOCK], at % BLOCK
        for head in range(key_value):
            begin = (where * key_value + head) * BLOCK * width
            for d in range(size):
                flat[key_at(begin, slot, d, keys)] = from_fp32(heads[head * size + d], keys)
                values[where, head, slot, d] = from_fp32(x[v_at + head * step + d], values)


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
    z = TWO_ROOT * (x + CUBIC * x * x * x) if gelu else x
    share, _ = sigmoid(z)
    return x * share


@subroutine
def _activate_row(x: Any, gelu: Any, z: Any) -> None:
    for j in range(len(z)):
        z[j] = from_fp32(_silu_or_gelu(x[j], gelu), z)


@subroutine
def _activate_gated_row(gate: Any, up: Any, gelu: Any, z: Any) -> None:
    for j in range(len(z)):
        z[j] = from_fp32(_silu_or_gelu(gate[j], gelu) * up[j], z)


@kernel
def activate_mlp(y: Any, kind: Any, xielu_parameters: Any, z: Any, lanes: Any) -> None:
    """Write activation(gate) * up of y (T, 2 n), or activation(y) of y (T, n), rounded, to z.

    xielu_parameters: the four parameters of xIELU.
    """
    rows, n = z.shape
    gated = y.shape[1] > n
    for lane in prange(lanes):
        low, high = columns_of(lane, lanes, n)
        for i in range(rows):
            gate, up, to = y[i, low:high], y[i, (n if gated else 0) + low : (n if gated else 0) + high], z[i, low:high]
            if kind == SILU and gated:  # constants in each call, or the loops are not vectorized
                _activate_gated_row(gate, up, False, to)
            elif kind == GELU_TANH and gated:
                _activate_gated_row(gate, up, True, to)
            elif kind == SILU:
                _activate_row(gate, False, to)
            elif kind == GELU_TANH:
                _activate_row(gate, True, to)
            else:
                for j in range(len(to)):
                    value = _activation(gate[j], kind, xielu_parameters)
                    to[j] = from_fp32(value * up[j] if gated else value, z)


class Layer(NamedTuple):
    """A decoder layer.

    inner: inputs of the down projection; act, xielu_parameters: see `activate_mlp`; parallel: attention and MLP read
    the same input; scale: factor of their outputs before they are added to the residual stream.
    """

    qkv: Any
    o: Any
    gate_up: Any
    down: Any
    before_attention: Any
    q_norm: Any
    k_norm: Any
    after_attention: Any
    before_mlp: Any
    after_mlp: Any
    shape: Any
    rope: Any
    inner: Any
    gated: Any
    act: Any
    xielu_parameters: Any
    parallel: Any
    scale: Any


class Buffers(NamedTuple):
    """Memory of a forward pass.

    z, q: inputs of matmuls, in their type; y, u: fp32, outputs of matmuls and z A^T; like: an empty array of the type
    of dense weights; x (int16), scales: z quantized, for weights in 8 bits.
    """

    z: Any
    q: Any
    y: Any
    u: Any
    like: Any
    x: Any
    scales: Any


class _LayerRefType(types.StructRef):  # type: ignore[misc]
    def preprocess_fields(self, fields: Any) -> Any:
        return tuple((name, types.unliteral(kind)) for name, kind in fields)


structref.register(_LayerRefType)


class LayerRef(structref.StructRefProxy):  # type: ignore[misc]
    """A Layer and its part of the cache, as a compiled object.

    Unpacking the tuples in each call would take a hundredth of a forward pass of a small model.
    """

    def __new__(cls, layer: Any, keys: Any, values: Any) -> LayerRef:
        ref: LayerRef = _make_layer_ref(layer, keys, values)
        return ref


structref.define_proxy(LayerRef, _LayerRefType, ["layer", "keys", "values"])


class BuffersRef(structref.StructRefProxy):  # type: ignore[misc]
    """Buffers as a compiled object."""

    def __new__(cls, buffers: Any) -> BuffersRef:
        ref: BuffersRef = _make_buffers_ref(buffers)
        return ref


class _BuffersRefType(types.StructRef):  # type: ignore[misc]
    pass


structref.register(_BuffersRefType)
structref.define_proxy(BuffersRef, _BuffersRefType, ["buffers"])


# As StructRefProxy.__new__, but cached by numba: compiling it would take half a second in each process.
@sequence
def _make_layer_ref(layer: Any, keys: Any, values: Any) -> Any:
    return LayerRef(layer, keys, values)


@sequence
def _make_buffers_ref(buffers: Any) -> Any:
    return BuffersRef(buffers)


@sequence
def layer_forward(
    layer_ref: Any, buffers_ref: Any, hidden: Any, at: Any, text: Any, table: Any, chunks: Any, adapter_rows: Any,
    lanes: Any,
) -> None:  # fmt: skip
    """Apply one layer to hidden (T, h) fp32, in place; at to adapter_rows: as in Rows."""
    layer, keys, values, buffers = layer_ref.layer, layer_ref.keys, layer_ref.values, buffers_ref.buffers
    rows = Rows(at, text, table, chunks, adapter_rows)
    count, width = hidden.shape
    shape = layer.shape
    query_size, group = shape.query * shape.size, shape.query // shape.key_value
    z = buffers.z[: count * width].reshape(count, width)
    inner = buffers.z[: count * layer.inner].reshape(count, layer.inner)
    norm_input(layer.before_attention, hidden, z)
    qkv_size = query_size + 2 * shape.key_value * shape.size
    qkv = buffers.y[: count * qkv_size].reshape(count, qkv_size)
    linear_forward(layer.qkv, buffers, z, adapter_rows, qkv, lanes)
    head_width = keys.shape[3]
    q = buffers.q[: count * shape.query * head_width].reshape(shape.key_value, count, group, head_width)
    split_qkv(qkv, shape, layer.q_norm, layer.k_norm, layer.rope, rows, q, keys, values)
    mixed = buffers.z[: count * query_size].reshape(count, query_size)
    attend(q, keys, values, shape, rows, mixed, lanes)
    y = buffers.y[: count * width].reshape(count, width)
    linear_forward(layer.o, buffers, mixed, adapter_rows, y, lanes)
    if layer.parallel:
        norm_input(layer.before_mlp, hidden, z)
        add_residual(layer.after_attention, y, layer.scale, hidden, hidden)
    else:
        add_residual(layer.after_attention, y, layer.scale, hidden, hidden)
        norm_input(layer.before_mlp, hidden, z)
    gate_up_size = layer.inner * (2 if layer.gated else 1)
    gate_up = buffers.y[: count * gate_up_size].reshape(count, gate_up_size)
    linear_forward(layer.gate_up, buffers, z, adapter_rows, gate_up, lanes)
    activate_mlp(gate_up, layer.act, layer.xielu_parameters, inner, lanes)
    linear_forward(layer.down, buffers, inner, adapter_rows, y, lanes)
    add_residual(layer.after_mlp, y, layer.scale, hidden, hidden)
