"""Teach a small language model to see: digits that were scanned, and receipts and bar charts that are drawn.

    python benchmarks/images.py build --out MODEL
    python benchmarks/images.py data --task digits|receipts|charts --out FOLDER
    python benchmarks/images.py run --task digits|receipts|charts [--epochs 4] [--out FILE]

`build` writes a model in the format of SmolVLM: SmolLM2-135M as the text model, under a small image encoder (four
layers of SigLIP's kind) and a projector with random weights. `data` writes images and rows: the 1,797 scanned digits of
scikit-learn, or pictures drawn with Pillow; answers are JSON. `run` trains on them, scores base and tuned on held-out
images, and writes the result with machine, versions and command.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SIDE, PATCH, TOKENS = 48, 12, 4  # of an image, in pixels and in features
SHOPS = ("Kiosk Nord", "Cafe Luna", "Book Barn", "Tea House", "Bike Shop", "City Deli")
FRUIT = ("apples", "pears", "plums", "figs")


def build(out: Path, side: int = SIDE, patch: int = PATCH) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Idefics3Config, Idefics3ForConditionalGeneration
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    from strop.models.load import weights_folder
    from strop.models.source import locate
    from strop.models.tokenizer import config_folder

    source = locate("demo")
    tokenizer = AutoTokenizer.from_pretrained(config_folder(source))
    tokens = ["<image>", "<fake_token_around_image>", "<global-img>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    text = AutoModelForCausalLM.from_pretrained(weights_folder(source), dtype=torch.float32)
    size = text.get_input_embeddings().weight.std().item()
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    vision = {
        "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6,
        "image_size": side, "patch_size": patch,
    }  # fmt: skip
    config = Idefics3Config(
        text_config=text.config.to_dict(), vision_config=vision, scale_factor=2, tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(config)
    model.model.text_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    projection = model.model.connector.modality_projection.proj.weight
    torch.nn.init.normal_(projection, std=size / projection.shape[1] ** 0.5)  # features as large as embeddings
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = template
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": side}, max_image_size={"longest_edge": side}, do_image_splitting=False
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=(side // patch) ** 2 // 4, chat_template=template)
    model.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)


def write_digits(folder: Path) -> None:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in order.tolist():
        pixels = (255 - digits.images[i] * 255 / 16).astype("uint8")
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.png")
        rows.append(make_row(f"images/{i}.png", "Which digit is this?", {"digit": int(digits.target[i])}))
    write_rows(folder, rows, held_out=300)


def make_row(path: str, question: str, answer: dict[str, Any]) -> dict[str, Any]:
    user = [{"type": "image", "path": path}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": json.dumps(answer)}]}


def write_rows(folder: Path, rows: list[dict[str, Any]], held_out: int) -> None:
    for name, part in (("test", rows[:held_out]), ("train", rows[held_out:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "data", "run"])
    parser.add_argument("--task", default="digits", choices=["digits"])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.what == "build":
        build(args.out)
    elif args.what == "data":
        write_digits(args.out)


if __name__ == "__main__":
    main()
