"""A model as the loops of engine.cpu.passes take it: its own weights where they lie, the adapters laid out anew."""

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
from strop.engine.decode.sampling import Seen
from strop.engine.kernels.dispatch import answering_loops
from strop.engine.layers import Layers, NormPart, about
from strop.engine.train.fused_linear import base_of
from strop.machine.memory import map_pages
from strop.models.families.layers import ACTIVATIONS
from strop.models.quantize import QuantizedLinear


class CompiledPass:
    """layers: of a model on a CPU, in fp32 or bf16. blocks: how many the cache has. names: of the adapters. warm: have
    the loops compiled beforehand, in another process."""

    def __init__(self, layers: Layers, blocks: int, names: Sequence[str], *, warm: bool = True) -> None:
        self._loops: Any = answering_loops(layers.head.weight.dtype if warm else None)
        self._layers = layers
        self._half = layers.head.weight.dtype == torch.bfloat16
        self._type = activation_dtype(layers.head.weight.dtype)
        self._lanes = torch.get_num_threads()
        parts = [layers.part(number) for number in range(len(layers))]
        self._kinds = [part.rope for part in parts]
        self._act = getattr(self._loops, ACTIVATIONS[parts[0].activation])
        width = width_of(parts[0].size)
        shape = (blocks, parts[0].key_value, BLOCK_SIZE, width)
        self._keys, self._values = ([_zeros(shape, self._type) for _ in parts] for _ in range(2))
        self._cache = [(_array(k), _array(v)) for k, v in zip(self._keys, self._values, strict=True)]
        self._norm = self._norm_of(layers.norm)
        self._head = self._loops.Dense(_array(layers.head.weight.data))
        self._logits = np.empty((0, 0), np.float32)
        self._q = parts[0].query * width
        self.take_adapters(names)
        self._screen = self._screen_of(layers)

    def take_adapters(self, names: Sequence[str]) -> None:
        """The adapters by these names, as their weights are now."""
        self.names = list(names)
        self._built = [self._layer(self._layers.part(number)) for number in range(len(self._layers))]
        heads = [layer.shape.query * layer.shape.size for layer in self._built]
        inner = [layer.inner for layer in self._built]
        self._widest = max(self._layers.config.hidden_size, *heads, *inner)
        linears = [linear for layer in self._built for linear in layer[:4]]
        self._outputs = max(sum(_outputs(weight) for weight in linear.weights) for linear in linears)
        self._thin = max(int(linear.rows[:, 1].max(initial=0)) for linear in linears)
        packed = [weight for linear in linears for weight in linear.weights if hasattr(weight, "code")]
        as_held = self._loops.AS_HELD and self._type == torch.bfloat16
        eight_bit = [weight for weight in packed if as_held and weight.w.dtype == np.int8]
        self._integers = int(len(eight_bit) > 0)  # what enters them becomes whole numbers
        self.takes_apart = len(eight_bit) < len(packed)  # weights in few bits become numbers before they are multiplied
        self._count, self._room, self._positions = 0, None, 0

    def __call__(self, ids: Any, rows: tuple[Any, ...], longest: int, picked: Any, *, logits: bool) -> Seen:
        """What is seen behind the picked rows (P,); ids (T,); rows: as in passes.Rows; longest: the last position + 1.
        logits: whether they are asked for, or the likeliest tokens are enough."""
        loops, layers, count = self._loops, self._layers, len(ids)
        self._turn_to(longest)
        self._make_room(count)
        hidden = layers.embedded(torch.from_numpy(ids)).float().contiguous().numpy()
        if layers.family.embedding_norm:
            loops.leave(self._norm, hidden.copy(), np.float32(1.0), np.zeros_like(hidden), hidden)
        for layer in self._held:
            loops.through(layer, self._room, hidden, *rows, self._lanes)
        if not len(picked):
            return Seen(np.empty(0, np.int64), np.empty(0, np.bool_))
        z = _array(torch.empty(len(picked), hidden.shape[1], dtype=self._type))
        loops.enter(self._norm, hidden[picked], z)
        if not logits and self._screen is not None and (found := self._screen.likeliest(z)) is not None:
            return Seen(found, np.ones(len(found), np.bool_))
        if len(picked) > len(self._logits):  # new memory takes as long to come as the logits to be made
            self._logits = np.empty((len(picked), len(self._head.w)), np.float32)
        whole = self._logits[: len(picked)]
        loops.alone(self._head, z, whole, self._lanes)
        return Seen.of(self._bent(whole))

    def copy_block(self, source: int, into: int) -> None:
        """What the cache holds in one block, into another."""
        for part in (*self._keys, *self._values):
            part[into] = part[source]

    def _bent(self, logits: Any) -> Any:
        layers = self._layers
        if layers.logits_scale != 1:
            logits *= np.float32(layers.logits_scale)
        if layers.head.bias is not None:
            logits += layers.head.bias.detach().float().numpy()
        if layers.softcap:
            logits = np.tanh(logits / np.float32(layers.softcap)) * np.float32(layers.softcap)
        return logits

    def _screen_of(self, layers: Layers) -> ExactArgmax | None:
        held = [weight for layer in self._built for linear in layer[:4] for weight in linear.weights]
        read = sum(weight.w.nbytes + getattr(weight, "scale", weight.w[:0]).nbytes for weight in held)
        z = np.empty(0, np.uint16 if self._type == torch.bfloat16 else np.float32)
        return exact_argmax_for(layers.head, self._head.w, z, layers.logits_scale, layers.softcap, read)

    def _make_room(self, count: int) -> None:
        if count > self._count:
            self._count = count
            room = self._loops.Room(
                z=_array(torch.zeros(count * self._widest, dtype=self._type)),
                q=_array(torch.zeros(count * self._q, dtype=self._type)),
                y=np.zeros(count * self._outputs, np.float32),
                u=np.zeros(count * max(self._thin, 1), np.float32),
                like=np.empty(0, np.uint16 if self._half else np.float32),
                x=torch.zeros(count * self._widest * self._integers, dtype=torch.int16).numpy(),
                scales=np.zeros(count * self._integers, np.float32),
            )
            self._room = self._loops.HeldRoom(room)

    def _turn_to(self, positions: int) -> None:
        """The tables of angles reach as far as `positions`."""
        if positions <= self._positions:
            return
        self._positions = max(512, 2 * positions)
        at = torch.arange(self._positions)
        scale = self._layers.family.query_scale
        factor = torch.empty(0) if scale is None else scale(self._layers.config, at).float()
        turns = {
            kind: self._loops.Turn(_array(cos.float()), _array(sin.float()), _array(factor))
            for kind, (cos, sin) in self._layers.angles(at).items()
        }
        self._held = [
            self._loops.Held(layer._replace(turn=turns[kind]), *cache)
            for layer, kind, cache in zip(self._built, self._kinds, self._cache, strict=True)
        ]

    def _norm_of(self, part: NormPart | None) -> Any:
        nothing = np.empty(0, np.float32)
        if part is None:
            return self._loops.Norm(0, nothing, nothing, np.float32(0.0))
        weight = _array(part.weight.float() + part.offset)
        bias = nothing if part.bias is None else _array(part.bias.float())
        return self._loops.Norm(2 if part.centered else 1, weight, bias, np.float32(part.eps))

    def _layer(self, part: Any) -> Any:
        fused = self._layers.family.fused_heads
        size, heads = part.size, part.query
        shape = self._loops.Shape(
            query=heads, key_value=part.key_value, size=size,
            k_at=size if fused else heads * size,
            v_at=2 * size if fused else (heads + part.key_value) * size,
            step=3 * size if fused else size,
            neighbours=self._layers.family.rope_pairs == "interleaved",
            turned_first=self._layers.family.rope_before_norm,
            window=part.window, scale=np.float32(part.scale), softcap=np.float32(part.softcap),
        )  # fmt: skip
        inner, gated = base_of(part.down[0]).in_features, self._layers.family.gated
        return self._loops.Layer(
            *(self._linear(modules) for modules in (part.qkv, part.o, part.gate_up, part.down)),
            before_attention=self._norm_of(part.before_attention),
            q_norm=self._norm_of(part.q_norm),
            k_norm=self._norm_of(part.k_norm),
            after_attention=self._norm_of(part.after_attention),
            before_mlp=self._norm_of(part.before_mlp),
            after_mlp=self._norm_of(part.after_mlp),
            shape=shape, turn=None, inner=inner, gated=gated, act=self._act,
            about=tuple(map(np.float32, about(part.act))), parallel=self._layers.parallel,
            scale=np.float32(self._layers.residual_scale),
        )  # fmt: skip

    def _linear(self, modules: list[Any]) -> Any:
        bases = [base_of(module) for module in modules]
        kinds = {(type(base), getattr(base, "scheme", None)) for base in bases}
        weights = tuple(self._weight(base, whole=len(kinds) > 1) for base in bases)
        bias = np.empty(0, np.float32)
        if any(base.bias is not None for base in bases):
            bias = np.concatenate([
                np.zeros(base.out_features, np.float32) if base.bias is None else base.bias.detach().float().numpy()
                for base in bases
            ])  # fmt: skip
        return self._loops.Linear(weights, bias, *self._adapters(modules, bases))

    def _adapters(self, modules: list[Any], bases: list[Any]) -> tuple[Any, ...]:
        """a, rows, b, spans, gains of Linear."""
        a, b, spans, rows = [], [], [], np.zeros((len(self.names), 2), np.int64)
        n, gains, at, total = sum(base.out_features for base in bases), None, 0, 0
        for adapter, name in enumerate(self.names):
            column, first = 0, 0
            for module, base in zip(modules, bases, strict=True):
                width = base.out_features
                if isinstance(module, LoraLayer) and name in module.lora_A:
                    down, up = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
                    a.append(down.to(self._type))
                    b.append((up.float().t() * float(module.scaling[name])).contiguous().flatten())
                    spans.append((adapter, first, len(down), column, width, at))
                    first, at = first + len(down), at + up.numel()
                    if name in module.lora_magnitude_vector:
                        gains = np.ones((len(self.names), n), np.float32) if gains is None else gains
                        gains[adapter, column : column + width] = _gains(module, name, base)
                column += width
            rows[adapter], total = (total, first), total + first
        k = bases[0].in_features
        return (
            _array(torch.cat(a) if a else torch.empty(0, k, dtype=self._type)),
            rows,
            _array(torch.cat(b) if b else torch.empty(0)),
            np.array(spans, np.int64).reshape(-1, 6),
            np.empty((0, 0), np.float32) if gains is None else gains,
        )

    def _weight(self, base: Any, *, whole: bool) -> Any:
        if not isinstance(base, QuantizedLinear):
            return self._loops.Dense(_array(base.weight.data))
        packed = None if whole else base.packed_weight()
        if packed is None:
            return self._loops.Dense(_array(base.dequantize()))
        weight, scale = _array(packed.weight.flatten()), _array(packed.scale)
        n = len(weight) * (1 if packed.code is None else 2) // base.in_features
        if packed.code is None:
            return self._loops.Packed(weight, scale, np.empty(0, np.float32), base.in_features, n)
        return self._loops.Packed(weight, scale, _array(packed.code), packed.share, n)


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What enters a product, and lies in the cache: bf16 where the weights are and the CPU multiplies it, else fp32."""
    return torch.bfloat16 if dtype == torch.bfloat16 and answering_loops().HAS_BF16 else torch.float32


def width_of(size: int) -> int:
    """Numbers that a head takes in the cache: whole vectors."""
    lanes: int = answering_loops().LANES
    return -(-size // lanes) * lanes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What is not used takes no memory (torch.zeros writes it all)."""
    return torch.frombuffer(map_pages(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def _array(x: Tensor) -> Any:
    x = x.detach().contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _outputs(weight: Any) -> int:
    return int(weight.n if hasattr(weight, "n") else len(weight.w))


def _gains(module: Any, name: str, base: Any) -> Any:
    """DoRA's m / |W + s B A|, row by row (functions.Dora)."""
    weight = (base.dequantize() if isinstance(base, QuantizedLinear) else base.weight).detach().float()
    down, up = module.lora_A[name].weight.detach().float(), module.lora_B[name].weight.detach().float()
    norm = torch.linalg.vector_norm(weight + float(module.scaling[name]) * (up @ down), dim=1)
    return (module.lora_magnitude_vector[name].weight.detach().float() / norm).numpy()
