"""The micro-batches that a recipe makes: the largest there can be, and the usual one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from strop.config.schema import Recipe
from strop.data.batching import BatchStream, group_by_length, pack
from strop.objectives.table import answers_of, drawn_tokens
from strop.planning.activations import KEEP_PAIRS, LEAST_PREFIX, MicroBatch, at_peak
from strop.planning.workload import Setting

MICRO_BATCH_TOKENS = 2048
LOOKED_AT = 32  # steps, whose time stands for the run's


class Rows(list[tuple[int, int]]):
    """Tokens and supervised tokens of each answer. prefix: the tokens that all of them begin with. unknown: why there
    are none; refused: why a run would not start on them."""

    prefix = 0
    unknown = ""
    refused = ""


def largest_micro_batch(recipe: Recipe, setting: Setting, longest: int | None = None) -> MicroBatch:
    """The micro-batch of a recipe that needs most: rows as long as they may be (or as the longest there is) and a
    shorter one that fills it, or rows short enough for their probabilities to be kept."""
    most = recipe.data.max_length + drawn_tokens(recipe.train)
    longest = min(longest or most, most)
    found = [_filled(recipe, length) for length in sorted({longest, min(longest, KEEP_PAIRS)})]
    return max(found, key=lambda batch: at_peak(setting, batch).total)


def _filled(recipe: Recipe, length: int) -> MicroBatch:
    train_, answers = recipe.train, answers_of(recipe.train)
    most = answers * train_.batch_size
    if train_.micro_batch is not None:
        lengths = [length] * answers * min(train_.micro_batch, train_.batch_size)
    else:
        budget = max(train_.micro_batch_tokens or MICRO_BATCH_TOKENS, length * answers)
        lengths = [length] * answers * min(budget // (length * answers), train_.batch_size)
        rest = (budget - sum(lengths)) // answers
        lengths += [rest] * answers if len(lengths) < most and rest > 1 else []
    return MicroBatch.rows(lengths, more=len(lengths) < most)


def usual_micro_batch(recipe: Recipe, rows: Sequence[tuple[int, int]] = ()) -> MicroBatch:
    """The one whose time stands for the run's: of rows of the mean length. rows: (tokens, supervised) of each answer,
    where they are known; else they are as long as they may be, and supervised. What all of them begin with is computed
    once."""
    prefix = rows.prefix if isinstance(rows, Rows) and len(rows) > 1 else 0
    answers = answers_of(recipe.train)
    if not rows:
        drawn = drawn_tokens(recipe.train)
        length = recipe.data.max_length + drawn
        rows = [(length, drawn or length - 1)] * recipe.train.batch_size * answers
    train_, mean = recipe.train, max(2, round(sum(tokens for tokens, _ in rows) / len(rows)))
    number = train_.micro_batch or max(1, (train_.micro_batch_tokens or MICRO_BATCH_TOKENS) // (mean * answers))
    number = answers * min(number, train_.batch_size, len(rows) // answers)
    share = sum(supervised for _, supervised in rows) / max(1, sum(tokens - 1 for tokens, _ in rows))
    batch = MicroBatch.rows([mean] * number, share=share, more=number < min(answers * train_.batch_size, len(rows)))
    return _sharing(batch, [mean] * number, prefix)


def first_steps(recipe: Recipe, rows: Rows, packed: bool) -> list[list[MicroBatch]]:
    """The micro-batches of the run's first steps, as training cuts them. rows: one answer each. packed: no padding is
    computed, and what the rows begin with once."""
    train = recipe.train
    steps = BatchStream(
        len(rows), batch_size=train.batch_size, seed=recipe.seed, epochs=train.epochs, max_steps=train.max_steps
    )
    return [_cut(recipe, [rows[row] for row in batch.rows], rows.prefix, packed) for batch in islice(steps, LOOKED_AT)]


def _cut(recipe: Recipe, rows: Sequence[tuple[int, int]], prefix: int, packed: bool) -> list[MicroBatch]:
    train, lengths = recipe.train, [tokens for tokens, _ in rows]
    budget = train.micro_batch_tokens or MICRO_BATCH_TOKENS
    if train.micro_batch is not None:
        groups = group_by_length(lengths, rows=train.micro_batch)
    else:
        groups = pack(lengths, max(budget, *lengths)) if packed else group_by_length(lengths, tokens=budget)
    return [_together([rows[i] for i in group], prefix, packed, len(groups) > 1) for group in groups]


def _together(rows: Sequence[tuple[int, int]], prefix: int, packed: bool, more: bool) -> MicroBatch:
    supervised, longest = sum(count for _, count in rows), max(tokens for tokens, _ in rows)
    if not packed:
        batch = MicroBatch.rows([longest] * len(rows), more=more)
        return replace(batch, supervised=supervised, shared=sum(tokens for tokens, _ in rows) - batch.tokens)
    batch = MicroBatch.rows([tokens for tokens, _ in rows], more=more)
    return _sharing(replace(batch, supervised=supervised), [tokens for tokens, _ in rows], prefix)


def _sharing(batch: MicroBatch, lengths: Sequence[int], prefix: int) -> MicroBatch:
    """Rows of these lengths that begin with `prefix` tokens in common, where that is worth sharing."""
    prefix = min(prefix, min(lengths) - 1) if len(lengths) > 1 else 0
    if prefix < LEAST_PREFIX:
        return batch
    shared = (len(lengths) - 1) * prefix
    own = tuple((number, tokens - prefix, tokens) for tokens, number in sorted(Counter(lengths).items()))
    return replace(batch, tokens=batch.tokens - shared, documents=((1, prefix, prefix), *own), shared=shared)
