"""Tiny random models that read images, of each family with its processor.

A new family needs one function of FAMILIES: it returns a model and a processor.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from tests.support.families import tokenizer

# as SmolVLM's: messages with a string or parts, and one MARK for each image
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SIDE = 32  # of a tile, in pixels; an image has four tiles and a global one, or only that one if it is small
TILE_TOKENS = 4
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": 8,
}  # fmt: skip
COLOURS = {"red": (200, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 200)}
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def save_seeing(folder: Path, family: str = "idefics3") -> Path:
    """Save a tiny model with a ChatML tokenizer, an image processor and SmolVLM's kind of chat template."""
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    model.eval()
    with torch.no_grad():
        for weight in model.parameters():  # larger than the default initialisation, so that predictions differ
            if weight.dim() == 2:
                weight.mul_(4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, "extra_special_tokens": processor.tokenizer.named}), encoding="utf-8")
    return folder


def _words(*special: str, **named: str) -> Any:
    """Return a tokenizer with more special tokens. named: attributes of the tokenizer that processors read."""
    words = copy.deepcopy(tokenizer("chatml"))
    words.add_special_tokens({"additional_special_tokens": [*special]})
    for name, token in named.items():
        setattr(words, name, token)
        setattr(words, f"{name}_id", words.convert_tokens_to_ids(token))
    words.named = named
    return words


def _id(words: Any, token: str) -> int:
    return int(words.convert_tokens_to_ids(token))


def _template(mark: str) -> str:
    return TEMPLATE.replace("MARK", mark)


def _idefics3() -> tuple[Any, Any]:
    words = _words("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *TILES)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=True
    )
    text = {**TEXT, "model_type": "llama", "vocab_size": len(words), "tie_word_embeddings": True}
    config = transformers.Idefics3Config(
        text_config=text, vision_config=VISION, scale_factor=2, tie_word_embeddings=True,
        image_token_id=_id(words, "<image>"),
    )  # fmt: skip
    processor = Idefics3Processor(images, words, image_seq_len=TILE_TOKENS, chat_template=_template("<image>"))
    return transformers.Idefics3ForConditionalGeneration(config), processor


def _smolvlm() -> tuple[Any, Any]:
    words = _words("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *TILES)
    text = {**TEXT, "model_type": "llama", "vocab_size": len(words)}
    config = transformers.SmolVLMConfig(
        text_config=text, vision_config=VISION, scale_factor=2, image_token_id=_id(words, "<image>")
    )
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**sizes), words, transformers.SmolVLMVideoProcessor(**sizes),
        image_seq_len=TILE_TOKENS, chat_template=_template("<image>"),
    )  # fmt: skip
    return transformers.SmolVLMForConditionalGeneration(config), processor


def _llava() -> tuple[Any, Any]:
    words = _words("<image>")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(vocab_size=len(words), **TEXT),
        image_token_index=_id(words, "<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE), words, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=_template("<image>"),
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor


def _llava_onevision() -> tuple[Any, Any]:
    words, grid = _words("<image>", "<video>"), [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION),
        text_config=transformers.Qwen2Config(vocab_size=len(words), **TEXT),
        image_token_index=_id(words, "<image>"), video_token_index=_id(words, "<video>"), image_grid_pinpoints=grid,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid), words,
        transformers.LlavaOnevisionVideoProcessor(size=size), num_image_tokens=16,
        vision_feature_select_strategy="full", chat_template=_template("<image>"),
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    special = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    words = _words(*special.values(), **special)
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**{**VISION, "image_size": [SIDE, SIDE], "patch_size": [8, 8]}),
        text_config=transformers.Qwen2Config(vocab_size=len(words), **TEXT),
        image_token_id=_id(words, "<IMG_CONTEXT>"),
    )
    size = {"height": SIDE, "width": SIDE}
    images = transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = transformers.InternVLProcessor(
        images, words, transformers.InternVLVideoProcessor(size=size), image_seq_length=TILE_TOKENS,
        chat_template=_template("<IMG_CONTEXT>"),
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config), processor


def _mistral3() -> tuple[Any, Any]:
    words = _words("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**{**VISION, "head_dim": 8}),
        text_config=transformers.MistralConfig(vocab_size=len(words), **TEXT),
        image_token_index=_id(words, "[IMG]"), spatial_merge_size=2, vision_feature_layer=-1,
    )  # fmt: skip
    images = transformers.PixtralImageProcessor(size={"longest_edge": 2 * SIDE}, patch_size={"height": 8, "width": 8})
    processor = transformers.PixtralProcessor(
        images, words, patch_size=8, spatial_merge_size=2, chat_template=_template("[IMG]")
    )
    return transformers.Mistral3ForConditionalGeneration(config), processor


def _lfm2_vl() -> tuple[Any, Any]:
    tiles = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)]
    words = _words("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *tiles)
    config = transformers.Lfm2VlConfig(
        vision_config=transformers.Siglip2VisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=8,
            num_patches=16,
        ),
        text_config=transformers.Lfm2Config(
            vocab_size=len(words), **{**TEXT, "layer_types": ["conv", "full_attention"]}
        ),
        image_token_id=_id(words, "<image>"), downsample_factor=2, projector_hidden_size=32,
    )  # fmt: skip
    images = transformers.Lfm2VlImageProcessor(
        downsample_factor=2, encoder_patch_size=8, tile_size=SIDE, min_tiles=2, max_tiles=4, max_image_tokens=16,
        min_image_tokens=4, do_image_splitting=True, max_num_patches=64,
    )  # fmt: skip
    processor = transformers.Lfm2VlProcessor(images, words, chat_template=_template("<image>"))
    return transformers.Lfm2VlForConditionalGeneration(config), processor


def _gemma3() -> tuple[Any, Any]:
    special = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    words = _words(*special.values(), **special)
    text = transformers.Gemma3TextConfig(
        vocab_size=len(words), sliding_window=8, layer_types=["sliding_attention", "full_attention"], **TEXT
    )
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION), text_config=text, mm_tokens_per_image=4,
        image_token_index=_id(words, "<image_soft_token>"), boi_token_index=_id(words, "<start_of_image>"),
        eoi_token_index=_id(words, "<end_of_image>"),
    )  # fmt: skip
    images = transformers.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = transformers.Gemma3Processor(
        images, words, image_seq_length=4, chat_template=_template("<start_of_image>")
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def _qwen(version: str, vision: dict[str, Any]) -> tuple[Any, Any]:
    words = _words("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "patch_size": 8}
    config = getattr(transformers, f"{version}Config")(
        vision_config={**sizes, "out_hidden_size": 32, **vision},
        text_config={**TEXT, "vocab_size": len(words), "rope_parameters": rope, "rope_scaling": rope},
        image_token_id=_id(words, "<|image_pad|>"), video_token_id=_id(words, "<|video_pad|>"),
        vision_start_token_id=_id(words, "<|vision_start|>"), vision_end_token_id=_id(words, "<|vision_end|>"),
    )  # fmt: skip
    video = "Qwen3VL" if version.startswith("Qwen3") else "Qwen2VL"
    images = transformers.Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 256, "longest_edge": 64 * 64})
    processor = getattr(transformers, f"{version}Processor")(
        images, words, getattr(transformers, f"{video}VideoProcessor")(),
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    return getattr(transformers, f"{version}ForConditionalGeneration")(config), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "mistral3": _mistral3,
    "lfm2_vl": _lfm2_vl,
    "gemma3": _gemma3,
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VL", {"window_size": 32, "fullatt_block_indexes": [1]}),
    "qwen3_vl": lambda: _qwen("Qwen3VL", {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}),
}

PLAIN = {"gemma3", "qwen2_5_vl", "qwen3_vl"}  # families whose images need the model's own forward
ONE_IMAGE = {"llava_onevision"}  # families that cut a single image only, so that rows have at most one
NAMES = {  # of checkpoints that people use
    "idefics3": "SmolVLM, Idefics 3", "smolvlm": "SmolVLM2", "llava": "LLaVA 1.5", "llava_onevision": "LLaVA-OneVision",
    "internvl": "InternVL 2.5, 3", "mistral3": "Mistral Small 3.1, Pixtral", "lfm2_vl": "LFM2-VL",
    "gemma3": "Gemma 3 (4B and larger)", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL",
}  # fmt: skip
TABLE = """## Images

Models whose images are tested, on tiny random checkpoints with their processors: loss and gradients equal those of
transformers from the pixels, with one and several images, and so do generated tokens ([train on images](images.md)).
Other models with a processor in transformers work too if the check before the first step accepts them.

| model | type | step | images in a row | `strop serve` |
|---|---|---|---|---|
"""


def seeing_rows(folder: Path, number: int) -> Path:
    """Write rows of which every second one has an image in the colour of its answer, and return their file."""
    folder.mkdir(parents=True)
    lines = []
    for place in range(number):
        name, colour = list(COLOURS.items())[place % len(COLOURS)]
        row = {"prompt": f"Say {name}.", "completion": name}
        if place % 2 == 0:
            Image.new("RGB", (20 + place, 30), colour).save(folder / f"{place}.png")
            row |= {"prompt": "Which colour?", "image": f"{place}.png"}
        lines.append(json.dumps(row) + "\n")
    file = folder / "rows.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def table() -> str:
    """Return the section of docs/models.md on images."""
    rows = []
    for family, name in NAMES.items():
        step = "plain" if family in PLAIN else "fast"
        images, serve = "one" if family in ONE_IMAGE else "several", "vLLM" if family in PLAIN else "yes"
        rows.append(f"| {name} | {family} | {step} | {images} | {serve} |\n")
    return TABLE + "".join(rows)
