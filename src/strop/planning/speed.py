"""How long a step takes: its FLOPs by kind, each at the rate that kind of product reaches, and the bytes it moves.

The rates are shares of one measured (or tabled) rate of large products; where the shares are from is said beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from strop.planning.activations import KEEP_PAIRS, MicroBatch
from strop.planning.cards import Card
from strop.planning.memory import packed_weights
from strop.planning.setting import Setting

# A CPU's shares of the probe's rate, from timers around the engine's functions (docs/performance.md, "Where the time
# goes", and docs/plan.md): products with a rank of 16 or a head of 64 are too thin to reach it.
FROZEN, THIN, ATTENTION, HEAD = 0.80, 0.27, 0.20, 0.80
UNPACKED_PER_S = 1.0e9  # weights dequantized a second on two cores, where they are streamed
STEP_S = 0.05  # Python and dispatch of a micro-batch of 30 layers
GPU_SHARE = 0.45  # of a card's dense rate: 43 % at 8B LoRA on an H100 (NVIDIA NeMo AutoModel's published figure)


@dataclass(frozen=True)
class Rate:
    """Products in FLOP/s and memory in bytes/s; source: measured here, or whose table. peak: the first is a data
    sheet's, of which a real step reaches a part."""

    flops: float
    bandwidth: float
    source: str
    peak: bool = False

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
    layer behind its attention on supervised rows alone; a layer that is checkpointed does its forward twice."""
    shape, layers = setting.shape, setting.shape.layers
    front = sum(x.weights for x in shape.linears if x.name in ("q_proj", "k_proj", "v_proj", "qkv_proj"))
    behind = sum(x.weights for x in shape.linears) - front
    rows = layers * batch.tokens * front + ((layers - 1) * batch.tokens + batch.supervised) * behind
    forward = 2.0 * rows
    again = setting.checkpoint_layers / layers
    frozen = forward * (2 + again) - 2.0 * front * batch.tokens
    adapters = (6 + 2 * again) * (setting.adapter_weights - setting.whole) * batch.tokens
    long = sum(number * queries * keys for number, queries, keys in batch.documents if keys > KEEP_PAIRS)
    pairs = layers * shape.query * batch.pairs
    attention = (12 + 4 * again) * pairs + 2.0 * layers * shape.query * (long / 2)
    return Flops(frozen, adapters, attention, 4.0 * shape.embedding * batch.supervised)


def micro_batch_seconds(setting: Setting, batch: MicroBatch, rate: Rate) -> float:
    work = flops(setting, batch)
    unpacked = packed_weights(setting) * (2 + setting.checkpoint_layers / setting.shape.layers)
    if rate.peak:
        return work.total / (GPU_SHARE * rate.flops) + 2 * unpacked / rate.bandwidth
    products = work.frozen / FROZEN + work.adapters / THIN + work.attention / ATTENTION + work.head / HEAD
    moved = batch.tokens * setting.shape.layers * element_bytes(setting)
    return (
        products / rate.flops + moved / rate.bandwidth + unpacked / UNPACKED_PER_S + STEP_S * setting.shape.layers / 30
    )


def element_bytes(setting: Setting) -> int:
    """Read and written by the element-wise work of a layer and token, forward and backward."""
    shape, b = setting.shape, setting.element
    return b * (20 * shape.hidden + 16 * shape.intermediate + 8 * (shape.query + 2 * shape.key_value))


def step_seconds(setting: Setting, batch: MicroBatch, rows: int, tokens_a_row: float, rate: Rate) -> float:
    """A step of `rows` rows: as many micro-batches as they fill, and the optimizer's pass over the adapter."""
    micro_batches = max(1.0, rows * tokens_a_row / batch.tokens)
    return micro_batches * micro_batch_seconds(setting, batch, rate) + 24 * setting.adapter_weights / rate.bandwidth


def tokens_per_s(setting: Setting, batch: MicroBatch, rate: Rate) -> float:
    return batch.tokens / micro_batch_seconds(setting, batch, rate)
