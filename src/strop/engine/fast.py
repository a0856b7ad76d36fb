"""The fast step for the families whose layers it knows: one row in FAMILIES and one parity test each.

FastLoss reads the weights and the adapters of a transformers + peft model and computes the loss itself. The model
stays whole: its optimizer, save, merge and generate go on with the same parameters. Base weights that share an input
are laid side by side once; the model's own weights become views of them, so that nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strop.engine import eager
from strop.engine.attention import Attention, Heads, TileAttention, on_card
from strop.engine.functions import Glu, Norm, Ops, RmsNorm, apply
from strop.engine.head import SupervisedLoss
from strop.engine.joined import Joined, Quantized, Workspace, base_of
from strop.engine.packed import Packed, pack
from strop.machine.probe import probe

if TYPE_CHECKING:
    from strop.data.conversation import Example


@dataclass(frozen=True)
class Family:
    """Where a family's decoder layer differs from Llama's."""

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    norm_offset: float = 0.0  # 1: the norms' weights are stored as their difference from 1
    mlp_norm: str = "post_attention_layernorm"
    after_attention: str | None = None  # norms of what a block adds to the residual stream
    after_mlp: str | None = None


GEMMA = Family(
    norm_offset=1.0,
    mlp_norm="pre_feedforward_layernorm",
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}


def unsupported(model: nn.Module) -> str | None:
    """Why the fast step cannot compute this model, in words for the user; None where it can."""
    if not isinstance(model, PeftModel):
        return "the model has no peft adapter"
    base: Any = model.get_base_model()
    family = FAMILIES.get(base.config.model_type)
    if family is None:
        return f"model family {base.config.model_type} is not in the table of the fast step"
    return _unsupported_adapter(model, base, family) or _unsupported_base(base, family)


def _unsupported_adapter(model: Any, base: Any, family: Family) -> str | None:
    known = {id(module) for layer in base.model.layers for group in _linears(layer, family) for module in group}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and id(module) not in known:
            return f"an adapter on {name}"
        if isinstance(module, LoraLayer):
            variants = [*module.lora_variant.values(), *(b for b in module.lora_bias.values() if b)]
            if type(module) is not PeftLinear or variants:
                return f"{name}: a variant of LoRA (DoRA, trained bias) ({type(module).__name__})"
            if any(not isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values()):
                return "lora dropout above 0"
            if module.merged:
                return f"{name}: its adapter is merged"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_A." not in name and ".lora_B." not in name:
            return f"{name} is trained in full"
    return None


def _unsupported_base(base: Any, family: Family) -> str | None:
    config = base.config
    for layer in base.model.layers:
        for module in (base_of(module) for group in _linears(layer, family) for module in group):
            if type(module) is not nn.Linear and not isinstance(module, Quantized):
                return f"unknown weights ({type(module).__name__})"
    weights = [p for p in base.parameters() if not p.requires_grad and p.is_floating_point()]
    kinds = {(p.dtype, p.device) for p in weights} | {
        (module.dtype, module.weight.device) for module in base.modules() if isinstance(module, Quantized)
    }
    if len(kinds) != 1:
        return "base weights of several types or on several devices"
    if weights[0].dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"base weights in {weights[0].dtype}"
    activation = _activation(config)
    if activation not in ("silu", "gelu_pytorch_tanh"):
        return f"activation {activation}"
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        if getattr(config, name, 0):
            return f"{name} above 0"
    if getattr(config, "use_bidirectional_attention", None):
        return "use_bidirectional_attention"
    if getattr(config, "attn_logit_softcapping", None) and weights[0].device.type != "cpu":
        return "attn_logit_softcapping, which PyTorch's own attention does not know"
    if family is GEMMA and not hasattr(base.model.embed_tokens, "embed_scale"):
        return "a transformers version that scales the embeddings outside of them"
    kind = getattr(base.model.rotary_emb, "rope_type", "default")
    for rope in kind.values() if isinstance(kind, dict) else [kind]:
        if rope in ("dynamic", "longrope"):  # the angles depend on the longest row of the batch
            return f"rotary embedding of type {rope}"
    return None


def ops_for(device: torch.device, dtype: torch.dtype, warm: bool) -> Ops:
    """numba's loops on a CPU, PyTorch's compiled kernels on a card, else its plain operations: the same numbers."""
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        from strop.engine.cpu import kernels  # its import starts threads
        from strop.engine.cpu.warm import compile_once

        if warm:
            compile_once(dtype, kernels.cache_folder())

        return cast(Ops, kernels)
    if device.type == "cuda":
        from strop.engine.card import fused

        return cast(Ops, fused if fused.available() else eager)
    return cast(Ops, eager)


def _linears(layer: Any, family: Family) -> Iterator[list[Any]]:
    """The layer's linear modules, in groups that share their input."""
    yield [getattr(layer.self_attn, name) for name in family.qkv]
    yield [layer.self_attn.o_proj]
    yield [getattr(layer.mlp, name) for name in family.gate_up]
    yield [layer.mlp.down_proj]


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


@dataclass(frozen=True)
class Layer:
    """One decoder layer as the fast step computes it."""

    qkv: Joined
    heads: Heads
    rope: str | None
    o: Joined
    after_attention: Norm | None
    gate_up: Joined
    down: Joined
    after_mlp: Norm | None


class Watch(Protocol):
    """Told of each micro-batch and each layer that is about to be computed; may raise (machine.memory.MemoryWatch)."""

    def begin(self) -> None: ...

    def __call__(self) -> None: ...


class FastLoss:
    """The loss of a micro-batch through the fast step, for models that `unsupported` has no reason against.

    prefix_sharing: compute a prefix common to all examples once. checkpoint_layers: this many layers, from the first,
    keep nothing but their input and are computed again in the backward. warm: have the loops compiled beforehand, in
    another process. Made after the model is on its device and in its type.
    """

    watch: Watch | None = None  # looked at before each layer

    def __init__(
        self, model: nn.Module, *, prefix_sharing: bool = True, checkpoint_layers: int = 0, warm: bool = True
    ) -> None:
        reason = unsupported(model)
        assert reason is None, reason
        base: Any = cast(Any, model).get_base_model()
        self.prefix_sharing, self.checkpoint_layers = prefix_sharing, checkpoint_layers
        self._decoder, self._head = base.model, base.get_output_embeddings()
        self._softcap = float(getattr(base.config, "final_logit_softcapping", None) or 0)
        self._device: torch.device = self._head.weight.device
        self._ops = ops_for(self._device, self._head.weight.dtype, warm)
        bf16_on_cpu = self._device.type == "cpu" and self._head.weight.dtype == torch.bfloat16
        self._machine = probe() if bf16_on_cpu else None
        self._config, self._family = base.config, FAMILIES[base.config.model_type]
        self._norm = self._norm_of(base.model.norm, self._family)
        self.exchange(lambda: None)

    def exchange(self, replace: Callable[[], None]) -> None:
        """Lets go of the layers' weights, has them replaced in the model, and takes up those that are there then."""
        self._layers: list[Layer] = []
        replace()
        self._workspace = Workspace()
        self._layers = [self._layer(layer, self._family, self._config) for layer in self._decoder.layers]

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Sum over supervised tokens of weight * cross entropy: an fp32 scalar, differentiable in the adapters."""
        if self.watch is not None:
            self.watch.begin()
        batch = pack(examples, prefix_sharing=self.prefix_sharing, device=self._device)
        hidden = self._decoder.embed_tokens(batch.ids)
        angles = self._angles(batch.positions)
        last = len(self._layers) - 1
        for i, layer in enumerate(self._layers):
            rows = batch.rows if i == last else None
            if i < self.checkpoint_layers and torch.is_grad_enabled():
                hidden = checkpoint(
                    self._through, layer, hidden, batch, angles, rows, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = self._through(layer, hidden, batch, angles, rows)
        hidden = apply(RmsNorm, hidden, self._norm)
        if len(batch.picked) != len(batch.rows):  # a row behind which several examples part has several labels
            hidden = hidden[batch.picked]
        return apply(SupervisedLoss, hidden, batch.labels, batch.weights, self._head.weight, self._softcap, self._ops)

    def _through(
        self,
        layer: Layer,
        hidden: Tensor,
        batch: Packed,
        angles: dict[str | None, tuple[Tensor, Tensor]],
        rows: Tensor | None,
    ) -> Tensor:
        """One layer; rows: the only rows that anything behind this layer reads (its keys and values need all)."""
        if self.watch is not None:
            self.watch()
        qkv = layer.qkv(hidden)
        cos, sin = angles[layer.rope]
        shape = (qkv, layer.heads, cos, sin, batch.documents)
        if qkv.device.type == "cpu":
            mixed = apply(TileAttention if layer.heads.tiled else Attention, *shape)
        else:
            mixed = on_card(*shape)
        if rows is not None:
            mixed, hidden = mixed[rows], hidden[rows]
        hidden = _added(hidden, mixed, layer.o, layer.after_attention)
        return _added(hidden, layer.gate_up(hidden), layer.down, layer.after_mlp)

    def _angles(self, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """cos and sin (T, m) for each kind of rotary embedding among the layers."""
        found = {}
        for kind in {layer.rope for layer in self._layers}:
            like = torch.empty(0, device=positions.device)
            cos, sin = self._decoder.rotary_emb(like, positions[None], *([] if kind is None else [kind]))
            half = cos.shape[-1] // 2  # both halves are the same
            found[kind] = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return found

    def _norm_of(self, module: Any, family: Family) -> Norm:
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        return Norm(self._ops, module.weight.data, float(eps), family.norm_offset)

    def _layer(self, layer: Any, family: Family, config: Any) -> Layer:
        def norm(owner: Any, name: str | None) -> Norm | None:
            found = getattr(owner, name, None) if name else None
            return None if found is None else self._norm_of(found, family)

        attention, workspace = layer.self_attn, self._workspace
        tiles = self._machine is not None and self._machine.tiles
        qkv, o, gate_up, down = _linears(layer, family)
        softcap, size = float(getattr(attention, "attn_logit_softcapping", None) or 0), attention.head_dim
        heads = Heads(
            self._ops,
            query=config.num_attention_heads,
            key_value=config.num_key_value_heads,
            size=size,
            scale=float(attention.scaling),
            # Mistral and Phi-3 keep it in the config alone, the others in the layers it applies to.
            window=int(getattr(attention, "sliding_window", getattr(config, "sliding_window", None)) or 0),
            softcap=softcap,
            q_norm=norm(attention, "q_norm"),
            k_norm=norm(attention, "k_norm"),
            tiled=self._machine is not None and self._machine.has_tiles(size, softcap),
        )
        by_type = isinstance(getattr(self._decoder.rotary_emb, "rope_type", None), dict)
        return Layer(
            Joined(qkv, norm(layer, "input_layernorm"), workspace, tiles),
            heads,
            attention.layer_type if by_type else None,
            Joined(o, None, workspace, tiles),
            norm(layer, family.after_attention),
            Joined(gate_up, norm(layer, family.mlp_norm), workspace, tiles),
            Joined(down, Glu(self._ops, _activation(config)), workspace, tiles),
            norm(layer, family.after_mlp),
        )


def _added(hidden: Tensor, x: Tensor, linear: Joined, after: Norm | None) -> Tensor:
    """The residual stream with what a block adds to it."""
    return linear(x, hidden) if after is None else hidden + apply(RmsNorm, linear(x), after)
