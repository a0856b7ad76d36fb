"""Environment variables for Python processes that strop starts."""

from __future__ import annotations

import os
import sys


def safe_path_env() -> dict[str, str]:
    """Return PYTHONSAFEPATH unless the working folder is on this process's module path."""
    # `python -m` puts the working folder first, where a json.py shadows the standard library. Python 3.10 ignores this.
    working_folder = {"", os.getcwd()}
    return {} if working_folder & set(sys.path) else {"PYTHONSAFEPATH": "1"}
