"""Prepare the data that a recipe names: write examples to disk, and report the outcome of every row.

Files are read, converted and rendered in one pass with constant memory. Errors of rows are collected, and raised as one
DataError if the recipe does not allow them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from strop.config.schema import DataSection
from strop.data import formats
from strop.data.accounting import (
    DataReport,
    Selection,
    build_report,
    count_stops,
    ends_with_stop,
    find_row_warnings,
    first_copies,
)
from strop.data.answers import Answers, NoAnswer, complete, key_of, lacks_answer, write_answers
from strop.data.reading import sources
from strop.data.rendering import overlong
from strop.data.rendering.render import Renderer, render_labelled, render_pairs, render_prompts, render_triplets
from strop.data.rendering.template_source import CHATML, template_source
from strop.data.row_errors import (
    ANSWER_TOO_LONG,
    HAS_IMAGES,
    IMAGE_FILE_REASONS,
    LENGTH_REASONS,
    TOO_LONG,
    RenderError,
    RowError,
)
from strop.data.store import (
    Conversations,
    ExampleGroups,
    Examples,
    JoinedItems,
    LabelledTexts,
    LazySequence,
    Prompts,
    Store,
    Triplets,
    Writer,
    digest,
    dump_conversation,
    load_store,
    read_facts,
)
from strop.data.types import (
    PREFERENCE_KINDS,
    RENDERED_PROMPTS,
    TEXT_KINDS,
    Classes,
    Conversation,
    DataKind,
    Example,
    Indices,
    Mask,
    Row,
    label_names,
)
from strop.errors import DataError, Location
from strop.runs.lock import sha256_file

STORE_VERSION = 8  # increment it when prepared data changes for the same input
EARLY_ROWS = 1000  # rows that are read before the libraries load
OUTCOMES = ("used", "split", "truncated")  # outcomes of a row that is not dropped, from best to worst
JUDGED_KINDS = (*PREFERENCE_KINDS, *TEXT_KINDS)  # kinds of data whose rows may contradict each other
RENDER = {  # others: Renderer.render_many
    "pairs": render_pairs, "prompts": render_prompts, "classes": render_labelled, "triplets": render_triplets,
}  # fmt: skip

_ANSWERED = {"prompt": "prompt-completion"}  # format without an answer -> with it

Groups = ExampleGroups | Prompts | LabelledTexts | Triplets
Judgements = dict[int, tuple[str, int]]  # hash of a comparison or label -> file and line of its first occurrence


@dataclass(frozen=True)
class Prepared:
    """Data to train on. Examples and conversations are in the order of the files, and are read from disk on access."""

    train: Examples
    train_conversations: Conversations
    eval: Examples | None
    eval_conversations: Conversations | None
    report: DataReport
    hash: str  # hash of the rows used, their order and lengths, and the template; without rows of train.keep
    renderer: Renderer  # for prompts at inference after training on these rows
    # None for supervised fine-tuning without train.keep and train.teacher
    train_items: Groups | JoinedItems | LazySequence[Example] | None = None
    eval_items: Groups | None = None
    classes: Classes | None = None  # of texts to classify
    kept_hash: str | None = field(default=None, kw_only=True)  # hash of the rows of train.keep and their labels
    answers: Answers = field(default_factory=dict, kw_only=True)  # of a teacher, to rows without one
    pending: Mapping[Path, bytes] = field(default_factory=dict, kw_only=True)  # files to write when the run is resumed
    teacher_hash: str | None = field(default=None, kw_only=True)  # hash of the answers and the teacher's probabilities

    @property
    def refusal(self) -> DataError | None:
        """Return the error that a run would raise for these rows."""
        return self.report.refusal or (self.report.eval.refusal if self.report.eval else None)


def prepare(
    data: DataSection, tokenizer: Any, *, cache: Path | None = None, strict: bool = True,
    data_kind: DataKind = "turns", new_tokens: Sequence[str] = (), labels: Sequence[str] | None = None,
    answers: Answers | None = None, options: Mapping[str, Any] | None = None,
) -> Prepared:  # fmt: skip
    """Read, check, render and store the rows that a recipe names.

    tokenizer: a fast transformers tokenizer, to which `new_tokens` (lora.new_tokens) are added. cache: a folder where
    tokenized rows are kept and reused; by default, a temporary folder that is deleted with the result. strict: raise
    the error that a run would raise instead of only reporting it. labels: the classes of texts (train.labels), by
    default those of the training rows. answers: a teacher's answers to training rows without one, which otherwise
    have errors. options: see `build_report`. Raises DataError, and ModelError for an unusable tokenizer or template.
    """
    add_tokens(tokenizer, new_tokens, data.template)
    renderer = renderer_for(data, tokenizer)
    share = sources.read_eval_share(data.eval)
    folder = cache or Path(tempfile.mkdtemp(prefix="strop-data-"))
    try:
        build = partial(
            _build_store, data=data, renderer=renderer, folder=folder, data_kind=data_kind, use_cache=cache is not None
        )
        checker = LabelChecker(labels) if data_kind == "classes" else None
        train = build(data.train, checker=checker, answers=answers)
        classes = None if checker is None else _find_classes(train, labels)
        checker = None if classes is None else LabelChecker(classes.names, classes.several)
        eval_store = train if share else None
        if data.eval is not None and not share:
            eval_store = build(sources.cap_weights(data.eval), checker=checker)
        prepared = _assemble(data, renderer, train, eval_store, share, data_kind, classes, options)
        prepared.report.warnings.extend(_find_unused_tokens(prepared.train, tokenizer, new_tokens))
    except BaseException:
        if cache is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if cache is None:
        weakref.finalize(train, shutil.rmtree, folder, ignore_errors=True)
    if strict and prepared.refusal:
        raise prepared.refusal
    return prepared


def need_template(data: DataSection, data_kind: DataKind) -> bool:
    """Return whether the first row is a conversation, which needs a chat template. Errors are left to `prepare`."""
    with contextlib.suppress(DataError):
        _, conversations = _open_rows(data.train, data, data_kind, [], [])
        return any(conversation.text is None for conversation in islice(conversations, 1))
    return False


def has_bad_rows(data: DataSection, data_kind: DataKind) -> bool:
    """Return whether one of the first rows of local files cannot be read or converted. This needs no tokenizer."""
    errors: list[RowError] = []
    files = [data.train] if isinstance(data.train, str) else data.train
    if not any(map(sources.needs_download, files)):
        _, conversations = _open_rows(data.train, data, data_kind, errors, errors)
        deque(islice(conversations, EARLY_ROWS), maxlen=0)
    return bool(errors)


def list_unanswered(data: DataSection) -> list[Conversation]:
    """Return the different conversations of the training rows that have no answer. Errors are left to `prepare`."""
    _, conversations = _open_rows(data.train, data, "prompts", [], [])
    with contextlib.suppress(DataError):
        return list({key_of(row): row for row in conversations if lacks_answer(row)}.values())
    return []


def _open_rows(
    spec: str | Sequence[str], data: DataSection, data_kind: DataKind, unreadable: list[RowError],
    invalid: list[RowError], left_out: Counter[str] | None = None,
) -> tuple[Iterator[Row], formats.ConversationReader]:  # fmt: skip
    """Return the rows of a spec, and the reader that converts them. unreadable, invalid: receive the errors of rows."""
    rows = sources.read_rows(
        spec, encoding=data.encoding, columns=data.columns, errors=unreadable, left_out=left_out,
        documents=data.format == formats.DOCUMENT,
    )  # fmt: skip
    return rows, formats.ConversationReader(
        rows, format=data.format, columns=data.columns, errors=invalid, data_kind=data_kind,
        image_folder=data.image_folder,
    )  # fmt: skip


def add_tokens(tokenizer: Any, tokens: Sequence[str], template: str | None = None) -> None:
    """Add tokens to a tokenizer. Those that the chat template (data.template) writes are special.

    Text of rows and prompts cannot contain special tokens, and they are left out of generated text.
    """
    from transformers import AddedToken

    new = [token for token in tokens if token not in tokenizer.added_tokens_encoder]
    source = CHATML + "<|im_end|>" if template == "chatml" else (template_source(tokenizer, template) if new else "")
    is_special = {token: token in (source or "") for token in new}
    tokenizer.add_tokens([AddedToken(token, special=is_special[token], normalized=False) for token in new])


def _find_unused_tokens(examples: Examples, tokenizer: Any, tokens: Sequence[str]) -> Iterator[str]:
    """Yield a warning for each token that no example contains."""
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    used = set().union(*(np.intersect1d(example.ids, ids).tolist() for example in examples)) if tokens else set()
    for token in (token for token, id in zip(tokens, ids, strict=True) if len(examples) and id not in used):
        yield f"lora.new_tokens: {token} occurs in 0 of {len(examples):,} training rows, so the model does not learn it"


def renderer_for(data: DataSection, tokenizer: Any) -> Renderer:
    return Renderer(
        tokenizer, template=data.template, loss=data.loss, options=data.template_options, reasoning=data.reasoning
    )


def _assemble(
    data: DataSection, renderer: Renderer, train: Store, eval_store: Store | None, share: float | None,
    data_kind: DataKind, classes: Classes | None, options: Mapping[str, Any] | None,
) -> Prepared:  # fmt: skip
    rows: Indices = np.arange(len(train.row_records), dtype=np.int64)
    eval_rows: Indices = np.arange(len(eval_store.row_records) if eval_store else 0, dtype=np.int64)
    held_out: Indices | None = None
    if share:
        is_held_out = _choose_held_out(train.row_records, share)
        rows, held_out = rows[~is_held_out], rows[is_held_out]
        eval_rows = held_out[first_copies(train.row_records[held_out])]
    training = _select(train, rows, "training", data_kind, classes)
    evaluation = None
    report = build_report(data, renderer, training, options)
    if eval_store is not None:
        evaluation = _select(eval_store, eval_rows, "evaluation", data_kind, classes, held_out)
        report = _add_evaluation(report, build_report(data, renderer, evaluation), training, evaluation, renderer)
    serving_renderer = renderer.for_serving(thinking=train.facts["thinking"], rows=train.facts["chats"])
    checksum = hashlib.sha256()
    items: list[Groups | None] = []
    for selection in (training, evaluation):
        if selection is None or data_kind == "turns" or report.would_refuse:
            items.append(None)
        elif data_kind == "prompts":
            items.append(Prompts(selection.examples, selection.conversations, serving_renderer))
        elif data_kind == "triplets":
            items.append(Triplets(selection.examples))
        elif classes is not None:
            items.append(LabelledTexts(selection.examples, selection.store.labels, classes))
        else:
            items.append(ExampleGroups(selection.examples, data_kind, data.max_length))
        if selection is not None:
            checksum.update(selection.store.row_records["digest"][selection.rows].tobytes())
            checksum.update(selection.examples.lengths.tobytes() + selection.examples.supervised.tobytes())
    checksum.update(serving_renderer.template_hash.encode())
    if items[0] is not None:
        checksum.update(training.examples.labels.tobytes())
    return Prepared(
        training.examples,
        training.conversations,
        evaluation.examples if evaluation else None,
        evaluation.conversations if evaluation else None,
        report,
        checksum.hexdigest(),
        serving_renderer,
        items[0],
        items[1],
        classes,
    )


def _find_classes(train: Store, labels: Sequence[str] | None) -> Classes:
    """Return the given classes, or those of the training rows: integers by number, else in alphabetical order."""
    several = any(not isinstance(label, str) for label in train.labels)
    if labels is not None:
        return Classes(tuple(labels), several)
    names = {name for label in train.labels for name in label_names(label)}
    are_numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return Classes(tuple(sorted(names, key=int if are_numbers else str)), several)


def _select(
    store: Store,
    rows: Indices,
    role: Literal["training", "evaluation"],
    data_kind: DataKind,
    classes: Classes | None,
    held_out: Indices | None = None,
) -> Selection:
    indices = np.isin(store.example_records["row"], rows).nonzero()[0]
    examples, conversations = Examples(store, indices), Conversations(store, rows)
    return Selection(store, examples, conversations, rows, role, data_kind, held_out, classes)


def _add_evaluation(
    report: DataReport, eval_report: DataReport, training: Selection, evaluation: Selection, renderer: Renderer
) -> DataReport:
    """Return the report on the training rows with that on the evaluation rows, and their overlap in both."""
    known_texts = list[str]()
    if evaluation.data_kind == "triplets":
        known, texts = ({text for row in part.conversations for text in row.texts} for part in (training, evaluation))
        if texts & known:
            known_texts = [f"{len(texts & known):,} of {len(texts):,} evaluation texts are also training texts"]
    across, prompts = (
        int(np.isin(evaluation.records[name], training.records[name]).sum()) for name in ("digest", "prompt")
    )
    overlap = {"across": across, "prompts": prompts}
    also = "row is also a training row" if across == 1 else "rows are also training rows"
    warnings = [*([f"{across} evaluation {also}"] if across else []), *known_texts]
    if prompts > across:
        have = "row has" if prompts == 1 else "rows have"
        warnings.append(f"{prompts} evaluation {have} a prompt that is also in training rows")
    stop_token = report.stop_token
    if evaluation.held_out is not None:  # these rows are counted in their own report
        num_stops = stop_token["rows"] - count_stops(evaluation, evaluation.held_out, renderer)
        stop_token = {"rows": num_stops, "share": num_stops / max(1, len(training.rows))}
    return replace(
        report,
        stop_token=stop_token,
        eval=replace(eval_report, duplicates={**eval_report.duplicates, **overlap}),
        held_out=0 if evaluation.held_out is None else len(evaluation.held_out),
        duplicates={**report.duplicates, **overlap},
        warnings=[*report.warnings, *warnings],
    )


def _choose_held_out(records: npt.NDArray[Any], share: float) -> Mask:
    """Return which rows of a store are held out, as a mask of shape (n,): whole groups, at least one.

    Rows are chosen by hash, so that adding rows does not move others. If there is only one group, it is split.
    """
    is_held_out: Mask = np.zeros(len(records), np.bool_)
    for name in ("group", "digest") if len(records) else ():
        hashes = records[name]
        is_held_out = hashes < np.uint64(share * 2**64)
        if not is_held_out.any():
            is_held_out = hashes == hashes.min()
        if not is_held_out.all():
            break
    return is_held_out


class _Reader:
    """Iterate over the conversations of a spec, with the number of the row of each: a row may have several.

    For objectives that learn from labels, a pair becomes two labelled answers.
    """

    def __init__(
        self, spec: str | Sequence[str], data: DataSection, data_kind: DataKind, renderer: Renderer,
        answers: Answers | None = None,
    ) -> None:  # fmt: skip
        self._renderer, self._answers = renderer, answers
        self._split_pairs = data_kind == "labels"
        self.unreadable: list[RowError] = []
        self.invalid: list[RowError] = []
        self.left_out: Counter[str] = Counter()
        kind: DataKind = data_kind if answers is None else "prompts"
        self._rows, self.conversations = _open_rows(spec, data, kind, self.unreadable, self.invalid, self.left_out)
        self.row_numbers: deque[int] = deque()  # of conversations read but not yet rendered

    def __iter__(self) -> Iterator[Conversation]:
        try:
            for conversation in map(self._renderer.separate_reasoning, self._complete()):
                for part in split_pair(conversation) if self._split_pairs else (conversation,):
                    self.row_numbers.append(self.conversations.num_used)
                    yield part
        except DataError as error:  # about the rows' formats: lines that cannot be read may be the cause
            deque(self._rows, maxlen=0)
            files = {location.file for location in error.where}
            if unreadable := [row_error.where for row_error in self.unreadable if row_error.where.file in files]:
                error.where = (*unreadable, *error.where)
                error.fix = f"first fix the lines that cannot be read; {error.fix}"
            raise

    def _complete(self) -> Iterator[Conversation]:
        """Yield the conversations with the teacher's answers. Those that it has not answered are invalid."""
        for conversation in self.conversations:
            completed = conversation if self._answers is None else complete(conversation, self._answers)
            if isinstance(completed, NoAnswer):
                self.invalid.append(_row_error(conversation, "no-teacher-answer", completed.why))
            else:
                yield completed

    @property
    def formats(self) -> dict[str, str]:
        """The format of each file, with the teacher's answers."""
        names = self.conversations.formats
        return names if self._answers is None else {file: _ANSWERED.get(name, name) for file, name in names.items()}


class LabelChecker:
    """Check the labels of texts to classify.

    names: the known labels; None if all are. several: whether texts have lists of labels; by default as the first one.
    """

    def __init__(self, names: Sequence[str] | None, several: bool | None = None) -> None:
        self.key = (None if names is None else list(names), several)
        self._names = names
        self._classes = None if several is None else Classes(tuple(names or ()), several)

    def check(self, conversation: Conversation) -> RowError | None:
        label = conversation.label
        if label is None:  # of a file with other rows, which is refused
            return None
        if self._classes is None:
            self._classes = Classes(tuple(self._names or ()), not isinstance(label, str))
        known = self._classes if self._names is not None else replace(self._classes, names=label_names(label))
        what = known.find_error(label)
        code = "bad-label" if isinstance(label, str) == known.several else "unknown-label"
        return None if what is None else _row_error(conversation, code, what)


def _build_store(
    spec: str | Sequence[str], *, data: DataSection, renderer: Renderer, folder: Path, data_kind: DataKind,
    use_cache: bool, checker: LabelChecker | None = None, answers: Answers | None = None,
) -> Store:  # fmt: skip
    """Read and render the rows of `spec` into a store in `folder`. use_cache: reuse a store of the same rows."""
    key = (data_kind, *([checker.key] if checker else []), *([] if answers is None else [write_answers(answers)]))
    name = _cache_key(spec, data, renderer, key) if use_cache else f"rows-{len(list(folder.iterdir()))}"
    images = renderer.image_table
    if use_cache and images is not None:
        _remove_changed(folder / name)
    if use_cache and (store := load_store(folder / name, images)):
        if data.format != "auto" or data.columns or not store.facts["unused"].keys() & formats.NEWLY_READ:
            return store
        name += "-1"  # stores of version 0.1 lack the text of these columns
        if store := load_store(folder / name, images):
            return store
    writer = Writer(folder / name)
    try:
        reader = _Reader(spec, data, data_kind, renderer, answers)
        return writer.commit(_write_rows(writer, reader, data, renderer, data_kind, checker), images)
    finally:
        writer.discard()


def _remove_changed(folder: Path) -> None:
    """Remove a store if one of its images has changed, or could not be read: its rows are prepared again."""
    try:
        facts = read_facts(folder)
        failed = any(code in IMAGE_FILE_REASONS for code, *_ in facts["faults"])
        changed = failed or any(_has_changed(path, digest_) for digest_, path, *_ in facts.get("images") or ())
    except (OSError, ValueError, KeyError, TypeError):  # there is no store, or `load_store` refuses it
        return
    if changed:
        shutil.rmtree(folder)


def _has_changed(path: str, digest: str) -> bool:
    """Return whether the file of an image is not the same. Those in the cache are named after their hash."""
    try:
        return not os.path.isfile(path) or (os.path.basename(path) != digest and sha256_file(Path(path)) != digest)
    except OSError:
        return True


def _write_rows(
    writer: Writer, reader: _Reader, data: DataSection, renderer: Renderer, data_kind: DataKind,
    checker: LabelChecker | None,
) -> dict[str, Any]:  # fmt: skip
    """Write every row with all its conversations, or record why it is dropped.

    Returns the content of facts.json: "read": number of rows; "outcomes": number of rows by outcome; "faults": errors
    of dropped rows; "cut": shortened rows; "notes": warnings (text, number of rows, first row); "unused": columns that
    were not read; "left_out": rows not used because of a source's weight; "formats", "unlabelled", "chosen": by file;
    "longest", "longest_dropped": tokens of the longest example, of all and of rows that are too long; "chats":
    conversations, "thinking": those with reasoning, "without_system": those without a system prompt, "stops":
    those that end with a stop token.
    """
    errors: list[RowError] = []
    outcomes: Counter[str] = Counter()
    warnings: Counter[str] = Counter()  # number of rows with each warning
    first_examples: dict[str, str] = {}  # warning -> location and excerpt of the first row with it
    shortened: list[tuple[str, str, int | None, str]] = []  # outcome, file, line, lengths
    stops = longest = longest_dropped = chats = thinking = without_system = 0
    judgements: Judgements = {}
    render = RENDER.get(data_kind, Renderer.render_many)
    for _, row in groupby(render(renderer, reader), lambda _: reader.row_numbers.popleft()):
        results: list[tuple[str, Conversation, list[Example], int]] = []
        row_warnings: dict[str, str] = {}
        row_longest = 0
        row_error: RowError | None = None  # the first error of a conversation, which drops the whole row
        for conversation, rendered in row:
            for warning, excerpt in find_row_warnings(conversation, rendered, renderer, data_kind):
                row_warnings.setdefault(warning, f"first {conversation.place}{excerpt}")
            lengths = [] if isinstance(rendered, RenderError) else [*map(len, rendered)]
            longest, row_longest = max([longest, *lengths]), max([row_longest, *lengths])
            outcome, examples, error = decide_outcome(conversation, rendered, data, renderer, data_kind)
            row_error = row_error or error
            results.append((outcome, conversation, examples, sum(lengths)))
        warnings.update(row_warnings.keys())
        first_examples = {**row_warnings, **first_examples}
        if row_error is None and checker is not None:
            row_error = next(filter(None, (checker.check(conversation) for _, conversation, _, _ in results)), None)
        if row_error is None and data_kind in JUDGED_KINDS:
            checks = (_check_contradiction(part, examples, judgements) for _, part, examples, _ in results)
            row_error = next(filter(None, checks), None)
        if row_error is not None:
            outcomes["dropped"] += 1
            errors.append(row_error)
            if row_error.code in LENGTH_REASONS:
                longest_dropped = max(longest_dropped, row_longest)
            continue
        outcomes[max((outcome for outcome, *_ in results), key=OUTCOMES.index)] += 1
        group: int | None = None  # all conversations of the row are in the group of the first one
        for outcome, conversation, examples, num_tokens in results:
            if outcome != "used":
                what = f"{num_tokens} tokens, now {' + '.join(str(len(example)) for example in examples)}"
                shortened.append((outcome, conversation.file, conversation.line, what))
            prompt = digest(dump_conversation(conversation.prompt))
            group = writer.add(conversation, examples, prompt, prompt if data_kind in JUDGED_KINDS else group)
            chats += conversation.text is None
            thinking += conversation.text is None and renderer.chat.shows_reasoning(conversation.messages)
            without_system += conversation.text is None and all(x.role != "system" for x in conversation.messages[:1])
            last_examples = examples if data_kind == "pairs" else examples[-1:]
            stops += data_kind not in RENDERED_PROMPTS and all(
                ends_with_stop(example, renderer) for example in last_examples
            )
    errors = [*reader.unreadable, *reader.invalid, *errors]
    outcomes["dropped"] += len(reader.unreadable) + len(reader.invalid)
    file_order = {name: i for i, name in enumerate(dict.fromkeys(error.where.file for error in errors))}
    errors.sort(key=lambda error: (file_order[error.where.file], error.where.line or 0))
    return {
        "read": reader.conversations.num_rows + len(reader.unreadable),
        "outcomes": dict(outcomes),
        "faults": [(error.code, error.where.file, error.where.line, error.where.what) for error in errors],
        "cut": shortened,
        "notes": [(warning, count, first_examples[warning]) for warning, count in warnings.most_common()],
        "unused": dict(reader.conversations.unused),
        "left_out": dict(reader.left_out),
        "formats": reader.formats,
        "unlabelled": reader.conversations.unlabelled,
        "chosen": reader.conversations.chosen,
        "longest": longest,
        "longest_dropped": longest_dropped,
        "chats": chats,
        "thinking": thinking,
        "without_system": without_system,
        "stops": stops,
    }


def decide_outcome(
    conversation: Conversation, rendered: list[Example] | RenderError, data: DataSection, renderer: Renderer,
    data_kind: DataKind,
) -> tuple[str, list[Example], RowError | None]:  # fmt: skip
    """Apply data.overlong: return the outcome of a conversation, its examples, and the error if it has none."""
    if data_kind == "labels" and not isinstance(rendered, RenderError) and len(rendered) != 1:
        rendered = RenderError("answer-in-parts")
    if isinstance(rendered, RenderError):
        if rendered.code == "nothing-supervised" and all(turn.role != "assistant" for turn in conversation.messages):
            return "dropped", [], _row_error(conversation, "no-assistant", "no completion to train on")
        return "dropped", [], _row_error(conversation, rendered.code, rendered.what)
    limit = data.max_length
    if not overlong.is_too_long(rendered, limit):
        return "used", rendered, None
    shorter: list[Example] | None = None
    try:
        if conversation.has_images:  # a part of an image cannot be left out
            pass
        elif data.overlong == "truncate-start" and data_kind == "pairs":
            shorter = overlong.truncate_pair(renderer, conversation, limit)
        elif data.overlong == "truncate-start":
            shorter = overlong.truncate_start(renderer, conversation, rendered, limit)
        elif data.overlong == "split":
            shorter = overlong.split(renderer, conversation, rendered, limit)
    except RenderError as error:
        return "dropped", [], _row_error(conversation, error.code, error.what)
    if shorter is None:
        what = f"{max(map(len, rendered))} tokens, data.max_length is {limit}"
        if conversation.text is None and data.loss == "assistant":
            answer = max(map(overlong.longest_answer, rendered))
            if answer >= limit:  # and a prompt precedes it
                return "dropped", [], _row_error(conversation, ANSWER_TOO_LONG, f"{what}; one answer has {answer}")
        what += f"; {HAS_IMAGES}" if conversation.has_images else ""
        return "dropped", [], _row_error(conversation, TOO_LONG, what)
    return ("truncated" if data.overlong == "truncate-start" else "split"), shorter, None


def find_contradiction(
    conversation: Conversation, examples: Sequence[Example], judgements: Judgements
) -> tuple[str, int] | None:
    """Return file and line of an opposite judgement of the same answers, or record this judgement if there is none."""
    ids = [example.ids.tobytes() for example in examples]
    if conversation.passages:
        return _find_opposite_match(conversation, ids, judgements)
    if conversation.label is not None:
        text, labelled = digest(ids[0]), digest(ids[0] + repr(conversation.label).encode())
        if text in judgements and labelled not in judgements:
            return judgements[text]
        for key in (text, labelled):
            judgements.setdefault(key, (conversation.file, conversation.line))
        return None
    if conversation.rejected:
        prompt = examples[0].prompt_length.to_bytes(8, "little")
        judgement, opposite = (prompt + b"<".join(sides) for sides in (ids, ids[::-1]))
    else:
        labels = (conversation.desirable, not conversation.desirable)
        judgement, opposite = (ids[0] + (b"+" if good else b"-") for good in labels)
    contradicted = judgements.get(digest(opposite))
    if contradicted is None:
        judgements.setdefault(digest(judgement), (conversation.file, conversation.line))
    return contradicted


def _find_opposite_match(
    conversation: Conversation, texts: Sequence[bytes], judgements: Judgements
) -> tuple[str, int] | None:
    """Return file and line of a triplet that contradicts this one. texts: anchor, positive and negatives."""
    anchor, *passages = texts
    for index, text in enumerate(passages):
        pair = len(anchor).to_bytes(8, "little") + anchor + text
        match, opposite = (digest(pair + sign) for sign in ((b"+", b"-") if index == 0 else (b"-", b"+")))
        if opposite in judgements:
            return judgements[opposite]
        judgements.setdefault(match, (conversation.file, conversation.line))
    return None


def split_pair(conversation: Conversation) -> tuple[Conversation, ...]:
    """Return a pair as two labelled answers."""
    if not conversation.rejected:
        return (conversation,)
    chosen, rejected = conversation.sides
    return replace(chosen, desirable=True), replace(rejected, desirable=False)


def _check_contradiction(
    conversation: Conversation, examples: Sequence[Example], judgements: Judgements
) -> RowError | None:
    contradicted = find_contradiction(conversation, examples, judgements)
    if contradicted is None:
        return None
    same_row = contradicted == (conversation.file, conversation.line)
    what = "pairs of this row contradict each other" if same_row else "contradicts {}:{}".format(*contradicted)
    return _row_error(conversation, "contradiction", what)


def _row_error(conversation: Conversation, code: str, what: str) -> RowError:
    return RowError(code, Location(conversation.file, conversation.line, what))


def _cache_key(spec: str | Sequence[str], data: DataSection, renderer: Renderer, kind: Sequence[Any]) -> str:
    """Return a hash of everything that determines the store: rows, tokenizer, template, options and kind of data."""
    key = hashlib.sha256()
    for source in sources.resolve(spec):
        key.update(json.dumps([source.path, source.weight, len(source.files)]).encode())
        if renderer.image_table is not None:
            key.update(os.fsencode(formats.image_folder(source.path, data.image_folder).absolute()))
        for name in source.files:
            key.update(bytes.fromhex(sha256_file(Path(name))))
    options = data.model_dump(include={"format", "columns", "max_length", "overlong", "loss", "encoding"})
    if data.loss == "all":
        options["loss"] = "all, each message once"  # unlike stores of version 0.1
    key.update(json.dumps([STORE_VERSION, options, renderer.fingerprint, *kind], sort_keys=True).encode())
    return key.hexdigest()[:32]
