"""PyTorch, transformers and peft, which every command that computes imports."""

from __future__ import annotations

import gc

from strop.engine.kernels.compiler import ANSWERS as ANSWERS
from strop.engine.kernels.compiler import STEP as STEP
from strop.engine.kernels.compiler import begin_ahead


def load(exercise: str | None = STEP) -> None:
    """Imports them without Python's search for rubbish on the way, which is a quarter of their time, and later searches
    leave out what they made.

    exercise: of which the process that compiles loops is begun, where they are not yet, to read its libraries
    meanwhile: STEP, ANSWERS, or None.
    """
    if exercise:
        begin_ahead(exercise)
    gc.disable()
    try:
        import peft  # noqa: F401 (to have it loaded)
        import torch  # noqa: F401 (to have it loaded)
        import transformers  # noqa: F401 (to have it loaded)
    finally:
        gc.enable()
    gc.freeze()
