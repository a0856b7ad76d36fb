"""Report on a data set: the outcome of every row, statistics, warnings, and the error that a run would raise."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from strop.config.names import option_words
from strop.config.schema import DataSection
from strop.data.answers import PLACEHOLDER
from strop.data.converters import LABELS
from strop.data.formats import PAIRED, example_row, find_placeholders
from strop.data.images import IMAGE_NOTES
from strop.data.rendering.overlong import allowed_overlong
from strop.data.rendering.render import Renderer
from strop.data.row_errors import (
    ANSWER_TOO_LONG,
    FIXES,
    HAS_IMAGES,
    LENGTH_REASONS,
    READING_REASONS,
    RenderError,
    RowError,
)
from strop.data.store import Conversations, Examples, Store, count_labels
from strop.data.types import (
    MARK,
    PREFERENCE_KINDS,
    RENDERED_PROMPTS,
    TEXT_KINDS,
    Classes,
    Conversation,
    DataKind,
    Example,
    Indices,
)
from strop.errors import DataError, Location

MAX_LOST_SHARE = 0.01  # largest share of rows that data.overlong may fail to shorten before a run refuses the data
MEASURED_KINDS = (*PREFERENCE_KINDS, "prompts", "classes")  # kinds of data whose evaluation counts rows for intervals
PADDED_ROWS = 8  # batch size of the padding statistics
MIN_CLASS_ROWS = 5  # a class with fewer training rows gets a warning
MAX_IMBALANCE = 20  # ratio of the numbers of rows of two classes above which class weights are suggested


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens, supervised tokens and examples, and percentiles of the examples' lengths."""

    all: int
    supervised: int
    p50: int
    p95: int
    max: int
    examples: int

    @classmethod
    def of(cls, lengths: Indices, supervised: Indices) -> TokenCounts:
        if not len(lengths):
            return cls(0, 0, 0, 0, 0, 0)
        p50, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf")
        return cls(int(lengths.sum()), int(supervised.sum()), int(p50), int(p95), int(lengths.max()), len(lengths))


@dataclass(frozen=True)
class DataReport:
    """The outcome of each row of a data set, statistics and warnings."""

    rows: dict[str, int]  # read, used, truncated, split, dropped; read is the sum of the other four
    by_reason: dict[str, int]  # number of dropped rows by reason code
    dropped: list[dict[str, Any]]  # {file, line, reason, what} of each dropped row
    tokens: TokenCounts
    stop_token: dict[str, float]  # number and share of used rows whose last supervised token is a stop token
    # within: rows that repeat an earlier row; across: evaluation rows that are also training rows; prompts: evaluation
    # rows whose prompt is also in the training rows
    duplicates: dict[str, int]
    padding: dict[str, float]  # share of padding in batches of 8 rows in file order; strop's fast step has none
    formats: dict[str, str]  # {file: format}
    warnings: list[str]  # about unusual rows
    template: list[str]  # how the chat template is used
    held_out: int = 0  # rows used for evaluation instead of training, with the copies made by weights
    refusal: DataError | None = None  # the error that a run would raise
    eval: DataReport | None = None  # report on the evaluation rows
    answers: dict[str, Any] = field(default_factory=dict)  # see `_answer_statistics`
    cut: list[dict[str, Any]] = field(default_factory=list)  # {how, file, line, what} of rows truncated or split

    @property
    def would_refuse(self) -> bool:
        return self.refusal is not None or (self.eval is not None and self.eval.would_refuse)

    def as_json(self) -> dict[str, Any]:
        """Return the fields of `strop check --json`."""
        return {
            **vars(self),
            "tokens": vars(self.tokens),
            "would_refuse": self.would_refuse,
            "refusal": self.refusal.as_json() if self.refusal else None,
            "eval": self.eval.as_json() if self.eval else None,
        }


@dataclass(frozen=True)
class Selection:
    """The rows of a store that are used for training or evaluation, and their examples and conversations.

    held_out: for evaluation rows that were split off the training data, those rows with the copies made by weights.
    The report on the training rows contains all errors and warnings of that data.
    """

    store: Store
    examples: Examples
    conversations: Conversations
    rows: Indices
    role: Literal["training", "evaluation"]
    data_kind: DataKind
    held_out: Indices | None = None
    classes: Classes | None = None

    @property
    def records(self) -> npt.NDArray[Any]:
        return self.store.row_records[self.rows]


def build_report(
    data: DataSection, renderer: Renderer, selection: Selection, options: Mapping[str, Any] | None = None
) -> DataReport:
    """Return the report. options: the fields of a recipe, other than those of data, that `strop check` needs."""
    examples, rows, role, facts = selection.examples, selection.rows, selection.role, selection.store.facts
    num_conversations, num_with_reasoning = facts["chats"], facts["thinking"]
    num_without_system = facts.get("without_system", num_conversations)  # stores of earlier versions do not have it
    if selection.held_out is not None:
        counts = {"read": len(rows), "used": len(rows), "truncated": 0, "split": 0, "dropped": 0}
        num_used, num_stops, errors, warnings, cut = len(rows), count_stops(selection, rows, renderer), [], [], []
    else:
        errors = [RowError(code, Location(*where)) for code, *where in facts["faults"]]
        outcomes = {name: int(facts["outcomes"].get(name, 0)) for name in ("used", "truncated", "split", "dropped")}
        counts = {"read": facts["read"], **outcomes}
        num_used, num_stops = len(selection.store.row_records), facts["stops"]
        warnings = [*renderer.warnings, *_row_warnings(facts, selection.data_kind)]
        if 0 < num_with_reasoning < num_conversations:
            num_without = num_conversations - num_with_reasoning
            warnings.append(f"{num_with_reasoning} {role} rows have reasoning and {num_without} have none")
        cut = [dict(zip(("how", "file", "line", "what"), record, strict=True)) for record in facts["cut"]]
    assert counts["read"] == sum(counts.values()) - counts["read"], f"rows without an outcome: {counts}"
    records = selection.records
    if repeated := len(first_copies(records)) - len(np.unique(records["digest"])):
        narrow = role == "evaluation" and selection.data_kind in MEASURED_KINDS
        why = ": the intervals are too narrow, as they assume different rows" if narrow else ""
        warnings.append(f"{repeated} {role} {'row repeats' if repeated == 1 else 'rows repeat'} an earlier one{why}")
    warnings += _label_warnings(selection)
    refusal = _why_refused(data, selection, errors, counts, options or {})
    return DataReport(
        rows=counts,
        by_reason=dict(Counter(error.code for error in errors).most_common()),
        dropped=[
            {"file": error.where.file, "line": error.where.line, "reason": error.code, "what": error.where.what}
            for error in errors
        ],
        cut=cut,
        tokens=TokenCounts.of(examples.lengths, examples.supervised),
        stop_token={"rows": num_stops, "share": num_stops / num_used if num_used else 0.0},
        duplicates={"within": repeated, "across": 0},
        padding=_padding(examples.lengths),
        formats=facts["formats"],
        warnings=warnings,
        template=[*renderer.chat.describe(num_with_reasoning, num_conversations, num_without_system)]
        if num_conversations
        else [],
        refusal=refusal,
        answers=_answer_statistics(selection) if refusal is None and selection.data_kind != "turns" else {},
    )


def ends_with_stop(example: Example, renderer: Renderer) -> bool:
    """Return whether the last supervised token ends generation."""
    last = int(example.ids[example.weights.nonzero()[0][-1]])
    return last in renderer.stop_ids or last == renderer.tokenizer.eos_token_id


def first_copies(records: npt.NDArray[Any]) -> Indices:
    """Return the indices of rows, in order, without the copies made by the weight of their file."""
    if len(np.unique(records["digest"])) == len(records):
        return np.arange(len(records))
    return np.sort(np.unique(records[["digest", "file", "line"]], return_index=True)[1])


def count_stops(selection: Selection, rows: Indices, renderer: Renderer) -> int:
    """Count the rows of a selection's store that end with a supervised stop token. In pairs, both answers must."""
    if selection.data_kind in RENDERED_PROMPTS:
        return 0
    example_rows = selection.store.example_records["row"]
    starts, ends = (np.searchsorted(example_rows, rows, side) for side in ("left", "right"))
    firsts = starts if selection.data_kind == "pairs" else ends - 1
    return sum(
        all(ends_with_stop(selection.store.example(i), renderer) for i in range(first, end))
        for first, end in zip(firsts.tolist(), ends.tolist(), strict=True)
    )


def _answer_statistics(selection: Selection) -> dict[str, Any]:
    """Return statistics of prompts, texts to classify or match, labelled answers or pairs.

    length_accuracy: accuracy of always preferring the longer answer, or always the shorter one if that is higher.
    """
    supervised, labels = selection.examples.supervised, selection.examples.labels
    if selection.data_kind == "prompts":
        return {"prompts": len(selection.rows), "right_answers": int(selection.records["has_answer"].sum())}
    if selection.data_kind == "triplets":
        rows = len(selection.rows)
        return {"triplets": rows, "negatives": len(selection.examples) - 2 * rows}
    if selection.classes is not None:
        all_labels, names, several = selection.store.labels, selection.classes.names, selection.classes.several
        without = [index for index, label in enumerate(all_labels) if not label]
        statistics = {"classes": count_labels(selection.examples, all_labels, names), "several": several}
        return statistics | {"without_label": int(np.isin(labels, without).sum())}
    if selection.data_kind == "labels":
        return {
            "desirable": int((labels == 1).sum()),
            "undesirable": int((labels == 0).sum()),
            "desirable_tokens": _mean(supervised[labels == 1]),
            "undesirable_tokens": _mean(supervised[labels == 0]),
        }
    chosen, rejected = supervised[0::2], supervised[1::2]
    longer, equal = float((chosen > rejected).mean()), float((chosen == rejected).mean())
    longer_accuracy = longer + equal / 2
    return {
        "pairs": len(chosen),
        "chosen_tokens": float(chosen.mean()),
        "rejected_tokens": float(rejected.mean()),
        "chosen_longer": longer,
        "length_accuracy": max(longer_accuracy, 1 - longer_accuracy),
    }


def _mean(lengths: Indices) -> float:
    return float(lengths.mean()) if len(lengths) else 0.0


def _padding(lengths: Indices) -> dict[str, float]:
    """Return the share of padding in batches of 8 rows in file order."""
    if not len(lengths):
        return {"batched": 0.0}
    num_missing = -len(lengths) % PADDED_ROWS  # rows missing in the last batch
    batches = np.concatenate([lengths, np.zeros(num_missing, lengths.dtype)]).reshape(-1, PADDED_ROWS)
    batch_rows = np.full(len(batches), PADDED_ROWS)
    batch_rows[-1] -= num_missing
    return {"batched": 1 - int(lengths.sum()) / int((batches.max(axis=1) * batch_rows).sum())}


def find_row_warnings(
    conversation: Conversation, rendered: list[Example] | RenderError, renderer: Renderer, data_kind: DataKind
) -> Iterator[tuple[str, str]]:
    """Yield (warning, excerpt) for each unusual property of a usable conversation."""
    turns = (*conversation.messages, *conversation.rejected)
    if conversation.answer == PLACEHOLDER:
        yield "no answer yet: train.teacher answers them at the start of a run", ""
    texts = [message.content.replace(MARK, "") if message.images else message.content for message in turns] or [
        conversation.text or "",
        *conversation.passages,
    ]
    if placeholders := [name for text in texts if "{{" in text for name in find_placeholders(text)]:
        yield "unfilled placeholders", f": {placeholders[0]}"
    if garbled := re.search("[\x80-\x9f\ufffd]", "".join(texts)):
        warning = "characters that a wrong encoding gives (U+0080 to U+009F, U+FFFD): check --data.encoding"
        yield warning, f": U+{ord(garbled[0]):04X}"
    if lost := sorted(set().union(*map(renderer.lost_characters, texts))):
        codes = ", ".join(f"U+{ord(character):04X}" for character in lost[:3])
        yield "characters that the tokenizer drops or changes", f": {codes}"
    if any(renderer.control.occurs_in(text) for text in texts):
        as_text = "plain text" if conversation.text is None or data_kind not in TEXT_KINDS else "control tokens"
        yield f"control tokens in the text, encoded as {as_text}", ""
    for note in sorted({note for turn in turns for image in turn.images for note in image.notes}):
        yield f"images {IMAGE_NOTES[note]}", ""
    if not isinstance(rendered, RenderError) and any(example.encoded_separately for example in rendered):
        yield "answers that share a token with the end of the prompt; they are encoded separately, as at inference", ""
    has_answer = any(message.role == "assistant" for message in conversation.messages)
    if has_answer and conversation.messages[-1].role != "assistant" and data_kind not in RENDERED_PROMPTS:
        yield "messages after the last answer, which are left out", ""
    if names := [*_null_names(conversation)]:
        yield "null arguments or properties of tools, which the datasets library adds for absent names", f": {names[0]}"
    if any(message.reasoning for message in turns) and not renderer.chat.shows_reasoning(turns):
        dropped = renderer.chat.reasoning == "drop"
        why = "data.reasoning drop leaves out" if dropped else "the chat template does not show: it is not trained on"
        yield f"reasoning, which {why}", ""


def _null_names(conversation: Conversation) -> Iterator[str]:
    """Yield the names of null arguments and null schema properties of tools."""
    turns = (*conversation.messages, *conversation.rejected)
    objects = [call["function"]["arguments"] for turn in turns for call in turn.tool_calls]
    schemas = [tool["function"].get("parameters") for tool in conversation.tools]
    objects += [schema.get("properties") for schema in schemas if isinstance(schema, dict)]
    return (name for item in objects if isinstance(item, dict) for name, value in item.items() if value is None)


def _row_warnings(facts: dict[str, Any], data_kind: DataKind) -> list[str]:
    warnings = [f"{count} rows have {warning} ({first})" for warning, count, first in facts["notes"]]
    if facts["unused"] and data_kind != "prompts":  # functions as rewards and environments get all columns
        columns = ", ".join(f"{name or '(unnamed)'} ({count} rows)" for name, count in sorted(facts["unused"].items()))
        warnings.append(f"columns not read: {columns}")
    return warnings + [
        f"{count} rows of {path} not used, because of the weight of this source"
        for path, count in facts["left_out"].items()
    ]


def _label_warnings(selection: Selection) -> list[str]:
    warnings = list[str]()
    if selection.classes is not None and selection.role == "training":
        warnings += _class_warnings(count_labels(selection.examples, selection.store.labels, selection.classes.names))
    if selection.role == "evaluation" and (what := _single_label(selection)):
        warnings.append(f"{what}: the evaluation does not measure the other label")
    if selection.data_kind == "labels" and len(np.unique(selection.records["group"])) == 1:
        warnings.append(
            f"all {selection.role} rows have one prompt: the KL estimate in the loss is always 0, because it is "
            "measured on answers to other prompts"
        )
    return warnings


def _class_warnings(counts: dict[str, int]) -> Iterator[str]:
    if absent := [name for name, count in counts.items() if not count]:
        yield f"{len(absent)} classes have no training row, so they are not learned: {', '.join(absent[:8])}"
    counts = {name: count for name, count in counts.items() if count}
    if few := [f"{name} ({count})" for name, count in counts.items() if count < MIN_CLASS_ROWS]:
        listed = ", ".join(few[:8]) + ", ..." * (len(few) > 8)
        yield f"{len(few)} classes have fewer than {MIN_CLASS_ROWS} training rows: {listed}"
    if not counts:
        return
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[most] > MAX_IMBALANCE * counts[fewest]:
        yield (
            f"{most} has {counts[most]:,} rows and {fewest} has {counts[fewest]:,}: "
            "--train.class_weights balanced gives rare classes more weight"
        )


def _single_label(selection: Selection) -> str | None:
    """Return a message if all answers have the same label, else None."""
    labels = set(selection.examples.labels.tolist())
    if selection.data_kind != "labels" or labels not in ({0}, {1}):
        return None
    return f"all {selection.role} rows are labelled {'good' if labels == {1} else 'bad'}"


def _why_refused(
    data: DataSection, selection: Selection, errors: list[RowError], counts: dict[str, int], options: Mapping[str, Any]
) -> DataError | None:
    """Return the error that a run would raise for these rows, or None."""
    facts, role, num_read = selection.store.facts, selection.role, counts["read"]
    if kind_error := _check_kind(data, facts, selection.data_kind):
        if unreadable := [error.where for error in errors if error.code in READING_REASONS]:
            message = f"{len(unreadable)} of {num_read} {role} rows cannot be read; of the others, {kind_error.what}"
            return DataError(
                message, fix=f"first correct the rows that cannot be read; {kind_error.fix}", where=unreadable
            )
        return kind_error
    long_answers = sum(error.code == ANSWER_TOO_LONG for error in errors)
    with_images = sum(error.where.what.endswith(HAS_IMAGES) for error in errors)
    errors = sorted(errors, key=lambda error: (error.where.file, error.where.line or 0))
    too_long = [error.where for error in errors if error.code in LENGTH_REASONS]
    invalid = [error for error in errors if error.code not in LENGTH_REASONS]
    long_message = f"{len(too_long)} of {num_read} {role} rows are longer than data.max_length {data.max_length}"
    # only `drop` helps with rows that cannot be shortened
    can_shorten = data.overlong == "refuse" and long_answers + with_images < len(too_long)
    choices = allowed_overlong(selection.data_kind) if can_shorten else ["drop"]
    if len(too_long) == num_read:  # nothing would be left
        choices = [choice for choice in choices if choice != "drop"]
    longest = facts["longest"] if data.overlong == "refuse" else facts.get("longest_dropped", facts["longest"])
    long_fix = f"--data.max_length {longest}"
    long_fix += f", or choose --data.overlong {' or '.join(choices)}" if choices else ""
    if can_shorten and (fixed := long_answers + with_images):
        whys = {"one answer is longer": long_answers, "it has images": with_images}
        why = " or ".join(why for why, number in whys.items() if number)
        long_fix += f" ({fixed} of them can only be dropped: {why})"
    refuse_long = bool(too_long) and data.overlong == "refuse"
    if invalid and data.bad_rows == "refuse":
        codes = {error.code for error in invalid}
        fields = data.model_dump(exclude_defaults=True, exclude={"bad_rows"})
        words = option_words({**{f"data.{name}": value for name, value in fields.items()}, **options})
        command = f"strop check {shlex.join(words)} --fix clean.jsonl"
        some_are_valid = len(errors) < num_read
        write = f", or write the others to a file: `{command}`" if role == "training" and some_are_valid else ""
        correct = f"correct them{write}"
        advice = [FIXES[code] for code in codes if code in FIXES] or [correct]
        fix = "; ".join(sorted(advice))
        if some_are_valid and codes != {"missing-column"}:  # otherwise whole files would be left out
            fix += "; or leave them out with --data.bad_rows drop"
        return DataError(
            f"{len(invalid)} of {num_read} {role} rows cannot be used",
            fix=f"{fix}; and {long_message}: {long_fix}" if refuse_long else fix,
            where=[error.where for error in (errors if refuse_long else invalid)],
        )
    if refuse_long:
        return DataError(long_message, fix=long_fix, where=too_long)
    too_many = len(too_long) > MAX_LOST_SHARE * num_read
    if too_long and data.overlong != "drop" and too_many and data.bad_rows == "refuse":
        return DataError(
            f"{len(too_long)} of {num_read} {role} rows cannot be shortened to data.max_length {data.max_length}",
            fix=long_fix,
            where=too_long,
        )
    if not len(selection.rows):
        fix = long_fix if len(too_long) == num_read else "give more rows"
        if role == "training" and (num_held_out := len(selection.store.row_records)):
            fix = f"data.eval {data.eval} holds out {num_held_out} of them: {fix}, or a file to evaluate on"
        where = [error.where for error in errors]
        return DataError(f"0 of {num_read} {role} rows are left", fix=fix, where=where)
    if role == "training" and selection.classes is not None:
        counts = count_labels(selection.examples, selection.store.labels, selection.classes.names)
        used = [name for name, count in counts.items() if count]
        if len(used) < 2:
            problem = f"the training rows have one label, {used[0]!r}" if used else "no training row has a label"
            return DataError(problem, fix="give rows with at least two labels, such as spam and other")
    if role == "training" and (what := _single_label(selection)):  # KTO needs both labels
        fix = "give rows with both labels"
        if 1 in selection.examples.labels:
            fix += f", or train on these answers with --train.objective sft {_ignore_label(data, facts)}"
        return DataError(what, fix=fix)
    return None


def _ignore_label(data: DataSection, facts: dict[str, Any]) -> str:
    """Return the options that read labelled answers without their label, or what to do if there are none."""
    names = {*facts.get("unlabelled", {}).values()}  # stores of earlier versions have none
    if len(names) != 1:
        return "with copies of the rows without the label"
    columns = ",".join(f"{field}={name}" for field, name in (data.columns or {}).items() if field not in LABELS)
    return f"--data.format {names.pop()}" + (f" --data.columns {shlex.quote(columns)}" if columns else "")


def _check_kind(data: DataSection, facts: dict[str, Any], data_kind: DataKind) -> DataError | None:
    """Return an error if the objective cannot be trained on rows of these formats, else None."""
    names = {
        "pairs": "preference pairs", "labelled": "labelled answers", "prompt": "prompts without answers",
        "classification": "texts with a class", "triplet": "texts that match",
    }  # fmt: skip
    kinds = {file: "pairs" if name in PAIRED else name for file, name in facts["formats"].items()}
    conversations = {*kinds.values()} - names.keys()
    usable = {
        "turns": conversations,
        "pairs": {"pairs"},
        "labels": {"pairs", "labelled"},
        "prompts": (conversations | {"prompt"}) - {"text"},
        "classes": {"classification"},
        "triplets": {"triplet"},
    }[data_kind]
    file, kind = next(((file, kind) for file, kind in kinds.items() if kind not in usable), ("", ""))
    if not kind:
        return None
    what = names.get(kind, f"{kind} rows")
    if data_kind == "turns":
        unknown = "prompt=A,completion=chosen, with your names (messages=chosen if it includes the prompt)"
        fix = {
            # kto labels an answer as good or bad, and an answer in the middle of a ranking would be both
            "pairs": "--train.objective dpo (ipo, orpo, simpo)"
            if facts["formats"][file] == "ranking"
            else "--train.objective dpo (ipo, orpo, simpo, kto), or only the better answers: "
            f"--data.columns {facts.get('chosen', {}).get(file, unknown)}",
            "labelled": "--train.objective kto, or, to learn from good and bad answers alike, "
            + _ignore_label(data, facts),
            "prompt": f"rows with answers: {example_row('turns')}; or --train.objective grpo, or "
            "--train.teacher MODEL, which answers them",
            "classification": "--train.objective classify",
            "triplet": "--train.objective embed",
        }[kind]
        return DataError(f"{file}: {what}, which train.objective sft does not learn from", fix=fix)
    needed = {
        "pairs": "pairs (chosen and rejected)",
        "labels": "answers with a label, or pairs",
        "prompts": "prompts, with reference answers or without",
        "classes": "texts with a label: leave data.format out, or give classification",
        "triplets": "texts that match: leave data.format out, or give triplet",
    }[data_kind]
    objectives = {
        "labelled": "kto", "pairs": "dpo", "prompt": "grpo", "classification": "classify", "triplet": "embed",
    }  # fmt: skip
    fix = f"--train.objective {objectives.get(kind, 'sft')}, or rows such as {example_row(data_kind)}"
    if data_kind == "labels" and "label" in facts["unused"]:
        fix = "--data.format labelled, if 1 in label is good and 0 is bad"
    return DataError(f"{file}: {what}; this objective learns from {needed}", fix=fix)
