"""Results of lm-evaluation-harness for two models are compared, or not where that would mean something else."""

from __future__ import annotations

import math
from typing import Any

import pytest

from strop.evaluation.general import _compare_outputs
from strop.evaluation.metrics import format_task_scores

LOGPROBS = {"base": [-23.0, -22.0, -21.5], "tuned": [-20.0, -19.5, -19.0]}


def output(side: str) -> dict[str, Any]:
    """Return what the harness returns for a task with a mean, and an aggregation that is not a mean."""
    logprobs = LOGPROBS[side]
    hits = [float(logprob > -20.5) for logprob in logprobs]
    samples = [
        {"doc_id": number, "filter": "none", "acc": hit, "perplexity": logprob}
        for number, (hit, logprob) in enumerate(zip(hits, logprobs, strict=True))
    ]
    scores = {"acc,none": sum(hits) / 3, "perplexity,none": math.exp(-sum(logprobs) / 3), "alias": "words"}
    return {"results": {"words": scores}, "samples": {"words": samples}, "n-samples": {"words": {"effective": 3}}}


def test_only_means_have_a_difference() -> None:
    scores = _compare_outputs({side: output(side) for side in ("base", "tuned")})["words"]
    assert scores["acc"]["difference"]["value"] == pytest.approx(1.0) and scores["acc"]["documents"] == 3
    assert scores["perplexity"]["difference"] is None
    assert scores["perplexity"]["tuned"] < scores["perplexity"]["base"] and scores["perplexity"]["documents"] == 3
    rows = {metric: texts for _, metric, *texts in format_task_scores({"words": scores})}
    assert rows["acc"][3].startswith("+1.0000") and rows["perplexity"][3] == ""


def test_a_tuned_model_without_its_base_has_its_own_scores() -> None:
    scores = _compare_outputs({"tuned": output("tuned")})["words"]
    assert scores["acc"] == {"tuned": 1.0, "documents": 3, "difference": None}
    assert next(iter(format_task_scores({"words": scores}))) == ("words", "acc", "3", "", "1.0000", "")
