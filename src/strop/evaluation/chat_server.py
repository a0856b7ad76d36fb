"""A client of OpenAI-compatible servers, for judges and teachers."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from strop.errors import RecipeError, RunError

TRIES, TIMEOUT_S = 3, 300
REFUSED_STATUSES = {400, 413, 422}  # of this request, such as one that is too long; others may succeed
RETRIED_STATUSES = {408, 429, 500, 502, 503, 504}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects, because urllib would send the API key to the new address."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class RequestRefused(RunError):
    """Raised when a server refuses one request, or does not answer it usably."""


@dataclass
class ChatServer:
    """A model on an OpenAI-compatible server, with greedy decoding."""

    role: str  # what the model is used as, for errors
    url: str  # up to /v1
    key_variable: str  # environment variable with the server's API key
    model: str | None = None  # None: the first one of the server
    has_answered: bool = False  # whether a conversation was answered: then one unusable response is not the server's

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        if self.model is None:
            self.model = self.models()[0]

    def models(self) -> list[str]:
        """Return the names of the server's models, at least one."""
        names: list[str] = self._request("/models", _list_models)
        return names

    def choose(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
        """Return the first choice of the response to a conversation. Raises RunError."""
        body = {"model": self.model, "messages": list(messages), "temperature": 0, **options}
        choice: dict[str, Any] = self._request("/chat/completions", _first_choice, body)
        self.has_answered = True
        return choice

    def _request(self, path: str, select: Callable[[Any], Any], body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        for remaining_tries in reversed(range(TRIES)):
            try:
                with _OPENER.open(request, timeout=TIMEOUT_S) as response:
                    content: Any = response.read().decode(errors="replace")
                content = json.loads(content)
                return select(content)
            except (LookupError, TypeError, AttributeError, json.JSONDecodeError):  # it answered, but something else
                if not remaining_tries or not self.has_answered:
                    place = f"{self.role} {self.url}{path}"
                    what = f"{place}: not a response of an OpenAI-compatible server: {content!r:.300}"
                    kind = RequestRefused if self.has_answered else RunError
                    raise kind(what, fix="give the address up to /v1, and a model that the server has") from None
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED_STATUSES or not remaining_tries:
                    what = f"{self.role} {self.url}{path}: {error.code}: {error.read(300).decode(errors='replace')}"
                    kind = RequestRefused if error.code in REFUSED_STATUSES else RunError
                    raise kind(what, fix=f"check the address, the model, and the key in {self.key_variable}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not remaining_tries:
                    fix = "start it, or check the address"
                    raise RunError(f"{self.role} {self.url}{path} does not answer: {error}", fix=fix) from None
            time.sleep(TRIES - remaining_tries)
        raise AssertionError("the last try returns or raises")


def whole_text(choice: Mapping[str, Any]) -> str | None:
    """Return the text of a choice, or None if it was cut or filtered, or calls a tool."""
    text, is_whole = choice["message"].get("content"), choice.get("finish_reason") in ("stop", None)
    return text if isinstance(text, str) and is_whole and not choice["message"].get("tool_calls") else None


def is_address(name: str) -> bool:
    """Return whether a name is the address of a server, and not a model or a file."""
    return urllib.parse.urlsplit(name).scheme in ("http", "https")


def check_address(option: str, url: str, key_variable: str) -> None:
    """Raise RecipeError for an address with a password in it."""
    if "@" in urllib.parse.urlsplit(url).netloc:
        what = f"{option}: the address has a name or a password in it, which would be in reports"
        raise RecipeError(what, fix=f"write it without, and put the key into {key_variable}")


def _list_models(data: Any) -> list[str]:
    models = [data["data"][0], *data["data"][1:]]  # an empty list is an error
    return [str(model["id"]) for model in models]


def _first_choice(data: Any) -> dict[str, Any]:
    """Return the choice of a response, after checking that it has a message."""
    choice: dict[str, Any] = data["choices"][0]
    choice["message"].get("content")
    return choice
