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
from strop.engine.decode.decoder_cache import let_go
from strop.engine.decode.generate import generate
from strop.engine.decode.rollouts import Drawn, Draws, draw
from strop.engine.step import Step
from strop.evaluation.metrics import Z_95
from strop.evaluation.rewards import Reward
from strop.objectives.objective import given
from strop.objectives.policy import Tokens, advantages, divisor, equal, token_weight
from strop.objectives.policy import loss as token_losses
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
    draws: Draws | None = None
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
        drawn = (self.draws or draw)(self.model, asked, seeds, self.stop_ids, self._most)
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
            Drawn(np.full(self._most, number + 1, np.int32), np.zeros(self._most), True) for number in range(self._size)
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
            let_go(self.model)
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

    def _group(self, prompt: Prompt, answers: Sequence[Drawn]) -> Group:
        """The answers that differ, with how often each was drawn; advantages are of all of them."""
        same: dict[bytes, list[Drawn]] = {}
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


def _example(prompt: Example, answer: Drawn, count: int) -> Example:
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


# ---- from strop.training.vllm_rollouts ----
"""Answers of a model in training, drawn by vLLM: in a process of its own, with the adapter as it is at each step."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import peft
from torch import nn

from strop.config.schema import Recipe
from strop.data.types import Ids
from strop.engine.decode.rollouts import Drawn
from strop.errors import RecipeError, RunError
from strop.models.load import weights_folder
from strop.models.source import Source, read_config
from strop.models.vllm import DTYPE_NAMES, about_vllm, find_python, lora_rank, vllm_environment
from strop.objectives.table import answers_of, drawn_tokens, learning_of

CARD_SHARE = 0.3  # of a card's memory that vLLM may take: its own copy of the base, and the cache
AT_ONCE = 256  # answers
OPTION, WITHOUT = "--train.vllm_python", "leave --train.vllm_python out: strop's engine draws"
WORKER = Path(__file__).with_name("vllm_worker.py")


def check_vllm(recipe: Recipe) -> None:
    """Raises RecipeError where a recipe asks for vLLM and nothing is drawn, or what it would draw from is another
    model; ModelError where it does not take the adapter."""
    given = recipe.train.vllm_python
    if given is None:
        return
    if learning_of(recipe.train) != "prompts":
        raise RecipeError(f"{OPTION}: objective {recipe.train.objective} draws no answers", fix="leave it out")
    if recipe.model.quantization != "none":
        said = f"{OPTION}: vLLM would draw from the base in 16 bit, not from {recipe.model.quantization}"
        raise RecipeError(said, fix="take --model.quantization none, or leave it out")
    find_python(given, OPTION)
    lora_rank(_config(recipe), OPTION, WITHOUT)


def _config(recipe: Recipe) -> dict[str, Any]:
    lora = recipe.lora
    names = ("r", "rank_pattern", "use_dora", "bias")
    more = {"modules_to_save": lora.modules_to_save, "trainable_token_indices": lora.new_tokens}
    return {**{name: getattr(lora, name) for name in names}, **more}


@dataclass(frozen=True)
class ByVllm:
    """Draws as model.draw.draw does. Seeds decide what is drawn, but not alone: vLLM's sums depend on what is computed
    beside an answer, so that a resumed run may draw others."""

    process: subprocess.Popen[str]
    log: Any
    version: str
    numbers: Iterator[int] = field(default_factory=partial(count, 1))  # vLLM keeps an adapter by its number

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Ids],
        seeds: Sequence[Sequence[int]],
        stop_ids: Sequence[int],
        most: int,
    ) -> list[list[Drawn]]:
        """To each prompt an answer for each of its seeds. Raises RunError where vLLM ends."""
        with tempfile.TemporaryDirectory() as folder:
            whole: Any = model
            whole.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
            asked = {
                "adapter": folder, "number": next(self.numbers), "prompts": [ids.tolist() for ids in prompts],
                "seeds": [list(some) for some in seeds], "most": most, "stop": list(stop_ids),
            }  # fmt: skip
            found = iter(_ask(self.process, self.log, asked))
        return [[_drawn(next(found)) for _ in some] for some in seeds]


def _drawn(told: dict[str, Any]) -> Drawn:
    return Drawn(np.array(told["ids"], np.int32), np.array(told["log_probs"]), told["stopped"])


@contextmanager
def drawing(recipe: Recipe, source: Source, model: peft.PeftModel) -> Iterator[ByVllm]:
    """vLLM, started on the base; model: whose adapter it will be given.

    Raises InputError, ModelError and RunError where it does not start."""
    train, weights = recipe.train, weights_folder(source)
    python = find_python(train.vllm_python, OPTION)
    config, longest = read_config(weights), recipe.data.max_length + drawn_tokens(train)
    found = about_vllm(python, config["architectures"][0], lora=True)
    how: dict[str, Any] = {
        "model": str(weights), "skip_tokenizer_init": True, "dtype": DTYPE_NAMES[recipe.model.dtype],
        "max_model_len": min(longest, int(config.get("max_position_embeddings", longest))),
        "max_num_seqs": min(AT_ONCE, train.batch_size * answers_of(train)),
        "enforce_eager": not found["cuda"], "seed": recipe.seed, "disable_log_stats": True,
    }  # fmt: skip
    how |= {"enable_lora": True, "max_lora_rank": lora_rank(model.active_peft_config.to_dict(), source.name, WITHOUT)}
    how |= {"max_loras": 1, "max_cpu_loras": 1} | ({"gpu_memory_utilization": CARD_SHARE} if found["cuda"] else {})
    environment = {**vllm_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with tempfile.TemporaryFile("w+") as log:
        command, pipe = [python, "-c", WORKER.read_text("utf-8")], subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
        try:
            version = _ask(process, log, how)["version"]
            yield ByVllm(process, log, version)
        finally:
            process.kill()
            for end in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):  # asked of one that had ended
                    end.close()  # type: ignore[union-attr]
            process.wait()


def _ask(process: subprocess.Popen[str], log: Any, what: Any) -> Any:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()
        told = process.stdout.readline()
    except BrokenPipeError:
        told = ""
    if not told:
        log.seek(0)
        said = [line.strip() for line in log.read().splitlines() if line.strip()] or ["nothing"]
        faults = [line for line in said if "error" in line.lower() and "://" not in line] or said
        raise RunError(f"vLLM ended: {faults[-1]}", fix="mend its environment (see docs/serve.md), or leave it out")
    return json.loads(told)
