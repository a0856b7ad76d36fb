"""Check whether Triton kernels work on a GPU: an installed Triton may not.

Triton compiles a kernel at its first launch, together with C code that launches it. Without a C compiler, without
Python's headers, or on a GPU that is too old for it, that launch fails.
"""

from __future__ import annotations

from functools import cache
from subprocess import CalledProcessError

import torch

from strop.engine.kernels import eager


@cache
def triton_error(device: torch.device) -> str | None:
    """Run one kernel on the device, once a process; return None if its result is right, else the error in one line."""
    try:
        from strop.engine.kernels.cuda.elementwise import rms_norm
    except Exception as error:  # not installed, or for another Python version
        return f"Triton cannot be imported: {_one_line(error)}"
    try:
        x, weight = torch.linspace(-1, 1, 300, device=device).view(3, 100), torch.ones(100, device=device)
        result, expected = (norm(x, weight, 1e-6, 0.0) for norm in (rms_norm, eager.rms_norm))
        is_right = torch.allclose(result, expected, rtol=1e-4, atol=1e-4)
    except Exception as error:  # whatever fails, PyTorch's operations work
        return f"Triton cannot compile kernels: {_one_line(error)}"
    return None if is_right else "Triton's kernels compute wrong results"


def _one_line(error: Exception) -> str:
    if isinstance(error, CalledProcessError):
        return "the C compiler failed (are Python's headers installed?)"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
