"""How long a step takes: its FLOPs by kind, each at the rate that kind of product reaches, the bytes it moves, and what
each layer and each micro-batch costs whatever their size.

On a CPU the rates and costs are those that `strop doctor` has measured (planning.calibrate); a card's are of its data
sheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from strop.engine.decode.cache import MAX_SEQUENCES
from strop.machine.probe import TILED_RANK, Machine
from strop.machine.rates import Rates
from strop.planning.activations import HEAD_BYTES, KEEP_PAIRS, MicroBatch, offloaded_bytes, pairs
from strop.planning.gpus import Card
from strop.planning.memory import Drawn, constant_bytes, packed_weights, weight_bytes
from strop.planning.workload import Setting

THIN, THIN_APART = 0.5, 0.25  # of the large products' rate, by products with a rank; by oneDNN's, with larger ones
# Where `strop doctor` has not measured: as it found them on two cores of a Xeon with AMX (docs/log).
ATTENTION, HEAD, MOVED = 0.2, 0.8, 0.5  # shares of the large products' rate, twice, and of memory's
LAYER_S, KINDS_S, PLAIN, UNPACKED_PER_S = 5e-3, 0.03, 1.8, 1e9
INTEGERS = {"none": 2.4, "int8": 3.5}  # frozen products in 8-bit integers, times those in fp32 (docs/log)
KINDS_HIDDEN, KINDS_POWER = 576, 0.75  # kinds of product are made in 0.57 and 1.5 times as long at 256 and 1,024
UPDATE_BYTES = 40  # of a number: read and written by the norm of its gradient, by clipping, and by AdamW
UPDATE_S = 1e-5  # of a weight: three calls, on a CPU
FORWARD = 0.35  # of a step's element-wise work: a forward that is done again; and the forward pass of the reference
ANSWERING = 0.25  # of the probe's rate, where answers are drawn many together
# DoRA: times a layer's own cost, and times the plain step's time, where peft computes it (each by one run of SmolLM2).
DORA_LAYERS, PLAIN_DORA = 2.0, 2.3
LOGIT_BYTES = 48  # of a number of the plain step's logits, moved, some rows at a time: in fp32, softmax, there and back
HOST_BYTES_PER_S = 20e9  # between a card and the host, each way: of 32 GB/s of PCIe 4.0 with 16 lanes; not measured
# FLOP/s a core and bytes/s of such a machine: of wide vector units at 3 GHz, 60 % of their peak.
CORE_BF16, CORE_FP32, CORE_PLAIN, HERE_BANDWIDTH = 200e9, 90e9, 45e9, 20e9
GUESS = "its instructions; `strop doctor` measures"
GPU_SHARE = 0.45  # of a card's dense rate: 43 % at 8B LoRA on an H100 (NVIDIA NeMo AutoModel's published figure)


def has_bf16(machine: Machine) -> bool:
    """Whether its CPU multiplies bf16."""
    return "avx512_bf16" in machine.vector or "amx_bf16" in machine.vector


@dataclass(frozen=True)
class Rate:
    """Products in FLOP/s and memory in bytes/s; source: measured here, or whose table. peak: the first is a data
    sheet's, of which a real step reaches a part. The others as planning.calibrate finds them; 0: not measured."""

    flops: float
    bandwidth: float
    source: str
    peak: bool = False
    head_flops: float = 0.0
    attention_flops: float = 0.0
    layer_s: float = 0.0
    moved: float = 0.0  # bytes/s of element-wise work
    kinds_s: float | None = None  # None: not measured
    plain: float = 0.0  # times the fast step's time
    thin_flops: float = 0.0  # of products with a rank above TILED_RANK
    unpacked_per_s: Mapping[str, float] = field(default_factory=dict)  # weights, by scheme
    integers: Mapping[str, float] = field(default_factory=dict)  # FLOP/s of frozen products in them, by scheme
    frozen_flops: float = 0.0  # 0: as flops

    @staticmethod
    def measured(rates: Rates, dtype: str) -> Rate:
        """Of this machine's CPU in one type, as `strop doctor` has found it."""
        flops = rates.bf16_flops if dtype == "bf16" else rates.fp32_flops
        costs = rates.costs[dtype if dtype in rates.costs else "fp32"]
        rate = Rate(flops, rates.bandwidth, "strop doctor", unpacked_per_s=rates.unpacked_per_s)
        return replace(rate, integers=rates.integers, **costs)  # type: ignore[arg-type]

    @staticmethod
    def of_cpu(machine: Machine, rates: Rates | None, dtype: str) -> Rate:
        """As `strop doctor` has measured it; where it has not, by its instructions."""
        if rates is not None:
            return Rate.measured(rates, dtype)
        wide = CORE_FP32 if "avx512f" in machine.vector else CORE_PLAIN
        core = CORE_BF16 if has_bf16(machine) and dtype == "bf16" else wide
        return Rate(core * machine.cores, HERE_BANDWIDTH, f"a guess by {GUESS}")

    def as_set(self, setting: Setting) -> Rate:
        """With products in 8-bit integers, where they are: the layers', and the head's, which is in 16 bit always."""
        if not setting.integers:
            return self
        layers, head = (self.integers.get(name, INTEGERS[name] * self.flops) for name in (setting.scheme, "none"))
        faster = head / self.flops
        return replace(self, frozen_flops=layers, head_flops=faster * (self.head_flops or HEAD * self.flops))

    @staticmethod
    def of(card: Card) -> Rate:
        return Rate(card.tflops * 1e12, card.bandwidth_gbs * 1e9, f"data sheet of {card.name}", peak=True)


@dataclass(frozen=True)
class Flops:
    """Of one micro-batch, forward and backward."""

    frozen: float
    adapters: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.frozen + self.adapters + self.attention + self.head


def flops(setting: Setting, batch: MicroBatch) -> Flops:
    """Exact for the fast step: no dW for frozen weights, no dX in front of the first layer, the head and the last
    layer behind its attention on supervised rows alone; a layer that is checkpointed does its forward twice. DoRA with
    dropout has a frozen product more in the forward and two in the backward. The plain step computes all rows of every
    layer."""
    shape, layers = setting.shape, setting.shape.layers
    front = sum(x.active_weights for x in shape.linears if x.name in ("q_proj", "k_proj", "v_proj", "qkv_proj"))
    behind = sum(x.active_weights for x in shape.linears) - front
    last = batch.tokens if setting.step == "plain" else batch.supervised
    rows = layers * batch.tokens * front + ((layers - 1) * batch.tokens + last) * behind
    forward = 2.0 * rows
    again = setting.checkpoint_layers / layers
    frozen = forward * (2 + again) - 2.0 * front * batch.tokens
    if setting.dora and setting.dropout and setting.step == "fast":
        linears = zip(shape.linears, setting.ranks, strict=True)
        frozen += forward * (3 + again) * sum(x.active_weights for x, rank in linears if rank) / (front + behind)
    adapters = (6 + 2 * again) * (setting.active_adapter_weights - setting.whole) * batch.tokens
    long = sum(number * queries * keys for number, queries, keys in batch.documents if keys > KEEP_PAIRS)
    scored = 2.0 * layers * shape.query_size * pairs(setting, batch)  # of one product
    attention = (
        (7 + 2 * again) * scored if setting.tiles else (6 + 2 * again) * scored + layers * shape.query_size * long
    )
    head = (6.0 if setting.whole_head else 4.0) * shape.embedding + 6.0 * setting.head_rank * (
        shape.hidden + shape.vocabulary
    )
    return Flops(frozen, adapters, attention, head * batch.supervised)


@dataclass(frozen=True)
class Work:
    """Of one micro-batch on a CPU. frozen, attention, head: FLOPs; adapters: those that large products would do in the
    same time; thin: of adapters whose rank is too large for tiles; weights: bytes of frozen weights that are read;
    moved: bytes of element-wise work and of LoRA's narrow products; layers: how often one begins."""

    frozen: float
    adapters: float
    thin: float
    attention: float
    head: float
    weights: float
    moved: float
    layers: float


def work_of(setting: Setting, batch: MicroBatch) -> Work:
    found, shape = flops(setting, batch), setting.shape
    again = 1 + FORWARD * setting.checkpoint_layers / shape.layers
    weights = shape.layers * sum(linear.active_weights for linear in shape.linears)
    passes = 2 + setting.checkpoint_layers / shape.layers
    moved = batch.tokens * shape.layers * (element_bytes(setting) + thin_bytes(setting))
    apart = max(setting.ranks, default=0) > TILED_RANK
    element = setting.element if not setting.integers else 1 if setting.scheme == "int8" else 2
    adapters, thin = (0.0, found.adapters) if apart else (found.adapters / THIN, 0.0)
    return Work(
        found.frozen, adapters, thin, found.attention, found.head, passes * weights * element, again * moved,
        again * shape.layers * (DORA_LAYERS if setting.dora else 1),
    )  # fmt: skip


def known_seconds(work: Work, rate: Rate) -> float:
    """Of products, by their rate."""
    frozen = work.frozen / (rate.frozen_flops or rate.flops)
    return frozen + work.adapters / rate.flops + work.weights / rate.bandwidth


def micro_batch_seconds(setting: Setting, batch: MicroBatch, rate: Rate) -> float:
    unpacked = (
        0.0 if setting.integers else packed_weights(setting) * (2 + setting.checkpoint_layers / setting.shape.layers)
    )
    if rate.peak:
        computing = flops(setting, batch).total / (GPU_SHARE * rate.flops) + 2 * unpacked / rate.bandwidth
        return max(computing, 2 * offloaded_bytes(setting, batch) / HOST_BYTES_PER_S)  # beside each other
    work, plain, rate = work_of(setting, batch), setting.step == "plain", rate.as_set(setting)
    layers = (
        known_seconds(work, rate)
        + work.thin / (rate.thin_flops or THIN_APART * rate.flops)
        + work.layers * (rate.layer_s or LAYER_S)
        + work.moved / (rate.moved or MOVED * rate.bandwidth)
        + work.attention / (rate.attention_flops or ATTENTION * rate.flops)
    )
    once = unpacked / rate.unpacked_per_s.get(setting.scheme, UNPACKED_PER_S)
    own = setting.own_products and not plain
    kinds_s = (0.0 if own else KINDS_S) if rate.kinds_s is None else rate.kinds_s
    once += kinds_s * math.pow(setting.shape.hidden / KINDS_HIDDEN, KINDS_POWER)
    once += work.head / (rate.head_flops or HEAD * rate.flops)
    shape = setting.shape
    once += repacked_bytes(batch.supervised, shape.vocabulary, shape.hidden, setting.element, own) / rate.bandwidth
    if plain:
        once += LOGIT_BYTES * batch.supervised * shape.vocabulary / (rate.moved or MOVED * rate.bandwidth)
        layers *= (rate.plain or PLAIN) * (PLAIN_DORA if setting.dora else 1)
    else:  # what the model's own modules compute takes as long as in the plain step
        layers *= 1 + setting.weights_by_model * ((rate.plain or PLAIN) - 1)
    return layers + once


def repacked_bytes(rows: int, vocabulary: int, hidden: int, element: int, own: bool) -> int:
    """Each chunk of the head's rows lays its weight out anew for either product, read and written (own: in the cache,
    so that it is read alone): 12 times a thousand rows where the vocabulary has 151,936 tokens."""
    chunks = -(-rows // max(16, HEAD_BYTES // (vocabulary * element)))
    return chunks * 2 * (1 if own else 2) * vocabulary * hidden * element


def element_bytes(setting: Setting) -> int:
    """Read and written by the element-wise work of a layer and token, forward and backward."""
    shape, b = setting.shape, setting.element
    return b * (20 * shape.hidden + 16 * shape.intermediate + 8 * (shape.query_size + 2 * shape.key_value_size))


def thin_bytes(setting: Setting) -> int:
    """Read and written by LoRA's narrow products of a layer and token: all of an input or output for each, four times
    either, where a rank of 16 computes little on it."""
    linears = zip(setting.shape.linears, setting.ranks, strict=True)
    return setting.element * sum(round(4 * linear.active * linear.adapter_size) for linear, rank in linears if rank)


def step_seconds(setting: Setting, batch: MicroBatch, micro_batches: float, rate: Rate) -> float:
    """A step of so many micro-batches like this one, and the optimizer's pass over the adapter."""
    return micro_batches * micro_batch_seconds(setting, batch, rate) + _update_seconds(setting, rate)


def steps_seconds(setting: Setting, steps: Sequence[Sequence[MicroBatch]], rate: Rate) -> float:
    """Of all of these steps."""
    batches = sum(micro_batch_seconds(setting, batch, rate) for step in steps for batch in step)
    return batches + len(steps) * _update_seconds(setting, rate)


def _update_seconds(setting: Setting, rate: Rate) -> float:
    weights = 2 * setting.shape.layers * sum(map(bool, setting.ranks))
    return UPDATE_BYTES * setting.adapter_weights / rate.bandwidth + (0 if rate.peak else UPDATE_S * weights)


def drawing_seconds(setting: Setting, drawn: Drawn, rate: Rate) -> float:
    """Of the answers of one step, all as long as they may be: each pass reads the weights once for as many as go
    together."""
    tokens = drawn.texts * drawn.answer + drawn.texts // drawn.group * drawn.prompt
    passes = drawn.answer * -(-drawn.texts // MAX_SEQUENCES)
    weights = setting.parameters - setting.shape.idle_expert_weights + setting.active_adapter_weights
    share = GPU_SHARE if rate.peak else ANSWERING
    moved = passes * (weight_bytes(setting) + constant_bytes(setting)) / rate.bandwidth
    return 2.0 * weights * tokens / (share * rate.flops) + moved


def tokens_per_s(setting: Setting, batch: MicroBatch, rate: Rate) -> float:
    """Of the rows: what they share is computed once, and counted in each."""
    return (batch.tokens + batch.shared) / micro_batch_seconds(setting, batch, rate)
