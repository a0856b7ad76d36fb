"""Data sets of the Hugging Face Hub: which files to read, fetched into the Hub's own cache.

The files are then read like local ones, so values come out as they stand in the file: `datasets` would
guess types (dates become datetimes, "007" becomes 7).
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from json import JSONDecodeError

from strop.data.reading.files import COMPRESSION, TYPES
from strop.errors import DataError, first_line
from strop.models.upstream_errors import hub_error

# owner/name, maybe @revision, maybe a path or glob inside the repository.
_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w.-]+))?(?:/(.+))?")
_TRAIN = re.compile(r"(?:^|[/._-])train(?:[/._-]|$)")
_OTHER = re.compile(r"(?:^|[/._-])(?:test|valid|validation|val|dev|eval)(?:[/._-]|$)")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})")
_NOT_ROWS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"}


def is_dataset(spec: str) -> bool:
    """Whether `spec`, which is no local path, has the form of a Hub data set."""
    match = _ID.fullmatch(spec)
    if not match or os.path.isdir(spec.split("/")[0]):
        return False
    return match[3] is not None or not _is_data(match[1])


def fetch(spec: str) -> list[tuple[str, str]]:
    """(name to show, local path) of each data file of `owner/name[@revision][/path or glob]`. Raises DataError.

    Without a path: the files of the train split, where it is clear which those are. Offline, the cache serves.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    # httpx's or httpx2's, as huggingface_hub's version has it
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    match = _ID.fullmatch(spec)
    assert match, spec
    name, revision, inside = match.groups()
    try:
        info = HfApi().dataset_info(name, revision=revision)
    except HFValidationError as error:
        raise DataError(f"{spec}: no such file here, and no name of a Hub data set: {error}") from error
    except (OfflineModeIsEnabled, TransportError, JSONDecodeError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 500
        if status < 500 and status != 429:
            what = f"{spec}: no such file here, and the Hub says: {first_line(error)}"
            raise DataError(what, fix="check the name, or log in with `hf auth login`") from error
        return _cached(name, revision, inside, error)
    except ValueError as error:
        raise hub_error(error, name, f"datasets/{name}", DataError, DataError) or error from error
    chosen = choose(name, [file.rfilename for file in info.siblings or []], inside)
    try:  # of one commit all
        patterns = [glob.escape(file) for file in chosen]
        folder = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except (OSError, TransportError, ValueError) as error:
        found = hub_error(error, name, f"datasets/{name}", DataError, DataError)
        if found is None and isinstance(error, LocalEntryNotFoundError):
            found = DataError(f"{spec}: the Hub cannot be reached any more", fix="try again")
        if found is None:
            raise
        raise found from error
    return _in_folder(name, folder, chosen)


def _in_folder(name: str, folder: str, chosen: list[str]) -> list[tuple[str, str]]:
    """Raises DataError where a file of a snapshot is not there."""
    local = [os.path.join(folder, file) for file in chosen]
    missing = [file for file, path in zip(chosen, local, strict=True) if not os.path.isfile(path)]
    if missing:
        raise DataError(f"{name}: {missing[0]} has not come", fix="try again")
    return [(f"{name}/{file}", path) for file, path in zip(chosen, local, strict=True)]


def _cached(name: str, revision: str | None, inside: str | None, cause: Exception) -> list[tuple[str, str]]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    status = getattr(getattr(cause, "response", None), "status_code", None)
    why = f"the Hub answers {status}" if status else f"the Hub cannot be reached ({type(cause).__name__})"
    fix = "wait a little, and try again" if status else "name a file that exists, or go online"
    try:  # newer versions of the Hub's client know what a commit has, and look whether what is asked is here
        wanted = [] if inside is None else [inside]
        folder = snapshot_download(
            name, repo_type="dataset", revision=revision, local_files_only=True, allow_patterns=wanted
        )
    except LocalEntryNotFoundError as error:
        some = "only a part of it is" if hasattr(error, "snapshot_path") else "no such file"
        raise DataError(f"{name}: {some} here, and {why}", fix=fix) from cause
    names = [
        os.path.relpath(os.path.join(at, file), folder).replace(os.sep, "/")
        for at, _, inner in os.walk(folder)
        for file in inner
    ]
    chosen = choose(name, names, inside)
    shards = _SHARD.search(chosen[0]) if inside is None else None
    if shards and len(chosen) != int(shards[1]):
        what = f"{name}: only {len(chosen)} of its {int(shards[1])} files are here, and {why}"
        raise DataError(what, fix=fix) from cause
    return _in_folder(name, folder, chosen)


def choose(name: str, names: list[str], inside: str | None) -> list[str]:
    """Which of a repository's files to read, sorted. Raises DataError where that is not clear."""
    data = sorted(file for file in names if _is_data(file))
    some = ", ".join(data[:10]) + (" ..." if len(data) > 10 else "")
    if inside is not None:
        chosen = sorted(file for file in names if file == inside or fnmatch.fnmatchcase(file, inside))
        if not chosen:
            raise DataError(f"{name} has no file {inside}", fix=f"it has: {some or 'no data files'}")
        return chosen
    if not data:
        raise DataError(
            f"{name} has no file of a known type ({', '.join(TYPES)})", fix="scripts and archives are not run"
        )
    train = [file for file in data if _TRAIN.search(file)]
    chosen = train or [file for file in data if not _OTHER.search(file)]
    if len({_SHARD.sub("", file) for file in chosen}) != 1:
        raise DataError(f"{name} has several data files: {some}", fix=f"name one, or a glob: {name}/{data[0]}")
    return chosen


def _is_data(file: str) -> bool:
    stem, suffix = os.path.splitext(file.lower())
    plain = os.path.splitext(stem)[1] if suffix in COMPRESSION else suffix
    name = file.rsplit("/", 1)[-1]
    return (
        plain in TYPES and name not in _NOT_ROWS and not name.lower().startswith(("readme", "license", "requirements"))
    )
