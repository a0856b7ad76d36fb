"""What the Hugging Face Hub's client raises while something is fetched, as errors that say what to do."""

from __future__ import annotations

from json import JSONDecodeError

from strop.errors import InputError, first_line


def not_given(
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
        return not_given(cause, name, page, kind, closed) if isinstance(cause, HfHubHTTPError) else None
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
