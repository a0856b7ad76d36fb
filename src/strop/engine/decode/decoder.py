"""The decoder on strop's compiled kernels, its interface (shared with the fallback), and the models that it supports.

Nothing is padded: a pass is one row of tokens from many sequences, prompts and decoding ones alike, each with its
adapter. Keys and values go into blocks (cache.py). The model's own weights are used in place, quantized ones included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from strop.data.types import Ids
from strop.engine.decode.cache import BLOCK_SIZE, BlockPool, CacheFull, block_keys, blocks_for, root_key
from strop.engine.decode.compiled_model import CompiledModel, activation_dtype, padded_head_size
from strop.engine.decode.sampling import PassOutput, SequenceState
from strop.engine.layers import DecoderLayers
from strop.engine.train.eligibility import why_adapter_unsupported, why_base_unsupported
from strop.models.adapters import has_trained_biases
from strop.models.families.layers import ACTIVATIONS, activation_name, linears, text_decoder
from strop.models.families.table import FAMILIES

MAX_QUERY_HEADS = 48  # of one sequence that share a read of the keys; more would not save memory traffic


@dataclass(frozen=True)
class Chunk:
    """The part of a sequence that a pass processes: the next `count` uncached positions, then the tokens of a draft.

    num_outputs: the last so many positions give outputs.
    """

    sequence: SequenceState
    count: int
    num_outputs: int = 0
    draft: Sequence[int] = ()


class Decoder(Protocol):
    """The interface of a decoder that Batch uses.

    num_cheap_rows: a pass over this many rows takes hardly longer than over one.
    """

    num_cheap_rows: int

    def admit(self, sequence: SequenceState) -> None:
        """Reserve the space that the sequence will need, and reuse the cached part of its prompt.

        Raises CacheFull, also while another sequence is processing more of the same prefix: it will be cached soon.
        """

    def release(self, sequence: SequenceState) -> None:
        """Give the sequence's space back."""

    def forward(self, chunks: Sequence[Chunk], *, logits: bool = True) -> PassOutput:
        """Run one pass. Return the outputs of all chunks, in order. logits: whether the logits are needed."""


class CompiledDecoder:
    """Decoder for a model on a CPU that `why_not_decoder` has no objection to. Valid while the weights do not change.

    positions: capacity of the cache, over all sequences. warm: compile the kernels in another process first.
    """

    def __init__(self, model: nn.Module, positions: int, *, warm: bool = True) -> None:
        reason = why_not_decoder(model)
        assert reason is None, reason
        self.adapters = adapter_names(model)
        self.blocks = BlockPool(blocks_for(positions))
        layers = DecoderLayers(model)
        self._pending_keys: set[bytes] = set()  # of blocks that admitted sequences will fill
        self._model = CompiledModel(layers, self.blocks.count, self.adapters, warm=warm)
        # unpacking quantized weights costs time a row
        self.num_cheap_rows = 4 if self._model.unpacks_weights else 8
        first = layers.part(0)
        self._max_query_rows = max(1, MAX_QUERY_HEADS // (first.query // first.key_value))

    def admit(self, sequence: SequenceState) -> None:
        root = root_key(sequence.adapter)
        keys = list(block_keys(root, sequence.ids[: sequence.first_scored]))
        shared = self.blocks.share_prefix(keys)
        sequence.num_cached, needed = len(shared) * BLOCK_SIZE, blocks_for(sequence.max_length) - len(shared)
        rest = sequence.ids[sequence.num_cached : sequence.first_scored]
        source, num_matching = self.blocks.match_partial(keys[len(shared) - 1] if shared else root, rest)
        if num_matching and needed > self.blocks.free:  # its space is needed
            self.blocks.release([source])
            num_matching = 0
        try:
            if self._pending_keys.intersection(keys[len(shared) : len(shared) + 1]):
                raise CacheFull
            sequence.blocks = shared + self.blocks.allocate(needed)
        except CacheFull:
            self.blocks.release(shared + ([source] if num_matching else []))
            raise
        sequence.block_keys, sequence.pending_keys = keys[: len(shared)], keys[len(shared) :]
        self._pending_keys.update(sequence.pending_keys)
        if num_matching:
            self._model.copy_block(source, sequence.blocks[len(shared)])
            self.blocks.release([source])
            sequence.num_cached += num_matching
        sequence.num_reused = sequence.num_cached

    def admit_follower(self, sequence: SequenceState, leader: SequenceState) -> None:
        """Reserve the space of a sequence with the leader's prompt, without the shared blocks. Raises CacheFull."""
        assert sequence.adapter == leader.adapter and sequence.prompt_length == leader.prompt_length
        num_blocks = blocks_for(sequence.prompt_length + sequence.max_new_tokens)
        sequence.blocks = self.blocks.allocate(num_blocks - sequence.prompt_length // BLOCK_SIZE)

    def start_follower(self, sequence: SequenceState, leader: SequenceState) -> None:
        """Let a follower continue after the leader's prompt, which was just processed."""
        num_full = leader.prompt_length // BLOCK_SIZE
        shared = leader.blocks[:num_full]
        self.blocks.share(shared)
        if leader.prompt_length % BLOCK_SIZE:  # both will write into the block where the prompt ends
            self._model.copy_block(leader.blocks[num_full], sequence.blocks[0])
        sequence.blocks = shared + sequence.blocks
        sequence.block_keys = leader.block_keys[:num_full]
        sequence.num_cached = sequence.num_reused = leader.prompt_length

    def release(self, sequence: SequenceState) -> None:
        self.blocks.release(sequence.blocks)
        self._pending_keys.difference_update(sequence.pending_keys)
        sequence.blocks = []

    def forward(self, chunks: Sequence[Chunk], *, logits: bool = True) -> PassOutput:
        order = sorted(range(len(chunks)), key=lambda place: self._adapter_index(chunks[place].sequence))
        table = np.zeros((len(chunks), max(len(chunk.sequence.blocks) for chunk in chunks)), np.int32)
        ids: list[Ids] = []
        positions, owners, query_groups = [], [], []
        adapter_rows = np.zeros((len(self.adapters), 2), np.int64)
        num_rows, longest, ends = 0, 0, {}
        for place in order:
            chunk = chunks[place]
            sequence, count = chunk.sequence, chunk.count + len(chunk.draft)
            start = sequence.num_cached
            table[place, : len(sequence.blocks)] = sequence.blocks
            ids.append(sequence.ids[start : start + chunk.count])
            ids.append(np.array(chunk.draft, np.int32))
            positions.append(np.arange(start, start + count))
            owners.append(np.full(count, place))
            for first in range(0, count, self._max_query_rows):
                size = min(self._max_query_rows, count - first)
                query_groups.append((num_rows + first, size, start + first, place))
            adapter = self._adapter_index(sequence)
            if adapter < len(self.adapters):
                begin = adapter_rows[adapter, 0] if adapter_rows[adapter, 1] else num_rows
                adapter_rows[adapter] = begin, num_rows + count
            num_rows, longest = num_rows + count, max(longest, start + count)
            ends[place] = num_rows
        rows = (
            np.concatenate(positions), np.concatenate(owners), table, np.array(query_groups, np.int64), adapter_rows,
        )  # fmt: skip
        picked = [np.arange(ends[place] - chunk.num_outputs, ends[place]) for place, chunk in enumerate(chunks)]
        with torch.inference_mode():
            all_ids = np.concatenate(ids).astype(np.int64)
            output = self._model(all_ids, rows, longest, np.concatenate(picked), logits=logits)
        for chunk in chunks:
            self._advance(chunk.sequence, chunk.count)
        return output

    def _adapter_index(self, sequence: SequenceState) -> int:
        """Return the index of a sequence's adapter; the base model comes last."""
        return len(self.adapters) if sequence.adapter is None else self.adapters.index(sequence.adapter)

    def _advance(self, sequence: SequenceState, count: int) -> None:
        """Count positions as cached and register full blocks. Draft tokens are not counted: they may be rejected."""
        sequence.num_cached += count
        keys = sequence.block_keys
        previous_key, begin = keys[-1] if keys else root_key(sequence.adapter), len(keys) * BLOCK_SIZE
        for key in block_keys(previous_key, sequence.ids[: sequence.num_final], begin):
            tokens = sequence.ids[begin : begin + BLOCK_SIZE].copy()
            self.blocks.register(key, sequence.blocks[len(keys)], previous_key, tokens)
            self._pending_keys.discard(key)
            keys.append(key)
            previous_key, begin = key, begin + BLOCK_SIZE


def kv_bytes_per_position(model: nn.Module) -> int:
    """Return the bytes that one position takes in the cache of a CompiledDecoder."""
    layers = DecoderLayers(model)
    first = layers.part(0)
    dtype = activation_dtype(layers.head.weight.dtype)
    return 2 * len(layers) * first.key_value * padded_head_size(first.size) * dtype.itemsize


def adapter_names(model: nn.Module) -> list[str]:
    return sorted(model.peft_config) if isinstance(model, PeftModel) else []


def active_adapter(model: nn.Module) -> str | None:
    """Return the adapter that is active; None if the base model is. The model has one active adapter at most."""
    adapters = _active_adapters(model)
    assert len(adapters) < 2, adapters
    return next(iter(adapters), None)


def _active_adapters(model: nn.Module) -> list[str]:
    layer = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    return [] if layer is None or layer.disable_adapters else list(map(str, layer.active_adapters))


def why_not_decoder(model: nn.Module) -> str | None:
    """Return why CompiledDecoder does not support a model; None if it does."""
    if has_trained_biases(model):  # the base and the adapter could not share a batch
        return "the adapter has trained biases"
    if len(_active_adapters(model)) > 1:
        return "several adapters are active at once"
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    kind = base.config.get_text_config().model_type
    family = FAMILIES.get(kind)
    if family is None:
        return f"model family {kind} is not in the table of the fast step"
    if not family.fully_fused:
        return f"{kind}: {family.model_parts}"
    decoder, config = text_decoder(base)
    known = {id(module) for layer in decoder.layers for group in linears(layer, family) for module in group}
    for name, module in base.named_modules():
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
