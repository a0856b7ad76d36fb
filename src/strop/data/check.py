"""What a person sees of the data: the report, rows as coloured tokens, and a cleaned copy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from strop.config.schema import DataSection
from strop.data import formats
from strop.data.examples import JUDGED, Learning
from strop.data.prepare import Prepared, answers_of, opposed, renderer_for, settle
from strop.data.reading import sources
from strop.data.reading.sources import RowFault
from strop.data.rendering.pairs import render_pairs, render_prompts
from strop.data.rendering.render import Renderer
from strop.data.store import digest, dumps, message_json
from strop.data.types import Conversation, Example, Message, Row
from strop.errors import MAX_SHOWN_PLACES, DataError, FolderError

SUPERVISED, CONTEXT, STOP = "bold green", "dim", "bold reverse green"
VISIBLE = {" ": "·", "\n": "↵\n", "\t": "→   ", "\r": "␍"}


# --- the report --------------------------------------------------------------------------------------------------


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The account as a person reads it. report: DataReport.as_json()."""
    _print_part("train", report, console)
    if report["eval"] is not None:
        _print_part("eval", report["eval"], console)


def _print_part(name: str, report: Mapping[str, Any], console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", min_width=7)
    grid.add_column(overflow="fold")
    rows, tokens = report["rows"], report["tokens"]
    parts = [f"{rows[key]:,} {key}" for key in ("truncated", "split", "dropped") if rows[key]]
    held = [f"{report['held_out']:,} of them held out for evaluation"] if report["held_out"] else []
    grid.add_row(name, Text(", ".join([f"{rows['read']:,} rows read", f"{rows['used']:,} used", *parts, *held])))
    for reason, count in report["by_reason"].items():
        grid.add_row("", Text(f"{count:,} dropped: {reason}", style="red"))
    share = tokens["supervised"] / tokens["all"] if tokens["all"] else 0.0
    grid.add_row("tokens", f"{tokens['all']:,}, of which {tokens['supervised']:,} supervised ({share:.0%})")
    grid.add_row(
        "length", f"half of the rows up to {tokens['p50']:,}, 95 % up to {tokens['p95']:,}, longest {tokens['max']:,}"
    )
    if "prompts" not in report["answers"]:
        grid.add_row("stop", f"{int(report['stop_token']['rows']):,} rows end with a supervised stop token")
    for number, sentence in enumerate(report["template"]):
        grid.add_row("" if number else "template", Text(sentence))
    if compared := report["answers"]:
        grid.add_row("answers", _answers(compared))
    saved = report["padding"]
    grid.add_row("padding", f"{saved['batched']:.0%} in batches of 8 as they come, {saved['packed']:.0%} packed")
    console.print(grid, highlight=False)
    for place in report["dropped"][:MAX_SHOWN_PLACES]:
        at = f"{place['file']}:{place['line']}" if place["line"] else place["file"]
        console.print(Text(f"  {at}: {_safe(place['what'])}", style="red"))
    if len(report["dropped"]) > MAX_SHOWN_PLACES:
        console.print(f"  ... and {len(report['dropped']) - MAX_SHOWN_PLACES:,} more", style="red", highlight=False)
    for warning in report["warnings"]:
        console.print(Text(f"warning: {_safe(warning)}", style="yellow"))
    if report["refusal"] is not None:
        refusal = report["refusal"]
        console.print(Text(f"a run would refuse this: {refusal['message']}: {refusal['fix']}", style="bold red"))


def _answers(compared: Mapping[str, Any]) -> str:
    """Pairs and their lengths, or how many answers were judged good and bad, in a sentence."""
    if "prompts" in compared:
        return f"{compared['prompts']:,} prompts, {compared['right_answers']:,} of them with a right answer"
    if "pairs" not in compared:
        return (
            f"{compared['desirable']:,} judged good ({compared['desirable_tokens']:.0f} tokens in the mean), "
            f"{compared['undesirable']:,} judged bad ({compared['undesirable_tokens']:.0f})"
        )
    return (
        f"{compared['pairs']:,} pairs; chosen {compared['chosen_tokens']:.0f} tokens in the mean, rejected "
        f"{compared['rejected_tokens']:.0f}; the chosen one is longer in {compared['chosen_longer']:.0%}, "
        f"and by length alone {compared['length_accuracy']:.0%} would be right"
    )


# --- rows as tokens ----------------------------------------------------------------------------------------------


def show(prepared: Prepared, num_rows: int, console: Console, *, ids: bool = False) -> None:
    """The first rows as tokens: supervised ones green between ⟦ ⟧, their stop token reversed, blanks visible."""
    console.print(
        Text.assemble(
            ("context", CONTEXT), "  ", ("⟦supervised⟧", SUPERVISED), "  ", ("stop token", STOP), "  · blank  ↵ newline"
        )
    )
    for example in prepared.train[:num_rows]:
        counts = f"{len(example):,} tokens, {example.supervised:,} supervised"
        console.rule(Text(f"{example.file}:{example.line}  {counts}"), align="left")
        console.print(tokens_text(example, prepared.renderer, ids=ids), overflow="fold")


def tokens_text(example: Example, renderer: Renderer, *, ids: bool = False) -> Text:
    """An example as rich text, one piece a token (or a few where these make one character only together)."""
    text, before = Text(), False
    stops = {*renderer.stop_ids, renderer.tokenizer.eos_token_id}
    for piece, numbers, weight in pieces(example, renderer.tokenizer):
        trained = weight > 0
        if trained != before:
            text.append("⟦" if trained else "⟧", SUPERVISED)
        before = trained
        style = (STOP if numbers[-1] in stops else SUPERVISED) if trained else CONTEXT
        text.append(visible(piece), style)
        if trained and weight != 1:
            text.append(f"×{weight:g}", "cyan")
        if ids:
            text.append(f"({','.join(map(str, numbers))})", "cyan")
    if before:
        text.append("⟧", SUPERVISED)
    return text


def pieces(example: Example, tokenizer: Any) -> Iterator[tuple[str, list[int], float]]:
    """Text, ids and weight of one token after the other; tokens that hold parts of one character come together."""
    waiting: list[int] = []
    numbers, weights = example.ids.tolist(), example.weights.tolist()
    for i, number in enumerate(numbers):
        waiting.append(number)
        piece = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        last = i + 1 == len(numbers) or (weights[i + 1] > 0) != (weights[i] > 0)
        if "\ufffd" not in piece or last or len(waiting) >= 4:
            yield piece, waiting, weights[i]
            waiting = []


def visible(text: str) -> str:
    """Blanks as signs, and whatever a terminal would obey as its code."""
    return "".join(VISIBLE.get(sign, _safe(sign)) for sign in text)


def _safe(text: str) -> str:
    return "".join(sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in text)


# --- a cleaned copy ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What `fix` did with a row of the input."""

    file: str
    line: int | None
    change: str


def fix(data: DataSection, tokenizer: Any, out: Path, learning: Learning = "turns") -> list[Change]:
    """Write the usable rows of data.train to `out` as `messages` (or `text`) rows, and each change beside it; pairs as
    `chosen` and `rejected`, judged answers with their `label`. learning: as for prepare.

    Rows that are wrong, repeated, or longer than data.overlong lets them be are dropped, names of roles and columns
    become the usual ones. Changes are returned, and written to OUT.changes.jsonl. Raises FolderError where `out`
    exists, DataError and ModelError as prepare does, and DataError where files give rows of several formats.
    """
    log = out.parent / f"{out.name}.changes.jsonl"
    for path in (out, log):
        if path.exists():
            raise FolderError(f"{path} exists", fix="choose another name; nothing is overwritten")
    renderer = renderer_for(data, tokenizer)
    changes: list[Change] = []
    temp = out.with_name(f".{out.name}.tmp")
    try:
        with temp.open("w", encoding="utf-8", newline="\n") as file:
            for line in _cleaned(data, renderer, changes, learning):
                file.write(line + "\n")
        changes.sort(key=lambda change: (change.file, change.line or 0))
        log.write_text("".join(json.dumps(vars(change), ensure_ascii=False) + "\n" for change in changes), "utf-8")
        temp.replace(out)
    except OSError as fault:
        raise FolderError(f"{out}: {fault.strerror}", fix="choose a folder that can be written to") from fault
    finally:
        temp.unlink(missing_ok=True)
    return changes


def _cleaned(data: DataSection, renderer: Renderer, changes: list[Change], learning: Learning) -> Iterator[str]:
    """The lines of the cleaned copy; changes go to `changes`."""
    bad: list[RowFault] = []
    current: list[Row] = []

    def watched() -> Iterator[Row]:
        whole = data.format == formats.DOCUMENT
        for row in sources.read_rows(
            data.train, encoding=data.encoding, columns=data.columns, bad=bad, documents=whole
        ):
            current[:] = [row]
            yield row

    seen: dict[int, str] = {}
    made = formats.conversations(
        watched(), format=data.format, columns=data.columns, bad=bad, answerless=learning == "prompts"
    )
    render = render_prompts if learning == "prompts" else render_pairs
    judged: dict[int, tuple[str, int]] = {}
    written: set[str] = set()  # the names in each row of the copy
    for conversation in map(renderer.apart, made):
        file, line = conversation.file, conversation.line
        [(_, rendered)] = render(renderer, [conversation])
        kind: Learning = "pairs" if conversation.rejected else learning  # a pair is two judged answers in one row
        _, examples, fault = settle(conversation, rendered, data, renderer, kind)
        if fault is not None:
            changes.append(Change(file, line, f"dropped: {fault.where.what}"))
            continue
        parts = answers_of(conversation) if learning == "labels" else (conversation,)
        shares = [examples] if len(parts) == 1 else [[example] for example in examples]
        found = (opposed(part, share, judged) for part, share in zip(parts, shares, strict=True))
        if learning in JUDGED and (against := next(filter(None, found), None)):
            changes.append(Change(file, line, f"dropped: says the opposite of {against[0]}:{against[1]}"))
            continue
        key = digest(dumps(conversation))
        if key in seen:
            changes.append(Change(file, line, f"dropped: the same as {seen[key]}"))
            continue
        seen[key] = f"{file}:{line}"
        value = _plain(conversation, asks=learning == "prompts" and made.found[file] == "prompt")
        names = {*value} - {"tools"}
        if names != (written := written or names):
            raise DataError(
                f"{file}:{line} is written with {', '.join(sorted(names))}, rows before it with "
                f"{', '.join(sorted(written))}: one file holds rows of one format",
                fix="clean one file after the other, each into a copy of its own",
            )
        if value != current[0].value:
            changes.append(Change(file, line, _rewritten(current[0].value, conversation, made.found[file])))
        yield json.dumps(value, ensure_ascii=False)
    changes += [Change(at.file, at.line, f"dropped: {at.what}") for at in (fault.where for fault in bad)]


def _plain(conversation: Conversation, *, asks: bool) -> dict[str, Any]:
    """The row as `messages`, `text`, or a pair; asks: as a `prompt`."""
    if conversation.text is not None:
        return {"text": conversation.text}
    name = "prompt" if asks else "chosen" if conversation.rejected else "messages"
    value: dict[str, Any] = {name: _turns(conversation.messages)}
    if conversation.rejected:
        value["rejected"] = _turns(conversation.rejected)
    if conversation.desirable is not None:
        value["label"] = conversation.desirable
    return {**value, "tools": list(conversation.tools)} if conversation.tools else value


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    turns = [message_json(message) for message in messages]
    for turn in turns:
        if "tool_calls" in turn:
            turn["tool_calls"] = list(turn["tool_calls"])
    return turns


def _rewritten(value: dict[str, Any], conversation: Conversation, format: str) -> str:
    """How the row of the input differs from what is written."""
    if format != "messages" or not isinstance(value.get("messages"), list):
        return f"{format} row rewritten as {'text' if conversation.text is not None else 'messages'}"
    names = Counter(
        f"{turn['role']} -> {message.role}"
        for turn, message in zip(value["messages"], conversation.messages, strict=False)
        if isinstance(turn, dict) and "role" in turn and turn["role"] != message.role
    )
    return f"roles {', '.join(names)}" if names else "rewritten with the usual names of fields"
