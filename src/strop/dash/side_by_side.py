"""Requests as values and values as answers: strict JSON in, one shape of error out, server-sent events."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from strop.data.reading.json_reader import JsonError, loads
from strop.errors import FolderError, InputError, StropError

Endpoint = Callable[[Request], Awaitable[Response]]
Value = TypeVar("Value")


class Busy(InputError):
    """Not now: a run that is to be resumed runs, one that is to be stopped does not."""


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises InputError."""
    try:
        found = loads((await request.body()).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"the body is not UTF-8: {error.reason}") from None
    except JsonError as error:
        raise InputError(f"the body is not JSON: {error.what}") from None
    except RecursionError:
        raise InputError("the body is nested too deep") from None
    if not isinstance(found, dict):
        raise InputError("the body is not a JSON object")
    return found


class Fields:
    """The fields of a body or a query, each taken once and of its type; what is left over is refused."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._left = dict(given)

    def take(self, name: str, kind: type[Value] | tuple[type, ...], default: Any = ...) -> Any:
        value = self._left.pop(name, None)
        if value is None and default is not ...:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(one.__name__ for one in kinds)
            raise InputError(f"{name}: {'is required' if value is None else f'is not {wanted}'}")
        return value

    def number(self, name: str, default: float | None) -> float | None:
        """Of a query, whose values are text."""
        text = self._left.pop(name, None)
        if text in (None, ""):
            return default
        try:
            value = float(str(text))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{name}: {str(text)[:80]!r} is not a number")
        return value

    def end(self) -> None:
        if self._left:
            raise InputError(f"unknown parameter: {next(iter(self._left))}")


def query(request: Request) -> Fields:
    return Fields(dict(request.query_params))


def answer(value: Any, status: int = 200) -> Response:
    return JSONResponse(_clean(value), status)


def _clean(value: Any) -> Any:
    """JSON has no NaN; lone surrogates of damaged rows have no UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
        return value
    except UnicodeEncodeError:
        return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except ValueError:
        return json.loads(json.dumps(value), parse_constant=lambda _: None)


def event(name: str, value: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(_clean(value), ensure_ascii=False)}\n\n".encode("utf-8", "replace")


def failed(error: StropError, status: int | None = None) -> Response:
    if status is None:
        kinds = {Busy: 409, FolderError: 404, InputError: 400}
        status = next((number for kind, number in kinds.items() if isinstance(error, kind)), 503)
    return JSONResponse({"error": error.as_json()}, status)


def told(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose errors of ours are answers."""

    async def run(request: Request) -> Response:
        try:
            return await endpoint(request)
        except StropError as error:
            return failed(error)

    return run


Events = AsyncIterator[bytes]
