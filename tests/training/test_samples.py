"""Sample completions at each evaluation: their content, an unchanged run, resume and failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import strop
from strop.data.types import Message
from strop.machine.probe import probe
from strop.runs.events import read_events
from strop.training import samples
from tests.support.preferences import write_pairs
from tests.support.tiny import write_rows

OPTIONS = {
    "train.max_steps": 6, "train.eval_steps": 3, "train.save_steps": 3, "train.batch_size": 4, "lora.r": 4,
    "model.dtype": "fp32", "lora.dropout": 0.1, "train.learning_rate": 1e-2,
}  # fmt: skip
NEEDS_VNNI = pytest.mark.skipif(not probe().has_int8_dot, reason="this CPU has no VNNI")
PLAIN = {"lora.modules_to_save": ["down_proj"], "lora.target_modules": ["q_proj"]}  # decoded by transformers


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    train, held_out = write_rows(tmp_path / "train.jsonl", 24), write_rows(tmp_path / "eval.jsonl", 6)
    return {"data": str(train), "data.eval": str(held_out)}


def read(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "events.jsonl") if event["event"] == kind]


def read_numbers(run: Path) -> list[tuple[str, int, float]]:
    """Return the losses and gradient norms of steps and evaluations."""
    events = read_events(run / "events.jsonl")
    return [
        (kind, event["step"], event.get(name))
        for kind, name in (("step", "loss"), ("step", "grad_norm"), ("eval", "loss"))
        for event in events
        if event["event"] == kind
    ]


def assert_same_run(run: Path, other: Path) -> None:
    """Check that losses, checkpoints with their random states, and adapters are equal to the bit."""
    assert read_numbers(run) == read_numbers(other)
    files = sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    assert any(file.name == "random.safetensors" for file in files)
    for file in files:
        tensors, expected = load_file(run / file), load_file(other / file)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected), file


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("fast", {}),
        ("fast", {"model.quantization": "nf4"}),
        ("fast", {"model.quantization": "nf4", "model.resident_layers": 1}),
        pytest.param("fast", {"train.int8_matmul": True}, marks=NEEDS_VNNI),
        ("fast", {"train.gradient_checkpointing": "on"}),
        ("plain", PLAIN),
        ("plain", {**PLAIN, "model.quantization": "int8", "train.gradient_checkpointing": "on"}),
    ],
    ids=["fast", "nf4", "one dequantized layer", "int8 matmul", "recomputed", "plain", "plain recomputed int8"],
)
def test_samples_leave_the_run_bit_identical(
    engine: str, options: dict[str, Any], tmp_path: Path, tiny_folder: Path, data: dict[str, str]
) -> None:
    settings = {"model": str(tiny_folder), **data, **OPTIONS, **options}
    sampled = strop.train(**settings, out=tmp_path / "sampled").folder
    without = strop.train(**settings, **{"train.samples": 0}, out=tmp_path / "without").folder
    assert [event["engine"] for event in read(sampled, "start")] == [engine]
    assert_same_run(sampled, without)
    assert [event["step"] for event in read(sampled, "samples")] == [3, 6]
    assert not read(sampled, "note") or "samples" not in str(read(sampled, "note"))
    assert not read(without, "samples")


@pytest.mark.parametrize("options", [{}, PLAIN, {"model.quantization": "nf4"}], ids=["fast", "plain", "nf4"])
def test_samples_are_greedy_completions_of_the_first_evaluation_prompts(
    options: dict[str, Any], tmp_path: Path, tiny_folder: Path, data: dict[str, str]
) -> None:
    """The last evaluation is of the exported weights, so `strop.load` generates the same."""
    settings = {"model": str(tiny_folder), **data, **OPTIONS, "train.eval_steps": 6, **options}
    run = strop.train(**settings, out=tmp_path / "run").folder
    (event,) = read(run, "samples")
    prompts = [f"what is {n}" for n in range(4)]
    model = strop.load(run, dtype="fp32")
    expected = model.answer([model.renderer.prompt([Message("user", text)]) for text in prompts], max_new_tokens=48)
    references = [f"it is {n * n}" + "!" * (n % 5) for n in range(4)]
    assert event["samples"] == [
        {"prompt": prompt, "reference": reference, "completion": completion.text, "cut": not completion.stopped}
        for prompt, reference, completion in zip(prompts, references, expected, strict=True)
    ]
    kinds = [event["event"] for event in read_events(run / "events.jsonl")]
    assert kinds[kinds.index("eval") + 1] == "samples"


def test_killed_and_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, tiny_folder: Path, data: dict[str, str]
) -> None:
    """The recipe of the killed run has no train.samples, as those of earlier versions."""
    settings = {"model": str(tiny_folder), **data, **OPTIONS}
    whole = strop.train(**settings, out=tmp_path / "whole").folder

    class Killed(Exception):
        pass

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 4:
            raise Killed

    broken = tmp_path / "broken"
    with pytest.raises(Killed):
        strop.train(**settings, out=broken, callback=kill)
    recipe = yaml.safe_load((broken / "recipe.yaml").read_text(encoding="utf-8"))
    lock = json.loads((broken / "lock.json").read_text(encoding="utf-8"))
    del recipe["train"]["samples"], lock["values"]["train.samples"]
    (broken / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (broken / "lock.json").write_text(json.dumps(lock), encoding="utf-8")
    strop.resume(broken)
    assert [(event["step"], event["samples"]) for event in read(broken, "samples")] == [
        (event["step"], event["samples"]) for event in read(whole, "samples")
    ]
    assert load_weights(broken).keys() == load_weights(whole).keys()
    assert all(torch.equal(weight, load_weights(broken)[name]) for name, weight in load_weights(whole).items())


def load_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_number_of_samples_can_change_on_resume(tmp_path: Path, tiny_folder: Path, data: dict[str, str]) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 4:
            raise ValueError

    with pytest.raises(ValueError):
        strop.train(model=str(tiny_folder), **data, **OPTIONS, out=tmp_path / "run", callback=stop)
    strop.resume(tmp_path / "run", **{"train.samples": 1})
    assert [len(event["samples"]) for event in read(tmp_path / "run", "samples")] == [4, 1]


@pytest.mark.parametrize("error", [MemoryError("no memory left"), RuntimeError("CUDA out of memory"), ValueError("x")])
def test_failure_of_sampling_is_a_note(
    error: Exception, tmp_path: Path, tiny_folder: Path, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": str(tiny_folder), **data, **OPTIONS}
    expected = strop.train(**settings, out=tmp_path / "expected").folder

    def fail(*_: Any, **__: Any) -> None:
        torch.rand(3)  # moves the random state
        raise error

    monkeypatch.setattr(samples, "generate", fail)
    run = strop.train(**settings, out=tmp_path / "run").folder
    assert_same_run(run, expected)
    assert not read(run, "samples")
    texts = [event["text"] for event in read(run, "note") if "sample completions" in event["text"]]
    assert texts == [f"step {step}: no sample completions: {type(error).__name__}: {error}" for step in (3, 6)]


def test_rows_without_answer_and_long_prompts_are_left_out(tmp_path: Path, tiny_folder: Path) -> None:
    def turns(*texts: str) -> dict[str, Any]:
        roles = ["user", "assistant"] * len(texts)
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}

    rows = [
        {"messages": [*turns("a", "b")["messages"], {"role": "user", "content": "no answer"}]},
        turns("first", "one", "second", "two"),
        turns("x" * 100, "b", "y" * 100, "long"),
        turns("third", "three"),
    ]
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = strop.train(
        model=str(tiny_folder), data=str(write_rows(tmp_path / "train.jsonl", 24)), out=tmp_path / "run",
        **{"data.eval": str(held_out), "data.max_length": 100, "data.overlong": "truncate-start"}, **OPTIONS,
    ).folder  # fmt: skip
    event = read(run, "samples")[0]
    assert [(x["prompt"], x["reference"]) for x in event["samples"]] == [("second", "two"), ("third", "three")]


def test_raw_text_and_other_objectives_have_no_samples(tmp_path: Path, tiny_folder: Path) -> None:
    texts, pairs = tmp_path / "texts.jsonl", tmp_path / "pairs.jsonl"
    texts.write_text("".join(json.dumps({"text": f"number {n}"}) + "\n" for n in range(20)), encoding="utf-8")
    write_pairs(pairs, 20)
    for name, file, objective in (("texts", texts, "sft"), ("pairs", pairs, "dpo")):
        run = strop.train(
            model=str(tiny_folder), data=str(file), out=tmp_path / name,
            **{**OPTIONS, "data.eval": "20%", "train.objective": objective},
        ).folder  # fmt: skip
        assert len(read(run, "eval")) == 2
        assert not read(run, "samples")
