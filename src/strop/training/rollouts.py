"""Policy objectives in training: before each step, sample a group of completions per prompt and compute rewards.

A completion depends only on the weights, the seed, the step, the row and its number in the group, so that a resumed run
samples the same completions. Completions are sampled by strop's decoder, or by vLLM in a separate process.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import peft
import torch
from torch import Tensor, nn

from strop.config.schema import Recipe, TrainSection
from strop.data.types import Example, Ids, Item, Prompt, RolloutGroup, strip_reasoning
from strop.engine.decode.batch import drop_decoder
from strop.engine.decode.generate import (
    Respond,
    SampledCompletion,
    Sampler,
    generate,
    sample_completions,
    sample_turns,
)
from strop.engine.step import Step
from strop.engine.train.buffers import copy_like
from strop.errors import RecipeError, RunError
from strop.evaluation.metrics import mean_interval, wilson_interval
from strop.evaluation.rewards import Candidate, Reward, Rewarded, Rows, compute_rewards
from strop.evaluation.traces import COUNTS, RESET, SampleTurns, Trace, Tracer, mean_counts, rollout_seed
from strop.models.load import weights_folder
from strop.models.source import Source, read_config
from strop.models.vllm import DTYPE_NAMES, find_vllm_python, max_lora_rank, query_vllm, vllm_environment
from strop.objectives import require
from strop.objectives.policy import PolicyLoss, SampledTokens, rewards_equal
from strop.objectives.table import (
    data_kind_of,
    longest_sequence,
    max_completion_tokens,
    max_turns,
    sequences_per_row,
)
from strop.runs.events import EventLog, split_prompt
from strop.training.criteria import BLOCK, EVALUATING, Criterion, Metrics, Split
from strop.training.state import temporary_values
from strop.training.teacher import PolicyTeacher, teacher_weight

LOG = logging.getLogger(__name__)
LOGGED_CHARACTERS = 400  # maximum number of characters of a completion in the log
VLLM_GPU_SHARE = 0.3  # share of the GPU's memory for vLLM's copy of the base and its cache
VLLM_MAX_SEQUENCES = 256
VLLM_TIMEOUT_S = 3600.0  # for loading, or for the completions of a step
VLLM_FIX = "fix its environment (see docs/serve.md), or leave it out"
OPTION = "--train.vllm_python"
WITHOUT_VLLM = "leave --train.vllm_python out to sample with strop's engine"
WORKER = Path(__file__).with_name("vllm_worker.py")


@dataclass(frozen=True)
class PolicyCriterion(Criterion):
    """A policy objective (GRPO), on completions that the model samples."""

    objective: PolicyLoss
    options: TrainSection
    seed: int
    model: nn.Module
    tokenizer: Any
    stop_ids: Sequence[int]
    rewards: Sequence[Reward]
    weights: Mapping[str, nn.Parameter]  # trainable parameters
    log: EventLog
    columns: Rows = field(default_factory=dict)  # of the rows, if a reward reads them
    start: Mapping[str, Tensor] = field(default_factory=dict)  # the weights' values in the reference model, if any
    sampler: Sampler | None = None  # used instead of strop's decoder
    teacher: PolicyTeacher | None = None  # train.teacher
    tracer: Tracer | None = None  # of train.environment

    @property
    def prepares(self) -> bool:
        return True

    @property
    def is_rewarded(self) -> bool:
        return bool(self.rewards) or self.tracer is not None

    @property
    def updates(self) -> int:
        """Optimizer updates for each set of sampled completions."""
        return int(require(self.options.updates))

    def prepare(self, step: Step, items: Sequence[Item], index: int, split: Split) -> list[Item]:
        """Sample completions of each prompt, and compute rewards and reference log-probabilities."""
        prompts, started = cast("Sequence[Prompt]", items), time.perf_counter()
        numbers, limit = range(sequences_per_row(self.options)), max_completion_tokens(self.options)
        seeds = [[self._sample_seed(index, prompt.row, number) for number in numbers] for prompt in prompts]
        if self.tracer is not None:
            groups, trace, reward = self._sample_traces(self.tracer, prompts, seeds, index)
            answer, messages = trace.answer, {"messages": trace.as_json(LOGGED_CHARACTERS)}
        else:
            ids = [prompt.examples[0].ids for prompt in prompts]
            sampled = (self.sampler or sample_completions)(self.model, ids, seeds, self.stop_ids, limit)
            groups, messages = self._make_groups(prompts, sampled), {}
            example = groups[0].examples[0]
            answer, reward = self._decode(example.ids[example.prompt_length :]), next(iter(groups[0].rewards), None)
        first, seconds = groups[0], time.perf_counter() - started
        self.log.emit(
            "answers", step=index + 1, seconds=round(seconds, 3), row=f"{first.file}:{first.line}",
            prompt=split_prompt(prompts[0].messages)[0][:LOGGED_CHARACTERS],
            reference=(prompts[0].gold or "")[:LOGGED_CHARACTERS], answer=answer[:LOGGED_CHARACTERS],
            reward=reward, rewards=first.rewards, **messages,
        )  # fmt: skip
        if self.teacher is not None:
            logprobs = _teacher_logprobs(self.teacher, groups, split)
            groups = [replace(group, teacher_token_logprobs=x) for group, x in zip(groups, logprobs, strict=True)]
        if self.options.beta:
            with temporary_values(self.weights, self.start):
                logprobs = _token_logprobs(step, groups, split)
            groups = [replace(group, reference_token_logprobs=x) for group, x in zip(groups, logprobs, strict=True)]
        return [*groups]

    def longest(self, item: Item) -> Item:
        """Return the largest possible group of a prompt: different completions of the maximum length.

        Traces have the maximum length of all their tokens, and as many sampled tokens as possible.
        """
        size, limit = sequences_per_row(self.options), max_completion_tokens(self.options)
        length = limit if self.tracer is None else self.tracer.max_length - len(item.examples[0])
        limit = min(limit * max_turns(self.options), length)
        completions = [
            SampledCompletion(np.full(length, number + 1, np.int32), np.zeros(length), True) for number in range(size)
        ]
        examples = [_as_example(item.examples[0], completion, 1) for completion in completions]
        for example in examples:  # the first sampled token follows the prompt
            example.weights[len(item.examples[0]) + 1 : len(example) - limit + 1] = 0.0
        logprobs, zeros = np.zeros(size * limit), (0.0,) * size
        return RolloutGroup(
            tuple(examples),
            advantages=zeros, stopped=(True,) * size, rewards=zeros,
            sampling_logprobs=logprobs, reference_token_logprobs=logprobs,
            teacher_token_logprobs=logprobs if self.teacher is not None else logprobs[:0],
        )  # fmt: skip

    def divisor(self, items: Sequence[Item]) -> float:
        lengths = [
            example.supervised
            for group in cast("Sequence[RolloutGroup]", items)
            for example, copies in zip(group.examples, group.counts, strict=True)
            for _ in range(copies)
        ]
        return self.objective.divisor(lengths, self.options)

    def loss(self, step: Step, items: Sequence[Item], statistic: float) -> tuple[Tensor, Metrics]:
        groups = cast("Sequence[RolloutGroup]", items)
        examples = [example for group in groups for example in group.examples]
        logprobs = step.token_log_probs(examples)
        logprobs = logprobs if logprobs.device.type == "mps" else logprobs.double()
        lengths = [example.supervised for example in examples]
        counts = [copies for group in groups for copies in group.counts]
        token_weights = [self.objective.token_weight(length, self.options) for length in lengths]
        sampling = np.concatenate([group.sampling_logprobs for group in groups])
        reference = [
            group.reference_token_logprobs if len(group.reference_token_logprobs) else group.sampling_logprobs
            for group in groups
        ]
        weights = np.repeat(np.array(token_weights) * counts, lengths)
        advantages = np.repeat(np.array([value for group in groups for value in group.advantages]), lengths)
        teacher = sampling
        if self.teacher is not None:
            teacher = np.concatenate([group.teacher_token_logprobs for group in groups])
            advantages = advantages - teacher_weight(self.options) * (sampling - teacher)
        copied = np.repeat(np.arange(len(sampling)), np.repeat(counts, lengths))  # the token of each copy
        columns = [sampling, np.concatenate(reference), teacher, advantages, weights, copied]
        old_logprobs, ref_logprobs, teacher_logprobs, token_advantages, loss_weights, index = copy_like(
            columns, logprobs
        )
        tokens = SampledTokens(logprobs, old_logprobs, ref_logprobs, token_advantages)
        result = self.objective.compute(tokens, self.options)
        total = (result.losses * loss_weights).sum()
        with torch.no_grad():
            values: Metrics = {} if self.teacher is None else {"teacher_kl": old_logprobs - teacher_logprobs}
            # off: the difference from the log-probabilities at sampling
            values |= {"clip_share": result.clipped.double(), "off": (logprobs - old_logprobs).abs()}
            values |= {"kl": result.kl} if self.options.beta else {}
            metrics = {name: column[index] for name, column in values.items()}
        return total, {**_group_metrics(groups, logprobs, rewarded=self.is_rewarded), **metrics}

    def evaluate(self, step: Step, items: Sequence[Item], split: Split) -> dict[str, Any]:
        """Evaluate greedy completions. The loss is the negative mean reward.

        Without rewards, completions are sampled with fixed seeds, and the loss is their divergence from the teacher.
        """
        prompts = cast("Sequence[Prompt]", items)
        if not self.is_rewarded:
            return self._evaluate_divergence(prompts, split)
        if self.tracer is not None:
            return self._evaluate_traces(self.tracer, prompts)
        try:
            ids, limit = [prompt.examples[0].ids for prompt in prompts], max_completion_tokens(self.options)
            answers = generate(
                self.model, self.tokenizer, ids, stop_ids=self.stop_ids, max_new_tokens=limit,
                advance=lambda done: LOG.info("%s: %d of %d prompts", EVALUATING, done, len(ids)),
            )  # fmt: skip
        finally:
            drop_decoder(self.model)
        rewarded = self._reward([(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True)])
        stop_rate = statistics.fmean(answer.stopped for answer in answers)
        length = statistics.fmean(answer.tokens for answer in answers)
        return {**summarize_rewards(rewarded), "stop_rate": stop_rate, "answer_length": length}

    def _evaluate_traces(self, tracer: Tracer, prompts: Sequence[Prompt]) -> dict[str, Any]:
        resets = [self._sample_seed(-1, prompt.row, RESET) for prompt in prompts]
        groups = tracer.sample(prompts, [[0]] * len(prompts), resets, self._turn_sampler(tracer, greedy=True))
        traces = [group[0] for group in groups]
        rewarded = tracer.reward(traces, self.rewards)
        tracer.release(groups)
        length = statistics.fmean(trace.as_example().supervised for trace in traces)
        counts = mean_counts(traces)
        return {
            **summarize_rewards(rewarded), "stop_rate": 1 - counts["truncated"], "answer_length": length, **counts,
        }  # fmt: skip

    def _evaluate_divergence(self, prompts: Sequence[Prompt], split: Split) -> dict[str, Any]:
        """Return the mean KL(student || teacher) per token, estimated on a sampled completion of each prompt."""
        assert self.teacher is not None
        seeds = [[self._sample_seed(-1, prompt.row, 0)] for prompt in prompts]
        ids, limit = [prompt.examples[0].ids for prompt in prompts], max_completion_tokens(self.options)
        sampled = (self.sampler or sample_completions)(self.model, ids, seeds, self.stop_ids, limit)
        groups = self._make_groups(prompts, sampled)
        teacher = np.concatenate(_teacher_logprobs(self.teacher, groups, split))
        divergence = float((np.concatenate([group.sampling_logprobs for group in groups]) - teacher).mean())
        completions = [completion for group in sampled for completion in group]
        return {
            "loss": divergence, "stop_rate": statistics.fmean(completion.stopped for completion in completions),
            "answer_length": statistics.fmean(len(completion.ids) for completion in completions),
        }  # fmt: skip

    def _turn_sampler(self, tracer: Tracer, *, greedy: bool = False) -> SampleTurns:
        def sample(prompts: Sequence[Ids], seeds: Sequence[int], respond: Respond) -> None:
            sample_turns(
                self.model, prompts, seeds, self.stop_ids, respond, turn_tokens=tracer.turn_tokens,
                max_length=tracer.max_length, greedy=greedy, sampler=self.sampler,
            )  # fmt: skip

        return sample

    def _sample_traces(
        self, tracer: Tracer, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], index: int
    ) -> tuple[list[RolloutGroup], Trace, float | None]:
        """Return a group of traces of each prompt, and the first trace that calls a tool with its reward, to log."""
        resets = [self._sample_seed(index, prompt.row, RESET) for prompt in prompts]  # equal for a group
        sampled = tracer.sample(prompts, seeds, resets, self._turn_sampler(tracer))
        traces = [trace for group in sampled for trace in group]
        rewarded = iter(tracer.reward(traces, self.rewards))
        groups = [self._make_trace_group(group, [next(rewarded) for _ in group]) for group in sampled]
        tracer.release(sampled)
        shown = next((number for number, trace in enumerate(sampled[0]) if trace.tool_calls), 0)
        return groups, sampled[0][shown], groups[0].rewards[shown]

    def _make_trace_group(self, traces: Sequence[Trace], rewarded: Sequence[Rewarded]) -> RolloutGroup:
        rewards = [reward.total for reward in rewarded]
        return RolloutGroup(
            tuple(trace.as_example() for trace in traces),
            advantages=tuple(self.objective.advantages(rewards, self.options)),
            stopped=tuple(not trace.truncated for trace in traces),
            rewards=tuple(rewards),
            reward_parts={name: tuple(r.parts[name] for r in rewarded) for name in _part_names(rewarded)},
            counts_of_traces={name: tuple(trace.counts[name] for trace in traces) for name in COUNTS},
            sampling_logprobs=np.concatenate([trace.log_probs for trace in traces]),
        )

    def _sample_seed(self, index: int, row: int, number: int) -> int:
        return rollout_seed(self.seed, index, row, number)

    def _make_groups(
        self, prompts: Sequence[Prompt], sampled: Sequence[Sequence[SampledCompletion]]
    ) -> list[RolloutGroup]:
        """Return a group of the distinct completions of each prompt, with the rewards of all."""
        distinct = list[list[tuple[SampledCompletion, int]]]()  # with the number of copies of each
        for completions in sampled:
            by_ids: dict[bytes, list[SampledCompletion]] = {}
            for completion in completions:
                by_ids.setdefault(completion.ids.tobytes(), []).append(completion)
            distinct.append([(copies[0], len(copies)) for copies in by_ids.values()])
        texts = [  # with all copies, because a function of all completions may count or group them
            (prompt, text)
            for prompt, completions in zip(prompts, distinct, strict=True)
            for completion, copies in completions
            for text in [self._decode(completion.ids)] * copies
        ]
        rewarded = iter(self._reward(texts))
        return [
            self._make_group(
                prompt, completions, [[next(rewarded) for _ in range(copies)] for _, copies in completions]
            )
            for prompt, completions in zip(prompts, distinct, strict=True)
        ]

    def _make_group(
        self,
        prompt: Prompt,
        completions: Sequence[tuple[SampledCompletion, int]],
        rewarded: Sequence[Sequence[Rewarded]],
    ) -> RolloutGroup:
        """Return a group of completions that differ in their tokens or in their rewards.

        Equal completions with other rewards stay apart, because the clipped objective is not linear in the advantage.
        """
        pairs = zip(completions, rewarded, strict=True)
        sampled = [(completion, reward) for (completion, _), copies in pairs for reward in copies]
        parts: dict[tuple[bytes, float], list[int]] = {}
        for number, (completion, reward) in enumerate(sampled):
            parts.setdefault((completion.ids.tobytes(), reward.total), []).append(number)
        sampled = [sampled[number] for numbers in parts.values() for number in numbers]
        rewards = [reward for _, reward in sampled]
        totals = [reward.total for reward in rewards]
        firsts = np.cumsum([0, *map(len, parts.values())])[:-1]
        advantages = self.objective.advantages(totals, self.options)
        distinct = [(sampled[first][0], len(numbers)) for first, numbers in zip(firsts, parts.values(), strict=True)]
        return RolloutGroup(
            tuple(_as_example(prompt.examples[0], *pair) for pair in distinct),
            advantages=tuple(advantages[first] for first in firsts),
            stopped=tuple(completion.stopped for completion, _ in distinct),
            rewards=tuple(totals),
            reward_parts={name: tuple(r.parts[name] for r in rewards) for name in _part_names(rewards)},
            sampling_logprobs=np.concatenate([completion.log_probs for completion, _ in distinct]),
        )

    def _reward(self, completions: Sequence[tuple[Prompt, str]]) -> list[Rewarded]:
        candidates = [Candidate(strip_reasoning(text, prompt.reasoning_ends), prompt) for prompt, text in completions]
        return compute_rewards(self.rewards, candidates, self.columns, require(self.options.reward_timeout))

    def _decode(self, ids: Any) -> str:
        without_stop = ids[:-1] if int(ids[-1]) in self.stop_ids else ids
        return str(self.tokenizer.decode(without_stop.tolist(), skip_special_tokens=True))


def _token_logprobs(step: Step, groups: Sequence[RolloutGroup], split: Split) -> list[npt.NDArray[np.float64]]:
    """Return the log-probability of each supervised token of each group, without gradients."""
    result: list[npt.NDArray[np.float64]] = [np.zeros(0)] * len(groups)
    with torch.no_grad():
        for begin in range(0, len(groups), BLOCK):
            block = groups[begin : begin + BLOCK]
            for rows in split(block):
                batch = [block[row] for row in rows]
                logprobs = step.token_log_probs([example for group in batch for example in group.examples])
                ends = np.cumsum([len(group.sampling_logprobs) for group in batch])[:-1]
                parts = np.split(logprobs.double().cpu().numpy(), ends)
                for row, part in zip(rows, parts, strict=True):
                    result[begin + row] = part
    return result


def _teacher_logprobs(
    teacher: PolicyTeacher, groups: Sequence[RolloutGroup], split: Split
) -> list[npt.NDArray[np.float64]]:
    groups = [replace(group, examples=tuple(map(teacher.rewrite, group.examples))) for group in groups]
    return _token_logprobs(teacher.step, groups, split)


def disable_model_dropout(model: nn.Module) -> None:
    """Set the base model's dropout to 0, so that training computes what was computed without gradients before."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "attn_dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _as_example(prompt: Example, completion: SampledCompletion, copies: int) -> Example:
    weights = np.concatenate([np.zeros(len(prompt), np.float32), np.full(len(completion.ids), copies, np.float32)])
    return replace(prompt, ids=np.concatenate([prompt.ids, completion.ids]), weights=weights)


def _part_names(rewarded: Sequence[Rewarded]) -> list[str]:
    """Return the names of the parts of a reward, or nothing if it is a single number."""
    names = list(rewarded[0].parts)
    return names if len(names) > 1 or "." in "".join(names) else []


def summarize_rewards(rewarded: Sequence[Rewarded]) -> dict[str, Any]:
    """Return the mean reward of held-out rows with its interval, its parts, and the loss, which is minus the mean."""
    rewards = [reward.total for reward in rewarded]
    mean = statistics.fmean(rewards)
    n, are_hits = len(rewards), {*rewards} <= {0, 1}
    interval = list(wilson_interval(round(sum(rewards)), n)) if are_hits else mean_interval(rewards) if n > 1 else None
    intervals = {} if interval is None else {"reward_interval": interval}
    parts = {f"reward/{name}": statistics.fmean(r.parts[name] for r in rewarded) for name in _part_names(rewarded)}
    return {"loss": -mean, "reward": mean, **intervals, **parts}


def _group_metrics(groups: Sequence[RolloutGroup], like: Tensor, *, rewarded: bool) -> Metrics:
    completions = [
        (float(example.supervised), float(stopped))
        for group in groups
        for example, stopped, copies in zip(group.examples, group.stopped, group.counts, strict=True)
        for _ in range(copies)
    ]
    rewards = {
        "reward": [reward for group in groups for reward in group.rewards],
        "reward_spread": [statistics.stdev(group.rewards) for group in groups],
        "equal_groups": [float(rewards_equal(group.rewards)) for group in groups],
    }
    columns = {
        **(rewards if rewarded else {}),
        "answer_length": [length for length, _ in completions],
        "stop_rate": [stopped for _, stopped in completions],
    }
    for name in groups[0].counts_of_traces:
        columns[name] = [value for group in groups for value in group.counts_of_traces[name]]
    for name in groups[0].reward_parts:
        columns[f"reward/{name}"] = [value for group in groups for value in group.reward_parts[name]]
    return dict(zip(columns, copy_like([np.array(x, np.float64) for x in columns.values()], like), strict=True))


def check_vllm(recipe: Recipe) -> None:
    """Raise RecipeError if the recipe cannot use vLLM, or ModelError if vLLM does not support its adapter."""
    python, lora = recipe.train.vllm_python, recipe.lora
    if python is None:
        return
    if data_kind_of(recipe.train) != "prompts":
        raise RecipeError(f"{OPTION}: objective {recipe.train.objective} samples no completions", fix="leave it out")
    if recipe.model.quantization != "none":
        what = f"{OPTION}: vLLM would sample from the 16-bit base, not from {recipe.model.quantization}"
        raise RecipeError(what, fix="use --model.quantization none, or leave it out")
    find_vllm_python(python, OPTION)
    config = {name: getattr(lora, name) for name in ("r", "rank_pattern", "use_dora", "bias")}
    config |= {"modules_to_save": lora.modules_to_save, "trainable_token_indices": lora.new_tokens}
    max_lora_rank(config, OPTION, WITHOUT_VLLM)


@dataclass(frozen=True)
class VllmSampler:
    """Samples completions in a vLLM process, as engine.decode.generate.sample_completions.

    vLLM's results depend on the other requests in a batch, so a resumed run may sample other completions.
    """

    process: subprocess.Popen[str]
    log: Any
    version: str
    adapter_ids: Iterator[int] = field(default_factory=partial(count, 1))  # vLLM caches an adapter by its id

    def __call__(
        self, model: Any, prompts: Sequence[Ids], seeds: Sequence[Sequence[int]], stop_ids: Sequence[int], limit: int
    ) -> list[list[SampledCompletion]]:
        """Return a completion of each prompt for each of its seeds. Raises RunError if vLLM ends."""
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
            request = {
                "adapter": folder, "number": next(self.adapter_ids), "prompts": [ids.tolist() for ids in prompts],
                "seeds": [list(group) for group in seeds], "max_tokens": limit, "stop": list(stop_ids),
            }  # fmt: skip
            replies = _request(self.process, self.log, request)
        completions = (
            SampledCompletion(np.array(reply["ids"], np.int32), np.array(reply["log_probs"]), reply["stopped"])
            for reply in replies
        )
        return [[next(completions) for _ in group] for group in seeds]


@contextmanager
def vllm_sampler(recipe: Recipe, source: Source, model: peft.PeftModel) -> Iterator[VllmSampler]:
    """Run vLLM on the base of `model` inside the block. Raises InputError, ModelError or RunError."""
    train, weights = recipe.train, weights_folder(source)
    python = find_vllm_python(train.vllm_python, OPTION)
    config, longest = read_config(weights), longest_sequence(recipe)
    vllm_info = query_vllm(python, config["architectures"][0], lora=True)
    arguments: dict[str, Any] = {
        "model": str(weights), "skip_tokenizer_init": True, "dtype": DTYPE_NAMES[recipe.model.dtype],
        "max_model_len": min(longest, int(config.get("max_position_embeddings", longest))),
        "max_num_seqs": min(VLLM_MAX_SEQUENCES, train.batch_size * sequences_per_row(train)),
        "enforce_eager": not vllm_info["cuda"], "seed": recipe.seed, "disable_log_stats": True,
        "enable_lora": True, "max_loras": 1, "max_cpu_loras": 1,
        "max_lora_rank": max_lora_rank(model.active_peft_config.to_dict(), source.name, WITHOUT_VLLM),
    }  # fmt: skip
    arguments |= {"gpu_memory_utilization": VLLM_GPU_SHARE} if vllm_info["cuda"] else {}
    environment = {**vllm_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        command, pipe = [python, "-c", WORKER.read_text("utf-8")], subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
        try:
            version = _request(process, log, arguments)["version"]
            yield VllmSampler(process, log, version)
        finally:
            process.kill()
            for stream in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):  # the process ended earlier
                    stream.close()  # type: ignore[union-attr]
            process.wait()


def _request(process: subprocess.Popen[str], log: Any, message: Any) -> Any:
    assert process.stdin is not None and process.stdout is not None
    timed_out = threading.Event()

    def end() -> None:
        timed_out.set()
        process.kill()

    watchdog = threading.Timer(VLLM_TIMEOUT_S, end)
    watchdog.start()
    try:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
    except BrokenPipeError:
        reply = ""
    finally:
        watchdog.cancel()
    if timed_out.is_set():
        raise RunError(f"vLLM did not answer within {VLLM_TIMEOUT_S / 60:g} minutes", fix=VLLM_FIX)
    if not reply:
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()] or ["no output"]
        errors = [line for line in lines if "error" in line.lower() and "://" not in line] or lines
        raise RunError(f"vLLM ended: {errors[-1]}", fix=VLLM_FIX)
    return json.loads(reply)
