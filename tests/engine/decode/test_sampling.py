"""The distribution of sampled tokens, and what the random numbers of a sequence depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from strop.engine.decode.sampling import NoToken, PassOutput, Sampling, SequenceState
from strop.engine.kernels.dispatch import argmax, sample_token

NUM_SAMPLES = 20_000


def logits(n: int, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(5).normal(0, spread, n).astype(np.float32)


def expected_probabilities(row: np.ndarray, sampling: Sampling, ids: list[int]) -> np.ndarray:
    """Return the distribution by the logits processors of transformers."""
    warp = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    warp.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warp.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warp.append(TopPLogitsWarper(sampling.top_p))
    scores = warp(torch.tensor([ids]), torch.from_numpy(row.copy())[None])[0]
    return scores.double().softmax(-1).numpy()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.3),
        Sampling(1.5, top_p=0.8),
        Sampling(0.8, top_k=7),
        Sampling(1.2, 0.6, 20),
        Sampling(0.9, 0.95, 0, 1.3),
        Sampling(30.0, top_p=0.999),  # nearly even: all tokens count
    ],
)
def test_sampled_tokens_follow_the_distribution(sampling: Sampling) -> None:
    """Pearson's chi-square over 20,000 samples, below its quantile of 1 in 10,000 (Wilson and Hilferty)."""
    row, prompt = logits(300), np.array([3, 5, 9], np.int32)
    p = expected_probabilities(row, sampling, prompt.tolist())
    counts = np.zeros(len(row))
    sequence = SequenceState(
        prompt, None, max_new_tokens=NUM_SAMPLES, sampling=Sampling(**{**vars(sampling), "seed": 11})
    )
    for _ in range(NUM_SAMPLES):
        counts[sequence.sample(PassOutput.from_logits(row[None]), 0).id] += 1
        sequence.length += 1  # a new position, so a new random number; the ids stay, for the repetition penalty
        sequence._ids[sequence.length - 1] = prompt[0]
    assert not counts[p == 0].any()
    order = np.argsort(-p)[: int((p > 0).sum())]
    expected, observed, cells = NUM_SAMPLES * p[order], counts[order], []
    at = 0
    while at < len(order):  # cells of at least 8
        end = at + 1
        while expected[at:end].sum() < 8 and end < len(order):
            end += 1
        cells.append((expected[at:end].sum(), observed[at:end].sum()))
        at = end
    if len(cells) > 1 and cells[-1][0] < 8:
        last = cells.pop()
        cells[-1] = (cells[-1][0] + last[0], cells[-1][1] + last[1])
    square = sum((b - a) ** 2 / a for a, b in cells)
    free = len(cells) - 1
    limit = free * (1 - 2 / (9 * free) + 3.719 * np.sqrt(2 / (9 * free))) ** 3
    assert square < limit


def test_uniform_numbers_reach_every_token() -> None:
    row = np.zeros(10, np.float32)
    assert [sample_token(row, 1.0, 0, 1.0, (place + 0.5) / 10) for place in range(10)] == list(range(10))
    row[3] = 100
    assert {sample_token(row, 0.01, 0, 1.0, u) for u in (0.0, 0.5, 0.999999)} == {3}
    assert {sample_token(row, 1.0, 1, 0.5, u) for u in (0.0, 0.5, 0.999999)} == {3}
    row[3:] = -np.inf
    assert max(sample_token(row, 1.0, 0, 1.0, u) for u in (0.5, 0.9999999999999999)) == 2


def test_equal_seeds_give_equal_tokens() -> None:
    row, prompt = logits(1000), np.arange(5, dtype=np.int32)

    def sampled(seed: int | None) -> list[int]:
        sequence = SequenceState(prompt, None, max_new_tokens=20, sampling=Sampling(1.0, seed=seed))
        for _ in range(20):
            sequence.append(sequence.sample(PassOutput.from_logits(row[None]), 0).id)
        return sequence.completion

    assert sampled(7) == sampled(7) != sampled(8)
    assert sampled(None) != sampled(None)


def test_token_carries_logprob_and_top_logprobs() -> None:
    row = logits(50)
    token = SequenceState(np.array([1], np.int32), None, num_logprobs=3).sample(PassOutput.from_logits(row[None]), 0)
    logs = torch.from_numpy(row).double().log_softmax(-1)
    top = logs.topk(3)
    assert token.id == int(logs.argmax()) and token.logprob == pytest.approx(float(top.values[0]))
    assert [number for number, _ in token.top_logprobs] == top.indices.tolist()
    assert [log for _, log in token.top_logprobs] == pytest.approx(top.values.tolist())


def test_non_finite_logits_raise_no_token() -> None:
    rows = np.stack([logits(20)] * 5)
    rows[1, 4], rows[2, 7], rows[3, 2], rows[4] = np.nan, np.inf, -np.inf, -np.inf
    tokens, finite = argmax(rows)
    assert finite.tolist() == [True, False, False, True, False]
    assert tokens[0] == rows[0].argmax() and tokens[3] == rows[3].argmax()
    for row in rows[[1, 2, 4]]:
        with pytest.raises(NoToken):
            SequenceState(np.array([1], np.int32), None, sampling=Sampling(1.0)).sample(
                PassOutput.from_logits(row[None]), 0
            )
