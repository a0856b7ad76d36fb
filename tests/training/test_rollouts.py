"""Learning from rewards for the model's own answers: what is drawn, what is learned from it, and what is told."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.data.types import Group
from strop.errors import RunError, Stopped
from strop.objectives.grpo import advantages
from strop.runs.events import read_events
from strop.training import guard, loop, state
from strop.training import rollouts as drawing
from strop.training.job import Job, stream_of
from strop.training.loop import fit
from strop.training.oom import micro_batches
from strop.training.rollouts import OfGroups
from tests.support.groups import job, prompts, rewarding, write_prompts, write_reward
from tests.support.runs import QUICK, run
from tests.support.tiny import far

GROUPS = [
    *QUICK, "--train.objective", "grpo", "--train.group", "4", "--train.answer_tokens", "8", "--train.learning_rate",
    "0.01",
]  # fmt: skip


def drawn(made: Job, index: int = 0) -> list[Group]:
    rows = [made.train[row] for row in stream_of(made.recipe, len(made.train)).rows(index)]
    return made.criterion.begin(made.step, rows, index, partial(micro_batches, made))  # type: ignore[return-value]


def gradients(made: Job, items: list[Group]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = loop.gradients(made, items).loss
    found = {name: weight.grad.clone() for name, weight in made.state.weights.items() if weight.grad is not None}
    made.state.optimizer.zero_grad()
    return float(loss), found


def events(made: Job, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(made.folder.events) if event["event"] == kind]


@pytest.mark.parametrize("group_loss", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize(
    ("cut", "plain"),
    [
        ({"train.micro_batch": 1}, False),
        ({"train.micro_batch": None, "train.micro_batch_tokens": 80}, False),
        ({"train.micro_batch": 3}, True),
        ({"train.gradient_checkpointing": "on"}, False),
    ],
)
def test_same_loss_and_gradients_for_any_micro_batch_and_step(
    tmp_path: Path, group_loss: str, cut: dict[str, Any], plain: bool
) -> None:
    """On record, 10: a scale that changes with accumulation. The unit is the group."""
    rows, options = prompts(4), {"train.group_loss": group_loss}
    whole = job(tmp_path / "whole", rows, **options)
    items = drawn(whole)
    pieces = job(tmp_path / "pieces", rows, plain=plain, **{**options, **cut})
    if cut.get("train.gradient_checkpointing"):
        pieces.step.recompute()
    expected, found = gradients(far(whole), items), gradients(far(pieces), items)
    assert abs(expected[0]) > 1e-6 and found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-8)
    for name, grad in expected[1].items():
        assert grad.norm() > 0 and (grad - found[1][name]).norm() <= 1e-4 * grad.norm() + 1e-8, name


def test_equal_answers_stand_once_and_count_as_often_as_they_were_drawn(tmp_path: Path) -> None:
    made = job(tmp_path, prompts(4), lambda gold, answer: float(len(answer) % 3))
    assert isinstance(made.criterion, OfGroups)
    group = max(drawn(made), key=lambda group: max(group.advantages))
    once = Group(group.examples[:1], advantages=(0.5,), stopped=(True,), rewards=(1.0, 1.0), drawn=group.drawn[:3])
    example = replace(once.examples[0], ids=once.examples[0].ids[: once.examples[0].prompt + 3])

    def counted(times: int) -> Group:
        weights = example.weights[: len(example.ids)].copy()
        weights[example.prompt :] = times
        return replace(once, examples=(replace(example, weights=weights),))

    twice = replace(counted(1), examples=counted(1).examples * 2, advantages=(0.5, 0.5), stopped=(True, True))
    twice = replace(twice, drawn=torch.from_numpy(once.drawn).repeat(2).numpy())
    for options in ("dapo", "grpo", "dr_grpo"):
        criterion = replace(made.criterion, options=made.criterion.options.model_copy(update={"group_loss": options}))
        values = [
            float(criterion.loss(made.step, [one], 0.0)[0].detach()) / criterion.divisor([one])
            for one in (counted(2), twice)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-6) and values[0] != 0


def test_draws_depend_on_the_seed_the_step_the_row_and_the_number(tmp_path: Path) -> None:
    made = job(tmp_path / "a", prompts(4))
    same, later = drawn(made), drawn(made, 1)

    def answers(items: list[Group]) -> list[bytes]:
        return sorted(example.ids.tobytes() for group in items for example in group.examples)

    assert answers(same) == answers(drawn(job(tmp_path / "b", prompts(4))))
    assert answers(same) != answers(later) and answers(same) != answers(drawn(job(tmp_path / "c", prompts(4), seed=1)))
    assert len(set(answers(same))) > 12  # of 16
    alone = made.criterion.begin(made.step, [made.train[2]], 0, partial(micro_batches, made))
    assert set(answers(alone)) <= set(answers(same))  # type: ignore[arg-type]


def test_advantages_are_those_of_the_group(tmp_path: Path) -> None:
    made = job(tmp_path, prompts(4))
    assert isinstance(made.criterion, OfGroups)
    for group in drawn(made):
        counts = list(group.counts)
        assert sum(counts) == 4 == len(group.rewards)
        repeated = [a for a, count in zip(group.advantages, counts, strict=True) for _ in range(count)]
        assert repeated == pytest.approx(advantages(group.rewards, made.criterion.options))
        assert sum(repeated) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("updates", [1, 3])
def test_better_answers_become_likelier_and_worse_ones_less_likely(tmp_path: Path, updates: int) -> None:
    made = job(tmp_path, prompts(4), **{"train.max_steps": 3, "train.updates": updates})
    groups = drawn(made)
    examples = [example for group in groups for example in group.examples]
    before = made.step.log_probs(examples).detach()
    fit(made)
    change = made.step.log_probs(examples).detach() - before
    advantage = change.new_tensor([value for group in groups for value in group.advantages])
    counts = change.new_tensor([count for group in groups for count in group.counts])
    assert (change * advantage).sum() > 0.1 and abs((advantage * counts).sum()) < 1e-6
    first = events(made, "step")[0]
    assert first["off"] < 1e-4 and first["answer_length"] <= 6 and 0 <= first["stop_rate"] <= 1
    assert (first["kl"] == 0) == (updates == 1)  # of the last update: the model has moved
    assert events(made, "step")[-1]["kl"] > 1e-6
    assert len(events(made, "answers")) == 4  # one of them asked for here


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumed_at_any_step_is_bit_identical(tmp_path: Path, stop_after: int) -> None:
    options = {"train.max_steps": 5, "train.micro_batch": 3, "train.updates": 2}
    unbroken = job(tmp_path / "unbroken", prompts(8), **options)
    fit(unbroken)
    first = job(tmp_path / "broken", prompts(8), **options)
    asked = iter(range(1, 100))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        from tests.training.test_objectives import _after

        patch.setattr(loop, "stop_signals", _after(stop_after, asked))
        fit(first)
    torch.manual_seed(12345)
    second = job(tmp_path / "broken", prompts(8), **options)
    state.restore(state.newest(second.folder, pytest.fail), second.state)
    fit(second)
    assert second.state.progress.step == 5
    for name, weight in second.state.weights.items():
        assert torch.equal(weight, unbroken.state.weights[name]), name
    losses = [[event["loss"] for event in events(made, "step")] for made in (second, unbroken)]
    assert losses[0] == losses[1]


def test_the_reference_is_what_training_started_from(tmp_path: Path) -> None:
    """On record, 5 and 7: an adapter to start from is part of it; not the bare base."""
    made = far(job(tmp_path, prompts(4)))
    for group in drawn(made):
        now = made.step.token_log_probs(list(group.examples)).detach().double().numpy()
        assert abs(now - group.drawn).max() < 1e-4 < abs(now - group.before).max()
    with torch.no_grad():
        for name, weight in made.state.weights.items():
            weight.copy_(made.criterion.start[name])  # type: ignore[attr-defined]
    group = drawn(made)[0]
    assert abs(group.drawn - group.before).max() < 1e-4


# --- the guard ---------------------------------------------------------------------------------------------------


def test_another_models_answers_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On record, 15: the drawing engine's log-probabilities differ from the step's."""
    made = job(tmp_path, prompts(4), **{"train.max_steps": 2})
    sample_completions = drawing.sample_completions

    def by_another(model: Any, *given: Any, **options: Any) -> Any:
        with state.holding(made.state.weights, {n: w.detach() * 40 for n, w in made.state.weights.items()}):
            return sample_completions(model, *given, **options)

    monkeypatch.setattr(drawing, "sample_completions", by_another)
    with pytest.raises(RunError, match=r"differ by .* nats a token"):
        fit(made)
    assert not events(made, "step")


@pytest.mark.parametrize(("function", "said"), [
    (lambda gold, answer: 0.0, "cut off at its longest: raise --train.answer_tokens"),
    (lambda gold, answer: 1.0, "cut off"),
])  # fmt: skip
def test_groups_that_teach_nothing_are_counted_and_told(tmp_path: Path, function: Any, said: str) -> None:
    """On record, 14: all answers cut off, reward 0, deviation 0, no learning, no word."""
    made = job(tmp_path, prompts(8), function, **{"train.max_steps": 3, "train.beta": 0, "train.answer_tokens": 1})
    before = {name: weight.detach().clone() for name, weight in made.state.weights.items()}
    fit(made)
    notes = [event["text"] for event in events(made, "note")]
    assert len(notes) == 1 and said in notes[0] and "step 1" in notes[0]
    assert [event["equal_groups"] for event in events(made, "step")] == [1.0] * 3
    assert all(torch.equal(weight, before[name]) for name, weight in made.state.weights.items())


def test_equal_rewards_of_whole_answers_are_told_as_such() -> None:
    progress = state.Progress()
    figures = {"equal_groups": 1.0, "stop_rate": 0.5, "reward": 1.0}
    assert "same reward (mean 1)" in str(guard.unheard(progress, figures))
    assert guard.unheard(progress, figures) is None
    assert guard.unheard(progress, {**figures, "equal_groups": 0.9}) is None


def test_a_gradient_that_reaches_nothing_stops_the_run(tmp_path: Path) -> None:
    """On record, 9: rewards differ, and the gradient is zero."""
    made = job(tmp_path, prompts(4), **{"train.max_steps": 2})
    whole = made.step.token_log_probs
    stuck = replace(made, step=replace(made.step, token_log_probs=lambda rows: whole(rows).detach() + whole(rows) * 0))
    with pytest.raises(RunError, match="rewards differ and the gradient is zero"):
        fit(stuck)


def test_a_reference_that_is_another_stops_the_run() -> None:
    figures = {"off": 0.0, "kl": 1e-3, "equal_groups": 0.0}
    with pytest.raises(RunError, match="divergence from the reference"):
        guard.drawn_right(state.Progress(), figures, 1.0)
    guard.drawn_right(state.Progress(step=1), figures, 1.0)


def test_a_reward_that_fails_names_row_and_function(tmp_path: Path) -> None:
    for function, said in (
        (lambda gold, answer: answer[10**6], "IndexError"),
        (lambda gold, answer: math.nan, "gives nan"),
        (lambda gold, answer: eval("["), "SyntaxError"),
        (lambda gold, answer: sys.exit(0), "SystemExit"),  # as code that the model wrote may say
    ):
        made = job(tmp_path / said[:4], prompts(2), function, **{"train.max_steps": 1})
        with pytest.raises(RunError, match=rf"reward own.py:own: row random:\d: {said}"):
            fit(made)


def test_held_out_prompts_are_answered_and_rewarded(tmp_path: Path) -> None:
    made = job(tmp_path, prompts(8), held_out=prompts(3, 9), **{"train.max_steps": 4})
    fit(made)
    (seen,) = events(made, "eval")[-1:]
    assert (
        seen["loss"] == -seen["reward"] and seen["reward_interval"][0] <= seen["reward"] <= seen["reward_interval"][1]
    )
    assert made.state.progress.best_loss == min(event["loss"] for event in events(made, "eval"))


def test_rewards_add_up_by_weight(tmp_path: Path) -> None:
    made = job(tmp_path, prompts(2))
    assert isinstance(made.criterion, OfGroups)
    two = [rewarding(lambda gold, answer: 1.0, 0.25), rewarding(lambda gold, answer: len(gold), 2.0)]
    criterion = replace(made.criterion, rewards=two)
    group = criterion.begin(made.step, made.train, 0, partial(micro_batches, made))[0]
    assert group.rewards == (4.25,) * 4  # type: ignore[union-attr]


def test_an_answer_is_rewarded_from_the_end_of_its_reasoning_on(tmp_path: Path) -> None:
    """Where its right answer has some, as `strop eval` judges it."""
    seen: list[str] = []
    made = job(tmp_path, prompts(2), lambda gold, answer: seen.append(answer) or 1.0)
    assert isinstance(made.criterion, OfGroups)
    plain = made.train[0]
    thinks = replace(plain, closes=("</think>",))
    for prompt, text in ((plain, "so</think>\n\nyo"), (thinks, "so</think>\n\nyo"), (thinks, "so")):
        made.criterion._worth(prompt, text)  # type: ignore[arg-type]
    assert seen == ["so</think>\n\nyo", "yo", "so"]


# --- whole runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answered", [True, False])
def test_a_run_from_the_command_line(
    tiny_folder: Path, tmp_path: Path, answered: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write_prompts(tmp_path / "rows.jsonl", 16, answered), tmp_path / "run"
    words = ["train", "--model", tiny_folder, "--data", rows, "--eval", "25%", "--out", out, "--json", *GROUPS]
    code, said, err = run(*words, "--train.rewards", write_reward(tmp_path / "own.py"), capsys=capsys)
    assert code == 0, err
    found = json.loads(said)["objective"]
    assert found["name"] == "grpo" and found["options"]["group"] == 4 and found["options"]["beta"] == 0.04
    assert {"reward", "kl", "off", "clip_share", "stop_rate", "answer_length"} <= set(found["last"])
    assert 0 <= found["held_out"]["reward"] <= 1 and f"{16 if answered else 0}" and "prompts" in err
    assert (out / "report.html").is_file() and "reward" in (out / "report.html").read_text()
    code, said, err = run("merge", out, "--out", tmp_path / "merged", "--json", capsys=capsys)
    assert (code == 0 and json.loads(said)["parity"]["passed"]) if answered else (code == 2 and "give --data" in err)


def test_an_unknown_family_is_answered_by_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.support.families import tokenizer

    folder, rows = tmp_path / "model", write_prompts(tmp_path / "rows.jsonl", 8)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}  # and dropout of its own
    sizes |= {"vocab_size": len(tokenizer("chatml")), "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    tokenizer("chatml").save_pretrained(folder)
    out = tmp_path / "run"
    words = ["train", "--model", folder, "--data", rows, "--out", out, *GROUPS, "--train.max_steps", "3"]
    code, _, err = run(*words, "--train.rewards", write_reward(tmp_path / "own.py"), capsys=capsys)
    assert code == 0, err
    steps = [event for event in read_events(out / "events.jsonl") if event["event"] == "step"]
    assert len(steps) == 3 and all(event["off"] < 1e-4 for event in steps) and "transformers' generate" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--train.rewards"),
        (["--train.rewards", "exct"], "did you mean exact"),
        (["--train.rewards", "exact=much"], "exact_json=1"),
        (["--train.rewards", "choice"], "choice"),
        (["--train.rewards", "nowhere.py:own"], "no such file"),
        (["--train.rewards", "exact_json"], "not a JSON object"),
        (["--train.rewards", "exact", "--lora.dropout", "0.1"], "lora.dropout"),
        (["--train.rewards", "exact", "--data.overlong", "truncate-start"], "data.overlong"),
        (["--train.rewards", "exact", "--train.gamma", "1"], "--train.gamma"),
        (["--train.rewards", "exact", "--data.max_length", "4"], "longer than data.max_length"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_loads(
    tiny_folder: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_prompts(tmp_path / "rows.jsonl", 4)
    words = ["train", "--model", tiny_folder, "--data", rows, "--out", tmp_path / "run", *GROUPS]
    code, _, err = run(*words, *options, capsys=capsys)
    assert code == 2 and said in err and not (tmp_path / "run" / "lock.json").exists()


def test_metrics_need_right_answers(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_prompts(tmp_path / "rows.jsonl", 4, answered=False)
    words = ["train", "--model", tiny_folder, "--data", rows, "--out", tmp_path / "run", *GROUPS]
    code, _, err = run(*words, "--train.rewards", "exact", capsys=capsys)
    assert code == 2 and "rows.jsonl:1" in err and "file.py:function" in err
    code, _, err = run(*words[: -len(GROUPS)], *QUICK, capsys=capsys)
    assert code == 2 and "--train.objective grpo" in err


def test_a_changed_reward_function_is_no_resume(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write_prompts(tmp_path / "rows.jsonl", 8), tmp_path / "run"
    words = ["--data", rows, "--out", out, *GROUPS, "--train.max_steps", "2"]
    own = write_reward(tmp_path / "own.py")
    assert run("train", "--model", tiny_folder, *words, "--train.rewards", own, capsys=capsys)[0] == 0
    for name in ("report.json", "report.html"):
        (out / name).unlink()
    write_reward(tmp_path / "own.py", "return len(answer)")
    code, _, err = run("resume", out, capsys=capsys)
    assert code == 2 and "--allow-changed rewards" in err
    assert run("resume", out, "--allow-changed", "rewards", capsys=capsys)[0] == 0
