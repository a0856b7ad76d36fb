"""Split a recipe's rows into training, selection and test rows."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.config.load import Resolved
from strop.config.schema import DataSection
from strop.data.formats import DOCUMENT, ConversationReader, image_folder
from strop.data.reading import sources
from strop.data.reading.in_memory import to_json
from strop.data.row_errors import RowError
from strop.data.store import digest, dump_conversation
from strop.data.types import TEXT_KINDS, Conversation, DataKind, Row
from strop.errors import DataError, FolderError, Location, RecipeError
from strop.evaluation.run import read_scorable_rows
from strop.models.source import locate
from strop.models.tokenizer import check_template, load_tokenizer
from strop.objectives.table import data_kind_of, prepare_rows
from strop.runs.folder import cache_folder, write_atomic
from strop.runs.lock import sha256_file, sha256_text

DEFAULT_SHARE = "15%"
FEW_ROWS, MIN_ROWS = 30, 10  # selection or test rows below which a sweep warns, and refuses
MAX_PERCENT = 45  # largest share that an error suggests for one part, because the other part and training need rows
PARTS = ("train", "selection", "test")


@dataclass(frozen=True)
class Split:
    """The files of each part, and the number of rows in it."""

    files: Mapping[str, list[str]]
    rows: Mapping[str, int]
    notes: list[str]
    hash: str  # of the content of the files
    labels: list[str] | None = None  # the classes of all texts to classify; a part may lack a rare one
    image_folder: str | None = None  # in which the paths of images start, if it is not that of these files

    def as_json(self) -> dict[str, Any]:
        names = {name: [Path(file).name for file in self.files[name]] for name in PARTS}  # the folder may be moved
        parts = {name: {"rows": self.rows[name], "files": names[name]} for name in PARTS}
        more = {"notes": self.notes, "hash": self.hash, "labels": self.labels, "image_folder": self.image_folder}
        return {**parts, **more}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], folder: Path) -> Split:
        """Return the split whose files are in a folder. Raises FolderError if they have changed."""
        files = {name: [str(folder / file) for file in value[name]["files"]] for name in PARTS}
        if _hash_files(files) != value["hash"]:
            raise FolderError(
                f"{folder}: has changed since the sweep was started", fix="restore it, or start a new sweep"
            )
        rows = {name: value[name]["rows"] for name in PARTS}
        return cls(files, rows, [*value["notes"]], value["hash"], value["labels"], value.get("image_folder"))


@dataclass(frozen=True)
class Part:
    """A row as it was read, its format, and its first conversation."""

    row: Row
    format: str
    conversation: Conversation

    @property
    def group(self) -> bytes:
        """The prompt: rows with the same prompt are in the same part."""
        return dump_conversation(self.conversation.prompt)


def split_rows(resolved: Resolved, folder: Path, *, selection: str | None, test: str | None, metric: str) -> Split:
    """Check all rows, and write those of each part to `folder`, as JSON Lines in their original format.

    Groups of rows with the same prompt are assigned by a hash of the prompt and the seed, so that further rows do not
    move others. A selection or test row that repeats another one is left out: it would make intervals too narrow.

    Args:
        resolved: the recipe, whose data.eval may give the selection rows.
        folder: the folder to write.
        selection: a share of the rows, such as "15%", or a file, instead of data.eval. Default: data.eval, or 15 %.
        test: the same for the test rows.
        metric: scores the selection and test rows.

    Raises:
        DataError: If rows are invalid, cannot be scored, or are too few.
    """
    recipe, data = resolved.recipe, resolved.recipe.data
    kind = data_kind_of(recipe.train)
    specs = {"selection": selection or data.eval or DEFAULT_SHARE, "test": test or DEFAULT_SHARE}
    shares = {name: _read_share(name, spec) for name, spec in specs.items()}
    if sum(share or 0 for share in shares.values()) >= 1:
        raise RecipeError("--selection and --test: no rows are left for training", fix="choose smaller shares")
    labels = _check_training_rows(resolved)
    parts: dict[str, list[Part]] = {name: [] for name in PARTS}
    for part in _read_parts(data.train, data, kind):
        parts[_choose_part(part.group, recipe.seed, shares)].append(part)
    num_rows = sum(map(len, parts.values()))
    for name, spec in specs.items():
        if shares[name] is None:
            parts[name] = list(_read_parts(spec, data, kind))
    for name in specs:
        first_of_each = {dump_conversation(part.conversation): part for part in reversed(parts[name])}
        parts[name] = [*first_of_each.values()][::-1]
    notes = _check_compared({name: parts[name] for name in specs}, num_rows, shares)
    if selection is not None and data.eval is not None:
        notes.append(f"data.eval {data.eval} is not used: --selection {selection} gives the selection rows")
    if not parts["train"]:
        fix = "give --selection and --test files"
        raise DataError("no rows are left for training: all have the same prompt", fix=fix)
    trained, selected = ({part.group for part in parts[name]} for name in ("train", "selection"))
    for name in ("selection", "test"):
        if repeated := sum(part.group in trained for part in parts[name]):
            notes.append(f"{repeated} {name} rows have the prompt of a training row, so their scores may be too high")
    if repeated := sum(part.group in selected for part in parts["test"]):
        notes.append(f"{repeated} test rows have the prompt of a selection row, so the final check is not independent")
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: _write_part(folder, name, parts[name]) for name in PARTS}
    images = _find_image_folder(data, [part for name in PARTS for part in parts[name]])
    for name in ("selection", "test") if kind not in TEXT_KINDS else ():
        _check_scorable(files[name], parts[name], resolved, metric, images)
    return Split(files, {name: len(parts[name]) for name in PARTS}, notes, _hash_files(files), labels, images)


def _find_image_folder(data: DataSection, parts: Sequence[Part]) -> str | None:
    """Return the folder in which the paths of images start, or None without images. Raises DataError for several."""
    seen = (part for part in parts if any(message.images for message in part.conversation.messages))
    folders = dict.fromkeys(image_folder(part.row.file, data.image_folder).absolute() for part in seen)
    if len(folders) > 1:
        what = f"rows with images are in several folders: {', '.join(map(str, folders))}"
        raise DataError(what, fix="put the data files into one folder, or name that of the images: --data.image_folder")
    return next(map(str, folders), None)


def _hash_files(files: Mapping[str, Sequence[str]]) -> str:
    """Return a hash of the content of all files; a missing one counts as empty."""
    paths = [Path(file) for name in PARTS for file in files[name]]
    return sha256_text(" ".join(sha256_file(path) if path.is_file() else "" for path in paths))


def data_options(split: Split, data: DataSection) -> dict[str, Any]:
    """Return the recipe fields with which a trial reads the files of a split."""
    train = split.files["train"]
    options: dict[str, Any] = {
        "data.train": train[0] if len(train) == 1 else train, "data.eval": split.files["selection"],
        "data.encoding": "utf-8",
    }  # fmt: skip
    options |= {"data.format": "text"} if data.format == DOCUMENT else {}
    options |= {"data.image_folder": split.image_folder} if split.image_folder else {}
    return options | ({"train.labels": split.labels} if split.labels else {})


def hash_sources(data: DataSection, *others: str | None) -> str:
    """Return a hash of the content of all data files that a sweep reads, to detect changes."""
    key = hashlib.sha256()
    specs: list[str | list[str]] = [data.train]
    specs += [spec for spec in (data.eval, *others) if spec is not None and sources.read_eval_share(spec) is None]
    for spec in specs:
        for source in sources.resolve(spec):
            key.update(json.dumps([source.weight, len(source.files)]).encode())
            for name in source.files:
                key.update(bytes.fromhex(sha256_file(Path(name))))
    return key.hexdigest()


def _read_share(name: str, spec: str | list[str]) -> float | None:
    """Return a share of the rows, or None if the spec names files."""
    share = sources.read_eval_share(spec, f"--{name}")
    if share is None and isinstance(spec, str) and re.fullmatch(r"\s*\d*\.?\d+\s*", spec):
        what = f"--{name} {spec}: neither a share of the rows with % nor a file"
        percent = float(spec) if float(spec) >= 1 else 100 * float(spec)
        raise RecipeError(what, fix=f"--{name} {percent:g}%" if 0 < percent < 100 else f"--{name} {DEFAULT_SHARE}")
    return share


def _check_training_rows(resolved: Resolved) -> list[str] | None:
    """Raise the error of a run on all rows, which names the rows in the user's files. Return the classes of texts."""
    recipe = resolved.recipe
    source, kind = locate(recipe.model.name, recipe.model.revision), data_kind_of(recipe.train)
    check_template(source, recipe.data, kind)
    classes = prepare_rows(recipe, load_tokenizer(source), cache=cache_folder() / "data").classes
    return None if classes is None else list(classes.names)


def _read_parts(spec: str | Sequence[str], data: DataSection, kind: DataKind) -> list[Part]:
    """Read the rows of a spec, without invalid ones, which data.bad_rows allows."""
    errors: list[RowError] = []
    rows = sources.read_rows(
        spec, encoding=data.encoding, columns=data.columns, errors=errors, documents=data.format == DOCUMENT
    )
    last: list[Row] = []  # the row that was read last

    def remember(row: Row) -> Row:
        last[:] = [row]
        return row

    reader = ConversationReader(
        map(remember, rows), format=data.format, columns=data.columns, errors=errors, data_kind=kind,
        image_folder=data.image_folder,
    )  # fmt: skip
    parts: list[Part] = []
    number = -1  # of the last row; a source with a weight gives the same row several times
    several: list[Location] = []
    for conversation in reader:
        part = Part(last[0], reader.formats[conversation.file], conversation)
        if reader.num_used != number:
            parts.append(part)
            number = reader.num_used
        elif part.group != parts[-1].group:
            several.append(Location(conversation.file, conversation.line, "several prompts in one row"))
    if several:
        what = f"{len(several)} rows have several prompts, which may be in several parts of the split"
        raise DataError(what, fix="write one row for each prompt", where=several)
    if errors and data.bad_rows == "refuse":
        where = [error.where for error in errors]
        raise DataError(f"{len(errors)} rows are wrong", fix="correct or remove these rows", where=where)
    return parts


def _choose_part(group: bytes, seed: int, shares: Mapping[str, float | None]) -> str:
    position = digest(f"{seed} ".encode() + group) / 2**64
    for name in ("test", "selection"):
        share = shares[name] or 0.0
        if position < share:
            return name
        position -= share
    return "train"


def _check_compared(
    parts: Mapping[str, Sequence[Part]], num_rows: int, shares: Mapping[str, float | None]
) -> list[str]:
    """Refuse too few rows and rows that cannot be scored; return notes. num_rows: of the data that shares are of."""
    for name, rows in parts.items():
        if any(part.conversation.desirable is not None for part in rows):
            what = f"--{name}: rows labelled good or bad cannot be scored, because a bad answer is no reference answer"
            raise DataError(what, fix="sweep on preference pairs, which objective kto accepts too")
    if few := [name for name, rows in parts.items() if len(rows) < MIN_ROWS]:
        what = ", ".join(f"--{name}: {len(parts[name])} rows" for name in few)
        given = max(shares[name] or 0 for name in few)
        # 5 % more, because rows are chosen by hash, so the number varies
        needed = math.ceil(100 * max(given, MIN_ROWS / max(1, num_rows))) + 5
        larger = " ".join(f"--{name} {needed}%" for name in reversed(few))
        others = "".join(f", and --{name} FILE" for name in few[1:])
        fix = f"more rows, or --{few[0]} FILE with at least {MIN_ROWS} rows{others}"
        fix = f"{larger}, {fix}" if needed <= MAX_PERCENT else fix
        raise DataError(f"{what}, too few to compare settings on", fix=fix)
    return [
        f"{len(rows)} {name} rows: only large differences can be seen"
        for name, rows in parts.items()
        if len(rows) < FEW_ROWS
    ]


def _check_scorable(
    files: Sequence[str], parts: Sequence[Part], resolved: Resolved, metric: str, images: str | None
) -> None:
    """Raise the error of `strop eval` for rows that the metric cannot score, with the places in the user's files."""
    data = resolved.recipe.data
    try:
        format = "text" if data.format == DOCUMENT else data.format
        reading = {"format": format, "columns": data.columns, "image_folder": images}
        read_scorable_rows((), reading, [], files, metric)
    except DataError as error:
        places: dict[tuple[str, int | None], Row] = {}
        for file, own in zip(files, _by_format(parts).values(), strict=True):
            places |= {(file, line): part.row for line, part in enumerate(own, 1)}
        error.where = tuple(
            Location(row.file, row.line, place.what) if (row := places.get((place.file, place.line))) else place
            for place in error.where
        )
        raise


def _by_format(parts: Sequence[Part]) -> dict[str, list[Part]]:
    formats: dict[str, list[Part]] = {}
    for part in parts:
        formats.setdefault(part.format, []).append(part)
    return formats


def _write_part(folder: Path, name: str, parts: Sequence[Part]) -> list[str]:
    """Write rows to NAME.jsonl, or to NAME-FORMAT.jsonl if they have several formats, and return the files."""
    formats, files = _by_format(parts), []
    for format, own in formats.items():
        path = folder / (f"{name}.jsonl" if len(formats) == 1 else f"{name}-{format}.jsonl")
        lines = [json.dumps(part.row.value, default=to_json) for part in own]
        write_atomic(path, "".join(f"{line}\n" for line in lines))
        files.append(str(path))
    return files
