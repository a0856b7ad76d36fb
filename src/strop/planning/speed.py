"""How long a step takes: its FLOPs by kind, each at the rate that kind of product reaches, and the bytes it moves.

The rates are shares of one measured (or tabled) rate of large products; where the shares are from is said beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from strop.engine.answers.cache import ROWS
from strop.machine.rates import Rates
from strop.planning.activations import HEAD_BYTES, KEEP_PAIRS, MicroBatch, offloaded_bytes, pairs
from strop.planning.cards import Card
from strop.planning.memory import Drawn, constant_bytes, packed_weights, weight_bytes
from strop.planning.setting import Setting

# Shares of the probe's rate on a CPU, from timers around the engine's functions (docs/performance.md, "Where the time
# goes") and the differences between the runs of docs/plan.md: a product with a rank of 16 is too thin to reach it.
FROZEN, THIN = 0.82, 0.5
ATTENTION, HEAD = 0.5, 1.0  # where `strop doctor` has not measured them
UNPACKED_PER_S = 1.0e9  # weights dequantized a second on two cores, where they are streamed
PLAIN = 2.9  # times as long in the plain step on a CPU: 76 tokens/s beside 215 to 230 (docs/log)
ANSWERING = 0.25  # of the probe's rate, where answers are drawn many together
REFERENCE = 0.35  # of a step: the forward pass of the reference
STEP_S = 0.08  # Python, dispatch, autograd and the casts of gradients, a micro-batch of 30 layers
HOST_BYTES_PER_S = 20e9  # between a card and the host, each way: of 32 GB/s of PCIe 4.0 with 16 lanes; not measured
GPU_SHARE = 0.45  # of a card's dense rate: 43 % at 8B LoRA on an H100 (NVIDIA NeMo AutoModel's published figure)


@dataclass(frozen=True)
class Rate:
    """Products in FLOP/s and memory in bytes/s; source: measured here, or whose table. peak: the first is a data
    sheet's, of which a real step reaches a part."""

    flops: float
    bandwidth: float
    source: str
    peak: bool = False
    head_flops: float = 0.0  # 0: not measured
    attention_flops: float = 0.0

    @staticmethod
    def measured(rates: Rates, dtype: str) -> Rate:
        """Of this machine's CPU in one type, as `strop doctor` has found it."""
        flops = rates.bf16_flops if dtype == "bf16" else rates.fp32_flops
        kind = dtype if dtype in rates.head_flops else "fp32"
        head, attention = rates.head_flops[kind], rates.attention_flops[kind]
        return Rate(flops, rates.bandwidth, "strop doctor", head_flops=head, attention_flops=attention)

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
    layer behind its attention on supervised rows alone; a layer that is checkpointed does its forward twice. The plain
    step computes all rows of every layer."""
    shape, layers = setting.shape, setting.shape.layers
    front = sum(x.active_weights for x in shape.linears if x.name in ("q_proj", "k_proj", "v_proj", "qkv_proj"))
    behind = sum(x.active_weights for x in shape.linears) - front
    last = batch.tokens if setting.step == "plain" else batch.supervised
    rows = layers * batch.tokens * front + ((layers - 1) * batch.tokens + last) * behind
    forward = 2.0 * rows
    again = setting.checkpoint_layers / layers
    frozen = forward * (2 + again) - 2.0 * front * batch.tokens
    adapters = (6 + 2 * again) * (setting.active_adapter_weights - setting.whole) * batch.tokens
    long = sum(number * queries * keys for number, queries, keys in batch.documents if keys > KEEP_PAIRS)
    scored = 2.0 * layers * shape.query * pairs(setting, batch)  # of one product
    attention = (7 + 2 * again) * scored if setting.tiles else (6 + 2 * again) * scored + layers * shape.query * long
    return Flops(frozen, adapters, attention, 4.0 * shape.embedding * batch.supervised)


def micro_batch_seconds(setting: Setting, batch: MicroBatch, rate: Rate) -> float:
    work = flops(setting, batch)
    unpacked = packed_weights(setting) * (2 + setting.checkpoint_layers / setting.shape.layers)
    if rate.peak:
        computing = work.total / (GPU_SHARE * rate.flops) + 2 * unpacked / rate.bandwidth
        return max(computing, 2 * offloaded_bytes(setting, batch) / HOST_BYTES_PER_S)  # beside each other
    attention, head = rate.attention_flops or ATTENTION * rate.flops, rate.head_flops or HEAD * rate.flops
    moved = batch.tokens * setting.shape.layers * (element_bytes(setting) + thin_bytes(setting))
    return (PLAIN if setting.step == "plain" else 1) * (
        (work.frozen / FROZEN + work.adapters / THIN) / rate.flops
        + work.attention / attention
        + work.head / head
        + repacked_bytes(batch.supervised, setting.shape.vocabulary, setting.shape.hidden, setting.element)
        / rate.bandwidth
        + moved / rate.bandwidth
        + unpacked / UNPACKED_PER_S
        + STEP_S * setting.shape.layers / 30
    )


def repacked_bytes(rows: int, vocabulary: int, hidden: int, element: int) -> int:
    """Each chunk of the head's rows lays its weight out anew for either product, read and written: 12 times a thousand
    rows where the vocabulary has 151,936 tokens."""
    chunks = -(-rows // max(16, HEAD_BYTES // (vocabulary * element)))
    return chunks * 2 * 2 * vocabulary * hidden * element


def element_bytes(setting: Setting) -> int:
    """Read and written by the element-wise work of a layer and token, forward and backward."""
    shape, b = setting.shape, setting.element
    return b * (20 * shape.hidden + 16 * shape.intermediate + 8 * (shape.query + 2 * shape.key_value))


def thin_bytes(setting: Setting) -> int:
    """Read and written by LoRA's narrow products of a layer and token: all of an input or output for each, four times
    either, where a rank of 16 computes little on it."""
    linears = zip(setting.shape.linears, setting.ranks, strict=True)
    return setting.element * sum(round(4 * linear.active * linear.ends) for linear, rank in linears if rank)


def step_seconds(setting: Setting, batch: MicroBatch, micro_batches: float, rate: Rate) -> float:
    """A step of so many micro-batches like this one, and the optimizer's pass over the adapter."""
    return micro_batches * micro_batch_seconds(setting, batch, rate) + 24 * setting.adapter_weights / rate.bandwidth


def drawing_seconds(setting: Setting, drawn: Drawn, rate: Rate) -> float:
    """Of the answers of one step, all as long as they may be: each pass reads the weights once for as many as go
    together."""
    tokens = drawn.texts * drawn.answer + drawn.texts // drawn.group * drawn.prompt
    passes = drawn.answer * -(-drawn.texts // ROWS)
    weights = setting.parameters - setting.shape.idle + setting.active_adapter_weights
    share = GPU_SHARE if rate.peak else ANSWERING
    moved = passes * (weight_bytes(setting) + constant_bytes(setting)) / rate.bandwidth
    return 2.0 * weights * tokens / (share * rate.flops) + moved


def tokens_per_s(setting: Setting, batch: MicroBatch, rate: Rate) -> float:
    return batch.tokens / micro_batch_seconds(setting, batch, rate)
