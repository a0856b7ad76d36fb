"""What a checkpoint calls its tensors, and what the model calls them.

transformers 5 renames and joins weights while it loads them: a mixture's experts are a tensor each on disk and one
parameter in the model, a text half lies under another prefix. Its own rules are used here, a few tensors at a time, in
both directions; where names agree, and that is so for most dense families, nothing happens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from strop.errors import ModelError

FLOATS = ("F64", "F32", "F16", "BF16")
_MASKS = ("bias", "masked_bias", "causal_mask")  # of attention, as older checkpoints hold them: no weights


@dataclass
class Group:
    """Tensors of a file that become parameters together. place: the parameter, or the first of several; None where the
    model has no use for the tensors. pattern: of each tensor, the one that the converter knows it by."""

    place: str | None
    names: list[str] = field(default_factory=list)
    converter: Any = None
    patterns: list[str] = field(default_factory=list)


class Layout:
    """How the tensors of a checkpoint become the parameters of a model. model: without weights (meta tensors)."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model: Any = model
        self._state: dict[str, Tensor] = model.state_dict()
        rules = get_model_conversion_mapping(self._model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        known = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        found: dict[str, Group] = {}
        self.left: dict[str, str] = {}  # tensors that become no parameter, with what the model would call them
        for name in sorted(names, key=dot_natural_key):
            place, pattern = self._place(name)
            group = found.setdefault(place or f" {name}", Group(place))
            group.names.append(name)
            if place is not None and pattern is not None:
                group.converter = group.converter or known[pattern]
                group.patterns.append(pattern)
        self.groups = sorted(found.values(), key=lambda group: min(group.names))
        self._model.__dict__["_weight_conversions"] = [rule for rule in rules if rule.was_used()]

    def _place(self, name: str) -> tuple[str | None, str | None]:
        """The parameter that a tensor is (a part of), and the converter's pattern: as transformers' loader finds it."""
        prefix = self._model.base_model_prefix
        place, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if place not in self._state and name in self._state:
            place, pattern = rename_source_key(name, [], [], prefix, self._state)
        if place in self._state:
            return place, pattern
        self.left[name] = place
        return None, None

    def check(self, name: str, tensors: Any) -> Layout:
        """Itself. Raises ModelError where the tensors would make another model than the one that they were saved from.

        name: of the model; tensors: of the checkpoint, as shards.Tensors.
        """
        if all(group.place is None for group in self.groups):
            kind, first = self._model.config.model_type, next(iter(self.left), "none at all")
            raise ModelError(f"{name}: none of its tensors is a weight of a model of type {kind}, first {first}")
        for group in self.groups:
            if group.place is None or not self._state[group.place].is_floating_point():
                continue
            first, *others = group.names
            if others and group.converter is None:
                what = f"{name}: {group.place} is there twice, as {first} and as {others[0]}"
                raise ModelError(what, fix="leave one of them out")
            if tensors.is_packed(first):
                continue
            if odd := next((key for key in group.names if tensors.kind(key) not in FLOATS), None):
                what = f"{name}: {odd} is stored as {tensors.kind(odd)}, and config.json does not say how it is scaled"
                raise ModelError(what, fix="use the model with 16-bit weights")
        alone = [group for group in self.groups if group.place is not None and group.converter is None]
        alone = [one for one in alone if tensors.kind(one.names[0]) == "I8" or not tensors.is_packed(one.names[0])]
        unlike = [one.place for one in alone if tensors.shape(one.names[0]) != list(self._state[str(one.place)].shape)]
        if unlike:
            raise ModelError(f"{name}: {len(unlike)} weights are missing or of another shape, first {unlike[0]}")
        refuse_left(name, self._model, self.left.values())
        for target, source in getattr(self._model, "all_tied_weights_keys", {}).items():
            held = {group.place: group.names[0] for group in self.groups if group.place in (target, source)}
            if len(held) == 2 and not tensors.equal(held[target], held[source]):
                what = f"{name}: {held[target]} and {held[source]} differ, and config.json says that they are one"
                fix = "put tie_word_embeddings: false into config.json, or leave the one out that was not trained"
                raise ModelError(what, fix=fix)
        return self

    def group_of(self, parameter: str) -> Group:
        """Raises KeyError where the checkpoint does not hold it."""
        found = next((group for group in self.groups if parameter in self.places(group)), None)
        if found is None:
            raise KeyError(parameter)
        return found

    def places(self, group: Group) -> list[str]:
        """The parameters that a group becomes, unread."""
        if group.place is None:
            return []
        if group.converter is None or len(group.converter.target_patterns) == 1:
            return [group.place]
        first, *others = group.converter.target_patterns
        plain = re.sub(r"\\(.)", r"\1", first)
        return [group.place, *(group.place.replace(plain, re.sub(r"\\(.)", r"\1", other)) for other in others)]

    def read(self, group: Group, get: Any) -> dict[str, Tensor]:
        """The parameters of a group, by the model's names. get: gives a tensor of the checkpoint by its name."""
        if group.place is None:
            return {}
        if group.converter is None:
            return {group.place: get(group.names[0])}
        converter = deepcopy(group.converter)
        for name, pattern in zip(group.names, group.patterns, strict=True):
            converter.add_tensor(group.place, name, pattern, get(name))
        made = converter.convert(group.place, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def write(self, group: Group, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a group, by the checkpoint's names, out of its parameters.

        Raises ModelError where transformers cannot turn its conversion round.
        """
        if group.converter is None:
            assert group.place is not None
            return {group.names[0]: parameters[group.place].contiguous()}
        with torch.no_grad():
            made = revert_weight_conversion(self._model, dict(parameters))
        if set(made) != set(group.names):
            what = f"{group.place}: transformers does not give it back as {group.names[0]}"
            raise ModelError(what, fix="serve the adapter on its base")
        return {name: tensor.contiguous() for name, tensor in made.items()}


def refuse_left(name: str, model: Any, left: Iterable[str]) -> None:
    """Raises ModelError where tensors that no parameter takes (by the model's own names) are part of what it computes:
    further decoder layers, or parts of its layers. Others are of a head or a tower that a language model has not."""
    state, modules = model.state_dict(), dict(model.named_modules())
    passed = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    more = int(getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0)
    kinds = {_starred(key) for key in state}
    layers = {match[0] for key in state if (match := re.match(r".*?\.\d+\.", key))}

    def is_computed(place: str) -> bool:
        owner, _, leaf = place.rpartition(".")
        if owner in modules and next(modules[owner].parameters(recurse=False), None) is not None:
            return True
        inside = re.match(r".*?\.\d+\.", place)
        return inside is not None and (
            (inside[0] in layers and leaf not in _MASKS) or (_starred(place) in kinds and not more)
        )

    found = [place for place in left if not any(re.search(one, place) for one in passed) and is_computed(place)]
    if found:
        what = f"{name}: {len(found)} of its tensors have no place in the model that config.json describes, first "
        raise ModelError(what + min(found, key=dot_natural_key), fix="put back the config.json of these weights")


def _starred(place: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", place)
