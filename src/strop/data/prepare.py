"""Prepare the data section of a recipe: examples on disk, and an account of every row.

Files become rows, conversations and examples in one pass with constant memory. Errors of rows are collected, and a run
that would lose more rows than the recipe allows is refused with all places.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import tempfile
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from strop.config.schema import DataSection
from strop.data import formats
from strop.data.accounting import DataReport, Selection, build_report, ends_with_stop, find_row_warnings
from strop.data.reading import sources
from strop.data.rendering import overlong
from strop.data.rendering.render import Renderer, render_pairs, render_prompts
from strop.data.row_errors import TOO_LONG, RenderError, RowError
from strop.data.store import (
    Conversations,
    ExampleGroups,
    Examples,
    Prompts,
    Store,
    Writer,
    digest,
    dump_conversation,
    load_store,
)
from strop.data.types import JUDGED, Conversation, DataKind, Example, Indices, Mask
from strop.errors import DataError, Where

STORE_VERSION = 8  # raise it when prepared data changes for the same input
OUTCOMES = ("used", "split", "truncated")  # of a row that is not dropped, from best to worst

Judgements = dict[int, tuple[str, int]]  # hash of a comparison or label -> file and line where it is first


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on. Examples and conversations are read from disk on access, in the order of the files."""

    train: Examples
    train_conversations: Conversations
    eval: Examples | None
    eval_conversations: Conversations | None
    report: DataReport
    hash: str  # changes with the template, the order of rows, the rows used and their tokens
    renderer: Renderer  # renders prompts for inference after training on these rows
    train_items: ExampleGroups | Prompts | None = None  # None if the objective learns from turns
    eval_items: ExampleGroups | Prompts | None = None


def prepare(
    data: DataSection, tokenizer: Any, *, cache: Path | None = None, strict: bool = True, data_kind: DataKind = "turns"
) -> Prepared:
    """Read, check, render and store the rows that a recipe names. tokenizer: a fast transformers tokenizer.

    cache: a folder that keeps tokenized rows by content; None: a temporary folder, deleted with the result. strict:
    raise the refusal of the report instead of only reporting it. Raises DataError, and ModelError for an unusable
    tokenizer or template.
    """
    renderer = renderer_for(data, tokenizer)
    share = _eval_share(data.eval)
    temporary = None if cache else tempfile.mkdtemp(prefix="strop-data-")
    folder = cache or Path(str(temporary))
    try:
        keyed = cache is not None
        build = partial(_build_store, data=data, renderer=renderer, folder=folder, data_kind=data_kind, keyed=keyed)
        train = build(data.train)
        eval_store = train if share else build(data.eval) if data.eval is not None else None
        prepared = _assemble(data, renderer, train, eval_store, share, data_kind)
    except BaseException:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if temporary:
        weakref.finalize(train, shutil.rmtree, temporary, ignore_errors=True)
    report = prepared.report
    refusal = report.refusal or (report.eval.refusal if report.eval else None)
    if strict and refusal:
        raise refusal
    return prepared


def renderer_for(data: DataSection, tokenizer: Any) -> Renderer:
    return Renderer(
        tokenizer, template=data.template, loss=data.loss, options=data.template_options, reasoning=data.reasoning
    )


def _assemble(
    data: DataSection, renderer: Renderer, train: Store, eval_store: Store | None, share: float | None,
    data_kind: DataKind,
) -> Prepared:  # fmt: skip
    rows: Indices = np.arange(len(train.row_records), dtype=np.int64)
    eval_rows: Indices = np.zeros(0, np.int64)
    if share:
        chosen = _choose_held_out(train.row_records, share)
        rows, eval_rows = rows[~chosen], rows[chosen]
    elif eval_store is not None:
        eval_rows = np.arange(len(eval_store.row_records), dtype=np.int64)
    train_set, conversations = _select(train, rows)
    eval_set = eval_conversations = eval_report = None
    report = build_report(data, renderer, Selection(train, train_set, rows, "training", data_kind))
    if eval_store is not None:
        eval_set, eval_conversations = _select(eval_store, eval_rows)
        selection = Selection(eval_store, eval_set, eval_rows, "evaluation", data_kind, shared=bool(share))
        eval_report = build_report(data, renderer, selection)
        overlap = {  # evaluation rows that are also training rows, and those that share a prompt with one
            name: int(np.isin(eval_store.row_records[field][eval_rows], train.row_records[field][rows]).sum())
            for name, field in (("across", "digest"), ("prompts", "prompt"))
        }
        eval_report = dataclasses.replace(eval_report, duplicates={**eval_report.duplicates, **overlap})
        across, prompts = overlap["across"], overlap["prompts"]
        warnings = [f"{across} evaluation rows are also training rows"] if across else []
        if prompts > across:
            warnings.append(f"{prompts} evaluation rows have a prompt that is also in training rows")
        report = dataclasses.replace(
            report,
            eval=eval_report,
            held_out=len(eval_rows) if share else 0,
            duplicates={**report.duplicates, **overlap},
            warnings=[*report.warnings, *warnings],
        )
    checksum = hashlib.sha256()
    for store, examples, selected in ((train, train_set, rows), (eval_store, eval_set, eval_rows)):
        if store is not None and examples is not None:
            checksum.update(store.row_records["digest"][selected].tobytes())
            checksum.update(examples.lengths.tobytes() + examples.supervised.tobytes())
    serving_renderer = renderer.for_serving(thinking=train.facts["thinking"], rows=train.facts["chats"])
    checksum.update(serving_renderer.template_hash.encode())
    items: list[ExampleGroups | Prompts | None] = [None, None]
    if data_kind != "turns" and report.refusal is None and (eval_report is None or eval_report.refusal is None):
        for i, (part, rows_of_part) in enumerate(((train_set, conversations), (eval_set, eval_conversations))):
            if part is not None and rows_of_part is not None and data_kind == "prompts":
                items[i] = Prompts(part, rows_of_part, serving_renderer)
            elif part is not None:
                items[i] = ExampleGroups(part, data_kind, data.max_length)
        checksum.update(train_set.labels.tobytes())
    return Prepared(
        train_set, conversations, eval_set, eval_conversations, report, checksum.hexdigest(), serving_renderer, *items
    )


def _select(store: Store, rows: Indices) -> tuple[Examples, Conversations]:
    indices = np.isin(store.example_records["row"], rows).nonzero()[0]
    return Examples(store, indices), Conversations(store, rows)


def _eval_share(spec: str | list[str] | None) -> float | None:
    """Return data.eval as a share of the training rows, or None if it names files. Raises DataError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", spec) if isinstance(spec, str) else None
    if match is None:
        return None
    share = float(match[1]) / 100
    if not 0 < share < 1:
        raise DataError(f"data.eval: {spec} leaves no rows on one side", fix="choose a share between 0% and 100%")
    return share


def _choose_held_out(records: npt.NDArray[Any], share: float) -> Mask:
    """Choose the held-out rows of a store as a mask of shape (n,): whole groups, at least one.

    Rows are chosen by hash, so that adding rows moves none. If all are in one group, they are chosen by their content.
    """
    chosen: Mask = np.zeros(len(records), np.bool_)
    for name in ("group", "digest") if len(records) else ():
        hashes = records[name]
        chosen = hashes < np.uint64(share * 2**64)
        if not chosen.any():
            chosen = hashes == hashes.min()
        if not chosen.all():
            break
    return chosen


# --- one pass over the files -------------------------------------------------------------------------------------


class _Reader:
    """The conversations of a spec, and the row of each: a row may give several.

    For an objective that learns from labels, a pair is two judged answers.
    """

    def __init__(self, spec: str | Sequence[str], data: DataSection, data_kind: DataKind, renderer: Renderer) -> None:
        self._renderer = renderer
        self._labels = data_kind == "labels"
        self.unreadable: list[RowError] = []
        self.invalid: list[RowError] = []
        self.left_out: Counter[str] = Counter()
        rows = sources.read_rows(
            spec, encoding=data.encoding, columns=data.columns, bad=self.unreadable, left_out=self.left_out,
            documents=data.format == formats.DOCUMENT,
        )  # fmt: skip
        self.conversations = formats.ConversationReader(
            rows, format=data.format, columns=data.columns, bad=self.invalid, answerless=data_kind == "prompts"
        )
        self.row_numbers: deque[int] = deque()  # of the conversations that the renderer has read ahead

    def __iter__(self) -> Iterator[Conversation]:
        for conversation in map(self._renderer.separate_reasoning, self.conversations):
            for part in split_pair(conversation) if self._labels else (conversation,):
                self.row_numbers.append(self.conversations.num_used)
                yield part


def _build_store(
    spec: str | Sequence[str], *, data: DataSection, renderer: Renderer, folder: Path, data_kind: DataKind, keyed: bool
) -> Store:
    """Read and render the rows of `spec` into a store in `folder`. keyed: use a store that is already there."""
    place = folder / (_cache_key(spec, data, renderer, data_kind) if keyed else f"rows-{len(list(folder.iterdir()))}")
    if keyed and (store := load_store(place)):
        return store
    writer = Writer(place)
    try:
        reader = _Reader(spec, data, data_kind, renderer)
        return writer.commit(_write_rows(writer, reader, data, renderer, data_kind))
    finally:
        writer.discard()


def _write_rows(
    writer: Writer, reader: _Reader, data: DataSection, renderer: Renderer, data_kind: DataKind
) -> dict[str, Any]:
    """Write every row with all its conversations, or record why it is dropped. Return the facts of the pass."""
    errors: list[RowError] = []
    outcomes: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    cut: list[tuple[str, str, int | None, str]] = []  # how, file, line, lengths
    first_place: dict[str, str] = {}  # note -> where it was first found, with an example
    stops = longest = chats = thinking = 0
    judgements: Judgements = {}
    render = renderer.render_many
    if data_kind in ("pairs", "prompts"):
        render = partial(render_pairs if data_kind == "pairs" else render_prompts, renderer)
    for _, row in groupby(render(reader), lambda _: reader.row_numbers.popleft()):
        kept: list[tuple[str, Conversation, list[Example], list[Example] | RenderError]] = []
        row_notes: dict[str, str] = {}
        row_error: RowError | None = None  # the first error; nothing of the row is then used
        for conversation, rendered in row:
            for note, example in find_row_warnings(conversation, rendered, renderer, data_kind):
                row_notes.setdefault(note, f"first {conversation.file}:{conversation.line}{example}")
            if not isinstance(rendered, RenderError):
                longest = max(longest, *map(len, rendered))
            outcome, examples, error = decide_outcome(conversation, rendered, data, renderer, data_kind)
            row_error = row_error or error
            kept.append((outcome, conversation, examples, rendered))
        notes.update(row_notes.keys())
        first_place = {**row_notes, **first_place}
        if row_error is None and data_kind in JUDGED:
            checks = (_check_contradiction(conversation, examples, judgements) for _, conversation, examples, _ in kept)
            row_error = next(filter(None, checks), None)
        if row_error is not None:
            outcomes["dropped"] += 1
            errors.append(row_error)
            continue
        outcomes[max((outcome for outcome, *_ in kept), key=OUTCOMES.index)] += 1
        group: int | None = None  # decides whether the row is held out: a hash of its prompt or its first conversation
        for outcome, conversation, examples, rendered in kept:
            if outcome in ("truncated", "split") and not isinstance(rendered, RenderError):
                lengths = " + ".join(str(len(example)) for example in examples)
                what = f"{sum(map(len, rendered))} tokens, now {lengths}"
                cut.append((outcome, conversation.file, conversation.line, what))
            prompt = digest(dump_conversation(conversation.prompt))
            group = writer.add(conversation, examples, prompt, prompt if data_kind in JUDGED else group)
            chats += conversation.text is None
            thinking += conversation.text is None and renderer.chat.shows_reasoning(conversation.messages)
            final = examples if data_kind == "pairs" else examples[-1:]
            stops += data_kind != "prompts" and all(ends_with_stop(example, renderer) for example in final)
    errors = [*reader.unreadable, *reader.invalid, *errors]
    outcomes["dropped"] += len(reader.unreadable) + len(reader.invalid)
    file_order = {name: i for i, name in enumerate(dict.fromkeys(error.where.file for error in errors))}
    errors.sort(key=lambda error: (file_order[error.where.file], error.where.line or 0))
    return {
        "read": reader.conversations.num_rows + len(reader.unreadable),
        "outcomes": dict(outcomes),
        "faults": [(error.code, error.where.file, error.where.line, error.where.what) for error in errors],
        "cut": cut,
        "notes": [(note, count, first_place[note]) for note, count in notes.most_common()],
        "unused": dict(reader.conversations.unused),
        "left_out": dict(reader.left_out),
        "formats": reader.conversations.formats,
        "longest": longest,
        "chats": chats,
        "thinking": thinking,
        "stops": stops,
    }


def decide_outcome(
    conversation: Conversation, rendered: list[Example] | RenderError, data: DataSection, renderer: Renderer,
    data_kind: DataKind,
) -> tuple[str, list[Example], RowError | None]:  # fmt: skip
    """Apply data.overlong: return the outcome of one conversation, its examples, and why it has none."""
    if data_kind == "labels" and not isinstance(rendered, RenderError) and len(rendered) != 1:
        rendered = RenderError("answer-in-parts")
    if isinstance(rendered, RenderError):
        return "dropped", [], _row_error(conversation, rendered.code, rendered.what)
    limit = data.max_length
    if not overlong.is_too_long(rendered, limit):
        return "used", rendered, None
    shorter: list[Example] | None = None
    try:
        if data.overlong == "truncate-start" and data_kind == "pairs":
            shorter = overlong.truncate_pair(renderer, conversation, limit)
        elif data.overlong == "truncate-start":
            shorter = overlong.truncate_start(renderer, conversation, rendered, limit)
        elif data.overlong == "split":
            shorter = overlong.split(renderer, conversation, rendered, limit)
    except RenderError as error:
        return "dropped", [], _row_error(conversation, error.code, error.what)
    if shorter is None:
        length = max(map(len, rendered))
        return "dropped", [], _row_error(conversation, TOO_LONG, f"{length} tokens, data.max_length is {limit}")
    return ("truncated" if data.overlong == "truncate-start" else "split"), shorter, None


def find_contradiction(
    conversation: Conversation, examples: Sequence[Example], judgements: Judgements
) -> tuple[str, int] | None:
    """Return the place of the opposite judgement of the same answers; if there is none, record this judgement."""
    ids = [example.ids.tobytes() for example in examples]
    if conversation.rejected:
        prompt = examples[0].prompt_length.to_bytes(8, "little")
        judgement, opposite = (prompt + b"<".join(sides) for sides in (ids, ids[::-1]))
    else:
        labels = (conversation.desirable, not conversation.desirable)
        judgement, opposite = (ids[0] + (b"+" if good else b"-") for good in labels)
    place = judgements.get(digest(opposite))
    if place is None:
        judgements.setdefault(digest(judgement), (conversation.file, conversation.line))
    return place


def split_pair(conversation: Conversation) -> tuple[Conversation, ...]:
    """Return a pair as two labelled answers."""
    if not conversation.rejected:
        return (conversation,)
    chosen, rejected = conversation.sides
    return dataclasses.replace(chosen, desirable=True), dataclasses.replace(rejected, desirable=False)


def _check_contradiction(
    conversation: Conversation, examples: Sequence[Example], judgements: Judgements
) -> RowError | None:
    place = find_contradiction(conversation, examples, judgements)
    if place is None:
        return None
    same_row = place == (conversation.file, conversation.line)
    what = "pairs of this row contradict each other" if same_row else "contradicts {}:{}".format(*place)
    return _row_error(conversation, "contradiction", what)


def _row_error(conversation: Conversation, code: str, what: str) -> RowError:
    return RowError(code, Where(conversation.file, conversation.line, what))


def _cache_key(spec: str | Sequence[str], data: DataSection, renderer: Renderer, data_kind: DataKind) -> str:
    """Return a hash of everything that determines the store: rows, tokenizer, template and options."""
    key = hashlib.sha256()
    for source in sources.resolve(spec):
        key.update(json.dumps([source.path, source.weight, len(source.files)]).encode())
        for name in source.files:
            checksum = hashlib.sha256()
            with open(name, "rb") as file:
                while block := file.read(1 << 20):
                    checksum.update(block)
            key.update(checksum.digest())
    options = data.model_dump(include={"format", "columns", "max_length", "overlong", "loss", "encoding"})
    key.update(json.dumps([STORE_VERSION, options, renderer.fingerprint, data_kind], sort_keys=True).encode())
    return key.hexdigest()[:32]
