"""Generate completions with a loaded model, for chat, evaluation and rollouts.

Models that the compiled decoder does not support use transformers' generate (hf_fallback.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import GenerationConfig

from strop.data.images import hide_images
from strop.data.types import Ids, LogProbs
from strop.engine.decode.batch import Batch, batch_for, decode_all, decode_groups, drop_decoder
from strop.engine.decode.cache import MAX_SEQUENCES
from strop.engine.decode.decoder import find_active_adapter, why_decoder_unsupported
from strop.engine.decode.hf_fallback import TextCallbackStreamer, batch_keys, hf_generate
from strop.engine.decode.sampling import ExpectedCompletion, Sampling, SequenceState
from strop.engine.images import image_features
from strop.errors import InputError, ModelError, NonFiniteError
from strop.machine.memory import free_memory, is_out_of_memory
from strop.models.adapters import adapter_disabled
from strop.models.families.table import FAMILIES
from strop.models.introspect import learned_positions, max_positions
from strop.models.tokenizer import TextStream

REPORT_SECONDS = 0.5  # between reports on unfinished completions
HF_BATCH_SIZE = 16  # prompts in a batch of transformers' generate on a CPU; on a GPU MAX_SEQUENCES


@dataclass(frozen=True)
class Completion:
    """A generated completion as text.

    tokens: number of new tokens, with the stop token. stopped: whether it ended with a stop token. logprobs: the
    log-probabilities of the expected completion, if there was one.
    """

    text: str
    tokens: int
    stopped: bool
    logprobs: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True)
class SampledCompletion:
    """A sampled completion as tokens.

    ids: the tokens, with the stop token. log_probs: the log-probability of each token. stopped: whether it ended with a
    stop token.
    """

    ids: Ids
    log_probs: LogProbs
    stopped: bool


Sampler = Callable[
    [nn.Module, Sequence[Ids], Sequence[Sequence[int]], Sequence[int], int], list[list[SampledCompletion]]
]
"""The signature of `sample_completions`."""


class Respond(Protocol):
    """Continues traces after their turns. A trace with its next tokens must be shorter than `sample_turns` allows."""

    def begin(self, number: int, completion: SampledCompletion) -> None:
        """Start to compute the tokens that follow a turn. number: of the trace."""

    def collect(self, *, wait: bool) -> dict[int, Ids | None]:
        """Return the tokens before the next turn by trace, or None for a trace that has ended.

        Each turn that began is answered once, here or in a later call. wait: until at least one is answered.
        """
        ...


def answer_turns(respond: Respond, turns: Sequence[tuple[int, SampledCompletion]]) -> dict[int, Ids]:
    """Return what follows turns, by trace, without the traces that have ended."""
    for number, completion in turns:
        respond.begin(number, completion)
    replies: dict[int, Ids | None] = {}
    while len(replies) < len(turns):
        replies |= respond.collect(wait=True)
    return {number: ids for number, ids in replies.items() if ids is not None}


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Ids], *, stop_ids: Sequence[int], max_new_tokens: int = 256,
    sampling: Sampling | None = None, on_text: Callable[[str], None] | None = None,
    advance: Callable[[float], None] | None = None, both: bool = False, partial: bool = False,
    expected: Sequence[ExpectedCompletion | None] = (),
) -> list[Completion]:  # fmt: skip
    """Generate one completion for each prompt of token ids, in order, with the active adapter.

    Args:
        stop_ids: tokens that end a completion, in addition to those of the model's generation config.
        max_new_tokens: the limit of each completion, which also ends where the model supports no more positions.
        sampling: None for greedy decoding.
        on_text: called with pieces of the text of the completion, for a single prompt.
        advance: called with the number of finished completions, and with an estimate for the unfinished ones: the
            fractional part.
        both: return the completions of the base model for all prompts, followed by those with the adapter.
        partial: on Ctrl-C, return the completions of the first prompts that are finished.
        expected: reference completions to score. They do not change the output, and decoding is faster where they are
            equal to it. Ignored for transformers' generate.

    Raises:
        InputError: if max_new_tokens is below 1, or a prompt is too long for a model with learned positions.
        ModelError: if a token is not in the model's vocabulary, or the logits are not finite.
    """
    if both and _needs_two_passes(model):
        settings: dict[str, Any] = {
            "stop_ids": stop_ids, "max_new_tokens": max_new_tokens, "sampling": sampling, "on_text": on_text,
            "partial": partial,
        }  # fmt: skip
        with adapter_disabled(cast(Any, model)):
            base = generate(model, tokenizer, prompts, advance=advance, expected=expected, **settings)
        finished = len(base)  # fewer after Ctrl-C
        adapted_advance = advance and (lambda done: advance(len(prompts) + done))
        adapted = generate(
            model, tokenizer, prompts[:finished], advance=adapted_advance, expected=expected[:finished], **settings
        )
        return base[: len(adapted)] + adapted
    stop_ids = (*stop_ids, *generation_stop_ids(cast(Any, model).generation_config))
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens}: must be at least 1", fix="give 1 or more")
    if not prompts:
        return []
    sampling = sampling or Sampling()
    vocabulary = cast(Any, model).get_input_embeddings().weight.shape[0]
    if (largest := max(max(hide_images(ids), default=-1) for ids in prompts)) >= vocabulary:
        what = f"the tokenizer returns token {largest}, but the model has {vocabulary:,} tokens"
        raise ModelError(what, fix="use the model's own tokenizer, or resize the model's embeddings and save it")
    longest, positions = max(map(len, prompts)), max_positions(model) or sys.maxsize
    if longest >= positions and learned_positions(model):
        what = f"the prompt has {longest} tokens, and the model has learned {positions} positions"
        raise InputError(what, fix="give a shorter prompt; in a chat, /reset starts again")
    limits = [max(1, min(max_new_tokens, positions - len(ids))) for ids in prompts]
    if why_decoder_unsupported(model) is not None:
        streamer = TextCallbackStreamer(tokenizer, on_text) if on_text is not None else None
        return _generate_with_hf(model, tokenizer, prompts, stop_ids, limits, sampling, streamer, advance)
    adapters = [None, find_active_adapter(model)] if both else [find_active_adapter(model)]
    rows: list[list[SequenceState]] = []
    for i, (ids, reference) in enumerate(zip(prompts, expected or [None] * len(prompts), strict=True)):
        seed = None if sampling.seed is None else sampling.seed + i  # equal prompts get different completions
        options: Any = {"stop_ids": stop_ids, "max_new_tokens": limits[i], "expected": reference}
        rows.append([SequenceState(ids, name, sampling=replace(sampling, seed=seed), **options) for name in adapters])
    sequences = [sequence for row in rows for sequence in row]
    detokenizer = TextStream(tokenizer, ()) if on_text is not None else None
    counter = _CompletionCounter(len(sequences), max(limits))
    try:
        batch = batch_for(model, sequences)  # may compile kernels, which is logged, before the progress begins
        if advance is not None:
            advance(0)
        for progress in decode_all(batch, sequences):
            sequence = progress.sequence
            if detokenizer is not None and on_text is not None:
                new = [token.id for token in progress.tokens if token.id not in sequence.stop_ids]
                on_text("".join(map(detokenizer.push, new)))
            if sequence.finish_reason == "failed":
                fix = "use an older checkpoint or another adapter"
                raise ModelError("the model's logits are not finite", fix=fix)
            if advance is not None and counter.count(sequence, len(progress.tokens)):
                advance(counter.done)
    except KeyboardInterrupt:
        if not partial:
            raise
        rows = list(takewhile(lambda row: all(sequence.finish_reason for sequence in row), rows))
    if detokenizer is not None and on_text is not None:
        on_text(detokenizer.end())
    ordered = [row[i] for i in range(len(adapters)) for row in rows]
    return [_decode_completion(tokenizer, x.completion, stop_ids, x.expected_logprobs) for x in ordered]


class _CompletionCounter:
    """Counts finished completions, and estimates from their mean length how much of the others is done.

    limit: the maximum length, which is used before one is finished.
    """

    def __init__(self, total: int, limit: int) -> None:
        self._total, self._limit = total, limit
        self._finished = self._finished_tokens = self._tokens = 0
        self._reported = time.monotonic()
        self.done = 0.0

    def count(self, sequence: SequenceState, num_tokens: int) -> bool:
        """Count new tokens. Return whether `done` is worth reporting."""
        self._tokens += num_tokens
        if sequence.finish_reason:
            self._finished += 1
            self._finished_tokens += len(sequence.completion)
        elif time.monotonic() - self._reported < REPORT_SECONDS:
            return False
        self._reported = time.monotonic()
        mean = max(1.0, self._finished_tokens / self._finished) if self._finished else self._limit
        partly = min((self._tokens - self._finished_tokens) / mean, 0.99 * (self._total - self._finished))
        self.done = max(self.done, self._finished + max(0.0, partly)) if self._finished < self._total else self._total
        return True


def _needs_two_passes(model: nn.Module) -> bool:
    """Return whether base and adapter cannot be decoded in one batch, such as with other features of an image."""
    features = image_features(model)
    return why_decoder_unsupported(model) is not None or (features is not None and features.depends_on_adapter)


def sample_completions(
    model: nn.Module, prompts: Sequence[Ids], seeds: Sequence[Sequence[int]], stop_ids: Sequence[int],
    max_new_tokens: int,
) -> list[list[SampledCompletion]]:  # fmt: skip
    """Sample a completion of each prompt for each of its seeds, with the log-probability of each token.

    Tokens are sampled at temperature 1 from the whole vocabulary. A completion depends only on the weights, the prompt
    and the seed (with transformers' generate: on all prompts and seeds of a batch). The decoder is freed afterwards.

    Raises NonFiniteError if the logits are not finite.
    """
    if why_decoder_unsupported(model) is not None:
        return _sample_with_hf(model, prompts, seeds, stop_ids, max_new_tokens)
    adapter = find_active_adapter(model)
    options: Any = {"stop_ids": stop_ids, "max_new_tokens": max_new_tokens, "num_logprobs": 0}
    groups = [
        [SequenceState(prompt, adapter, sampling=Sampling(1.0, seed=seed), **options) for seed in prompt_seeds]
        for prompt, prompt_seeds in zip(prompts, seeds, strict=True)
    ]
    sequences = [sequence for group in groups for sequence in group]
    log_probs: dict[SequenceState, list[float]] = {sequence: [] for sequence in sequences}
    drop_decoder(model)
    try:
        for progress in decode_groups(batch_for(model, sequences), groups):
            log_probs[progress.sequence] += [token.logprob for token in progress.tokens]
    finally:
        drop_decoder(model)  # for the memory of the training step
    if any(sequence.finish_reason == "failed" for sequence in sequences):
        raise _non_finite_error()

    def make_completion(sequence: SequenceState) -> SampledCompletion:
        ids, stopped = np.array(sequence.completion, np.int32), sequence.finish_reason == "stop"
        return SampledCompletion(ids, np.array(log_probs[sequence]), stopped)

    return [list(map(make_completion, group)) for group in groups]


def sample_turns(
    model: nn.Module, prompts: Sequence[Ids], seeds: Sequence[int], stop_ids: Sequence[int], respond: Respond, *,
    turn_tokens: int, max_length: int, greedy: bool = False, sampler: Sampler | None = None,
) -> None:  # fmt: skip
    """Sample traces turn by turn: a trace is a prompt, a turn, what `respond` appends, another turn, and so on.

    Tokens are sampled at temperature 1 from the whole vocabulary, or greedily. A trace depends only on the weights, its
    prompt, its seed and what is appended (without the compiled decoder, also on the other traces). The compiled decoder
    samples the other traces while `respond` computes what follows a turn, and keeps the keys and values of a trace
    between its turns, so each token is processed once. transformers' generate and `sampler` wait for all traces, and
    process a trace again in each turn. The decoder is freed afterwards.

    Args:
        prompts: one for each trace; equal ones in a row are processed once. Each is shorter than max_length.
        turn_tokens: maximum number of tokens of a turn.
        max_length: maximum number of tokens of a trace.
        greedy: log-probabilities are then not computed by the compiled decoder.

    Raises:
        NonFiniteError: if the logits are not finite.
    """
    if sampler is not None or why_decoder_unsupported(model) is not None:
        _resample_turns(model, prompts, seeds, stop_ids, respond, turn_tokens, max_length, greedy, sampler)
        return
    adapter = find_active_adapter(model)
    sequences = [
        SequenceState(
            prompt, adapter, stop_ids=stop_ids, max_new_tokens=max_length - len(prompt), turn_tokens=turn_tokens,
            sampling=Sampling() if greedy else Sampling(1.0, seed=seed), num_logprobs=None if greedy else 0,
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]  # fmt: skip
    drop_decoder(model)
    try:
        batch = batch_for(model, sequences)
        for begin in range(0, len(sequences), batch.max_sequences):
            _decode_turns(batch, sequences[begin : begin + batch.max_sequences], begin, respond, turn_tokens)
    finally:
        drop_decoder(model)  # for the memory of the training step


def _decode_turns(
    batch: Batch, sequences: Sequence[SequenceState], first: int, respond: Respond, turn_tokens: int
) -> None:
    """Decode traces that are in the batch together. first: the number of the first trace."""
    numbers = {sequence: first + i for i, sequence in enumerate(sequences)}
    starts = {sequence: sequence.length for sequence in sequences}
    groups = [list(group) for _, group in groupby(sequences, key=lambda sequence: sequence.ids.tobytes())]
    log_probs: dict[SequenceState, list[float]] = {sequence: [] for sequence in sequences}
    pending: dict[int, SequenceState] = {}  # between two turns, by number

    def answer(*, wait: bool) -> None:
        for number, ids in respond.collect(wait=wait).items():
            sequence = pending.pop(number)
            if ids is not None:
                sequence.extend(ids, turn_tokens)
                starts[sequence], log_probs[sequence] = sequence.length, []
                batch.resume(sequence)
            elif sequence in batch.paused:
                batch.remove(sequence)

    while groups or batch.sequences or pending:
        for progress in decode_groups(batch, groups):
            x = progress.sequence
            log_probs[x] += [token.logprob for token in progress.tokens]
            if x.finish_reason == "failed":
                raise _non_finite_error()
            if x.finish_reason:
                ids, pending[numbers[x]] = x.ids[starts[x] :].copy(), x
                stopped = x.finish_reason == "stop"
                respond.begin(numbers[x], SampledCompletion(ids, np.array(log_probs[x]), stopped))
            if pending:
                answer(wait=False)
        groups = []
        if pending:
            answer(wait=True)


def _resample_turns(
    model: nn.Module, prompts: Sequence[Ids], seeds: Sequence[int], stop_ids: Sequence[int], respond: Respond,
    turn_tokens: int, max_length: int, greedy: bool, sampler: Sampler | None,
) -> None:  # fmt: skip
    """Implement `sample_turns` without a cache between turns."""
    ids, active, turn = dict(enumerate(prompts)), list(range(len(prompts))), 0
    size = 1 if any(batch_keys(model, prompts)) else _hf_batch_size(model)
    while active:
        turns = []
        turn_seeds = {trace: seeds[trace] + turn for trace in active}  # each turn has its own random numbers
        for begin in range(0, len(active), size):
            traces = active[begin : begin + size]
            limit = min(turn_tokens, max_length - min(len(ids[trace]) for trace in traces))
            texts, batch_seeds = [ids[trace] for trace in traces], [turn_seeds[trace] for trace in traces]
            if sampler is not None and not greedy:
                sampled = [x[0] for x in sampler(model, texts, [[seed] for seed in batch_seeds], stop_ids, limit)]
            else:
                sampled = _sample_batch_with_hf(model, texts, batch_seeds[0], stop_ids, limit, greedy)
            for trace, completion in zip(traces, sampled, strict=True):
                room = max_length - len(ids[trace])
                if len(completion.ids) > room:
                    completion = SampledCompletion(completion.ids[:room], completion.log_probs[:room], False)
                turns.append((trace, completion))
        sampled_ids = {trace: completion.ids for trace, completion in turns}
        replies = answer_turns(respond, turns)
        active = [trace for trace in active if trace in replies]
        ids = {trace: np.concatenate([ids[trace], sampled_ids[trace], replies[trace]]) for trace in active}
        turn += 1


def generation_stop_ids(config: GenerationConfig) -> tuple[int, ...]:
    """Return the stop tokens of a model's generation_config.json, or () if the model has no such file."""
    ids = None if config._from_model_config else config.eos_token_id
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def _hf_batch_size(model: nn.Module) -> int:
    """Return the number of prompts in a batch. On a GPU, a pass over many takes as long as one over few."""
    return MAX_SEQUENCES if _is_on_gpu(model) else HF_BATCH_SIZE


def _hf_generate_in_halves(
    model: Any, prompts: Sequence[Ids], sampling: Sampling, **options: Any
) -> tuple[list[list[int]], list[LogProbs]]:
    """Return the tokens and the log-probabilities of each prompt, from smaller batches where memory runs out.

    options: of `hf_generate`. A streamer takes only one prompt.
    """
    try:
        tokens, log_probs = hf_generate(model, prompts, sampling, **options)
        return tokens, [] if log_probs is None else [*log_probs]
    except (RuntimeError, MemoryError) as error:
        if len(prompts) == 1 or not is_out_of_memory(error):
            raise
    free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(prompts) // 2
    first, second = (
        _hf_generate_in_halves(model, part, sampling, **options) for part in (prompts[:middle], prompts[middle:])
    )
    return first[0] + second[0], first[1] + second[1]


def _generate_with_hf(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Ids], stop_ids: Sequence[int], limits: Sequence[int],
    sampling: Sampling, streamer: TextCallbackStreamer | None, advance: Callable[[float], None] | None,
) -> list[Completion]:  # fmt: skip
    """Implement `generate` with transformers' generate, in batches of prompts of similar length."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    completions: dict[int, Completion] = {}
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    keys = list(zip(limits, batch_keys(model, prompts), strict=True))
    groups = [list(group) for _, group in groupby(order, key=keys.__getitem__)]
    size = _hf_batch_size(model)
    for rows in (group[i : i + size] for group in groups for i in range(0, len(group), size)):
        tokens, _ = _hf_generate_in_halves(
            model, [prompts[row] for row in rows], sampling, stop_ids=stop_ids, max_new_tokens=limits[rows[0]],
            pad_id=pad_id, streamer=streamer,
        )  # fmt: skip
        for row, new in zip(rows, tokens, strict=True):
            completions[row] = _decode_completion(tokenizer, new, stop_ids)
        if advance is not None:
            advance(len(completions))
    return [completions[row] for row in range(len(prompts))]


def _sample_with_hf(
    model: Any, prompts: Sequence[Ids], seeds: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int
) -> list[list[SampledCompletion]]:
    """Sample all completions of a prompt together, on a GPU those of several prompts, with the first seed."""
    batches: list[list[tuple[Ids, Sequence[int]]]] = [[]]
    mixes = _mixes_prompts(model)
    for prompt, own in zip(prompts, seeds, strict=True):
        rows = sum(len(others) for _, others in batches[-1])
        if batches[-1] and (not mixes or rows + len(own) > MAX_SEQUENCES):
            batches.append([])
        batches[-1].append((prompt, own))
    groups = []
    for batch in batches:
        texts, first = [prompt for prompt, own in batch for _ in own], batch[0][1][0]
        sampled = iter(_sample_batch_with_hf(model, texts, first, stop_ids, max_new_tokens, False))
        groups += [[next(sampled) for _ in own] for _, own in batch]
    return groups


def _mixes_prompts(model: Any) -> bool:
    """Return whether prompts of different lengths are sampled together.

    On a GPU, a step of many sequences takes as long as one of few. Padding does not change the values of attention,
    which are all that fully fused families have; it may change those of other layers.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = FAMILIES.get(base.config.get_text_config().model_type)
    return _is_on_gpu(model) and family is not None and family.fully_fused


def _is_on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type not in ("cpu", "meta")  # meta: weights that are streamed


def _sample_batch_with_hf(
    model: Any, prompts: Sequence[Ids], seed: int, stop_ids: Sequence[int], max_new_tokens: int, greedy: bool
) -> list[SampledCompletion]:
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        tokens, log_probs = _hf_generate_in_halves(
            model, prompts, Sampling(temperature=0.0 if greedy else 1.0), stop_ids=stop_ids,
            max_new_tokens=max_new_tokens, pad_id=stop_ids[0], with_log_probs=True,
        )  # fmt: skip
    if not all(np.isfinite(row).all() for row in log_probs):
        raise _non_finite_error()
    completions = []
    for new, row in zip(tokens, log_probs, strict=True):
        length, stopped = _completion_length(new, stop_ids)
        completions.append(SampledCompletion(np.array(new[:length], np.int32), row[:length], stopped))
    return completions


def _completion_length(tokens: Sequence[int], stop_ids: Sequence[int]) -> tuple[int, bool]:
    """Return the length of a completion, with the stop token, and whether there is a stop token."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), None)
    return (len(tokens), False) if end is None else (end, True)


def _decode_completion(
    tokenizer: Any, tokens: list[int], stop_ids: Sequence[int], logprobs: Sequence[float] | LogProbs = ()
) -> Completion:
    length, stopped = _completion_length(tokens, stop_ids)
    text = tokenizer.decode(tokens[: length - stopped], skip_special_tokens=True)
    return Completion(text, length, stopped, np.asarray(logprobs) if len(logprobs) else None)


def _non_finite_error() -> NonFiniteError:
    return NonFiniteError("the model's logits are not finite while it generates", fix="lower --train.learning_rate")
