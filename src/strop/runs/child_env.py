"""Processes of Python that this one starts."""

from __future__ import annotations

import os
import sys


def safe_path_env() -> dict[str, str]:
    """What such a process finds in its environment, so that a file of the working folder (`json.py`) is no module to
    it, as it is none to this process. `python -m` would look there first; Python 3.10 has no way to be told."""
    here = {"", os.getcwd()}
    return {} if here & set(sys.path) else {"PYTHONSAFEPATH": "1"}
