"""Continuous batching: sequences join and leave between passes, and prompts are processed next to decoding sequences.

A pass over a few rows takes as long as a pass over one row, because the weights must be read from memory. With few
sequences, the additional rows are used for speculative decoding (Leviathan et al., arXiv:2211.17192) with prompt
lookup: the draft is the text that followed the previous occurrence of the last tokens. The output does not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from strop.data.images import hide_images
from strop.data.types import Ids
from strop.engine.decode.cache import BLOCK_SIZE, MAX_SEQUENCES, PREFILL_ROWS, CacheFull, blocks_for
from strop.engine.decode.decoder import Chunk, CompiledDecoder, Decoder, kv_bytes_per_position
from strop.engine.decode.sampling import NoToken, PassOutput, SequenceState, Token
from strop.engine.images import image_ends
from strop.engine.kernels.dispatch import token_logprobs
from strop.errors import ModelError
from strop.machine.probe import probe

MAX_LOGIT_ROWS = 128  # rows with logits per pass; the logits of more would take more memory than the pass itself
NGRAM = 3  # number of last tokens that must have occurred before to propose a draft
CACHE_SHARE = 0.5  # share of the free memory that the KV cache may use
_ATTRIBUTE = "_strop_decoder"  # attribute of a model that holds its cached decoder


@dataclass(frozen=True)
class Progress:
    """The new tokens of a sequence after a pass. They are already appended to the sequence."""

    sequence: SequenceState
    tokens: tuple[Token, ...]


class Batch:
    """Sequences that are decoded together, at most `max_sequences`.

    prefill_rows: maximum number of prompt tokens per pass. speculative: enable speculative decoding.
    """

    def __init__(
        self, decoder: Decoder, max_sequences: int, *, prefill_rows: int = PREFILL_ROWS, speculative: bool = True
    ) -> None:
        self._decoder, self.max_sequences = decoder, max_sequences
        self._speculative, self._prefill_rows = speculative, prefill_rows
        self.sequences: list[SequenceState] = []
        self.paused: list[SequenceState] = []  # between two turns; they keep their space
        self._followers: dict[SequenceState, list[SequenceState]] = {}  # sequences that wait for a leader's prompt

    def add(self, sequence: SequenceState) -> bool:
        """Admit a sequence. Return False if there is no space now. Raise CacheFull if the sequence is too long."""
        if len(self.sequences) + len(self.paused) + self._num_waiting >= self.max_sequences:
            return False
        try:
            self._decoder.admit(sequence)
        except CacheFull:
            if self.sequences:
                return False
            raise
        self.sequences.append(sequence)
        return True

    def add_group(self, group: Sequence[SequenceState]) -> int:
        """Admit the first sequences of a group with the same prompt, and return the number of admitted sequences.

        The prompt is processed once, by the first sequence. Raises CacheFull if a sequence is too long.
        """
        assert isinstance(self._decoder, CompiledDecoder), "groups need the compiled decoder"
        leader = group[0]
        if not self.add(leader):
            return 0
        followers = self._followers.setdefault(leader, [])
        num_others = self._num_waiting + len(self.sequences) + len(self.paused)
        for sequence in group[1 : self.max_sequences - num_others + 1]:
            try:
                self._decoder.admit_follower(sequence, leader)
            except CacheFull:
                break
            followers.append(sequence)
        return 1 + len(followers)

    @property
    def _num_waiting(self) -> int:
        return sum(map(len, self._followers.values()))

    def remove(self, sequence: SequenceState) -> None:
        """Remove a sequence, and the followers that wait for its prompt."""
        (self.paused if sequence in self.paused else self.sequences).remove(sequence)
        for removed in (sequence, *self._followers.pop(sequence, ())):
            self._decoder.release(removed)

    def resume(self, sequence: SequenceState) -> None:
        """Continue a paused sequence, which was extended. What it has in the cache is not processed again."""
        self.paused.remove(sequence)
        self.sequences.append(sequence)

    def step(self) -> list[Progress]:
        """Run one pass, return the new tokens, and remove finished sequences from the batch.

        A sequence that may have more turns is paused after a stop token.

        A sequence with an expected completion (a given text to score) returns no tokens until all of it is scored.
        """
        chunks = self._plan_pass()
        progress = []
        leaders = [chunk.sequence for chunk in chunks if chunk.num_outputs]
        samplers = [*leaders, *(follower for leader in leaders for follower in self._followers.get(leader, ()))]
        argmax_only = all(sequence.needs_argmax_only and not sequence.is_scoring for sequence in samplers)
        output = self._decoder.forward(chunks, logits=not argmax_only)
        start = 0
        for chunk in chunks:
            if not chunk.num_outputs:
                continue
            rows = output.rows(start, start + chunk.num_outputs)
            start += chunk.num_outputs
            for follower in self._followers.pop(chunk.sequence, ()):
                assert isinstance(self._decoder, CompiledDecoder)
                self._decoder.start_follower(follower, chunk.sequence)
                self.sequences.append(follower)
                progress.append(Progress(follower, _append_samples(Chunk(follower, 0, 1), rows)))
            process = _score if chunk.sequence.is_scoring else _append_samples
            progress.append(Progress(chunk.sequence, process(chunk, rows)))
        for sequence in [sequence for sequence in self.sequences if sequence.finish_reason]:
            if sequence.has_turns and sequence.finish_reason == "stop":
                self.sequences.remove(sequence)
                self.paused.append(sequence)
            else:
                self.remove(sequence)
        return progress

    def _plan_pass(self) -> list[Chunk]:
        """Return the chunks of the next pass: one row per decoding sequence, and the rows of drafts or prompts."""
        decoding = [x for x in self.sequences if x.num_uncached == 1 and not x.is_scoring]
        prefilling = [x for x in self.sequences if x.num_uncached != 1 or x.is_scoring]
        spare = self._decoder.num_cheap_rows - len(decoding) if self._speculative and not prefilling else 0
        chunks = []
        for i, sequence in enumerate(decoding):
            num_remaining = sequence.max_end - sequence.length - 1
            draft = propose_draft(sequence.ids, min(max(0, spare) // (len(decoding) - i), num_remaining))
            spare -= len(draft)
            chunks.append(Chunk(sequence, sequence.num_uncached, 1 + len(draft), draft))
        rows_left, outputs_left = self._prefill_rows, max(1, MAX_LOGIT_ROWS - len(decoding))
        for sequence in prefilling:
            count, scored_from = min(sequence.num_uncached, rows_left), max(sequence.num_cached, sequence.first_scored)
            if sequence.is_scoring:
                count = min(count, scored_from - sequence.num_cached + outputs_left)
            if count and outputs_left:
                count = self._keep_images_whole(sequence, count)
                num_outputs = int(count == sequence.num_uncached)
                if sequence.is_scoring:
                    num_outputs = max(0, sequence.num_cached + count - scored_from)
                    outputs_left = max(0, outputs_left - num_outputs)
                chunks.append(Chunk(sequence, count, num_outputs))
            rows_left = max(0, rows_left - count)
        return chunks

    def _keep_images_whole(self, sequence: SequenceState, count: int) -> int:
        """Return the number of next tokens to process, about `count`, that does not end inside an image.

        If an image with more tokens comes next, it is processed at once.
        """
        if not self._decoder.whole_images:
            return count
        ends, last = image_ends(sequence.ids), sequence.num_cached + count - 1
        begin = int(np.searchsorted(ends, ends[last])) if ends[last] > last + 1 else last + 1
        return (begin if begin > sequence.num_cached else int(ends[last])) - sequence.num_cached


def _score(chunk: Chunk, output: PassOutput) -> tuple[Token, ...]:
    sequence, start = chunk.sequence, chunk.sequence.num_cached - chunk.num_outputs
    # The appended 0 is for the last position, which has no next token. Scores of it and of images are not used.
    expected = np.append(hide_images(sequence.ids[start + 1 : sequence.num_cached + 1]), 0)[: chunk.num_outputs]
    argmax = np.where(output.finite, output.argmax, -1)
    return sequence.score_expected(start, argmax, token_logprobs(output.logits, expected))


def _append_samples(chunk: Chunk, output: PassOutput) -> tuple[Token, ...]:
    """Sample and append the next token. Continue with the following ones as long as the draft is accepted."""
    sequence, tokens = chunk.sequence, []
    for row in range(chunk.num_outputs):
        try:
            token = sequence.sample(output, row)
        except NoToken as error:
            sequence.finish_reason = error.finish_reason
            break
        sequence.append(token.id)
        tokens.append(token)
        if sequence.finish_reason or row == len(chunk.draft) or chunk.draft[row] != token.id:
            break
        sequence.num_cached += 1  # the accepted draft token is in the cache
    return tuple(tokens)


def propose_draft(ids: Ids, max_tokens: int) -> Sequence[int]:
    """Return at most `max_tokens` tokens that followed the previous occurrence of the last NGRAM tokens."""
    if max_tokens <= 0 or len(ids) <= NGRAM:
        return ()
    ngrams = np.lib.stride_tricks.sliding_window_view(ids[:-1], NGRAM)
    starts = np.flatnonzero((ngrams == ids[-NGRAM:]).all(1))
    if not len(starts):
        return ()
    begin = int(starts[-1]) + NGRAM
    draft: list[int] = ids[begin : begin + max_tokens].tolist()
    return draft


def decode_all(batch: Batch, sequences: Sequence[SequenceState]) -> Iterator[Progress]:
    """Decode all sequences, and yield the progress of each pass. Raises CacheFull if a sequence is too long.

    Closing the iterator removes the sequences from the batch.
    """
    return decode_groups(batch, [[sequence] for sequence in sequences])


def decode_groups(batch: Batch, groups: Sequence[Sequence[SequenceState]]) -> Iterator[Progress]:
    """Decode groups of sequences with the same prompt.

    The prompt is processed once for the sequences of a group that start together.
    """
    waiting = [list(group) for group in reversed(groups)]
    try:
        while waiting or batch.sequences:
            while waiting:
                group = waiting[-1]
                num_admitted = batch.add_group(group) if len(group) > 1 else int(batch.add(group[0]))
                del group[:num_admitted]
                if group:
                    break
                waiting.pop()
            yield from batch.step()
    finally:
        for sequence in list(batch.sequences):
            batch.remove(sequence)


def batch_for(model: nn.Module, sequences: Sequence[SequenceState]) -> Batch:
    """Return a batch that decodes as many of these sequences together as fit into memory, up to MAX_SEQUENCES.

    The decoder is cached on the model until a weight changes. Raises ModelError if a sequence does not fit.
    """
    blocks = sorted((blocks_for(sequence.max_length) for sequence in sequences), reverse=True)
    block_bytes = BLOCK_SIZE * kv_bytes_per_position(model)
    versions, decoder = getattr(model, _ATTRIBUTE, None) or (None, None)
    if decoder is not None and versions != _weight_versions(model):
        drop_decoder(model)
        decoder = None
    free = int(probe().free_bytes * CACHE_SHARE) // block_bytes + (decoder.blocks.count if decoder else 0)
    counts = range(1, min(MAX_SEQUENCES, len(blocks)) + 1)
    max_sequences = max((count for count in counts if sum(blocks[:count]) <= free), default=0)
    if not max_sequences:
        gib = blocks[0] * block_bytes / 2**30
        what = f"not enough memory for the keys and values of one sequence ({gib:.2f} GiB)"
        raise ModelError(what, fix="ask for shorter completions")
    num_blocks = sum(blocks[:max_sequences])
    if decoder is None or decoder.blocks.count < num_blocks:
        decoder = None
        drop_decoder(model)  # free the old cache before allocating the new one
        decoder = CompiledDecoder(model, num_blocks * BLOCK_SIZE)
        setattr(model, _ATTRIBUTE, (_weight_versions(model), decoder))
    return Batch(decoder, max_sequences)


def drop_decoder(model: nn.Module) -> None:
    """Free a model's cached decoder and its KV cache."""
    setattr(model, _ATTRIBUTE, None)


def _weight_versions(model: nn.Module) -> list[tuple[int, int]]:
    """Return values that change when a weight is modified or replaced."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
