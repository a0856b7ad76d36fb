"""Traces for `strop check --show`: sampled from the model, or with a scripted call if it is not loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from strop.config.schema import Recipe
from strop.data.prepare import Prepared
from strop.data.rendering.tool_calls import Call
from strop.data.types import Ids, Prompt
from strop.engine.decode.generate import Respond, SampledCompletion, answer_turns, generation_stop_ids, sample_turns
from strop.engine.decode.model import load
from strop.errors import StropError, first_line
from strop.evaluation.rewards import parse_rewards, read_columns
from strop.evaluation.traces import (
    RESET,
    SampleTurns,
    Trace,
    Tracer,
    check_prompts,
    describe_environment,
    make_tracer,
    rollout_seed,
)
from strop.machine.probe import probe
from strop.models.families.shape import read_model_info
from strop.models.source import is_on_disk
from strop.objectives.policy import GRPO

MAX_SHARE = 0.5  # of the free memory, for the model's weights
EXAMPLES: Mapping[str, Any] = {"string": "text", "integer": 1, "number": 1.0, "boolean": True, "array": []}


def preview_traces(recipe: Recipe, prepared: Prepared, number: int) -> tuple[list[Trace], list[str]]:
    """Return traces of the first rows, and notes on the tools and on how the traces were made.

    The file of the environment is executed. Raises InputError for an environment or rows that cannot be used.
    """
    defaults = {name: GRPO.options[name] for name in ("turns", "answer_tokens", "reward_timeout")}
    missing = {name: value for name, value in defaults.items() if getattr(recipe.train, name) is None}
    train = recipe.train.model_copy(update=missing)
    columns = read_columns(parse_rewards(train.rewards), recipe.data, all_rows=True)
    tracer = make_tracer(train, recipe.data.max_length, prepared.renderer, columns)
    items: Any = prepared.train_items
    prompts: list[Prompt] = [items[i] for i in range(min(number, len(items)))]
    lengths = check_prompts(tracer, prompts)
    name, reason = recipe.model.adapter or recipe.model.name, _why_not_sampled(recipe)
    if reason is None:
        try:
            sample, how = _sampler(name, recipe, tracer), f"sampled from {name} at temperature 1"
        except StropError as error:
            reason = first_line(error)
    if reason is not None:
        sample, how = _scripted(tracer), f"with a scripted call of each tool, not sampled: {reason}"
    seeds = [[rollout_seed(recipe.seed, 0, prompt.row, 0)] for prompt in prompts]
    resets = [rollout_seed(recipe.seed, 0, prompt.row, RESET) for prompt in prompts]
    traces = [group[0] for group in tracer.sample(prompts, seeds, resets, sample)]
    return traces, [*describe_environment(tracer), lengths, f"traces {how}"]


def _why_not_sampled(recipe: Recipe) -> str | None:
    if not is_on_disk(recipe.model.name):
        return f"{recipe.model.name} is not on this machine"
    parameters = read_model_info(recipe.model.name).parameters
    if 4 * parameters > MAX_SHARE * probe().free_bytes:
        return f"the {parameters:,} weights of {recipe.model.name} would need more than half of the free memory"
    return None


def _sampler(name: str, recipe: Recipe, tracer: Tracer) -> SampleTurns:
    section = recipe.model
    model = load(
        name, dtype=section.dtype, quantization=section.quantization, double_quantization=section.double_quantization
    )
    stop_ids = (*tracer.renderer.end_ids, *generation_stop_ids(model.module.generation_config))

    def sample(prompts: Sequence[Ids], seeds: Sequence[int], respond: Respond) -> None:
        sample_turns(
            model.module, prompts, seeds, stop_ids, respond, turn_tokens=tracer.turn_tokens,
            max_length=tracer.max_length,
        )  # fmt: skip

    return sample


def _scripted(tracer: Tracer) -> SampleTurns:
    """Return a sampler of traces that call each tool once, with made-up arguments, and then answer."""
    texts = [tracer.dialogue.format.write(call) for call in _example_calls(tracer)][: max(1, tracer.turns - 1)]
    texts.append("(an answer)")
    stop = tracer.renderer.stop_ids[0]

    def completion(turn: int) -> SampledCompletion:
        ids = tracer.renderer.tokenizer.encode(texts[min(turn, len(texts) - 1)], add_special_tokens=False)
        array = np.array([*ids, stop], np.int32)
        return SampledCompletion(array, np.zeros(len(array)), True)

    def sample(prompts: Sequence[Ids], seeds: Sequence[int], respond: Respond) -> None:
        active, turn = list(range(len(prompts))), 0
        while active:
            replies = answer_turns(respond, [(trace, completion(turn)) for trace in active])
            active, turn = [trace for trace in active if trace in replies], turn + 1

    return sample


def _example_calls(tracer: Tracer) -> Iterator[Call]:
    for name, schema in tracer.environment.schemas.items():
        properties = schema["function"]["parameters"].get("properties", {})
        yield Call(name, {key: _example(value) for key, value in properties.items()})


def _example(schema: Mapping[str, Any]) -> Any:
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    return EXAMPLES.get(kind[0] if isinstance(kind, list) else str(kind), {})
