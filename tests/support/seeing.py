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
    model, processor = {**FAMILIES, **REFUSED}[family]()
    model.eval()
    with torch.no_grad():
        for weight in model.parameters():  # larger than the default initialisation, so that predictions differ
            if weight.dim() == 2 and not weight.any():  # Gemma 3's projector, whose features would be 0
                weight.normal_(std=0.1)
            elif weight.dim() == 2:
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
    words.add_tokens(["\n\n", "\n\n\n\n"])  # as Gemma's; the text of an image begins and ends with the first one
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


def _gemma4(attention: str | None, **text: Any) -> tuple[Any, Any]:
    special = {
        "boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>",
        "boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>",
    }  # fmt: skip
    words = _words(*special.values(), "<|video|>", **special)
    ids = {f"{name}_id": _id(words, token) for name, token in special.items() if name != "eoa_token"}
    text_config = transformers.Gemma4TextConfig(
        vocab_size=len(words), vocab_size_per_layer_input=len(words), sliding_window=8, global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 2, use_bidirectional_attention=attention,
        **{**TEXT, "num_hidden_layers": 4, "tie_word_embeddings": True}, **text,
    )  # fmt: skip
    sizes = {"patch_size": 4, "pooling_kernel_size": 2}
    audio = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "output_proj_dims": 48}
    if attention is not None:  # only the small models hear
        ids = {name: value for name, value in ids.items() if name not in ("boa_token_id", "audio_token_id")}
    config = transformers.Gemma4Config(
        vision_config=transformers.Gemma4VisionConfig(
            **{**VISION, **sizes}, num_key_value_heads=4, head_dim=8, position_embedding_size=256, standardize=True
        ),
        text_config=text_config, audio_config=None if attention else audio, video_token_id=_id(words, "<|video|>"),
        eoa_token_index=_id(words, "<audio|>"), **ids,
    )  # fmt: skip
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(), transformers.Gemma4ImageProcessor(**sizes, max_soft_tokens=70),
        words, transformers.Gemma4VideoProcessor(), chat_template=_template("<|image|>"), image_seq_length=70,
    )  # fmt: skip
    return transformers.Gemma4ForConditionalGeneration(config), processor


def _qwen(version: str, vision: dict[str, Any], reader: str = "Qwen3VL", **text: Any) -> tuple[Any, Any]:
    """reader: the start of the names of its processors."""
    words = _words("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "patch_size": 8}
    config = getattr(transformers, f"{version}Config")(
        vision_config={**sizes, "out_hidden_size": 32, **vision},
        text_config={**TEXT, "vocab_size": len(words), "rope_parameters": rope, "rope_scaling": rope, **text},
        image_token_id=_id(words, "<|image_pad|>"), video_token_id=_id(words, "<|video_pad|>"),
        vision_start_token_id=_id(words, "<|vision_start|>"), vision_end_token_id=_id(words, "<|vision_end|>"),
    )  # fmt: skip
    video = "Qwen3VL" if reader == "Qwen3VL" else "Qwen2VL"
    images = transformers.Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 256, "longest_edge": 64 * 64})
    processor = getattr(transformers, f"{reader}Processor")(
        images, words, getattr(transformers, f"{video}VideoProcessor")(),
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    return getattr(transformers, f"{version}ForConditionalGeneration")(config), processor


def _glm4v() -> tuple[Any, Any]:
    tokens = {f"{kind}_{part}token": f"<|{name}|>" for kind, part, name in (
        ("image", "", "image"), ("image", "start_", "begin_of_image"), ("image", "end_", "end_of_image"),
        ("video", "", "video"), ("video", "start_", "begin_of_video"), ("video", "end_", "end_of_video"),
    )}  # fmt: skip
    words = _words(*tokens.values())
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = transformers.Glm4vConfig(
        vision_config={**VISION, "depth": 2, "num_heads": 4, "out_hidden_size": 32},
        text_config={**text, "vocab_size": len(words), "rope_parameters": rope},
        **{f"{name}_id": _id(words, token) for name, token in tokens.items()},
    )
    size = {"shortest_edge": 16 * 16, "longest_edge": 2 * 64 * 64}
    processor = transformers.Glm4vProcessor(
        transformers.Glm4vImageProcessor(patch_size=8, size=size), words, transformers.Glm4vVideoProcessor(),
        chat_template=_template("<|begin_of_image|><|image|><|end_of_image|>"),
    )  # fmt: skip
    return transformers.Glm4vForConditionalGeneration(config), processor


def _llava_next() -> tuple[Any, Any]:
    words, grid = _words("<image>"), [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.MistralConfig(vocab_size=len(words), **TEXT),
        image_token_index=_id(words, "<image>"), image_grid_pinpoints=grid, vision_feature_layer=-1,
    )  # fmt: skip
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=SIDE, image_grid_pinpoints=grid
        ), words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )  # fmt: skip
    return transformers.LlavaNextForConditionalGeneration(config), processor


def _pixtral() -> tuple[Any, Any]:
    words = _words("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = transformers.LlavaConfig(
        vision_config=transformers.PixtralVisionConfig(**{**VISION, "head_dim": 8}),
        text_config=transformers.MistralConfig(vocab_size=len(words), **TEXT), vision_feature_layer=-1,
        image_token_index=_id(words, "[IMG]"), vision_feature_select_strategy="full",
    )  # fmt: skip
    images = transformers.PixtralImageProcessor(size={"longest_edge": 2 * SIDE}, patch_size={"height": 8, "width": 8})
    processor = transformers.PixtralProcessor(images, words, patch_size=8, chat_template=_template("[IMG]"))
    return transformers.LlavaForConditionalGeneration(config), processor


def _cohere_text(words: Any) -> Any:
    return transformers.Cohere2Config(
        vocab_size=len(words), sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        **{**TEXT, "tie_word_embeddings": True},
    )  # fmt: skip


def _aya_vision() -> tuple[Any, Any]:
    tokens = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"]
    words = _words("<image>", *tokens, *(f"TILE_{number}" for number in range(1, 5)))
    config = transformers.AyaVisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=_cohere_text(words), image_token_index=_id(words, "<|IMG_PATCH|>"),
    )  # fmt: skip
    images = transformers.GotOcr2ImageProcessor(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = transformers.AyaVisionProcessor(
        images, words, patch_size=8, img_size=SIDE, downsample_factor=2, chat_template=_template("<image>")
    )
    return transformers.AyaVisionForConditionalGeneration(config), processor


def _cohere2_vision() -> tuple[Any, Any]:
    special = {
        "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }  # fmt: skip
    words = _words(*special.values(), **special)
    config = transformers.Cohere2VisionConfig(
        vision_config=transformers.SiglipVisionConfig(**{**VISION, "patch_size": 4}, vision_use_head=False),
        text_config=_cohere_text(words), image_token_id=_id(words, "<|IMG_PATCH|>"), alignment_intermediate_size=64,
    )  # fmt: skip
    images = transformers.Cohere2VisionImageProcessor(
        size={"height": SIDE, "width": SIDE}, patch_size=4, min_patches=1, max_patches=4
    )
    processor = transformers.Cohere2VisionProcessor(images, words, chat_template=_template("<|IMG_PATCH|>"))
    return transformers.Cohere2VisionForConditionalGeneration(config), processor


def _paligemma() -> tuple[Any, Any]:
    words = _words("<image>", image_token="<image>")
    words.add_special_tokens({"bos_token": "<bos>"})
    images = transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = (SIDE // VISION["patch_size"]) ** 2
    processor = transformers.PaliGemmaProcessor(images, words, chat_template=_template("<image>"))
    config = transformers.PaliGemmaConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**TEXT, "model_type": "gemma", "vocab_size": len(words), "tie_word_embeddings": True},
        image_token_index=_id(words, "<image>"), projection_dim=32, hidden_size=32, vocab_size=len(words),
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def _mllama() -> tuple[Any, Any]:
    words = _words("<|image|>", "<|python_tag|>", image_token="<|image|>")
    words.add_special_tokens({"bos_token": "<bos>"})
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    vision = {**VISION, "attention_heads": 4, "num_global_layers": 1, "vision_output_dim": 64, "max_num_tiles": 2}
    config = transformers.MllamaConfig(
        vision_config={**vision, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2]]},
        text_config={**text, "vocab_size": len(words), "cross_attention_layers": [1]},
        image_token_index=_id(words, "<|image|>"),
    )  # fmt: skip
    images = transformers.MllamaImageProcessor(size={"height": SIDE, "width": SIDE}, max_image_tiles=2)
    processor = transformers.MllamaProcessor(images, words, chat_template=_template("<|image|>"))
    return transformers.MllamaForConditionalGeneration(config), processor


def _llama4() -> tuple[Any, Any]:
    tokens = ["<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>"]
    words = _words(*tokens, "<|tile_y_separator|>")
    config = transformers.Llama4Config(
        vision_config={
            **VISION, "pixel_shuffle_ratio": 0.5, "projector_input_dim": 32, "projector_output_dim": 32,
            "vision_output_dim": 32, "intermediate_size": 128,
        },
        text_config={
            **TEXT, "vocab_size": len(words), "intermediate_size_mlp": 64, "num_local_experts": 4,
            "attention_chunk_size": 64, "no_rope_layers": [1, 0],
        },
        image_token_index=_id(words, "<|patch|>"), boi_token_index=_id(words, "<|image_start|>"),
        eoi_token_index=_id(words, "<|image_end|>"),
    )  # fmt: skip
    images = transformers.Llama4ImageProcessor(size={"height": SIDE, "width": SIDE}, max_patches=4)
    processor = transformers.Llama4Processor(images, words, patch_size=8, chat_template=_template("<|image|>"))
    return transformers.Llama4ForConditionalGeneration(config), processor


def _idefics2() -> tuple[Any, Any]:
    words = _words("<image>", "<fake_token_around_image>", "<end_of_utterance>")
    config = transformers.Idefics2Config(
        vision_config=VISION, perceiver_config={
            "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
            "resampler_head_dim": 8, "num_key_value_heads": 2,
        },
        text_config={**TEXT, "model_type": "mistral", "vocab_size": len(words)}, image_token_id=_id(words, "<image>"),
    )  # fmt: skip
    images = transformers.Idefics2ImageProcessor(
        size={"longest_edge": SIDE, "shortest_edge": 16}, do_image_splitting=False
    )
    processor = transformers.Idefics2Processor(images, words, image_seq_len=4, chat_template=_template("<image>"))
    return transformers.Idefics2ForConditionalGeneration(config), processor


LINEAR = {  # as in Qwen 3.5: every other layer has linear attention
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "mistral3": _mistral3,
    "lfm2_vl": _lfm2_vl,
    "gemma3": _gemma3,
    "gemma4": lambda: _gemma4(None, hidden_size_per_layer_input=8, num_kv_shared_layers=2),
    "gemma4-31b": lambda: _gemma4("vision", hidden_size_per_layer_input=0, attention_k_eq_v=True),
    "qwen2_vl": lambda: _qwen("Qwen2VL", {"embed_dim": 32, "mlp_ratio": 2}, "Qwen2VL"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VL", {"window_size": 32, "fullatt_block_indexes": [1]}, "Qwen2_5_VL"),
    "qwen3_vl": lambda: _qwen("Qwen3VL", {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}),
    "qwen3_vl_moe": lambda: _qwen(
        "Qwen3VLMoe", {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}, **EXPERTS
    ),
    "qwen3_5": lambda: _qwen("Qwen3_5", {"num_position_embeddings": 16}, **LINEAR),
    "qwen3_5_moe": lambda: _qwen(
        "Qwen3_5Moe", {"num_position_embeddings": 16}, **LINEAR, **EXPERTS, shared_expert_intermediate_size=16
    ),
    "glm4v": _glm4v,
    "llava_next": _llava_next,
    "llava-pixtral": _pixtral,
    "aya_vision": _aya_vision,
    "cohere2_vision": _cohere2_vision,
}

REFUSED: dict[str, Callable[[], tuple[Any, Any]]] = {
    "idefics2": _idefics2,
    "llama4": _llama4,
    "mllama": _mllama,
    "paligemma": _paligemma,
}
TWO_WAY = {"gemma3", "gemma4-31b"}  # families with attention in both directions between the features of an image
IN_SPACE = {  # families whose images have positions in space
    "glm4v", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe",
}  # fmt: skip
STATEFUL = {"lfm2_vl", "qwen3_5", "qwen3_5_moe"}  # families with layers whose state the server cannot keep
PLAIN = {*TWO_WAY, "aya_vision", "cohere2_vision"}  # these two do not scale the logits as their text models do
ONE_IMAGE = {"llava_onevision"}  # families that cut a single image only, so that rows have at most one
NAMES = {  # of checkpoints that people use
    "idefics3": "SmolVLM, Idefics 3", "smolvlm": "SmolVLM2", "llava": "LLaVA 1.5",
    "llava-pixtral": "Pixtral 12B", "llava_next": "LLaVA 1.6", "llava_onevision": "LLaVA-OneVision",
    "internvl": "InternVL 2.5, 3", "mistral3": "Mistral Small 3.1", "lfm2_vl": "LFM2-VL", "aya_vision": "Aya Vision",
    "cohere2_vision": "Command A Vision", "gemma3": "Gemma 3 (4B and larger)", "gemma4": "Gemma 4 E2B, E4B",
    "gemma4-31b": "Gemma 4 31B", "glm4v": "GLM-4.1V", "qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL", "qwen3_vl_moe": "Qwen3-VL, mixtures of experts", "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5, mixtures of experts",
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
        images = "one" if family in ONE_IMAGE else "several"
        serve = "vLLM" if family in STATEFUL else "yes"
        rows.append(f"| {name} | {family.partition('-')[0]} | {step} | {images} | {serve} |\n")
    return TABLE + "".join(rows)
