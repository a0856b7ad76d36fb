"""Policy objectives in the training loop: sampling, rewards, gradients, checks and notes."""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.data.types import RolloutGroup
from strop.errors import RunError, Stopped
from strop.objectives.policy import GRPO
from strop.runs.events import read_events
from strop.training import guard, loop, state
from strop.training import rollouts as drawing
from strop.training.gradients import micro_batches
from strop.training.loop import fit
from strop.training.rollouts import PolicyCriterion
from strop.training.state import Job, batch_stream
from tests import ROOT
from tests.support.groups import make_job, make_reward, prompts, write_prompts, write_reward
from tests.support.runs import QUICK, run
from tests.support.steps import changed_step
from tests.support.tiny import move_from_reference

GROUPS = [
    *QUICK, "--train.objective", "grpo", "--train.group", "4", "--train.answer_tokens", "8", "--train.learning_rate",
    "0.01",
]  # fmt: skip


def sample_groups(job: Job, index: int = 0) -> list[RolloutGroup]:
    rows = [job.train[row] for row in batch_stream(job.recipe, len(job.train)).rows(index)]
    return job.criterion.prepare(job.step, rows, index, partial(micro_batches, job))  # type: ignore[return-value]


def gradients(job: Job, items: list[RolloutGroup]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = loop.compute_gradients(job, items).loss
    result = {name: weight.grad.clone() for name, weight in job.state.weights.items() if weight.grad is not None}
    job.state.optimizer.zero_grad()
    return float(loss), result


def events(job: Job, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(job.folder.events) if event["event"] == kind]


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
    """On record, 10: a scale that changes with accumulation. A row is a whole group."""
    rows, options = prompts(4), {"train.group_loss": group_loss}
    whole = make_job(tmp_path / "whole", rows, **options)
    items = sample_groups(whole)
    pieces = make_job(tmp_path / "pieces", rows, plain=plain, **{**options, **cut})
    if cut.get("train.gradient_checkpointing"):
        pieces.step.checkpoint()
    expected, result = gradients(move_from_reference(whole), items), gradients(move_from_reference(pieces), items)
    assert abs(expected[0]) > 1e-6 and result[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-8)
    for name, grad in expected[1].items():
        assert grad.norm() > 0 and (grad - result[1][name]).norm() <= 1e-4 * grad.norm() + 1e-8, name


def test_equal_completions_are_stored_once_and_weighted_by_count(tmp_path: Path) -> None:
    job = make_job(tmp_path, prompts(4), lambda gold, answer: float(len(answer) % 3))
    assert isinstance(job.criterion, PolicyCriterion)
    group = max(sample_groups(job), key=lambda group: max(group.advantages))
    once = RolloutGroup(
        group.examples[:1],
        advantages=(0.5,),
        stopped=(True,),
        rewards=(1.0, 1.0),
        sampling_logprobs=group.sampling_logprobs[:3],
    )
    example = replace(once.examples[0], ids=once.examples[0].ids[: once.examples[0].prompt_length + 3])

    def counted(times: int) -> RolloutGroup:
        weights = example.weights[: len(example.ids)].copy()
        weights[example.prompt_length :] = times
        return replace(once, examples=(replace(example, weights=weights),))

    twice = replace(counted(1), examples=counted(1).examples * 2, advantages=(0.5, 0.5), stopped=(True, True))
    twice = replace(twice, sampling_logprobs=torch.from_numpy(once.sampling_logprobs).repeat(2).numpy())
    for options in ("dapo", "grpo", "dr_grpo"):
        criterion = replace(job.criterion, options=job.criterion.options.model_copy(update={"group_loss": options}))
        values = [
            float(criterion.loss(job.step, [one], 0.0)[0].detach()) / criterion.divisor([one])
            for one in (counted(2), twice)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-6) and values[0] != 0


def test_equal_completions_with_other_rewards_keep_their_own_advantages(tmp_path: Path) -> None:
    """After the first update the clipped objective is not linear in the advantage, so a mean would be wrong."""
    options = {"train.answer_tokens": 1, "train.group": 16, "train.updates": 2, "train.clip_low": 0.01}
    job = make_job(tmp_path, prompts(4), **options)
    criterion: Any = job.criterion
    rewards = [make_reward(lambda completions, rows: [float(n % 3) for n in range(len(completions))], form="batch")]
    job = replace(job, criterion=replace(criterion, rewards=rewards))
    groups = sample_groups(job)
    ids = [[example.ids.tobytes() for example in group.examples] for group in groups]
    assert any(len(one) > len(set(one)) for one in ids)
    assert [sum(group.counts) for group in groups] == [16] * 4
    apart = []
    for group in groups:
        numbers = [n for n, count in enumerate(group.counts) for _ in range(count)]
        given = [advantage for n, advantage in enumerate(group.advantages) for _ in range(group.counts[n])]
        assert given == pytest.approx(GRPO.advantages(group.rewards, criterion.options))
        singles = [replace(one, weights=(one.weights > 0).astype(one.weights.dtype)) for one in group.examples]
        apart.append(
            replace(
                group,
                examples=tuple(singles[n] for n in numbers), advantages=tuple(given), stopped=(True,) * 16,
                sampling_logprobs=group.sampling_logprobs[numbers],
                reference_token_logprobs=group.reference_token_logprobs[numbers],
            )
        )  # fmt: skip
    for weight in job.state.weights.values():  # an update later
        weight.data += 0.05 * torch.randn_like(weight)
    (loss, together), (same, single) = gradients(job, groups), gradients(job, apart)
    assert loss == pytest.approx(same, rel=1e-5) and loss
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, single[name], rtol=1e-4, atol=1e-7)


def test_samples_depend_on_seed_step_row_and_number(tmp_path: Path) -> None:
    job = make_job(tmp_path / "a", prompts(4))
    same, later = sample_groups(job), sample_groups(job, 1)

    def answers(items: list[RolloutGroup]) -> list[bytes]:
        return sorted(example.ids.tobytes() for group in items for example in group.examples)

    assert answers(same) == answers(sample_groups(make_job(tmp_path / "b", prompts(4))))
    assert answers(same) != answers(later) and answers(same) != answers(
        sample_groups(make_job(tmp_path / "c", prompts(4), seed=1))
    )
    assert len(set(answers(same))) > 12  # of 16
    alone = job.criterion.prepare(job.step, [job.train[2]], 0, partial(micro_batches, job))
    assert set(answers(alone)) <= set(answers(same))  # type: ignore[arg-type]


def test_advantages_are_computed_over_all_copies_of_a_group(tmp_path: Path) -> None:
    job = make_job(tmp_path, prompts(4))
    assert isinstance(job.criterion, PolicyCriterion)
    for group in sample_groups(job):
        counts = list(group.counts)
        assert sum(counts) == 4 == len(group.rewards)
        repeated = [a for a, count in zip(group.advantages, counts, strict=True) for _ in range(count)]
        assert repeated == pytest.approx(GRPO.advantages(group.rewards, job.criterion.options))
        assert sum(repeated) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("updates", [1, 3])
def test_rewarded_completions_become_more_likely(tmp_path: Path, updates: int) -> None:
    job = make_job(tmp_path, prompts(4), **{"train.max_steps": 3, "train.updates": updates})
    groups = sample_groups(job)
    examples = [example for group in groups for example in group.examples]
    before = job.step.log_probs(examples).detach()
    fit(job)
    change = job.step.log_probs(examples).detach() - before
    advantage = change.new_tensor([value for group in groups for value in group.advantages])
    counts = change.new_tensor([count for group in groups for count in group.counts])
    assert (change * advantage).sum() > 0.1 and abs((advantage * counts).sum()) < 1e-6
    first = events(job, "step")[0]
    assert first["off"] < 1e-4 and first["answer_length"] <= 6 and 0 <= first["stop_rate"] <= 1
    assert (first["kl"] == 0) == (updates == 1)  # of the last update, after the model has changed
    assert events(job, "step")[-1]["kl"] > 1e-6
    assert len(events(job, "answers")) == 4  # one of them from this test


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumed_at_any_step_is_bit_identical(tmp_path: Path, stop_after: int) -> None:
    options = {"train.max_steps": 5, "train.micro_batch": 3, "train.updates": 2}
    unbroken = make_job(tmp_path / "unbroken", prompts(8), **options)
    fit(unbroken)
    first = make_job(tmp_path / "broken", prompts(8), **options)
    numbers = iter(range(1, 100))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        from tests.training.test_preferences import _after

        patch.setattr(loop, "stop_signals", _after(stop_after, numbers))
        fit(first)
    torch.manual_seed(12345)
    second = make_job(tmp_path / "broken", prompts(8), **options)
    state.restore_checkpoint(state.newest_checkpoint(second.folder, pytest.fail), second.state)
    fit(second)
    assert second.state.progress.step == 5
    for name, weight in second.state.weights.items():
        assert torch.equal(weight, unbroken.state.weights[name]), name
    losses = [[event["loss"] for event in events(job, "step")] for job in (second, unbroken)]
    assert losses[0] == losses[1]


def test_reference_is_the_start_of_training(tmp_path: Path) -> None:
    """On record, 5 and 7: the start adapter is part of the reference."""
    job = move_from_reference(make_job(tmp_path, prompts(4)))
    for group in sample_groups(job):
        now = job.step.token_log_probs(list(group.examples)).detach().double().numpy()
        assert abs(now - group.sampling_logprobs).max() < 1e-4 < abs(now - group.reference_token_logprobs).max()
    with torch.no_grad():
        for name, weight in job.state.weights.items():
            weight.copy_(job.criterion.start[name])  # type: ignore[attr-defined]
    group = sample_groups(job)[0]
    assert abs(group.sampling_logprobs - group.reference_token_logprobs).max() < 1e-4


# --- the guard ---------------------------------------------------------------------------------------------------


def test_completions_of_another_model_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On record, 15: the log-probabilities of the sampling engine and of the step differ."""
    job = make_job(tmp_path, prompts(4), **{"train.max_steps": 2})
    sample_completions = drawing.sample_completions

    def by_another(model: Any, *args: Any, **options: Any) -> Any:
        with state.temporary_values(job.state.weights, {n: w.detach() * 40 for n, w in job.state.weights.items()}):
            return sample_completions(model, *args, **options)

    monkeypatch.setattr(drawing, "sample_completions", by_another)
    with pytest.raises(RunError, match=r"differ by .* nats per token"):
        fit(job)
    assert not events(job, "step")


@pytest.mark.parametrize(("function", "message"), [
    (lambda gold, answer: 0.0, "raise --train.answer_tokens"),
    (lambda gold, answer: 1.0, "length limit"),
])  # fmt: skip
def test_groups_with_equal_rewards_are_counted_and_noted(tmp_path: Path, function: Any, message: str) -> None:
    """On record, 14: all completions cut off, reward 0, deviation 0: nothing is learned."""
    job = make_job(tmp_path, prompts(8), function, **{"train.max_steps": 3, "train.beta": 0, "train.answer_tokens": 1})
    before = {name: weight.detach().clone() for name, weight in job.state.weights.items()}
    fit(job)
    notes = [event["text"] for event in events(job, "note")]
    assert len(notes) == 1 and message in notes[0] and "step 1" in notes[0]
    assert [event["equal_groups"] for event in events(job, "step")] == [1.0] * 3
    assert all(torch.equal(weight, before[name]) for name, weight in job.state.weights.items())


def test_equal_rewards_are_noted_once() -> None:
    progress = state.Progress()
    figures = {"equal_groups": 1.0, "stop_rate": 0.5, "reward": 1.0}
    assert "same reward (mean 1)" in str(guard.equal_rewards_warning(progress, figures))
    assert guard.equal_rewards_warning(progress, figures) is None
    assert guard.equal_rewards_warning(progress, {**figures, "equal_groups": 0.9}) is None


def test_zero_gradient_with_different_rewards_stops_the_run(tmp_path: Path) -> None:
    """On record, 9: rewards differ, and the gradient is zero."""
    job = make_job(tmp_path, prompts(4), **{"train.max_steps": 2})
    whole = job.step.token_log_probs
    stuck = replace(
        job, step=changed_step(job.step, token_log_probs=lambda rows: whole(rows).detach() + whole(rows) * 0)
    )
    with pytest.raises(RunError, match="rewards differ, but the gradient is zero"):
        fit(stuck)


def test_kl_before_the_first_step_stops_the_run() -> None:
    figures = {"off": 0.0, "kl": 1e-3, "equal_groups": 0.0}
    with pytest.raises(RunError, match="KL divergence from the reference"):
        guard.check_rollouts(state.Progress(), figures, 1.0)
    guard.check_rollouts(state.Progress(step=1), figures, 1.0)


def test_failing_reward_names_row_and_function(tmp_path: Path) -> None:
    for function, text in (
        (lambda gold, answer: answer[10**6], "IndexError"),
        (lambda gold, answer: math.nan, "returns nan"),
        (lambda gold, answer: eval("["), "SyntaxError"),
        (lambda gold, answer: sys.exit(0), "SystemExit"),  # code that the model wrote may do this
    ):
        job = make_job(tmp_path / text[:4], prompts(2), function, **{"train.max_steps": 1})
        with pytest.raises(RunError, match=rf"reward own.py:own: row random:\d: {text}"):
            fit(job)


def test_evaluation_rewards_held_out_prompts(tmp_path: Path) -> None:
    job = make_job(tmp_path, prompts(8), held_out=prompts(3, 9), **{"train.max_steps": 4})
    fit(job)
    (seen,) = events(job, "eval")[-1:]
    assert (
        seen["loss"] == -seen["reward"] and seen["reward_interval"][0] <= seen["reward"] <= seen["reward_interval"][1]
    )
    assert job.state.progress.best_loss == min(event["loss"] for event in events(job, "eval"))


def test_rewards_are_summed_by_weight(tmp_path: Path) -> None:
    job = make_job(tmp_path, prompts(2))
    assert isinstance(job.criterion, PolicyCriterion)
    two = [make_reward(lambda gold, answer: 1.0, 0.25), make_reward(lambda gold, answer: len(gold), 2.0)]
    criterion = replace(job.criterion, rewards=two)
    group = criterion.prepare(job.step, job.train, 0, partial(micro_batches, job))[0]
    assert group.rewards == (4.25,) * 4  # type: ignore[union-attr]


def test_parts_of_rewards_are_logged_by_name(tmp_path: Path) -> None:
    def own(answer: str, row: dict[str, Any]) -> dict[str, float]:
        return {"length": len(answer), "line": row["line"]}

    job = make_job(tmp_path, prompts(4), held_out=prompts(2), **{"train.max_steps": 1})
    columns = {("random", line): {"line": line} for line in range(1, 5)}
    rewards = [make_reward(own, 0.5, form="row")]
    assert isinstance(job.criterion, PolicyCriterion)
    job = replace(job, criterion=replace(job.criterion, rewards=rewards, columns=columns))
    fit(job)
    (step,), (seen, *_) = events(job, "step"), events(job, "eval")
    assert step["reward"] == pytest.approx(0.5 * (step["reward/own.length"] + step["reward/own.line"]))
    assert step["reward/own.line"] == 2.5 and step["reward/own.length"] > 0  # all four prompts are in the step
    assert seen["reward"] == pytest.approx(0.5 * (seen["reward/own.length"] + 1.5))


def test_reasoning_is_not_rewarded(tmp_path: Path) -> None:
    """Only where the gold answer has reasoning, as in `strop eval`."""
    seen: list[str] = []
    job = make_job(tmp_path, prompts(2), lambda gold, answer: seen.append(answer) or 1.0)
    assert isinstance(job.criterion, PolicyCriterion)
    plain = job.train[0]
    thinks = replace(plain, reasoning_ends=("</think>",))
    for prompt, text in ((plain, "so</think>\n\nyo"), (thinks, "so</think>\n\nyo"), (thinks, "so")):
        job.criterion._reward([(prompt, text)])  # type: ignore[list-item]
    assert seen == ["so</think>\n\nyo", "yo", "so"]


# --- whole runs --------------------------------------------------------------------------------------------------


def test_reward_gets_the_row_with_its_columns(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"say {n}", "completion": "yes", "level": n, "tags": ["a"]} for n in range(8)]
    data, own, out = tmp_path / "rows.jsonl", tmp_path / "own.py", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own.write_text(
        "import json\n"
        "async def own(completion, row):\n"
        f"    with open({str(tmp_path / 'seen.jsonl')!r}, 'a') as file: file.write(json.dumps(row) + '\\n')\n"
        "    return {'length': len(completion), 'level': row['level']}\n",
        encoding="utf-8",
    )
    words = ["train", "--model", tiny_folder, "--data", data, "--out", out, *GROUPS, "--train.max_steps", "2"]
    code, _, err = run(*words, "--train.rewards", f"{own}:own", capsys=capsys)
    assert code == 0, err
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    for row in seen:
        expected = rows[row["level"]]
        assert row == {**expected, "answer": "yes", "messages": [{"role": "user", "content": expected["prompt"]}]}
    assert len({row["level"] for row in seen}) > 2
    steps = [event for event in read_events(out / "events.jsonl") if event["event"] == "step"]
    assert all({"reward/own.length", "reward/own.level"} <= set(step) for step in steps)
    # a changed column is a changed reward
    for name in ("report.json", "report.html"):
        (out / name).unlink()
    data.write_text("".join(json.dumps({**row, "level": 3}) + "\n" for row in rows), encoding="utf-8")
    code, _, err = run("resume", out, capsys=capsys)
    assert code == 2 and "--allow-changed rewards" in err


def test_a_function_of_all_completions_gets_equal_ones_too(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Completions of one token, of which many are equal; others are rewarded once for each different one."""
    data, own, out, log = (
        write_prompts(tmp_path / "rows.jsonl", 8),
        tmp_path / "own.py",
        tmp_path / "run",
        tmp_path / "log",
    )
    own.write_text(
        "def all_of_them(completions, rows):\n"
        "    different = set(zip(completions, [row['prompt'] for row in rows]))\n"
        f"    with open({str(log)!r}, 'a') as file: print(len(completions), len(different), file=file)\n"
        "    return [float(completions[: i + 1].count(text) > 1) for i, text in enumerate(completions)]\n"
        "def each(completion, row):\n"
        f"    with open({str(log)!r}, 'a') as file: print('each', file=file)\n"
        "    return 0.0\n",
        encoding="utf-8",
    )
    short = {"--train.max_steps": 1, "--train.answer_tokens": 1, "--train.group": 64, "--train.batch_size": 2}
    words = ["train", "--model", tiny_folder, "--data", data, "--out", out, *GROUPS]
    more = [word for pair in short.items() for word in pair]
    code, _, err = run(*words, *more, "--train.rewards", f"{own}:all_of_them,{own}:each", capsys=capsys)
    assert code == 0, err
    *_, (total, distinct) = [map(int, line.split()) for line in log.read_text().splitlines() if line != "each"]
    asked = log.read_text().partition("128 ")[2].count("each")
    assert total == 128 > distinct == asked
    (step,) = [event for event in read_events(out / "events.jsonl") if event["event"] == "step"]
    assert step["reward"] >= (total - distinct) / total  # repeats are rewarded, and count


def test_reward_function_of_the_page_runs(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^  ```python\n(.*?)^  ```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "own.py").write_text(textwrap.dedent(code), encoding="utf-8")
    rows = [{"prompt": f"say {n}", "completion": "yes", "max_length": 2} for n in range(4)]
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["train", "--model", tiny_folder, "--data", data, "--out", out, *GROUPS, "--train.max_steps", "2"]
    code, _, err = run(*words, "--train.rewards", f"{tmp_path / 'own.py'}:short_and_right", capsys=capsys)
    assert code == 0, err
    steps = [event for event in read_events(out / "events.jsonl") if event["event"] == "step"]
    assert all(step["reward/short_and_right.short"] < 0 == step["reward/short_and_right.right"] for step in steps)
    assert "reward/short_and_right.short" in (out / "report.html").read_text()


@pytest.mark.parametrize("answered", [True, False])
def test_grpo_run_from_the_command_line(
    tiny_folder: Path, tmp_path: Path, answered: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write_prompts(tmp_path / "rows.jsonl", 16, answered), tmp_path / "run"
    words = ["train", "--model", tiny_folder, "--data", rows, "--eval", "25%", "--out", out, "--json", *GROUPS]
    code, stdout, err = run(*words, "--train.rewards", write_reward(tmp_path / "own.py"), capsys=capsys)
    assert code == 0, err
    result = json.loads(stdout)["objective"]
    assert result["name"] == "grpo" and result["options"]["group"] == 4 and result["options"]["beta"] == 0.04
    assert {"reward", "kl", "off", "clip_share", "stop_rate", "answer_length"} <= set(result["last"])
    assert 0 <= result["held_out"]["reward"] <= 1 and f"{16 if answered else 0}" and "prompts" in err
    assert (out / "report.html").is_file() and "reward" in (out / "report.html").read_text()
    code, stdout, err = run("merge", out, "--out", tmp_path / "merged", "--json", capsys=capsys)
    assert (code == 0 and json.loads(stdout)["parity"]["passed"]) if answered else (code == 2 and "give --data" in err)


def test_references_longer_than_completions_are_noted(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"say {n}", "completion": "yes" if n % 2 else "z y x w v u t s r q"} for n in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["train", "--model", tiny_folder, "--data", data, "--out", tmp_path / "run", *GROUPS]
    code, _, err = run(*words, "--train.rewards", "exact", "--train.max_steps", "1", capsys=capsys)
    note = "3 of 6 training rows have a reference longer than train.answer_tokens 8"
    assert code == 0 and note in " ".join(err.split()), err


def test_unknown_family_is_sampled_by_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.support.families import tokenizer

    folder, rows = tmp_path / "model", write_prompts(tmp_path / "rows.jsonl", 8)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}  # and its dropout
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
    ("options", "message"),
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
def test_invalid_policy_options_are_refused_before_loading(
    tiny_folder: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_prompts(tmp_path / "rows.jsonl", 4)
    words = ["train", "--model", tiny_folder, "--data", rows, "--out", tmp_path / "run", *GROUPS]
    code, _, err = run(*words, *options, capsys=capsys)
    assert code == 2 and message in err and not (tmp_path / "run" / "lock.json").exists()


def test_metric_rewards_need_gold_answers(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_prompts(tmp_path / "rows.jsonl", 4, answered=False)
    words = ["train", "--model", tiny_folder, "--data", rows, "--out", tmp_path / "run", *GROUPS]
    code, _, err = run(*words, "--train.rewards", "exact", capsys=capsys)
    assert code == 2 and "rows.jsonl:1" in err and "file.py:function" in err
    code, _, err = run(*words[: -len(GROUPS)], *QUICK, capsys=capsys)
    assert code == 2 and "--objective grpo" in err


def test_changed_reward_function_refuses_resume(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write_prompts(tmp_path / "rows.jsonl", 8), tmp_path / "run"
    words = ["--data", rows, "--out", out, *GROUPS, "--train.max_steps", "2", "--train.beta", "0"]
    own = write_reward(tmp_path / "own.py")
    assert run("train", "--model", tiny_folder, *words, "--train.rewards", own, capsys=capsys)[0] == 0
    for name in ("report.json", "report.html"):
        (out / name).unlink()
    write_reward(tmp_path / "own.py", "return len(answer)")
    code, _, err = run("resume", out, capsys=capsys)
    assert code == 2 and "--allow-changed rewards" in err
    lock, changes = (out / "lock.json").read_text(), ["--train.beta", "0.1", "--allow-changed", "rewards"]
    code, _, err = run("resume", out, *changes, capsys=capsys)
    assert code == 2 and "train.beta has changed" in err and "--allow-changed" not in err  # no start weights are stored
    assert (out / "lock.json").read_text() == lock and not (out / "reference.safetensors").exists()
    code, _, err = run("resume", out, "--train.beta", "0", *changes[2:], "--train.clip_low", "0.1", capsys=capsys)
    assert code == 2 and "--allow-changed 'rewards,train.clip_low'" in err  # with what was allowed already
    assert run("resume", out, "--allow-changed", "rewards,lr", capsys=capsys)[0] == 0
