"""The environment of Python processes that strop starts."""

from __future__ import annotations

import os
import sys


def safe_path_env() -> dict[str, str]:
    """Return variables that keep the working folder off a child's module path, if it is not on this process's path."""
    # `python -m` puts the working folder first, where a json.py shadows the standard library; 3.10 ignores the variable
    working_folder = {"", os.getcwd()}
    return {} if working_folder & set(sys.path) else {"PYTHONSAFEPATH": "1"}
