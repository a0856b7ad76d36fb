"""Preference objectives in the training loop; "on record, N" refers to the list in docs/measured.md."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from strop.data.formats import ConversationReader
from strop.data.reading.sources import read_rows
from strop.data.types import ExampleGroup
from strop.engine.decode.model import load
from strop.engine.step import step_for
from strop.errors import CheckpointError, RunError, Stopped
from strop.models.lora import find_score_head
from strop.objectives.preferences import PreferenceLoss
from strop.objectives.table import OBJECTIVES
from strop.runs.events import read_events
from strop.training import guard, loop, state
from strop.training.criteria import PreferenceCriterion, answer_logprobs
from strop.training.gradients import micro_batches
from strop.training.loop import fit
from strop.training.reference import check_reference, with_reference
from strop.training.state import Job, batch_stream
from tests.support import preferences, tiny
from tests.support.families import ANSWER, tokenizer
from tests.support.preferences import KEY, add_reference, make_job, pairs, units_for
from tests.support.runs import QUICK, run
from tests.support.steps import changed_step
from tests.support.tiny import move_from_reference

COMPARED = [
    name for name, one in OBJECTIVES.items() if isinstance(one, PreferenceLoss)
]  # others: test_rollouts.py, test_classification.py


def values(job: Job) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in job.state.weights.items()}


def losses(job: Job) -> list[float]:
    return [event["loss"] for event in read_events(job.folder.events) if event["event"] == "step"]


def gradients(job: Job) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of the first step."""
    result: dict[str, torch.Tensor] = {}
    job = replace(job, recipe=job.recipe)
    rows = batch_stream(job.recipe, len(job.train)).rows(0)
    loss = loop.compute_gradients(job, [job.train[row] for row in rows]).loss
    result = {name: weight.grad.clone() for name, weight in job.state.weights.items() if weight.grad is not None}
    job.state.optimizer.zero_grad()
    return float(loss), result


# --- the same gradient, however it is computed -------------------------------------------------------------------


@pytest.mark.parametrize("objective", COMPARED)
@pytest.mark.parametrize(
    ("cut", "plain"),
    [
        ({"train.micro_batch": 1}, False),
        ({"train.micro_batch": 3}, False),
        ({"train.micro_batch": None, "train.micro_batch_tokens": 50}, False),
        ({"train.micro_batch": 2}, True),
        ({"train.micro_batch": None, "train.micro_batch_tokens": 60}, True),
        ({"train.gradient_checkpointing": "on"}, False),
    ],
)
def test_same_loss_and_gradients_for_any_micro_batch_and_step(
    tmp_path: Path, objective: str, cut: dict[str, Any], plain: bool
) -> None:
    """on record, 10: a loss whose scale changes with accumulation, padding or packing."""
    train, options = units_for(objective, 8), {"train.objective": objective}
    whole = move_from_reference(add_reference(make_job(tmp_path / "whole", train, **options)))
    pieces = make_job(tmp_path / "pieces", train, plain=plain, **{**options, **cut})
    if cut.get("train.gradient_checkpointing"):
        pieces.step.checkpoint()
    pieces = move_from_reference(add_reference(pieces))
    expected, result = gradients(whole), gradients(pieces)
    parts = micro_batches(pieces, pieces.train)
    assert sorted(i for part in parts for i in part) == list(range(8)) and (len(parts) > 1) == ("micro" in str(cut))
    assert result[0] == pytest.approx(expected[0], rel=1e-6)
    assert max(grad.abs().max() for grad in expected[1].values()) > 1e-5
    for name, grad in expected[1].items():
        assert (grad - result[1][name]).norm() <= 1e-4 * grad.norm() + 1e-8, name


def test_prefix_sharing_does_not_change_gradients(tmp_path: Path) -> None:
    train = pairs(8, alike=True)
    shared = move_from_reference(add_reference(make_job(tmp_path / "a", train, **{"train.objective": "dpo"})))
    apart = make_job(tmp_path / "b", train, **{"train.objective": "dpo"})
    fast = apart.step.log_probs.__self__  # type: ignore[attr-defined]
    fast.prefix_sharing = False
    apart = move_from_reference(add_reference(apart))
    (loss, grads), (other, others) = gradients(shared), gradients(apart)
    assert loss == pytest.approx(other, rel=1e-6)
    for name, grad in grads.items():
        assert (grad - others[name]).norm() <= 1e-4 * grad.norm() + 1e-8


def test_dropout_is_the_same_for_any_micro_batch_and_off_in_the_reference(tmp_path: Path) -> None:
    """on record, 6: dropout in the pass of the reference."""
    train, options = pairs(8), {"train.objective": "dpo", "lora.dropout": 0.3}
    one = add_reference(make_job(tmp_path / "a", train, **options))
    two = add_reference(make_job(tmp_path / "b", train, **{**options, "train.micro_batch": 2}))
    without = add_reference(make_job(tmp_path / "c", train, **{**options, "lora.dropout": 0.0}))
    assert one.train[0].reference_logprobs == pytest.approx(without.train[0].reference_logprobs)  # type: ignore[union-attr]
    for job in (one, two):
        job.step.masks.begin(0, 0)
    (loss, grads), (other, others) = gradients(one), gradients(two)
    assert loss == pytest.approx(other, rel=1e-6) and abs(loss - math.log(2)) > 1e-6  # active in the policy
    for name, grad in grads.items():
        assert (grad - others[name]).norm() <= 1e-4 * grad.norm() + 1e-8


# --- the reference -----------------------------------------------------------------------------------------------


def start_check(job: Job) -> dict[str, Any]:
    return next(event for event in read_events(job.folder.events) if event["event"] == "reference-check")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora.use_dora": True},
        {"lora.bias": "lora_only"},
        {"lora.dropout": 0.2},
        {"lora.new_tokens": ["<|new|>"]},
        {"lora.init": "gaussian"},
    ],
)
def test_policy_equals_reference_before_the_first_step(tmp_path: Path, options: dict[str, Any]) -> None:
    """on record, 5 and 7: the reference is the model that training starts from, whatever is trained."""
    job = add_reference(make_job(tmp_path, pairs(6), **{"train.objective": "dpo", **options}))
    seen = start_check(job)
    assert abs(seen["loss"] - math.log(2)) < 1e-6 and seen["off"] == 0


def test_reference_does_not_change_during_training(tmp_path: Path) -> None:
    """on record, 4: training does not change it; recomputed at the end, it is the same."""
    job = add_reference(make_job(tmp_path, pairs(24), pairs(4, 9), **{"train.objective": "dpo", "train.max_steps": 12}))
    before = [unit.reference_logprobs for unit in job.train]  # type: ignore[union-attr]
    fit(job)
    assert [unit.reference_logprobs for unit in job.train] == before  # type: ignore[union-attr]
    check_reference(job, KEY)
    assert losses(job)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(job)[-1] < losses(job)[0] - 0.01
    now = answer_logprobs(job.step, list(job.train))  # type: ignore[arg-type]
    moved = torch.stack(now, 1).detach() - torch.tensor(before)
    assert moved.abs().max() > 1e-3


def test_changed_reference_raises_run_error(tmp_path: Path) -> None:
    job = add_reference(make_job(tmp_path, pairs(6), **{"train.objective": "dpo"}))
    units = [
        replace(unit, reference_logprobs=(unit.reference_logprobs[0] - 0.1, unit.reference_logprobs[1]))  # type: ignore[union-attr, arg-type]
        for unit in job.train
    ]
    with pytest.raises(RunError, match="reference of the first rows"):
        check_reference(replace(job, train=units), KEY)


def test_reference_includes_the_start_adapter(tmp_path: Path) -> None:
    """tiny.job starts with nonzero B, so the reference differs from the base."""
    job = add_reference(make_job(tmp_path, pairs(6), **{"train.objective": "dpo"}))
    with job.model.disable_adapter(), torch.no_grad():  # type: ignore[operator]
        bare = torch.stack(answer_logprobs(step_for(job.model), list(job.train)), 1)  # type: ignore[arg-type]
    stored = torch.tensor([unit.reference_logprobs for unit in job.train])  # type: ignore[union-attr]
    assert (bare - stored).abs().max() > 1e-3


@pytest.mark.parametrize("key", ["base", "stored", "template", "rows"])
def test_reference_is_recomputed_for_another_key(tmp_path: Path, key: str) -> None:
    """on record, 8: it is recomputed for another base, quantization or template, or other rows."""
    options = {"train.objective": "dpo"}
    with_reference(make_job(tmp_path, pairs(6), **options), {**KEY, key: "a"})
    again = with_reference(make_job(tmp_path, pairs(6, seed=5), **options), {**KEY, key: "b"})
    events = [event for event in read_events(again.folder.events) if event["event"] == "reference"]
    assert [event["rows"] for event in events] == [6, 6]
    same = with_reference(make_job(tmp_path, pairs(6, seed=5), **options), {**KEY, key: "b"})
    assert len([e for e in read_events(same.folder.events) if e["event"] == "reference"]) == 2


@pytest.mark.parametrize("objective", ["dpo", "kto", "simpo"])
@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_resumed_at_any_step_is_bit_identical(tmp_path: Path, objective: str, stop_after: int) -> None:
    options = {"train.objective": objective, "train.max_steps": 8, "lora.dropout": 0.1, "train.micro_batch": 3}
    train = units_for(objective, 20)
    unbroken = add_reference(make_job(tmp_path / "unbroken", train, **options))
    fit(unbroken)
    first = add_reference(make_job(tmp_path / "broken", train, **options))
    numbers = iter(range(1, 100))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "stop_signals", _after(stop_after, numbers))
        fit(first)
    second = make_job(tmp_path / "broken", train, **options)
    torch.manual_seed(12345)
    state.restore_checkpoint(state.newest_checkpoint(second.folder, pytest.fail), second.state)
    second = add_reference(second)
    assert second.state.progress.step == stop_after
    fit(second)
    expected = values(unbroken)
    assert all(torch.equal(weight, expected[name]) for name, weight in values(second).items())
    assert losses(second) == losses(unbroken)


def _after(number: int, numbers: Any) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def signals() -> Any:
        yield lambda: next(numbers) >= number

    return signals


def test_resume_without_start_weights_raises_checkpoint_error(tmp_path: Path) -> None:
    options = {"train.objective": "dpo", "train.max_steps": 3}
    job = add_reference(make_job(tmp_path, pairs(6), **options))
    fit(job)
    job.folder.reference.write_bytes(b"cut")
    again = make_job(tmp_path, pairs(6), **options)
    state.restore_checkpoint(state.newest_checkpoint(again.folder, pytest.fail), again.state)
    with pytest.raises(CheckpointError, match="started from"):
        add_reference(again)


@pytest.mark.parametrize("objective", COMPARED)
def test_non_finite_evaluation_is_logged_and_never_the_best(tmp_path: Path, objective: str) -> None:
    options = {"train.objective": objective, "train.max_steps": 4, "train.eval_steps": 2}
    job = add_reference(make_job(tmp_path, units_for(objective, 12), units_for(objective, 6), **options))

    def spoiled(function: Any) -> Any:
        return lambda rows: function(rows) * (1.0 if torch.is_grad_enabled() else math.nan)

    step = changed_step(
        job.step, log_probs=spoiled(job.step.log_probs), last_hidden=spoiled(job.step.last_hidden)
    )  # the reference is already computed
    fit(replace(job, step=step))
    result = [event for event in read_events(job.folder.events) if event["event"] == "eval"]
    assert [(event["loss"], event["best"]) for event in result] == [(None, False)] * 2
    assert job.state.progress.step == 4 and job.state.progress.best_step is None


# --- the guard ---------------------------------------------------------------------------------------------------


def test_first_step_without_gradient_or_update_stops_the_run(tmp_path: Path) -> None:
    """on record, 9: the loss does not show it."""
    job = add_reference(make_job(tmp_path / "a", pairs(8), **{"train.objective": "dpo", "train.max_steps": 2}))
    stuck = replace(job, step=changed_step(job.step, log_probs=lambda rows: job.step.log_probs(rows) * 0.0))
    with pytest.raises(RunError, match="gradient of the first step is zero"):
        fit(stuck)
    job = add_reference(make_job(tmp_path / "b", pairs(8), **{"train.objective": "simpo", "train.max_steps": 2}))
    job.state.optimizer.step = lambda: None  # type: ignore[method-assign, assignment]
    with pytest.raises(RunError, match="did not change any weight"):
        fit(job)


def test_falling_chosen_answers_are_noted_once() -> None:
    """on record, 16: both rewards fall while the margin grows."""
    progress = state.Progress()
    assert guard.likelihood_drop_warning(progress, {"chosen_change": -0.5, "margin": 3.0}) is None
    text = guard.likelihood_drop_warning(progress, {"chosen_change": -1.2, "margin": 3.0})
    assert text is not None and "1.2 nats per token less likely" in text and "--train.sft_weight" in text
    assert guard.likelihood_drop_warning(progress, {"chosen_change": -1.5}) is None


def test_figures_report_both_sides(tmp_path: Path) -> None:
    job = add_reference(make_job(tmp_path, pairs(16), pairs(5, 3), **{"train.objective": "dpo", "train.max_steps": 4}))
    fit(job)
    step = [event for event in read_events(job.folder.events) if event["event"] == "step"][-1]
    assert step["margin"] == pytest.approx(step["chosen_reward"] - step["rejected_reward"])
    assert {"accuracy", "chosen_nats", "rejected_nats", "chosen_change", "rejected_change"} <= set(step)
    seen = [event for event in read_events(job.folder.events) if event["event"] == "eval"][-1]
    low, high = seen["accuracy_interval"]
    assert 0 <= low <= seen["accuracy"] <= high <= 1
    assert seen["margin_interval"][0] <= seen["margin"] <= seen["margin_interval"][1]


# --- KTO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("desirable", [True, False])
def test_accuracy_of_kto_begins_at_zero(tmp_path: Path, desirable: bool) -> None:
    units = [replace(unit, desirable=desirable) for unit in preferences.labelled(16)]
    job = add_reference(make_job(tmp_path, units, **{"train.objective": "kto", "train.max_steps": 4}))
    fit(job)
    steps = [event for event in read_events(job.folder.events) if event["event"] == "step"]
    assert steps[0]["accuracy"] == 0 < steps[-1]["accuracy"]


def test_sorted_labels_are_shuffled_and_every_batch_has_a_divergence(tmp_path: Path) -> None:
    """on record, 11: rows sorted by label; a batch of one row has a divergence too."""
    units = [replace(unit, desirable=n < 16) for n, unit in enumerate(preferences.labelled(32))]
    stream = batch_stream(tiny.recipe(**{"train.epochs": 1}).recipe, 32)
    shares = [sum(units[row].desirable for row in batch.rows) / len(batch.rows) for batch in stream]
    assert all(0 < share < 1 for share in shares)
    options = {"train.objective": "kto", "train.batch_size": 1, "train.micro_batch": 1}
    job = move_from_reference(add_reference(make_job(tmp_path, units, **options)))
    assert isinstance(job.criterion, PreferenceCriterion)
    whole = [[row] for row in range(32)]
    changes = [job.criterion.batch_statistic(job.step, [unit], lambda items: [[0]]) for unit in job.train]
    assert job.criterion.batch_statistic(job.step, list(job.train), lambda items: whole[: len(items)]) > 0
    assert max(changes) > 0


# --- whole runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", COMPARED)
def test_dpo_run_from_the_command_line(
    tiny_folder: Path, tmp_path: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write = preferences.write_labelled if objective == "kto" else preferences.write_pairs
    rows, out = write(tmp_path / "rows.jsonl", 40), tmp_path / "run"
    words = ["train", "--model", tiny_folder, "--data", rows, "--eval", "25%", "--out", out, "--json", *QUICK]
    code, stdout, err = run(*words, "--train.objective", objective, capsys=capsys)
    assert code == 0, err
    result = json.loads(stdout)["objective"]
    assert result["name"] == objective and result["options"] == OBJECTIVES[objective].options
    assert result["held_out"]["accuracy_interval"][1] <= 1 and result["last"]["accuracy"] >= 0
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 6 and report["data_report"]["answers"]
    if objective != "reward":
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), str(out / "adapter"))
    assert (out / "reference.safetensors").is_file() == OBJECTIVES[objective].reference


def test_a_reward_model_scores_the_same_in_plain_transformers(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = preferences.write_pairs(tmp_path / "rows.jsonl", 24), tmp_path / "run"
    words = ["train", "--model", tiny_folder, "--data", rows, "--out", out, *QUICK, "--train.objective", "reward"]
    assert run(*words, capsys=capsys)[0] == 0
    base = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    plain = peft.PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    ours = load(out, dtype="fp32", scores=True)
    criterion = PreferenceCriterion(OBJECTIVES["reward"], tiny.recipe().recipe.train, find_score_head(ours.module))
    built = pairs(3)
    with torch.no_grad():
        result = torch.stack(criterion.sums(step_for(ours.module), built), 1)
        for unit, scores in zip(built, result, strict=True):
            for example, score in zip(unit.examples, scores, strict=True):
                expected = plain(torch.from_numpy(example.ids.astype("int64"))[None]).logits
                assert float(score) == pytest.approx(float(expected), abs=1e-5)
    turns = tiny.write_rows(tmp_path / "turns.jsonl", 3)
    for command in (
        ["chat", out],
        ["serve", out],
        ["merge", out, "--out", tmp_path / "merged"],
        ["export", "gguf", out, "--out", tmp_path / "m.gguf"],
        ["export", "ollama", out, "--out", tmp_path / "ollama"],
        ["eval", out, "--data", turns],
    ):
        code, _, err = run(*command, capsys=capsys)
        assert code == 2 and "reward model" in err, command
    words = ["train", "--model", tiny_folder, "--data", rows, "--out", tmp_path / "more", *QUICK]
    code, _, err = run(*words, "--train.objective", "dpo", "--adapter", out, capsys=capsys)
    assert code == 2 and "reward model" in err
    again = run(*words, "--train.objective", "reward", "--adapter", out, capsys=capsys)
    assert again[0] == 0, again[2]
    held_out = preferences.write_pairs(tmp_path / "held_out.jsonl", 7)
    code, stdout, err = run("eval", out, "--data", held_out, "--json", capsys=capsys)
    card, score = (out / "adapter" / "README.md").read_text(), json.loads(stdout)["tuned"]["preference"]
    assert code == 0 and f"7 rows: preference {score:.1%}" in card and "was not evaluated" not in card, card


# writes the end of an answer only if another turn follows
LATER = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% if not loop.last or m.role == 'user' %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize(
    ("family", "template"), [("chatml", None), ("llama3", None), ("mistral", None), ("phi", None), ("chatml", LATER)]
)
def test_model_card_snippet_of_a_reward_model_gives_the_trained_scores(
    family: str, template: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The snippet is executed, with a tokenizer that pads with the end-of-answer token, like SmolLM2's."""
    folder, words = tmp_path / "model", copy.deepcopy(tokenizer(family))
    words.pad_token = ANSWER[family][1]
    tiny.model(vocab_size=len(words), pad_token_id=words.pad_token_id).save_pretrained(folder)
    words.chat_template = template or words.chat_template
    words.save_pretrained(folder)
    rows, out = preferences.write_pairs(tmp_path / "rows.jsonl", 24), tmp_path / "run"
    command = ["train", "--model", folder, "--data", rows, "--out", out, *QUICK, "--train.objective", "reward"]
    code, _, err = run(*command, "--train.learning_rate", "0.01", capsys=capsys)
    assert code == 0, err
    card = (out / "adapter" / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.+?)```", card, re.DOTALL)
    snippet = snippet.replace('"BASE"', repr(str(folder))).replace("THIS_FOLDER", str(out / "adapter"))
    ours = load(out, dtype="fp32", scores=True)
    criterion = PreferenceCriterion(OBJECTIVES["reward"], tiny.recipe().recipe.train, find_score_head(ours.module))
    for built in ConversationReader(read_rows(str(rows), errors=[]), errors=[]):
        sides = [ours.renderer.render(side)[0] for side in built.sides]
        with torch.no_grad():
            expected = [float(one) for one in criterion.sums(step_for(ours.module), [ExampleGroup(tuple(sides))])]
        result: list[torch.Tensor] = []
        for side in built.sides:
            messages = [{"role": message.role, "content": message.content} for message in side.messages]
            exec(snippet, {"messages": messages, "print": result.append})
        assert [float(logits) for logits in result] == pytest.approx(expected, abs=1e-4)
        if built.line == 3:
            break


def test_run_on_pairs_merges_with_parity_on_chosen_answers(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = preferences.write_pairs(tmp_path / "rows.jsonl", 24), tmp_path / "run"
    words = ["train", "--model", tiny_folder, "--data", rows, "--out", out, *QUICK, "--train.objective", "dpo"]
    assert run(*words, capsys=capsys)[0] == 0
    code, stdout, err = run("merge", out, "--out", tmp_path / "merged", "--json", capsys=capsys)
    assert code == 0 and json.loads(stdout)["parity"]["passed"], err


def test_kto_trains_on_pairs(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = preferences.write_pairs(tmp_path / "rows.jsonl", 12)
    words = ["train", "--model", tiny_folder, "--data", rows, "--out", tmp_path / "run", "--json", *QUICK]
    code, stdout, err = run(*words, "--train.objective", "kto", capsys=capsys)
    assert code == 0, err
    assert {"desirable_reward", "undesirable_reward", "kl"} <= set(json.loads(stdout)["objective"]["last"])


def test_dpo_on_a_quantized_base_has_a_quantized_reference(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """on record, 8."""
    rows = preferences.write_pairs(tmp_path / "rows.jsonl", 12)
    for name, init in (("plain", "default"), ("loftq", "loftq")):
        out = tmp_path / name
        words = ["train", "--model", tiny_folder, "--data", rows, "--out", out, *QUICK, "--lora.init", init]
        code, _, err = run(*words, "--train.objective", "dpo", "--model.quantization", "nf4", capsys=capsys)
        assert code == 0, err
        first = next(event for event in read_events(out / "events.jsonl") if event["event"] == "step")
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_resume_from_the_command_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = preferences.write_pairs(tmp_path / "rows.jsonl", 24)
    words = ["--model", tiny_folder, "--data", rows, *QUICK, "--train.objective", "dpo", "--train.save_steps", "2"]
    assert run("train", *words, "--out", tmp_path / "whole", capsys=capsys)[0] == 0
    assert run("train", *words, "--out", tmp_path / "cut", capsys=capsys)[0] == 0
    cut = tmp_path / "cut"
    for name in ("report.json", "report.html"):
        (cut / name).unlink()
    checkpoints = sorted((cut / "checkpoints").iterdir())
    for checkpoint in checkpoints[1:]:
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    assert run("resume", cut, capsys=capsys)[0] == 0
    names = [folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "whole", cut)]
    whole, again = (load_file(name) for name in names)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.objective", "dpo", "--train.gamma", "1"], "--train.gamma"),
        (["--train.beta", "0.1"], "--train.beta"),
        (["--train.objective", "dpo", "--train.beta", "0"], "beta"),
        (
            ["--train.objective", "kto", "--train.desirable_weight", "0", "--train.undesirable_weight", "0"],
            "train.desirable_weight is 0 too",
        ),
        (["--train.objective", "dpo", "--train.label_smoothing", "0.5"], "label_smoothing"),
        (["--train.objective", "dpq"], "objective"),
        (["--train.objective", "dpo", "--data.overlong", "split"], "data.overlong"),
        (["--train.objective", "dpo", "--data.loss", "all"], "data.loss"),
        ([], "objective dpo"),
    ],
)
def test_invalid_policy_options_are_refused_before_loading(
    tiny_folder: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = preferences.write_pairs(tmp_path / "rows.jsonl", 8)
    words = ["train", "--model", tiny_folder, "--data", rows, "--out", tmp_path / "run", *QUICK]
    code, _, err = run(*words, *options, capsys=capsys)
    assert code == 2 and message in err and not (tmp_path / "run" / "lock.json").exists()
