"""A child process of the server that plans or reads data: one JSON object a line in, one out, until its input ends.

The server itself imports neither tokenizers nor the planner, so that it starts at once and stays small.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from strop.errors import StropError


def main() -> None:
    """Serves the methods of `plan` or `data`, whichever is asked for on the command line."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    methods = _methods(sys.argv[1])
    for line in sys.stdin:
        asked = json.loads(line)
        told: dict[str, Any]
        try:
            told = {"result": methods[asked["method"]](**asked["parameters"])}
        except StropError as error:
            told = {"error": error.as_json(), "exit": error.exit_code}
        except Exception as error:  # a fault of ours, or of a library, must not end the worker
            said = {"kind": "InternalError", "message": f"{type(error).__name__}: {error}", "where": []}
            told = {"error": {**said, "fix": "please report it"}, "exit": 1}
        text = json.dumps(told, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")
        answers.write(text + "\n")
        answers.flush()


def _methods(kind: str) -> dict[str, Callable[..., Any]]:
    if kind == "data":
        from strop.dash.data_reader import DataReader

        return {"rows": DataReader().rows}
    from strop.dash.planner import Planner, schema

    return {"plan": Planner().plan, "schema": schema}


if __name__ == "__main__":
    main()
