"""One step of a model of any size on the simulated GPU: its kernels by operation, and its peak next to the plan."""

from __future__ import annotations

from tests.simulated_gpu import fake  # first: before torch

# isort: split

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PretrainedConfig

from strop.config.load import resolve
from strop.data.types import Example
from strop.engine.train.fast import FastLoss
from strop.models.families.shape import ModelShape
from strop.models.host_layers import NUM_BUFFERS
from strop.models.lora import cast_trainable_to_fp32
from strop.models.quantize import QuantizedLinear, replace_linears
from strop.models.sharding import SHARDED_PARTS, ShardedTensor, assign_views, in_layer_order
from strop.planning.activations import MicroBatch
from strop.planning.memory import Phase, train_phase
from strop.planning.workload import Workload

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "70b": (8192, 28672, 80, 64, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (64, 128, 2, 4, 2, 512),
    "gemma-2-2b": (2304, 9216, 26, 8, 4, 256000),
}


@dataclass(frozen=True)
class Case:
    shape: str
    scheme: str = "none"
    tokens: int = 4096
    checkpointed: int = 0
    offload: bool = False
    layers: int | None = None
    documents: int = 1  # of equal length
    streamed: bool = False

    @property
    def config(self) -> PretrainedConfig:
        hidden, inner, layers, heads, few, words = SHAPES[self.shape]
        if self.shape.startswith("gemma-2"):
            return Gemma2Config(
                vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=self.layers or layers,
                num_attention_heads=heads, num_key_value_heads=few, head_dim=256,
            )  # fmt: skip
        return LlamaConfig(
            vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=self.layers or layers,
            num_attention_heads=heads, num_key_value_heads=few, tie_word_embeddings=False,
            max_position_embeddings=32768,
        )  # fmt: skip

    def rows(self) -> list[Example]:
        """Return rows whose tokens are all supervised, and that share no prefix."""
        length = self.tokens // self.documents
        weights = np.float32(np.arange(length) > 0)
        return [Example((np.arange(length, dtype=np.int32) + n) % 500, weights, "", n) for n in range(self.documents)]

    def planned(self) -> Phase:
        more = {} if self.scheme == "none" else {"model.resident_layers": 0}
        options = {
            "model.name": "m", "data.train": "d", "model.device": "cuda", "model.dtype": "bf16", "lora.r": 16,
            "model.quantization": self.scheme, **more, "model.placement": "streamed" if self.streamed else "auto",
            "train.gradient_checkpointing": "offload" if self.offload else self.checkpointed or "off",
        }  # fmt: skip
        workload = Workload.from_recipe(resolve(None, options).recipe, ModelShape.from_config(self.config.to_dict()))
        return train_phase(workload, MicroBatch.rows([self.tokens // self.documents] * self.documents, more=False))


def build_model(case: Case) -> torch.nn.Module:
    """Return the model on the GPU, with adapters of rank 16 on all linear layers."""
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(case.config, dtype=torch.bfloat16)
        base = base.eval().requires_grad_(False)
        if case.scheme == "nf4":
            for layer in replace_linears(base, "nf4", torch.bfloat16, lambda name: "layers" in name).values():
                fill(layer)
        if case.streamed:
            share_buffers(base.model.layers)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        return cast_trainable_to_fp32(get_peft_model(base, lora)).train()


def fill(layer: QuantizedLinear) -> None:
    """Give a layer the tensors of a quantized weight, without values."""
    elements = layer.in_features * layer.out_features
    blocks = elements // 64
    layer.weight = torch.nn.Parameter(torch.empty(elements // 2, 1, dtype=torch.uint8), False)
    layer.constants = {
        "absmax": torch.empty(blocks, dtype=torch.uint8), "quant_map": torch.empty(16),
        "nested_absmax": torch.empty(-(-blocks // 256)), "nested_quant_map": torch.empty(256),
    }  # fmt: skip
    layer._offset = torch.empty(())
    shape = [layer.out_features, layer.in_features]
    layer._state = {"blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.01, "shape": shape}


def share_buffers(layers: torch.nn.ModuleList) -> None:
    """Have layers use two buffers in turn, laid out as those of a base in host memory (models.host_layers)."""
    buffers: list[Any] = [None] * NUM_BUFFERS
    for number, layer in enumerate(layers):
        tensors = in_layer_order([tensor for module in layer.modules() for tensor in large_tensors(module)])
        slot = number % NUM_BUFFERS
        if buffers[slot] is None:
            buffers[slot] = torch.empty(sum(tensor.size for tensor in tensors), dtype=torch.uint8)
        assign_views(tensors, buffers[slot])


def large_tensors(module: Any) -> Iterator[ShardedTensor]:
    """Yield the tensors of a linear layer, which are set and never read."""
    if isinstance(module, torch.nn.Linear | QuantizedLinear):
        weight = module.weight
        assign = lambda view: setattr(module, "weight", torch.nn.Parameter(view, False))  # noqa: E731
        yield ShardedTensor("weight", weight.shape, weight.dtype, assign, no_bytes)
    if isinstance(module, QuantizedLinear):
        for name in filter(module.constants.__contains__, SHARDED_PARTS):
            constant = module.constants[name]
            assign = partial(module.constants.__setitem__, name)
            yield ShardedTensor(name, constant.shape, constant.dtype, assign, no_bytes)


def no_bytes(low: int, high: int) -> torch.Tensor:
    raise NotImplementedError("weights on the simulated GPU have no values")


def step(gpu: fake.SimulatedGpu, case: Case) -> dict[str, Any]:
    """Return the kernels of forward and backward, and the bytes of the base and of the step's peak, with the plan's."""
    meter = fake.Meter()

    def started(kernel: Any, *_: Any) -> None:
        meter.kernels[kernel.__name__] += 1

    with ExitStack() as stack:
        stack.enter_context(patch("strop.engine.kernels.cuda.selftest.find_failures", lambda device: {}))
        stack.enter_context(patch("strop.engine.kernels.cuda.launch.enqueue", started))
        stack.enter_context(gpu.present())
        model = build_model(case)
        loss = FastLoss(model, checkpoint_layers=case.checkpointed)
        if case.offload:
            loss.offload()
        allocated = allocated_bytes(model, meter)
        rows = case.rows()
        with meter:
            (loss.token_loss(rows) / case.tokens).backward()
    parts, adapters = case.planned().parts, sum(x.nbytes for x in model.parameters() if x.requires_grad)
    base = parts["weights"] + parts["quantization_constants"]
    parts_over_base = ("adapters", "saved_activations", "live_layer", "head", "gradients", "workspace")
    return {
        "kernels": dict(meter.kernels), "launches": sum(meter.kernels.values()),
        "base": allocated - adapters, "planned_base": base,
        "over_base": meter.peak + adapters, "planned_over_base": sum(parts[name] for name in parts_over_base),
        "peak_at": meter.peak_at, "parts": dict(parts),
    }  # fmt: skip


def allocated_bytes(model: torch.nn.Module, meter: fake.Meter) -> int:
    """Return the bytes allocated before the step, and exclude them from the meter."""
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    constants = [tensor for module in quantized for tensor in module.constants.values()]
    tensors = {x.untyped_storage()._cdata: x for x in [*model.parameters(), *model.buffers(), *constants]}
    for x in tensors.values():
        meter.exclude(x)
    return sum(x.untyped_storage().nbytes() for x in tensors.values())
