"""Find local data files and data sets on the Hub, and read their rows with values unchanged.

Invalid rows are skipped and collected, so that all errors are reported together. DataError is raised if a whole file
cannot be read. Files of the Hub are downloaded and read like local ones, because the `datasets` library converts values
("007" becomes 7).
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import partial
from json import JSONDecodeError
from pathlib import Path

from strop.data.reading import files, tables
from strop.data.reading.files import COMPRESSION, TYPES
from strop.data.reading.in_memory import describe_file, find_described
from strop.data.reading.json_reader import check_no_json_lines, read_json
from strop.data.row_errors import RowError, file_error
from strop.data.types import Row
from strop.errors import MAX_SHOWN_LOCATIONS, DataError, InputError, closest, first_line

_MAX_WEIGHT = 1000.0


@dataclass(frozen=True)
class Source:
    """A data file, or parallel files whose n-th lines form a row."""

    path: str  # as shown to the user
    files: tuple[str, ...]
    weight: float = 1.0  # how often each row is read; a fraction selects a share of the rows


def read_eval_share(spec: str | list[str] | None, name: str = "data.eval") -> float | None:
    """Return data.eval as a fraction of the training rows, or None if it names files. Raises DataError.

    name: of the option, for the error.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", spec) if isinstance(spec, str) else None
    if match is None:
        return None
    share = float(match[1]) / 100
    if not 0 < share < 1:
        purpose = "evaluate on" if share == 0 else "train on"
        raise DataError(f"{name}: {spec} leaves no rows to {purpose}", fix="choose a share such as 5%")
    return share


def resolve(spec: str | Sequence[str]) -> list[Source]:
    """Return the sources that a spec names, in order.

    A spec is a file, a glob, `a.nl+b.cm` (parallel files), or `owner/name` on the Hub, each optionally with `@weight`.
    Raises DataError for an unknown name, a folder, a weight out of bounds, or a file named twice.
    """
    sources = [source for part in ([spec] if isinstance(spec, str) else spec) for source in _resolve_one(part)]
    if not sources:
        raise DataError("no data file named", fix="give one with --data.train FILE")
    counts = Counter(os.path.realpath(file) for source in sources for file in source.files)
    if repeated := [path for path, count in counts.items() if count > 1]:
        raise file_error(os.path.relpath(repeated[0]), "named twice", "to repeat its rows, write FILE@2")
    return sources


def check_exists(spec: str | Sequence[str]) -> None:
    """Raise the error of `resolve` for local files that do not exist. Downloads nothing."""
    if local := [part for part in ([spec] if isinstance(spec, str) else spec) if not needs_download(part)]:
        resolve(local)


def _resolve_one(spec: str) -> list[Source]:
    if weighted := _match_weight(spec):
        weight = float(weighted[2])
        if not 0 < weight <= _MAX_WEIGHT:
            what = f"{spec}: the weight must be above 0 and at most {_MAX_WEIGHT:g}"
            raise DataError(what, fix=f"give {weighted[1]}@2 to read its rows twice, or @0.5 for half of them")
        return [replace(source, weight=weight) for source in _resolve_one(weighted[1])]
    spec = find_described(spec) or spec
    if os.path.isfile(spec):
        return [Source(describe_file(spec) or spec, (spec,))]
    if os.path.isdir(spec):
        if os.path.isfile(os.path.join(spec, "dataset_dict.json")):
            splits = [os.path.join(spec, name) for name in sorted(os.listdir(spec))]
            fix = f"name one: {', '.join(path for path in splits if os.path.isdir(path))}"
            raise file_error(spec, "a folder with several splits, written by save_to_disk of datasets", fix)
        if os.path.isfile(os.path.join(spec, "state.json")):
            return _find_saved_files(spec)
        inside = [
            path.relative_to(spec).as_posix() for depth in ("*", "*/*", "*/*/*") for path in Path(spec).glob(depth)
        ]
        try:
            chosen = choose_files(spec, inside, None)
        except DataError as error:
            raise file_error(spec, "is a folder", f"name the files to train on; {error.what}") from None
        raise file_error(spec, "is a folder", f"give {' or '.join(os.path.join(spec, name) for name in chosen[:3])}")
    if any(sign in spec for sign in "*?["):
        names = sorted(name for name in glob.glob(spec, recursive=True) if os.path.isfile(name))
        if names:
            return [Source(name, (name,)) for name in names]
        if not is_dataset(spec):
            raise file_error(spec, "no file matches", "name a file that exists, or another pattern")
    parts = tuple(spec.split("+"))
    if len(parts) > 1 and any(os.path.isfile(part) for part in parts):
        for part in parts:
            if not os.path.isfile(part):
                raise _missing_file_error(part)
        return [Source(spec, parts)]
    if is_dataset(spec):
        return _download(spec)
    raise _missing_file_error(spec)


def _find_saved_files(folder: str) -> list[Source]:
    """Return the Arrow files of a folder written by save_to_disk of datasets, in order."""
    try:
        state = json.loads(Path(folder, "state.json").read_text(encoding="utf-8"))
        names = [os.path.basename(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError):
        names = []
    if not names:
        what = "its state.json names no data files, as that of save_to_disk of datasets does"
        raise file_error(folder, what, "name the files")
    paths = [os.path.join(folder, name) for name in names]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise file_error(missing[0], "no such file, although state.json names it", "save the data set again")
    return [Source(path, (path,)) for path in paths]


def _match_weight(spec: str) -> re.Match[str] | None:
    """Match `name@weight`, unless a file has exactly that name."""
    return None if os.path.exists(spec) else re.fullmatch(r"(.+)@(-?\d*\.?\d+)", spec)


def cap_weights(spec: str | Sequence[str]) -> list[str]:
    """Return a spec with weights of at most 1, which reads no row more than once."""
    parts = [spec] if isinstance(spec, str) else spec
    matches = [_match_weight(part) for part in parts]
    return [
        f"{match[1]}@1" if match and 1 < float(match[2]) <= _MAX_WEIGHT else part
        for part, match in zip(parts, matches, strict=True)
    ]


def needs_download(spec: str) -> bool:
    """Return whether reading `spec` downloads a data set from the Hub."""
    weighted = _match_weight(spec)
    name = weighted[1] if weighted else spec
    return not glob.glob(name, recursive=True) and is_dataset(name)


def _missing_file_error(path: str) -> DataError:
    folder, name = os.path.split(path)
    if "\0" in path:
        return DataError("a file name contains a NUL character", fix="name a file that exists")
    if "://" in path:
        return file_error(path, "an address, and rows are read from files", "download it, and give the file")
    if os.path.exists(path):
        return file_error(path, "is not a regular file", "name a file with rows")
    if os.path.islink(path):
        return file_error(path, f"a link to {os.readlink(path)}, which does not exist", "name a file that exists")
    if not os.path.isdir(folder or "."):
        return file_error(path, f"no such file: there is no folder {folder}", "give the path of a file that exists")
    siblings = os.listdir(folder or ".")
    near = closest(name, filter(_is_data_file, siblings)) or closest(name, siblings)
    if near and (_is_data_file(name) or _is_data_file(near)):
        fix = f"use {shlex.quote(os.path.join(folder, near))}"
        return file_error(path, f"no such file (did you mean {near}?)", fix)
    is_text = name.lower().endswith(".txt")
    others = [other for other in sorted(siblings) if _is_data_file(other) and (is_text or not other.endswith(".txt"))]
    stem = os.path.splitext(name)[0].lower()
    others.sort(key=lambda other: -SequenceMatcher(None, stem, os.path.splitext(other)[0].lower()).ratio())
    more = f", and {len(others) - MAX_SHOWN_LOCATIONS} more" if len(others) > MAX_SHOWN_LOCATIONS else ""
    fix = f"give the path of a file that exists; there is no data file in {os.path.abspath(folder)}"
    if others:
        fix = f"the data files there are {', '.join(others[:MAX_SHOWN_LOCATIONS])}{more}"
    fix = fix if _is_data_file(name) else "a Hub data set is named owner/name"
    return file_error(path, f"no such file{f' (did you mean {near}?)' if near else ''}", fix)


# owner/name, optionally @revision, optionally a path or glob inside the repository
_DATASET_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w.-]+))?(?:/(.+))?")
_TRAIN_FILE = re.compile(r"(?:^|[/._-])train(?:[/._-]|$)")
_EVAL_FILE = re.compile(r"(?:^|[/._-])(?:test|valid|validation|val|dev|eval)(?:[/._-]|$)")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})")
_METADATA_FILES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"}


def is_dataset(spec: str) -> bool:
    """Return whether `spec`, which is not a local path, has the form of a Hub data set's name."""
    match = _DATASET_ID.fullmatch(spec)
    if not match or os.path.isdir(spec.split("/")[0]):
        return False
    return match[3] is not None or not _is_data_file(match[1])


def _download(spec: str) -> list[Source]:
    """Download the data files of `owner/name[@revision][/path or glob]`.

    Without a path, the files of the train split are chosen. Offline, cached files are used. Raises DataError for an
    unknown name, an ambiguous choice, or if the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # the class of httpx or of httpx2, depending on the version of huggingface_hub
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    match = _DATASET_ID.fullmatch(spec)
    assert match, spec
    name, revision, pattern = match.groups()
    explain = partial(
        explain_hub_error, name=name, page=f"datasets/{name}", error_class=DataError, access_class=DataError
    )
    try:
        info = HfApi().dataset_info(name, revision=revision)
    except HFValidationError as error:
        raise DataError(f"{spec}: no such file, and not a valid name of a Hub data set: {error}") from error
    except (OfflineModeIsEnabled, TransportError, JSONDecodeError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 500
        if status < 500 and status != 429:
            what = f"{spec}: no such file, and the Hub says: {first_line(error)}"
            raise DataError(what, fix="check the name, or log in with `hf auth login`") from error
        return _find_cached_files(name, revision, pattern, error)
    except ValueError as error:
        raise explain(error) or error from error
    chosen = choose_files(name, [file.rfilename for file in info.siblings or []], pattern)
    try:  # in one call, so that all files are of the same commit
        patterns = [glob.escape(file) for file in chosen]
        folder = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except (OSError, TransportError, ValueError) as error:
        explained = explain(error)
        if explained is None and isinstance(error, LocalEntryNotFoundError):
            explained = DataError(f"{spec}: the connection to the Hub was lost", fix="try again")
        if explained is None:
            raise
        raise explained from error
    return _locate_files(name, folder, chosen)


def _locate_files(name: str, folder: str, chosen: list[str]) -> list[Source]:
    """Return the chosen files of a snapshot. Raises DataError if one is missing."""
    local = {file: os.path.join(folder, file) for file in chosen}
    if missing := [file for file, path in local.items() if not os.path.isfile(path)]:
        raise DataError(f"{name}: {missing[0]} was not downloaded", fix="try again")
    return [Source(f"{name}/{file}", (path,)) for file, path in local.items()]


def _find_cached_files(name: str, revision: str | None, pattern: str | None, cause: Exception) -> list[Source]:
    """Return the files in the cache, after `cause` prevented a download. Raises DataError if they are incomplete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    status = getattr(getattr(cause, "response", None), "status_code", None)
    why = f"the Hub returned {status}" if status else f"the Hub cannot be reached ({type(cause).__name__})"
    fix = "wait a little, and try again" if status else "name a file that exists, or go online"
    try:  # newer versions of huggingface_hub check that all requested files are cached
        patterns = [] if pattern is None else [pattern]
        folder = snapshot_download(
            name, repo_type="dataset", revision=revision, local_files_only=True, allow_patterns=patterns
        )
    except LocalEntryNotFoundError as error:
        what = "only partly downloaded" if hasattr(error, "snapshot_path") else "no such file"
        raise DataError(f"{name}: {what}, and {why}", fix=fix) from cause
    names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
    chosen = choose_files(name, names, pattern)
    shards = _SHARD.search(chosen[0]) if pattern is None else None
    if shards and len(chosen) != int(shards[1]):
        what = f"{name}: only {len(chosen)} of its {int(shards[1])} files are cached, and {why}"
        raise DataError(what, fix=fix) from cause
    return _locate_files(name, folder, chosen)


def choose_files(name: str, names: list[str], pattern: str | None) -> list[str]:
    """Return the files of a repository to read, sorted. Raises DataError if the choice is ambiguous."""
    data = sorted(file for file in names if _is_data_file(file))
    shown = ", ".join(data[:10]) + (" ..." if len(data) > 10 else "")
    if pattern is not None:
        chosen = sorted(file for file in names if file == pattern or fnmatch.fnmatchcase(file, pattern))
        if not chosen:
            raise DataError(f"{name} has no file {pattern}", fix=f"it has: {shown or 'no data files'}")
        return chosen
    if not data:
        what = f"{name} has no file of a known type ({', '.join(TYPES)})"
        raise DataError(
            what, fix="choose another data set: loading scripts are not executed, and archives not unpacked"
        )
    train = [file for file in data if _TRAIN_FILE.search(file)]
    chosen = train or [file for file in data if not _EVAL_FILE.search(file)]
    if len({_SHARD.sub("", file) for file in chosen}) != 1:
        raise DataError(f"{name} has several data files: {shown}", fix=f"name one, or a glob: {name}/{data[0]}")
    return chosen


def _is_data_file(file: str) -> bool:
    stem, suffix = os.path.splitext(file.lower())
    data_suffix = os.path.splitext(stem)[1] if suffix in COMPRESSION else suffix
    name = file.rsplit("/", 1)[-1]
    is_documentation = name.lower().startswith(("readme", "license", "requirements"))
    return data_suffix in TYPES and name not in _METADATA_FILES and not is_documentation


def explain_hub_error(
    error: BaseException, name: str, page: str, error_class: type[InputError], access_class: type[InputError]
) -> InputError | None:
    """Convert an error of huggingface_hub to an error of `error_class`, or of `access_class` if access was denied.

    page: path of the repository's page on the Hub. Returns None if the Hub could not be reached at all, and for
    unrelated errors.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    # the class of httpx or of httpx2, depending on the version of huggingface_hub
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    retry = "try again: complete files are kept"
    while isinstance(error, LocalEntryNotFoundError):  # its message blames the connection even if the Hub responded
        if not isinstance(error.__cause__, HfHubHTTPError):
            return None
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        fix = f"open {constants.ENDPOINT}/{page} and accept them, then log in with `hf auth login`"
        return access_class(f"{name}: gated: you have to accept its terms", fix=fix)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        what = f"{name}: the Hub returned {status or 'nothing'}: {error.server_message or first_line(error)}"
        if status in (401, 403):
            return access_class(what, fix="log in with `hf auth login`, with a token that may read it")
        return error_class(what, fix="wait a little, and try again")
    if isinstance(error, TransportError):
        return error_class(f"{name}: the connection to {constants.ENDPOINT} broke: {first_line(error)}", fix=retry)
    if isinstance(error, JSONDecodeError):
        what = f"{name}: the response of {constants.ENDPOINT} is not that of the Hub"
        return error_class(what, fix="check HF_ENDPOINT, and the proxy if there is one")
    if isinstance(error, ValueError):  # an invalid address, proxy or token
        fix = "check HF_ENDPOINT, HF_TOKEN, and the proxy if there is one"
        return error_class(f"{name}: invalid request to the Hub: {first_line(error)}", fix=fix)
    if isinstance(error, OSError) and error.errno is None:  # the downloaded file is too short
        return error_class(f"{name}: {first_line(error)}", fix=retry)
    return None


def read_rows(
    spec: str | Sequence[str], *, encoding: str = "utf-8", columns: Mapping[str, str] | None = None,
    errors: list[RowError], left_out: Counter[str] | None = None, documents: bool = False,
) -> Iterator[Row]:  # fmt: skip
    """Yield the rows of all sources, in order. Memory does not grow with the file, except for JSON arrays.

    spec: see `resolve`. columns: field -> column name, as in data.columns. A number is the position, counted from 1, of
    a column in a CSV or TSV file, or of one of several parallel files. errors: receives the errors of single rows.
    left_out: receives, by path, the number of rows that a fractional weight left out. documents: read a plain text file
    as one row instead of one row per paragraph.

    Raises DataError if a whole file cannot be read, possibly after some rows.
    """
    for source in resolve(spec):
        num_errors, is_empty = len(errors), True
        for row in _read(source, encoding, columns or {}, errors, documents):
            is_empty = False
            yield from _repeat(row, source, left_out)
        if is_empty and len(errors) == num_errors:
            raise file_error(
                source.path, "no rows: it is empty, or has only blank lines or a header", "give a file with rows"
            )


def _repeat(row: Row, source: Source, left_out: Counter[str] | None) -> Iterator[Row]:
    copies, fraction = divmod(source.weight, 1)
    if fraction:  # chosen by content: independent of the order of rows and of the seed
        text = json.dumps(row.value, sort_keys=True, default=str).encode()
        copies += int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64 < fraction
    if not copies and left_out is not None:
        left_out[source.path] += 1
    for _ in range(int(copies)):
        yield row


def _read(
    source: Source, encoding: str, columns: Mapping[str, str], errors: list[RowError], documents: bool
) -> Iterator[Row]:
    if len(source.files) > 1:
        return tables.read_parallel(source.path, source.files, encoding, columns, errors)
    name, path = source.path, source.files[0]
    reader = files.choose_reader(path)
    if reader == "json":
        return read_json(name, path, encoding, columns, errors)
    if reader == "parquet":
        return tables.read_parquet(name, path)
    if reader == "arrow":
        return tables.read_arrow(name, path)
    if reader == "text" and documents:
        return tables.read_document(name, files.read_text(path, encoding))
    lines = files.read_decoded_lines(name, path, encoding, errors)
    if reader == "text":
        check_no_json_lines(name, path, encoding)
        return tables.read_paragraphs(name, lines)
    return tables.read_table(name, lines, "," if reader == "csv" else "\t", columns, errors)
