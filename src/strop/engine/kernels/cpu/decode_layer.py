"""One decoder layer over a few rows of many texts, as compiled loops: what answering on a CPU spends its time in.

A row is a token of some text: the next one of an answer, or one of a prompt that is being read. Everything between
products is in fp32; what enters a product is rounded to the type of `z`. A row's numbers do not depend on
the rows beside it, to the last bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import prange, types
from numba.experimental import structref

from strop.engine.kernels.cpu.cached_attention import BLOCK, attend, key_at
from strop.engine.kernels.cpu.compiled import HAS_BF16 as HAS_BF16
from strop.engine.kernels.cpu.compiled import inline, loop, narrow, sigmoid, together
from strop.engine.kernels.cpu.decode_matmul import Dense as Dense
from strop.engine.kernels.cpu.decode_matmul import Linear as Linear
from strop.engine.kernels.cpu.decode_matmul import Packed as Packed
from strop.engine.kernels.cpu.decode_matmul import alone as alone
from strop.engine.kernels.cpu.decode_matmul import products, share_of
from strop.engine.kernels.cpu.dots import LANES as LANES
from strop.engine.kernels.cpu.elementwise import CUBIC, TWO_ROOT, gelu
from strop.engine.kernels.cpu.int8_dots import AS_HELD as AS_HELD


class Norm(NamedTuple):
    """kind: 0: there is none; 1: RMS norm; 2: LayerNorm, with bias (n,) or (0,). All fp32."""

    kind: Any
    weight: Any
    bias: Any
    eps: Any


class Shape(NamedTuple):
    """Attention: heads, how they lie in a row of qkv (where q, k, v begin, from head to head), and its options."""

    query: Any
    key_value: Any
    size: Any
    k_at: Any
    v_at: Any
    step: Any
    neighbours: Any
    turned_first: Any
    window: Any
    scale: Any
    softcap: Any


class Rows(NamedTuple):
    """What is computed in a pass. at (T,): the position of each row; text (T,): its text, a row of `table`, which
    holds the blocks of its positions; chunks (C, 4): rows that are attended together: first, how many, position of the
    first, text; own (adapters, 2): the rows of each adapter, from and to."""

    at: Any
    text: Any
    table: Any
    chunks: Any
    own: Any


class Turn(NamedTuple):
    """cos, sin (positions, m) of the rotary embedding; factor (positions,) or (0,): what queries are multiplied by."""

    cos: Any
    sin: Any
    factor: Any


@inline
def _normed(kind: Any, weight: Any, bias: Any, eps: Any, x: Any, out: Any) -> None:
    """out = norm(x), which may be the same numbers; kind and what follows: of a Norm."""
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


@loop
def enter(norm: Any, hidden: Any, z: Any) -> None:
    """z = norm(hidden), rounded."""
    rows, n = z.shape
    kind, weight, bias, eps = norm
    for i in prange(rows):
        held = np.empty(n, np.float32)
        if kind:
            _normed(kind, weight, bias, eps, hidden[i], held)
        else:
            held[:] = hidden[i]
        for j in range(n):
            z[i, j] = narrow(held[j], z)


@loop
def leave(norm: Any, y: Any, scale: Any, hidden: Any, out: Any) -> None:
    """out = hidden + scale norm(y)."""
    rows, n = hidden.shape
    kind, weight, bias, eps = norm
    for i in prange(rows):
        if kind:
            _normed(kind, weight, bias, eps, y[i], y[i])
        for j in range(n):
            out[i, j] = hidden[i, j] + scale * y[i, j]


@inline
def _turned(x: Any, cos: Any, sin: Any, neighbours: Any) -> None:
    """Turns one head (size,), in place."""
    m = len(cos)
    for j in range(m):
        first, second = (2 * j, 2 * j + 1) if neighbours else (j, j + m)
        a, b = x[first], x[second]
        x[first] = a * cos[j] - b * sin[j]
        x[second] = b * cos[j] + a * sin[j]


@inline
def _heads(
    x: Any, begin: Any, step: Any, heads: Any, size: Any, kind: Any, weight: Any, bias: Any, eps: Any, cos: Any,
    sin: Any, neighbours: Any, turned_first: Any, out: Any,
) -> None:  # fmt: skip
    """The heads of q or k out of a row of qkv, normed and turned, as numbers (heads size,)."""
    for head in range(heads):
        for d in range(size):
            out[head * size + d] = x[begin + head * step + d]
    if turned_first:
        for head in range(heads):
            _turned(out[head * size : (head + 1) * size], cos, sin, neighbours)
    if kind:
        width = len(weight)
        for at in range(0, heads * size, width):
            _normed(kind, weight, bias, eps, out[at : at + width], out[at : at + width])
    if not turned_first:
        for head in range(heads):
            _turned(out[head * size : (head + 1) * size], cos, sin, neighbours)


@loop
def place(qkv: Any, shape: Any, q_norm: Any, k_norm: Any, turn: Any, rows: Any, q: Any, keys: Any, values: Any) -> None:
    """q (key_value, T, group, width) of qkv (T, ..), and each row's key and value into the cache (blocks, key_value,
    BLOCK, width), keys as `key_at` has them."""
    query, key_value, size, k_at, v_at, step, neighbours, turned_first, _, _, _ = shape
    q_kind, q_weight, q_bias, q_eps = q_norm
    k_kind, k_weight, k_bias, k_eps = k_norm
    all_cos, all_sin, factors = turn
    position, text, table, group = rows.at, rows.text, rows.table, query // key_value
    width, flat = q.shape[3], keys.reshape(-1)
    for i in prange(len(qkv)):
        x, at = qkv[i], position[i]
        cos, sin = all_cos[at], all_sin[at]
        held = np.empty(query * size, np.float32)
        _heads(
            x, 0, step, query, size, q_kind, q_weight, q_bias, q_eps, cos, sin, neighbours, turned_first, held
        )  # fmt: skip
        factor = factors[at] if len(factors) else np.float32(1.0)
        for head in range(query):
            for d in range(size):
                q[head // group, i, head % group, d] = narrow(held[head * size + d] * factor, q)
            for d in range(size, width):  # what stood there is of another pass
                q[head // group, i, head % group, d] = 0
        _heads(
            x, k_at, step, key_value, size, k_kind, k_weight, k_bias, k_eps, cos, sin, neighbours, turned_first, held
        )  # fmt: skip
        where, slot = table[text[i], at // BLOCK], at % BLOCK
        for head in range(key_value):
            begin = (where * key_value + head) * BLOCK * width
            for d in range(size):
                flat[key_at(begin, slot, d, keys)] = narrow(held[head * size + d], keys)
                values[where, head, slot, d] = narrow(x[v_at + head * step + d], values)


SILU, GELU_TANH, GELU, RELU2, RELU, XIELU = range(6)


@inline
def _activated(x: Any, kind: Any, about: Any) -> Any:
    if kind == GELU:
        return gelu(x)[0]
    if kind == RELU2:
        return x * x if x > 0 else np.float32(0.0)
    if kind == RELU:
        return x if x > 0 else np.float32(0.0)
    positive, negative, beta, eps = about  # xIELU, arXiv:2411.13010
    if x > 0:
        return positive * x * x + beta * x
    return (np.float32(math.expm1(min(x, eps))) - x) * negative + beta * x


@inline
def _smooth(x: Any, gelu: Any) -> Any:
    z = TWO_ROOT * (x + CUBIC * x * x * x) if gelu else x
    share, _ = sigmoid(z)
    return x * share


@inline
def _rounded(x: Any, gelu: Any, z: Any) -> None:
    for j in range(len(z)):
        z[j] = narrow(_smooth(x[j], gelu), z)


@inline
def _gated(gate: Any, up: Any, gelu: Any, z: Any) -> None:
    for j in range(len(z)):
        z[j] = narrow(_smooth(gate[j], gelu) * up[j], z)


@loop
def activate(y: Any, kind: Any, about: Any, z: Any, lanes: Any) -> None:
    """z = activation(gate) * up of y (T, 2 n), or activation(y) of y (T, n), rounded. about: xIELU's four numbers."""
    rows, n = z.shape
    gated = y.shape[1] > n
    for lane in prange(lanes):
        low, high = share_of(lane, lanes, n)
        for i in range(rows):
            gate, up, to = y[i, low:high], y[i, (n if gated else 0) + low : (n if gated else 0) + high], z[i, low:high]
            if kind == SILU and gated:  # constants in each call, or the loop would not be vectorised
                _gated(gate, up, False, to)
            elif kind == GELU_TANH and gated:
                _gated(gate, up, True, to)
            elif kind == SILU:
                _rounded(gate, False, to)
            elif kind == GELU_TANH:
                _rounded(gate, True, to)
            else:
                for j in range(len(to)):
                    value = _activated(gate[j], kind, about)
                    to[j] = narrow(value * up[j] if gated else value, z)


class Layer(NamedTuple):
    """A decoder layer. inner: numbers that go into the down projection; act, about: as `activate` takes them; parallel:
    the blocks read the same input; scale: of what they add."""

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
    turn: Any
    inner: Any
    gated: Any
    act: Any
    about: Any
    parallel: Any
    scale: Any


class Room(NamedTuple):
    """What a pass computes in. z, q: of the type of what enters products; y, u: fp32, what comes out of products and
    z A^T; like: of the whole weights' type; x (int16), scales: z in whole numbers, for weights in 8 bit."""

    z: Any
    q: Any
    y: Any
    u: Any
    like: Any
    x: Any
    scales: Any


class _HeldType(types.StructRef):  # type: ignore[misc]
    def preprocess_fields(self, fields: Any) -> Any:
        return tuple((name, types.unliteral(kind)) for name, kind in fields)


structref.register(_HeldType)


class Held(structref.StructRefProxy):  # type: ignore[misc]
    """A Layer and its part of the cache, as compiled code holds them: a call need not take them apart, which takes as
    long as a hundredth of a pass over a small model."""

    def __new__(cls, layer: Any, keys: Any, values: Any) -> Held:
        made: Held = _held(layer, keys, values)
        return made


structref.define_proxy(Held, _HeldType, ["layer", "keys", "values"])


class HeldRoom(structref.StructRefProxy):  # type: ignore[misc]
    """A Room, likewise."""

    def __new__(cls, room: Any) -> HeldRoom:
        made: HeldRoom = _held_room(room)
        return made


class _HeldRoomType(types.StructRef):  # type: ignore[misc]
    pass


structref.register(_HeldRoomType)
structref.define_proxy(HeldRoom, _HeldRoomType, ["room"])


# As StructRefProxy.__new__ makes them, but for numba's cache: compiling it would take half a second in each process.
@together
def _held(layer: Any, keys: Any, values: Any) -> Any:
    return Held(layer, keys, values)


@together
def _held_room(room: Any) -> Any:
    return HeldRoom(room)


@together
def through(
    held: Any, held_room: Any, hidden: Any, at: Any, text: Any, table: Any, chunks: Any, own: Any, lanes: Any
) -> None:
    """hidden (T, h) fp32, in place, through one layer; at and what follows: as in Rows."""
    layer, keys, values, room = held.layer, held.keys, held.values, held_room.room
    rows = Rows(at, text, table, chunks, own)
    count, width = hidden.shape
    shape = layer.shape
    attended, group = shape.query * shape.size, shape.query // shape.key_value
    z, inner = room.z[: count * width].reshape(count, width), room.z[: count * layer.inner].reshape(count, layer.inner)
    enter(layer.before_attention, hidden, z)
    both = attended + 2 * shape.key_value * shape.size
    qkv = room.y[: count * both].reshape(count, both)
    products(layer.qkv, room, z, own, qkv, lanes)
    lanes_wide = keys.shape[3]
    q = room.q[: count * shape.query * lanes_wide].reshape(shape.key_value, count, group, lanes_wide)
    place(qkv, shape, layer.q_norm, layer.k_norm, layer.turn, rows, q, keys, values)
    mixed = room.z[: count * attended].reshape(count, attended)
    attend(q, keys, values, shape, rows, mixed, lanes)
    y = room.y[: count * width].reshape(count, width)
    products(layer.o, room, mixed, own, y, lanes)
    if layer.parallel:
        enter(layer.before_mlp, hidden, z)
        leave(layer.after_attention, y, layer.scale, hidden, hidden)
    else:
        leave(layer.after_attention, y, layer.scale, hidden, hidden)
        enter(layer.before_mlp, hidden, z)
    many = layer.inner * (2 if layer.gated else 1)
    in_front = room.y[: count * many].reshape(count, many)
    products(layer.gate_up, room, z, own, in_front, lanes)
    activate(in_front, layer.act, layer.about, inner, lanes)
    products(layer.down, room, inner, own, y, lanes)
    leave(layer.after_mlp, y, layer.scale, hidden, hidden)
