"""The time of the image encoder in a plan."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor

import strop
from strop.config.schema import DataSection
from strop.data.prepare import prepare
from strop.engine.images import image_features, install_images
from strop.models.load import load_base
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from strop.planning import images
from strop.planning.activations import MicroBatch, encoder_bytes
from strop.planning.images import ImageLoad
from strop.planning.memory import train_phase
from tests.support.seeing import save_seeing

SIZES = [(50, 30), (30, 50), (64, 64)]


def write_rows(folder: Path) -> Path:
    rows = []
    for number, size in enumerate(SIZES):
        Image.new("RGB", size).save(folder / f"{number}.png")
        rows += 2 * [{"prompt": "Which colour?", "completion": "red", "image": f"{number}.png"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "rows.jsonl"


@pytest.mark.parametrize("family", ["idefics3", "gemma4", "qwen3_5", "qwen2_5_vl", "lfm2_vl", "llava-pixtral"])
def test_flops_are_near_those_of_the_encoder(family: str, tmp_path: Path) -> None:
    source = locate(str(save_seeing(tmp_path / family, family)))
    tokenizer = load_tokenizer(source)
    assert ImageLoad.measure(tokenizer.image_encoder, source) is None
    prepare(DataSection(train=str(write_rows(tmp_path))), tokenizer)
    load = ImageLoad.measure(tokenizer.image_encoder, source)
    model = load_base(source, torch.float32, "cpu")
    install_images(model, tokenizer)
    features = image_features(model)
    assert features is not None and load is not None and load.images == len(SIZES)
    # Before 2.15, torch counts attention on a CPU only as products of matrices.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for number in range(len(SIZES)):
            features.of_image(number)
    assert load.flops == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert load.in_tower == family.startswith("qwen")


def plan(tmp_path: Path, family: str = "idefics3", **options: Any) -> Any:
    model = tmp_path / family
    if not model.exists():
        save_seeing(model, family)
    return strop.plan(model=str(model), data=str(write_rows(tmp_path)), **options)


def test_each_image_is_counted_once(tmp_path: Path) -> None:
    one, two = (plan(tmp_path, **{"train.epochs": epochs}) for epochs in (1, 2))
    encoding = one.data["image_seconds"]
    assert one.data["images"] == 3 and 0 < encoding < one.seconds
    assert two.data["image_seconds"] == encoding
    assert two.seconds - encoding == pytest.approx(2 * (one.seconds - encoding))
    trained = plan(tmp_path, **{"train.epochs": 2, "lora.vision": "projector"})
    assert trained.data["image_seconds"] == encoding
    assert "for the image encoder on 3 images" in str(one)


def test_a_trained_encoder_needs_memory_for_the_largest_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SIZES", [(64, 64), (640, 320)])
    options = {"model.dtype": "fp32", "train.max_steps": 1}
    frozen, trained = (plan(tmp_path, "qwen3_5", **{"lora.vision": part, **options}) for part in ("projector", "all"))
    shape = trained.workload.shape
    processor = AutoImageProcessor.from_pretrained(tmp_path / "qwen3_5")
    patches = processor(Image.new("RGB", (640, 320)), return_tensors="pt")["pixel_values"].shape[0]
    assert frozen.workload.shape.image_patches == 0 and shape.image_patches == patches
    base = trained.workload.base
    large = replace(trained.workload, base=replace(base, shape=replace(shape, image_patches=1000 * patches)))
    batch = MicroBatch.rows([64])
    assert encoder_bytes(large) == 1000 * encoder_bytes(trained.workload)
    peaks = [train_phase(workload, batch).peak_bytes for workload in (trained.workload, large)]
    assert peaks[1] - peaks[0] == pytest.approx(encoder_bytes(large), rel=0.02)


def test_a_projector_in_the_encoder_is_counted_in_each_epoch(tmp_path: Path) -> None:
    once = plan(tmp_path, "qwen3_5").data["image_seconds"]
    for steps in ({"train.epochs": 3}, {"train.max_steps": 9, "train.batch_size": 2}):
        seconds = plan(tmp_path, "qwen3_5", **{"lora.vision": "projector", **steps}).data["image_seconds"]
        assert seconds == pytest.approx(3 * once)
        seconds = plan(tmp_path, "qwen3_5", **{"lora.vision": "all", **steps}).data["image_seconds"]
        assert seconds == pytest.approx(3 * 3 * once)  # forward, again in the backward pass, and that


def test_an_encoder_with_unknown_layers_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_PATCH_WEIGHT", re.compile("absent"))
    result = plan(tmp_path)
    assert result.data["images"] == 3 and result.data["image_seconds"] is None
    assert "without the image encoder on 3 images" in str(result)
