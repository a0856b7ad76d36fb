"""The micro-batches that a recipe makes: the largest there can be, and the usual one."""

from __future__ import annotations

from collections.abc import Sequence

from strop.config.schema import Recipe
from strop.objectives.table import answers_of, drawn_tokens
from strop.planning.activations import KEEP_PAIRS, MicroBatch, at_peak
from strop.planning.setting import Setting

MICRO_BATCH_TOKENS = 2048


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
    where they are known; else they are as long as they may be, and supervised."""
    answers = answers_of(recipe.train)
    if not rows:
        drawn = drawn_tokens(recipe.train)
        length = recipe.data.max_length + drawn
        rows = [(length, drawn or length - 1)] * recipe.train.batch_size * answers
    train_, mean = recipe.train, max(2, round(sum(tokens for tokens, _ in rows) / len(rows)))
    number = train_.micro_batch or max(1, (train_.micro_batch_tokens or MICRO_BATCH_TOKENS) // (mean * answers))
    number = answers * min(number, train_.batch_size, len(rows) // answers)
    share = sum(supervised for _, supervised in rows) / max(1, sum(tokens - 1 for tokens, _ in rows))
    return MicroBatch.rows([mean] * number, share=share, more=number < min(answers * train_.batch_size, len(rows)))
