"""Train on rows with images: resume, objectives, the saved adapter, merge, chat and server."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import strop
from strop.config.load import resolve
from strop.data import images
from strop.data.converters import parse_request, read_images
from strop.data.rendering.render import Renderer
from strop.data.types import Message
from strop.engine.decode import generate
from strop.engine.decode.model import _parse_messages
from strop.engine.images import install_images
from strop.errors import InputError, ModelError, RecipeError, StropError
from strop.evaluation.run import EvalOptions, evaluate_models
from strop.models.load import load_base
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from strop.runs.events import read_events
from strop.runs.folder import cache_folder
from strop.sweeping.split import Split, data_options, split_rows
from tests import ROOT
from tests.support.pages import blocks
from tests.support.runs import QUICK, run
from tests.support.seeing import COLOURS, save_seeing
from tests.support.serving import CHAT, serving
from tests.support.slow import slow_except
from tests.training.test_resume import Cut, adapter, cut_at, same

OPTIONS: dict[str, Any] = {"train.batch_size": 4, "lora.r": 4, "model.dtype": "fp32"}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeing(tmp_path_factory.mktemp("seeing") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    return write_rows(folder, [{"prompt": "Which colour?", "completion": name} for name in COLOURS for _ in range(3)])


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows with an image in the colour of the completion or the chosen answer."""
    lines = []
    for number, row in enumerate(rows):
        name = f"{number}.png"
        colour = COLOURS[row.get("completion") or row["chosen"]]
        Image.new("RGB", (20 + number, 30), colour).save(folder / name)
        lines.append(json.dumps({**row, "image": name}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "rows.jsonl"


def load_folder(folder: Path) -> dict[str, Any]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def trained(seeing: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {**OPTIONS, "train.max_steps": 60, "train.learning_rate": 0.01, "lora.vision": "projector"}
    return strop.train(model=str(seeing), data=str(rows), out=tmp_path_factory.mktemp("run") / "run", **options).folder


@pytest.mark.parametrize("vision", slow_except(["none", "projector", "all"], ["all"]))
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("idefics3", "bf16"),
        pytest.param("idefics3", "fp32", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", "fp32", marks=pytest.mark.slow),
    ],
)
def test_resume_has_equal_bits(rows: Path, tmp_path: Path, vision: str, family: str, dtype: str) -> None:
    seeing = save_seeing(tmp_path / "seeing", family)
    options = {
        **OPTIONS, "train.max_steps": 8, "train.save_steps": 2, "lora.vision": vision, "model.dtype": dtype,
        "lora.dropout": 0.1,
    }  # fmt: skip
    whole = strop.train(model=str(seeing), data=str(rows), out=tmp_path / "whole", **options).folder
    for step in (2, 6):
        folder = tmp_path / str(step)
        with pytest.raises(Cut):
            strop.train(model=str(seeing), data=str(rows), out=folder, callback=cut_at("save", step), **options)
        shutil.rmtree(cache_folder() / "features", ignore_errors=True)
        shutil.rmtree(cache_folder() / "data", ignore_errors=True)
        strop.resume(folder)
        assert same(adapter(folder), adapter(whole))
    [note] = [event["text"] for event in read_events(whole / "events.jsonl") if "images:" in event.get("text", "")]
    assert "equal to the model's own forward" in note
    trained = adapter(whole)
    assert any("connector" in name or "merger" in name for name in trained) == (vision != "none")
    encoder = [
        weight
        for name, weight in trained.items()
        if re.search(r"\.vis.*blocks|vision_model", name) and "lora_B" in name
    ]
    assert bool(encoder) == (vision == "all") and all(bool(weight.any()) for weight in encoder)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama4", "llama4: transformers fails on its images"),
        *((family, f"{family}: its processor changes the text") for family in ("idefics2", "mllama", "paligemma")),
    ],
)
def test_a_family_that_does_not_fit_is_refused_before_training(
    family: str, reason: str, rows: Path, tmp_path: Path
) -> None:
    model = save_seeing(tmp_path / family, family)
    with pytest.raises(ModelError, match=reason):
        strop.train(model=str(model), data=str(rows), out=tmp_path / "run", **OPTIONS)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_the_adapter_loads_in_peft_with_equal_logits(seeing: Path, rows: Path, trained: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(seeing)
    tuned = PeftModel.from_pretrained(model, str(trained / "adapter")).eval()
    processor = AutoProcessor.from_pretrained(trained / "adapter")
    loaded = strop.load(trained, dtype="fp32")
    image = rows.parent / "0.png"
    parts = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[[Image.open(image)]], return_tensors="pt", add_special_tokens=False)
    message = {"role": "user", "content": [{"type": "image", "path": str(image)}, parts[1]]}
    prompt = loaded.renderer.prompt(_parse_messages([message], "chat"))
    with torch.no_grad():
        expected = tuned(**inputs).logits[0]
        computed = loaded.module(input_ids=torch.from_numpy(prompt).long()[None]).logits[0]
        with loaded.base():
            base = loaded.module(input_ids=torch.from_numpy(prompt).long()[None]).logits[0]
        expected_base = AutoModelForImageTextToText.from_pretrained(seeing)(**inputs).logits[0]
    assert computed == pytest.approx(expected, abs=1e-4)
    assert base == pytest.approx(expected_base, abs=1e-4)


def test_the_card_has_code_that_runs(seeing: Path, rows: Path, trained: Path, tmp_path: Path) -> None:
    strop.merge(trained, tmp_path / "merged", measure=False, dtype="fp32")
    for folder in (trained / "adapter", tmp_path / "merged"):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "pipeline_tag: image-text-to-text" in card and "9 images" in card
        code = card.split("```python\n")[2].partition("```")[0].replace("THIS_FOLDER", str(folder))
        shown: list[Any] = []
        code = code.replace("BASE", str(seeing)).replace("picture.jpg", str(rows.parent / "3.png"))
        exec(code.replace('"text": "..."', '"text": "Which colour?"'), {"print": shown.append})
        assert "green" in shown[0][0]


def test_answers_follow_the_image(rows: Path, trained: Path, tmp_path: Path) -> None:
    model = strop.load(trained, dtype="fp32")
    images = [str(rows.parent / f"{number}.png") for number in (0, 3, 6)]
    assert model.generate(["Which colour?"] * 3, images=images) == list(COLOURS)
    assert model.generate("Which colour?", images=Image.open(images[2])) == ["blue"]
    assert model.generate("Which colour?", images=Path(images[1]).read_bytes()) == ["green"]
    history: list[Any] = []
    assert model.chat("<image>Which colour?", images=images[0], history=history) == "red"
    model.chat("And now?", history=history)
    assert len(history) == 4 and history[0]["content"][0]["image_url"]["url"].startswith("data:image/png")
    stored = json.loads(json.dumps(history))
    assert model.chat("And now?", history=stored) == model.chat("And now?", history=history)
    part = {"type": "image_url", "image_url": {"url": images[1]}}
    assert model.chat([{"role": "user", "content": [part, {"type": "text", "text": "Which colour?"}]}]) == "green"
    with pytest.raises(InputError, match="2 images for 1 messages"):
        model.generate(["x"], images=[images[0], images[1]])
    with pytest.raises(InputError, match="images: no file"):
        model.generate("x", images="absent.png")
    [result] = evaluate_models([str(trained)], str(rows), EvalOptions(dtype="fp32"))
    assert result["tuned"]["exact"] == 1.0 > result["base"]["exact"]
    assert result["samples"][0]["prompt"] == "[image 20x30]Which colour?"


def test_merge_keeps_towers_and_measures_on_images(trained: Path, seeing: Path, tmp_path: Path) -> None:
    merged = strop.merge(trained, tmp_path / "merged", dtype="fp32")
    assert merged.parity is not None and merged.parity.passed and merged.parity.kl_mean < 1e-6
    before, after = load_file(seeing / "model.safetensors"), load_folder(tmp_path / "merged")
    tower = [name for name in before if ".vision_model." in name]
    assert tower and all(torch.equal(before[name], after[name]) for name in tower)
    connector = [name for name in before if ".connector." in name]
    assert connector and not any(torch.equal(before[name], after[name]) for name in connector)
    assert AutoProcessor.from_pretrained(tmp_path / "merged").image_processor is not None


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_preferences_with_images(seeing: Path, tmp_path: Path, objective: str) -> None:
    names = list(COLOURS)
    pairs = [
        {"prompt": "Which colour?", "chosen": name, "rejected": names[i - 1]} for i, name in enumerate(names)
    ] * 3  # fmt: skip
    data = write_rows(tmp_path, pairs)
    options = {**OPTIONS, "train.objective": objective, "train.max_steps": 20, "train.learning_rate": 0.01}
    done = strop.train(model=str(seeing), data=str(data), out=tmp_path / "run", **options)
    losses = [event["loss"] for event in read_events(done.folder / "events.jsonl") if event["event"] == "step"]
    assert losses[-1] < losses[0]


def test_rewards_with_images(seeing: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def short(completion, row):\n    return -len(completion)\n", encoding="utf-8")
    options = {
        **OPTIONS, "train.objective": "grpo", "train.rewards": f"{tmp_path}/reward.py:short", "train.max_steps": 2,
        "train.group": 2, "train.answer_tokens": 4,
    }  # fmt: skip
    done = strop.train(model=str(seeing), data=str(rows), out=tmp_path / "run", **options)
    assert done.report["steps"] == 2


def test_models_without_eyes_are_refused(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(StropError, match="9 of 9 training rows cannot be used") as error:
        strop.train(model=str(tiny_folder), data=str(rows), out=tmp_path / "run", **OPTIONS)
    assert "choose a model that reads images" in str(error.value)
    with pytest.raises(RecipeError, match="has no image encoder"):
        strop.train(
            model=str(tiny_folder), data=str(rows), out=tmp_path / "run", **OPTIONS, **{"lora.vision": "projector"}
        )


def test_gguf_is_refused_and_a_script_is_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("export", "gguf", trained, "--out", tmp_path / "model.gguf", capsys=capsys)
    assert code == 2 and "was trained on images" in err and "mmproj" in err
    code, _, err = run("export-script", trained, "--out", tmp_path / "script", capsys=capsys)
    assert code == 0 and (tmp_path / "script" / "images").is_dir(), err


def test_plan_and_train_on_the_terminal(
    seeing: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", seeing, "--data", rows, "--lora.vision", "projector", *QUICK)
    code, out, err = run("plan", *words, capsys=capsys)
    assert code == 0 and "fast step" in out + err
    code, out, err = run("train", *words, "--out", tmp_path / "run", capsys=capsys)
    assert code == 0 and "fast step" in out + err and "['connector']" in out + err


def test_served_to_openai_clients(trained: Path, rows: Path) -> None:
    openai = pytest.importorskip("openai")
    content = (rows.parent / "3.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(content).decode()

    def message(image: str) -> list[dict[str, Any]]:
        parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "Which colour?"}]
        return [{"role": "user", "content": parts}]

    with serving(trained, "--dtype", "fp32") as server:
        model = trained.name
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
            answer = client.chat.completions.create(model=model, messages=message(url), temperature=0, max_tokens=8)
            assert answer.choices[0].message.content == "green"
            assert answer.usage.prompt_tokens > 20
            parts = client.chat.completions.create(
                model=model, messages=message(url), temperature=0, max_tokens=8, stream=True
            )
            assert "".join(part.choices[0].delta.content or "" for part in parts) == "green"
        for image, text in (
            (str(rows.parent / "3.png"), "only data URLs are read here, not files"),
            ("file:///etc/passwd", "only data URLs are read here, not files"),
            ("http://example.com/a.png", "http://example.com/a.png"),
            ("data:image/png;base64,AAAA", "not an image of a known format"),
        ):
            response = server.post(CHAT, {"model": model, "messages": message(image)})
            assert response.status_code == 400 and text in response.json()["error"]["message"]
        response = server.post(CHAT, {"model": "base", "messages": message(url)})
        assert response.status_code == 400 and "serve the other model by itself" in response.json()["error"]["message"]
        assert requests.get(server.url + "/health", timeout=10).ok


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # GLM-4V's processor
@pytest.mark.parametrize(
    "family", slow_except(["qwen2_5_vl", "qwen3_vl_moe", "glm4v", "gemma3", "gemma4-31b"], ["gemma3"])
)
def test_positions_in_space_and_two_way_attention_are_served(rows: Path, tmp_path: Path, family: str) -> None:
    """Two images in two turns, whose first turn is in the cache: as `generate`, which is compared with transformers."""
    openai = pytest.importorskip("openai")
    folder = save_seeing(tmp_path / family, family)
    text = "Which colour is it, and which is it not, if you look at each of its corners?"
    files = [rows.parent / f"{number}.png" for number in (0, 4)]
    model = strop.load(str(folder), dtype="fp32")
    history, turns, answers = [], list[Any](), list[str]()
    with (
        serving(folder, "--dtype", "fp32") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client,
    ):
        for file in files:
            url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
            parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
            history.append({"role": "user", "content": parts})
            answer = client.chat.completions.create(model=family, messages=history, temperature=0, max_tokens=8)
            answers.append(answer.choices[0].message.content or "")
            history.append({"role": "assistant", "content": answers[-1]})
        assert server.metric("strop_kept_tokens_total") >= 32
        assert server.chat("hello there", family, temperature=0, max_tokens=8).status_code == 200
    expected = [model.chat(f"<image>{text}", images=str(f), history=turns, max_new_tokens=8) for f in files]
    assert answers == expected


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_rewards_and_later_layers_with_a_trained_projector(rows: Path, tmp_path: Path, family: str) -> None:
    """Completions are sampled in inference mode, whose tensors cannot be in a backward."""
    model = save_seeing(tmp_path / "model", family)
    objective: dict[str, Any] = {"train.objective": "grpo", "train.rewards": "contains", "train.answer_tokens": 4}
    options = {**OPTIONS, "lora.vision": "projector", "train.max_steps": 2, **(objective if family == "llava" else {})}
    done = strop.train(model=str(model), data=str(rows), out=tmp_path / "run", **options)
    assert done.report["steps"] == 2


def test_features_of_a_quantized_encoder_are_kept_apart(rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    model = save_seeing(tmp_path / "model", "llava")
    losses = {}
    for name, scheme in (("first", "none"), ("quantized", "nf4"), ("again", "none")):
        if name == "again":
            assert len(list((tmp_path / "cache" / "features").iterdir())) == 2
        options = {**OPTIONS, "train.max_steps": 2, "model.quantization": scheme}
        done = strop.train(model=str(model), data=str(rows), out=tmp_path / name, **options)
        losses[name] = done.report["loss"]
    assert losses["first"] == losses["again"] != losses["quantized"]


@pytest.mark.parametrize("stop_at", [2, 5])  # while the base answers, and while the adapter does
def test_an_interrupted_comparison_has_the_same_rows_on_both_sides(
    trained: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_all = generate.decode_all

    def one_by_one(batch: Any, sequences: Any) -> Any:
        return (progress for sequence in sequences for progress in decode_all(batch, [sequence]))

    monkeypatch.setattr(generate, "decode_all", one_by_one)
    model = strop.load(trained, dtype="fp32")
    texts = ("Which colour?", "What is it?", "Name the colour of it.")
    prompts = [model.renderer.prompt([Message("user", text)]) for text in texts]

    def interrupt(done: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    complete = model.answer(prompts, max_new_tokens=4, both=True)
    answers = model.answer(prompts, max_new_tokens=4, both=True, partial=True, advance=interrupt)
    rows = len(answers) // 2
    assert 0 < rows < 3
    assert answers == complete[:rows] + complete[3:][:rows]


def test_an_added_adapter_brings_its_projector(seeing: Path, rows: Path, trained: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "train.max_steps": 2}
    plain = strop.train(model=str(seeing), data=str(rows), out=tmp_path / "plain", **options).folder
    image = str(rows.parent / "3.png")
    alone = strop.load(trained, dtype="fp32").generate("Which colour?", images=image)
    model = strop.load(plain, dtype="fp32")
    before = model.generate("Which colour?", images=image, max_new_tokens=8)
    model.add(str(trained))
    model.use(str(trained))
    assert model.generate("Which colour?", images=image) == alone == ["green"]
    model.use(str(plain))
    assert model.generate("Which colour?", images=image, max_new_tokens=8) == before
    with pytest.raises(RecipeError, match="the adapter to start from was trained with none"):
        more: dict[str, Any] = {"lora.vision": "projector", "model.adapter": str(plain)}
        strop.train(model=str(seeing), data=str(rows), out=tmp_path / "more", **options, **more)


def test_a_trained_encoder_is_merged_and_trained_further(seeing: Path, rows: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "train.max_steps": 6, "train.learning_rate": 0.01, "lora.vision": "all"}
    done = strop.train(model=str(seeing), data=str(rows), out=tmp_path / "run", **options)
    merged = strop.merge(done.folder, tmp_path / "merged", dtype="fp32")
    assert merged.parity is not None and merged.parity.passed and merged.parity.kl_mean < 1e-6
    before, after = load_file(seeing / "model.safetensors"), load_folder(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    encoder = {name for name in before if re.search(r"vision_model.*layers.*(proj|fc.)\.weight", name)}
    assert encoder and {name for name in changed if "vision_model" in name} == encoder
    image = str(rows.parent / "3.png")
    models = (done.folder, tmp_path / "merged")
    answers = [strop.load(one, dtype="fp32").generate("Which colour?", images=image) for one in models]
    assert answers[0] == answers[1]
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(seeing), str(done.folder / "adapter"))
    assert [name for name, _ in model.named_parameters() if "vision_model" in name and "lora_" in name]
    more = {**OPTIONS, "train.max_steps": 2, "model.adapter": str(done.folder)}
    further = strop.train(model=str(seeing), data=str(rows), out=tmp_path / "more", **more).folder
    old, new = adapter(done.folder), adapter(further)
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old if "vision_model" in name and "lora_B" in name)
    with pytest.raises(RecipeError, match="the adapter to start from was trained with all"):
        strop.train(model=str(seeing), data=str(rows), out=tmp_path / "no", **more, **{"lora.vision": "projector"})


def test_the_output_head_of_a_model_with_images_is_adapted(rows: Path, tmp_path: Path) -> None:
    model = save_seeing(tmp_path / "model", "llava")
    options = {**OPTIONS, "train.max_steps": 2, "lora.target_modules": ["q_proj", "lm_head"]}
    done = strop.train(model=str(model), data=str(rows), out=tmp_path / "run", **options)
    assert [name for name in adapter(done.folder) if "lm_head" in name]
    assert not [name for name in adapter(done.folder) if "vision" in name]


def test_gemma4_in_bf16_trains_its_encoder_and_is_merged(rows: Path, tmp_path: Path) -> None:
    """Its projector is called by keyword, and its encoder converts pixels to the dtype of a weight."""
    model = save_seeing(tmp_path / "model", "gemma4")
    options = {**OPTIONS, "train.max_steps": 2, "lora.vision": "all", "model.dtype": "bf16"}
    done = strop.train(model=str(model), data=str(rows), out=tmp_path / "run", **options)
    merged = strop.merge(done.folder, tmp_path / "merged", dtype="fp32")
    assert merged.parity is not None and merged.parity.passed


def test_adjacent_images_are_trained_on(rows: Path, tmp_path: Path) -> None:
    """The check before the first step needs text after the first image: such rows have none."""
    model = save_seeing(tmp_path / "model", "llava")
    row = {"images": [str(rows.parent / "0.png"), str(rows.parent / "1.png")], "prompt": "Same?", "completion": "yes"}
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(row)}\n" * 2, encoding="utf-8")
    options = {**OPTIONS, "train.max_steps": 1}
    done = strop.train(model=str(model), data=str(file), out=tmp_path / "run", **options)
    assert done.report["steps"] == 1


@pytest.mark.parametrize("vision", ["none", "projector", "all"])
def test_plan_counts_what_is_trained(seeing: Path, rows: Path, tmp_path: Path, vision: str) -> None:
    options = {**OPTIONS, "train.max_steps": 1, "lora.vision": vision}
    planned = strop.plan(model=str(seeing), data=str(rows), **options).workload.adapter_weights
    done = strop.train(model=str(seeing), data=str(rows), out=tmp_path / "run", **options)
    assert planned == sum(tensor.numel() for tensor in adapter(done.folder).values())


def save_peft(seeing: Path, folder: Path, targets: Any) -> Path:
    base = AutoModelForImageTextToText.from_pretrained(seeing)
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_of_peft_with_an_encoder_are_trained_further(
    seeing: Path, rows: Path, tmp_path: Path, targets: Any
) -> None:
    start = save_peft(seeing, tmp_path / "start", targets)
    options = {**OPTIONS, "lora.r": 2, "train.max_steps": 2, "model.adapter": str(start)}
    done = strop.train(model=str(seeing), data=str(rows), out=tmp_path / "run", **options).folder
    saved = load_file(start / "adapter_model.safetensors")
    changed = [name for name, x in adapter(done).items() if not torch.equal(x, saved[name])]
    assert adapter(done).keys() == saved.keys() and [name for name in changed if "vision_model" in name]
    notes = [event["text"] for event in read_events(done / "events.jsonl") if event["event"] == "note"]
    assert [text for text in notes if "its text model and the image encoder are trained" in text]


def test_settings_for_images_without_effect_are_refused(seeing: Path, rows: Path, tmp_path: Path) -> None:
    start = save_peft(seeing, tmp_path / "start", ["q_proj", "v_proj"])
    only = save_peft(seeing, tmp_path / "only", r".*vision_model.*q_proj")
    text = tmp_path / "text.jsonl"
    text.write_text('{"prompt": "a", "completion": "b"}\n' * 2, encoding="utf-8")
    options = {**OPTIONS, "lora.r": 2}
    for data, more, message in (
        (rows, {"model.adapter": str(start), "lora.vision": "none"}, "was trained with all"),
        (rows, {"model.adapter": str(only)}, "adapts only the image encoder"),
        (text, {"lora.vision": "projector"}, "no row has an image"),
    ):
        with pytest.raises(StropError, match=message):
            strop.train(model=str(seeing), data=str(data), out=tmp_path / "run", **options, **more)


def test_sweeps_find_images_next_to_the_rows(seeing: Path, rows: Path, tmp_path: Path) -> None:
    file = rows.parent / "many.jsonl"
    lines = [{"prompt": f"Which colour {n}?", "completion": "red", "image": f"{n % 9}.png"} for n in range(120)]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    resolved = resolve(None, {"model.name": str(seeing), "data.train": str(file)})
    split = split_rows(resolved, tmp_path / "data", selection=None, test=None, metric="exact")
    restored = Split.from_json(split.as_json(), tmp_path / "data")
    options = data_options(restored, resolved.recipe.data)
    assert options["data.image_folder"] == str(rows.parent)
    train = {"data": options["data.train"], "data.image_folder": options["data.image_folder"]}
    assert strop.check(model=str(seeing), **train)["refusal"] is None


def test_next_command_after_an_evaluation_on_images(
    rows: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run("eval", trained, "--data", rows, "--dtype", "fp32", capsys=capsys)
    assert code == 0 and "strop merge" in out + err and "gguf" not in out + err


def test_biases_of_the_encoder_stay_frozen(seeing: Path, rows: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "train.max_steps": 2, "lora.bias": "all"}
    done = strop.train(model=str(seeing), data=str(rows), out=tmp_path / "run", **options)
    base = load_file(seeing / "model.safetensors")
    for name, tensor in adapter(done.folder).items():
        if "vision_model" in name:
            assert torch.equal(tensor, base[name.removeprefix("base_model.model.")])
    [note] = [x["text"] for x in read_events(done.folder / "events.jsonl") if "its text model is" in x.get("text", "")]
    assert note.startswith("idefics3: its text model is trained")


def test_a_flood_of_images_leaves_those_of_waiting_requests(seeing: Path, monkeypatch: Any) -> None:
    tokenizer = load_tokenizer(locate(str(seeing)))
    model = load_base(locate(str(seeing)), torch.float32, "cpu")
    features = install_images(model, tokenizer)
    assert features is not None
    monkeypatch.setattr(images, "MAX_IN_MEMORY_BYTES", 1000)
    renderer = Renderer(tokenizer)

    def ask(colour: tuple[int, int, int]) -> Any:
        part = {"type": "image_url", "image_url": {"url": png(colour)}}
        request = parse_request({"messages": [{"role": "user", "content": [part]}]})
        return renderer.prompt(read_images(request, None).messages)

    waiting = ask((1, 2, 3))
    held = features.images_of(waiting)
    again = [ask((n, 0, 0)) for n in range(60)]
    [(number, _)] = held
    assert renderer.image_table is not None and renderer.image_table.images[number].path == ""
    features.load(held)
    assert features.computed == 1
    assert ask((1, 2, 3)).tolist() == waiting.tolist() != again[-1].tolist()


def png(colour: tuple[int, int, int]) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_the_guide_works_from_its_first_command_to_its_last(
    seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of docs/images.md run in order, with a tiny model."""
    monkeypatch.chdir(tmp_path)
    page = list(blocks(ROOT / "docs" / "images.md"))
    [shown_row] = [block.text for block in page if block.language == "jsonl"]
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(1, 13):
        Image.new("RGB", (20, 20 + number), (20 * number, 100, 100)).save(tmp_path / "images" / f"{number}.jpg")
        rows.append(shown_row.strip().replace("images/1.jpg", f"images/{number}.jpg") + "\n")
    for name in ("receipts", "held-out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("/image images/1.jpg\nWhat was bought?\n"))
    shown: list[Any] = []
    for block in page:
        if block.language == "python":
            exec(block.text, {"print": shown.append})
        for words in block.commands:
            if words[0] != "strop":
                continue
            words = [str(seeing) if word.startswith("HuggingFaceTB/") else word for word in words[1:]]
            code, _, err = run(*words, *(QUICK if words[0] == "train" else ()), capsys=capsys)
            assert not code, err
    assert len(shown) == 1 and len(shown[0]) == 1


def test_an_image_after_an_answer_is_evaluated(seeing: Path, tmp_path: Path) -> None:
    """The ids of an image's features are beyond the vocabulary, and were looked up in the logits of expected tokens."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    look = [{"type": "image", "path": "red.png"}, {"type": "text", "text": "and?"}]
    turns = [("user", "hi"), ("assistant", "red"), ("user", look), ("assistant", "red")]
    row = json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 2, encoding="utf-8")
    data = str(tmp_path / "rows.jsonl")
    [result] = evaluate_models([str(seeing)], data, EvalOptions(dtype="fp32", max_new_tokens=1))
    options = {**OPTIONS, "data.eval": data, "train.max_steps": 1, "train.learning_rate": 1e-12}
    trained = strop.train(model=str(seeing), data=data, out=tmp_path / "run", **options)
    assert result["base"]["loss"] == pytest.approx(trained.report["eval_loss"], rel=1e-5)


def test_image_of_three_tokens_is_trained_on(tmp_path: Path) -> None:
    """Its grid (1, 3) has the shape of its token ids."""
    base = save_seeing(tmp_path / "base", "qwen2_vl")
    Image.new("RGB", (48, 16), "red").save(tmp_path / "wide.png")
    content = [{"type": "image", "path": "wide.png"}, {"type": "text", "text": "Which colour?"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    options = {"train.max_steps": 1, "model.dtype": "fp32", "out": tmp_path / "run"}
    run = strop.train(model=str(base), data=str(tmp_path / "rows.jsonl"), **options)
    assert run.report["steps"] == 1
