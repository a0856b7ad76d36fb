"""Find and download the data files of Hugging Face Hub data sets, and explain the Hub client's errors.

The downloaded files are read like local ones, so that values stay unchanged: `datasets` would guess types (dates become
datetimes, "007" becomes 7).
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from json import JSONDecodeError

from strop.data.reading.files import COMPRESSION, TYPES
from strop.errors import DataError, InputError, first_line

# owner/name, optionally @revision, optionally a path or glob inside the repository
_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w.-]+))?(?:/(.+))?")
_TRAIN = re.compile(r"(?:^|[/._-])train(?:[/._-]|$)")
_EVAL = re.compile(r"(?:^|[/._-])(?:test|valid|validation|val|dev|eval)(?:[/._-]|$)")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})")
_METADATA_FILES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"}


def is_dataset(spec: str) -> bool:
    """Return whether `spec`, which is not a local path, has the form of a Hub data set."""
    match = _ID.fullmatch(spec)
    if not match or os.path.isdir(spec.split("/")[0]):
        return False
    return match[3] is not None or not _is_data_file(match[1])


def download(spec: str) -> list[tuple[str, str]]:
    """Download the data files of `owner/name[@revision][/path or glob]` into the Hub's cache.

    Without a path, the files of the train split are chosen if that is unambiguous. Offline, cached files are used.

    Returns:
        (name to show, local path) of each file.

    Raises:
        DataError: no such data set or file, an ambiguous choice, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # the class of httpx or of httpx2, depending on the version of huggingface_hub
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    match = _ID.fullmatch(spec)
    assert match, spec
    name, revision, inside = match.groups()
    try:
        info = HfApi().dataset_info(name, revision=revision)
    except HFValidationError as error:
        raise DataError(f"{spec}: no such file, and not a valid name of a Hub data set: {error}") from error
    except (OfflineModeIsEnabled, TransportError, JSONDecodeError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 500
        if status < 500 and status != 429:
            what = f"{spec}: no such file, and the Hub says: {first_line(error)}"
            raise DataError(what, fix="check the name, or log in with `hf auth login`") from error
        return _cached_files(name, revision, inside, error)
    except ValueError as error:
        raise explain_hub_error(error, name, f"datasets/{name}", DataError, DataError) or error from error
    chosen = choose_files(name, [file.rfilename for file in info.siblings or []], inside)
    try:  # one snapshot, so that all files are of one commit
        patterns = [glob.escape(file) for file in chosen]
        folder = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except (OSError, TransportError, ValueError) as error:
        explained = explain_hub_error(error, name, f"datasets/{name}", DataError, DataError)
        if explained is None and isinstance(error, LocalEntryNotFoundError):
            explained = DataError(f"{spec}: the connection to the Hub was lost", fix="try again")
        if explained is None:
            raise
        raise explained from error
    return _local_files(name, folder, chosen)


def _local_files(name: str, folder: str, chosen: list[str]) -> list[tuple[str, str]]:
    """Return the names and paths of files of a snapshot. Raises DataError if one is missing."""
    local = [os.path.join(folder, file) for file in chosen]
    missing = [file for file, path in zip(chosen, local, strict=True) if not os.path.isfile(path)]
    if missing:
        raise DataError(f"{name}: {missing[0]} was not downloaded", fix="try again")
    return [(f"{name}/{file}", path) for file, path in zip(chosen, local, strict=True)]


def _cached_files(name: str, revision: str | None, inside: str | None, cause: Exception) -> list[tuple[str, str]]:
    """Return the files that an earlier download left in the cache. Raises DataError if they are incomplete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    status = getattr(getattr(cause, "response", None), "status_code", None)
    why = f"the Hub returned {status}" if status else f"the Hub cannot be reached ({type(cause).__name__})"
    fix = "wait a little, and try again" if status else "name a file that exists, or go online"
    try:  # newer versions of huggingface_hub know the files of a commit and check that the requested ones are cached
        patterns = [] if inside is None else [inside]
        folder = snapshot_download(
            name, repo_type="dataset", revision=revision, local_files_only=True, allow_patterns=patterns
        )
    except LocalEntryNotFoundError as error:
        what = "only partly downloaded" if hasattr(error, "snapshot_path") else "no such file"
        raise DataError(f"{name}: {what}, and {why}", fix=fix) from cause
    names = [
        os.path.relpath(os.path.join(parent, file), folder).replace(os.sep, "/")
        for parent, _, inner in os.walk(folder)
        for file in inner
    ]
    chosen = choose_files(name, names, inside)
    shards = _SHARD.search(chosen[0]) if inside is None else None
    if shards and len(chosen) != int(shards[1]):
        what = f"{name}: only {len(chosen)} of its {int(shards[1])} files are cached, and {why}"
        raise DataError(what, fix=fix) from cause
    return _local_files(name, folder, chosen)


def choose_files(name: str, names: list[str], inside: str | None) -> list[str]:
    """Return the files of a repository to read, sorted. Raises DataError if the choice is ambiguous."""
    data = sorted(file for file in names if _is_data_file(file))
    shown = ", ".join(data[:10]) + (" ..." if len(data) > 10 else "")
    if inside is not None:
        chosen = sorted(file for file in names if file == inside or fnmatch.fnmatchcase(file, inside))
        if not chosen:
            raise DataError(f"{name} has no file {inside}", fix=f"it has: {shown or 'no data files'}")
        return chosen
    if not data:
        raise DataError(
            f"{name} has no file of a known type ({', '.join(TYPES)})", fix="scripts and archives are not run"
        )
    train = [file for file in data if _TRAIN.search(file)]
    chosen = train or [file for file in data if not _EVAL.search(file)]
    if len({_SHARD.sub("", file) for file in chosen}) != 1:
        raise DataError(f"{name} has several data files: {shown}", fix=f"name one, or a glob: {name}/{data[0]}")
    return chosen


def _is_data_file(file: str) -> bool:
    stem, suffix = os.path.splitext(file.lower())
    data_suffix = os.path.splitext(stem)[1] if suffix in COMPRESSION else suffix
    name = file.rsplit("/", 1)[-1]
    documentation = name.lower().startswith(("readme", "license", "requirements"))
    return data_suffix in TYPES and name not in _METADATA_FILES and not documentation


def explain_hub_error(
    error: BaseException, name: str, page: str, error_class: type[InputError], access_class: type[InputError]
) -> InputError | None:
    """Convert an error of the Hub's client to an InputError with a fix.

    Args:
        error: raised while something was fetched from the repository `name`.
        name: the repository.
        page: path of the repository's page, without the Hub's address.
        error_class: class of the result.
        access_class: class of the result if the account has no access.

    Returns:
        The error, or None if the Hub cannot be reached at all, and for errors of other origin.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    # the class of httpx or of httpx2, depending on the version of huggingface_hub
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    retry = "try again: complete files are kept"
    if isinstance(error, LocalEntryNotFoundError):  # its message blames the connection, whatever the Hub responded
        cause = error.__cause__
        is_response = isinstance(cause, HfHubHTTPError)
        return explain_hub_error(cause, name, page, error_class, access_class) if is_response and cause else None
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
    if isinstance(error, OSError) and error.errno is None:  # a file shorter than the Hub announced
        return error_class(f"{name}: {first_line(error)}", fix=retry)
    return None
