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
        return (place, pattern) if place in self._state else (None, None)

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
