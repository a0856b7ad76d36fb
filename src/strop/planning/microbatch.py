"""Measure the rows of a recipe and predict its micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from strop.config.names import full_name
from strop.config.schema import Recipe, keep_share
from strop.data.batching import BatchStream, group_by_length, pack
from strop.data.reading.sources import needs_download
from strop.data.rendering.image_encoder import image_encoder
from strop.errors import StropError
from strop.models.source import Source, is_on_disk, locate
from strop.models.tokenizer import check_template, load_tokenizer
from strop.objectives.table import (
    data_kind_of,
    longest_sequence,
    max_completion_tokens,
    max_sampled_tokens,
    prepare_rows,
    sequences_per_row,
)
from strop.planning.activations import MAX_SAVED_KEYS, MIN_PREFIX, MicroBatch, peak_live_bytes
from strop.planning.images import ImageLoad
from strop.planning.workload import Workload

MICRO_BATCH_TOKENS = 2048
TIMED_STEPS = 32  # number of steps from which the time of a run is predicted
MAX_STEPS = 20_000  # maximum number of steps in which the largest micro-batch is searched
MAX_ROWS = 50_000  # minimum number of rows in which it is searched, over several epochs if there are fewer
NO_DATA = "-"  # data.train of a plan without data


KEPT_ROW = (67, 26)  # tokens and supervised tokens of a row of train.keep


class Rows(list[tuple[int, int]]):
    """The tokens and supervised tokens of each sequence."""

    prefix = 0  # length of the prefix that all rows share
    rows = 0  # number of rows, if they differ in their number of sequences
    unknown = ""  # why the rows cannot be read
    refused: StropError | None = None  # why a run would reject them
    labels: Sequence[str] = ()  # of texts to classify
    warnings: Sequence[str] = ()  # of `strop check`
    images: ImageLoad | None = None


def plan_options(options: Mapping[str, Any] | None, recipe_given: bool) -> dict[str, Any]:
    """Return options with full field names. Without a recipe and data, rows are assumed to have the maximum length."""
    default = {} if recipe_given else {"data.train": NO_DATA}
    return default | {full_name(name): value for name, value in (options or {}).items()}


def measure_rows(recipe: Recipe) -> Rows:
    """Return the sizes of the rows, if they and the model's tokenizer are on this machine."""
    # A preference pair has two sequences. A prompt has one for each sampled completion, of the maximum length.
    sizes = Rows()
    source = _tokenizer_source(recipe)
    if isinstance(source, str):
        sizes.unknown = source
        return sizes
    data_kind = data_kind_of(recipe.train)
    check_template(source, recipe.data, data_kind)
    tokenizer = load_tokenizer(source)
    prepared = prepare_rows(recipe, tokenizer, strict=False)
    sizes.images = ImageLoad.measure(image_encoder(tokenizer), source)
    rows, prefix = prepared.train, None
    sizes.refused = prepared.refusal
    held_out = prepared.report.eval
    sizes.warnings = [*prepared.report.warnings, *(held_out.warnings if held_out else ())]
    sizes.labels = prepared.classes.names if prepared.classes else ()
    if sampled := max_completion_tokens(recipe.train):
        whole = recipe.data.max_length if recipe.train.environment is not None else None
        pairs = [(whole or int(length) + sampled, max_sampled_tokens(recipe, int(length))) for length in rows.lengths]
        sizes += [pair for pair in pairs for _ in range(sequences_per_row(recipe.train))]
        return sizes
    sizes.rows = len(prepared.train_items or ()) if data_kind == "triplets" else 0
    for example in rows:
        sizes.append((len(example), example.supervised))
        prefix = _shared_prefix(prefix, example.ids) if data_kind == "turns" else None
    if share := keep_share(recipe.train):  # the answers are not known before the run
        tokens = sum(length for length, _ in sizes) * share / (1 - share)
        parts = sequences_per_row(recipe.train)
        sizes += [(KEPT_ROW[0] // parts, KEPT_ROW[1] // parts)] * (parts * round(tokens / KEPT_ROW[0]))
        prefix = None
    sizes.prefix = 0 if prefix is None else len(prefix)
    return sizes


def _tokenizer_source(recipe: Recipe) -> Source | str:
    """Return the source of the model's tokenizer, or why the rows cannot be read."""
    names = recipe.data.train
    names = [names] if isinstance(names, str) else names
    if names == [NO_DATA]:
        return "no data is given"
    if any(needs_download(name) for name in names):
        return "the data is on the Hub"
    if not is_on_disk(recipe.model.name):
        return "the model's tokenizer is not on this machine"
    source = locate(recipe.model.name, recipe.model.revision)
    has_tokenizer = source.kind != "folder" or (source.path / "tokenizer_config.json").is_file()
    return source if has_tokenizer else "the model's folder has no tokenizer"


def _shared_prefix(prefix: Any, ids: Any) -> Any:
    """Return the longest common prefix of two arrays of token ids. prefix: None for the first row."""
    if prefix is None:
        return ids
    size = min(len(prefix), len(ids))
    differs = (prefix[:size] != ids[:size]).nonzero()[0]
    return prefix[: differs[0] if len(differs) else size]


def largest_micro_batch(recipe: Recipe, workload: Workload, rows: Rows | None = None) -> MicroBatch:
    """Return the micro-batch that needs the most memory. Without rows, they may all have the maximum length."""
    if rows and data_kind_of(recipe.train) == "turns":
        steps = first_steps(recipe, rows, workload.compute.step == "fast", searched_steps(_stream(recipe, rows)))
        return max((batch for step in steps for batch in step), key=lambda x: peak_live_bytes(workload, x).total)
    # Rows of up to MAX_SAVED_KEYS tokens save attention probabilities, so they may need more memory than longer ones.
    longest = longest_sequence(recipe)
    if rows:
        longest = min(longest, max(tokens for tokens, _ in rows))
    candidates = [_full_micro_batch(recipe, length) for length in sorted({longest, min(longest, MAX_SAVED_KEYS)})]
    return max(candidates, key=lambda batch: peak_live_bytes(workload, batch).total)


def _full_micro_batch(recipe: Recipe, length: int) -> MicroBatch:
    train, sequences = recipe.train, sequences_per_row(recipe.train)
    sequences_per_step = sequences * train.batch_size
    if train.micro_batch is not None:
        lengths = [length] * sequences * min(train.micro_batch, train.batch_size)
    else:
        budget = max(train.micro_batch_tokens or MICRO_BATCH_TOKENS, length * sequences)
        lengths = [length] * sequences * min(budget // (length * sequences), train.batch_size)
        rest = (budget - sum(lengths)) // sequences
        lengths += [rest] * sequences if len(lengths) < sequences_per_step and rest > 1 else []
    return MicroBatch.rows(lengths, more=len(lengths) < sequences_per_step)


def mean_micro_batch(recipe: Recipe, rows: Sequence[tuple[int, int]] = ()) -> MicroBatch:
    """Return a micro-batch of rows of the mean length. Without rows, all tokens up to the maximum are supervised."""
    prefix = rows.prefix if isinstance(rows, Rows) and len(rows) > 1 else 0
    sequences = sequences_per_row(recipe.train)
    if not rows:
        sampled, length = max_completion_tokens(recipe.train) and max_sampled_tokens(recipe), longest_sequence(recipe)
        rows = [(length, sampled or length - 1)] * recipe.train.batch_size * sequences
    train, mean = recipe.train, max(2, round(sum(tokens for tokens, _ in rows) / len(rows)))
    number = train.micro_batch or max(1, (train.micro_batch_tokens or MICRO_BATCH_TOKENS) // (mean * sequences))
    number = sequences * min(number, train.batch_size, len(rows) // sequences)
    share = sum(supervised for _, supervised in rows) / max(1, sum(tokens - 1 for tokens, _ in rows))
    step_continues = number < min(sequences * train.batch_size, len(rows))
    batch = MicroBatch.rows([mean] * number, share=share, more=step_continues)
    return _with_shared_prefix(batch, [mean] * number, prefix)


def first_steps(recipe: Recipe, rows: Rows, packed: bool, steps: int = TIMED_STEPS) -> list[list[MicroBatch]]:
    """Return the micro-batches of the first steps, as in training. packed: without padding."""
    batches = [[rows[row] for row in batch.rows] for batch in islice(_stream(recipe, rows), steps)]
    return [_split_batch(recipe, batch, rows.prefix, packed) for batch in batches]


def searched_steps(stream: BatchStream) -> int:
    """Return in how many steps the largest micro-batch is searched."""
    return min(MAX_STEPS, max(stream.steps_per_epoch, MAX_ROWS // stream.batch_size))


def _stream(recipe: Recipe, rows: Rows) -> BatchStream:
    train = recipe.train
    return BatchStream(
        len(rows), batch_size=train.batch_size, seed=recipe.seed, epochs=train.epochs, max_steps=train.max_steps
    )


def _split_batch(recipe: Recipe, rows: Sequence[tuple[int, int]], prefix: int, packed: bool) -> list[MicroBatch]:
    train, lengths = recipe.train, [tokens for tokens, _ in rows]
    budget = train.micro_batch_tokens or MICRO_BATCH_TOKENS
    if train.micro_batch is not None:
        groups = group_by_length(lengths, rows=train.micro_batch)
    else:
        groups = pack(lengths, max(budget, *lengths)) if packed else group_by_length(lengths, tokens=budget)
    return [_predict_micro_batch([rows[i] for i in group], prefix, packed, len(groups) > 1) for group in groups]


def _predict_micro_batch(
    rows: Sequence[tuple[int, int]], prefix: int, packed: bool, step_continues: bool
) -> MicroBatch:
    lengths, supervised = [tokens for tokens, _ in rows], sum(count for _, count in rows)
    if not packed:
        batch = MicroBatch.rows([max(lengths)] * len(rows), more=step_continues)
        padding = batch.tokens - sum(lengths)
        return replace(batch, supervised=supervised, shared=-padding)
    batch = MicroBatch.rows(lengths, more=step_continues)
    return _with_shared_prefix(replace(batch, supervised=supervised), lengths, prefix)


def _with_shared_prefix(batch: MicroBatch, lengths: Sequence[int], prefix: int) -> MicroBatch:
    """Return the batch with the shared prefix computed only once, if it has at least MIN_PREFIX tokens."""
    prefix = min(prefix, min(lengths) - 1) if len(lengths) > 1 else 0
    if prefix < MIN_PREFIX:
        return batch
    shared = (len(lengths) - 1) * prefix
    # (number of documents, queries and keys of each); the prefix is one document
    documents = tuple((number, tokens - prefix, tokens) for tokens, number in sorted(Counter(lengths).items()))
    return replace(batch, tokens=batch.tokens - shared, documents=((1, prefix, prefix), *documents), shared=shared)
