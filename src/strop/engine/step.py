"""Which step trains a model: the fast one where it applies, else the model's own forward, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from strop.engine.eligibility import unsupported
from strop.engine.train.dropout import Masks
from strop.engine.train.fast import FastLoss, Gathered, Watch, before_gradient
from strop.engine.train.plain import PlainLoss

if TYPE_CHECKING:
    from strop.data.types import Example


@dataclass(frozen=True)
class Step:
    """token_loss: the summed loss of the supervised tokens of a micro-batch. log_probs: the summed log-probability of
    each example's supervised tokens (N,), fp64; examples with one prompt share it in the fast step. token_log_probs: of
    each supervised token (M,), one example after the other, without weights. last_hidden: what
    the model holds at the last token of each (N, h), for a reward model. masks: of dropout, which are told which step
    begins. name: fast or plain; why: the reason for plain, or what of the fast step the model's own modules
    compute. recompute: from its call on, each layer's input only is
    kept, and the layer is computed again in the backward pass; checkpoint: the same for this many layers, where the
    step can, else for all. exchange: lets go of the frozen weights, has them replaced, and takes up those that are
    there now. watch: sets what is to look at memory before each layer. gather: sets what brings the weights that are
    not always there. release: gives back what is held from one micro-batch to the next. lacking: why a card computes
    the fast step without strop's own kernels. offload: as recompute, and the inputs of layers wait in the host's
    memory; None where the step cannot. shares: what rows begin with in common is computed once."""

    token_loss: Callable[[Sequence[Example]], Tensor]
    log_probs: Callable[[Sequence[Example]], Tensor]
    token_log_probs: Callable[[Sequence[Example]], Tensor]
    last_hidden: Callable[[Sequence[Example]], Tensor]
    masks: Masks
    name: str
    why: str
    recompute: Callable[[], None]
    exchange: Callable[[Callable[[], None]], None] = lambda replace: replace()
    watch: Callable[[Watch], None] = lambda watch: None
    checkpoint: Callable[[int], None] = lambda layers: None
    release: Callable[[], None] = lambda: None
    why_no_triton: str = ""
    gather: Callable[[Gathered], None] = lambda gathered: None
    offload: Callable[[], None] | None = None
    shares: bool = False

    @property
    def packed(self) -> bool:
        """It computes no padding, so that rows of any lengths make a micro-batch."""
        return self.name == "fast"


def step_for(model: nn.Module, *, integers: bool = False) -> Step:
    """The step that this model, with its adapters, is trained by. integers: the fast step's, as of FastLoss."""
    why, whole = unsupported(model), cast(Any, model)
    if why is None:
        fast = FastLoss(model, integers=integers)
        return Step(
            fast,
            fast.log_probs,
            fast.token_log_probs,
            fast.last_hidden,
            fast.masks,
            "fast",
            fast.by_model,
            recompute=lambda: setattr(fast, "checkpoint_layers", whole.config.num_hidden_layers),
            exchange=fast.exchange,
            watch=lambda watch: setattr(fast, "watch", watch),
            checkpoint=lambda layers: setattr(fast, "checkpoint_layers", layers),
            release=fast.release,
            why_no_triton=fast.why_no_triton,
            gather=lambda gathered: setattr(fast, "gathered", gathered),
            offload=fast.offload if fast.on_card else None,
            shares=fast.prefix_sharing,
        )
    plain = PlainLoss(model)
    return Step(
        plain,
        plain.log_probs,
        plain.token_log_probs,
        plain.last_hidden,
        plain.masks,
        "plain",
        why,
        recompute=lambda: whole.gradient_checkpointing_enable({"use_reentrant": False}),
        watch=lambda watch: _watch_layers(model, watch),
        checkpoint=lambda layers: whole.gradient_checkpointing_enable({"use_reentrant": False}),
        gather=_gather_layers,
    )


def _gather_layers(gathered: Gathered) -> None:
    """Hooks in front of each module's forward, and of its gradient."""
    for where, module in gathered.modules.items():
        module.register_forward_pre_hook(lambda *_, where=where: gathered(where))
        module.register_forward_hook(lambda _, __, found, where=where: _before_gradient(found, gathered, where))


def _before_gradient(found: Any, gathered: Gathered, where: int | str) -> None:
    output = found[0] if isinstance(found, tuple) else found
    if where != "embedding" and output.requires_grad:
        before_gradient(output, lambda: gathered(where))


def _watch_layers(model: nn.Module, watch: Watch) -> None:
    """Hooks on the decoder layers: the longest list of modules there is."""
    lists: list[nn.ModuleList] = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for number, layer in enumerate(sorted(lists, key=len)[-1]):
        layer.register_forward_pre_hook(lambda *_, number=number: watch() if number else watch.begin())
