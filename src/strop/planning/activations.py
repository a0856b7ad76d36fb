"""Predict the activation memory of a micro-batch from the tensors that the engine allocates. Imports no torch."""

# Symbols: h hidden size, q width of the queries, kv width of the keys and of the values, I intermediate size, b bytes
# per value.

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from strop.machine.memory import HEAP_BLOCK_BYTES
from strop.models.families.shape import LinearShape, ModelShape
from strop.models.families.table import Family
from strop.planning.workload import Workload

BLOCK = 256  # queries per matmul, as in engine.train.attention
MAX_SAVED_KEYS = 512  # probabilities of documents with more keys are recomputed, as in engine.train.attention
TILE_ROWS, GAP = 64, 256  # rows of an attention tile, and padding values after a buffer, as in engine.kernels.cpu
ATTENTION_DROPOUT = ("attn_pdrop", "attention_dropout")  # fields of configs
# values of the MLP's size that a plain step saves without a gate: 1 + those that autograd saves for the activation
UNGATED_VALUES = {"relu": 1, "gelu_new": 5, "gelu_fast": 5, "quick_gelu": 3}  # others: 2
EAGER_BYTES = 40  # bytes of fp32 copies per value of the MLP in the backward pass, with PyTorch operations
# Bytes that a mixer saves per input (of out_proj) or output (of in_proj) of a linear layer: (constant, factor of b,
# layer). Measured with saved-tensor hooks on the code of transformers.
MIXER_BYTES = {
    "linear_attn": (54, 17, "out_proj"), "conv": (0, 1.7, "in_proj"), "mamba": (68, 1, "in_proj"),
    "jamba": (118, 0, "in_proj"),
}  # fmt: skip
# Heap fragmentation on a CPU, relative to the mixers' saved bytes and to the MLP's buffers; fitted (docs/log).
MIXER_FRAGMENTATION, MLP_FRAGMENTATION = 0.6, 1.0
ENCODER_FRAGMENTATION = 1.5  # of an image encoder's activations on a CPU; measured with one of SmolVLM's size
HEAD_BYTES, GPU_HEAD_BYTES = 24 * 2**20, 256 * 2**20  # logits computed at once, as in engine.train.head


@dataclass(frozen=True)
class MicroBatch:
    """The rows that are computed at once."""

    tokens: int  # number of packed tokens; shared prefixes count once
    supervised: int  # number of rows of the output head
    documents: tuple[tuple[int, int, int], ...]  # (number of documents, queries and keys of each)
    more: bool = False  # the step has other micro-batches, whose accumulated gradients stay allocated
    prefixes: int = 0  # number of documents that are a shared prefix
    shared: int = 0  # tokens saved by shared prefixes, minus padding tokens

    @staticmethod
    def rows(lengths: Sequence[int], *, share: float = 1.0, more: bool = True) -> MicroBatch:
        """Return a micro-batch of rows without a shared prefix. share: supervised share of the tokens."""
        tokens = sum(lengths)
        documents = tuple((number, length, length) for length, number in sorted(Counter(lengths).items()))
        return MicroBatch(tokens, max(1, round(share * (tokens - len(lengths)))), documents, more)

    @property
    def num_sequences(self) -> int:
        """Number of sequences. A shared prefix is a document, but not a sequence."""
        return sum(number for number, _, _ in self.documents) - self.prefixes


def count_pairs(workload: Workload, batch: MicroBatch) -> int:
    """Return the number of query-key pairs that are computed. Keys after a block of queries are skipped."""
    shape = workload.shape
    tiled = workload.compute.attention_tiles
    block = max(1, TILE_ROWS * shape.key_value_heads // shape.heads) if tiled else BLOCK
    return sum(number * _count_document_pairs(queries, keys, block) for number, queries, keys in batch.documents)


def _split_into_blocks(queries: int, keys: int, block: int = BLOCK) -> list[tuple[int, int]]:
    """Return (queries, keys) of each block of queries of a document."""
    prefix = keys - queries
    return [(min(block, queries - i), prefix + min(i + block, queries)) for i in range(0, queries, block)]


def _count_document_pairs(queries: int, keys: int, block: int = BLOCK) -> int:
    return sum(rows * block_keys for rows, block_keys in _split_into_blocks(queries, keys, block))


@dataclass(frozen=True)
class LiveBytes:
    """Allocated bytes at one moment of a step."""

    saved_activations: int = 0
    live_layer: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return self.saved_activations + self.live_layer + self.head


def peak_live_bytes(workload: Workload, batch: MicroBatch) -> LiveBytes:
    """Return the allocated bytes at the peak of the forward and backward pass."""
    compute, layers = workload.compute, workload.shape.layers
    layer = layer_bytes(workload, batch, batch.tokens)
    last_layer = layer_bytes(workload, batch, batch.supervised)
    inputs = batch.tokens * workload.shape.hidden * compute.dtype_bytes
    recomputed = min(compute.checkpointed_layers, layers)
    # With offloading, only the last layer's input stays on the device, and two inputs in the backward pass.
    on_device, in_backward = (1, min(recomputed, 2)) if compute.offload else (recomputed, recomputed)
    # After its attention, the last layer computes only the supervised rows.
    saved = on_device * inputs + (layers - recomputed) * layer - (0 if recomputed == layers else layer - last_layer)
    # The head's gradient, unless earlier micro-batches have allocated it.
    head_gradient = 0 if batch.more or compute.device == "cpu" else head_gradient_bytes(workload)
    outside, head_rows = outside_bytes(workload, batch)
    saved += outside
    moments = [LiveBytes(saved, head_rows, head_bytes(workload, batch))]
    if workload.adapter.full_embedding and batch.more:
        # The embedding's gradient is computed last, and added to that of earlier micro-batches.
        gradient = batch.tokens * workload.shape.hidden * (4 + compute.dtype_bytes)
        arena = saved if compute.device == "cpu" and compute.step == "fast" and not recomputed else 0
        moments.append(LiveBytes(arena, gradient + 4 * workload.shape.embedding_weights))
    # The backward pass of the last layer, of the layer before it, and of the last recomputed layer.
    recomputed_bytes = layer if recomputed else 0
    if recomputed < layers:
        moments.append(LiveBytes(saved, backward_bytes(workload, batch, batch.supervised) + head_rows, head_gradient))
        before_last = saved - last_layer + (recomputed_bytes if recomputed == layers - 1 else 0)
        moments.append(LiveBytes(before_last, backward_bytes(workload, batch), head_gradient))
    if recomputed:
        saved = outside + in_backward * inputs + recomputed_bytes - inputs
        moments.append(LiveBytes(saved, backward_bytes(workload, batch), head_gradient))
    if workload.shape.image_patches:  # the backward pass of the image encoder, after that of the text model
        arena = saved if compute.device == "cpu" and compute.step == "fast" and not recomputed else 0
        moments.append(LiveBytes(arena, encoder_bytes(workload)))
    peak = max(moments, key=lambda moment: moment.total)
    return replace(peak, live_layer=peak.live_layer + fragmentation_bytes(workload, batch))


def encoder_bytes(workload: Workload) -> int:
    """Return the bytes that the backward pass of an image encoder with adapters needs for one image.

    The inputs of the adapted layers are in memory in fp32, because PEFT computes adapters in fp32.
    """
    lost = ENCODER_FRAGMENTATION if workload.compute.device == "cpu" else 1.0
    mean_bytes = (4 + workload.compute.dtype_bytes) / 2  # of an input and of an output
    return int(lost * mean_bytes * workload.shape.tower_sizes * workload.shape.image_patches)


def outside_bytes(workload: Workload, batch: MicroBatch) -> tuple[int, int]:
    """Return the bytes of the fast step (FastLoss) outside of its layers: for the whole step, and during the head."""
    # For the whole step: per-layer embeddings (Gemma 4) and, on a CPU, the embedding's output and fp32 rotary angles.
    # For the head: on a CPU, one more copy of the supervised rows.
    if workload.compute.step == "plain":
        return 0, 0
    shape, b = workload.shape, workload.compute.dtype_bytes
    per_layer = sum(x.outputs for x in shape.linears if x.leaf == "per_layer_input_gate")
    per_layer_bytes = batch.tokens * shape.layers * per_layer * (2 * b + 24)
    if workload.compute.device != "cpu":  # the other terms are about 0.1 % on a GPU
        return per_layer_bytes, 0
    embedded = batch.tokens * (shape.hidden * b + 4 * shape.head_size)
    return per_layer_bytes + embedded, batch.supervised * shape.hidden * b


def offloaded_bytes(workload: Workload, batch: MicroBatch) -> int:
    """Return the bytes in host memory: the inputs of all recomputed layers except the last."""
    compute = workload.compute
    layers = max(0, min(compute.checkpointed_layers, workload.shape.layers) - 1) if compute.offload else 0
    return layers * batch.tokens * workload.shape.hidden * compute.dtype_bytes


def layer_bytes(workload: Workload, batch: MicroBatch, rows: int) -> int:
    """Return the mean bytes that one layer saves for its backward pass. rows: rows computed after the attention."""
    if workload.compute.step == "plain":
        return _plain_layer_bytes(workload, batch)
    shape, b, device = workload.shape, workload.compute.dtype_bytes, workload.compute.device
    h, q, kv, inner = shape.hidden, shape.query_size, shape.key_value_size, shape.intermediate
    family, rank_of = workload.family, dict(workload.ranked_linears())
    if workload.tiled_lora:
        rank_of = {x: -(-rank // 16) * 16 for x, rank in rank_of.items()}
    default = Family()  # default module names, for a model of an unknown family

    def ranks_of(*names: str) -> int:
        return sum(rank for x, rank in rank_of.items() if x.leaf in names)

    qkv_ranks, o_ranks = ranks_of(*family.qkv, *default.qkv, "qkv_proj"), ranks_of(family.o, default.o)
    mlp_ranks = ranks_of(*family.gate_up, family.down, *default.gate_up, "gate_up_proj", default.down)
    # Values per token up to the attention: residual input, output of LoRA's A, and qkv (twice with trained norms).
    input_values = h + qkv_ranks + (q + 2 * kv) * (2 if workload.adapter.full_head_norms else 1)
    halves = 2 if family.gated else 1
    saves_attention = bool(o_ranks) or workload.adapter.full  # the input of the output projection
    output_values = (q + o_ranks if saves_attention else 0) + halves * inner + mlp_ranks
    # The MLP's input, unless attention has the same input, and the inputs of norms after attention and MLP.
    output_values += 0 if family.parallel else h
    output_values += h * (bool(family.after_attention) + bool(family.after_mlp))
    if family.per_layer_inputs:  # the per-layer term, its norm's input, the sum, and an fp32 copy for the adapter
        output_values += 3 * h + 4 * h // b
    if workload.adapter.dora and not workload.adapter.dropout:
        output_values += 2 * h  # outputs of attention and MLP
    if workload.compute.attention_tiles or workload.flash_attention:
        # The output, which the next matmul saves too, and one fp32 value per row and head.
        saved = batch.tokens * (q * b + 4 * shape.heads)
        output_values -= q if saves_attention and rows == batch.tokens else 0
    elif device == "cpu":
        short = (document for document in batch.documents if document[2] <= MAX_SAVED_KEYS)
        saved = shape.heads * sum(number * _count_document_pairs(queries, keys) for number, queries, keys in short) * b
    else:  # PyTorch's attention saves copies of q, k and v (on CUDA, for each query head), and its output
        copies = 5 * q if device == "cuda" else 2 * q + 2 * kv
        saved = batch.tokens * (copies * b + 4 * shape.heads)
    attention = batch.tokens * (input_values - h) * b + saved
    if family.gated_output:  # the gate, its sigmoid, and the gated output
        attention += batch.tokens * 3 * q * b
    if family.mixer:
        attention = round(workload.attention_share * attention) + batch.tokens * _mixer_bytes(workload)
    if family.moe:
        output_values = h + (q + o_ranks if saves_attention else 0)
        return batch.tokens * h * b + attention + rows * (output_values * b + _moe_bytes(workload))
    return batch.tokens * h * b + attention + rows * output_values * b


def _mixer_bytes(workload: Workload) -> int:
    """Return the bytes per token saved by a mixer, which replaces attention and runs the code of transformers."""
    family = workload.shape.family
    constant, per_byte, leaf = MIXER_BYTES[family if family == "jamba" else workload.family.mixer or ""]
    linears = [x for x in workload.mixer_linears if x.leaf == leaf]
    width = sum(x.share * (x.inputs if leaf == "out_proj" else x.outputs) for x in linears)
    saved = round(width * (constant + per_byte * workload.compute.dtype_bytes))
    return saved + _adapter_copies(workload, workload.mixer_linears)


def fragmentation_bytes(workload: Workload, batch: MicroBatch) -> int:
    if workload.compute.device != "cpu" or workload.compute.step != "fast":
        return 0
    # Larger buffers have their own pages, and cause no fragmentation.
    lost = MLP_FRAGMENTATION * sum(x for x in _mlp_buffers(workload, batch.supervised) if x < HEAP_BLOCK_BYTES)
    if workload.family.mixer:
        layers = workload.shape.layers - min(workload.compute.checkpointed_layers, workload.shape.layers - 1)
        lost += MIXER_FRAGMENTATION * layers * batch.tokens * _mixer_bytes(workload)
    return round(lost)


def _moe_bytes(workload: Workload) -> int:
    """Return the bytes per token saved by the active experts of an MoE layer, which modules of transformers compute."""
    shape, b, family = workload.shape, workload.compute.dtype_bytes, workload.family
    down = [(x.share * x.active, x.inputs) for x in workload.mlp_linears if x.leaf in ("down_proj", family.down)]
    copies = 1 if b < 4 else 2  # in fp32 the adapter needs no copy, and saves the input itself
    width = copies + (5 if shape.family == "gpt_oss" else 2)  # gpt-oss clamps gate and up
    values = sum(number * (width * inner + copies * shape.hidden) for number, inner in down)
    return round(b * values) + _adapter_copies(workload, workload.mlp_linears)


def _adapter_copies(workload: Workload, linears: Sequence[LinearShape]) -> int:
    """Return the bytes per token that PEFT saves in fp32: each adapter's input and the output of its A."""
    ranks = dict(workload.ranked_linears())
    is_16_bit = workload.compute.dtype_bytes < 4
    return sum(round(x.share * x.active * 4 * ((x.inputs if is_16_bit else 0) + ranks[x])) for x in linears if ranks[x])


def _plain_layer_bytes(workload: Workload, batch: MicroBatch) -> int:
    """Return the bytes that a layer of transformers saves, with fp32 copies for the norms and for PEFT's adapters."""
    shape, b = workload.shape, workload.compute.dtype_bytes
    h, q, kv, inner = shape.hidden, shape.query_size, shape.key_value_size, shape.intermediate
    norms = 8 * h if b < 4 else 4 * h
    other_bytes = b * (4 * h + 4 * q + 2 * kv + _plain_mlp_values(shape) * inner) + 4 * shape.heads
    saved = batch.tokens * (norms + _adapter_copies(workload, shape.linears) + other_bytes)
    if workload.compute.device == "cpu" and any(shape.text_config.get(key) for key in ATTENTION_DROPOUT):
        # PyTorch then computes the attention by its definition: scaled q and k, probabilities, the mask, and masked
        # probabilities. Outputs of attention and MLP have masks too.
        pairs = sum(number * queries * keys for number, queries, keys in batch.documents)
        saved += shape.heads * pairs * (2 * b + 1) + batch.tokens * ((q + kv) * b + 2 * h)
    return saved


def _plain_mlp_values(shape: ModelShape) -> int:
    """Return how many values of the MLP's size a plain layer saves for each token."""
    inner = shape.intermediate
    is_gated = sum(x.outputs for x in shape.linears if x.outputs in (inner, 2 * inner)) >= 2 * inner
    return 4 if is_gated else UNGATED_VALUES.get(shape.activation, 2)


def backward_bytes(workload: Workload, batch: MicroBatch, rows: int | None = None) -> int:
    """Return the bytes that a layer's backward pass needs besides saved tensors. rows: rows of the MLP."""
    shape, compute, tokens = workload.shape, workload.compute, batch.tokens
    b = compute.dtype_bytes
    rows = tokens if rows is None else rows
    h, q, kv, inner = shape.hidden, shape.query_size, shape.key_value_size, shape.intermediate
    mlp = sum(_mlp_buffers(workload, rows))
    if workload.adapter.full:  # the gradient of the largest weight, before it is added to that of the step
        mlp += max(x.inputs * x.outputs for x in shape.linears) * (2 if inner else 1) * (b if b == 4 else b + 4)
    if compute.step == "plain":
        copies = EAGER_BYTES if _plain_mlp_values(shape) > 2 else EAGER_BYTES // 2
        return max(mlp + rows * copies * inner, tokens * (5 * q + 6 * kv + h) * b)
    if compute.device != "cpu":
        mlp += 0 if compute.device == "cuda" else rows * EAGER_BYTES * inner
        # Gradients of the output, of q (in bf16 and fp32), and of k and v for each query head; recomputed q and k; the
        # result; and copies of a shared prefix.
        copies = sum(number * keys for number, queries, keys in batch.documents if keys > queries)
        attention = tokens * (5 * q + kv + (q + 2 * kv)) * b + tokens * 4 * q + 4 * copies * kv * b
        freed = rows * (2 * inner + h) * b
        return max(mlp, attention - freed)
    if compute.attention_tiles:  # gradients of residual and output, the result, and normalized q and k
        normed = q + kv if shape.head_norms else 0
        attention = tokens * (h + q + (q + 2 * kv) + normed) * b + _tile_bytes(workload, batch, backward=True)
    else:  # gradients of residual and output, copies of q, k, v and their gradients, and the result
        attention = tokens * (h + 3 * q + 4 * kv + q) * b
        attention += max(_block_bytes(workload, batch), tokens * (q + 2 * kv) * b)
    freed = rows * (2 * inner + h + q) * b  # saved by the layer after its attention
    return max(mlp, attention - freed)


def _mlp_buffers(workload: Workload, rows: int) -> list[int]:
    # With z = act(gate) up: gradients of gate and up (2 I), gradient of z (I), z (I), and the residual's gradient (h).
    # Dropout adds the masked z (I); DoRA with dropout, for gate and up: z, the masked z and two gradients.
    h, inner, adapter = workload.shape.hidden, workload.shape.intermediate, workload.adapter
    sizes = [2 * inner, inner, inner, h] + ([inner] if adapter.dropout else [])
    if adapter.dora and adapter.dropout and workload.compute.step == "fast":
        sizes += [h] * 4
    return [rows * size * workload.compute.dtype_bytes for size in sizes]


def _tile_bytes(workload: Workload, batch: MicroBatch, *, backward: bool) -> int:
    """Return the bytes of the threads' buffers for the longest document, and of gradients of a shared prefix."""
    d, longest = workload.shape.head_size, max(keys for _, _, keys in batch.documents) + GAP
    # Scores, keys, values and sums; in the backward pass also gradients of the scores, in fp32 and bf16.
    thread = longest * (TILE_ROWS * (4 + 4 + 2 + 2 + 2) + 16 * d) if backward else longest * (TILE_ROWS * 6 + 6 * d)
    prefix = max(keys - queries for _, queries, keys in batch.documents)
    documents = sum(number for number, _, _ in batch.documents)
    gradients = 8 * documents * workload.shape.key_value_size * prefix if backward else 0
    return workload.compute.threads * thread + gradients


def _block_bytes(workload: Workload, batch: MicroBatch) -> int:
    """Return the peak bytes of the backward pass through the attention blocks of a document, largest block first."""
    # A block has probabilities and their gradient, next to those of the block before. It adds to the gradients of keys
    # and values, which are summed in fp32 at the end.
    shape, b, sizes = workload.shape, workload.compute.dtype_bytes, [0]
    for number, queries, keys in batch.documents:
        blocks = list(reversed(_split_into_blocks(queries, keys)))
        scores = [number * shape.heads * rows * block_keys * b for rows, block_keys in blocks]
        if len(blocks) == 1:
            sizes.append((1 if keys <= MAX_SAVED_KEYS else 2) * scores[0])
            continue
        gradients = 0
        for i, (_, block_keys) in enumerate(blocks):
            block = scores[i] * (1 if keys <= MAX_SAVED_KEYS else 2) + (scores[i - 1] if i else 0)
            sizes.append(block + gradients)
            gradients += 2 * number * shape.key_value_size * block_keys * b
        sizes.append(gradients + 4 * number * shape.key_value_size * keys)
    return max(sizes)


def head_bytes(workload: Workload, batch: MicroBatch) -> int:
    """Return the output head's bytes: the last norm's output, its gradient, and a chunk of logits."""
    # The plain step computes all logits at once. A trained head adds its gradient and its weight in the compute dtype.
    shape, adapter, compute = workload.shape, workload.adapter, workload.compute
    b = compute.dtype_bytes
    trained = head_gradient_bytes(workload) if batch.more or compute.device != "cpu" else 0
    if compute.step == "plain":
        return batch.supervised * shape.vocabulary * 2 * b + trained  # logits and their gradient
    trained += b * (shape.embedding_weights if adapter.full_head and b < 4 else 0)
    trained += b * adapter.head_rank * shape.vocabulary
    rows = min(batch.supervised, head_rows(workload))
    chunk = rows * shape.vocabulary * (b + 3 * 4 if compute.device == "mps" else b)
    if compute.device == "cpu":
        chunk += compute.threads * 4 * shape.vocabulary
    return batch.supervised * 2 * shape.hidden * b + chunk + trained


def head_gradient_bytes(workload: Workload) -> int:
    """Return the bytes of the fp32 gradient of a head that is trained in full or with an adapter."""
    shape, adapter = workload.shape, workload.adapter
    full = 4 * (shape.embedding_weights if adapter.full_head else 0)
    return full + 4 * adapter.head_rank * (shape.hidden + shape.vocabulary)


def head_rows(workload: Workload) -> int:
    budget = GPU_HEAD_BYTES if workload.compute.device == "cuda" else HEAD_BYTES
    return max(16, budget // (workload.shape.vocabulary * workload.compute.dtype_bytes))
