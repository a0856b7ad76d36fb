"""Completions sampled by vLLM: a stand-in with its protocol, and the real one if STROP_VLLM_PYTHON is set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from strop.errors import RunError
from strop.runs.events import read_events
from strop.training import rollouts
from tests.support.groups import write_prompts, write_reward
from tests.support.runs import QUICK, run
from tests.support.vllm_stand_in import vllm_python

REAL = os.environ.get("STROP_VLLM_PYTHON")
OPTIONS = [
    *QUICK, "--train.objective", "grpo", "--train.group", "4", "--train.answer_tokens", "8", "--train.learning_rate",
    "0.01", "--train.max_steps", "4", "--model.dtype", "fp32",
]  # fmt: skip


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == kind]


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.skipif(not REAL, reason="no vLLM"))])
def test_vllm_samples_from_the_present_adapter(
    tiny_folder: Path, tmp_path: Path, real: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    python = REAL if real else vllm_python(tmp_path / "vllm")
    rows, out = write_prompts(tmp_path / "rows.jsonl", 16), tmp_path / "run"
    model = "demo" if real else tiny_folder  # whose heads are too small for vLLM's attention
    words = ["train", "--model", model, "--data", rows, "--out", out, *OPTIONS, "--train.vllm_python", python]
    code, _, err = run(*words, "--train.rewards", write_reward(tmp_path / "own.py"), capsys=capsys)
    assert code == 0, err
    assert "sampled by vLLM" in err
    steps = events(out, "step")
    assert len(steps) == 4 and all(step["off"] < 1e-4 for step in steps)  # weights have moved by the second
    assert steps[-1]["kl"] > 1e-3 and any(step["reward_spread"] > 0 for step in steps)
    assert all(1 <= step["answer_length"] <= 8 for step in steps)


@pytest.mark.slow
def test_run_fails_when_vllm_ends_and_can_be_resumed(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = vllm_python(tmp_path / "vllm")
    fails = tmp_path / "vllm" / "fails"
    rows, out = write_prompts(tmp_path / "rows.jsonl", 16), tmp_path / "run"
    words = ["train", "--model", tiny_folder, "--data", rows, "--out", out, *OPTIONS, "--train.vllm_python", python]
    words += ["--train.rewards", write_reward(tmp_path / "own.py")]
    for steps in (0, 1):  # no folder is left after a failure in the first step
        fails.write_text(f"{steps + 1}")
        code, _, err = run(*words, capsys=capsys)
        assert code == 1 and "vLLM ended: the GPU failed" in err, err
        assert out.exists() == (steps > 0) and len(events(out, "step") if steps else []) == steps
    fails.unlink()
    code, _, err = run("resume", out, capsys=capsys)
    assert code == 0 and events(out, "step")[-1]["step"] == 4, err


def test_vllm_that_does_not_answer_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "VLLM_TIMEOUT_S", 0.3)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (tmp_path / "log").open("w+") as log, subprocess.Popen(command, **pipes) as process:
        with pytest.raises(RunError, match=r"vLLM did not answer within 0\.005 minutes"):
            rollouts._request(process, log, {})
        assert process.wait() != 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train.vllm_python", "/no/such/python"], "no such program"),
        (["--model.quantization", "nf4"], "16-bit base, not from nf4"),
        (["--lora.use_dora", "true"], "vLLM does not support its use_dora"),
        (["--train.objective", "sft"], "samples no completions"),
    ],
)
def test_unsupported_vllm_recipes_are_refused_before_loading(
    tiny_folder: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_prompts(tmp_path / "rows.jsonl", 16)
    rewards = [] if "sft" in more else ["--train.objective", "grpo", "--train.rewards", "exact"]
    words = ["train", "--model", tiny_folder, "--data", rows, "--out", tmp_path / "run", *QUICK, *rewards]
    code, _, err = run(*words, "--train.vllm_python", vllm_python(tmp_path / "vllm"), *more, capsys=capsys)
    assert code == 2 and message in err, err
