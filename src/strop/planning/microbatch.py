"""Measure the rows of a recipe and predict its micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import islice
from typing import Any

from strop.config.names import full_name
from strop.config.schema import Recipe
from strop.data.batching import BatchStream, group_by_length, pack
from strop.data.prefixes import group_by_prefix
from strop.data.reading.sources import needs_download
from strop.data.rendering.image_encoder import image_encoder
from strop.data.types import Example, Ids
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
from strop.planning.activations import MAX_SAVED_KEYS, MicroBatch, peak_live_bytes
from strop.planning.images import ImageLoad
from strop.planning.keep import KEPT_ROW, why_not_kept
from strop.planning.workload import Workload

MICRO_BATCH_TOKENS = 2048
TIMED_STEPS = 32  # number of steps from which the time of a run is predicted
MAX_STEPS = 20_000  # maximum number of steps in which the largest micro-batch is searched
MAX_ROWS = 50_000  # minimum number of rows in which it is searched, over several epochs if there are fewer
SAMPLED_ROWS = 2000  # number of rows in which shared prefixes are searched
NO_DATA = "-"  # data.train of a plan without data
NO_PREFIX = (-1, 0)


class Rows(list[tuple[int, int]]):
    """The tokens and supervised tokens of each sequence."""

    prefixes: Sequence[tuple[int, int]] = ()  # that each row shares with others: number and length, or NO_PREFIX
    rows = 0  # number of rows, if they differ in their number of sequences
    unknown = ""  # why the rows cannot be read
    refused: StropError | None = None  # why a run would reject them
    held_out: Sequence[tuple[int, int]] = ()  # of the sequences that are evaluated
    num_held_out = 0  # rows that are evaluated
    labels: Sequence[str] = ()  # of texts to classify
    warnings: Sequence[str] = ()  # of `strop check`
    images: ImageLoad | None = None
    why_not_kept = ""  # why train.keep auto leaves general prompts out

    def cut(self, longest: int) -> Rows:
        """Return the rows with at most `longest` tokens."""
        if all(tokens <= longest for tokens, _ in self):
            return self
        rows = Rows((min(tokens, longest), min(supervised, longest - 1)) for tokens, supervised in self)
        rows.rows = self.rows
        return rows


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
    rows = prepared.train
    sizes.refused = prepared.refusal
    held_out = prepared.report.eval
    sizes.warnings = [*prepared.report.warnings, *(held_out.warnings if held_out else ())]
    if held_out is not None:
        sizes.num_held_out = sum(held_out.rows[outcome] for outcome in ("used", "truncated", "split"))
    sizes.labels = prepared.classes.names if prepared.classes else ()
    if sampled := max_completion_tokens(recipe.train):
        whole = recipe.data.max_length if recipe.train.environment is not None else None
        pairs = [(whole or int(length) + sampled, max_sampled_tokens(recipe, int(length))) for length in rows.lengths]
        sizes += [pair for pair in pairs for _ in range(sequences_per_row(recipe.train))]
        return sizes
    if (held_out_rows := prepared.eval) is not None:
        sizes.held_out = list(zip(held_out_rows.lengths.tolist(), held_out_rows.supervised.tolist(), strict=True))
    sizes.rows = len(prepared.train_items or ()) if data_kind == "triplets" else 0
    find_prefix, prefixes = None, list[tuple[int, int]]()
    if data_kind == "turns" and len(rows):
        find_prefix = _prefix_finder(rows, recipe.train.batch_size)
    for example in rows:
        sizes.append((len(example), example.supervised))
        if find_prefix is not None:
            prefixes.append(find_prefix(example.ids))
    sizes.prefixes = prefixes
    sizes.why_not_kept = why_not_kept(prepared) if data_kind == "turns" else ""
    return sizes


def with_kept_rows(sizes: Rows, recipe: Recipe) -> Rows:
    """Return the rows with those of train.keep, of the size that they usually have."""
    if not (share := recipe.train.keep_share):
        return sizes
    tokens = sum(length for length, _ in sizes) * share / (1 - share)
    parts = sequences_per_row(recipe.train)
    joined = copy(sizes)
    joined += [(KEPT_ROW[0] // parts, KEPT_ROW[1] // parts)] * (parts * round(tokens / KEPT_ROW[0]))
    joined.prefixes = [*sizes.prefixes, *[NO_PREFIX] * (len(joined) - len(sizes))] if sizes.prefixes else ()
    return joined


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


def _prefix_finder(rows: Sequence[Example], batch_size: int) -> Callable[[Ids], tuple[int, int]]:
    """Return a function that returns the prefix that a row shares with others in its batch, as in Rows.prefixes."""
    sample = [rows[i].ids for i in range(0, len(rows), -(-len(rows) // SAMPLED_ROWS))]
    groups = group_by_prefix(sample, [len(ids) - 1 for ids in sample], min(1.0, batch_size / len(sample)))
    shared = [(number, sample[group.rows[0]][: group.prefix]) for number, group in enumerate(groups) if group.prefix]
    shared.sort(key=lambda prefix: -len(prefix[1]))  # a row has the longest one that it begins with

    def find(ids: Ids) -> tuple[int, int]:
        found = ((number, len(x)) for number, x in shared if len(x) < len(ids) and (ids[: len(x)] == x).all())
        return next(found, NO_PREFIX)

    return find


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
    prefixes = rows.prefixes if isinstance(rows, Rows) else ()
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
    sample = [prefixes[i * len(prefixes) // number] for i in range(number)] if prefixes else ()
    sample = [(group, min(length, mean - 1)) for group, length in sample]
    return _with_shared_prefixes(batch, [mean] * number, sample)


def first_steps(recipe: Recipe, rows: Rows, packed: bool, steps: int = TIMED_STEPS) -> list[list[MicroBatch]]:
    """Return the micro-batches of the first steps, as in training. packed: without padding."""
    batches = [batch.rows for batch in islice(_stream(recipe, rows), steps)]
    return [_split_batch(recipe, rows, batch, packed) for batch in batches]


def first_steps_of(recipe: Recipe, examples: Sequence[Example], packed: bool) -> list[list[MicroBatch]]:
    """Return `first_steps` of the rows that a run trains on, so that it plans its time as `strop plan` does."""
    rows, find_prefix = Rows([(0, 0)] * len(examples)), _prefix_finder(examples, recipe.train.batch_size)
    prefixes = [NO_PREFIX] * len(examples)
    for row in {row for batch in islice(_stream(recipe, rows), TIMED_STEPS) for row in batch.rows}:
        example = examples[row]
        rows[row], prefixes[row] = (len(example), example.supervised), find_prefix(example.ids)
    rows.prefixes = prefixes
    return first_steps(recipe, rows, packed)


def searched_steps(stream: BatchStream) -> int:
    """Return in how many steps the largest micro-batch is searched."""
    return min(MAX_STEPS, max(stream.steps_per_epoch, MAX_ROWS // stream.batch_size))


def _stream(recipe: Recipe, rows: Rows) -> BatchStream:
    train = recipe.train
    return BatchStream(
        len(rows), batch_size=train.batch_size, seed=recipe.seed, epochs=train.epochs, max_steps=train.max_steps
    )


def _split_batch(recipe: Recipe, rows: Rows, batch: Sequence[int], packed: bool) -> list[MicroBatch]:
    train, lengths = recipe.train, [rows[i][0] for i in batch]
    budget = train.micro_batch_tokens or MICRO_BATCH_TOKENS
    if train.micro_batch is not None:
        groups = group_by_length(lengths, rows=train.micro_batch)
    else:
        groups = pack(lengths, max(budget, *lengths)) if packed else group_by_length(lengths, tokens=budget)
    return [_predict_micro_batch(rows, [batch[i] for i in group], packed, len(groups) > 1) for group in groups]


def _predict_micro_batch(rows: Rows, indices: Sequence[int], packed: bool, step_continues: bool) -> MicroBatch:
    lengths, supervised = [rows[i][0] for i in indices], sum(rows[i][1] for i in indices)
    if not packed:
        batch = MicroBatch.rows([max(lengths)] * len(lengths), more=step_continues)
        padding = batch.tokens - sum(lengths)
        return replace(batch, supervised=supervised, shared=-padding)
    batch = replace(MicroBatch.rows(lengths, more=step_continues), supervised=supervised)
    return _with_shared_prefixes(batch, lengths, [rows.prefixes[i] for i in indices] if rows.prefixes else ())


def _with_shared_prefixes(batch: MicroBatch, lengths: Sequence[int], prefixes: Sequence[tuple[int, int]]) -> MicroBatch:
    """Return the batch with each prefix that several rows share computed once. prefixes: as in Rows, or none."""
    numbers = {prefix: number for prefix, number in Counter(prefixes).items() if prefix[1] and number > 1}
    if not numbers:
        return batch
    documents = Counter((prefix, prefix) for _, prefix in numbers)  # (queries, keys): a prefix is one document
    shared = sum((number - 1) * prefix for (_, prefix), number in numbers.items())
    for tokens, prefix in sorted(zip(lengths, prefixes, strict=True)):
        own = tokens - prefix[1] if prefix in numbers else tokens
        documents[own, tokens] += 1
    return replace(
        batch, tokens=batch.tokens - shared, prefixes=len(numbers), shared=shared,
        documents=tuple((number, *document) for document, number in documents.items()),
    )  # fmt: skip
