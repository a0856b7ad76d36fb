"""The account of a store: what became of its rows, and why a run would not start on them, if it would not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from strop.config.schema import DataSection
from strop.data.accounting import DataReport, Tokens, padding
from strop.data.examples import Learning, shorter
from strop.data.formats import PAIRED
from strop.data.reading.sources import RowFault
from strop.data.rendering.render import Renderer
from strop.data.row_errors import FIXES
from strop.data.store import Examples, Indices, Store
from strop.data.types import Example
from strop.errors import DataError, Where

TOO_LONG = "too-long"
MAX_LOST_SHARE = 0.01


@dataclass(frozen=True)
class Pass:
    """A store, of which `examples` of `rows` are used for `role` by an objective that learns from `learning`.

    shared: its rows are accounted elsewhere.
    """

    store: Store
    examples: Examples
    rows: Indices
    role: Literal["training", "evaluation"]
    learning: Learning = "turns"
    shared: bool = False


def account(data: DataSection, renderer: Renderer, looked: Pass) -> DataReport:
    """The account of one pass over the data."""
    store, examples, rows, role, shared = looked.store, looked.examples, looked.rows, looked.role, looked.shared
    facts = store.facts
    faults = [] if shared else [RowFault(code, Where(*where)) for code, *where in facts["faults"]]
    outcomes = {name: 0 if shared else int(facts["outcomes"].get(name, 0)) for name in ("used", "truncated", "split")}
    counts = {"read": facts["read"], **outcomes, "dropped": int(facts["outcomes"].get("dropped", 0))}
    if shared:
        counts = {"read": len(rows), "used": len(rows), "truncated": 0, "split": 0, "dropped": 0}
    assert counts["read"] == sum(counts.values()) - counts["read"], f"rows without an outcome: {counts}"
    kept, stops = len(store.row_records), facts["stops"]
    if shared:  # a part of the rows
        kept, stops = len(rows), _stops(looked, renderer)
    digests = store.row_records["digest"][rows]
    within = len(digests) - len(np.unique(digests))
    warnings = [] if shared else [*renderer.warnings, *_warnings(facts)]
    if 0 < facts["thinking"] < facts["chats"] and not shared:
        some, others = facts["thinking"], facts["chats"] - facts["thinking"]
        warnings.append(f"{some} {role} rows have reasoning and {others} have none: each is trained as it is")
    if within:
        warnings.append(f"{within} {role} rows repeat an earlier one")
    warnings += _judgements(looked)
    refusal = _refusal(data, looked, faults, counts)
    compared = _compared(looked) if refusal is None and looked.learning != "turns" else {}
    return DataReport(
        rows=counts,
        by_reason=dict(Counter(fault.code for fault in faults).most_common()),
        dropped=[
            {"file": at.file, "line": at.line, "reason": code, "what": at.what}
            for code, at in ((fault.code, fault.where) for fault in faults)
        ],
        cut=[] if shared else [dict(zip(("how", "file", "line", "what"), one, strict=True)) for one in facts["cut"]],
        tokens=Tokens.of(examples.lengths, examples.supervised),
        stop_token={"rows": stops, "share": stops / kept if kept else 0.0},
        duplicates={"within": within, "across": 0},
        padding=padding(examples.lengths, data.max_length),
        formats=facts["formats"],
        warnings=warnings,
        template=renderer.told(thinking=facts["thinking"], rows=facts["chats"]) if facts["chats"] else [],
        refusal=refusal,
        answers=compared,
    )


def ends_with_stop(example: Example, renderer: Renderer) -> bool:
    """Is the last supervised token one that ends generation?"""
    last = int(example.ids[example.weights.nonzero()[0][-1]])
    return last in renderer.stop_ids or last == renderer.tokenizer.eos_token_id


def _stops(looked: Pass, renderer: Renderer) -> int:
    """How many of the rows end with a supervised stop token; of a pair both answers."""
    if looked.learning == "prompts":
        return 0
    of = looked.store.example_records["row"]
    begins, ends = np.searchsorted(of, looked.rows, "left"), np.searchsorted(of, looked.rows, "right")
    firsts = begins if looked.learning == "pairs" else ends - 1
    return sum(
        all(ends_with_stop(looked.store.example(i), renderer) for i in range(first, end))
        for first, end in zip(firsts.tolist(), ends.tolist(), strict=True)
    )


def _compared(looked: Pass) -> dict[str, Any]:
    """Of pairs: how long both sides are, and what a judge would score that knows lengths alone. Of judged answers: how
    many were judged good and bad. Of prompts: how many have a right answer."""
    supervised, judged = looked.examples.supervised, looked.examples.judged
    if looked.learning == "prompts":
        return {
            "prompts": len(looked.rows),
            "right_answers": int(looked.store.row_records["answered"][looked.rows].sum()),
        }
    if looked.learning == "labels":
        return {
            "desirable": int((judged == 1).sum()),
            "undesirable": int((judged == 0).sum()),
            "desirable_tokens": _mean(supervised[judged == 1]),
            "undesirable_tokens": _mean(supervised[judged == 0]),
        }
    chosen, rejected = supervised[0::2], supervised[1::2]
    longer, equal = float((chosen > rejected).mean()), float((chosen == rejected).mean())
    by_length = longer + equal / 2
    return {
        "pairs": len(chosen),
        "chosen_tokens": float(chosen.mean()),
        "rejected_tokens": float(rejected.mean()),
        "chosen_longer": longer,
        "length_accuracy": max(by_length, 1 - by_length),
    }


def _mean(lengths: Indices) -> float:
    return float(lengths.mean()) if len(lengths) else 0.0


def _warnings(facts: dict[str, Any]) -> list[str]:
    found = [f"{count} rows hold {note} ({place})" for note, count, place in facts["notes"]]
    if facts["unused"]:
        columns = ", ".join(f"{name} ({count} rows)" for name, count in sorted(facts["unused"].items()))
        found.append(f"columns not read: {columns}")
    return found + [f"{count} rows of {path} left out by its weight" for path, count in facts["left_out"].items()]


def _wrong_kind(facts: dict[str, Any], learning: Learning) -> DataError | None:
    """Rows of another kind than the objective learns from."""
    found = {file: "pairs" if name in PAIRED else name for file, name in facts["formats"].items()}
    turns = {*found.values()} - {"pairs", "labelled", "prompt"}
    fits = {
        "turns": turns, "pairs": {"pairs"}, "labels": {"pairs", "labelled"}, "prompts": (turns | {"prompt"}) - {"text"}
    }  # fmt: skip
    wrong = [(file, kind) for file, kind in found.items() if kind not in fits[learning]]
    if not wrong:
        return None
    file, kind = wrong[0]
    names = {
        "pairs": "preference pairs", "labelled": "answers that were judged good or bad", "prompt": "prompts alone"
    }  # fmt: skip
    what = names.get(kind, f"{kind} rows")
    if learning == "turns":
        fix = {
            "pairs": "--train.objective dpo (ipo, orpo, simpo, kto), or the better answers alone: "
            "--data.columns prompt=A,completion=chosen, with your names (messages=chosen if it holds the prompt)",
            "labelled": "--train.objective kto, or without the label: "
            "--data.columns prompt=A,completion=B, with your names (or messages=A)",
            "prompt": "--train.objective grpo, or rows with answers: --data.columns prompt=A,completion=B",
        }[kind]
        return DataError(f"{file}: {what}, which train.objective sft does not learn from", fix=fix)
    needs = {
        "pairs": "pairs (chosen and rejected)", "labels": "answers with a label, or pairs",
        "prompts": "prompts, with right answers or without",
    }[learning]  # fmt: skip
    fix = {
        "labelled": "--train.objective kto",
        "pairs": "--train.objective dpo",
        "prompt": "--train.objective grpo",
    }.get(kind, "--train.objective sft, or other data")
    if learning == "labels" and "label" in facts["unused"]:
        fix = "--data.format labelled, where 1 in label is good and 0 is bad"
    return DataError(f"{file}: {what}; this objective learns from {needs}", fix=fix)


def _one_kind(looked: Pass) -> str | None:
    """That all answers were judged alike, where an objective learns from judgements."""
    judged = set(looked.examples.judged.tolist())
    if looked.learning != "labels" or judged not in ({0}, {1}):
        return None
    return f"all {looked.role} rows are judged {'good' if judged == {1} else 'bad'}"


def _judgements(looked: Pass) -> list[str]:
    """What is odd about judged answers, though they can be trained or evaluated on."""
    found = []
    if looked.role == "evaluation" and (what := _one_kind(looked)):
        found.append(f"{what}: the evaluation says nothing of the other kind")
    if looked.learning == "labels" and len(np.unique(looked.store.row_records["group"][looked.rows])) == 1:
        found.append(
            f"all {looked.role} rows have one prompt: the divergence in the loss is 0 throughout, since it is measured "
            "on answers to other prompts"
        )
    return found


def _refusal(data: DataSection, looked: Pass, faults: list[RowFault], counts: dict[str, int]) -> DataError | None:
    """Why a run would not start on these rows, if it would not."""
    facts, role, num_left = looked.store.facts, looked.role, len(looked.rows)
    if wrong := _wrong_kind(facts, looked.learning):
        return wrong
    long = [fault for fault in faults if fault.code == TOO_LONG]
    bad = [fault for fault in faults if fault.code != TOO_LONG]
    places = [fault.where for fault in long]
    said = f"{len(long)} of {counts['read']} {role} rows are longer than data.max_length {data.max_length}"
    cut = f"--data.max_length {facts['longest']}, or choose --data.overlong {shorter(looked.learning)}"
    refused = bool(long) and data.overlong == "refuse"
    if bad and data.bad_rows == "refuse":
        codes = {fault.code for fault in bad}
        advice = [FIXES[code] for code in codes if code in FIXES] or ["mend them"]
        fix = f"{'; '.join(sorted(advice))}; or leave such rows out with --data.bad_rows drop"
        return DataError(
            f"{len(bad)} of {counts['read']} {role} rows cannot be used",
            fix=f"{fix}; and {said}: {cut}" if refused else fix,
            where=[fault.where for fault in (faults if refused else bad)],
        )
    if refused:
        return DataError(said, fix=cut, where=places)
    if long and data.overlong != "drop" and len(long) > MAX_LOST_SHARE * counts["read"] and data.bad_rows == "refuse":
        return DataError(
            f"{len(long)} of {counts['read']} {role} rows cannot be brought down to data.max_length {data.max_length}",
            fix="raise --data.max_length, or leave such rows out with --data.overlong drop",
            where=places,
        )
    if not num_left:
        where, fix = [fault.where for fault in faults], "give more rows"
        if role == "training" and (held := len(looked.store.row_records)):  # they could be used
            fix = f"data.eval {data.eval} holds out {held} of them: {fix}, or a file to evaluate on"
        return DataError(f"0 of {counts['read']} {role} rows are left", fix=fix, where=where)
    if role == "training" and (what := _one_kind(looked)):  # one of them alone teaches KTO nothing
        fix = "give rows of both kinds, or train on good answers alone with --train.objective sft"
        return DataError(what, fix=fix)
    return None


# ---- from strop.data.report ----
"""The accounting of a data set: what became of every row, and what will be trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from strop.data.batching import pack
from strop.data.store import Indices
from strop.errors import DataError

PADDED_ROWS = 8  # the batch whose padding packing is compared to
PACKED_ROWS = 200_000  # rows of a large file that the comparison looks at


@dataclass(frozen=True)
class Tokens:
    """Tokens of the examples: all of them, the supervised ones, and lengths."""

    all: int
    supervised: int
    p50: int
    p95: int
    max: int
    examples: int

    @classmethod
    def of(cls, lengths: Indices, supervised: Indices) -> Tokens:
        if not len(lengths):
            return cls(0, 0, 0, 0, 0, 0)
        p50, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf")
        total, trained = int(lengths.sum()), int(supervised.sum())
        return cls(total, trained, int(p50), int(p95), int(lengths.max()), len(lengths))


@dataclass(frozen=True)
class DataReport:
    """Rows as read, used, truncated, split, dropped: read is the sum of the other four.

    dropped: {file, line, reason, what} of each. cut: {how, file, line, what} of each that was truncated or split.
    held_out: rows used that are for evaluation, not training.
    stop_token: rows whose last supervised token is a stop token, and their share of the rows not dropped.
    duplicates: within (rows beyond the first of equal content), across (eval rows that are also train rows), prompts
    (eval rows whose prompt train rows have too).
    padding: shares of padding in batches of 8 rows in the file's order and in packs of max_length tokens.
    template: sentences on how the chat template was used. refusal: why a run would not start on this.
    answers: of pairs {pairs, chosen_tokens, rejected_tokens, chosen_longer, length_accuracy}, the last what the better
    of "longer is better" and "shorter is better" scores; of judged answers {desirable, undesirable, and their tokens}.
    """

    rows: dict[str, int]
    by_reason: dict[str, int]
    dropped: list[dict[str, Any]]
    tokens: Tokens
    stop_token: dict[str, float]
    duplicates: dict[str, int]
    padding: dict[str, float]
    formats: dict[str, str]
    warnings: list[str]
    template: list[str]
    held_out: int = 0
    refusal: DataError | None = None
    eval: DataReport | None = None
    answers: dict[str, Any] = field(default_factory=dict)
    cut: list[dict[str, Any]] = field(default_factory=list)

    @property
    def would_refuse(self) -> bool:
        return self.refusal is not None or (self.eval is not None and self.eval.would_refuse)

    def as_json(self) -> dict[str, Any]:
        """With the field names of `strop check --json`."""
        return {
            "rows": self.rows,
            "by_reason": self.by_reason,
            "dropped": self.dropped,
            "cut": self.cut,
            "tokens": vars(self.tokens),
            "stop_token": self.stop_token,
            "duplicates": self.duplicates,
            "padding": self.padding,
            "formats": self.formats,
            "warnings": self.warnings,
            "template": self.template,
            "held_out": self.held_out,
            "answers": self.answers,
            "would_refuse": self.would_refuse,
            "refusal": self.refusal.as_json() if self.refusal else None,
            "eval": self.eval.as_json() if self.eval else None,
        }


def padding(lengths: Indices, max_length: int) -> dict[str, float]:
    """Shares of padding: in batches in order, in packs, and what packing saves."""
    lengths = lengths[:PACKED_ROWS]
    if not len(lengths):
        return {"batched": 0.0, "packed": 0.0, "saved": 0.0}
    tokens = int(lengths.sum())
    rest = -len(lengths) % PADDED_ROWS
    batches = np.concatenate([lengths, np.zeros(rest, lengths.dtype)]).reshape(-1, PADDED_ROWS)
    in_batch = np.full(len(batches), PADDED_ROWS)
    in_batch[-1] -= rest
    batched = 1 - tokens / int((batches.max(axis=1) * in_batch).sum())
    packs = pack(lengths.tolist(), max(max_length, int(lengths.max())))
    packed = 1 - tokens / (len(packs) * max(int(lengths[group].sum()) for group in packs))
    return {"batched": batched, "packed": packed, "saved": max(0.0, batched - packed)}


# ---- from strop.data.row_warnings ----
"""What is odd about rows that can be trained on: for the account's warnings."""

from __future__ import annotations

from collections.abc import Iterator

from strop.data import formats
from strop.data.examples import Learning
from strop.data.rendering.render import Renderer, RenderError
from strop.data.types import Conversation, Example


def notes_of(
    conversation: Conversation, rendered: list[Example] | RenderError, renderer: Renderer, learning: Learning
) -> Iterator[tuple[str, str]]:
    """What is odd about a conversation, though it can be trained on, and an example of it."""
    turns = (*conversation.messages, *conversation.rejected)
    texts = [message.content for message in turns] or [conversation.text or ""]
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
    if not isinstance(rendered, RenderError) and any(example.parted for example in rendered):
        yield "answers that would share a token with the prompt's end, encoded apart from it, as serving does", ""
    said = conversation.messages
    if said and said[-1].role != "assistant" and learning != "prompts":
        yield "turns behind the last answer, which are left out", ""
    if names := [*_null_names(conversation)]:
        yield "null arguments or properties of tools, which datasets writes for names that are absent", f": {names[0]}"
    if any(message.reasoning for message in turns) and not renderer.chat.thinks(turns):
        choice = renderer.chat.reasoning == "drop"
        why = "data.reasoning drop leaves out" if choice else "the chat template does not show: it is not trained on"
        yield f"reasoning, which {why}", ""


def _null_names(conversation: Conversation) -> Iterator[str]:
    turns = (*conversation.messages, *conversation.rejected)
    calls = (call for turn in turns for call in turn.tool_calls)
    held = [call["function"]["arguments"] for call in calls]
    shapes = [tool["function"].get("parameters") for tool in conversation.tools]
    held += [shape.get("properties") for shape in shapes if isinstance(shape, dict)]
    return (name for one in held if isinstance(one, dict) for name, value in one.items() if value is None)
