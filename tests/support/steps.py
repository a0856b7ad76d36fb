"""Training steps with some members replaced."""

from __future__ import annotations

import copy
from typing import Any

from strop.engine.step import Step


def changed_step(step: Step, **members: Any) -> Step:
    """Return a copy of the step in which these methods or attributes are replaced."""
    changed = copy.copy(step)
    for name, member in members.items():
        setattr(changed, name, member)
    return changed
