"""Tiny random models that read images."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from tests.support.families import tokenizer

# as SmolVLM's: messages with a string or parts, and one <image> for each image
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SIDE = 32  # of a tile, in pixels; an image has four tiles and a global one, or only that one if it is small
TILE_TOKENS = 4


def save_seeing(folder: Path) -> Path:
    """Save a tiny Idefics 3 with a ChatML tokenizer, an image processor and SmolVLM's kind of chat template."""
    words = copy.deepcopy(tokenizer("chatml"))
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    words.add_special_tokens({"additional_special_tokens": special})
    words.chat_template = TEMPLATE
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=True
    )
    text = {
        "model_type": "llama", "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "tie_word_embeddings": True, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": 8,
    }  # fmt: skip
    config = Idefics3Config(
        text_config=text, vision_config=vision, scale_factor=2, tie_word_embeddings=True,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # larger than the default initialisation, so that predictions differ
            if weight.dim() == 2:
                weight.mul_(4)
    model.save_pretrained(folder)
    Idefics3Processor(images, words, image_seq_len=TILE_TOKENS, chat_template=TEMPLATE).save_pretrained(folder)
    return folder
