"""Embeddings in the training loop, compared with sentence-transformers' loss and models."""

from __future__ import annotations

import copy
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import strop
from strop.config.schema import TrainSection
from strop.data.rendering.render import text_example
from strop.data.types import Item, Triplet
from strop.engine.decode.embed import embed_examples
from strop.engine.step import Step, step_for
from strop.engine.train.plain import PlainLoss
from strop.errors import InputError, RecipeError
from strop.models.embedder import read_pooling
from strop.models.lora import add_lora, trainable_parameters
from strop.objectives.embedding import contrastive_losses, find_false_negatives
from strop.training.contrastive import EmbedCriterion
from tests import ROOT
from tests.support import texts, tiny, triplets
from tests.support.families import tokenizer
from tests.support.pages import blocks
from tests.support.runs import QUICK, run
from tests.training.test_classification import make_base

FAMILIES = [("llama", False), ("llama", True), ("gpt_neox", False), ("qwen2", False), ("gpt2", True)]


def adapted(family: str, folder: Path, dropout: float = 0.0) -> tuple[Any, Any]:
    """Return a model with adapters, and transformers' model without an output head with the same weights."""
    base = make_base(family).float().requires_grad_(False)
    base.save_pretrained(folder)
    torch.manual_seed(0)
    lora = tiny.recipe().recipe.lora.model_copy(update={"dropout": dropout})
    ours = add_lora(base, lora, None, task="FEATURE_EXTRACTION")
    with torch.no_grad():
        for name, weight in trainable_parameters(ours).items():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    theirs = AutoModel.from_pretrained(folder)
    theirs = peft.get_peft_model(theirs, copy.deepcopy(ours.peft_config["default"]))
    prefix = f"base_model.model.{theirs.base_model.model.base_model_prefix}."
    state = peft.get_peft_model_state_dict(ours, save_embedding_layers=False)
    state = {key.replace(prefix, "base_model.model."): value for key, value in state.items()}
    loaded = peft.set_peft_model_state_dict(theirs, state)
    assert not loaded.unexpected_keys
    return ours, theirs.train()


class Encoder(torch.nn.Module):
    """transformers' model with sentence-transformers' pooling, as a loss of sentence-transformers calls it."""

    def __init__(self, model: Any, pooling: str, size: int) -> None:
        from sentence_transformers.sentence_transformer.modules import Pooling

        super().__init__()
        self.model, self.pooling = model, Pooling(size, "lasttoken" if pooling == "last" else "mean")

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens = self.model(**features).last_hidden_state
        result: dict[str, torch.Tensor] = self.pooling({**features, "token_embeddings": tokens})
        return result


def their_loss(model: Any, rows: list[Triplet], pooling: str, temperature: float) -> torch.Tensor:
    """Return sentence-transformers' MultipleNegativesRankingLoss on padded batches, one for each column."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    size = model.config.hidden_size
    loss = MultipleNegativesRankingLoss(Encoder(model, pooling, size), scale=1 / temperature)
    features = []
    for column in zip(*(row.examples for row in rows), strict=True):
        ids = torch.zeros(len(rows), max(map(len, column)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(column):
            ids[row, : len(example)] = torch.from_numpy(example.ids.astype(np.int64))
            mask[row, : len(example)] = 1
        features.append({"input_ids": ids, "attention_mask": mask})
    result: torch.Tensor = loss(features, torch.zeros(len(rows)))
    return result


def split(size: int, items: Any) -> list[list[int]]:
    return [list(range(begin, min(begin + size, len(items)))) for begin in range(0, len(items), size)]


def our_step(criterion: EmbedCriterion, step: Step, rows: list[Item], size: int) -> float:
    """Accumulate the gradients of one training step in micro-batches of `size` rows, and return its loss."""
    items = criterion.prepare(step, rows, 0, partial(split, size))
    total = 0.0
    for part in split(size, items):
        loss, _ = criterion.loss(step, [items[row] for row in part], 0.0)
        loss = loss / criterion.divisor(items)
        loss.backward()
        total += float(loss.detach())
    return total


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize(("family", "plain"), FAMILIES)
def test_loss_and_gradients_equal_those_of_sentence_transformers(
    family: str, plain: bool, negatives: int, pooling: str, tmp_path: Path
) -> None:
    pytest.importorskip("sentence_transformers")
    ours, theirs = adapted(family, tmp_path)
    rows = triplets.triplets(7, negatives=negatives)
    step = PlainLoss(ours.train(), "asked for by the test") if plain else step_for(ours.train())
    assert step.name == ("plain" if plain else "fast")
    criterion = EmbedCriterion(TrainSection(pooling=pooling, temperature=0.07))
    total = our_step(criterion, step, list(rows), 3)
    expected = their_loss(theirs, rows, pooling, 0.07)
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), abs=1e-5)
    by_name = {name.replace(".model.model.", ".model."): weight for name, weight in theirs.named_parameters()}
    prefix = f".{theirs.base_model.model.base_model_prefix}."
    compared = trainable_parameters(ours)
    assert len(compared) > 4
    for name, weight in compared.items():
        assert weight.grad is not None
        key = name.replace(f"base_model.model{prefix}", "base_model.model.")
        expected_grad = by_name[key].grad
        assert expected_grad is not None
        largest = float(expected_grad.abs().max())
        torch.testing.assert_close(weight.grad, expected_grad, atol=1e-4 * largest, rtol=1e-4, msg=name)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("plain", [False, True])
def test_gradients_do_not_depend_on_the_micro_batches(plain: bool, pooling: str, tmp_path: Path) -> None:
    """Also with dropout, whose masks are those of the pass without gradients, and with rows of several lengths."""
    ours, _ = adapted("llama", tmp_path, dropout=0.3)
    rows = list(triplets.triplets(8, negatives=None))
    step = PlainLoss(ours.train(), "asked for by the test") if plain else step_for(ours.train())
    criterion = EmbedCriterion(TrainSection(pooling=pooling, temperature=0.05))
    weights = trainable_parameters(ours)
    results = []
    for size in (0, 1, 3, 8):  # 0: without GradCache
        step.masks.begin(7, 3)
        if size:
            total = our_step(criterion, step, rows, size)
        else:
            loss, _ = criterion.loss(step, rows, 0.0)
            (loss / criterion.divisor(rows)).backward()
            total = float(loss.detach()) / len(rows)
        results.append((total, {name: weight.grad.clone() for name, weight in weights.items()}))
        for weight in weights.values():
            weight.grad = None
    expected, gradients = results[0]
    assert all(gradient.any() for gradient in gradients.values())
    for total, others in results[1:]:
        assert total == pytest.approx(expected, abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    step.masks.begin(7, 4)
    assert our_step(criterion, step, rows, 3) != pytest.approx(expected, abs=1e-3)  # other masks


def as_row(*texts: int) -> Triplet:
    return Triplet(tuple(text_example(np.array([text, 9], np.int32), "row", 1) for text in texts))


def test_candidates_that_match_an_anchor_are_not_its_negatives(tmp_path: Path) -> None:
    #         anchor, positive, negatives
    batch = [as_row(1, 2, 3), as_row(1, 4), as_row(5, 2, 1), as_row(6, 7, 3)]
    expected = [  # candidates: 2 3 | 4 | 2 1 | 7 3
        [0, 0, 1, 1, 1, 0, 0],  # the other positive of 1, the same positive, and 1 itself
        [1, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],  # its negative 1 is not left out
        [0, 0, 0, 0, 0, 0, 0],
    ]
    assert find_false_negatives(batch).astype(int).tolist() == expected
    ours, _ = adapted("llama", tmp_path)
    step, criterion = step_for(ours.train()), EmbedCriterion(TrainSection(pooling="last", temperature=0.05))
    with torch.no_grad():
        vectors = embed_examples(step, "last", [example for row in batch for example in row.examples]).double()
    losses, _ = contrastive_losses(vectors, batch, 0.05)
    scores = vectors[[0, 3, 5, 8]] @ vectors[[1, 2, 4, 6, 7, 9, 10]].t() / 0.05
    for row, (own, masked) in enumerate(zip((0, 2, 3, 5), expected, strict=True)):
        kept = [column for column, out in enumerate(masked) if not out]
        assert float(losses[row]) == pytest.approx(float(scores[row, kept].logsumexp(0) - scores[row, own]))
    alone = criterion.prepare(step, [as_row(1, 2)], 0, partial(split, 1))[0]
    assert isinstance(alone, Triplet) and alone.loss == 0 and not np.any(alone.gradients)


def test_prepare_returns_equal_items_for_equal_texts(tmp_path: Path) -> None:
    """The gradient of a text is the sum of those of its vectors, wherever it occurs in the batch."""
    ours, _ = adapted("llama", tmp_path)
    step, criterion = step_for(ours.train()), EmbedCriterion(TrainSection(pooling="last", temperature=0.05))
    items = criterion.prepare(step, [as_row(1, 2), as_row(3, 4), as_row(5, 6, 2)], 0, partial(split, 2))
    for item in items:
        assert isinstance(item, Triplet) and item.gradients is not None
        assert item.gradients.shape == (len(item.examples), 16) and item.gradients.dtype == np.float32


def train(folder: Path, rows: list[dict[str, Any]], out: Path, *words: str, capsys: Any) -> str:
    """Run `strop train` with a tiny model and return its standard error."""
    data = texts.write(out.parent / f"{out.name}.jsonl", rows)
    command = ["train", "--model", folder, "--data", data, "--out", out, *QUICK, "--train.objective", "embed"]
    code, _, err = run(*command, "--train.learning_rate", "0.02", *words, capsys=capsys)
    assert code == 0, err
    return err


QUERIES = ["play a song 3", "x", "a seat for dinner and then a song that is much longer than the others", " a b "]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_from_the_command_line_to_plain_sentence_transformers(
    pooling: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = pytest.importorskip("sentence_transformers")
    if pooling == "mean":  # with an output head of its own, which the merged folder leaves out
        tiny.model(tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
        tokenizer("chatml").save_pretrained(tmp_path / "untied")
        tiny_folder = tmp_path / "untied"
    out, rows = tmp_path / "run", triplets.rows(48, negatives=pooling == "last")
    err = train(tiny_folder, rows, out, "--eval", "25%", "--train.pooling", pooling, capsys=capsys)
    assert "accuracy@1" in err and "nDCG@10" in err and "strop chat" not in err
    report = json.loads((out / "report.json").read_text())
    assert report["objective"]["options"] == {"pooling": pooling, "temperature": 0.05}
    scores = {"accuracy_at_1", "recall_at_10", "ndcg_at_10", "mrr"}
    assert scores | {f"{name}_interval" for name in scores} <= report["objective"]["held_out"].keys()
    new = texts.write(tmp_path / "new.jsonl", triplets.rows(90, negatives=True)[48:])
    code, stdout, err = run("eval", out, "--data", new, "--json", capsys=capsys)
    assert code == 0, err
    result = json.loads(stdout)
    assert result["rows"] == 42 and result["texts"] == 84 and result["train_rows"] == result["known_texts"] == 0
    for side in ("base", "baseline", "tuned"):
        assert result[side].keys() == result["score_intervals"][side].keys() == scores
    assert result["score_differences"].keys() == scores
    assert result["score_differences"][result["metric"]] == result["difference"]
    assert result["baseline_name"] == "TF-IDF" and result["baseline_difference"].keys() == {"value", "low", "high"}
    assert "accuracy@1" in (out / "report.html").read_text() and "nDCG@10" in (out / "report.html").read_text()

    ours = strop.load(out, dtype="fp32").embed(QUERIES)
    assert ours.shape == (4, 32) and ours.dtype == np.float32
    check_equal(library, out / "adapter", ours)
    card = (out / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: sentence-similarity" in card and "library_name: sentence-transformers" in card
    assert "was not evaluated" not in card and "TF-IDF" in card
    shown: list[Any] = []
    for snippet in re.findall(r"```python\n(.+?)```", card, re.DOTALL):
        exec(snippet.replace("THIS_FOLDER", str(out / "adapter")), {"texts": QUERIES, "print": shown.append})
    assert shown[0] == pytest.approx(ours @ ours.T, abs=1e-4) and np.array(shown[1]) == pytest.approx(ours, abs=1e-2)

    merged = tmp_path / "merged"
    code, stdout, err = run("merge", out, "--out", merged, "--dtype", "fp32", "--json", capsys=capsys)
    assert code == 0, err
    parity = json.loads(stdout)["parity"]
    assert parity["passed"] and parity["positions"] > 5 and parity["cosine_min"] > 0.99999
    check_equal(library, merged, ours)
    assert "lowest cosine" in (merged / "README.md").read_text()
    names = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any("lm_head" in name for name in names)
    for command in (["chat", merged], ["eval", merged, "--data", new], ["export", "gguf", merged, "--out", "x.gguf"]):
        code, _, err = run(*command, capsys=capsys)
        assert code == 2 and "generates no text" in " ".join(err.split()), err


def test_any_row_of_an_anchor_may_be_a_train_row_and_a_limit_keeps_the_candidates(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = triplets.rows(60)
    options = {"train.objective": "embed", "train.max_steps": 2, "model.dtype": "fp32"}
    run = strop.train(model=tiny_folder, data=rows[:20], out=tmp_path / "run", **options)
    twice = [{**other, "anchor": row["anchor"]} for row, other in zip(rows[:5], rows[20:], strict=False)]
    for order in (twice + rows[:5], rows[:5] + twice):
        result = strop.evaluate(run, [*order, *rows[30:40]])
        assert (result["rows"], result["train_rows"]) == (15, 5)
    whole, limited = strop.evaluate(run, rows[20:]), strop.evaluate(run, rows[20:], limit=8)
    assert (whole["rows"], limited["rows"], whole["texts"], limited["texts"]) == (40, 8, 40, 40)
    found = {sample["prompt"]: sample for sample in whole["samples"]}
    assert all(sample == found[sample["prompt"]] for sample in limited["samples"])


def check_equal(library: Any, folder: Path, expected: Any) -> None:
    """Compare the vectors of a folder in sentence-transformers, in padded batches and one by one."""
    model = library.SentenceTransformer(str(folder), device="cpu")
    for size in (1, len(QUERIES)):
        assert model.encode(QUERIES, batch_size=size) == pytest.approx(expected, abs=1e-4)
    assert model.similarity_fn_name == "cosine" and model.max_seq_length == 512
    assert model.get_embedding_dimension() == expected.shape[1]


def test_resumed_run_equals_the_uninterrupted_one(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--train.save_steps", "2", "--model.quantization", "nf4", "--lora.dropout", "0.1", "--eval", "20%")
    for name in ("whole", "cut"):
        train(tiny_folder, triplets.rows(30, negatives=True), tmp_path / name, *words, capsys=capsys)
    cut = tmp_path / "cut"
    for file in ("report.json", "report.html"):
        (cut / file).unlink()
    for checkpoint in sorted((cut / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    code, _, err = run("resume", cut, capsys=capsys)
    assert code == 0, err
    whole, again = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_embedder_is_trained_further_and_refused_elsewhere(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(tiny_folder, triplets.rows(24), out, capsys=capsys)
    train(tiny_folder, triplets.rows(30), tmp_path / "more", "--model.adapter", str(out), capsys=capsys)
    data = texts.write(tmp_path / "other.jsonl", triplets.rows(24))
    same = texts.write(tmp_path / "same.jsonl", [{"anchor": f"a{n}", "positive": "b"} for n in range(6)])
    embed = ["--train.objective", "embed"]
    new = ["train", "--model", tiny_folder, "--out", tmp_path / "x"]
    commands: list[tuple[list[str | Path], str]] = [
        (["chat", out], "strop.load(run).embed(texts)"),
        (["export", "gguf", out, "--out", tmp_path / "m.gguf"], "generates no text"),
        (["export", "ollama", out, "--out", tmp_path / "ollama"], "generates no text"),
        (["export-script", out, "--out", tmp_path / "script"], "train.objective embed"),
        (["train", "--model", out, "--data", data, "--out", tmp_path / "x"], "embed"),
        (["eval", out, "--data", data, "--metric", "contains"], "--metric accuracy_at_1"),
        (["eval", out, "--data", data, "--metric", "exact"], "--metric accuracy_at_1"),
        (["eval", out, "--data", data, "--general"], "generates nothing"),
        (["eval", out, tiny_folder, "--data", data], "not a model of embeddings"),
        ([*new, "--data", data, *embed, "--train.batch_size", "1"], "has nothing to compare"),
        ([*new, "--data", same, *embed], "all training rows have the same positive"),
        ([*new, "--data", data, *embed, "--lora.new_tokens", "<x>"], "lora.new_tokens"),
        ([*new, "--data", data, *embed, "--lora.target_modules", "q_proj,lm_head"], "lm_head is the output head"),
        ([*new, "--data", data, *embed, "--train.labels", "a,b"], "--train.objective classify"),
        ([*new, "--data", data, *embed, "--train.temperature", "0"], "temperature"),
        ([*new, "--data", data, *embed, "--train.keep", "0.1"], "train.keep"),
        ([*new, "--data", data, "--train.pooling", "mean"], "--objective embed"),
    ]
    for command, message in commands:
        code, _, err = run(*command, capsys=capsys)
        assert code == 2 and message in " ".join(err.split()), (command, err)


def test_the_guide_works_from_its_first_command_to_its_last(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of docs/embed.md run in order, with a tiny model; tests/serve has a test of the server."""
    pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    page = list(blocks(ROOT / "docs" / "embed.md"))
    [shown_rows] = [block.text for block in page if block.language == "jsonl"]
    written = [json.loads(line) for line in shown_rows.splitlines()]
    rows = triplets.rows(90, negatives=True)
    texts.write(tmp_path / "pairs.jsonl", [*written, *rows[:60]])
    texts.write(tmp_path / "held-out.jsonl", rows[60:])
    shown: list[Any] = []
    for block in page:
        if block.language == "python":
            exec(block.text, {"print": shown.append})
        for words in block.commands:
            if words[0] != "strop" or words[1] == "serve":
                continue
            words = [str(tiny_folder) if word == "demo" else word for word in words[1:]]
            words += [*QUICK[:2], *QUICK[4:], "--train.learning_rate", "0.02"] if words[0] == "train" else []
            code, _, err = run(*words, capsys=capsys)
            assert not code, err
    similarities, adapter, merged = shown
    assert similarities.shape == (2, 2) and similarities[0, 0] == pytest.approx(1)
    assert adapter == merged == (2, 32)


def test_a_run_goes_on_with_the_pooling_that_it_starts_from(tiny_folder: Path, tmp_path: Path) -> None:
    texts.write(tmp_path / "pairs.jsonl", triplets.rows(12))
    options: dict[str, Any] = {
        "data": str(tmp_path / "pairs.jsonl"), "train.objective": "embed", "train.max_steps": 1, "model.device": "cpu",
        "model.dtype": "fp32",
    }  # fmt: skip
    first = strop.train(model=str(tiny_folder), out=str(tmp_path / "a"), **options, **{"train.pooling": "mean"}).folder
    second = strop.train(model=str(first), out=str(tmp_path / "b"), **options).folder
    assert read_pooling(second / "adapter") == "mean"
    with pytest.raises(RecipeError, match="the adapter to start from has mean"):
        strop.train(model=str(first), out=str(tmp_path / "c"), **options, **{"train.pooling": "last"})
    strop.merge(str(first), str(tmp_path / "merged"), measure=False, dtype="fp32")
    third = strop.train(model=str(tmp_path / "merged"), out=str(tmp_path / "d"), **options).folder
    assert read_pooling(third / "adapter") == "mean"
    model = strop.load(str(first))
    assert model.embed([]).shape == (0, 32)
    for wrong in (["\ud800"], None, [None]):
        with pytest.raises(InputError, match="embed:"):
            model.embed(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "batch", "message"),
    [
        ([{"query": "q", "pos": [f"d{i}" for i in range(6)]}], 4, "all training rows have the same anchor"),
        (
            [{"anchor": f"q{i}", "positive": f"d{i}", "negative": "n" if i else None} for i in range(8)],
            1,
            "1 rows have no",
        ),
        ([{"anchor": ["a", "b"], "positive": "x"}], 4, "anchor is a list of 2 texts"),
        ([{"anchor": [], "positive": "x"}], 4, "anchor is a list of 0 texts"),
        ([{"query": "q", "document": "d", "label": 0}], 4, "label is '0'"),
        ([{"anchor": "q", "positive": "d", "is_duplicate": "0"}], 4, "is_duplicate is '0'"),
        ([{"anchor": "q", "positive": "['a', 'b']"}], 4, "positive"),
    ],
)
def test_rows_that_teach_nothing_or_the_wrong_thing(
    tiny_folder: Path, tmp_path: Path, rows: list[dict[str, Any]], batch: int, message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options: dict[str, Any] = {"train.objective": "embed", "train.batch_size": batch, "model.device": "cpu"}
    with pytest.raises(InputError) as raised:
        strop.train(model=str(tiny_folder), data=str(file), out=str(tmp_path / "run"), **options)
    assert message in str(raised.value) + " ".join(str(place) for place in raised.value.where)


def test_leaderboard_pairs_the_anchors_that_both_tokenizers_tell_apart(tmp_path: Path, tiny_folder: Path) -> None:
    """One tokenizer lower-cases, so that two anchors are one text."""
    lower = tmp_path / "lower"
    shutil.copytree(tiny_folder, lower)
    words = tokenizer("chatml").backend_tokenizer.to_str()
    (lower / "tokenizer.json").write_text(words.replace('"normalizer":null', '"normalizer":{"type":"Lowercase"}'))
    rows = [{"anchor": f"where is {n}", "positive": f"here {n}"} for n in range(24)]
    data = texts.write(tmp_path / "rows.jsonl", rows)
    new = texts.write(
        tmp_path / "new.jsonl",
        [{"anchor": f"where is {name}", "positive": f"in {name}"} for name in ("Paris", "Oslo", "paris", "Rome")],
    )
    runs = [tmp_path / "run", tmp_path / "low"]
    for model, out in zip((tiny_folder, lower), runs, strict=True):
        strop.train(model=model, data=data, objective="embed", out=out, max_steps=1)
    assert [strop.evaluate(run, new)["rows"] for run in runs] == [4, 3]
    entries = strop.evaluate(runs, new)["leaderboard"]
    assert {entry["verdict"] for entry in entries} == {"best", "unclear"}
