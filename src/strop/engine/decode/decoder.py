"""Texts of many requests through the model together: prompts are read and answers go on in one pass, row by row.

Nothing is padded: a pass is a row of tokens, some of this text and some of that, each with its adapter. Their keys and
values go into blocks (cache.py). The model's own weights are used where they lie, quantized ones as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from strop.engine.decode.cache import BLOCK_SIZE, Blocks, NoRoom, blocks_for, keys_of, root_of
from strop.engine.decode.compiled_model import CompiledPass, activation_dtype, width_of
from strop.engine.decode.decoder import adapters_of, why_not_decoder
from strop.engine.decode.sampling import Ids, Seen, SequenceState
from strop.engine.layers import Layers

TOGETHER = 48  # query heads of a text that are attended together: more need not read its keys less often


@dataclass(frozen=True)
class Part:
    """What a pass reads of a text: the next `count` positions that are not in the cache, with `guessed` tokens behind
    the last. told: the last so many of them give logits."""

    text: SequenceState
    count: int
    told: int = 0
    guessed: Sequence[int] = ()


class Decoder(Protocol):
    """What Batch needs of a decoder. free_rows: a pass over so many takes hardly longer than one over a single row."""

    free_rows: int

    def begin(self, text: SequenceState) -> None:
        """Takes the room that the text will need, and shares what is known of its beginning. Raises NoRoom, too where
        another text is reading more of the same beginning: it will be known soon."""

    def end(self, text: SequenceState) -> None:
        """Gives the text's room back."""

    def read(self, parts: Sequence[Part], *, logits: bool = True) -> Seen:
        """One pass. What is told, part by part. logits: whether they are asked for."""


class CompiledDecoder:
    """positions: how many the cache holds, over all texts. warm: have the loops compiled beforehand, in another
    process.

    Made once for a model; where its adapters are trained on, `refresh`. The model must be one that `why_not_decoder` has
    no reason against.
    """

    def __init__(self, model: torch.nn.Module, positions: int, *, warm: bool = True) -> None:
        reason = why_not_decoder(model)
        assert reason is None, reason
        self._model = model
        self._layers = Layers(model)
        self.names = adapters_of(model)
        self.blocks = Blocks(blocks_for(positions))
        self._coming: set[bytes] = set()  # keys of blocks that texts under way will fill
        self._pass = CompiledPass(self._layers, self.blocks.count, self.names, warm=warm)
        # memory sets the pace, and taking weights apart where that must be done (products._straight)
        self.free_rows = 4 if self._pass.takes_apart else 8
        first = self._layers.part(0)
        self._most = max(1, TOGETHER // (first.query // first.key_value))

    def refresh(self) -> None:
        """The adapters' weights have changed, or there are others. No text may be under way."""
        self.names = adapters_of(self._model)
        self._pass.take_adapters(self.names)
        self.blocks.forget()

    def begin(self, text: SequenceState) -> None:
        root = root_of(text.adapter)
        keys = list(keys_of(root, text.ids[: text.first]))
        known = self.blocks.share(keys)
        text.done, need = len(known) * BLOCK_SIZE, blocks_for(text.room) - len(known)
        source, alike = self.blocks.alike(keys[len(known) - 1] if known else root, text.ids[text.done : text.first])
        if alike and need > self.blocks.free:  # its room is needed
            self.blocks.leave([source])
            alike = 0
        try:
            if self._coming.intersection(keys[len(known) : len(known) + 1]):
                raise NoRoom
            text.blocks = known + self.blocks.take(need)
        except NoRoom:
            self.blocks.leave(known + ([source] if alike else []))
            raise
        text.keys, text.coming = keys[: len(known)], keys[len(known) :]
        self._coming.update(text.coming)
        if alike:
            self._pass.copy_block(source, text.blocks[len(known)])
            self.blocks.leave([source])
            text.done += alike
        text.found = text.done

    def begin_behind(self, text: SequenceState, leader: SequenceState) -> None:
        """Takes the room of a text with the leader's prompt, beside what they will share. Raises NoRoom."""
        assert text.adapter == leader.adapter and text.prompt == leader.prompt
        text.blocks = self.blocks.take(blocks_for(text.prompt + text.most) - text.prompt // BLOCK_SIZE)

    def follow(self, text: SequenceState, leader: SequenceState) -> None:
        """The leader's prompt has just been read: the text goes on from there."""
        whole = leader.prompt // BLOCK_SIZE
        shared = leader.blocks[:whole]
        self.blocks.use(shared)
        if leader.prompt % BLOCK_SIZE:  # the block that both go on in
            self._pass.copy_block(leader.blocks[whole], text.blocks[0])
        text.blocks = shared + text.blocks
        text.keys, text.done, text.found = leader.keys[:whole], leader.prompt, leader.prompt

    def end(self, text: SequenceState) -> None:
        self.blocks.leave(text.blocks)
        self._coming.difference_update(text.coming)
        text.blocks = []

    def read(self, parts: Sequence[Part], *, logits: bool = True) -> Seen:
        order = sorted(range(len(parts)), key=lambda place: self._adapter(parts[place].text))
        table = np.zeros((len(parts), max(len(part.text.blocks) for part in parts)), np.int32)
        ids: list[Ids] = []
        at, of, chunks = [], [], []
        own = np.zeros((len(self.names), 2), np.int64)
        rows, longest, ends = 0, 0, {}
        for place in order:
            part = parts[place]
            text, count = part.text, part.count + len(part.guessed)
            table[place, : len(text.blocks)] = text.blocks
            ids.append(text.ids[text.done : text.done + part.count])
            ids.append(np.array(part.guessed, np.int32))
            at.append(np.arange(text.done, text.done + count))
            of.append(np.full(count, place))
            for first in range(0, count, self._most):
                chunks.append((rows + first, min(self._most, count - first), text.done + first, place))
            adapter = self._adapter(text)
            if adapter < len(self.names):
                own[adapter] = (own[adapter, 0] if own[adapter, 1] else rows), rows + count
            rows, longest = rows + count, max(longest, text.done + count)
            ends[place] = rows
        given = np.concatenate(at), np.concatenate(of), table, np.array(chunks, np.int64), own
        told = [np.arange(ends[place] - part.told, ends[place]) for place, part in enumerate(parts)]
        with torch.inference_mode():
            whole = np.concatenate(ids).astype(np.int64)
            seen = self._pass(whole, given, longest, np.concatenate(told), logits=logits)
        for part in parts:
            self._read_on(part.text, part.count)
        return seen

    def _adapter(self, text: SequenceState) -> int:
        return len(self.names) if text.adapter is None else self.names.index(text.adapter)

    def _read_on(self, text: SequenceState, count: int) -> None:
        """Full blocks become known. Guessed tokens do not count: they may turn out wrong."""
        text.done += count
        before, begin = text.keys[-1] if text.keys else root_of(text.adapter), len(text.keys) * BLOCK_SIZE
        for key in keys_of(before, text.ids[: text.sure], begin):
            self.blocks.know(key, text.blocks[len(text.keys)], before, text.ids[begin : begin + BLOCK_SIZE].copy())
            self._coming.discard(key)
            text.keys.append(key)
            before, begin = key, begin + BLOCK_SIZE


def position_bytes(model: torch.nn.Module) -> int:
    """Bytes of the cache that a position takes."""
    layers = Layers(model)
    first = layers.part(0)
    return (
        2 * len(layers) * first.key_value * width_of(first.size) * activation_dtype(layers.head.weight.dtype).itemsize
    )
