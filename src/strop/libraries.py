"""PyTorch, transformers and peft, which every command that computes imports."""

from __future__ import annotations

import gc

from strop.engine.compiler import begin_ahead


def load(*, compiles: bool = True) -> None:
    """Imports them without Python's search for rubbish on the way, which is a quarter of their time, and later searches
    leave out what they made.

    compiles: begin the process that compiles loops, where none are compiled yet, to read its libraries meanwhile.
    """
    if compiles:
        begin_ahead()
    gc.disable()
    try:
        import peft  # noqa: F401 (to have it loaded)
        import torch  # noqa: F401 (to have it loaded)
        import transformers  # noqa: F401 (to have it loaded)
    finally:
        gc.enable()
    gc.freeze()
