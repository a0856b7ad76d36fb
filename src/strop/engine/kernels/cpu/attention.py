"""Attention over packed documents as one compiled loop, for CPUs with AVX512-BF16."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from strop.engine.kernels.cpu.attention_tiles import Work, attend, attend_backward
from strop.engine.kernels.cpu.compiled import array
from strop.engine.train.attention import Heads
from strop.engine.train.packing import Documents


class TileAttention(Function):
    """Attention, in bf16; saves qkv, the output and a number for each row and head.

    Gradients beyond the norms of q and k are written in place, of the prefix's rows after the sum over documents.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        out = heads.new(len(qkv), heads.query * heads.size, qkv)
        sums = heads.new(len(qkv), heads.query, cos)
        attend(heads.normalized(qkv), _turn(heads, cos, sin), _work(heads, documents), out, sums)
        ctx.heads, ctx.documents = heads, documents
        ctx.save_for_backward(qkv, cos, sin, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        heads: Heads = ctx.heads
        qkv, cos, sin, out, sums = ctx.saved_tensors
        result = torch.empty_like(qkv)
        into = heads.views(result)
        grad = grad.reshape(len(qkv), heads.query, heads.size)
        work = _work(heads, ctx.documents)
        attend_backward(grad, out, sums, heads.normalized(qkv), _turn(heads, cos, sin), work, into)
        heads.backward_norms_(into, qkv)
        return result, None, None, None, None


def _turn(heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, np.float32]:
    return cos, sin, np.float32(heads.scale)


def _work(heads: Heads, documents: Documents) -> Work:
    thread_tasks = documents.thread_tasks(heads.key_value, torch.get_num_threads())
    shape = heads.key_value, heads.group, heads.size, heads.window
    sinks = np.empty(0, np.float32) if heads.sinks is None else array(heads.sinks)
    return documents.table, *thread_tasks, *shape, np.float32(heads.softcap), sinks
