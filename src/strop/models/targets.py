"""The linear layers of a model by kind, and which of them an adapter's targets name. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from strop.errors import ModelError, nearest

TARGET_SETS = ("all-linear", "attention", "gate", "experts")
EXPERTS = "Experts"  # the type of a mixture's: each kind is a parameter that holds all experts of a layer
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


@dataclass(frozen=True)
class LinearKind:
    """All linear layers that share a leaf name and a shape, such as q_proj in each block."""

    name: str
    type: str
    in_features: int
    out_features: int
    count: int
    sets: tuple[str, ...]  # the named target sets that hold it
    kept_16_bit: str | None  # why a quantized base keeps it in 16 bit, if it does

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features * self.count


def target_names(kinds: Sequence[LinearKind], targets: str | Sequence[str]) -> list[str]:
    """Leaf names that peft is to adapt. Raises ModelError for a name that matches nothing, listing those there are."""
    names: list[str] = []
    for target in [targets] if isinstance(targets, str) else targets:
        leaf = target.rpartition(".")[2]
        picked = [kind.name for kind in kinds if target in kind.sets or kind.name in (target, leaf)]
        if not picked:
            known = list(dict.fromkeys(kind.name for kind in kinds))
            raise ModelError(
                f"lora.target_modules: {target} matches no linear layer{nearest(target, known)}",
                fix=f"choose among {', '.join([*TARGET_SETS, *known])}",
            )
        names += picked
    return list(dict.fromkeys(names))


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern of ranks or alphas is for the module at this path, as peft picks it."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def embedding_kind(name: str, rows: int, size: int, count: int = 1) -> LinearKind:
    """An embedding as `strop modules` lists it: no adapter sits on it, and it stays in 16 bit."""
    return LinearKind(name, "Embedding", rows, size, count, (), "embedding")


def sets_of(path: str) -> tuple[str, ...]:
    """The named target sets that a linear layer at this path belongs to."""
    parent, _, leaf = path.rpartition(".")
    if leaf in EMBEDDINGS or not parent:
        return ()
    near = parent.split(".")[-2:]  # BERT's: attention.self.query
    return (
        "all-linear",
        *(("attention",) if any("attn" in part or "attention" in part for part in near) else ()),
        *(("gate",) if leaf in ("gate_proj", "gate_up_proj") else ()),
    )


def expert_sets(parameter: str) -> tuple[str, ...]:
    """The same, of a parameter that holds experts."""
    return ("all-linear", "experts", *(("gate",) if parameter in ("gate_proj", "gate_up_proj") else ()))


def is_router(path: str) -> bool:
    """Whether a linear layer chooses experts: it is adapted where it is named, and not by any set."""
    parent, _, leaf = path.rpartition(".")
    return leaf in ("router", "shared_expert_gate") or parent.rpartition(".")[2] == "router"
