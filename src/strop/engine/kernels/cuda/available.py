"""Whether the kernels of this room work on a card: an installed Triton may not.

Triton compiles a kernel at its first launch, and with it a piece of C that starts it: without a C compiler, without
Python's headers, or on a card that is too old for it, that launch fails.
"""

from __future__ import annotations

from functools import cache
from subprocess import CalledProcessError

import torch

from strop.engine.kernels import eager


@cache
def why_not(device: torch.device) -> str | None:
    """Runs one kernel there, once a process. None where its numbers are right, else what is the matter, in a line."""
    try:
        from strop.engine.kernels.cuda.elementwise import rms_norm
    except Exception as error:  # not installed, or for another Python
        return f"Triton cannot be imported: {_line(error)}"
    try:
        x, weight = torch.linspace(-1, 1, 300, device=device).view(3, 100), torch.ones(100, device=device)
        found, expected = (way(x, weight, 1e-6, 0.0) for way in (rms_norm, eager.rms_norm))
        right = torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    except Exception as error:  # whatever ails it, PyTorch's own operations are there
        return f"Triton cannot make kernels: {_line(error)}"
    return None if right else "Triton's kernels compute wrong numbers"


def _line(error: Exception) -> str:
    if isinstance(error, CalledProcessError):
        return "the C compiler failed (are Python's headers installed?)"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
