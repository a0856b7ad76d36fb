"""The decoder on compiled CPU kernels, and the interface that it shares with the fallback (hf_fallback.py).

A pass processes the tokens of many sequences without padding: prompts and decoding sequences, each with its adapter.
Keys and values are stored in blocks (cache.py). The model's own weights are used, including quantized ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn

from strop.data.images import FIRST_IMAGE_ID
from strop.data.types import Ids, Indices
from strop.engine.decode.cache import BLOCK_SIZE, BlockPool, CacheFull, block_hashes, blocks_for, root_hash
from strop.engine.decode.compiled_model import CompiledModel, activation_dtype, padded_head_size
from strop.engine.decode.sampling import PassOutput, Positions, SequenceState
from strop.engine.images import ImageFeatures, image_ends, image_features
from strop.engine.layers import DecoderLayers
from strop.engine.train.eligibility import why_adapter_unsupported, why_base_unsupported
from strop.models.adapters import has_trained_biases
from strop.models.families.layers import ACTIVATIONS, activation_name, linear_groups, text_decoder
from strop.models.families.table import FAMILIES
from strop.models.introspect import text_filter

MAX_QUERY_HEADS = 48  # query heads that read the keys of a sequence together; more would not reduce memory traffic


@dataclass(frozen=True)
class Chunk:
    """The part of a sequence that a pass processes: the next `count` uncached positions and the tokens of a draft.

    num_outputs: the number of last positions for which the pass returns outputs.
    """

    sequence: SequenceState
    count: int
    num_outputs: int = 0
    draft: Sequence[int] = ()


class Decoder(Protocol):
    """The interface of a decoder.

    num_cheap_rows: the number of rows up to which a pass takes about as long as a pass over one row.
    """

    num_cheap_rows: int

    @property
    def whole_images(self) -> bool:
        """Return whether a pass must process an image as a whole, because its features attend to each other."""

    def admit(self, sequence: SequenceState) -> None:
        """Reserve the space for the sequence, and reuse the cached part of its prompt.

        Raises CacheFull. This also happens while another sequence is processing more of the same prefix, because it is
        faster to wait until that is cached.
        """

    def release(self, sequence: SequenceState) -> None:
        """Release the space of the sequence."""

    def forward(self, chunks: Sequence[Chunk], *, logits: bool = True) -> PassOutput:
        """Run one pass, and return the outputs of all chunks, in order. logits: whether to return the logits."""


class CompiledDecoder:
    """Decoder for a model on a CPU, for which `why_decoder_unsupported` returns None. Its weights must not change.

    positions: capacity of the cache, for all sequences. warm: compile the kernels ahead of time in another process.
    """

    def __init__(self, model: nn.Module, positions: int, *, warm: bool = True) -> None:
        reason = why_decoder_unsupported(model)
        assert reason is None, reason
        self.adapters = list_adapters(model)
        self.blocks = BlockPool(blocks_for(positions))
        layers = DecoderLayers(model)
        self._pending_hashes: set[bytes] = set()  # of blocks that admitted sequences will fill
        self._images = layers.images
        self._model = CompiledModel(layers, self.blocks.count, self.adapters, warm=warm)
        self.num_cheap_rows = 4 if self._model.unpacks_weights else 8  # unpacking takes time for each row
        first = layers.layer_spec(0)
        self._max_query_rows = max(1, MAX_QUERY_HEADS // (first.num_query_heads // first.num_kv_heads))

    @property
    def whole_images(self) -> bool:
        return attends_bidirectionally(self._images)

    def admit(self, sequence: SequenceState) -> None:
        root = root_hash(sequence.adapter)
        hashes = list(block_hashes(root, sequence.ids[: sequence.first_scored]))
        shared = self.blocks.share_prefix(hashes)
        sequence.num_cached, needed = len(shared) * BLOCK_SIZE, blocks_for(sequence.max_length) - len(shared)
        remaining = sequence.ids[sequence.num_cached : sequence.first_scored]
        source, num_matching = self.blocks.match_partial(hashes[len(shared) - 1] if shared else root, remaining)
        if num_matching and needed > self.blocks.free:  # the space of the matching block is needed
            self.blocks.release([source])
            num_matching = 0
        try:
            if self._pending_hashes.intersection(hashes[len(shared) : len(shared) + 1]):
                raise CacheFull
            sequence.blocks = shared + self.blocks.allocate(needed)
        except CacheFull:
            self.blocks.release(shared + ([source] if num_matching else []))
            raise
        sequence.block_hashes, sequence.pending_hashes = hashes[: len(shared)], hashes[len(shared) :]
        self._pending_hashes.update(sequence.pending_hashes)
        if num_matching:
            self._model.copy_block(source, sequence.blocks[len(shared)])
            self.blocks.release([source])
            sequence.num_cached += num_matching
        sequence.num_reused = sequence.num_cached

    def admit_follower(self, sequence: SequenceState, leader: SequenceState) -> None:
        """Reserve the space for the completion of a sequence with the same prompt as `leader`. Raises CacheFull."""
        assert sequence.adapter == leader.adapter and sequence.prompt_length == leader.prompt_length
        num_blocks = blocks_for(sequence.prompt_length + sequence.max_new_tokens)
        sequence.blocks = self.blocks.allocate(num_blocks - sequence.prompt_length // BLOCK_SIZE)

    def start_follower(self, sequence: SequenceState, leader: SequenceState) -> None:
        """Let a follower share the blocks of the leader's prompt, which was just processed."""
        num_full = leader.prompt_length // BLOCK_SIZE
        shared = leader.blocks[:num_full]
        self.blocks.share(shared)
        if leader.prompt_length % BLOCK_SIZE:  # both write to the block in which the prompt ends
            self._model.copy_block(leader.blocks[num_full], sequence.blocks[0])
        sequence.blocks = shared + sequence.blocks
        sequence.block_hashes = leader.block_hashes[:num_full]
        sequence.num_cached = sequence.num_reused = leader.prompt_length

    def release(self, sequence: SequenceState) -> None:
        self.blocks.release(sequence.blocks)
        self._pending_hashes.difference_update(sequence.pending_hashes)
        sequence.blocks = []

    def forward(self, chunks: Sequence[Chunk], *, logits: bool = True) -> PassOutput:
        order = sorted(range(len(chunks)), key=lambda i: self._adapter_index(chunks[i].sequence))
        table = np.zeros((len(chunks), max(len(chunk.sequence.blocks) for chunk in chunks)), np.int32)
        ids: list[Ids] = []
        positions, key_ends, owners, query_groups = [], [], [], []
        adapter_rows = np.zeros((len(self.adapters), 2), np.int64)
        num_rows, num_positions, ends = 0, 0, {}
        for i in order:
            chunk = chunks[i]
            sequence, count = chunk.sequence, chunk.count + len(chunk.draft)
            start = sequence.num_cached
            table[i, : len(sequence.blocks)] = sequence.blocks
            ids += [sequence.ids[start : start + chunk.count], np.array(chunk.draft, np.int32)]
            positions.append(np.arange(start, start + count))
            key_ends.append(find_key_ends(self._images, sequence, count))
            owners.append(np.full(count, i))
            for first in range(0, count, self._max_query_rows):
                size = min(self._max_query_rows, count - first)
                query_groups.append((num_rows + first, size, start + first, i))
            adapter = self._adapter_index(sequence)
            if adapter < len(self.adapters):
                begin = adapter_rows[adapter, 0] if adapter_rows[adapter, 1] else num_rows
                adapter_rows[adapter] = begin, num_rows + count
            num_rows, num_positions = num_rows + count, max(num_positions, start + count)
            ends[i] = num_rows
        groups = np.array(query_groups, np.int64)
        rows = np.concatenate(positions), np.concatenate(owners), table, groups, adapter_rows, np.concatenate(key_ends)
        output_rows = np.concatenate([np.arange(ends[i] - x.num_outputs, ends[i]) for i, x in enumerate(chunks)])
        with torch.inference_mode():
            spans = [(chunks[i].sequence, chunks[i].count + len(chunks[i].draft)) for i in order]
            space = find_positions(self._images, spans)
            output = self._model(
                np.concatenate(ids).astype(np.int64), rows, num_positions, output_rows, logits=logits, space=space
            )
        for chunk in chunks:
            self._advance(chunk.sequence, chunk.count)
        return output

    def _adapter_index(self, sequence: SequenceState) -> int:
        """Return the index of the sequence's adapter. The base model has the last index."""
        return len(self.adapters) if sequence.adapter is None else self.adapters.index(sequence.adapter)

    def _advance(self, sequence: SequenceState, count: int) -> None:
        """Mark `count` more positions as cached, and register full blocks for sharing."""
        sequence.num_cached += count
        hashes = sequence.block_hashes
        previous_hash, begin = hashes[-1] if hashes else root_hash(sequence.adapter), len(hashes) * BLOCK_SIZE
        for block_hash in block_hashes(previous_hash, sequence.ids[: sequence.num_final], begin):
            tokens = sequence.ids[begin : begin + BLOCK_SIZE].copy()
            self.blocks.register(block_hash, sequence.blocks[len(hashes)], previous_hash, tokens)
            self._pending_hashes.discard(block_hash)
            hashes.append(block_hash)
            previous_hash, begin = block_hash, begin + BLOCK_SIZE


def find_positions(images: ImageFeatures | None, spans: Sequence[tuple[SequenceState, int]]) -> Positions | None:
    """Return the positions in space (3, T) of the next tokens of sequences, or None if they are as those of text.

    spans: sequences and their numbers of tokens.
    """
    if images is None or not images.positions_differ:
        return None
    parts = []
    for sequence, count in spans:
        known = sequence.space.shape[1]
        if not known or (sequence.ids[known:] >= FIRST_IMAGE_ID).any():
            sequence.space = images.positions(sequence.ids)
            known = sequence.space.shape[1]
        begin, end = sequence.num_cached, sequence.num_cached + count
        text = sequence.space.max() + 1 + np.arange(max(begin, known) - known, max(0, end - known))
        parts += [sequence.space[:, begin:end], np.broadcast_to(text, (3, len(text)))]
    return np.concatenate(parts, axis=1)


def attends_bidirectionally(images: ImageFeatures | None) -> bool:
    """Return whether there are images, whose features attend to each other in both directions."""
    return images is not None and images.has_images and bool(images.bidirectional_layers)


def find_key_ends(images: ImageFeatures | None, sequence: SequenceState, count: int) -> Indices:
    """Return the position (count,) after the last key that each of the next tokens of a sequence attends to."""
    begin = sequence.num_cached
    ends = np.arange(begin + 1, begin + count + 1)
    if attends_bidirectionally(images) and (sequence.ids[begin : begin + count] >= FIRST_IMAGE_ID).any():
        ends[: sequence.length - begin] = image_ends(sequence.ids)[begin : begin + count]
    return ends


def kv_bytes_per_position(model: nn.Module) -> int:
    """Return the number of bytes per position in the cache of a CompiledDecoder."""
    layers = DecoderLayers(model)
    first = layers.layer_spec(0)
    dtype = activation_dtype(layers.head.weight.dtype)
    return 2 * len(layers) * first.num_kv_heads * padded_head_size(first.size) * dtype.itemsize


def list_adapters(model: nn.Module) -> list[str]:
    return sorted(model.peft_config) if isinstance(model, PeftModel) else []


def find_active_adapter(model: nn.Module) -> str | None:
    """Return the active adapter, or None if there is none. Several active adapters are not supported."""
    adapters = _active_adapters(model)
    assert len(adapters) < 2, adapters
    return next(iter(adapters), None)


def _active_adapters(model: nn.Module) -> list[str]:
    layer = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    return [] if layer is None or layer.disable_adapters else list(map(str, layer.active_adapters))


def why_decoder_unsupported(model: nn.Module) -> str | None:
    """Return why CompiledDecoder does not support a model, or None if it does."""
    if has_trained_biases(model):  # the base and the adapter could not share a batch
        return "the adapter has trained biases"
    if len(_active_adapters(model)) > 1:
        return "several adapters are active at once"
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    kind = base.config.get_text_config().model_type
    family = FAMILIES.get(kind)
    if family is None:
        return f"model family {kind} is not in the table strop.models.families.table"
    if not family.fully_fused:
        return f"{kind}: {family.model_parts}"
    decoder, config = text_decoder(base)
    features = image_features(base)
    if features is not None and features.has_images:
        if features.why_not_decoded is not None:
            return features.why_not_decoded
        types = frozenset(getattr(config, "layer_types", None) or ())
        if (
            features.bidirectional_layers
            and "" not in features.bidirectional_layers
            and not types <= features.bidirectional_layers
        ):
            return "attention in both directions between the features of an image in some layers"
    known = {id(module) for layer in decoder.layers for group in linear_groups(layer, family) for module in group}
    is_text = text_filter(base)
    for name, module in ((name, module) for name, module in base.named_modules() if is_text(name)):
        if isinstance(module, TrainableTokensWrapper):
            return f"rows of {name} are trained"
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"{name} is trained in full"
        if isinstance(module, LoraLayer) and (reason := why_adapter_unsupported(name, module, known)) is not None:
            return reason
    if activation_name(config) not in ACTIVATIONS:
        return f"activation {activation_name(config)}"
    head = base.get_output_embeddings()
    if head.weight.device.type != "cpu" or head.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"weights in {head.weight.dtype} on {head.weight.device.type}: the compiled decoder needs a CPU"
    return why_base_unsupported(base, decoder, config, family)
