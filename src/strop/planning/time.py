"""Predict the time of a training step from its FLOPs and the bytes that it moves.

Each kind of matmul has its own rate, and each layer and micro-batch a constant cost. `strop doctor` measures rates and
costs of a CPU (planning.calibrate). Those of a GPU come from its data sheet (planning.machines), and the time of a step
there is that of the bytes and FLOPs that benchmarks/card_estimate.py counts on a simulated GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from strop.engine.decode.cache import MAX_SEQUENCES
from strop.machine.probe import MAX_TILED_RANK, Machine
from strop.machine.rates import Rates
from strop.planning.activations import HEAD_BYTES, MAX_SAVED_KEYS, MicroBatch, count_pairs
from strop.planning.memory import RolloutLoad, constant_bytes, host_bytes, packed_weights, weight_bytes
from strop.planning.workload import BITS, Workload

# Rate of LoRA matmuls relative to large matmuls: with strop's tiled kernels, and with oneDNN at larger ranks.
LORA_SHARE, WIDE_LORA_SHARE = 0.5, 0.25
# Defaults for a CPU that `strop doctor` has not measured, from two cores of a Xeon with AMX (docs/log). Attention and
# head are shares of the rate of large matmuls, element-wise work is a share of the memory bandwidth.
ATTENTION_SHARE, HEAD_SHARE, MOVED_SHARE = 0.2, 0.8, 0.5
LAYER_S, COMPILE_S, PLAIN, UNPACKED_PER_S = 5e-3, 0.03, 1.8, 1e9
INTEGER_SPEEDUP = {"none": 2.4, "int8": 3.5}  # int8 matmuls of frozen weights, relative to fp32 (docs/log)
# Compiling a matmul takes (hidden / COMPILE_HIDDEN)^COMPILE_POWER of the time that was measured at COMPILE_HIDDEN.
COMPILE_HIDDEN, COMPILE_POWER = 576, 0.75
UPDATE_BYTES = 40  # bytes moved per trainable weight by the gradient norm, clipping and AdamW
UPDATE_S = 1e-5  # seconds per trainable tensor for three calls, on a CPU
DISK_BYTES_PER_S = 500e6  # of a SATA SSD; a run on a streamed base should not need more
READ_S_PER_BYTE = 0.3e-9  # in which a core reads a streamed base into short memory instead of computing (docs/log)
FORWARD = 0.35  # share of a step's time in the forward pass
DECODE_SHARE = 0.25  # rate of sampling many completions, relative to large matmuls
# Factors of DoRA on a layer's constant cost, and on the plain step's time (one run of SmolLM2 each).
DORA_LAYERS, PLAIN_DORA = 2.0, 2.3
LOGIT_BYTES = 48  # bytes moved per logit of the plain step: to fp32, softmax, forward and backward
HOST_BYTES_PER_S = 20e9  # assumed between GPU and host in each direction; PCIe 4.0 x16 has 32 GB/s
# Assumed FLOP/s per core (bf16, AVX-512, other) and bytes/s of a CPU that was not measured.
CORE_BF16, CORE_FP32, CORE_NARROW, CPU_BANDWIDTH = 200e9, 90e9, 45e9, 20e9
LAUNCH_S = 10e-6  # seconds of the host per kernel on a GPU, with Python and autograd (assumed)
# Kernels of a layer, forward and backward, and factors of the plain step (transformers) on the bytes that it moves
# there: counted on the simulated GPU (docs/cards.md).
FAST_KERNELS, UNPACK_KERNELS, PLAIN_KERNELS, PLAIN_MOVED = 60, 14, 240, 9
SCORES_MOVED = 46  # values moved per score of attention with a soft cap, counted in engine.train.attention


@dataclass(frozen=True)
class Rate:
    """Speed of a device in one dtype. `planning.calibrate` measures the fields after `peak` (0: not measured)."""

    flops: float  # FLOP/s of large matmuls
    bandwidth: float  # bytes/s of memory
    source: str  # where the figures come from
    gpu: bool = False  # the rates are those of a GPU, whose host only launches kernels
    head_flops: float = 0.0
    attention_flops: float = 0.0
    layer_s: float = 0.0  # constant seconds per layer
    moved: float = 0.0  # bytes/s of element-wise work
    kinds_s: float | None = None  # seconds to compile the matmuls of a new row length (None: not measured)
    plain: float = 0.0  # time of the plain step relative to the fast step (engine.train.plain and .fast)
    thin_flops: float = 0.0  # FLOP/s of LoRA matmuls with a rank above MAX_TILED_RANK
    unpacked_per_s: Mapping[str, float] = field(default_factory=dict)  # weights dequantized, by quantization scheme
    integers: Mapping[str, float] = field(default_factory=dict)  # FLOP/s of int8 matmuls, by quantization scheme
    frozen_flops: float = 0.0  # FLOP/s of matmuls with frozen weights (0: `flops`)

    @staticmethod
    def measured(rates: Rates, dtype: str) -> Rate:
        flops = rates.bf16_flops if dtype == "bf16" else rates.fp32_flops
        costs: dict[str, Any] = {**rates.costs[dtype if dtype in rates.costs else "fp32"]}
        costs |= {"unpacked_per_s": rates.unpacked_per_s, "integers": rates.integers}
        source = "strop doctor, but too low: other programs used the machine" if rates.busy else "strop doctor"
        return Rate(flops, rates.bandwidth, source, **costs)

    @staticmethod
    def of_cpu(machine: Machine, rates: Rates | None, dtype: str) -> Rate:
        """Return the measured rate of a CPU, or an estimate from its vector instructions."""
        if rates is not None:
            return Rate.measured(rates, dtype)
        fp32 = CORE_FP32 if "avx512f" in machine.vector else CORE_NARROW
        core = CORE_BF16 if machine.has_bf16 and dtype == "bf16" else fp32
        source = "the CPU's instructions, a rough estimate; `strop doctor` measures it"
        return Rate(core * machine.cores, CPU_BANDWIDTH, source)

    def for_workload(self, workload: Workload) -> Rate:
        """Return the rate with the speed of int8 matmuls, if the workload uses them."""
        if not workload.compute.int8_matmul:
            return self
        schemes = (workload.base.scheme, "none")  # the head is never quantized
        layers, head = (self.integers.get(name, INTEGER_SPEEDUP[name] * self.flops) for name in schemes)
        speedup = head / self.flops
        head_flops = speedup * (self.head_flops or HEAD_SHARE * self.flops)
        return replace(self, frozen_flops=layers, head_flops=head_flops)


@dataclass(frozen=True)
class Flops:
    frozen: float
    adapters: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.frozen + self.adapters + self.attention + self.head


def count_flops(workload: Workload, batch: MicroBatch) -> Flops:
    """Count the FLOPs of a micro-batch. The count is exact for the fast step (FastLoss)."""
    # Frozen weights have no gradient, and neither has the input of the first layer. After the last attention, the fast
    # step computes only supervised rows. A checkpointed layer computes its forward pass twice. DoRA with dropout adds a
    # matmul with frozen weights to the forward pass, and two to the backward pass.
    shape, layers, adapter = workload.shape, workload.shape.layers, workload.adapter
    qkv = sum(x.active_weights for x in shape.linears if x.name in ("q_proj", "k_proj", "v_proj", "qkv_proj"))
    other_weights = sum(x.active_weights for x in shape.linears) - qkv
    last_rows = batch.tokens if workload.compute.step == "plain" else batch.supervised
    weight_tokens = layers * batch.tokens * qkv + ((layers - 1) * batch.tokens + last_rows) * other_weights
    forward = 2.0 * weight_tokens
    recomputed_share = workload.compute.checkpointed_layers / layers
    frozen = forward * (2 + recomputed_share) - 2.0 * qkv * batch.tokens
    frozen += forward + 2.0 * qkv * batch.tokens if adapter.full else 0.0  # the weights' own gradients
    if adapter.dora and adapter.dropout and workload.compute.step == "fast":
        adapted = sum(x.active_weights for x, rank in workload.ranked_linears() if rank)
        frozen += forward * (3 + recomputed_share) * adapted / (qkv + other_weights)
    adapters = (6 + 2 * recomputed_share) * (workload.active_adapter_weights - adapter.extra_weights) * batch.tokens
    saved = MAX_SAVED_KEYS if workload.compute.device == "cpu" else 0  # a GPU saves no scores
    long_pairs = sum(number * queries * keys for number, queries, keys in batch.documents if keys > saved)
    matmul = 2.0 * layers * shape.query_size * count_pairs(workload, batch)  # of queries and keys
    if workload.compute.attention_tiles:
        attention = (7 + 2 * recomputed_share) * matmul
    else:
        attention = (6 + shape.softcap + 2 * recomputed_share) * matmul + layers * shape.query_size * long_pairs
    head = (6.0 if adapter.full_head else 4.0) * shape.embedding_weights
    head += 6.0 * adapter.head_rank * (shape.hidden + shape.vocabulary)
    return Flops(frozen, adapters, attention, head * batch.supervised)


@dataclass(frozen=True)
class Work:
    """Work of one micro-batch on a CPU, with one field for each rate."""

    frozen: float
    adapters: float  # FLOPs of adapters, divided by LORA_SHARE
    wide_lora: float  # FLOPs of adapters whose rank is too large for strop's tiled kernels
    attention: float
    head: float
    weights: float  # bytes of frozen weights that are read
    moved: float  # bytes of element-wise work and of LoRA's narrow matmuls
    layers: float


def count_work(workload: Workload, batch: MicroBatch) -> Work:
    count, shape, compute = count_flops(workload, batch), workload.shape, workload.compute
    recompute_factor = 1 + FORWARD * compute.checkpointed_layers / shape.layers
    weights = shape.layers * sum(linear.active_weights for linear in shape.linears)
    passes = 2 + compute.checkpointed_layers / shape.layers
    # Values moved per layer and token. LoRA matmuls move each input and output four times.
    elementwise = 20 * shape.hidden + 16 * shape.intermediate + 8 * (shape.query_size + 2 * shape.key_value_size)
    lora = sum(round(4 * x.active * x.adapter_size) for x, rank in workload.ranked_linears() if rank)
    moved = batch.tokens * shape.layers * compute.dtype_bytes * (elementwise + lora)
    untiled = max(workload.adapter.ranks, default=0) > MAX_TILED_RANK
    weight = compute.dtype_bytes if not compute.int8_matmul else 1 if workload.base.scheme == "int8" else 2
    adapters, wide_lora = (0.0, count.adapters) if untiled else (count.adapters / LORA_SHARE, 0.0)
    return Work(
        count.frozen, adapters, wide_lora, count.attention, count.head, passes * weights * weight,
        recompute_factor * moved, recompute_factor * shape.layers * (DORA_LAYERS if workload.adapter.dora else 1),
    )  # fmt: skip


def matmul_seconds(work: Work, rate: Rate) -> float:
    """Return the seconds of large matmuls and of reading the weights, whose rates are measured without a fit."""
    frozen = work.frozen / (rate.frozen_flops or rate.flops)
    return frozen + work.adapters / rate.flops + work.weights / rate.bandwidth


def micro_batch_seconds(workload: Workload, batch: MicroBatch, rate: Rate) -> float:
    """Return the seconds of a micro-batch, with its pass without gradients if the step has one (GradCache)."""
    return _gradient_seconds(workload, batch, rate) * (1 + FORWARD * workload.compute.embeds_twice)


def _gradient_seconds(workload: Workload, batch: MicroBatch, rate: Rate) -> float:
    shape, compute = workload.shape, workload.compute
    passes = 0.0 if compute.int8_matmul else 2 + compute.checkpointed_layers / shape.layers
    unpacked = packed_weights(workload) * passes
    if rate.gpu:
        return _gpu_seconds(workload, batch, rate, unpacked)
    work, is_plain, rate = count_work(workload, batch), compute.step == "plain", rate.for_workload(workload)
    layers = (
        matmul_seconds(work, rate)
        + work.wide_lora / (rate.thin_flops or WIDE_LORA_SHARE * rate.flops)
        + work.layers * (rate.layer_s or LAYER_S)
        + work.moved / (rate.moved or MOVED_SHARE * rate.bandwidth)
        + work.attention / (rate.attention_flops or ATTENTION_SHARE * rate.flops)
    )
    fixed = unpacked / rate.unpacked_per_s.get(workload.base.scheme, UNPACKED_PER_S)
    bf16_kernel = compute.bf16_head_kernel and not is_plain
    kinds_s = (0.0 if bf16_kernel else COMPILE_S) if rate.kinds_s is None else rate.kinds_s
    fixed += kinds_s * math.pow(shape.hidden / COMPILE_HIDDEN, COMPILE_POWER)
    fixed += work.head / (rate.head_flops or HEAD_SHARE * rate.flops)
    repacked = repacked_bytes(batch.supervised, shape.vocabulary, shape.hidden, compute.dtype_bytes, bf16_kernel)
    fixed += repacked / rate.bandwidth
    if is_plain:
        fixed += LOGIT_BYTES * batch.supervised * shape.vocabulary / (rate.moved or MOVED_SHARE * rate.bandwidth)
        layers *= (rate.plain or PLAIN) * (PLAIN_DORA if workload.adapter.dora else 1)
    else:  # modules of transformers take as long as in the plain step
        layers *= 1 + workload.model_code_share * ((rate.plain or PLAIN) - 1)
    return layers + fixed + READ_S_PER_BYTE * _streamed_bytes(workload)


def _gpu_seconds(workload: Workload, batch: MicroBatch, rate: Rate, unpacked: float) -> float:
    """Return the longest of what overlaps on a GPU: computing, launching kernels, and copying the inputs of layers."""
    count, work, shape = count_flops(workload, batch), count_work(workload, batch), workload.shape
    compute, is_plain = workload.compute, workload.compute.step == "plain"
    recompute_factor = 1 + FORWARD * compute.checkpointed_layers / shape.layers
    passed = recompute_factor * batch.tokens * shape.layers * compute.dtype_bytes * (PLAIN_MOVED if is_plain else 1)
    values = 15 * shape.hidden + 12 * shape.intermediate + 6 * (shape.query_size + 2 * shape.key_value_size)
    narrow = 2.6 * sum(x.active * x.adapter_size for x, rank in workload.ranked_linears() if rank)
    moved = passed * values
    moved += (LOGIT_BYTES if is_plain else 3 * compute.dtype_bytes) * batch.supervised * shape.vocabulary
    moved += unpacked * (compute.dtype_bytes + BITS.get(workload.base.scheme, 0) / 8)  # read as stored, and written
    computing = max((count.frozen + count.head) / rate.flops, work.weights / rate.bandwidth) + moved / rate.bandwidth
    computing += max(count.adapters / rate.flops, passed * narrow / rate.bandwidth)
    computing += count.attention / rate.attention_flops
    if shape.softcap and not is_plain:  # matrix products, with their scores in memory
        scores = shape.layers * shape.heads * count_pairs(workload, batch)
        computing += recompute_factor * SCORES_MOVED * compute.dtype_bytes * scores / rate.bandwidth
    kernels = PLAIN_KERNELS if is_plain else FAST_KERNELS + UNPACK_KERNELS * bool(unpacked)
    launching = LAUNCH_S * kernels * work.layers
    return max(computing, launching, 2 * host_bytes(workload, batch) / HOST_BYTES_PER_S)


def _streamed_bytes(workload: Workload) -> int:
    """Return the bytes of a streamed base that a micro-batch reads, in the forward and the backward pass."""
    if workload.compute.device != "cpu":
        return 2 * host_bytes(workload.replace(offload=False), MicroBatch.rows([1]))
    return 2 * (weight_bytes(workload) + constant_bytes(workload)) if workload.base.streamed else 0


def repacked_bytes(rows: int, vocabulary: int, hidden: int, dtype_bytes: int, bf16_kernel: bool) -> int:
    """Return the bytes moved to repack the head's weight for both matmuls of each chunk of rows."""
    # strop's bf16 kernel repacks in the cache, so that the weight is only read.
    chunks = -(-rows // max(16, HEAD_BYTES // (vocabulary * dtype_bytes)))
    return chunks * 2 * (1 if bf16_kernel else 2) * vocabulary * hidden * dtype_bytes


def step_seconds(workload: Workload, batch: MicroBatch, micro_batches: float, rate: Rate) -> float:
    """Return the seconds of a step with `micro_batches` times `batch`, and of the optimizer's update."""
    return micro_batches * micro_batch_seconds(workload, batch, rate) + _update_seconds(workload, rate)


def steps_seconds(workload: Workload, steps: Sequence[Sequence[MicroBatch]], rate: Rate) -> float:
    batches = sum(micro_batch_seconds(workload, batch, rate) for step in steps for batch in step)
    return batches + len(steps) * _update_seconds(workload, rate)


def _update_seconds(workload: Workload, rate: Rate) -> float:
    full = len(workload.adapter.ranks) if workload.adapter.full else 0
    tensors = workload.shape.layers * (full + 2 * sum(map(bool, workload.adapter.ranks)))
    return UPDATE_BYTES * workload.adapter_weights / rate.bandwidth + (0 if rate.gpu else UPDATE_S * tensors)


def image_seconds(flops: float, rate: Rate) -> float:
    """Return the seconds of an image encoder's forward pass, which is that of transformers."""
    return flops / rate.flops * (1 if rate.gpu else rate.plain or PLAIN)


def rollout_seconds(workload: Workload, rollouts: RolloutLoad, rate: Rate) -> float:
    """Return the seconds to sample the completions of a step, all of the maximum length."""
    tokens = rollouts.completions * rollouts.answer + rollouts.completions // rollouts.group * rollouts.prompt
    passes = rollouts.answer * -(-rollouts.completions // MAX_SEQUENCES)
    weights = workload.base.parameters - workload.shape.idle_expert_weights + workload.active_adapter_weights
    share = 1 if rate.gpu else DECODE_SHARE
    source = HOST_BYTES_PER_S if rate.gpu else DISK_BYTES_PER_S
    bandwidth = min(rate.bandwidth, source) if workload.base.streamed else rate.bandwidth
    reading = (weight_bytes(workload) + constant_bytes(workload)) / bandwidth
    launching = LAUNCH_S * FORWARD * PLAIN_KERNELS * workload.shape.layers if rate.gpu and not rollouts.vllm else 0.0
    return 2.0 * weights * tokens / (share * rate.flops) + passes * max(reading, launching)


def stream_rate(workload: Workload, batch: MicroBatch, rate: Rate) -> float:
    """Return the bytes per second of a streamed base that a run reads from the disk, or copies to a GPU."""
    return _streamed_bytes(workload) / micro_batch_seconds(workload, batch, rate)


def tokens_per_s(workload: Workload, batch: MicroBatch, rate: Rate) -> float:
    """Return tokens per second. A shared prefix counts in each row."""
    return (batch.tokens + batch.shared) / micro_batch_seconds(workload, batch, rate)
