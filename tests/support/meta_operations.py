"""Operations on tensors without values that PyTorch describes wrongly."""

from __future__ import annotations

from typing import Any

import torch

_LIBRARIES: list[Any] = []  # a library's functions are removed with it


def correct_meta_backward() -> None:
    """Replace torch's backward of memory-efficient attention on meta tensors, which lacks arguments (torch 2.13)."""
    if _LIBRARIES:
        return

    def backward(grad: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, *_: Any, **__: Any) -> Any:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), q.new_empty(())

    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl("_efficient_attention_backward", backward, allow_override=True)
    _LIBRARIES.append(library)
