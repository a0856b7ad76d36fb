"""Data sets of the Hugging Face Hub: which files to read, fetched into the Hub's own cache.

The files are then read like local ones, so values come out as they stand in the file: `datasets` would
guess types (dates become datetimes, "007" becomes 7).
"""

from __future__ import annotations

import fnmatch
import os
import re

from strop.data.reading.files import COMPRESSION, TYPES
from strop.errors import DataError

# owner/name, maybe @revision, maybe a path or glob inside the repository.
_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w.-]+))?(?:/(.+))?")
_TRAIN = re.compile(r"(?:^|[/._-])train(?:[/._-]|$)")
_OTHER = re.compile(r"(?:^|[/._-])(?:test|valid|validation|val|dev|eval)(?:[/._-]|$)")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
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
    from huggingface_hub import HfApi, hf_hub_download
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
        chosen = choose(name, [file.rfilename for file in info.siblings or []], inside)
        local = [hf_hub_download(name, file, repo_type="dataset", revision=revision) for file in chosen]
    except HfHubHTTPError as error:
        what = f"{spec}: no such file here, and the Hub says: {str(error).splitlines()[0]}"
        raise DataError(what, fix="check the name, or log in with `hf auth login`") from error
    except HFValidationError as error:
        raise DataError(f"{spec}: no such file here, and no name of a Hub data set: {error}") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, TransportError) as error:
        return _cached(name, revision, inside, error)
    return [(f"{name}/{file}", path) for file, path in zip(chosen, local, strict=True)]


def _cached(name: str, revision: str | None, inside: str | None, cause: Exception) -> list[tuple[str, str]]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        what = f"{name}: no such file here, and the Hub cannot be reached ({type(cause).__name__})"
        raise DataError(what, fix="name a file that exists, or go online") from cause
    names = [
        os.path.relpath(os.path.join(at, file), folder).replace(os.sep, "/")
        for at, _, inner in os.walk(folder)
        for file in inner
    ]
    return [(f"{name}/{file}", os.path.join(folder, file)) for file in choose(name, names, inside)]


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
