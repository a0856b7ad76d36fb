"""Teach a small language model to see: digits that were scanned, and receipts and bar charts that are drawn.

    python benchmarks/images.py build --out MODEL
    python benchmarks/images.py data --tasks digits|charts|receipts --out FOLDER
    python benchmarks/images.py run [--tasks digits charts receipts] [--vision projector] [--epochs 4] [--out FILE]
    python benchmarks/images.py plot --out docs/pictures/images.png
    python benchmarks/images.py speed [--tower small|siglip] [--rows 48] [--epochs 3] [--repeats 3] [--out FILE]

`build` writes a model in the format of SmolVLM: SmolLM2-135M as the text model, under a small image encoder (four
layers of SigLIP's kind) and a projector with random weights. For receipts, `run` removes from the projector what a
white page has, which is three times as large as the differences between two receipts. `data` writes images and rows:
the 1,797 scanned digits of scikit-learn, or pictures drawn with Pillow; answers are JSON. `run` trains on them, scores
base and tuned on held-out images, prints a Markdown table, and updates the file after each task. `plot` draws two
pictures of each task with their answers. `speed` trains LoRA on
the text model with strop and with TRL's SFTTrainer on the same batches, in fp32, in turn; `siglip` is an image encoder
as large as SmolVLM's (93 million parameters, 1,024 patches). Tokens include those of images, and never padding. It also
compares the first loss.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from measured import child, read_steps, run_jobs, train_timed, write

SIDE, PATCH = 48, 12  # of an image, in pixels
BATCH, RATE = 4, 1e-4  # of `speed`
HELD_OUT, DRAWN = 300, 2300  # rows that are not trained on, and rows of a task whose pictures are drawn
SHOPS = ("Kiosk Nord", "Cafe Luna", "Book Barn", "Tea House", "Bike Shop", "City Deli")
FRUIT = ("apples", "pears", "plums", "figs")


def build(out: Path, tower: str = "small", *, centred: bool = False) -> None:
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
    side, patch, scale = (SIDE, PATCH, 2) if tower == "small" else (512, 16, 4)
    sizes = (192, 384, 4, 6) if tower == "small" else (768, 3072, 12, 12)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = {**dict(zip(names, sizes, strict=True)), "image_size": side, "patch_size": patch}
    config = Idefics3Config(
        text_config=text.config.to_dict(), vision_config=vision, scale_factor=scale, tie_word_embeddings=True,
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
    image_tokens = (side // patch // scale) ** 2
    if centred:
        centre(model, images)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=image_tokens, chat_template=template)
    model.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)


def centre(model: Any, images: Any) -> None:
    """Make the features of a white page 0, and those of pages with random rectangles as large as embeddings."""
    import torch
    from PIL import Image, ImageDraw

    random_, seen = random.Random(0), list[Any]()
    pages = [Image.new("RGB", (SIDE, SIDE), "white") for _ in range(65)]
    for page in pages[1:]:
        for _ in range(random_.randint(1, 6)):
            x, y, width, height = (random_.randint(1, limit) for limit in (SIDE - 8, SIDE - 8, 8, 8))
            colour = tuple(random_.randint(0, 255) for _ in range(3))
            ImageDraw.Draw(page).rectangle((x, y, x + width, y + height), fill=colour)
    projection = model.model.connector.modality_projection.proj
    hook = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        for page in pages:
            model.model.get_image_features(images(page, return_tensors="pt")["pixel_values"])
        hook.remove()
        basis, _ = torch.linalg.qr(seen[0].T)
        projection.weight -= projection.weight @ basis @ basis.T
        size = model.get_input_embeddings().weight.norm(dim=1).mean()
        projection.weight *= size / (torch.cat(seen[1:]) @ projection.weight.T).norm(dim=1).mean()


def write_data(task: str, folder: Path, count: int | None = None) -> None:
    """Write images, and rows to train on (all, or `count`) and to hold out."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    drawn = TASKS[task]() if count is None else islice(TASKS[task](), HELD_OUT + count)
    for number, (image, question, answer) in enumerate(drawn):
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


def plot(out: Path) -> None:
    """Draw two pictures of each task, with the answer that is trained."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2 * len(TASKS), figsize=(11, 1.9))
    examples = [example for draw in TASKS.values() for example in islice(draw(), 2, 4)]
    for panel, (image, _, answer) in zip(panels, examples, strict=True):
        panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        panel.set(xticks=[], yticks=[])
        panel.set_xlabel(json.dumps(answer).replace(", ", ",\n "), family="monospace", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110, bbox_inches="tight", metadata={"Software": None})


def run(args: argparse.Namespace, task: str, folder: Path) -> dict[str, Any]:
    import strop

    build(folder / "model", centred=task == "receipts")
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


def speed_options(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "model": str(folder / "model"), "data": str(folder / "rows" / "train.jsonl"), "train.epochs": args.epochs,
        "train.batch_size": BATCH, "train.learning_rate": RATE, "train.lr_scheduler": "constant", "train.warmup": 0,
        "model.dtype": "fp32", "model.device": "cpu", "lora.r": 16, "lora.alpha": 32,
    }  # fmt: skip


def train_with_strop(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import strop

    with tempfile.TemporaryDirectory() as run_folder:
        done = strop.train(out=f"{run_folder}/run", **speed_options(args, folder))
        return read_steps(done.folder)


def train_with_trl(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train on the rows in the order of strop's batches."""
    import torch
    from datasets import Dataset, Features, Image, List, Value
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer

    from strop.config.load import resolve
    from strop.training.state import batch_stream

    file = folder / "rows" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    steps = args.epochs * len(rows) // BATCH
    recipe = resolve(None, {**speed_options(args, folder), "train.max_steps": steps}).recipe
    ordered = [rows[i] for batch in batch_stream(recipe, len(rows)) for i in batch.rows]
    table = list[dict[str, Any]]()
    for user, assistant in (one["messages"] for one in ordered):
        image, text = user["content"]
        table.append({
            "images": [str(file.parent / image["path"])], "prompt": [{"role": "user", "content": text["text"]}],
            "completion": [assistant],
        })  # fmt: skip
    turns = List({"role": Value("string"), "content": Value("string")})
    features = Features({"images": List(Image()), "prompt": turns, "completion": turns})
    config = SFTConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, per_device_train_batch_size=BATCH, num_train_epochs=1,
        learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
        max_length=None, gradient_checkpointing=False, train_sampling_strategy="sequential", weight_decay=0.0,
        adam_beta2=0.999, disable_tqdm=True,
    )  # fmt: skip
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=rf".*text_model.*\.({names})", task_type="CAUSAL_LM")
    processor = AutoProcessor.from_pretrained(folder / "model")
    ended = "<|im_end|>\n{% endfor %}"  # the line break after a turn is not a part of strop's answer
    processor.chat_template = processor.chat_template.replace(
        ended, "<|im_end|>{{ '' if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    )
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32), args=config,
        train_dataset=Dataset.from_list(table, features=features), peft_config=lora, processing_class=processor,
    )  # fmt: skip
    return train_timed(trainer)


def measure_speed(args: argparse.Namespace) -> None:
    tools = {"strop": train_with_strop, "trl": train_with_trl}
    if args.one:
        print(json.dumps(tools[args.one](args, args.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "model", args.tower)
        write_data("charts", folder / "rows", args.rows)
        command = [sys.executable, __file__, "speed", "--rows", str(args.rows), "--epochs", f"{args.epochs:g}"]
        command += ["--folder", name, "--one"]
        runs = {tool: list[dict[str, Any]]() for tool in tools}
        for _ in range(args.repeats):
            for tool, found in runs.items():
                found.append(child([*command, tool]))
    epoch = args.rows // BATCH  # in steps
    seconds = {
        tool: [[sum(run["seconds"][i : i + epoch]) for i in range(0, len(run["seconds"]), epoch)] for run in found]
        for tool, found in runs.items()
    }
    for tool, found in runs.items():
        tokens = sum(found[0]["tokens"][epoch:])
        rates = [tokens / sum(epochs[1:]) for epochs in seconds[tool]]
        by_epoch = ", ".join(f"{statistics.median(times):.1f}" for times in zip(*seconds[tool], strict=True))
        print(
            f"| {tool} | {statistics.median(rates):,.0f} tokens/s from the second epoch on | epochs of {by_epoch} s |"
        )
    ratios = [sum(b[1:]) / sum(a[1:]) for a, b in zip(seconds["strop"], seconds["trl"], strict=True)]
    first = [found[0]["losses"][0] for found in runs.values()]
    print(f"strop / TRL: {statistics.median(ratios):.2f}; first losses {first[0]:.5f} and {first[1]:.5f}")
    if args.out:
        write(args.out, {"tower": args.tower, "rows": args.rows, "seconds": seconds, "ratios": ratios, "runs": runs})


def row(one: dict[str, Any]) -> str:
    cells = []
    for side in ("base", "tuned"):
        low, high = one[side]["interval"]
        cells.append(f"{100 * one[side]['exact']:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
    rows = f"{one['rows']:,} x {one['epochs']:g}"
    return f"| {one['task']} | {one['vision']} | {rows} | {' | '.join(cells)} | {one['seconds'] / 60:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "data", "run", "plot", "speed"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--vision", default="projector", choices=["none", "projector", "all"])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--tower", default="small", choices=["small", "siglip"])
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    for hidden, kind in (("--one", str), ("--folder", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "speed":
        measure_speed(args)
    elif args.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(args, args.one, Path(folder))))
    elif args.what == "build":
        build(args.out)
    elif args.what == "plot":
        plot(args.out)
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
