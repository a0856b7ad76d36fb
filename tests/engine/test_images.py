"""Images in each family: loss and gradients as transformers' own forward computes them from the pixels."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from strop.config.schema import DataSection, LoraSection
from strop.data.images import FIRST_IMAGE_ID
from strop.data.prepare import Prepared, prepare
from strop.data.types import Example
from strop.engine.decode.batch import Batch, decode_all
from strop.engine.decode.decoder import CompiledDecoder, Decoder, why_decoder_unsupported
from strop.engine.decode.generate import generate
from strop.engine.decode.hf_fallback import HfDecoder
from strop.engine.decode.sampling import ExpectedCompletion, SequenceState, Token
from strop.engine.images import capture_embeddings, image_features, install_images
from strop.engine.step import step_for
from strop.engine.train.plain import PlainLoss
from strop.errors import ModelError
from strop.models.introspect import find_image_tower, find_projectors
from strop.models.load import load_base
from strop.models.lora import add_lora, trainable_parameters
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from tests.support.seeing import FAMILIES, IN_SPACE, ONE_IMAGE, PLAIN, REFUSED, STATEFUL, TWO_WAY, save_seeing

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # GLM-4V's processor
SIZES = [(50, 30), (30, 50), (64, 64), (33, 47)]


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model") / str(request.param)
    return save_seeing(folder, request.param)


def write_rows(folder: Path, *, several: bool) -> list[dict[str, Any]]:
    """Write pictures and rows: with one image, with three in two turns, and without one."""
    random = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")

    def image(number: int) -> dict[str, str]:
        return {"type": "image", "path": f"{number}.png"}

    def text(content: str) -> dict[str, str]:
        return {"type": "text", "text": content}

    turns: list[list[Any]] = [
        [[image(0), text("Which colour?")], "red"],
        [[text("Compare "), image(1), text(" and "), image(2)], "both", [image(3), text("and this?")], "no image"],
        ["hi", "hello"],
    ]
    rows = [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": part} for i, part in enumerate(row)]}
        for row in (turns if several else [turns[0], turns[2]])
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def load_tuned(folder: Path, rows: Path, vision: Any = "none") -> tuple[Any, Any, Prepared]:
    """Return a model with nonzero adapters, its tokenizer and the rows. vision: lora.vision."""
    source = locate(str(folder))
    tokenizer = load_tokenizer(source)
    data = prepare(DataSection(train=str(rows / "rows.jsonl"), max_length=4000), tokenizer)
    base = load_base(source, torch.float32, "cpu")
    torch.manual_seed(1)
    projectors = [] if vision == "none" else find_projectors(base)
    model = add_lora(base, LoraSection(r=4, alpha=8, vision=vision, modules_to_save=projectors), tokenizer).eval()
    for name, weight in trainable_parameters(model).items():
        if "lora_B" in name:
            weight.data.normal_(std=0.2)
    return model, tokenizer, data


def processor_inputs(processor: Any, rows: Path, messages: list[dict[str, Any]], **options: Any) -> Any:
    """Return the inputs of a conversation as transformers makes them. options: of the chat template."""
    parts = [part for turn in messages if isinstance(turn["content"], list) for part in turn["content"]]
    images = [Image.open(rows / part["path"]) for part in parts if part["type"] == "image"]
    return processor(
        text=[processor.apply_chat_template(messages, **options)], images=[images] if images else None,
        return_tensors="pt", add_special_tokens=False, padding=False,
    )  # fmt: skip


def expected_loss(model: Any, folder: Path, rows: Path, row: dict[str, Any], example: Example, token: int) -> Any:
    """Return the loss of a row with transformers' processor and forward."""
    inputs = processor_inputs(AutoProcessor.from_pretrained(folder), rows, row["messages"])
    ids = inputs["input_ids"][0, : len(example)]
    own = np.where(example.ids >= FIRST_IMAGE_ID, token, example.ids)
    assert ids.tolist() == own.tolist()
    logprobs = model(**inputs).logits[0, : len(example)].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    return -(logprobs * torch.from_numpy(example.weights[1:])).sum()


@pytest.mark.parametrize("vision", ["none", "all"])
def test_loss_and_gradients_equal_the_models_own(folder: Path, tmp_path: Path, vision: str) -> None:
    rows = write_rows(tmp_path, several=folder.name not in ONE_IMAGE)
    model, tokenizer, data = load_tuned(folder, tmp_path, vision)
    weights, examples = trainable_parameters(model), list(data.train)
    token = tokenizer.image_encoder.image_token_id
    losses = [
        expected_loss(model, folder, tmp_path, row, example, token) for row, example in zip(rows, examples, strict=True)
    ]
    expected = torch.stack(losses).sum()
    expected.backward()  # type: ignore[no-untyped-call]
    gradients = {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}
    encoders = {name for name in weights if re.search(r"\.vis[^.]*\..*lora_", name)}  # LLaVA leaves out its last layer
    assert len(encoders & gradients.keys()) >= len(encoders) / 2 > 0 if vision == "all" else not encoders
    install_images(model, tokenizer)
    step = step_for(model)
    assert (step.name == "plain") == (folder.name in PLAIN)
    features = image_features(model)
    assert features is not None and features.why_not_decoded is None
    assert bool(features.bidirectional_layers) == (folder.name in TWO_WAY)
    assert tokenizer.image_encoder.reads_several == (folder.name not in ONE_IMAGE)
    for other in (step, PlainLoss(model)):
        model.zero_grad()
        loss = other.token_loss(examples)
        loss.backward()  # type: ignore[no-untyped-call]
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert {name for name, weight in weights.items() if weight.grad is not None} == gradients.keys()
        for name, gradient in gradients.items():  # those of Gemma 4's own code are 1e-4 off fp64 on a Zen CPU
            largest = float(gradient.abs().max())
            assert float((weights[name].grad - gradient).abs().max()) <= 2e-4 * largest, name  # type: ignore[operator]
    one_by_one = sum(float(step.token_loss([example]).detach()) for example in examples)
    assert one_by_one == pytest.approx(float(expected.detach()), rel=1e-5)


def test_shared_prefixes_with_images_equal_the_plain_step(folder: Path, tmp_path: Path) -> None:
    """Two answers to each prompt share it, as in preference pairs. Layers are recomputed in the backward."""
    write_rows(tmp_path, several=folder.name not in ONE_IMAGE)
    model, tokenizer, data = load_tuned(folder, tmp_path)
    install_images(model, tokenizer)
    examples = []
    for example in data.train:
        other = example.ids.copy()
        other[-2:] = other[:2]
        examples += [example, replace(example, ids=other)]
    results = []
    for step in (step_for(model), PlainLoss(model)):
        model.zero_grad()
        if step.name == "fast":
            step.checkpoint()
        logprobs = step.log_probs(examples)
        logprobs.sum().backward()
        step.last_hidden(examples).square().sum().backward()
        step.token_loss(examples[:2]).backward()  # type: ignore[no-untyped-call]
        gradients = [weight.grad for weight in trainable_parameters(model).values() if weight.grad is not None]
        results.append((logprobs.detach(), gradients))
    (actual, gradients), (expected, expected_gradients) = results
    assert actual.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert float((gradient - other).abs().max()) <= 1e-4 * float(other.abs().max())


def test_generated_tokens_equal_transformers(folder: Path, tmp_path: Path) -> None:
    """Each turn of each row is completed: in one batch, again from the cache, and as the completion that is scored."""
    rows = write_rows(tmp_path, several=folder.name not in ONE_IMAGE)
    model, tokenizer, data = load_tuned(folder, tmp_path)
    processor = AutoProcessor.from_pretrained(folder)
    prompts, texts, logprobs, references = [], [], [], []
    for row, conversation in zip(rows, data.train_conversations, strict=True):
        for end in range(1, len(row["messages"]), 2):
            inputs = processor_inputs(processor, tmp_path, row["messages"][:end], add_generation_prompt=True)
            options: Any = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
            output = model.generate(**inputs, **options, output_logits=True)
            ids = output.sequences[0, inputs["input_ids"].shape[1] :]
            new = ids.tolist()
            stop = next((i for i, token in enumerate(new) if token in data.renderer.end_ids), len(new))
            texts.append(tokenizer.decode(new[:stop], skip_special_tokens=True))
            logprobs.append(torch.cat(output.logits).log_softmax(-1).gather(1, ids[:, None])[:, 0].numpy())
            references.append(ExpectedCompletion(ids.numpy().astype(np.int32)))
            prompts.append(data.renderer.prompt(conversation.messages[:end]))
    install_images(model, tokenizer)
    options = {"stop_ids": data.renderer.end_ids, "max_new_tokens": 8}
    for expected in ((), (), references):
        completions = generate(model, tokenizer, prompts, expected=expected, **options)
        assert [completion.text for completion in completions] == texts
    scores = [completion.logprobs for completion in completions]
    assert (scores[0] is None) == (why_decoder_unsupported(model) is not None)
    for score, reference in zip(scores, logprobs, strict=True):
        assert score is None or score == pytest.approx(reference, abs=1e-4)
    if folder.name in STATEFUL:
        with pytest.raises(ModelError, match="strop's server cannot keep the state of layers"):
            HfDecoder(model, keep=0)
    if folder.name not in (IN_SPACE | TWO_WAY) - STATEFUL:
        return
    decoders: list[Decoder] = [HfDecoder(model, keep=2000)]
    if why_decoder_unsupported(model) is None:
        decoders.append(CompiledDecoder(model, 2000))
    for decoder in [decoder for decoder in decoders for _ in range(2)]:  # the second time from the cache
        batch = Batch(decoder, len(prompts), prefill_rows=7)  # passes that end inside images, if these may be cut
        sequences = [SequenceState(ids, "default", **options, num_logprobs=0) for ids in prompts]
        tokens: dict[SequenceState, list[Token]] = {sequence: [] for sequence in sequences}
        with torch.inference_mode():
            for progress in decode_all(batch, sequences):
                tokens[progress.sequence] += progress.tokens
        for sequence, reference, scores in zip(sequences, references, logprobs, strict=True):
            assert sequence.completion == reference.ids[: len(sequence.completion)].tolist()
            new = [token.logprob for token in tokens[sequence]]
            assert new == pytest.approx(scores[: len(new)], abs=1e-4)
    assert any(sequence.num_reused for sequence in sequences)


def test_features_are_computed_once_and_read_again_with_equal_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path, several=folder.name not in ONE_IMAGE)
    results = []
    for expected_computed in (True, False):
        model, tokenizer, data = load_tuned(folder, tmp_path)
        install_images(model, tokenizer)
        features = image_features(model)
        assert features is not None
        with torch.no_grad():
            losses = [float(step_for(model).token_loss([example])) for example in data.train for _ in range(2)]
        images = len(tokenizer.image_encoder.table)
        assert features.computed == (images if expected_computed else 0)
        assert losses[::2] == losses[1::2]
        results.append(losses)
    assert results[0] == results[1]


def test_equal_texts_with_other_images_share_no_prefix(tmp_path: Path) -> None:
    folder = save_seeing(tmp_path / "model")
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (30, 30), colour).save(tmp_path / f"{name}.png")
    rows = [{"prompt": "Which colour?", "completion": "red", "image": f"{name}.png"} for name in ("a", "b", "a")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model, tokenizer, data = load_tuned(folder, tmp_path)
    install_images(model, tokenizer)
    first, second, third = data.train
    assert first.ids.tolist() == third.ids.tolist() != second.ids.tolist()
    step = step_for(model)
    with torch.no_grad():
        losses = [float(step.token_loss([example])) for example in (first, second)]
        together = float(step.token_loss([first, second]))
    assert losses[0] != losses[1] and together == pytest.approx(sum(losses), rel=1e-5)


def test_cross_attention_is_refused_by_the_names_of_its_arguments() -> None:
    model, processor = REFUSED["mllama"]()
    inputs = processor(images=[[Image.new("RGB", (30, 30))]], text=["<|image|>a"], return_tensors="pt")
    with pytest.raises(ModelError, match=r"mllama: its layers read images apart from the tokens \(.*cross_attention_s"):
        capture_embeddings(model, inputs)


def test_a_model_that_also_hears_trains_only_the_projector_of_images() -> None:
    model, _ = FAMILIES["gemma4"]()
    assert model.model.audio_tower is not None
    assert find_image_tower(model) is model.model.vision_tower
    assert find_projectors(model) == ["embed_vision"]
