"""Print the data report and rows as coloured tokens, and write a cleaned copy of the rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, repeat
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from strop.config.names import use_short_forms
from strop.config.schema import DataSection
from strop.data import formats
from strop.data.images import FIRST_IMAGE_ID
from strop.data.prepare import (
    JUDGED_KINDS,
    RENDER,
    Judgements,
    LabelChecker,
    Prepared,
    decide_outcome,
    find_contradiction,
    renderer_for,
    split_pair,
)
from strop.data.reading import sources
from strop.data.rendering.image_encoder import image_encoder
from strop.data.rendering.render import Renderer, render_pairs
from strop.data.row_errors import RowError
from strop.data.store import digest, dump_conversation, message_json
from strop.data.types import Conversation, DataKind, Example, Image, Row
from strop.errors import FIX, MAX_SHOWN_LOCATIONS, DataError, FolderError
from strop.runs.events import count_used

SUPERVISED, CONTEXT, STOP, IMAGE = "bold green", "dim", "bold reverse green", "cyan"  # styles of tokens
VISIBLE = {" ": "·", "\n": "↵\n", "\t": "→   ", "\r": "␍"}


def print_report(report: Mapping[str, Any], console: Console, *, tokenizer: str = "", is_copied: bool = False) -> None:
    """Print the result of DataReport.as_json(). tokenizer: the model whose tokenizer counts the tokens, if shown.

    is_copied: a cleaned copy is written, which is the fix for a refusal, so no other is printed.
    """
    refusal = report["refusal"] and {**report["refusal"], "fix": None if is_copied else report["refusal"]["fix"]}
    _print_part("train", {**report, "refusal": refusal}, console, tokenizer)
    if report["eval"] is not None:
        _print_part("eval", report["eval"], console)


def _print_part(name: str, report: Mapping[str, Any], console: Console, tokenizer: str = "") -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", min_width=7)
    grid.add_column(overflow="fold")
    rows, tokens = report["rows"], report["tokens"]
    shortened = ", ".join(f"{rows[key]:,} of them {key}" for key in ("truncated", "split") if rows[key])
    parts = [f"{rows['read']:,} rows read", f"{count_used(rows):,} used{shortened and f' ({shortened})'}"]
    parts += [f"{rows['dropped']:,} dropped"] if rows["dropped"] else []
    parts += [f"{report['held_out']:,} of them held out for evaluation"] if report["held_out"] else []
    grid.add_row(name, Text(", ".join(parts)))
    for reason, count in report["by_reason"].items():
        grid.add_row("", Text(f"{count:,} dropped: {reason}", style="red"))
    if names := _describe_formats(report["formats"]):
        grid.add_row("format", Text(names + (f", with the tokenizer of {tokenizer}" if tokenizer else "")))
    share = tokens["supervised"] / tokens["all"] if tokens["all"] else 0.0
    trained = f", of which {tokens['supervised']:,} supervised ({share:.0%})"
    grid.add_row("tokens", f"{tokens['all']:,}{' in prompts' if 'prompts' in report['answers'] else trained}")
    grid.add_row("length", f"median {tokens['p50']:,}, 95th percentile {tokens['p95']:,}, longest {tokens['max']:,}")
    if not {"prompts", "classes", "triplets"} & report["answers"].keys():
        stops = int(report["stop_token"]["rows"])
        unit = "rows" if stops <= rows["read"] else "conversations"  # a row may have several
        subject = f"1 {unit.removesuffix('s')} ends" if stops == 1 else f"{stops:,} {unit} end"
        grid.add_row("stop", f"{subject} with a stop token that is trained on")
    for i, sentence in enumerate(report["template"]):
        grid.add_row("" if i else "template", Text(sentence))
    if answers := report["answers"]:
        grid.add_row("texts" if "triplets" in answers else "answers", _describe_answers(answers))
    grid.add_row("padding", f"{report['padding']['batched']:.0%} in batches of 8, which packing avoids")
    console.print(grid, highlight=False)
    if classes := report["answers"].get("classes"):
        _print_classes(classes, console)
    same: dict[tuple[str, str], list[int | None]] = {}  # lines by file and error
    for row in report["dropped"]:
        same.setdefault((row["file"], row["what"]), []).append(row["line"])
    for (file, what), lines in list(same.items())[:MAX_SHOWN_LOCATIONS]:
        console.print(Text(f"  {file}{_list_lines(lines)}: {_escape(what)}", style="red"))
    if others := sum(map(len, list(same.values())[MAX_SHOWN_LOCATIONS:])):
        console.print(f"  ... and {others:,} more", style="red", highlight=False)
    for warning in report["warnings"]:
        console.print(Text(f"warning: {_escape(warning)}", style="yellow"))
    if refusal := report["refusal"]:
        for line in (f"error: {refusal['message']}", *([f"{FIX}{refusal['fix']}"] if refusal["fix"] else [])):
            console.print(Text(use_short_forms(line), style="red"))


def _list_lines(lines: Sequence[int | None]) -> str:
    """Return the numbers of lines as they follow the name of a file. None: the whole file."""
    numbers = [str(line) for line in lines if line]
    more = f" and {len(numbers) - MAX_SHOWN_LOCATIONS:,} more" if len(numbers) > MAX_SHOWN_LOCATIONS else ""
    return f":{', '.join(numbers[:MAX_SHOWN_LOCATIONS])}{more}" if numbers else ""


def _describe_formats(names: Mapping[str, str]) -> str:
    """Return the format of all files, or which files have each. names: format by file."""
    files: dict[str, list[str]] = {}
    for file, name in names.items():
        files.setdefault(name, []).append(file)
    if len(files) == 1:
        return next(iter(files))
    return ", ".join(f"{name} ({', '.join(paths[:3])}{', ...' * (len(paths) > 3)})" for name, paths in files.items())


def _print_classes(counts: Mapping[str, int], console: Console) -> None:
    table, total = Table("class", "rows", "share"), max(1, sum(counts.values()))
    for name, count in counts.items():
        table.add_row(Text(_escape(name)), f"{count:,}", f"{count / total:.1%}")
    console.print(table)


def _describe_answers(answers: Mapping[str, Any]) -> str:
    if "classes" in answers:
        several = ", several per text" if answers["several"] else ""
        without = f", {answers['without_label']:,} texts without a label" if answers["without_label"] else ""
        return f"{len(answers['classes'])} classes{several}{without}"
    if "triplets" in answers:
        return f"{answers['triplets']:,} pairs of texts that match, with {answers['negatives']:,} negatives"
    if "prompts" in answers:
        return f"{answers['prompts']:,} prompts, {answers['right_answers']:,} of them with a reference answer"
    if "pairs" not in answers:
        return (
            f"{answers['desirable']:,} labelled good (mean {answers['desirable_tokens']:.0f} tokens), "
            f"{answers['undesirable']:,} labelled bad (mean {answers['undesirable_tokens']:.0f})"
        )
    return (
        f"{answers['pairs']:,} pairs; chosen mean {answers['chosen_tokens']:.0f} tokens, rejected mean "
        f"{answers['rejected_tokens']:.0f}; chosen is longer in {answers['chosen_longer']:.0%}; "
        f"length alone would predict {answers['length_accuracy']:.0%}"
    )


def print_examples(prepared: Prepared, num_rows: int, console: Console, *, ids: bool = False) -> None:
    """Print the tokens of the first rows: supervised tokens green in ⟦ ⟧, stop tokens reversed, white space visible.

    A row that is repeated by its file's weight is shown once.
    """
    repeats = groupby(enumerate(prepared.train), key=lambda x: (x[1].file, x[1].line, x[1].ids.tobytes()))
    shown = dict(next(examples) for _, examples in islice(repeats, num_rows))
    parts = [prepared.train.part(i) for i in shown]
    print_tokens([*shown.values()], prepared.renderer, console, ids=ids, parts=parts)


def print_tokens(
    examples: Sequence[Example], renderer: Renderer, console: Console, *, ids: bool = False, parts: Sequence[str] = (),
) -> None:  # fmt: skip
    """Print the tokens of examples; see `print_examples`. parts: what each example is in its row, see Examples.part."""
    marks = ("⟦supervised⟧", SUPERVISED), "  ", ("stop token", STOP), "  · blank  ↵ newline"
    console.print(Text.assemble(("context", CONTEXT), "  ", *marks))
    for example, part in zip(examples, parts or [""] * len(examples), strict=True):
        counts = f"{len(example):,} tokens, {example.supervised:,} supervised" + f", {part}" * bool(part)
        title = f"{example.file}:{example.line}  {counts}"
        too_long = len(title) - (console.width - 2)  # a rule cuts the end, which has the numbers
        console.rule(Text(f"…{title[too_long + 1 :]}" if too_long > 0 else title), align="left")
        # with soft wrap, Rich would cut lines that are to be folded
        overflow: Literal["ignore", "fold"] = "ignore" if console.soft_wrap else "fold"
        console.print(format_tokens(example, renderer, ids=ids), overflow=overflow)


def format_tokens(example: Example, renderer: Renderer, *, ids: bool = False) -> Text:
    """Return the tokens of an example as styled text. ids: append token ids."""
    text, stops = Text(), {*renderer.stop_ids, renderer.tokenizer.eos_token_id}
    for supervised, pieces in groupby(split_tokens(example, renderer.tokenizer), key=lambda piece: piece[2] > 0):
        text.append("⟦" if supervised else "", SUPERVISED)
        for piece, token_ids, weight in pieces:
            if token_ids[0] >= FIRST_IMAGE_ID:
                text.append(piece, IMAGE)
                continue
            style = (STOP if token_ids[-1] in stops else SUPERVISED) if supervised else CONTEXT
            text.append(make_visible(piece), style)
            if supervised and weight != 1:
                text.append(f"×{weight:g}", "cyan")
            if ids:
                text.append(f"({','.join(map(str, token_ids))})", "cyan")
        text.append("⟧" if supervised else "", SUPERVISED)
    return text


def split_tokens(example: Example, tokenizer: Any) -> Iterator[tuple[str, list[int], float]]:
    """Yield text, ids and weight of each token. Those of an image, or of parts of one character, are joined."""
    pending: list[int] = []
    ids, weights = example.ids.tolist(), example.weights.tolist()
    marks = {
        begin: (end, f"[image {image.width}x{image.height}, {tokens:,} tokens]")
        for begin, end, image, tokens in find_images(example, tokenizer)
    }
    image_end = 0
    for i, token in enumerate(ids):
        if i in marks:
            image_end, text = marks[i]
            yield text, ids[i:image_end], 0.0
        if i < image_end:
            continue
        pending.append(token)
        piece = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        is_last = i + 1 == len(ids) or (weights[i + 1] > 0) != (weights[i] > 0)
        if "\ufffd" not in piece or is_last or len(pending) >= 4:
            yield piece, pending, weights[i]
            pending = []


def find_images(example: Example, tokenizer: Any) -> Iterator[tuple[int, int, Image, int]]:
    """Yield first token, end, description and number of features of each image, whose parts may be apart."""
    encoder = image_encoder(tokenizer)
    places = (example.ids >= FIRST_IMAGE_ID).nonzero()[0].tolist()
    if encoder is None or not places:
        return
    table, begin = encoder.table, 0
    while begin < len(places):
        number = table.find(int(example.ids[places[begin]]))
        end = begin + table.tokens(number)
        yield places[begin], places[end - 1] + 1, table.images[number], end - begin
        begin = end


def make_visible(text: str) -> str:
    """Replace white space with visible symbols, and escape control characters."""
    return "".join(VISIBLE.get(character, _escape(character)) for character in text)


def _escape(text: str) -> str:
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


@dataclass(frozen=True)
class Change:
    file: str
    line: int | None
    change: str


def write_cleaned_copy(
    data: DataSection, tokenizer: Any, out: Path, data_kind: DataKind = "turns", labels: Sequence[str] | None = None
) -> list[Change]:
    """Write the usable rows of data.train to `out`, and the changes to OUT.changes.jsonl.

    Rows are written in the formats `messages`, `text`, `classification`, `triplet`, `preference`, `labelled` or
    `prompt`, with standard names of roles and columns. Rows that are invalid, repeated, or too long for data.overlong
    are dropped. Returns the changes, in order of file and line. Raises the errors of `prepare`, DataError also for
    rows of several formats, and FolderError if `out` exists or cannot be written.
    """
    log = out.parent / f"{out.name}.changes.jsonl"
    for path in (out, log):
        if path.exists():
            raise FolderError(f"{path} exists", fix="choose another name; nothing is overwritten")
    renderer = renderer_for(data, tokenizer)
    changes: list[Change] = []
    temp, num_rows = out.with_name(f".{out.name}.tmp"), 0
    try:
        with temp.open("w", encoding="utf-8", newline="\n") as file:
            for line in _clean_rows(data, renderer, changes, data_kind, LabelChecker(labels)):
                file.write(line + "\n")
                num_rows += 1
        if not num_rows:
            raise DataError(f"no row is usable, so {out} was not written", fix="correct the rows that are listed")
        changes.sort(key=lambda change: (change.file, change.line or 0))
        log.write_text("".join(json.dumps(vars(change), ensure_ascii=False) + "\n" for change in changes), "utf-8")
        temp.replace(out)
    except OSError as error:
        raise FolderError(f"{out}: {error.strerror}", fix="choose a folder that can be written to") from error
    finally:
        temp.unlink(missing_ok=True)
    return changes


def _clean_rows(
    data: DataSection, renderer: Renderer, changes: list[Change], data_kind: DataKind, checker: LabelChecker
) -> Iterator[str]:
    """Yield the rows of the copy as JSON, and append the changes to `changes`."""
    errors: list[RowError] = []
    current: list[Row] = []  # the row that was read last

    def remember(row: Row) -> Row:
        current[:] = [row]
        return row

    documents, columns = data.format == formats.DOCUMENT, data.columns
    rows = sources.read_rows(data.train, encoding=data.encoding, columns=columns, errors=errors, documents=documents)
    reader = formats.ConversationReader(
        map(remember, rows), format=data.format, columns=columns, errors=errors, data_kind=data_kind,
        image_folder=data.image_folder,
    )  # fmt: skip
    render = RENDER.get(data_kind, render_pairs)
    judgements: Judgements = {}
    locations: dict[int, str] = {}  # hash of a conversation -> its first location
    columns_written: set[str] = set()
    for conversation in map(renderer.separate_reasoning, reader):
        file, line = conversation.file, conversation.line
        [(_, rendered)] = render(renderer, [conversation])
        kind: DataKind = "pairs" if conversation.rejected else data_kind  # for labels, a pair is two labelled answers
        _, examples, error = decide_outcome(conversation, rendered, data, renderer, kind)
        error = error or checker.check(conversation)
        if error is not None:
            changes.append(Change(file, line, f"dropped: {error.where.what}"))
            continue
        if data_kind in JUDGED_KINDS:
            parts = split_pair(conversation) if data_kind == "labels" else (conversation,)
            part_examples = [examples] if len(parts) == 1 else [[example] for example in examples]
            checks = map(find_contradiction, parts, part_examples, repeat(judgements))
            if contradicted := next(filter(None, checks), None):
                changes.append(Change(file, line, f"dropped: contradicts {contradicted[0]}:{contradicted[1]}"))
                continue
        key, location = digest(dump_conversation(conversation)), f"{file}:{line}"
        if locations.setdefault(key, location) != location:  # a row that the weight of its file repeats stays repeated
            changes.append(Change(file, line, f"dropped: the same as {locations[key]}"))
            continue
        value = _to_row(conversation, as_prompt=data_kind == "prompts" and reader.formats[file] == "prompt")
        row_columns = {*value} - {"tools"}
        if row_columns != (columns_written := columns_written or row_columns):
            raise DataError(
                f"{file}:{line} is written with {', '.join(sorted(row_columns))}, rows before it with "
                f"{', '.join(sorted(columns_written))}: a file must have rows of one format",
                fix="clean each file separately, into a separate copy",
            )
        if value != current[0].value:
            changes.append(Change(file, line, _describe_change(current[0].value, conversation, reader.formats[file])))
        yield json.dumps(value, ensure_ascii=False)
    changes += [Change(error.where.file, error.where.line, f"dropped: {error.where.what}") for error in errors]


def _to_row(conversation: Conversation, *, as_prompt: bool) -> dict[str, Any]:
    label = {"label": conversation.label} if conversation.label is not None else {}
    if conversation.passages:
        positive, *negatives = conversation.passages
        return {"anchor": conversation.text, "positive": positive, "negatives": negatives}
    if conversation.text is not None:
        return {"text": conversation.text, **label}
    name = "prompt" if as_prompt else "chosen" if conversation.rejected else "messages"
    value: dict[str, Any] = {name: [*map(message_json, conversation.messages)], **label}
    if conversation.rejected:
        value["rejected"] = [*map(message_json, conversation.rejected)]
    if conversation.desirable is not None:
        value["label"] = conversation.desirable
    return {**value, "tools": list(conversation.tools)} if conversation.tools else value


def _describe_change(value: dict[str, Any], conversation: Conversation, format: str) -> str:
    if format != "messages" or not isinstance(value.get("messages"), list):
        form = "anchor" if conversation.passages else "text" if conversation.text is not None else "messages"
        return f"{format} row rewritten as {form}"
    roles = Counter(
        f"{turn['role']} -> {message.role}"
        for turn, message in zip(value["messages"], conversation.messages, strict=False)
        if isinstance(turn, dict) and "role" in turn and turn["role"] != message.role
    )
    return f"roles {', '.join(roles)}" if roles else "rewritten with the standard field names"
