"""Teach a small language model to see: digits that were scanned, and receipts and bar charts that are drawn.

    python benchmarks/images.py build --out MODEL
    python benchmarks/images.py data --tasks digits|charts|receipts --out FOLDER
    python benchmarks/images.py run [--tasks digits charts receipts] [--vision projector] [--epochs 4] [--out FILE]

`build` writes a model in the format of SmolVLM: SmolLM2-135M as the text model, under a small image encoder (four
layers of SigLIP's kind) and a projector with random weights. `data` writes images and rows: the 1,797 scanned digits of
scikit-learn, or pictures drawn with Pillow; answers are JSON. `run` trains on them, scores base and tuned on held-out
images, prints a Markdown table, and updates the file after each task.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measured import run_jobs

SIDE, PATCH, TOKENS = 48, 12, 4  # of an image, in pixels and in features
HELD_OUT, DRAWN = 300, 2300  # rows that are not trained on, and rows of a task whose pictures are drawn
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


def write_data(task: str, folder: Path) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (image, question, answer) in enumerate(TASKS[task]()):
        path = f"images/{number}.png"
        image.save(folder / path)
        user = [{"type": "image", "path": path}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": json.dumps(answer)}]
        rows.append(json.dumps({"messages": turns}) + "\n")
    for name, part in (("test", rows[:HELD_OUT]), ("train", rows[HELD_OUT:])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")


def digits() -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Yield the scanned digits of scikit-learn, which have 8 x 8 pixels, in random order."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for i in np.random.default_rng(0).permutation(len(data.images)).tolist():
        image = Image.fromarray((255 - data.images[i] * 255 / 16).astype("uint8"))
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        yield image, "Which digit is this?", {"digit": int(data.target[i])}


def charts() -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Yield bar charts with four bars of 1 to 9 units."""
    from PIL import Image, ImageDraw

    random_ = random.Random(0)
    for _ in range(DRAWN):
        values = {name: random_.randint(1, 9) for name in FRUIT}
        image = Image.new("RGB", (SIDE, SIDE), "white")
        draw = ImageDraw.Draw(image)
        for i, (value, colour) in enumerate(zip(values.values(), ("red", "green", "blue", "orange"), strict=True)):
            draw.rectangle((4 + 11 * i, SIDE - 2 - 5 * value, 11 + 11 * i, SIDE - 2), fill=colour)
        draw.line((1, SIDE - 1, SIDE - 1, SIDE - 1), fill="black")
        yield image, "Read the chart: apples, pears, plums, figs.", values


def receipts() -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Yield receipts with a shop, a line that is not asked for, and a total."""
    from PIL import Image, ImageDraw, ImageFont

    random_ = random.Random(0)
    for _ in range(DRAWN):
        shop, total, paid = random_.choice(SHOPS), random_.randint(10, 99), random_.randint(100, 999)
        image = Image.new("RGB", (SIDE, SIDE), "white")
        draw = ImageDraw.Draw(image)
        draw.text((1, 0), shop, fill="black", font=ImageFont.load_default(9))
        draw.text((1, 12), f"card {paid}", fill="grey", font=ImageFont.load_default(8))
        draw.text((14, 22), str(total), fill="black", font=ImageFont.load_default(22))
        yield image, "Which shop, and what is the total?", {"shop": shop, "total": total}


TASKS = {"digits": digits, "charts": charts, "receipts": receipts}


def run(args: argparse.Namespace, task: str, folder: Path) -> dict[str, Any]:
    import strop

    build(folder / "model")
    write_data(task, folder / "rows")
    options: dict[str, Any] = {"train.epochs": args.epochs, "lora.vision": args.vision}
    data = str(folder / "rows" / "train.jsonl")
    began = time.time()
    done = strop.train(model=str(folder / "model"), data=data, out=folder / "run", **options)
    seconds = time.time() - began
    result = strop.evaluate(done.folder, str(folder / "rows" / "test.jsonl"))
    return {
        "task": task, "vision": args.vision, "rows": done.report["data"]["used"], "epochs": args.epochs,
        "tokens": done.report["tokens"],
        "seconds": seconds, "memory": done.report["memory"], "held_out": result["rows"],
        **{side: {"exact": result[side]["exact"], "interval": result["intervals"][side]} for side in ("base", "tuned")},
    }  # fmt: skip


def row(one: dict[str, Any]) -> str:
    cells = []
    for side in ("base", "tuned"):
        low, high = one[side]["interval"]
        cells.append(f"{100 * one[side]['exact']:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
    rows = f"{one['rows']:,} x {one['epochs']:g}"
    return f"| {one['task']} | {one['vision']} | {rows} | {' | '.join(cells)} | {one['seconds'] / 60:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "data", "run"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--vision", default="projector", choices=["projector", "none"])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(args, args.one, Path(folder))))
    elif args.what == "build":
        build(args.out)
    elif args.what == "data":
        write_data(args.tasks[0], args.out)
    else:
        results: list[Any] = []
        if args.out and args.out.is_file():
            results = json.loads(args.out.read_text(encoding="utf-8"))["results"]
        print("| task | vision | rows | base | tuned | minutes |\n|---|---|---|---|---|---|", flush=True)
        command = [sys.executable, __file__, "run", "--vision", args.vision, "--epochs", str(args.epochs)]
        run_jobs(command, [[task] for task in args.tasks], results, row, args.out)


if __name__ == "__main__":
    main()
