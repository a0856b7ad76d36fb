"""Learning from rewards for the model's own answers: a group of them to each prompt, drawn before each step.

What is drawn depends on the weights, the seed, the step, the row and the answer's number in its group, and on nothing
else, so that a resumed run draws what the unbroken one would have.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from strop.config.schema import TrainSection
from strop.data.types import Example, Group, Item, Prompt, behind_reasoning
from strop.engine.decode.batch import drop_decoder
from strop.engine.decode.generate import SampledCompletion, Sampler, generate, sample_completions
from strop.engine.step import Step
from strop.evaluation.metrics import Z_95
from strop.evaluation.rewards import Reward
from strop.objectives.base_loss import given
from strop.objectives.grpo import Tokens, advantages, divisor, equal, token_weight
from strop.objectives.grpo import loss as token_losses
from strop.runs.events import EventLog
from strop.training.criteria import BLOCK, Cut, Figures
from strop.training.state import holding

SHOWN = 400  # characters of an answer in an event


@dataclass(frozen=True)
class OfGroups:
    """GRPO. model: which answers. tokenizer, stop_ids: make texts of tokens, and end answers. weights: the trained
    ones. start: their values at the beginning, which make the reference; empty before they are known. draws: makes the
    answers, in the place of strop's engine."""

    options: TrainSection
    seed: int
    model: nn.Module
    tokenizer: Any
    stop_ids: Sequence[int]
    rewards: Sequence[Reward]
    weights: Mapping[str, nn.Parameter]
    log: EventLog
    start: Mapping[str, Tensor] = field(default_factory=dict)
    draws: Sampler | None = None
    tells: ClassVar[bool] = True

    @property
    def updates(self) -> int:
        return int(given(self.options.updates))

    @property
    def _most(self) -> int:
        return int(given(self.options.answer_tokens))

    @property
    def _size(self) -> int:
        return int(given(self.options.group))

    def begin(self, step: Step, items: Sequence[Item], index: int, cut: Cut) -> list[Item]:
        """Draws a group of answers to each prompt of the step `index`, rewards them, and computes their reference."""
        prompts, started = cast("Sequence[Prompt]", items), time.perf_counter()
        seeds = [[self._seed(index, prompt.row, number) for number in range(self._size)] for prompt in prompts]
        asked = [prompt.examples[0].ids for prompt in prompts]
        drawn = (self.draws or sample_completions)(self.model, asked, seeds, self.stop_ids, self._most)
        seconds = time.perf_counter() - started
        groups = [self._group(prompt, answers) for prompt, answers in zip(prompts, drawn, strict=True)]
        first = groups[0]
        shown = self._text(first.examples[0].ids[first.examples[0].prompt :])[:SHOWN]
        self.log.emit(
            "answers",
            step=index + 1,
            seconds=round(seconds, 3),
            row=f"{first.file}:{first.line}",
            answer=shown,
            rewards=first.rewards,
        )
        return [*self._with_reference(step, groups, cut)] if self.options.beta else [*groups]

    def longest(self, item: Item) -> Item:
        """The group of a prompt whose answers are as long as they may be, and all differ."""
        prompt = item.examples[0]
        answers = [
            SampledCompletion(np.full(self._most, number + 1, np.int32), np.zeros(self._most), True)
            for number in range(self._size)
        ]
        examples = tuple(_example(prompt, answer, 1) for answer in answers)
        zeros = np.zeros(self._size * self._most)
        nothing = (0.0,) * self._size
        stopped = (True,) * self._size
        return Group(examples, advantages=nothing, stopped=stopped, rewards=nothing, drawn=zeros, before=zeros)

    def divisor(self, items: Sequence[Item]) -> float:
        lengths = [
            example.supervised
            for group in cast("Sequence[Group]", items)
            for example, count in zip(group.examples, group.counts, strict=True)
            for _ in range(count)
        ]
        return divisor(lengths, self.options)

    def level(self, step: Step, items: Sequence[Item], cut: Cut) -> float:
        return 0.0

    def loss(self, step: Step, items: Sequence[Item], level: float) -> tuple[Tensor, Figures]:
        groups = cast("Sequence[Group]", items)
        examples = [example for group in groups for example in group.examples]
        found = step.token_log_probs(examples)
        now = found if found.device.type == "mps" else found.double()
        lengths = torch.tensor([example.supervised for example in examples], device=now.device)
        counts = torch.tensor([count for group in groups for count in group.counts], device=now.device)
        shares = now.new_tensor([token_weight(int(length), self.options) for length in lengths])
        advantage = now.new_tensor([value for group in groups for value in group.advantages])
        drawn = torch.from_numpy(np.concatenate([group.drawn for group in groups])).to(now)
        before = [group.before if len(group.before) else group.drawn for group in groups]
        reference = torch.from_numpy(np.concatenate(before)).to(now)

        def spread(values: Tensor) -> Tensor:
            return values.repeat_interleave(lengths)

        outcome = token_losses(Tokens(now, drawn, reference, spread(advantage)), self.options)
        total = (outcome.losses * spread(shares * counts)).sum()
        with torch.no_grad():
            often = spread(counts)
            tokens = {"clip_share": outcome.clipped.double(), "off": (now - drawn).abs()}
            tokens |= {"kl": outcome.kl} if self.options.beta else {}
            figures = {name: values.repeat_interleave(often) for name, values in tokens.items()}
        return total, {**_figures(groups, now), **figures}

    def evaluate(self, step: Step, items: Sequence[Item], cut: Cut) -> dict[str, Any]:
        """Of the likeliest answers: {loss (minus the mean reward), reward, reward_interval, stop_rate,
        answer_length}."""
        prompts = cast("Sequence[Prompt]", items)
        try:
            answers = generate(
                self.model,
                self.tokenizer,
                [prompt.examples[0].ids for prompt in prompts],
                stop_ids=self.stop_ids,
                max_new_tokens=self._most,
            )
        finally:
            drop_decoder(self.model)
        rewards = [self._worth(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True)]
        mean = statistics.fmean(rewards)
        found: dict[str, Any] = {"loss": -mean, "reward": mean}
        if len(rewards) > 1:
            reach = Z_95 * statistics.stdev(rewards) / math.sqrt(len(rewards))
            found["reward_interval"] = [mean - reach, mean + reach]
        found["stop_rate"] = statistics.fmean(answer.stopped for answer in answers)
        found["answer_length"] = statistics.fmean(answer.tokens for answer in answers)
        return found

    def _seed(self, index: int, row: int, number: int) -> int:
        said = f"{self.seed} {index} {row} {number}".encode()
        return int.from_bytes(blake2b(said, digest_size=8).digest(), "little") >> 1

    def _group(self, prompt: Prompt, answers: Sequence[SampledCompletion]) -> Group:
        """The answers that differ, with how often each was drawn; advantages are of all of them."""
        same: dict[bytes, list[SampledCompletion]] = {}
        for answer in answers:
            same.setdefault(answer.ids.tobytes(), []).append(answer)
        firsts = [alike[0] for alike in same.values()]
        counts = [len(alike) for alike in same.values()]
        worth = [self._worth(prompt, self._text(answer.ids)) for answer in firsts]
        rewards = [value for value, count in zip(worth, counts, strict=True) for _ in range(count)]
        better = dict(zip(rewards, advantages(rewards, self.options), strict=True))
        return Group(
            tuple(_example(prompt.examples[0], answer, count) for answer, count in zip(firsts, counts, strict=True)),
            advantages=tuple(better[value] for value in worth),
            stopped=tuple(answer.stopped for answer in firsts),
            rewards=tuple(rewards),
            drawn=np.concatenate([answer.log_probs for answer in firsts]),
        )

    def _worth(self, prompt: Prompt, text: str) -> float:
        place, text = (prompt.file, prompt.line), behind_reasoning(text, prompt.closes)
        return sum(reward.weight * reward(prompt.gold, text, place) for reward in self.rewards)

    def _text(self, ids: Any) -> str:
        kept = ids[:-1] if int(ids[-1]) in self.stop_ids else ids
        return str(self.tokenizer.decode(kept.tolist(), skip_special_tokens=True))

    def _with_reference(self, step: Step, groups: Sequence[Group], cut: Cut) -> list[Group]:
        found = list(groups)
        with holding(self.weights, self.start), torch.no_grad():
            for begin in range(0, len(groups), BLOCK):
                block = groups[begin : begin + BLOCK]
                for rows in cut(block):
                    some = [block[row] for row in rows]
                    values = step.token_log_probs([example for group in some for example in group.examples])
                    ends = np.cumsum([len(group.drawn) for group in some])[:-1]
                    parts = np.split(values.double().cpu().numpy(), ends)
                    for row, part in zip(rows, parts, strict=True):
                        found[begin + row] = replace(block[row], before=part)
        return found


def without_dropout(model: nn.Module) -> None:
    """Switches off the dropout that a model itself has: what it drew would come out otherwise in the step."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "attn_dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _example(prompt: Example, answer: SampledCompletion, count: int) -> Example:
    weights = np.concatenate([np.zeros(len(prompt), np.float32), np.full(len(answer.ids), count, np.float32)])
    return replace(prompt, ids=np.concatenate([prompt.ids, answer.ids]), weights=weights)


def _figures(groups: Sequence[Group], like: Tensor) -> Figures:
    """Of each answer and each group, for people."""
    of_answers = [
        (float(example.supervised), float(stopped))
        for group in groups
        for example, stopped, count in zip(group.examples, group.stopped, group.counts, strict=True)
        for _ in range(count)
    ]
    values = {
        "reward": [reward for group in groups for reward in group.rewards],
        "reward_spread": [statistics.stdev(group.rewards) for group in groups],
        "equal_groups": [float(equal(group.rewards)) for group in groups],
        "answer_length": [length for length, _ in of_answers],
        "stop_rate": [stopped for _, stopped in of_answers],
    }
    return {name: like.new_tensor(found) for name, found in values.items()}
