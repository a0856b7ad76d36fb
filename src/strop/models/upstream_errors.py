"""Whose fault an error is that comes up while a model is computed: transformers' and peft's own are named as theirs."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from strop.errors import RunError
from strop.machine.memory import is_out_of_memory

THEIRS = ("transformers", "peft")
FAULTS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


@contextmanager
def attribute_errors(family: str) -> Iterator[None]:
    """Raises RunError in the place of an error that came up in transformers' or peft's code below strop's last line.

    family: the model's type. Memory that runs out is another trouble.
    """
    try:
        yield
    except FAULTS as error:
        found = None if is_out_of_memory(error) else _theirs(error, family)
        if found is None:
            raise
        raise found from error


def _theirs(error: Exception, family: str) -> RunError | None:
    ours, places = _place("strop"), {name: _place(name) for name in THEIRS}
    below: list[traceback.FrameSummary] = []
    for frame in traceback.extract_tb(error.__traceback__):
        below = [] if ours in Path(frame.filename).parents else [*below, frame]
    for frame in reversed(below):
        package = next((name for name in THEIRS if places[name] in Path(frame.filename).parents), None)
        if package is not None:
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            what = f"{package} {version(package)} fails on a model of type {family}: {said[:200]} ({where})"
            return RunError(what, fix=f"try another version of {package}; the model is computed by its own code")
    return None


def _place(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


# ---- from strop.models.hub_errors ----
"""What the Hugging Face Hub's client raises while something is fetched, as errors that say what to do."""

from __future__ import annotations

from json import JSONDecodeError

from strop.errors import InputError, first_line


def hub_error(
    error: BaseException, name: str, page: str, kind: type[InputError], closed: type[InputError]
) -> InputError | None:
    """Of the repository `name`, where the Hub answers no, or breaks off: an error of this kind; `closed` where the
    account is the reason. None where the Hub cannot be reached at all, and for every other fault.

    page: of the repository, without the Hub's address.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    # httpx's or httpx2's, as huggingface_hub's version has it
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    again = "try again: files that have come whole are kept"
    if isinstance(error, LocalEntryNotFoundError):  # it says to check the connection, whatever the Hub has answered
        cause = error.__cause__
        return hub_error(cause, name, page, kind, closed) if isinstance(cause, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        fix = f"open {constants.ENDPOINT}/{page} and accept them, then log in with `hf auth login`"
        return closed(f"{name}: gated: only who has accepted its terms may load it", fix=fix)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        what = f"{name}: the Hub answers {status or 'nothing'}: {error.server_message or first_line(error)}"
        if status in (401, 403):
            return closed(what, fix="log in with `hf auth login`, with a token that may read it")
        return kind(what, fix="wait a little, and try again")
    if isinstance(error, TransportError):
        return kind(f"{name}: the connection to {constants.ENDPOINT} broke: {first_line(error)}", fix=again)
    if isinstance(error, JSONDecodeError):
        what = f"{name}: {constants.ENDPOINT} does not answer as the Hub does"
        return kind(what, fix="check HF_ENDPOINT, and the proxy if there is one")
    if isinstance(error, ValueError):  # of an address, a proxy's or a token's
        fix = "check HF_ENDPOINT, HF_TOKEN, and the proxy if there is one"
        return kind(f"{name}: the Hub cannot be asked: {first_line(error)}", fix=fix)
    if isinstance(error, OSError) and error.errno is None:  # of a file that is not as long as the Hub has said
        return kind(f"{name}: {first_line(error)}", fix=again)
    return None
