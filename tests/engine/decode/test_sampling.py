"""How tokens are drawn: against the whole distribution, by counting; and what a text's own numbers depend on."""

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

from strop.engine.decode.sampling import NoToken, Sampling, Seen, SequenceState
from strop.engine.kernels.dispatch import draw_token, likeliest

DRAWS = 20_000


def logits(n: int, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(5).normal(0, spread, n).astype(np.float32)


def wanted(row: np.ndarray, sampling: Sampling, ids: list[int]) -> np.ndarray:
    """The distribution by transformers' own processors."""
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
def test_tokens_are_drawn_by_their_distribution(sampling: Sampling) -> None:
    """Pearson's chi-square over 20,000 draws, below its quantile of 1 in 10,000 (Wilson and Hilferty)."""
    row, prompt = logits(300), np.array([3, 5, 9], np.int32)
    p = wanted(row, sampling, prompt.tolist())
    counts = np.zeros(len(row))
    text = SequenceState(prompt, None, most=DRAWS, sampling=Sampling(**{**vars(sampling), "seed": 11}))
    for _ in range(DRAWS):
        counts[text.pick(Seen.of(row[None]), 0).id] += 1
        text.length += 1  # each place has a number of its own; what was drawn is not said again
        text._ids[text.length - 1] = prompt[0]
    assert not counts[p == 0].any()
    order = np.argsort(-p)[: int((p > 0).sum())]
    expected, seen, cells = DRAWS * p[order], counts[order], []
    at = 0
    while at < len(order):  # cells of at least 8
        end = at + 1
        while expected[at:end].sum() < 8 and end < len(order):
            end += 1
        cells.append((expected[at:end].sum(), seen[at:end].sum()))
        at = end
    if len(cells) > 1 and cells[-1][0] < 8:
        last = cells.pop()
        cells[-1] = (cells[-1][0] + last[0], cells[-1][1] + last[1])
    square = sum((b - a) ** 2 / a for a, b in cells)
    free = len(cells) - 1
    limit = free * (1 - 2 / (9 * free) + 3.719 * np.sqrt(2 / (9 * free))) ** 3
    assert square < limit


def test_an_even_number_for_each_place_reaches_every_token() -> None:
    row = np.zeros(10, np.float32)
    assert [draw_token(row, 1.0, 0, 1.0, (place + 0.5) / 10) for place in range(10)] == list(range(10))
    row[3] = 100
    assert {draw_token(row, 0.01, 0, 1.0, u) for u in (0.0, 0.5, 0.999999)} == {3}
    assert {draw_token(row, 1.0, 1, 0.5, u) for u in (0.0, 0.5, 0.999999)} == {3}
    row[3:] = -np.inf
    assert max(draw_token(row, 1.0, 0, 1.0, u) for u in (0.5, 0.9999999999999999)) == 2


def test_what_a_seed_decides() -> None:
    row, prompt = logits(1000), np.arange(5, dtype=np.int32)

    def drawn(seed: int | None) -> list[int]:
        text = SequenceState(prompt, None, most=20, sampling=Sampling(1.0, seed=seed))
        for _ in range(20):
            text.append(text.pick(Seen.of(row[None]), 0).id)
        return text.answer

    assert drawn(7) == drawn(7) != drawn(8)
    assert drawn(None) != drawn(None)


def test_what_is_told_of_a_token() -> None:
    row = logits(50)
    token = SequenceState(np.array([1], np.int32), None, logprobs=3).pick(Seen.of(row[None]), 0)
    logs = torch.from_numpy(row).double().log_softmax(-1)
    top = logs.topk(3)
    assert token.id == int(logs.argmax()) and token.logprob == pytest.approx(float(top.values[0]))
    assert [number for number, _ in token.likeliest] == top.indices.tolist()
    assert [log for _, log in token.likeliest] == pytest.approx(top.values.tolist())


def test_numbers_that_are_none() -> None:
    rows = np.stack([logits(20)] * 5)
    rows[1, 4], rows[2, 7], rows[3, 2], rows[4] = np.nan, np.inf, -np.inf, -np.inf
    found, finite = likeliest(rows)
    assert finite.tolist() == [True, False, False, True, False]
    assert found[0] == rows[0].argmax() and found[3] == rows[3].argmax()
    for row in rows[[1, 2, 4]]:
        with pytest.raises(NoToken):
            SequenceState(np.array([1], np.int32), None, sampling=Sampling(1.0)).pick(Seen.of(row[None]), 0)
