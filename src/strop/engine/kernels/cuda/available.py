"""Check whether Triton kernels work on a GPU.

Triton compiles a kernel, and the C code that launches it, at the first launch. This fails without a C compiler, without
Python's headers, or on a GPU that Triton does not support.
"""

from __future__ import annotations

from functools import cache
from subprocess import CalledProcessError

import torch

from strop.engine.kernels import eager
from strop.errors import first_line


@cache
def triton_error(device: torch.device) -> str | None:
    """Run a kernel on the device and return why Triton cannot be used, in one line, or None if the result is right."""
    try:
        from strop.engine.kernels.cuda.elementwise import rms_norm
    except Exception as error:  # Triton is not installed, or was built for another Python version
        return f"Triton cannot be imported: {_describe_error(error)}"
    try:
        x, weight = torch.linspace(-1, 1, 300, device=device).view(3, 100), torch.ones(100, device=device)
        result, expected = (norm(x, weight, 1e-6, 0.0) for norm in (rms_norm, eager.rms_norm))
        is_right = torch.allclose(result, expected, rtol=1e-4, atol=1e-4)
    except Exception as error:  # whatever fails, training continues with PyTorch's operations
        return f"Triton cannot compile kernels: {_describe_error(error)}"
    return None if is_right else "Triton's kernels compute wrong results"


def _describe_error(error: Exception) -> str:
    if isinstance(error, CalledProcessError):
        return "the C compiler failed (are Python's headers installed?)"
    return first_line(error)
