"""Account for every row of a data set: its outcome, warnings, and why a run would refuse the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from strop.config.schema import DataSection
from strop.data.batching import pack
from strop.data.formats import PAIRED, find_placeholders
from strop.data.rendering.overlong import allowed_overlong
from strop.data.rendering.render import Renderer
from strop.data.row_errors import FIXES, TOO_LONG, RenderError, RowError
from strop.data.store import Examples, Store
from strop.data.types import Conversation, DataKind, Example, Indices
from strop.errors import DataError, Where

MAX_LOST_SHARE = 0.01  # of the rows that data.overlong may fail to shorten
PADDED_ROWS = 8  # batch size for the padding figure
PACKED_ROWS = 200_000  # rows of a large file that the padding figures use


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of the examples: all of them, the supervised ones, and percentiles of the lengths."""

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
    """The account of a data set."""

    rows: dict[str, int]  # read, used, truncated, split, dropped; read is the sum of the other four
    by_reason: dict[str, int]  # number of dropped rows by reason code
    dropped: list[dict[str, Any]]  # {file, line, reason, what} of each dropped row
    tokens: TokenCounts
    stop_token: dict[str, float]  # rows whose last supervised token is a stop token; share of the rows not dropped
    # within: rows beyond the first with equal content; across: evaluation rows that are also training rows; prompts:
    # evaluation rows whose prompt is also in training rows
    duplicates: dict[str, int]
    padding: dict[str, float]  # shares in batches of 8 rows in file order, and in packs of max_length tokens
    formats: dict[str, str]  # by file
    warnings: list[str]  # sentences on unusual rows
    template: list[str]  # sentences on how the chat template is used
    held_out: int = 0  # rows used for evaluation instead of training
    refusal: DataError | None = None  # why a run would refuse the data
    eval: DataReport | None = None  # the account of the evaluation rows
    # pairs: {pairs, chosen_tokens, rejected_tokens, chosen_longer, length_accuracy (of the better rule of "longer is
    # better" and "shorter is better")}; labels: {desirable, undesirable, and their mean tokens}; prompts: {prompts,
    # right_answers}
    answers: dict[str, Any] = field(default_factory=dict)
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
    """The rows of a store that are used for `role` by an objective of `data_kind`, and their examples."""

    store: Store
    examples: Examples
    rows: Indices
    role: Literal["training", "evaluation"]
    data_kind: DataKind = "turns"
    shared: bool = False  # the rows that were not used are reported with another selection of the same store


def build_report(data: DataSection, renderer: Renderer, selection: Selection) -> DataReport:
    """Return the account of the selected rows."""
    store, examples, rows, role = selection.store, selection.examples, selection.rows, selection.role
    facts = store.facts
    if selection.shared:
        counts = {"read": len(rows), "used": len(rows), "truncated": 0, "split": 0, "dropped": 0}
        num_kept, num_stops, errors, warnings, cut = len(rows), _count_stops(selection, renderer), [], [], []
    else:
        errors = [RowError(code, Where(*where)) for code, *where in facts["faults"]]
        outcomes = {name: int(facts["outcomes"].get(name, 0)) for name in ("used", "truncated", "split", "dropped")}
        counts = {"read": facts["read"], **outcomes}
        num_kept, num_stops = len(store.row_records), facts["stops"]
        warnings = [*renderer.warnings, *_row_warnings(facts)]
        if 0 < facts["thinking"] < facts["chats"]:
            num_without = facts["chats"] - facts["thinking"]
            warnings.append(f"{facts['thinking']} {role} rows have reasoning and {num_without} have none")
        cut = [dict(zip(("how", "file", "line", "what"), record, strict=True)) for record in facts["cut"]]
    assert counts["read"] == sum(counts.values()) - counts["read"], f"rows without an outcome: {counts}"
    digests = store.row_records["digest"][rows]
    repeated = len(digests) - len(np.unique(digests))
    if repeated:
        warnings.append(f"{repeated} {role} rows repeat an earlier one")
    warnings += _label_warnings(selection)
    refusal = _refusal(data, selection, errors, counts)
    return DataReport(
        rows=counts,
        by_reason=dict(Counter(error.code for error in errors).most_common()),
        dropped=[
            {"file": error.where.file, "line": error.where.line, "reason": error.code, "what": error.where.what}
            for error in errors
        ],
        cut=cut,
        tokens=TokenCounts.of(examples.lengths, examples.supervised),
        stop_token={"rows": num_stops, "share": num_stops / num_kept if num_kept else 0.0},
        duplicates={"within": repeated, "across": 0},
        padding=_padding(examples.lengths, data.max_length),
        formats=facts["formats"],
        warnings=warnings,
        template=[*renderer.chat.describe(facts["thinking"], facts["chats"])] if facts["chats"] else [],
        refusal=refusal,
        answers=_answer_statistics(selection) if refusal is None and selection.data_kind != "turns" else {},
    )


def ends_with_stop(example: Example, renderer: Renderer) -> bool:
    """Return whether the last supervised token ends generation."""
    last = int(example.ids[example.weights.nonzero()[0][-1]])
    return last in renderer.stop_ids or last == renderer.tokenizer.eos_token_id


def _count_stops(selection: Selection, renderer: Renderer) -> int:
    """Count the rows that end with a supervised stop token, for pairs in both answers."""
    if selection.data_kind == "prompts":
        return 0
    row_of = selection.store.example_records["row"]
    begins, ends = np.searchsorted(row_of, selection.rows, "left"), np.searchsorted(row_of, selection.rows, "right")
    firsts = begins if selection.data_kind == "pairs" else ends - 1
    return sum(
        all(ends_with_stop(selection.store.example(i), renderer) for i in range(first, end))
        for first, end in zip(firsts.tolist(), ends.tolist(), strict=True)
    )


def _answer_statistics(selection: Selection) -> dict[str, Any]:
    supervised, labels = selection.examples.supervised, selection.examples.labels
    if selection.data_kind == "prompts":
        has_answer = selection.store.row_records["has_answer"][selection.rows]
        return {"prompts": len(selection.rows), "right_answers": int(has_answer.sum())}
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


def _padding(lengths: Indices, max_length: int) -> dict[str, float]:
    """Return the shares of padding in batches in file order and in packs, and the share that packing saves."""
    lengths = lengths[:PACKED_ROWS]
    if not len(lengths):
        return {"batched": 0.0, "packed": 0.0, "saved": 0.0}
    tokens = int(lengths.sum())
    rest = -len(lengths) % PADDED_ROWS
    batches = np.concatenate([lengths, np.zeros(rest, lengths.dtype)]).reshape(-1, PADDED_ROWS)
    batch_rows = np.full(len(batches), PADDED_ROWS)
    batch_rows[-1] -= rest
    batched = 1 - tokens / int((batches.max(axis=1) * batch_rows).sum())
    packs = pack(lengths.tolist(), max(max_length, int(lengths.max())))
    packed = 1 - tokens / (len(packs) * max(int(lengths[group].sum()) for group in packs))
    return {"batched": batched, "packed": packed, "saved": max(0.0, batched - packed)}


def find_row_warnings(
    conversation: Conversation, rendered: list[Example] | RenderError, renderer: Renderer, data_kind: DataKind
) -> Iterator[tuple[str, str]]:
    """Yield what is unusual about a conversation that can be trained on, with an example."""
    turns = (*conversation.messages, *conversation.rejected)
    texts = [message.content for message in turns] or [conversation.text or ""]
    if placeholders := [name for text in texts if "{{" in text for name in find_placeholders(text)]:
        yield "unfilled placeholders", f": {placeholders[0]}"
    if lost := sorted(set().union(*map(renderer.lost_characters, texts))):
        codes = ", ".join(f"U+{ord(character):04X}" for character in lost[:3])
        yield "characters that the tokenizer drops or changes", f": {codes}"
    if any(renderer.control.occurs_in(text) for text in texts):
        yield "control tokens in the text, encoded as plain text", ""
    if not isinstance(rendered, RenderError) and any(example.encoded_separately for example in rendered):
        yield "answers that share a token with the end of the prompt; they are encoded separately, as at inference", ""
    if conversation.messages and conversation.messages[-1].role != "assistant" and data_kind != "prompts":
        yield "messages after the last answer, which are left out", ""
    if names := [*_null_names(conversation)]:
        yield "null arguments or properties of tools, which the datasets library adds for absent names", f": {names[0]}"
    if any(message.reasoning for message in turns) and not renderer.chat.shows_reasoning(turns):
        dropped = renderer.chat.reasoning == "drop"
        why = "data.reasoning drop leaves out" if dropped else "the chat template does not show: it is not trained on"
        yield f"reasoning, which {why}", ""


def _null_names(conversation: Conversation) -> Iterator[str]:
    turns = (*conversation.messages, *conversation.rejected)
    objects = [call["function"]["arguments"] for turn in turns for call in turn.tool_calls]
    schemas = [tool["function"].get("parameters") for tool in conversation.tools]
    objects += [schema.get("properties") for schema in schemas if isinstance(schema, dict)]
    return (name for item in objects if isinstance(item, dict) for name, value in item.items() if value is None)


def _row_warnings(facts: dict[str, Any]) -> list[str]:
    warnings = [f"{count} rows have {note} ({place})" for note, count, place in facts["notes"]]
    if facts["unused"]:
        columns = ", ".join(f"{name} ({count} rows)" for name, count in sorted(facts["unused"].items()))
        warnings.append(f"columns not read: {columns}")
    return warnings + [f"{count} rows of {path} left out by its weight" for path, count in facts["left_out"].items()]


def _label_warnings(selection: Selection) -> list[str]:
    warnings = []
    if selection.role == "evaluation" and (what := _single_label(selection)):
        warnings.append(f"{what}: the evaluation does not measure the other label")
    groups = selection.store.row_records["group"][selection.rows]
    if selection.data_kind == "labels" and len(np.unique(groups)) == 1:
        warnings.append(
            f"all {selection.role} rows have one prompt: the KL estimate in the loss is always 0, because it is "
            "measured on answers to other prompts"
        )
    return warnings


def _single_label(selection: Selection) -> str | None:
    """Return a sentence if all answers have the same label."""
    labels = set(selection.examples.labels.tolist())
    if selection.data_kind != "labels" or labels not in ({0}, {1}):
        return None
    return f"all {selection.role} rows are labelled {'good' if labels == {1} else 'bad'}"


def _refusal(
    data: DataSection, selection: Selection, errors: list[RowError], counts: dict[str, int]
) -> DataError | None:
    """Return why a run would refuse these rows, or None."""
    facts, role, num_read = selection.store.facts, selection.role, counts["read"]
    if wrong_kind := _wrong_kind(facts, selection.data_kind):
        return wrong_kind
    too_long = [error.where for error in errors if error.code == TOO_LONG]
    invalid = [error for error in errors if error.code != TOO_LONG]
    long_message = f"{len(too_long)} of {num_read} {role} rows are longer than data.max_length {data.max_length}"
    choices = allowed_overlong(selection.data_kind)
    long_fix = f"--data.max_length {facts['longest']}, or choose --data.overlong {choices}"
    refuse_long = bool(too_long) and data.overlong == "refuse"
    if invalid and data.bad_rows == "refuse":
        codes = {error.code for error in invalid}
        advice = [FIXES[code] for code in codes if code in FIXES] or ["fix them"]
        fix = f"{'; '.join(sorted(advice))}; or leave such rows out with --data.bad_rows drop"
        return DataError(
            f"{len(invalid)} of {num_read} {role} rows cannot be used",
            fix=f"{fix}; and {long_message}: {long_fix}" if refuse_long else fix,
            where=[error.where for error in (errors if refuse_long else invalid)],
        )
    if refuse_long:
        return DataError(long_message, fix=long_fix, where=too_long)
    too_many_lost = len(too_long) > MAX_LOST_SHARE * num_read
    if too_long and data.overlong != "drop" and too_many_lost and data.bad_rows == "refuse":
        return DataError(
            f"{len(too_long)} of {num_read} {role} rows cannot be shortened to data.max_length {data.max_length}",
            fix="raise --data.max_length, or leave such rows out with --data.overlong drop",
            where=too_long,
        )
    if not len(selection.rows):
        where, fix = [error.where for error in errors], "give more rows"
        if role == "training" and (num_held_out := len(selection.store.row_records)):  # they could be used
            fix = f"data.eval {data.eval} holds out {num_held_out} of them: {fix}, or a file to evaluate on"
        return DataError(f"0 of {num_read} {role} rows are left", fix=fix, where=where)
    if role == "training" and (what := _single_label(selection)):  # KTO learns nothing from one label alone
        fix = "give rows with both labels, or train on good answers only with --train.objective sft"
        return DataError(what, fix=fix)
    return None


def _wrong_kind(facts: dict[str, Any], data_kind: DataKind) -> DataError | None:
    """Return the error for rows of a kind that the objective does not learn from."""
    kinds = {file: "pairs" if name in PAIRED else name for file, name in facts["formats"].items()}
    turns = {*kinds.values()} - {"pairs", "labelled", "prompt"}
    usable = {
        "turns": turns,
        "pairs": {"pairs"},
        "labels": {"pairs", "labelled"},
        "prompts": (turns | {"prompt"}) - {"text"},
    }
    wrong = [(file, kind) for file, kind in kinds.items() if kind not in usable[data_kind]]
    if not wrong:
        return None
    file, kind = wrong[0]
    names = {
        "pairs": "preference pairs",
        "labelled": "answers labelled good or bad",
        "prompt": "prompts without answers",
    }
    what = names.get(kind, f"{kind} rows")
    if data_kind == "turns":
        fix = {
            "pairs": "--train.objective dpo (ipo, orpo, simpo, kto), or only the better answers: "
            "--data.columns prompt=A,completion=chosen, with your names (messages=chosen if it includes the prompt)",
            "labelled": "--train.objective kto, or without the label: "
            "--data.columns prompt=A,completion=B, with your names (or messages=A)",
            "prompt": "--train.objective grpo, or rows with answers: --data.columns prompt=A,completion=B",
        }[kind]
        return DataError(f"{file}: {what}, which train.objective sft does not learn from", fix=fix)
    needed = {
        "pairs": "pairs (chosen and rejected)",
        "labels": "answers with a label, or pairs",
        "prompts": "prompts, with reference answers or without",
    }[data_kind]
    fix = {
        "labelled": "--train.objective kto",
        "pairs": "--train.objective dpo",
        "prompt": "--train.objective grpo",
    }.get(kind, "--train.objective sft, or other data")
    if data_kind == "labels" and "label" in facts["unused"]:
        fix = "--data.format labelled, if 1 in label is good and 0 is bad"
    return DataError(f"{file}: {what}; this objective learns from {needed}", fix=fix)
