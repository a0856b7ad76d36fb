"""Each objective against TRL's loss: loss and gradients over ten steps, from the same weights and rows.

TRL's losses get batches made of strop's rows, so that templates and truncation do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from strop.config.schema import TrainSection
from strop.data.types import Example, ExampleGroup, RolloutGroup
from strop.engine.step import Step, step_for
from strop.models.lora import find_score_head
from strop.objectives.policy import GRPO, group_advantages
from strop.objectives.table import OBJECTIVES
from strop.runs.events import EventLog
from strop.training.criteria import PreferenceCriterion, answer_logprobs, mismatched_logprobs
from strop.training.rollouts import PolicyCriterion
from tests.support import tiny
from tests.support.families import tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed (pip install trl)")

STEPS, UNITS = 10, 6
GROUP = 3
Loss = Callable[[PeftModel, list[ExampleGroup]], torch.Tensor]


def example(ids: Any, prompt: int) -> Example:
    return Example(ids.astype(np.int32), (np.arange(len(ids)) >= prompt).astype(np.float32), "f", 1)


def units(labels: bool = False) -> list[ExampleGroup]:
    """Make answers and prompts of various lengths; KTO's mismatched answers are those of the previous unit."""
    random = np.random.default_rng(0)
    result = []
    for _ in range(UNITS):
        prompt = random.integers(5, 300, int(random.integers(9, 15)))
        sides = [np.concatenate([prompt, random.integers(5, 300, int(random.integers(3, 9)))]) for _ in range(2)]
        result.append([example(ids, len(prompt)) for ids in sides])
    if not labels:
        return [ExampleGroup((chosen, rejected)) for chosen, rejected in result]
    answers = [side[0] for side in result]
    other = []
    for n, answer in enumerate(answers):
        before = answers[n - 1]
        ids = np.concatenate([answer.ids[: answer.prompt_length], before.ids[before.prompt_length :]])
        other.append(example(ids, answer.prompt_length))
    return [ExampleGroup((a,), (b,), n % 3 != 0) for n, (a, b) in enumerate(zip(answers, other, strict=True))]


def model(scored: bool = False) -> PeftModel:
    from strop.models.lora import add_lora

    base = tiny.model(num_hidden_layers=1)
    torch.manual_seed(0)
    return add_lora(base, tiny.recipe().recipe.lora, tokenizer("chatml"), outputs=int(scored)).train()


def padded(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (ids, attention mask, supervised mask), right-padded."""
    longest = max(map(len, examples))
    ids, attended, mask = (torch.zeros(len(examples), longest, dtype=torch.long) for _ in range(3))
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.from_numpy(example.ids)
        attended[row, : len(example)] = 1
        mask[row, : len(example)] = torch.from_numpy(example.weights).long()
    return ids, attended, mask


def common(folder: Path, kind: Any, **options: Any) -> Any:
    return kind(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=UNITS,
        gradient_checkpointing=False, **options,
    )  # fmt: skip


def rows(**columns: list[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(columns)


def dpo_like(folder: Path, tuned: PeftModel, **options: Any) -> Loss:
    data = rows(prompt=["a"] * UNITS, chosen=["b"] * UNITS, rejected=["c"] * UNITS)
    args = common(folder, trl.DPOConfig, max_length=None, **options)
    trainer = trl.DPOTrainer(model=tuned, args=args, train_dataset=data, processing_class=tokenizer("chatml"))

    def loss(tuned: PeftModel, units: list[ExampleGroup]) -> torch.Tensor:
        ids, attended, mask = padded([unit.examples[side] for side in range(2) for unit in units])
        inputs = {"input_ids": ids, "attention_mask": attended, "completion_mask": mask}
        return trainer.compute_loss(trainer.model, inputs)

    return loss


def kto(folder: Path, tuned: PeftModel, **options: Any) -> Loss:
    data = rows(prompt=["a"] * UNITS, completion=["b"] * UNITS, label=[True, False] * (UNITS // 2))
    args = common(folder, trl.KTOConfig, train_sampling_strategy="sequential", max_length=None, **options)
    trainer = trl.KTOTrainer(model=tuned, args=args, train_dataset=data, processing_class=tokenizer("chatml"))

    def loss(tuned: PeftModel, units: list[ExampleGroup]) -> torch.Tensor:
        inputs: dict[str, Any] = {"label": torch.tensor([unit.desirable for unit in units])}
        for name, examples in (("", [u.examples[0] for u in units]), ("KL_", [u.kl_examples[0] for u in units])):
            built = zip(("input_ids", "attention_mask", "completion_mask"), padded(examples), strict=True)
            inputs |= {name + part: tensor for part, tensor in built}
        return trainer.compute_loss(trainer.model, inputs)

    return loss


def chosen_and_rejected(trainer: Any) -> Loss:
    def loss(tuned: PeftModel, units: list[ExampleGroup]) -> torch.Tensor:
        batch: dict[str, Any] = {}
        for side, name in enumerate(("chosen", "rejected")):
            ids, attended, mask = padded([unit.examples[side] for unit in units])
            batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": attended}
            batch[f"{name}_labels"] = torch.where(mask == 1, ids, -100)
        return trainer.get_batch_loss_metrics(trainer.model, batch)[0]

    return loss


def orpo(folder: Path, tuned: PeftModel, **options: Any) -> Loss:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    data = rows(prompt=["a"] * UNITS, chosen=["b"] * UNITS, rejected=["c"] * UNITS)
    args = common(folder, ORPOConfig, max_length=64, **options)
    return chosen_and_rejected(
        ORPOTrainer(model=tuned, args=args, train_dataset=data, processing_class=tokenizer("chatml"))
    )


def simpo(folder: Path, tuned: PeftModel, **options: Any) -> Loss:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    data = rows(prompt=["a"] * UNITS, chosen=["b"] * UNITS, rejected=["c"] * UNITS)
    args = common(folder, CPOConfig, max_length=64, loss_type="simpo", **options)
    return chosen_and_rejected(
        CPOTrainer(model=tuned, args=args, train_dataset=data, processing_class=tokenizer("chatml"))
    )


def reward(folder: Path, tuned: PeftModel, **options: Any) -> Loss:
    """Return TRL's trainer on transformers' sequence classifier, with the weights and head of a strop model."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    config = tuned.get_base_model().config
    config.num_labels = 1
    classifier = LlamaForSequenceClassification(config)
    base = tiny.model(num_hidden_layers=1)
    classifier.model.load_state_dict(base.model.state_dict())
    lora_config = tuned.peft_config["default"]
    names = {"r": lora_config.r, "lora_alpha": lora_config.lora_alpha, "target_modules": lora_config.target_modules}
    theirs = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **names))
    weights = {name: weight for name, weight in tuned.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if weight.requires_grad:
                weight.copy_(weights[name])
    data = rows(chosen=["b"] * UNITS, rejected=["c"] * UNITS)
    args = common(folder, trl.RewardConfig, max_length=64, disable_dropout=True, **options)
    trainer = trl.RewardTrainer(model=theirs, args=args, train_dataset=data, processing_class=tokenizer("chatml"))
    tuned.stand_in = theirs
    classifier.config.pad_token_id = 0  # the padding of `padded`: the classifier looks for the last other token

    def loss(tuned: PeftModel, units: list[ExampleGroup]) -> torch.Tensor:
        ids, attended, _ = padded([unit.examples[side] for side in range(2) for unit in units])
        return trainer.compute_loss(trainer.model, {"input_ids": ids, "attention_mask": attended})

    return loss


CASES: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any]]] = {
    "dpo": ("dpo", dpo_like, {"beta": 0.3}, {"beta": 0.3}),
    "dpo normalized": ("dpo", dpo_like, {"length_normalized": True}, {"loss_type": ["sigmoid_norm"]}),
    "ipo": ("ipo", dpo_like, {"beta": 0.2}, {"loss_type": ["ipo"], "beta": 0.2}),
    "kto": (
        "kto", kto, {"desirable_weight": 1.2, "undesirable_weight": 0.7},
        {"desirable_weight": 1.2, "undesirable_weight": 0.7},
    ),
    "simpo": ("simpo", simpo, {"gamma": 0.5, "label_smoothing": 0.1}, {
        "simpo_gamma": 0.5, "beta": 2.0, "cpo_alpha": 0.0, "label_smoothing": 0.1,
    }),
    "reward": ("reward", reward, {}, {}),
}  # fmt: skip


def filled(objective: str, options: dict[str, Any]) -> PreferenceCriterion:
    known = OBJECTIVES[objective]
    return PreferenceCriterion(known, TrainSection(objective=objective, **{**known.options, **options}))


def compare(
    criterion: PreferenceCriterion, make: Any, folder: Path, options: dict[str, Any], built: list[ExampleGroup]
) -> None:
    """Compare ten steps of both, each from its own weights."""
    ours, theirs = (model(criterion.objective.scored) for _ in range(2))
    loss = make(folder, theirs, **options)
    theirs = getattr(theirs, "stand_in", theirs)
    step, criterion = step_for(ours), replace(criterion, head=find_score_head(ours))
    if criterion.objective.reference:
        with torch.no_grad():
            sides = answer_logprobs(step, built)
            more = [mismatched_logprobs(step, built)] if built[0].kl_examples else []
            values = torch.stack([*sides, *more], 1).tolist()
        built = [
            ExampleGroup(u.examples, u.kl_examples, u.desirable, tuple(v)) for u, v in zip(built, values, strict=True)
        ]
    theirs_by_name = dict(theirs.named_parameters())  # with the copy that TRL makes for its reference
    pairs = [(weight, theirs_by_name[name]) for name, weight in ours.named_parameters() if weight.requires_grad]
    optimizers = [torch.optim.AdamW([p[side] for p in pairs], lr=1e-2) for side in range(2)]
    for n in range(STEPS):
        level = criterion.batch_statistic(step, built, lambda items: [list(range(len(items)))])
        mine = criterion.loss(step, built, level)[0] / criterion.divisor(built)
        other = loss(theirs, built)
        for value, optimizer in zip((mine, other), optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
        assert float(mine) == pytest.approx(float(other), abs=1e-5, rel=1e-5), f"step {n}"
        total = torch.cat([a.grad.flatten() for a, _ in pairs])
        theirs_total = torch.cat([b.grad.flatten() for _, b in pairs])
        assert total.norm() > 0
        assert (total - theirs_total).norm() <= 1e-5 * theirs_total.norm() + 1e-6, f"step {n}"
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_those_of_trl(case: str, tmp_path: Path) -> None:
    objective, make, arguments, options = CASES[case]
    compare(filled(objective, arguments), make, tmp_path, options, units(objective == "kto"))


@pytest.mark.filterwarnings("ignore")
def test_orpo_equals_trl_except_for_the_prompt_in_the_first_term(tmp_path: Path) -> None:
    """TRL's cross entropy covers prompt and answer (trl#2527); strop's covers the answer, averaged per pair.

    The odds-ratio term, which is left when each first term is subtracted, is the same.
    """
    built, ours = units(), model()
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
        loss = orpo(tmp_path, ours, beta=0.7)
        ids, attended, _ = padded([unit.examples[0] for unit in built])
        labels = torch.where(attended == 1, ids, -100)
        logits = ours(input_ids=ids, attention_mask=attended).logits
        first = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        theirs = float(loss(ours, built) - first)
        criterion, step = filled("orpo", {"beta": 0.7}), step_for(ours)
        chosen = answer_logprobs(step, built)[0]
        counts = chosen.new_tensor([unit.examples[0].supervised for unit in built])
        mine = float(criterion.loss(step, built, 0.0)[0] / UNITS + (chosen / counts).mean())
    assert mine == pytest.approx(theirs, rel=1e-5)


def groups(step: Step) -> list[RolloutGroup]:
    """Make two groups of three completions, with old and reference log-probabilities of other policies."""
    built, result = units(), []
    noise = np.random.default_rng(1)
    for two in (built[:3], built[3:]):
        prompt = two[0].examples[0].ids[: two[0].examples[0].prompt_length]
        answers = [unit.examples[0] for unit in two]
        examples = tuple(
            example(np.concatenate([prompt, answer.ids[answer.prompt_length :]]), len(prompt)) for answer in answers
        )
        with torch.no_grad():
            now = step.token_log_probs(examples).double().numpy()
        sampled, before = (now + noise.normal(0, 0.3, len(now)) for _ in range(2))
        rewards = tuple(noise.random(GROUP))
        options = TrainSection(objective="grpo", **GRPO.options)
        result.append(RolloutGroup(
            examples, advantages=tuple(group_advantages(rewards, options)), stopped=(True,) * GROUP, rewards=rewards,
            sampling_logprobs=sampled, reference_token_logprobs=before,
        ))  # fmt: skip
    return result


def ragged(groups: list[RolloutGroup], values: list[Any]) -> torch.Tensor:
    """Return per-token values of each group as right-padded rows of completions."""
    result = []
    for group, some in zip(groups, values, strict=True):
        result += list(torch.from_numpy(some).float().split([e.supervised for e in group.examples]))
    return torch.nn.utils.rnn.pad_sequence(result, batch_first=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo"])
def test_grpo_equals_trl_on_the_same_completions(kind: str, tmp_path: Path) -> None:
    """Ten steps on the same completions, so that ratios are clipped."""
    ours, theirs = (model() for _ in range(2))
    step, built = step_for(ours), groups(step_for(model()))
    settings = {"group_loss": kind, "beta": 0.3, "answer_tokens": 16, "rewards": "exact"}
    options = TrainSection(objective="grpo", **{**GRPO.options, **settings})
    criterion = PolicyCriterion(GRPO, options, 0, ours, None, (), (), {}, EventLog(tmp_path / "events.jsonl"))
    args = common(
        tmp_path, trl.GRPOConfig, loss_type=kind, beta=0.3, epsilon=0.2, epsilon_high=0.28, num_generations=GROUP,
        max_completion_length=16, num_iterations=2,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=theirs, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
        train_dataset=rows(prompt=["a"] * UNITS), processing_class=tokenizer("chatml"),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    examples = [example for group in built for example in group.examples]
    left = max(example.prompt_length for example in examples)
    prompts = torch.zeros(len(examples), left, dtype=torch.long)
    prompt_mask = torch.zeros_like(prompts)
    for row, one in enumerate(examples):
        prompts[row, left - one.prompt_length :] = torch.from_numpy(one.ids[: one.prompt_length])
        prompt_mask[row, left - one.prompt_length :] = 1
    answers = [torch.from_numpy(one.ids[one.prompt_length :]).long() for one in examples]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in answers], batch_first=True)
    inputs = {
        "prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_mask": mask,
        "completion_ids": torch.nn.utils.rnn.pad_sequence(answers, batch_first=True),
        "advantages": torch.tensor([a for group in built for a in group.advantages], dtype=torch.float32),
        "old_per_token_logps": ragged(built, [group.sampling_logprobs for group in built]),
        "ref_per_token_logps": ragged(built, [group.reference_token_logprobs for group in built]),
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    named = dict(theirs.named_parameters())
    pairs = [(weight, named[name]) for name, weight in ours.named_parameters() if weight.requires_grad]
    optimizers = [torch.optim.AdamW([p[side] for p in pairs], lr=1e-2) for side in range(2)]
    theirs.train()
    clipped = 0.0
    for n in range(STEPS):
        total, figures = criterion.loss(step, built, 0.0)
        mine, other = total / criterion.divisor(built), trainer._compute_loss(trainer.model, inputs)
        clipped += float(figures["clip_share"].mean())
        for value, optimizer in zip((mine, other), optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
        assert float(mine.detach()) == pytest.approx(float(other.detach()), abs=1e-5, rel=1e-5), f"step {n}"
        grads = [torch.cat([p[side].grad.flatten() for p in pairs]) for side in range(2)]
        assert grads[0].norm() > 0 and (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm() + 1e-6, f"step {n}"
        for optimizer in optimizers:
            optimizer.step()
    assert clipped > 0.1
