"""Answers from a model, many at once: by strop's own engine, or by transformers where that does not know the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import GenerationConfig, TextStreamer

from strop.engine.decode.batch import batch_for, decode_all
from strop.engine.decode.decoder import SEVERAL, active_adapter, why_not_decoder
from strop.engine.decode.sampling import ExpectedCompletion, Sampling, SequenceState
from strop.errors import InputError, ModelError
from strop.models.adapters import adapter_disabled
from strop.models.introspect import learned_positions
from strop.models.tokenizer import TextStream
from strop.models.upstream_errors import attribute_errors

MAX_SEQUENCES = 16  # of a batch of transformers' generate
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: int  # new tokens, the stop token included
    stopped: bool  # ended by a stop token, not by the limit
    logprobs: npt.NDArray[np.float64] | None = None  # of the tokens behind the expected answer's `first`


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Ids],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
    advance: Callable[[int], None] | None = None,
    both: bool = False,
    partial: bool = False,
    expected: Sequence[ExpectedCompletion | None] = (),
) -> list[Completion]:
    """One answer a prompt, in the order given, by the adapter that is active now, if there is one; stop_ids end it, and
    so do own_ends.

    on_text: receives the text of a single prompt's answer piece by piece. advance: told how many answers are there.
    both: first an answer of the base to each prompt, then one of the adapter: all in one batch. partial: Ctrl-C leaves
    the answers to as many prompts, from the first, as are there; else it is raised.
    expected: the right answers, where they are known: read beside the prompts, for their log-probabilities. What is
    written stays the same, and is there sooner where it is right. transformers' generate does not look at them.
    Answers come from strop's engine (engine.answers) where it knows the model, else from transformers' generate.
    Raises InputError for answers of no tokens, and prompts that a model with learned positions has no room for.
    """
    stop_ids = (*stop_ids, *generation_stop_ids(cast(Any, model).generation_config))
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens}: an answer has at least one", fix="give 1 or more")
    if not prompts:
        return []
    known = cast(Any, model).get_input_embeddings().weight.shape[0]
    if (most := max(max(ids, default=-1) for ids in prompts)) >= known:
        what = f"the tokenizer gives token {most}, and the model knows {known:,}"
        raise ModelError(what, fix="use the model's own tokenizer, or resize the model's embeddings and save it")
    if positions := learned_positions(model):
        longest = max(map(len, prompts))
        if longest >= positions:
            what = f"a prompt of {longest} tokens: the model has learned {positions} positions"
            raise InputError(what, fix="ask with a shorter prompt; in a chat, /reset starts again")
        max_new_tokens = min(max_new_tokens, positions - longest)
    adapter = active_adapter(model)
    if why_not_decoder(model) is not None or adapter is SEVERAL:
        return _by_transformers(model, tokenizer, prompts, stop_ids, max_new_tokens, sampling, on_text, advance, both)
    by = [None, adapter] if both else [adapter]
    texts = [
        [
            SequenceState(
                ids, who, stop_ids=stop_ids, most=max_new_tokens, sampling=_own(sampling, row), expected=right
            )
            for who in by
        ]
        for row, (ids, right) in enumerate(zip(prompts, expected or [None] * len(prompts), strict=True))
    ]
    flat = [text for row in texts for text in row]
    words = TextStream(tokenizer, ()) if on_text is not None else None
    ended = 0
    try:
        for news in decode_all(batch_for(model, flat), flat):
            if words is not None and on_text is not None:
                on_text("".join(words.push(token.id) for token in news.tokens if token.id not in news.text.stop_ids))
            if news.text.end == "failed":
                raise ModelError(
                    "the model's numbers are not finite", fix="take an older checkpoint or another adapter"
                )
            if news.text.end and advance is not None:
                ended += 1
                advance(ended)
    except KeyboardInterrupt:
        if not partial:
            raise
        texts = list(takewhile(lambda row: all(text.end for text in row), texts))
    if words is not None and on_text is not None:
        on_text(words.end())
    return [_written(tokenizer, row[side], stop_ids) for side in range(len(by)) for row in texts]


def generation_stop_ids(config: GenerationConfig) -> tuple[int, ...]:
    """Tokens that end an answer by the generation_config.json that came with a model; none where none came."""
    named = None if config._from_model_config else config.eos_token_id
    return () if named is None else tuple(named) if isinstance(named, list) else (named,)


def _own(sampling: Sampling | None, row: int) -> Sampling | None:
    """A row's sampling: with a seed of its own, so that equal prompts do not get equal answers."""
    if sampling is None or sampling.seed is None:
        return sampling
    return replace(sampling, seed=sampling.seed + row)


def _by_transformers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Ids],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None,
    on_text: Callable[[str], None] | None,
    advance: Callable[[int], None] | None,
    both: bool,
) -> list[Completion]:
    """generate, for models that strop's engine does not know. Rows of like length share a batch: little is padded."""
    if both:
        options = stop_ids, max_new_tokens, sampling, on_text
        with adapter_disabled(cast(Any, model)):
            base = _by_transformers(model, tokenizer, prompts, *options, advance, False)
        after = None if advance is None else lambda done: advance(len(prompts) + done)
        return base + _by_transformers(model, tokenizer, prompts, *options, after, False)
    sampling = sampling or Sampling()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    greedy = sampling.temperature == 0
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
        use_cache=True,
        repetition_penalty=sampling.repetition_penalty,
        **({} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}),
    )
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    answers: dict[int, Completion] = {}
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    streamer = _Pieces(tokenizer, on_text) if on_text is not None else None
    for start in range(0, len(order), MAX_SEQUENCES):
        rows = order[start : start + MAX_SEQUENCES]
        width = max(len(prompts[row]) for row in rows)
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, width - len(prompts[row]) :] = torch.from_numpy(prompts[row].astype(np.int64))
            mask[place, width - len(prompts[row]) :] = 1
        head = model.get_output_embeddings()  # type: ignore[operator]
        family = str(model.config.model_type)  # type: ignore[union-attr]
        with attribute_errors(family), torch.inference_mode(), head.register_forward_pre_hook(_contiguous):
            out = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, streamer=streamer
            )
        for row, new in zip(rows, out[:, width:].tolist(), strict=True):
            answers[row] = _answer(tokenizer, new, stop_ids)
        if advance is not None:
            advance(len(answers))
    model.train(training)
    return [answers[row] for row in range(len(prompts))]


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The last position of each row is a strided slice, for which torch copies the whole head once a row of the batch:
    1.8 GB and 1.6 s at 32 rows of SmolLM2, against nothing for a contiguous one."""
    return (inputs[0].contiguous(), *inputs[1:])


def _written(tokenizer: Any, text: SequenceState, stop_ids: Sequence[int]) -> Completion:
    answer = _answer(tokenizer, text.answer, stop_ids)
    return answer if not len(text.logprobs) else replace(answer, logprobs=text.logprobs)


def _answer(tokenizer: Any, new: list[int], stop_ids: Sequence[int]) -> Completion:
    end = next((place for place, token in enumerate(new) if token in stop_ids), None)
    kept = new if end is None else new[:end]
    return Completion(tokenizer.decode(kept, skip_special_tokens=True), len(kept) + (end is not None), end is not None)


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Passes decoded pieces on instead of printing them."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
