"""The data section of a recipe -> examples on disk and an account of every row.

files -> rows -> conversations -> examples, in one pass in constant memory; what is wrong with rows is gathered,
and a run that would lose more than the recipe allows is refused with all places named.
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
from pathlib import Path
from typing import Any

import numpy as np

from strop.config.schema import DataSection
from strop.data import formats
from strop.data.conversation import Conversation, Example
from strop.data.reading import sources
from strop.data.reading.sources import RowFault
from strop.data.rendering import overlong
from strop.data.rendering.render import Renderer, RenderError
from strop.data.rendering.template import FIXES
from strop.data.rendering.template import REASONS as RENDER_REASONS
from strop.data.report import DataReport, Tokens, padding
from strop.data.store import Conversations, Examples, Indices, Store, Writer, load
from strop.errors import DataError, Where

TOO_LONG = "too-long"
REASONS: dict[str, str] = {
    **formats.REASONS,
    **RENDER_REASONS,
    TOO_LONG: "the row is longer than data.max_length",
}
STORE_VERSION = 1  # raise it when prepared data changes for the same input
MAX_LOST_SHARE = 0.01
OUTCOMES = ("used", "split", "truncated", "dropped")  # from best to worst


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on. Examples and conversations are read from disk when asked for.

    train, eval: examples, in the order of the files. *_conversations: the rows they came from.
    hash: of the rows used and their tokens; another template, order or row gives another hash.
    """

    train: Examples
    train_conversations: Conversations
    eval: Examples | None
    eval_conversations: Conversations | None
    report: DataReport
    hash: str
    renderer: Renderer


def prepare(data: DataSection, tokenizer: Any, *, cache: Path | None = None, strict: bool = True) -> Prepared:
    """Read, check, render and store the rows that a recipe names.

    cache: a folder that keeps the tokenised rows by content; None: a temporary folder that goes with the result.
    strict: raise DataError where the report says a run would be refused; else only report it.
    Raises DataError and ModelError for what is wrong with files, options, tokenizer or template as a whole.
    """
    renderer = Renderer(tokenizer, template=data.template, loss=data.loss)
    share = _share(data.eval)
    temporary = None if cache else tempfile.mkdtemp(prefix="strop-data-")
    folder = cache or Path(str(temporary))
    try:
        train = _survey(data.train, data, renderer, folder, keyed=cache is not None)
        held = train if share else None
        if data.eval is not None and not share:
            held = _survey(data.eval, data, renderer, folder, keyed=cache is not None)
        prepared = _prepared(data, renderer, train, held, share)
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


def _prepared(data: DataSection, renderer: Renderer, train: Store, held: Store | None, share: float | None) -> Prepared:
    rows: Indices = np.arange(len(train.row_records), dtype=np.int64)
    digests = train.row_records["digest"]
    eval_rows: Indices = np.zeros(0, np.int64)
    if share:
        # by content, so that equal rows stay together and adding rows moves none; at least one content
        chosen = digests < np.uint64(share * 2**64)
        if len(rows) and not chosen.any():
            chosen = digests == digests.min()
        rows, eval_rows = rows[~chosen], rows[chosen]
    elif held is not None:
        eval_rows = np.arange(len(held.row_records), dtype=np.int64)
    train_set, conversations = _part(train, rows)
    eval_set, eval_conversations = _part(held, eval_rows) if held is not None else (None, None)
    eval_report = None
    if held is not None and eval_set is not None:
        eval_report = _report(data, renderer, held, eval_set, eval_rows, role="evaluation", shared=bool(share))
        across = int(np.isin(held.row_records["digest"][eval_rows], digests[rows]).sum())
        eval_report = dataclasses.replace(eval_report, duplicates={**eval_report.duplicates, "across": across})
    report = _report(data, renderer, train, train_set, rows, role="training")
    if eval_report is not None:
        across = eval_report.duplicates["across"]
        warnings = [f"{across} evaluation rows are also train rows"] if across else []
        report = dataclasses.replace(
            report,
            eval=eval_report,
            held_out=len(eval_rows) if share else 0,
            duplicates={**report.duplicates, "across": across},
            warnings=[*report.warnings, *warnings],
        )
    seal = hashlib.sha256()
    for store, examples, part in ((train, train_set, rows), (held, eval_set, eval_rows)):
        if store is not None and examples is not None:
            seal.update(store.row_records["digest"][part].tobytes())
            seal.update(examples.lengths.tobytes() + examples.supervised.tobytes())
    seal.update(renderer.template_hash.encode())
    return Prepared(train_set, conversations, eval_set, eval_conversations, report, seal.hexdigest(), renderer)


def _part(store: Store, rows: Indices) -> tuple[Examples, Conversations]:
    chosen = np.isin(store.example_records["row"], rows).nonzero()[0]
    return Examples(store, chosen), Conversations(store, rows)


def _share(spec: str | list[str] | None) -> float | None:
    """data.eval as a share of the train rows, or None where it names files. Raises DataError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", spec) if isinstance(spec, str) else None
    if match is None:
        return None
    share = float(match[1]) / 100
    if not 0 < share < 1:
        raise DataError(f"data.eval: {spec} leaves no rows on one side", fix="choose a share between 0% and 100%")
    return share


# --- one pass over the files -------------------------------------------------------------------------------------


class _Reader:
    """The conversations of a spec, and the row that each belongs to (a row may hold several)."""

    def __init__(self, spec: str | Sequence[str], data: DataSection) -> None:
        self.unreadable: list[RowFault] = []
        self.bad: list[RowFault] = []
        self.left_out: Counter[str] = Counter()
        rows = sources.read_rows(
            spec, encoding=data.encoding, columns=data.columns, bad=self.unreadable, left_out=self.left_out
        )
        self.conversations = formats.conversations(rows, format=data.format, columns=data.columns, bad=self.bad)
        self.row_of: deque[int] = deque()  # the renderer reads ahead

    def __iter__(self) -> Iterator[Conversation]:
        for conversation in self.conversations:
            self.row_of.append(self.conversations.num_used)
            yield conversation

    @property
    def num_rows(self) -> int:
        return self.conversations.num_rows + len(self.unreadable)


def _survey(spec: str | Sequence[str], data: DataSection, renderer: Renderer, folder: Path, *, keyed: bool) -> Store:
    """Read and render the rows of `spec` into a store, or find it ready in `folder`."""
    place = folder / (_key(spec, data, renderer) if keyed else f"rows-{len(list(folder.iterdir()))}")
    if keyed and (ready := load(place)):
        return ready
    writer = Writer(place)
    try:
        return writer.commit(_fill(writer, _Reader(spec, data), data, renderer))
    finally:
        writer.discard()


def _fill(writer: Writer, reader: _Reader, data: DataSection, renderer: Renderer) -> dict[str, Any]:
    """Every conversation into the store or onto the list of faults; the facts of the pass."""
    faults: list[RowFault] = []
    outcomes: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    first: dict[str, str] = {}  # note -> where it was first seen, with an example
    row, worst, stops, longest = 0, -1, 0, 0
    for conversation, rendered in renderer.render_many(reader):
        if (this := reader.row_of.popleft()) != row:
            if row:
                outcomes[OUTCOMES[worst]] += 1
            row, worst = this, -1
        for note, example in _notes(conversation, renderer):
            notes[note] += 1
            first.setdefault(note, f"first {conversation.file}:{conversation.line}{example}")
        if not isinstance(rendered, RenderError):
            longest = max(longest, *map(len, rendered))
        outcome, examples, fault = _settle(conversation, rendered, data, renderer)
        worst = max(worst, OUTCOMES.index(outcome))
        if fault is not None:
            faults.append(fault)
            continue
        writer.add(conversation, examples)
        stops += _stops(examples[-1], renderer)
    if row:
        outcomes[OUTCOMES[worst]] += 1
    faults = [*reader.unreadable, *reader.bad, *faults]
    outcomes["dropped"] += len(reader.unreadable) + len(reader.bad)
    order = {name: i for i, name in enumerate(dict.fromkeys(fault.where.file for fault in faults))}
    faults.sort(key=lambda fault: (order[fault.where.file], fault.where.line or 0))
    return {
        "read": reader.num_rows,
        "outcomes": dict(outcomes),
        "faults": [(fault.code, fault.where.file, fault.where.line, fault.where.what) for fault in faults],
        "notes": [(note, count, first[note]) for note, count in notes.most_common()],
        "unused": dict(reader.conversations.unused),
        "left_out": dict(reader.left_out),
        "formats": reader.conversations.found,
        "longest": longest,
        "stops": stops,
    }


def _settle(
    conversation: Conversation, rendered: list[Example] | RenderError, data: DataSection, renderer: Renderer
) -> tuple[str, list[Example], RowFault | None]:
    """The outcome of one conversation: its examples, or why it has none."""
    if isinstance(rendered, RenderError):
        return "dropped", [], _fault(conversation, rendered.code, rendered.what)
    limit = data.max_length
    if not overlong.too_long(rendered, limit):
        return "used", rendered, None
    shorter: list[Example] | None = None
    try:
        if data.overlong == "truncate-start":
            shorter = overlong.truncate_start(renderer, conversation, rendered, limit)
        elif data.overlong == "split":
            shorter = overlong.split(renderer, conversation, rendered, limit)
    except RenderError as fault:
        return "dropped", [], _fault(conversation, fault.code, fault.what)
    if shorter is None:
        length = max(map(len, rendered))
        return "dropped", [], _fault(conversation, TOO_LONG, f"{length} tokens, data.max_length is {limit}")
    return ("truncated" if data.overlong == "truncate-start" else "split"), shorter, None


def _fault(conversation: Conversation, code: str, what: str) -> RowFault:
    return RowFault(code, Where(conversation.file, conversation.line, what))


def _stops(example: Example, renderer: Renderer) -> bool:
    """Is the last supervised token one that ends generation?"""
    last = int(example.ids[example.weights.nonzero()[0][-1]])
    return last in renderer.stop_ids or last == renderer.tokenizer.eos_token_id


def _notes(conversation: Conversation, renderer: Renderer) -> Iterator[tuple[str, str]]:
    """What is odd about a conversation, though it can be trained on, and an example of it."""
    texts = [message.content for message in conversation.messages] or [conversation.text or ""]
    found = [name for text in texts if "{{" in text for name in formats.placeholders(text)]
    if found:
        yield "unfilled placeholders", f": {found[0]}"
    if lost := sorted(set().union(*map(renderer.lost_characters, texts))):
        yield (
            "characters that the tokenizer drops or changes",
            f": {', '.join(f'U+{ord(sign):04X}' for sign in lost[:3])}",
        )
    if any(renderer.control.found(text) for text in texts):
        yield "control tokens in the text, encoded as plain text", ""
    if any(message.reasoning for message in conversation.messages) and not renderer.chat.supports_reasoning:
        yield "reasoning, which the chat template does not show: it is not trained on", ""


def _key(spec: str | Sequence[str], data: DataSection, renderer: Renderer) -> str:
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
    seal.update(json.dumps([STORE_VERSION, options, renderer.fingerprint], sort_keys=True).encode())
    return seal.hexdigest()[:32]


# --- the account -------------------------------------------------------------------------------------------------


def _report(
    data: DataSection,
    renderer: Renderer,
    store: Store,
    examples: Examples,
    rows: Indices,
    *,
    role: str,
    shared: bool = False,
) -> DataReport:
    """The account of a store, of which `examples` are used for `role`; shared: its rows are accounted elsewhere."""
    facts = store.facts
    faults = [] if shared else [RowFault(code, Where(*where)) for code, *where in facts["faults"]]
    outcomes = {name: 0 if shared else int(facts["outcomes"].get(name, 0)) for name in ("used", "truncated", "split")}
    counts = {"read": facts["read"], **outcomes, "dropped": int(facts["outcomes"].get("dropped", 0))}
    if shared:
        counts = {"read": len(rows), "used": len(rows), "truncated": 0, "split": 0, "dropped": 0}
    assert counts["read"] == sum(counts.values()) - counts["read"], f"rows without an outcome: {counts}"
    kept = len(store.row_records)
    digests = store.row_records["digest"][rows]
    within = len(digests) - len(np.unique(digests))
    warnings = [] if shared else [*renderer.warnings, *_warnings(facts)]
    if within:
        warnings.append(f"{within} {role} rows repeat an earlier one")
    return DataReport(
        rows=counts,
        by_reason=dict(Counter(fault.code for fault in faults).most_common()),
        dropped=[
            {"file": at.file, "line": at.line, "reason": code, "what": at.what}
            for code, at in ((fault.code, fault.where) for fault in faults)
        ],
        tokens=Tokens.of(examples.lengths, examples.supervised),
        stop_token={"rows": facts["stops"], "share": facts["stops"] / kept if kept else 0.0},
        duplicates={"within": within, "across": 0},
        padding=padding(examples.lengths, data.max_length),
        formats=facts["formats"],
        warnings=warnings,
        refusal=_refusal(data, facts, faults, counts, num_left=len(rows), role=role),
    )


def _warnings(facts: dict[str, Any]) -> list[str]:
    found = [f"{count} rows hold {note} ({place})" for note, count, place in facts["notes"]]
    if facts["unused"]:
        columns = ", ".join(f"{name} ({count} rows)" for name, count in sorted(facts["unused"].items()))
        found.append(f"columns not read: {columns}")
    return found + [f"{count} rows of {path} left out by its weight" for path, count in facts["left_out"].items()]


def _refusal(
    data: DataSection,
    facts: dict[str, Any],
    faults: list[RowFault],
    counts: dict[str, int],
    *,
    num_left: int,
    role: str,
) -> DataError | None:
    """Why a run would not start on these rows, if it would not."""
    if "preference" in facts["formats"].values():
        return DataError(
            "preference pairs are read and checked, but not trained on",
            fix="train on the better answers alone: --data.columns prompt=prompt,completion=chosen",
        )
    long = [fault for fault in faults if fault.code == TOO_LONG]
    bad = [fault for fault in faults if fault.code != TOO_LONG]
    if bad and data.bad_rows == "refuse":
        codes = {fault.code for fault in bad}
        advice = [FIXES[code] for code in codes if code in FIXES] or ["mend them"]
        return DataError(
            f"{len(bad)} of {counts['read']} {role} rows cannot be used",
            fix=f"{'; '.join(sorted(advice))}; or leave such rows out with --data.bad_rows drop",
            where=[fault.where for fault in bad],
        )
    places = [fault.where for fault in long]
    if long and data.overlong == "refuse":
        return DataError(
            f"{len(long)} of {counts['read']} {role} rows are longer than data.max_length {data.max_length}",
            fix=f"--data.max_length {facts['longest']}, or choose --data.overlong drop, truncate-start or split",
            where=places,
        )
    if long and data.overlong != "drop" and len(long) > MAX_LOST_SHARE * counts["read"] and data.bad_rows == "refuse":
        return DataError(
            f"{len(long)} of {counts['read']} {role} rows cannot be brought down to data.max_length {data.max_length}",
            fix="raise --data.max_length, or leave such rows out with --data.overlong drop",
            where=places,
        )
    if not num_left:
        where = [fault.where for fault in faults]
        return DataError(f"0 of {counts['read']} {role} rows are left", fix="give more rows", where=where)
    return None
