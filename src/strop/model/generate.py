"""Answers from a model: batched, left-padded, with the KV cache; new text is decoded from the new ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import GenerationConfig, TextStreamer

from strop.model.blame import blaming

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int  # new tokens, the stop token included
    stopped: bool  # ended by a stop token, not by the limit


@dataclass(frozen=True)
class Sampling:
    """Greedy where temperature is 0; top_k 0: among all tokens. The seed makes sampled answers repeatable."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @staticmethod
    def own(config: GenerationConfig) -> Sampling:
        """What a model's own generation config asks for."""
        penalty = float(config.repetition_penalty or 1.0)
        if not config.do_sample:
            return Sampling(repetition_penalty=penalty)
        # where a config says to sample, and not how: transformers' own
        temperature = 1.0 if config.temperature is None else float(config.temperature)
        top_p = 1.0 if config.top_p is None else float(config.top_p)
        return Sampling(temperature, top_p, 50 if config.top_k is None else int(config.top_k), penalty)

    def changed(self, temperature: float | None, top_p: float | None, seed: int | None) -> Sampling:
        """With what a request asks for; None: as it is, but for the seed."""
        return replace(
            self,
            temperature=self.temperature if temperature is None else temperature,
            top_p=self.top_p if top_p is None else top_p,
            seed=seed,
        )

    def words(self) -> str:
        if self.temperature == 0:
            said = ["greedy"]
        else:
            said = [f"temperature {self.temperature:g}"]
            said += [f"top_p {self.top_p:g}"] if self.top_p < 1 else []
            said += [f"top_k {self.top_k}"] if self.top_k else []
        return ", ".join(
            said + ([f"repetition penalty {self.repetition_penalty:g}"] if self.repetition_penalty != 1 else [])
        )


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Ids],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 256,
    batch_size: int = 16,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[Answer]:
    """One answer a prompt, in the order given. Rows of like length share a batch, so that little is padded.

    on_text: receives the text of a single prompt's answer piece by piece.
    """
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
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    streamer = _Pieces(tokenizer, on_text) if on_text is not None else None
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(prompts[row]) for row in rows)
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, width - len(prompts[row]) :] = torch.from_numpy(prompts[row].astype(np.int64))
            mask[place, width - len(prompts[row]) :] = 1
        head = model.get_output_embeddings()  # type: ignore[operator]
        family = str(model.config.model_type)  # type: ignore[union-attr]
        with blaming(family), torch.inference_mode(), head.register_forward_pre_hook(_contiguous):
            out = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, streamer=streamer
            )
        for row, new in zip(rows, out[:, width:].tolist(), strict=True):
            answers[row] = _answer(tokenizer, new, stop_ids)
    model.train(training)
    return [answers[row] for row in range(len(prompts))]


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The last position of each row is a strided slice, for which torch copies the whole head once a row of the batch:
    1.8 GB and 1.6 s at 32 rows of SmolLM2, against nothing for a contiguous one."""
    return (inputs[0].contiguous(), *inputs[1:])


def _answer(tokenizer: Any, new: list[int], stop_ids: Sequence[int]) -> Answer:
    end = next((place for place, token in enumerate(new) if token in stop_ids), None)
    kept = new if end is None else new[:end]
    return Answer(tokenizer.decode(kept, skip_special_tokens=True), len(kept) + (end is not None), end is not None)


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Passes decoded pieces on instead of printing them."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
