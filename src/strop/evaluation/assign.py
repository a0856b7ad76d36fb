"""Answers of a model whose questions are dealt out to devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from strop.data.types import Ids
from strop.distributed.assign import assign_balanced
from strop.distributed.devices import Devices
from strop.engine.decode.generate import Completion
from strop.engine.decode.model import Model
from strop.engine.decode.sampling import ExpectedCompletion


def answers(
    model: Model,
    prompts: Sequence[Ids],
    devices: Devices,
    *,
    max_new_tokens: int,
    both: bool = False,
    expected: Sequence[ExpectedCompletion | None] = (),
    advance: Callable[[int], None] | None = None,
    partial: bool = False,
) -> list[Completion]:
    """As Model.answer; partial counts on one device alone: several end with nothing where one is interrupted."""
    if devices.world_size == 1:
        return model.answer(
            prompts, max_new_tokens=max_new_tokens, both=both, advance=advance, partial=partial, expected=expected
        )
    own, sides = assign_balanced([float(len(prompt)) for prompt in prompts], devices.world_size)[devices.rank], 1 + both
    right = [expected[place] for place in own] if expected else []
    told = (lambda done: advance(done * devices.world_size)) if advance and devices.is_main else None
    found: list[Completion] = []
    with devices.all_or_none():
        if own:
            found = model.answer(
                [prompts[place] for place in own],
                max_new_tokens=max_new_tokens,
                both=both,
                advance=told,
                expected=right,
            )
    whole: list[Completion | None] = [None] * (sides * len(prompts))
    for places, said in devices.gather((own, found)):
        for number, answer in enumerate(said):
            side, place = divmod(number, len(places))
            whole[side * len(prompts) + places[place]] = answer
    return [answer for answer in whole if answer is not None]
