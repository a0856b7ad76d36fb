"""Traces: the turns of a model in an environment, with the tool calls between them.

A trace is a sequence of tokens: the prompt, the tokens of a turn as they were sampled, what the template writes between
two turns (tool results and the header of the next turn), and so on. Sampled tokens are never encoded again.
"""

from __future__ import annotations

import concurrent.futures
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from strop.config.schema import TrainSection
from strop.data.rendering.render import Renderer
from strop.data.rendering.tool_calls import Call, ToolDialogue, Turn
from strop.data.row_errors import RenderError
from strop.data.store import LazySequence, message_json
from strop.data.types import Example, Ids, LogProbs, Message, Prompt, strip_reasoning
from strop.engine.decode.generate import Respond, SampledCompletion
from strop.errors import DataError, Location, RunError
from strop.evaluation.environments import End, Environment, Start, TurnResult, load_environment
from strop.evaluation.rewards import Candidate, Reward, Rewarded, Rows, compute_rewards, row_of
from strop.objectives import require
from strop.objectives.table import max_completion_tokens, max_turns

RESET = -1  # number in a group of the seed for `reset`, which is the same for all of the group
MAX_CACHED = 10_000  # prompts whose tokens are kept; rendering one takes about a millisecond
COUNTS = ("turns", "tool_calls", "tool_errors", "truncated")  # of a trace
SampleTurns = Callable[[Sequence[Ids], Sequence[int], Respond], None]  # prompts, seeds, what follows a turn


@dataclass(eq=False)
class Trace:
    """A trace while it is sampled, and afterwards.

    parts: token ids in order, each with its log-probabilities if it was sampled. messages: of all turns. truncated: the
    trace ended because a turn or the trace reached its maximum length.
    """

    prompt: Prompt
    environment: Any
    messages: list[Message]
    prompt_ids: Ids
    options: Mapping[str, Any] | None = None  # of the template
    parts: list[tuple[Ids, LogProbs | None]] = field(default_factory=list)
    turns: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    truncated: bool = False
    answer: str = ""  # text of the last turn, without reasoning
    _rendered: list[Message] = field(default_factory=list)  # the dialogue that is rendered to continue the trace

    @property
    def place(self) -> str:
        return f"{self.prompt.file}:{self.prompt.line}"

    @property
    def length(self) -> int:
        """Number of tokens, with the prompt."""
        return len(self.prompt_ids) + sum(len(ids) for ids, _ in self.parts)

    @property
    def log_probs(self) -> LogProbs:
        """The log-probability of each sampled token when it was sampled, fp64."""
        return np.concatenate([log_probs for _, log_probs in self.parts if log_probs is not None])

    @property
    def counts(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in COUNTS}

    def as_example(self) -> Example:
        """Return the tokens up to the last sampled one. Only sampled tokens are supervised."""
        parts = list(self.parts)
        while parts and parts[-1][1] is None:
            parts.pop()
        weights = [np.full(len(ids), 0.0 if log_probs is None else 1.0, np.float32) for ids, log_probs in parts]
        ids = np.concatenate([self.prompt_ids, *(ids for ids, _ in parts)])
        start = np.zeros(len(self.prompt_ids), np.float32)
        return replace(self.prompt.examples[0], ids=ids, weights=np.concatenate([start, *weights]))

    def as_json(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Return the messages in the `messages` format, with texts of at most `limit` characters."""
        texts = ("content", "reasoning_content")
        return [
            {name: x[:limit] if name in texts else x for name, x in message_json(message).items()}
            for message in self.messages
        ]


@dataclass(frozen=True)
class Tracer:
    """Samples traces in an environment.

    turns: maximum number of the model's turns in a trace. turn_tokens: maximum number of tokens of a turn. max_length:
    maximum number of tokens of a trace. columns: of the rows.
    """

    environment: Environment
    dialogue: ToolDialogue
    renderer: Renderer
    turns: int
    turn_tokens: int
    max_length: int
    columns: Rows

    def options_for(self, prompt: Prompt) -> dict[str, Any]:
        """Return the template's options for a prompt, which depend on whether its right answer has reasoning."""
        chat = self.renderer.chat
        return chat.traits.thinking_mode.options if prompt.reasoning_ends else chat.mode(_as_messages(prompt)).options

    def prompt_ids(self, prompt: Prompt) -> Ids:
        """Return the token ids of the prompt of a row, before `reset` has changed it. Raises RenderError."""
        return self.dialogue.prompt(_as_messages(prompt), self.options_for(prompt))

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], resets: Sequence[int], sample: SampleTurns
    ) -> list[list[Trace]]:
        """Return a trace of each prompt for each of its seeds. resets: a seed for `reset` of each prompt."""
        numbered = [(prompt, reset) for prompt, reset, group in zip(prompts, resets, seeds, strict=True) for _ in group]
        traces = self.start(numbered)
        flat_seeds = [seed for group in seeds for seed in group]
        sample([trace.prompt_ids for trace in traces], flat_seeds, _ToolResponder(self, traces))
        rest = iter(traces)
        return [[next(rest) for _ in group] for group in seeds]

    def start(self, prompts: Sequence[tuple[Prompt, int]]) -> list[Trace]:
        """Reset environments, and return traces without turns. prompts: with the seed for `reset`. Raises RunError."""
        used = self.environment.take(len(prompts))
        starts = [
            Start(x, row_of(prompt, self.columns), _as_messages(prompt), seed, f"{prompt.file}:{prompt.line}")
            for x, (prompt, seed) in zip(used, prompts, strict=True)
        ]
        messages = self.environment.reset(starts)
        return [self._make_trace(prompt, *rest) for (prompt, _), *rest in zip(prompts, used, messages, strict=True)]

    def _make_trace(self, prompt: Prompt, used: Any, messages: list[Message]) -> Trace:
        options, place = self.options_for(prompt), f"{prompt.file}:{prompt.line}"
        try:
            ids = self.dialogue.prompt(messages, options)
        except RenderError as error:
            raise RunError(f"environment {self.environment.spec}: row {place}: {error.what}", fix=error.fix) from None
        if len(ids) >= self.max_length:
            what = f"environment {self.environment.spec}: row {place}: the prompt has {len(ids)} tokens after reset"
            raise RunError(f"{what}, and a trace at most {self.max_length}", fix="raise --data.max_length")
        return Trace(prompt, used, list(messages), ids, options, _rendered=list(messages))

    def release(self, groups: Sequence[Sequence[Trace]]) -> None:
        """Let other traces use the environments of these."""
        for trace in (trace for group in groups for trace in group):
            self.environment.give_back(trace.environment)

    def reward(self, traces: Sequence[Trace], rewards: Sequence[Reward]) -> list[Rewarded]:
        """Return the reward of each trace: the environment's own, plus the weighted others. Raises RunError."""
        candidates = [Candidate(trace.answer, trace.prompt, trace.as_json(), trace.environment) for trace in traces]
        others = compute_rewards(rewards, candidates, self.columns, self.environment.timeout)
        ends = [
            End(trace.environment, trace.answer, candidate.messages, row_of(trace.prompt, self.columns), trace.place)
            for trace, candidate in zip(traces, candidates, strict=True)
        ]
        own_parts = self.environment.rewards(ends)
        result = [
            Rewarded(other.total + sum(own.values()), {**own, **other.parts})
            for own, other in zip(own_parts, others, strict=True)
        ]
        names = {tuple(rewarded.parts) for rewarded in result}
        if len(names) > 1:
            before, different = (", ".join(group) for group in list(names)[:2])
            what = f"environment {self.environment.spec}: the reward has the parts {different}, and {before} before"
            raise RunError(what, fix="return a dict with the same names for any trace")
        return result


@dataclass(eq=False)
class _ToolResponder:
    """Continues traces with the results of their tool calls (`Respond`), which run while other traces are sampled."""

    tracer: Tracer
    traces: Sequence[Trace]
    _running: dict[int, tuple[Turn, Future[TurnResult]]] = field(default_factory=dict)  # by number of the trace
    _ended: list[int] = field(default_factory=list)

    def begin(self, number: int, completion: SampledCompletion) -> None:
        """Add a turn to a trace, and start its calls."""
        trace, tracer = self.traces[number], self.tracer
        trace.parts.append((completion.ids, completion.log_probs))
        turn = tracer.dialogue.read_turn(completion.ids)
        trace.turns, trace.truncated = trace.turns + 1, not completion.stopped
        trace.answer = strip_reasoning(turn.text, trace.prompt.reasoning_ends)
        trace.messages.append(turn.as_message(stopped=completion.stopped))
        if not completion.stopped or not turn.calls:
            self._ended.append(number)
            return
        reads_done = trace.turns < tracer.turns
        running = tracer.environment.start_turn(trace.environment, turn.calls, reads_done=reads_done)
        self._running[number] = turn, running

    def collect(self, *, wait: bool) -> dict[int, Ids | None]:
        """Return what follows the turns of traces, or None for a trace that has ended. wait: for at least one."""
        if wait and not self._ended:
            concurrent.futures.wait([x for _, x in self._running.values()], return_when="FIRST_COMPLETED")
        replies: dict[int, Ids | None] = dict.fromkeys(self._ended)
        self._ended.clear()
        for number in [number for number, (_, running) in self._running.items() if running.done()]:
            turn, running = self._running.pop(number)
            replies[number] = self._continue(self.traces[number], turn, running.result())
        return replies

    def _continue(self, trace: Trace, turn: Turn, result: TurnResult) -> Ids | None:
        """Add the results of a turn's calls to its trace. Returns the tokens before the next turn, if there is one."""
        tracer = self.tracer
        trace.tool_calls += len(turn.calls)
        trace.tool_errors += sum(result.failed)
        names = [call.name if isinstance(call, Call) else None for call in turn.calls]
        trace.messages += [Message("tool", x, name=name) for x, name in zip(result.texts, names, strict=True)]
        tracer.environment.check("done", trace.place, result.done)
        if trace.turns >= tracer.turns or result.done:
            return None
        try:
            following = tracer.dialogue.continuation(trace._rendered, turn, result.texts, trace.options)
        except RenderError as error:
            what = f"row {trace.place}: the results of a tool cannot be rendered: {error.what}"
            raise RunError(what, fix=error.fix or "return other texts from the tools") from None
        if trace.length + len(following) >= tracer.max_length:
            trace.truncated = True
            return None
        trace._rendered += tracer.dialogue.rendered_turn(turn, result.texts)
        trace.parts.append((following, None))
        return following


def rollout_seed(seed: int, index: int, row: int, number: int) -> int:
    """Return the seed of a completion. seed: of the run. index: of the step, from 0; -1 in an evaluation."""
    text = f"{seed} {index} {row} {number}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


def _as_messages(prompt: Prompt) -> list[Message]:
    """Return the messages of a prompt. Raises RenderError for one with images."""
    if any(not isinstance(value["content"], str) for value in prompt.messages):
        raise RenderError("image-refused", "images in an environment are not supported")
    return [
        Message(
            value["role"], value["content"], value.get("reasoning_content"), tuple(value.get("tool_calls") or ()),
            value.get("name"), value.get("weight", 1.0), value.get("tool_call_id"),
        )
        for value in prompt.messages
    ]  # fmt: skip


def mean_counts(traces: Sequence[Trace]) -> dict[str, float]:
    """Return the mean of each of COUNTS."""
    return {name: statistics.fmean(trace.counts[name] for trace in traces) for name in COUNTS}


def make_tracer(
    train: TrainSection, max_length: int, renderer: Renderer, columns: Rows, environment: Environment | None = None
) -> Tracer:
    """Return the tracer of a recipe with train.environment. Raises RecipeError, ModelError."""
    assert train.environment is not None
    environment = environment or load_environment(train.environment, require(train.reward_timeout))
    dialogue = ToolDialogue(renderer, list(environment.schemas.values()))
    return Tracer(environment, dialogue, renderer, max_turns(train), max_completion_tokens(train), max_length, columns)


class ToolPrompts(LazySequence[Prompt]):
    """Prompts with the tools of an environment, as they are before `reset` changes them."""

    def __init__(self, prompts: Sequence[Prompt], tracer: Tracer) -> None:
        self._prompts, self._tracer = prompts, tracer
        self._render = lru_cache(MAX_CACHED)(self._make_item)

    def __len__(self) -> int:
        return len(self._prompts)

    def item(self, i: int) -> Prompt:
        return self._render(i)

    def _make_item(self, i: int) -> Prompt:
        prompt = self._prompts[i]
        ids = self._tracer.prompt_ids(prompt)
        example = replace(prompt.examples[0], ids=ids, weights=np.zeros(len(ids), np.float32))
        return replace(prompt, examples=(example,))


def check_prompts(tracer: Tracer, prompts: Sequence[Prompt]) -> str:
    """Raise DataError for rows whose prompt with the tools leaves no room for a turn, or cannot be rendered.

    Returns a sentence on the lengths of the prompts.
    """
    where, lengths = [], [0]
    for prompt in prompts:
        try:
            lengths.append(length := len(tracer.prompt_ids(prompt)))
        except RenderError as error:
            where.append(Location(prompt.file, prompt.line, error.what))
            continue
        if length >= tracer.max_length:
            text = f"the prompt has {length} tokens with the tools, and data.max_length is {tracer.max_length}"
            where.append(Location(prompt.file, prompt.line, text))
    if where:
        what = f"{len(where)} rows cannot be prompts of environment {tracer.environment.spec}"
        raise DataError(what, fix="raise --data.max_length, or change these rows", where=where)
    return (
        f"with the tools, prompts have up to {max(lengths):,} tokens before reset, of a trace's {tracer.max_length:,}"
    )


def describe_environment(tracer: Tracer) -> list[str]:
    """Return notes on the tools, and on how calls are written."""
    environment, dialogue = tracer.environment, tracer.dialogue
    tools = f"environment {environment.spec}: tools {', '.join(environment.schemas)}; at most {tracer.turns} turns"
    form = f"calls are written as {dialogue.format.example!r}"
    return [tools, f"{form}, the form of Hermes: {dialogue.why_hermes}" if dialogue.why_hermes else form]
