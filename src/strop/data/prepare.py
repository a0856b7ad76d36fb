"""The data section of a recipe -> examples on disk and an account of every row.

files -> rows -> conversations -> examples, in one pass in constant memory; what is wrong with rows is gathered,
and a run that would lose more than the recipe allows is refused with all places named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
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
from strop.data.accounting import TOO_LONG, DataReport, Pass, account, ends_with_stop, notes_of
from strop.data.examples import JUDGED, Learning, Prompts, Units, units_of
from strop.data.prepare import group_of, held_out, share_of
from strop.data.reading import sources
from strop.data.reading.sources import RowFault
from strop.data.rendering import overlong, pairs
from strop.data.rendering.render import Renderer, RenderError
from strop.data.row_errors import REASONS as RENDER_REASONS
from strop.data.store import Conversations, Examples, Indices, Store, Writer, digest, dumps, load
from strop.data.types import Conversation, Example
from strop.errors import Where

REASONS: dict[str, str] = {
    **formats.REASONS,
    **RENDER_REASONS,
    TOO_LONG: "the row is longer than data.max_length",
    "contradiction": "the same two answers stand the other way round elsewhere, or one answer is judged both ways",
}
STORE_VERSION = 8  # raise it when prepared data changes for the same input
OUTCOMES = ("used", "split", "truncated")  # of a row that is not dropped, from best to worst


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on. Examples and conversations are read from disk when asked for.

    train, eval: examples, in the order of the files. *_conversations: the rows they came from. *_units: what an
    objective trains on that does not learn from turns; None for one that does.
    hash: of the rows used and their tokens; another template, order or row gives another hash.
    renderer: as answers are asked for after training on these rows.
    """

    train: Examples
    train_conversations: Conversations
    eval: Examples | None
    eval_conversations: Conversations | None
    report: DataReport
    hash: str
    renderer: Renderer
    train_units: Units | Prompts | None = None
    eval_units: Units | Prompts | None = None


def prepare(
    data: DataSection,
    tokenizer: Any,
    *,
    cache: Path | None = None,
    strict: bool = True,
    learning: Learning = "turns",
) -> Prepared:
    """Read, check, render and store the rows that a recipe names.

    learning: what the recipe's objective learns from.

    cache: a folder that keeps the tokenised rows by content; None: a temporary folder that goes with the result.
    strict: raise DataError where the report says a run would be refused; else only report it.
    Raises DataError and ModelError for what is wrong with files, options, tokenizer or template as a whole.
    """
    renderer = renderer_for(data, tokenizer)
    share = share_of(data.eval)
    temporary = None if cache else tempfile.mkdtemp(prefix="strop-data-")
    folder = cache or Path(str(temporary))
    try:
        train = _survey(data.train, data, renderer, folder, learning, keyed=cache is not None)
        held = train if share else None
        if data.eval is not None and not share:
            held = _survey(data.eval, data, renderer, folder, learning, keyed=cache is not None)
        prepared = _prepared(data, renderer, train, held, share, learning)
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
    """What turns the rows of a recipe into tokens. Raises ModelError."""
    return Renderer(
        tokenizer,
        template=data.template,
        loss=data.loss,
        options=data.template_options,
        reasoning=data.reasoning,
    )


def _prepared(
    data: DataSection, renderer: Renderer, train: Store, held: Store | None, share: float | None, learning: Learning
) -> Prepared:
    rows: Indices = np.arange(len(train.row_records), dtype=np.int64)
    eval_rows: Indices = np.zeros(0, np.int64)
    if share:
        chosen = held_out(train.row_records, share)
        rows, eval_rows = rows[~chosen], rows[chosen]
    elif held is not None:
        eval_rows = np.arange(len(held.row_records), dtype=np.int64)
    train_set, conversations = _part(train, rows)
    eval_set, eval_conversations = _part(held, eval_rows) if held is not None else (None, None)
    eval_report = None
    report = account(data, renderer, Pass(train, train_set, rows, "training", learning))
    if held is not None and eval_set is not None:
        looked = Pass(held, eval_set, eval_rows, "evaluation", learning, shared=bool(share))
        eval_report = account(data, renderer, looked)
        common = _common(train.row_records[rows], held.row_records[eval_rows])
        eval_report = dataclasses.replace(eval_report, duplicates={**eval_report.duplicates, **common})
        across, prompts = common["across"], common["prompts"]
        warnings = [f"{across} evaluation rows are also train rows"] if across else []
        warnings += [f"{prompts} evaluation rows have a prompt that train rows have too"] if prompts > across else []
        report = dataclasses.replace(
            report,
            eval=eval_report,
            held_out=len(eval_rows) if share else 0,
            duplicates={**report.duplicates, **common},
            warnings=[*report.warnings, *warnings],
        )
    seal = hashlib.sha256()
    for store, examples, part in ((train, train_set, rows), (held, eval_set, eval_rows)):
        if store is not None and examples is not None:
            seal.update(store.row_records["digest"][part].tobytes())
            seal.update(examples.lengths.tobytes() + examples.supervised.tobytes())
    served = renderer.served(thinking=train.facts["thinking"], rows=train.facts["chats"])
    seal.update(served.template_hash.encode())
    units: list[Units | Prompts | None] = [None, None]
    if learning != "turns" and report.refusal is None and (eval_report is None or eval_report.refusal is None):
        sets = ((train_set, conversations), (eval_set, eval_conversations))
        units = [units_of(part, said, learning, data.max_length, served) for part, said in sets]
        seal.update(train_set.judged.tobytes())
    return Prepared(train_set, conversations, eval_set, eval_conversations, report, seal.hexdigest(), served, *units)


def _common(train: npt.NDArray[Any], held: npt.NDArray[Any]) -> dict[str, int]:
    """How many held-out rows are train rows too, and how many have a prompt of theirs."""
    names = {"across": "digest", "prompts": "prompt"}
    return {name: int(np.isin(held[field], train[field]).sum()) for name, field in names.items()}


def _part(store: Store, rows: Indices) -> tuple[Examples, Conversations]:
    chosen = np.isin(store.example_records["row"], rows).nonzero()[0]
    return Examples(store, chosen), Conversations(store, rows)


# --- one pass over the files -------------------------------------------------------------------------------------


class _Reader:
    """The conversations of a spec, and the row that each belongs to (a row may hold several).

    learning: where it is from labels, a pair is two judged answers; where from prompts, nobody need have answered.
    """

    def __init__(self, spec: str | Sequence[str], data: DataSection, learning: Learning, renderer: Renderer) -> None:
        self._renderer = renderer
        self._labels = learning == "labels"
        self.unreadable: list[RowFault] = []
        self.bad: list[RowFault] = []
        self.left_out: Counter[str] = Counter()
        rows = sources.read_rows(
            spec,
            encoding=data.encoding,
            columns=data.columns,
            bad=self.unreadable,
            left_out=self.left_out,
            documents=data.format == formats.DOCUMENT,
        )
        self.conversations = formats.conversations(
            rows, format=data.format, columns=data.columns, bad=self.bad, answerless=learning == "prompts"
        )
        self.row_of: deque[int] = deque()  # the renderer reads ahead

    def __iter__(self) -> Iterator[Conversation]:
        for conversation in map(self._renderer.apart, self.conversations):
            for part in answers_of(conversation) if self._labels else (conversation,):
                self.row_of.append(self.conversations.num_used)
                yield part

    @property
    def num_rows(self) -> int:
        return self.conversations.num_rows + len(self.unreadable)


def _survey(
    spec: str | Sequence[str], data: DataSection, renderer: Renderer, folder: Path, learning: Learning, *, keyed: bool
) -> Store:
    """Read and render the rows of `spec` into a store, or find it ready in `folder`."""
    place = folder / (_key(spec, data, renderer, learning) if keyed else f"rows-{len(list(folder.iterdir()))}")
    if keyed and (ready := load(place)):
        return ready
    writer = Writer(place)
    try:
        reader = _Reader(spec, data, learning, renderer)
        return writer.commit(_fill(writer, reader, data, renderer, learning))
    finally:
        writer.discard()


def _fill(writer: Writer, reader: _Reader, data: DataSection, renderer: Renderer, learning: Learning) -> dict[str, Any]:
    """Every row into the store, with all its conversations, or onto the list of faults; the facts of the pass."""
    faults: list[RowFault] = []
    outcomes: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    cut: list[tuple[str, str, int | None, str]] = []  # how, and where
    first: dict[str, str] = {}  # note -> where it was first seen, with an example
    stops = longest = chats = thinking = 0
    judged: dict[int, tuple[str, int]] = {}  # comparison or judgement -> where it was first seen
    render = renderer.render_many
    if learning in ("pairs", "prompts"):
        render = partial(pairs.render_pairs if learning == "pairs" else pairs.render_prompts, renderer)
    for _, said in groupby(render(reader), lambda _: reader.row_of.popleft()):
        kept: list[tuple[str, Conversation, list[Example], list[Example] | RenderError]] = []
        noted: dict[str, str] = {}
        wrong: RowFault | None = None  # the first fault of the row, of which then nothing is used
        for conversation, rendered in said:
            for note, example in notes_of(conversation, rendered, renderer, learning):
                noted.setdefault(note, f"first {conversation.file}:{conversation.line}{example}")
            if not isinstance(rendered, RenderError):
                longest = max(longest, *map(len, rendered))
            outcome, examples, fault = settle(conversation, rendered, data, renderer, learning)
            wrong = wrong or fault
            kept.append((outcome, conversation, examples, rendered))
        notes.update(noted.keys())
        first = {**noted, **first}
        if wrong is None and learning in JUDGED:
            wrong = next(filter(None, (_contradiction(one, examples, judged) for _, one, examples, _ in kept)), None)
        if wrong is not None:
            outcomes["dropped"] += 1
            faults.append(wrong)
            continue
        outcomes[max((outcome for outcome, *_ in kept), key=OUTCOMES.index)] += 1
        group: int | None = None  # see group_of
        for outcome, conversation, examples, rendered in kept:
            if outcome in ("truncated", "split") and not isinstance(rendered, RenderError):
                lengths = (
                    f"{sum(map(len, rendered))} tokens, now {' + '.join(str(len(example)) for example in examples)}"
                )
                cut.append((outcome, conversation.file, conversation.line, lengths))
            prompt = digest(dumps(conversation.prompt))
            group = writer.add(conversation, examples, prompt, group_of(prompt, learning, group))
            chats += conversation.text is None
            thinking += conversation.text is None and renderer.chat.thinks(conversation.messages)
            ends = examples if learning == "pairs" else examples[-1:]
            stops += learning != "prompts" and all(ends_with_stop(example, renderer) for example in ends)
    faults = [*reader.unreadable, *reader.bad, *faults]
    outcomes["dropped"] += len(reader.unreadable) + len(reader.bad)
    order = {name: i for i, name in enumerate(dict.fromkeys(fault.where.file for fault in faults))}
    faults.sort(key=lambda fault: (order[fault.where.file], fault.where.line or 0))
    return {
        "read": reader.num_rows,
        "outcomes": dict(outcomes),
        "faults": [(fault.code, fault.where.file, fault.where.line, fault.where.what) for fault in faults],
        "cut": cut,
        "notes": [(note, count, first[note]) for note, count in notes.most_common()],
        "unused": dict(reader.conversations.unused),
        "left_out": dict(reader.left_out),
        "formats": reader.conversations.found,
        "longest": longest,
        "chats": chats,
        "thinking": thinking,
        "stops": stops,
    }


def settle(
    conversation: Conversation,
    rendered: list[Example] | RenderError,
    data: DataSection,
    renderer: Renderer,
    learning: Learning,
) -> tuple[str, list[Example], RowFault | None]:
    """The outcome of one conversation: its examples, or why it has none."""
    if isinstance(rendered, RenderError):
        return "dropped", [], _fault(conversation, rendered.code, rendered.what)
    if learning == "labels" and len(rendered) != 1:
        return "dropped", [], _fault(conversation, "answer-in-parts", RENDER_REASONS["answer-in-parts"])
    limit = data.max_length
    if not overlong.too_long(rendered, limit):
        return "used", rendered, None
    shorter: list[Example] | None = None
    try:
        if data.overlong == "truncate-start" and learning == "pairs":
            shorter = pairs.truncate_pair(renderer, conversation, limit)
        elif data.overlong == "truncate-start":
            shorter = overlong.truncate_start(renderer, conversation, rendered, limit)
        elif data.overlong == "split":
            shorter = overlong.split(renderer, conversation, rendered, limit)
    except RenderError as fault:
        return "dropped", [], _fault(conversation, fault.code, fault.what)
    if shorter is None:
        length = max(map(len, rendered))
        return "dropped", [], _fault(conversation, TOO_LONG, f"{length} tokens, data.max_length is {limit}")
    return ("truncated" if data.overlong == "truncate-start" else "split"), shorter, None


def opposed(
    conversation: Conversation, examples: Sequence[Example], judged: dict[int, tuple[str, int]]
) -> tuple[str, int] | None:
    """Where the opposite was said of the same answers to the same prompt; else notes what is said here."""
    ids = [example.ids.tobytes() for example in examples]
    if conversation.rejected:
        prompt = examples[0].prompt.to_bytes(8, "little")
        said, opposite = (prompt + b"<".join(both) for both in (ids, ids[::-1]))
    else:
        said, opposite = (
            ids[0] + (b"+" if good else b"-") for good in (conversation.desirable, not conversation.desirable)
        )
    found = judged.get(digest(opposite))
    if found is None:
        judged.setdefault(digest(said), (conversation.file, conversation.line))
    return found


def answers_of(conversation: Conversation) -> tuple[Conversation, ...]:
    """A pair as two judged answers; else itself."""
    if not conversation.rejected:
        return (conversation,)
    better, worse = conversation.sides
    return dataclasses.replace(better, desirable=True), dataclasses.replace(worse, desirable=False)


def _contradiction(
    conversation: Conversation, examples: Sequence[Example], judged: dict[int, tuple[str, int]]
) -> RowFault | None:
    against = opposed(conversation, examples, judged)
    if against is None:
        return None
    own = against == (conversation.file, conversation.line)
    what = "its own pairs say the opposite of each other" if own else "says the opposite of {}:{}".format(*against)
    return _fault(conversation, "contradiction", what)


def _fault(conversation: Conversation, code: str, what: str) -> RowFault:
    return RowFault(code, Where(conversation.file, conversation.line, what))


def _key(spec: str | Sequence[str], data: DataSection, renderer: Renderer, learning: Learning) -> str:
    """A name for what the rows, the tokenizer, the template and the options make together."""
    seal = hashlib.sha256()
    for source in sources.resolve(spec):
        seal.update(json.dumps([source.path, source.weight, len(source.files)]).encode())
        for name in source.files:
            inner = hashlib.sha256()
            with open(name, "rb") as file:
                while block := file.read(1 << 20):
                    inner.update(block)
            seal.update(inner.digest())
    options = data.model_dump(include={"format", "columns", "max_length", "overlong", "loss", "encoding"})
    seal.update(json.dumps([STORE_VERSION, options, renderer.fingerprint, learning], sort_keys=True).encode())
    return seal.hexdigest()[:32]


# ---- from strop.data.holdout ----
"""Which of the train rows are held out for evaluation, where data.eval is a share of them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from strop.data.examples import JUDGED, Learning
from strop.data.types import Mask
from strop.errors import DataError


def share_of(spec: str | list[str] | None) -> float | None:
    """data.eval as a share of the train rows, or None where it names files. Raises DataError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", spec) if isinstance(spec, str) else None
    if match is None:
        return None
    share = float(match[1]) / 100
    if not 0 < share < 1:
        raise DataError(f"data.eval: {spec} leaves no rows on one side", fix="choose a share between 0% and 100%")
    return share


def group_of(prompt: int, learning: Learning, first: int | None) -> int | None:
    """The hash that a conversation is held out by: of pairs and judged answers that of the prompt, else that of the
    first conversation of the same row of the file (None: it is the first itself)."""
    return prompt if learning in JUDGED else first


def held_out(records: npt.NDArray[Any], share: float) -> Mask:
    """Of the rows (n,) of a store, those that are held out: whole groups, one at least.

    By hash, so that adding rows moves none. Where no row would be left to train on (all are of one group), each is
    chosen by its own content.
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
