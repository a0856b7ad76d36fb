"""What one micro-batch keeps and holds while it is computed, by the engine's own arithmetic (no torch).

Symbols as in the engine: T tokens, N supervised rows, h hidden, q and kv query and key-value width, I intermediate, b
bytes a number. The peak of a step is at one of a few moments; each is a sum of what is alive then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from strop.machine.memory import HEAP_BLOCK_BYTES
from strop.models.families.shape import LinearShape
from strop.models.families.table import Family
from strop.planning.workload import Setting

BLOCK = 256  # queries a product, as in engine.attention
KEEP_PAIRS = 512  # keys up to which probabilities are kept, as in engine.attention
LEAST_PREFIX = 8  # tokens that are shared, as in engine.packed
TILE_ROWS, GAP = 64, 256  # rows that pass over the keys together, and numbers behind a buffer (engine.cpu)
EAGER_BYTES = 40  # fp32 copies a number of the MLP on its way back through PyTorch's own operations
# Bytes that a mixer keeps for each number that one of its layers takes or gives (in part times b), counted by hooks on
# what autograd keeps of transformers' own code.
MIXERS = {
    "linear_attn": (54, 17, "out_proj"), "conv": (0, 1.7, "in_proj"), "mamba": (68, 1, "in_proj"),
    "jamba": (118, 0, "in_proj"),
}  # fmt: skip
TORN = 0.6
HOLES = 1.0  # of what a layer's MLP needs going back, as much again in holes between blocks of all sizes (docs/log)
HEAD_BYTES, CARD_HEAD_BYTES = 24 * 2**20, 256 * 2**20  # logits at once, as in engine.head


@dataclass(frozen=True)
class MicroBatch:
    """What is computed at once. tokens: packed rows, a shared prefix once. supervised: rows of the head.

    documents: (number, queries, keys) of each bucket of documents. more: other micro-batches belong to the same step,
    so that gradients wait while this one is computed. shared: tokens of rows that a common prefix
    saves, less those that padding adds.
    """

    tokens: int
    supervised: int
    documents: tuple[tuple[int, int, int], ...]
    more: bool = False
    shared: int = 0

    @staticmethod
    def of(tokens: int, length: int, *, share: float = 1.0, more: bool = True) -> MicroBatch:
        """The largest that a budget of tokens allows, of rows of one length; share: of the tokens, supervised."""
        length = max(2, min(length, tokens))
        return MicroBatch.rows([length] * max(1, tokens // length), share=share, more=more)

    @staticmethod
    def rows(lengths: Sequence[int], *, share: float = 1.0, more: bool = True) -> MicroBatch:
        """Documents of these lengths without a common prefix."""
        tokens = sum(lengths)
        counted = {length: list(lengths).count(length) for length in set(lengths)}
        documents = tuple((number, length, length) for length, number in sorted(counted.items()))
        return MicroBatch(tokens, max(1, round(share * (tokens - len(lengths)))), documents, more)

    @property
    def number(self) -> int:
        """Of rows: a prefix that they share is a document too."""
        return sum(number for number, _, _ in self.documents) - (self.shared > 0)

    @property
    def kept_pairs(self) -> int:
        """Pairs whose probabilities wait for the backward, where attention runs in buckets."""
        return sum(number * _pairs(queries, keys) for number, queries, keys in self.documents if keys <= KEEP_PAIRS)


def pairs(setting: Setting, batch: MicroBatch) -> int:
    """Query-key pairs that are computed (block by block, the keys behind a block skipped)."""
    block = max(1, TILE_ROWS * setting.shape.key_value_heads // setting.shape.heads) if setting.tiles else BLOCK
    return sum(number * _pairs(queries, keys, block) for number, queries, keys in batch.documents)


def _blocks(queries: int, keys: int, block: int = BLOCK) -> list[tuple[int, int]]:
    """(queries, keys) of each block of a document."""
    prefix = keys - queries
    return [(min(block, queries - at), prefix + min(at + block, queries)) for at in range(0, queries, block)]


def _pairs(queries: int, keys: int, block: int = BLOCK) -> int:
    return sum(rows * seen for rows, seen in _blocks(queries, keys, block))


@dataclass(frozen=True)
class Alive:
    """Bytes alive at one moment of a step, by part."""

    saved_activations: int = 0
    live_layer: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return self.saved_activations + self.live_layer + self.head


def at_peak(setting: Setting, batch: MicroBatch) -> Alive:
    """The moment of forward and backward at which most is alive."""
    layers, checkpointed = setting.shape.layers, setting.checkpoint_layers
    block = layer_bytes(setting, batch, batch.tokens)
    last = layer_bytes(setting, batch, batch.supervised)
    inputs = batch.tokens * setting.shape.hidden * setting.element
    kept = min(checkpointed, layers)
    # Those that wait in the host's memory: the last layer's stays, and one is there beside the one that is used.
    here, used = (1, min(kept, 2)) if setting.offload else (kept, kept)
    # The last layer computes only the supervised rows behind its attention.
    whole = here * inputs + (layers - kept) * block - (0 if kept == layers else block - last)
    # What the head's own gradient takes while a layer goes back, where it does not wait with those of earlier ones.
    beside = 0 if batch.more or setting.device == "cpu" else head_gradient_bytes(setting)
    lasting, rows = lasting_bytes(setting, batch)
    whole += lasting
    moments = [Alive(whole, rows, head_bytes(setting, batch))]
    if setting.whole_embedding and batch.more:  # its gradient, the last of all, beside that of earlier micro-batches
        gradient = batch.tokens * setting.shape.hidden * (4 + setting.element)
        buffer = whole if setting.device == "cpu" and setting.step == "fast" and not kept else 0  # engine.arena's stays
        moments.append(Alive(buffer, gradient + 4 * setting.shape.embedding))
    # Going back: the last layer, the one before it, and the last of those that are computed again.
    again = block if kept else 0
    if kept < layers:
        moments.append(Alive(whole, backward_bytes(setting, batch, batch.supervised) + rows, beside))
        behind = whole - last + (again if kept == layers - 1 else 0)
        moments.append(Alive(behind, backward_bytes(setting, batch), beside))
    if kept:
        moments.append(Alive(lasting + used * inputs + again - inputs, backward_bytes(setting, batch), beside))
    peak = max(moments, key=lambda moment: moment.total)
    return replace(peak, live_layer=peak.live_layer + torn_bytes(setting, batch))


def lasting_bytes(setting: Setting, batch: MicroBatch) -> tuple[int, int]:
    """What the fast step holds and no layer keeps. From the first layer's forward to its backward: what tokens have for
    each layer (Gemma 4: counted by hooks, as MIXERS), and on a CPU what the embedding gave and the angles in fp32;
    about the head, on a CPU: one more of the supervised rows."""
    if setting.step == "plain":
        return 0, 0
    shape, b = setting.shape, setting.element
    own = sum(x.outputs for x in shape.linears if x.leaf == "per_layer_input_gate")
    lasting = batch.tokens * shape.layers * own * (2 * b + 24)
    if setting.device != "cpu":  # the others are a thousandth there, and nobody measured them
        return lasting, 0
    return lasting + batch.tokens * (shape.hidden * b + 4 * shape.head_size), batch.supervised * shape.hidden * b


def offloaded_bytes(setting: Setting, batch: MicroBatch) -> int:
    """Inputs of layers that wait in the host's memory: all but the last one's (engine.card.offload)."""
    layers = max(0, min(setting.checkpoint_layers, setting.shape.layers) - 1) if setting.offload else 0
    return layers * batch.tokens * setting.shape.hidden * setting.element


def layer_bytes(setting: Setting, batch: MicroBatch, rows: int) -> int:
    """What one layer keeps for its backward, in the mean; rows: computed behind the attention."""
    if setting.step == "plain":
        return _plain_layer(setting, batch, rows)
    shape, b = setting.shape, setting.element
    h, q, kv, inner = shape.hidden, shape.query_size, shape.key_value_size, shape.intermediate
    ranks = [-(-r // 16) * 16 for r in setting.ranks] if setting.tiled_lora else setting.ranks
    family, rank = setting.family, dict(zip(shape.linears, ranks, strict=True))
    usual = Family()  # the names of a shape that is known by its config alone

    def ranks_of(*names: str) -> int:
        return sum(number for x, number in rank.items() if x.leaf in names)

    front, out = ranks_of(*family.qkv, *usual.qkv, "qkv_proj"), ranks_of(family.o, usual.o)
    behind = ranks_of(*family.gate_up, family.down, *usual.gate_up, "gate_up_proj", usual.down)
    before = h + front + (q + 2 * kv) * (2 if setting.whole_head_norms else 1)  # residual in, z A, qkv (before norms)
    halves = 2 if family.gated else 1
    after = (q + out if out else 0) + halves * inner + behind
    # The MLP's input, unless it is attention's as well, and those of the norms behind the blocks.
    after += (0 if family.parallel else h) + sum(h for name in (family.after_attention, family.after_mlp) if name)
    if family.per_layer_inputs:  # what it adds, the norm's, the sum; and the fp32 copy in front of its adapter
        after += 3 * h + 4 * h // b
    after += 2 * h if setting.dora and not setting.dropout else 0  # what the blocks add to the residual stream
    if setting.tiles or setting.flash:  # the output, which the next product keeps as well; a number a row and head
        kept = batch.tokens * (q * b + 4 * shape.heads)
        after -= q if out and rows == batch.tokens else 0
    elif setting.device == "cpu":
        kept = shape.heads * batch.kept_pairs * b
    else:  # PyTorch's own attention keeps copies of q, k, v (on a card for each head of q), its output, and its place
        copies = 5 * q if setting.device == "cuda" else 2 * q + 2 * kv
        kept = batch.tokens * (copies * b + 4 * shape.heads)
    attended = batch.tokens * (before - h) * b + kept
    if family.gated_output:  # the gate, its sigmoid, and what was multiplied by it
        attended += batch.tokens * 3 * q * b
    if family.mixer:
        attended = round(setting.attended * attended) + batch.tokens * _mixer_bytes(setting)
    if family.moe:
        after = h + (q + out if out else 0)
        return batch.tokens * h * b + attended + rows * (after * b + _mixture_bytes(setting))
    return batch.tokens * h * b + attended + rows * after * b


def _mixer_bytes(setting: Setting) -> int:
    """A token, of the model's own module in attention's place, in PyTorch's operations."""
    fixed, by_type, leaf = MIXERS[
        setting.shape.family if setting.shape.family == "jamba" else setting.family.mixer or ""
    ]
    ends = ((x.share, x.inputs if leaf == "out_proj" else x.outputs) for x in setting.mixed if x.leaf == leaf)
    wide = sum(share * numbers for share, numbers in ends)
    return round(wide * (fixed + by_type * setting.element)) + _copies(setting, setting.mixed)


def torn_bytes(setting: Setting, batch: MicroBatch) -> int:
    """Of a CPU's heap, in holes between blocks of all sizes that come and go (from 32 MiB on they have pages of their
    own); and between what transformers' own mixers keep, with what they need going back. Fitted (docs/log)."""
    if setting.device != "cpu" or setting.step != "fast":
        return 0
    torn = HOLES * sum(block for block in _mlp_back_blocks(setting, batch.supervised) if block < HEAP_BLOCK_BYTES)
    if setting.family.mixer:
        layers = setting.shape.layers - min(setting.checkpoint_layers, setting.shape.layers - 1)
        torn += TORN * layers * batch.tokens * _mixer_bytes(setting)
    return round(torn)


def _mixture_bytes(setting: Setting) -> int:
    """A token, of MLPs that the model's own modules compute: what each chosen expert takes and gives, and the
    activation between."""
    shape, b = setting.shape, setting.element
    down = [(x.share * x.active, x.inputs) for x in setting.behind if x.leaf in ("down_proj", setting.family.down)]
    kept = 1 if b < 4 else 2  # without a copy in fp32 in front of an adapter, what it takes is kept as it is
    wide = kept + (5 if shape.family == "gpt_oss" else 2)  # whose halves are clamped
    counted = sum(number * (wide * inner + kept * shape.hidden) for number, inner in down)
    return round(b * counted) + _copies(setting, setting.behind)


def _copies(setting: Setting, linears: Sequence[LinearShape]) -> int:
    """A token, in front of peft's adapters on these and behind their A: in fp32."""
    ranks = dict(zip(setting.shape.linears, setting.ranks, strict=True))
    low = setting.element < 4
    return sum(round(x.share * x.active * 4 * ((x.inputs if low else 0) + ranks[x])) for x in linears if ranks[x])


def _plain_layer(setting: Setting, batch: MicroBatch, rows: int) -> int:
    """transformers' own layer with peft's adapters, op by op: fp32 copies in the norms and in front of each adapter."""
    shape, b = setting.shape, setting.element
    h, q, kv, inner = shape.hidden, shape.query_size, shape.key_value_size, shape.intermediate
    wide = 8 * h if b < 4 else 4 * h  # of the two norms
    plain = b * (4 * h + 4 * q + 2 * kv + 4 * inner) + 4 * shape.heads
    return batch.tokens * (wide + _copies(setting, shape.linears) + plain)


def backward_bytes(setting: Setting, batch: MicroBatch, rows: int | None = None) -> int:
    """What going back through one layer needs beside what was kept: the greater of its MLP and its attention.

    rows: computed behind the attention; default: all tokens.
    """
    shape, b, tokens = setting.shape, setting.element, batch.tokens
    rows = tokens if rows is None else rows
    h, q, kv, inner = shape.hidden, shape.query_size, shape.key_value_size, shape.intermediate
    mlp = sum(_mlp_back_blocks(setting, rows))
    if setting.step == "plain":
        return max(mlp + rows * EAGER_BYTES * inner, tokens * (5 * q + 6 * kv + h) * b)
    if setting.device != "cpu":
        mlp += 0 if setting.device == "cuda" else rows * EAGER_BYTES * inner
        # Gradients of the output, of q (in fp32 as well), and of k and v for each head; q and k again; the result; and
        # what a shared prefix is copied into.
        copies = sum(number * keys for number, queries, keys in batch.documents if keys > queries)
        attention = tokens * (5 * q + kv + (q + 2 * kv)) * b + tokens * 4 * q + 4 * copies * kv * b
        freed = rows * (2 * inner + h) * b
        return max(mlp, attention - freed)
    if setting.tiles:  # gradients of the residual and of the output, the result, q and k behind their norms
        normed = q + kv if shape.head_norms else 0
        attention = tokens * (h + q + (q + 2 * kv) + normed) * b + _tile_bytes(setting, batch, backward=True)
    else:  # gradients of the residual and of the output; q, k, v and their gradients spread by document; the result
        attention = tokens * (h + 3 * q + 4 * kv + q) * b
        attention += max(_block_bytes(setting, batch), tokens * (q + 2 * kv) * b)
    freed = rows * (2 * inner + h + q) * b  # of what this layer had kept, by the time its attention is reached
    return max(mlp, attention - freed)


def _mlp_back_blocks(setting: Setting, rows: int) -> list[int]:
    """d(gate, up) (2 I), dz (I), z (I), and the gradient of the residual; what dropout leaves of z (I); and with DoRA
    as well, of gate and up each: z, what is left, two gradients."""
    h, inner = setting.shape.hidden, setting.shape.intermediate
    sizes = [2 * inner, inner, inner, h] + ([inner] if setting.dropout else [])
    if setting.dora and setting.dropout and setting.step == "fast":
        sizes += [h] * 4
    return [rows * size * setting.element for size in sizes]


def _tile_bytes(setting: Setting, batch: MicroBatch, *, backward: bool) -> int:
    """A thread's keys and values, scores and sums, for the longest document; gradients of a shared prefix."""
    d, longest = setting.shape.head_size, max(keys for _, _, keys in batch.documents) + GAP
    # In the backward: scores and slopes in fp32, slopes in bf16 and pairs of either; keys twice, values, rows, sums.
    one = longest * (TILE_ROWS * (4 + 4 + 2 + 2 + 2) + 16 * d) if backward else longest * (TILE_ROWS * 6 + 6 * d)
    prefix = max(keys - queries for _, queries, keys in batch.documents)
    documents = sum(number for number, _, _ in batch.documents)
    return setting.threads * one + (8 * documents * setting.shape.key_value_size * prefix if backward else 0)


def _score_bytes(setting: Setting, batch: MicroBatch) -> int:
    """Scores of the largest block of a forward."""
    blocks = [(number, _blocks(queries, keys)[-1]) for number, queries, keys in batch.documents]
    return max(number * setting.shape.heads * rows * seen * setting.element for number, (rows, seen) in blocks)


def _block_bytes(setting: Setting, batch: MicroBatch) -> int:
    """Going back through the blocks of a bucket, the largest first: probabilities and their gradient, the old until
    the new are made, and what each block adds to the gradients of keys and values, which are summed in fp32."""
    shape, b, found = setting.shape, setting.element, [0]
    for number, queries, keys in batch.documents:
        blocks = list(reversed(_blocks(queries, keys)))
        scores = [number * shape.heads * rows * seen * b for rows, seen in blocks]
        if len(blocks) == 1:
            found.append((1 if keys <= KEEP_PAIRS else 2) * scores[0])
            continue
        terms = 0
        for i, (_, seen) in enumerate(blocks):
            own = scores[i] * (1 if keys <= KEEP_PAIRS else 2) + (scores[i - 1] if i else 0)
            found.append(own + terms)
            terms += 2 * number * shape.key_value_size * seen * b
        found.append(terms + 4 * number * shape.key_value_size * keys)
    return max(found)


def head_bytes(setting: Setting, batch: MicroBatch) -> int:
    """The last norm's output and the gradient of its rows, and a chunk of logits; the plain step has them all. And what
    a head that is trained takes: its gradient, beside that of earlier micro-batches, and its weight in the type that is
    computed in."""
    shape, b = setting.shape, setting.element
    own = head_gradient_bytes(setting) if batch.more or setting.device != "cpu" else 0
    if setting.step == "plain":
        return batch.supervised * shape.vocabulary * 2 * b + own  # and their gradient
    own += b * (shape.embedding if setting.whole_head and b < 4 else 0) + b * setting.head_rank * shape.vocabulary
    rows = min(batch.supervised, head_rows(setting))
    chunk = rows * shape.vocabulary * (b + 3 * 4 if setting.device == "mps" else b)
    if setting.device == "cpu":
        chunk += setting.threads * 4 * shape.vocabulary
    return batch.supervised * 2 * shape.hidden * b + chunk + own


def head_gradient_bytes(setting: Setting) -> int:
    """In fp32, of a head that is trained in full or by an adapter."""
    shape = setting.shape
    return 4 * (shape.embedding if setting.whole_head else 0) + 4 * setting.head_rank * (
        shape.hidden + shape.vocabulary
    )


def head_rows(setting: Setting) -> int:
    """Rows of logits at once."""
    room = CARD_HEAD_BYTES if setting.device == "cuda" else HEAD_BYTES
    return max(16, room // (setting.shape.vocabulary * setting.element))
