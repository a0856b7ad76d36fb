"""Translate errors of libraries: the Hub's client, and model code of transformers and peft."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from json import JSONDecodeError
from pathlib import Path

from strop.errors import InputError, RunError, first_line
from strop.machine.memory import is_out_of_memory

PACKAGES = ("transformers", "peft")


def hub_error(
    error: BaseException, name: str, page: str, kind: type[InputError], closed: type[InputError]
) -> InputError | None:
    """Return an error with a fix for what the Hub's client raised; None if the Hub is unreachable or for other errors.

    Args:
        error: the exception of huggingface_hub.
        name: of the repository.
        page: path of the repository's page, without the Hub's address.
        kind: class of the returned error.
        closed: class of the returned error where the account has no access.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    # From httpx or httpx2, depending on huggingface_hub's version.
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    retry = "try again: complete files are kept"
    if isinstance(error, LocalEntryNotFoundError):  # it blames the connection, whatever the Hub has answered
        cause = error.__cause__
        return hub_error(cause, name, page, kind, closed) if isinstance(cause, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        fix = f"open {constants.ENDPOINT}/{page} and accept the terms, then log in with `hf auth login`"
        return closed(f"{name}: gated: it can be loaded only after accepting its terms", fix=fix)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        what = f"{name}: the Hub answers {status or 'nothing'}: {error.server_message or first_line(error)}"
        if status in (401, 403):
            return closed(what, fix="log in with `hf auth login`, with a token that may read it")
        return kind(what, fix="wait a little, and try again")
    if isinstance(error, TransportError):
        return kind(f"{name}: the connection to {constants.ENDPOINT} broke: {first_line(error)}", fix=retry)
    if isinstance(error, JSONDecodeError):
        what = f"{name}: {constants.ENDPOINT} does not answer like the Hub"
        return kind(what, fix="check HF_ENDPOINT, and the proxy if there is one")
    if isinstance(error, ValueError):  # from an invalid address, proxy or token
        fix = "check HF_ENDPOINT, HF_TOKEN, and the proxy if there is one"
        return kind(f"{name}: the request to the Hub is invalid: {first_line(error)}", fix=fix)
    if isinstance(error, OSError) and error.errno is None:  # a file is shorter than the Hub announced
        return kind(f"{name}: {first_line(error)}", fix=retry)
    return None


@contextmanager
def attribute_errors(family: str) -> Iterator[None]:
    """Raise RunError for an error from transformers' or peft's model code, naming the package and the line.

    Errors from strop's own code and out-of-memory errors pass unchanged. family: the model's type.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        translated = None if is_out_of_memory(error) else _package_error(error, family)
        if translated is None:
            raise
        raise translated from error


def _package_error(error: Exception, family: str) -> RunError | None:
    """Return a RunError if transformers or peft is on the stack below strop's last frame."""
    strop_folder, folders = _package_folder("strop"), {name: _package_folder(name) for name in PACKAGES}
    frames: list[traceback.FrameSummary] = []  # below strop's last frame
    for frame in traceback.extract_tb(error.__traceback__):
        frames = [] if strop_folder in Path(frame.filename).parents else [*frames, frame]
    for frame in reversed(frames):
        package = next((name for name in PACKAGES if folders[name] in Path(frame.filename).parents), None)
        if package is not None:
            message = next(iter(str(error).strip().splitlines()), type(error).__name__)
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            what = f"{package} {version(package)} fails on a model of type {family}: {message[:200]} ({place})"
            return RunError(what, fix=f"try another version of {package}; its own code runs this model")
    return None


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
