"""Classification in the training loop, compared with transformers' and peft's own sequence classifiers."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, pipeline

from strop.cli import app
from strop.data.types import LabelledText
from strop.engine.decode.model import load
from strop.engine.step import step_for
from strop.engine.train.plain import PlainLoss
from strop.models.lora import add_lora, find_score_head, trainable_parameters
from strop.training.criteria import ClassCriterion
from tests import ROOT
from tests.support import texts, tiny
from tests.support.families import tokenizer
from tests.support.pages import blocks
from tests.support.random_models import tiny_of
from tests.support.runs import QUICK, run

CLASSES = 3


def make_base(family: str) -> Any:
    sizes = {"vocab_size": len(tokenizer("chatml")), "pad_token_id": 0}
    if family != "gpt2":
        return tiny_of(family, **sizes)
    off: Any = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, **off, **sizes))


def adapted(family: str, folder: Path) -> tuple[Any, Any]:
    """Return a model with adapters and a score head, and transformers' classifier with the same weights."""
    base = make_base(family).float().requires_grad_(False)
    base.save_pretrained(folder)
    torch.manual_seed(0)
    ours = add_lora(base, tiny.recipe().recipe.lora, None, outputs=CLASSES)
    with torch.no_grad():
        for name, weight in trainable_parameters(ours).items():
            if "lora_B" in name or "score" in name:
                weight.normal_(0, 0.3)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
    theirs = peft.get_peft_model(theirs, copy.deepcopy(ours.peft_config["default"]))
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours, save_embedding_layers=False))
    return ours, theirs.train()


def their_loss(model: Any, rows: list[LabelledText], several: bool, weights: torch.Tensor) -> torch.Tensor:
    """Return the loss of transformers' classifier on a padded batch, with torch's own loss functions."""
    examples = [row.examples[0] for row in rows]
    ids = torch.zeros(len(rows), max(map(len, examples)), dtype=torch.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.from_numpy(example.ids.astype(np.int64))
    logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    targets = torch.zeros(len(rows), CLASSES)
    for row, text in enumerate(rows):
        targets[row, list(text.classes)] = 1
    if not several:
        return functional.cross_entropy(logits, targets.argmax(1), weight=weights)
    losses = functional.binary_cross_entropy_with_logits(logits, targets, weight=weights, reduction="sum")
    return losses / (len(rows) * weights.sum())


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0)])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("family", "plain"), [("llama", False), ("llama", True), ("gpt_neox", False), ("qwen2", False), ("gpt2", True)]
)
def test_loss_and_gradients_equal_those_of_transformers(
    family: str, plain: bool, several: bool, weights: tuple[float, ...], tmp_path: Path
) -> None:
    ours, theirs = adapted(family, tmp_path)
    rows = texts.texts(9, several=several)
    step = PlainLoss(ours.train(), "asked for by the test") if plain else step_for(ours.train())
    assert step.name == ("plain" if plain else "fast")
    head = find_score_head(ours)
    assert head is not None
    criterion = ClassCriterion(head, weights, several)
    total = 0.0
    for part in (rows[:4], rows[4:]):  # micro-batches of one step
        loss, _ = criterion.loss(step, part, 0.0)
        loss = loss / criterion.divisor(rows)
        loss.backward()
        total += float(loss.detach())
    expected = their_loss(theirs, rows, several, torch.tensor(weights))
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), abs=1e-5)
    theirs_by_name = dict(theirs.named_parameters())
    compared = trainable_parameters(ours)
    assert any("score" in name for name in compared) and len(compared) > 4
    for name, weight in compared.items():
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, theirs_by_name[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def train(folder: Path, rows: list[dict[str, Any]], out: Path, *words: str, capsys: Any) -> str:
    """Run `strop train` with a tiny model and return its standard error."""
    data = texts.write(out.parent / f"{out.name}.jsonl", rows)
    command = ["train", "--model", folder, "--data", data, "--out", out, *QUICK, "--train.objective", "classify"]
    code, _, err = run(*command, "--train.learning_rate", "0.02", *words, capsys=capsys)
    assert code == 0, err
    return err


def test_weight_of_an_evaluation_file_does_not_narrow_the_interval(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = texts.rows(36)
    held_out, results = texts.write(tmp_path / "eval.jsonl", rows[24:]), []
    for name, spec in (("one", held_out), ("three", f"{held_out}@3")):
        train(tiny_folder, rows[:24], tmp_path / name, "--eval", spec, capsys=capsys)
        results.append(json.loads((tmp_path / name / "report.json").read_text())["objective"]["held_out"])
    assert results[0] == results[1] and "accuracy_interval" in results[0]


@pytest.mark.parametrize("several", [False, True])
def test_classifier_from_the_command_line_to_plain_transformers(
    several: bool, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if several:  # with an output head of its own, which the merged folder leaves out
        tiny.model(tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
        tokenizer("chatml").save_pretrained(tmp_path / "untied")
        tiny_folder = tmp_path / "untied"
    out, rows = tmp_path / "run", texts.rows(36, several)
    err = train(tiny_folder, rows, out, "--eval", "25%", "--train.class_weights", "balanced", capsys=capsys)
    assert "3 classes" in err and "ranked" not in err
    report = json.loads((out / "report.json").read_text())
    assert report["objective"]["options"] == {"labels": sorted(texts.NAMES), "class_weights": "balanced"}
    assert {"accuracy", "accuracy_interval", "macro_f1"} <= report["objective"]["held_out"].keys()
    new = texts.write(tmp_path / "new.jsonl", texts.rows(60, several)[36:])
    code, stdout, err = run("eval", out, "--data", new, "--metric", "accuracy", "--json", capsys=capsys)
    assert code == 0, err
    result = json.loads(stdout)
    assert result["rows"] == 24 and result["train_rows"] == 0 and len(result["classes"]) == 3
    assert ("confusion" in result) is not several and ("micro_f1" in result["tuned"]) is several

    model = load(out, dtype="fp32")
    queries = ["play the 3 of 21", "rain", "a seat for dinner and then a song that is much longer than the others"]
    ours = [row["probabilities"] for row in model.classify(queries)]
    card = (out / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "accuracy" in card and "was not evaluated" not in card
    snippet = re.findall(r"```python\n(.+?)```", card, re.DOTALL)[1]
    snippet = snippet.replace('"BASE"', repr(str(tiny_folder))).replace("THIS_FOLDER", str(out / "adapter"))
    shown: list[Any] = []
    for query in queries:
        exec(snippet, {"text": query, "print": shown.append})
    check_probabilities([row[0] if isinstance(row[0], list) else row for row in shown], ours)

    merged = tmp_path / "merged"
    code, stdout, err = run("merge", out, "--out", merged, "--dtype", "fp32", "--json", capsys=capsys)
    assert code == 0, err
    assert json.loads(stdout)["parity"]["passed"]
    config = json.loads((merged / "config.json").read_text())
    names = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]
    assert "score.weight" in names and "lm_head.weight" not in names
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["pad_token_id"] is not None
    assert config["label2id"] == {name: i for i, name in enumerate(sorted(texts.NAMES))}
    classify = pipeline("text-classification", model=str(merged), top_k=None)
    check_probabilities(classify(queries, batch_size=3), ours)  # padded
    code, _, err = run("chat", merged, capsys=capsys)
    assert code == 2 and "generates no text" in err


def check_probabilities(theirs: list[list[dict[str, Any]]], ours: list[dict[str, float]]) -> None:
    assert len(theirs) == len(ours)
    for answer, expected in zip(theirs, ours, strict=True):
        assert {entry["label"]: entry["score"] for entry in answer} == pytest.approx(expected, abs=1e-3)
        assert max(expected.values()) > 0.4


def test_resumed_classifier_equals_the_uninterrupted_one(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, words = texts.rows(30), ("--train.save_steps", "2", "--model.quantization", "nf4", "--lora.dropout", "0.1")
    for name in ("whole", "cut"):
        train(tiny_folder, rows, tmp_path / name, *words, capsys=capsys)
    cut = tmp_path / "cut"
    for file in ("report.json", "report.html"):
        (cut / file).unlink()
    for checkpoint in sorted((cut / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    code, _, err = run("resume", cut, capsys=capsys)
    assert code == 0, err
    assert "labels: [music, table, weather]" in (cut / "recipe.yaml").read_text()
    whole, again = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == again.keys() and any("score" in name for name in whole)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_classifier_is_trained_further_and_refused_elsewhere(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(tiny_folder, texts.rows(24), out, capsys=capsys)
    train(tiny_folder, texts.rows(30), tmp_path / "more", "--model.adapter", str(out), capsys=capsys)
    other = [{**row, "label": row["label"][:-1]} for row in texts.rows(24)]
    data = texts.write(tmp_path / "other.jsonl", other)
    without_music = [row for row in texts.rows(24) if row["label"] != "music"]
    fewer = texts.write(tmp_path / "fewer.jsonl", without_music)
    turns = tiny.write_rows(tmp_path / "turns.jsonl", 12)
    classify = ["--train.objective", "classify"]
    labels = ["--train.labels", "music,table,weather"]
    further = ["--model.adapter", str(out), *labels]
    train(
        tiny_folder, [row for row in texts.rows(24) if row["label"] != "music"], tmp_path / "y", *further, capsys=capsys
    )
    commands: list[tuple[list[str | Path], str]] = [
        (["export", "gguf", out, "--out", tmp_path / "m.gguf"], "classifies texts"),
        (["export", "ollama", out, "--out", tmp_path / "ollama"], "classifies texts"),
        (["export-script", out, "--out", tmp_path / "script"], "train.objective classify"),
        (["train", "--model", out, "--data", data, "--out", tmp_path / "x", *classify], "it has the classes music"),
        (
            ["train", "--model", out, "--data", fewer, "--out", tmp_path / "x", *classify],
            f"Fix: {' '.join(labels)}, or",
        ),
        (["train", "--model", out, "--data", data, "--out", tmp_path / "x"], "classify"),
        (["eval", out, "--data", data], "unknown label 'musi' (did you mean music?); known are music, table, weather"),
        (["eval", out, "--data", data, "--metric", "contains"], "--metric accuracy"),
        (["eval", out, "--data", data, "--metric", "exact"], "--metric accuracy"),
        (["eval", out, "--data", turns], "its rows need a text and a label, which 12 rows do not have"),
        (["eval", out, "--data", turns], "(11 more rows have the same error)"),
        (["chat", out, "--base"], "takes no --base"),
        (
            ["train", "--model", tiny_folder, "--data", data, "--train.class_weights", "musi=2,x=1", *classify],
            "no such label",
        ),
        (
            ["check", "--model", tiny_folder, "--data", data, "--train.class_weights", "musi=2,x=1", *classify],
            "no such label",
        ),
        (
            ["train", "--model", tiny_folder, "--data", data, "--train.class_weights", "some", *classify],
            "class_weights",
        ),
        (["train", "--model", tiny_folder, "--data", data, "--train.labels", "mu,mu", *classify], "given twice"),
        (["train", "--model", tiny_folder, "--data", data, "--train.labels", "a,b"], "--objective classify"),
    ]
    for command, message in commands:
        code, _, err = run(*command, capsys=capsys)
        assert code == 2 and message in " ".join(err.split()), (command, err)


def test_the_guide_works_from_its_first_command_to_its_last(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of docs/classify.md run in order, with a tiny model; tests/serve has a test of the server."""
    monkeypatch.chdir(tmp_path)
    texts.write(tmp_path / "texts.jsonl", texts.rows(60))
    texts.write(tmp_path / "held-out.jsonl", texts.rows(90)[60:])
    shown: list[Any] = []
    for block in blocks(ROOT / "docs" / "classify.md"):
        if block.language == "python":
            exec(block.text, {"print": shown.append})
        for words in block.commands:
            if words[0] != "strop" or words[1] == "serve":
                continue
            words = [str(tiny_folder) if word == "demo" else word for word in words[1:]]
            words += [*QUICK, "--train.learning_rate", "0.02"] if words[0] == "train" else []
            monkeypatch.setattr(sys, "stdin", io.StringIO("put on a song\nis it windy\n"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["strop", *words])
                with pytest.raises(SystemExit) as ended:
                    app.main()
            out, err = capsys.readouterr()
            assert not ended.value.code, err
            if words[0] == "chat":
                assert len(out.splitlines()) == 2 and all(name in out for name in texts.NAMES)
    ours, theirs = shown
    for row, answer in zip(ours, theirs, strict=True):
        found = {entry["label"]: entry["score"] for entry in answer}
        assert found == pytest.approx(row["probabilities"], abs=0.02)  # merged into bf16
