"""PyTorch, transformers and peft, which every command that computes imports."""

from __future__ import annotations

import gc


def load() -> None:
    """Imports them without Python's search for rubbish on the way, which is a quarter of their time, and later searches
    leave out what they made."""
    gc.disable()
    try:
        import peft  # noqa: F401 (to have it loaded)
        import torch  # noqa: F401 (to have it loaded)
        import transformers  # noqa: F401 (to have it loaded)
    finally:
        gc.enable()
    gc.freeze()
