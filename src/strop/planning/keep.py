"""Decide whether a run mixes in general prompts with the model's own answers (train.keep), and predict their sizes."""

from __future__ import annotations

import random

from strop.config.load import Choice, Resolved
from strop.config.schema import KEEP_SHARE, Recipe
from strop.data.batching import BatchStream
from strop.data.prepare import Prepared
from strop.planning.memory import RolloutLoad

MIN_TOKENS = 100_000  # of a run with train.keep auto: answering the prompts takes as long as training on some 20,000
MIN_LENGTH = 128  # of data.max_length, for train.keep auto: general prompts with their answers have up to this length
CHECKED_ROWS = 1000
KEPT_ROW = (67, 26)  # mean tokens and supervised tokens of a general prompt with its answer
ANSWERS = RolloutLoad(completions=409, group=1, prompt=41, answer=32)  # the work of answering all general prompts


def why_not_kept(data: Prepared) -> str:
    """Return why rows are not mixed with general prompts by default, or an empty text."""
    # Rows without a system prompt may be meant to change every answer, which general prompts would work against.
    rows = data.train_conversations
    chosen = random.Random(0).sample(range(len(rows)), min(len(rows), CHECKED_ROWS))
    checked = [rows[i] for i in sorted(chosen)]
    if data.renderer.template is None or any(row.text is not None for row in checked):
        return "the rows are plain text"
    if data.renderer.image_table:
        return "the rows have images"
    if not all(row.messages and row.messages[0].role == "system" for row in checked):
        return "rows without a system prompt may be meant to change all answers"
    return ""


def choose_keep(resolved: Resolved, rows: int, tokens: int, why_not: str) -> Resolved:
    """Replace train.keep auto by a share or off.

    rows, tokens: of the training rows. why_not: what `why_not_kept` returns for them.
    """
    recipe, field = resolved.recipe, "train.keep"
    if recipe.train.keep != "auto":
        return resolved
    if recipe.train.objective != "sft":
        return resolved.decide([Choice(field, "off", "default", "")])
    run_tokens = _count_run_tokens(recipe, rows, tokens)
    reasons = {
        "a teacher gives the labels": recipe.train.teacher is not None,
        "a sharded base cannot answer before training": recipe.model.placement == "sharded",
        "answers of a base that is not in memory take long": recipe.model.placement == "streamed",
        f"data.max_length {recipe.data.max_length} is too short for general prompts": (
            recipe.data.max_length < MIN_LENGTH
        ),
        f"no general prompts are added to short runs: this one has {run_tokens:,} tokens, fewer than {MIN_TOKENS:,}": (
            run_tokens < MIN_TOKENS
        ),
        why_not: bool(why_not),
    }
    why = next((reason for reason, applies in reasons.items() if applies), None)
    if why is not None:
        return resolved.decide([Choice(field, "off", "plan", why)])
    return resolved.decide(
        [Choice(field, KEEP_SHARE, "plan", "the rows have a system prompt: answers to others are kept")]
    )


def _count_run_tokens(recipe: Recipe, rows: int, tokens: int) -> int:
    """Return the tokens of all steps of a run."""
    train = recipe.train
    stream = BatchStream(rows, batch_size=train.batch_size, seed=0, epochs=train.epochs, max_steps=train.max_steps)
    return round(stream.total_steps / stream.steps_per_epoch * tokens)
