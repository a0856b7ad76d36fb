"""Models of several sizes and rows of several kinds, for benchmarks of learning (`learning_rates.py`)."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

SIZES = {"135M": 30, "71M": 12, "46M": 5}  # layers of SmolLM2-135M-Instruct
SETS = ("snips", "demo", "docstrings")
ROWS, HELD_OUT = 320, 100
MODULES = """argparse ast asyncio calendar codecs collections configparser contextlib csv datetime decimal difflib
email.message enum fractions functools gzip html.parser http.client inspect ipaddress json locale logging math mimetypes
operator os os.path pathlib platform pprint random re shutil smtplib socket sqlite3 ssl statistics string subprocess
tarfile tempfile textwrap threading time tokenize traceback typing unittest urllib.parse urllib.request uuid zipfile"""


def parameters(size: str) -> int:
    return 28_312_128 + SIZES[size] * 3_540_096


def docstrings() -> list[dict[str, str]]:
    """Of functions and methods of the standard library: what it does, in its first paragraph."""
    found: dict[str, str] = {}
    for name in MODULES.split():
        module = importlib.import_module(name)
        kinds = [(name, module), *((f"{name}.{kind}", value) for kind, value in vars(module).items()
                                   if inspect.isclass(value) and value.__module__ == name)]  # fmt: skip
        for path, owner in kinds:
            for member, value in vars(owner).items():
                text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split()) if callable(value) else ""
                if not member.startswith("_") and 40 <= len(text) <= 400:
                    found.setdefault(text, f"What does {path}.{member} do?")
    return [{"prompt": asked, "completion": text} for text, asked in sorted(found.items())]


def make_rows(folder: Path, snips: Path) -> None:
    from strop.demo import data_files

    files = {"snips": (snips / "train_700.jsonl", snips / "test_210.jsonl"), "demo": data_files()}
    made: dict[str, list[list[str]]] = {
        name: [file.read_text(encoding="utf-8").splitlines() for file in pair] for name, pair in files.items()
    }
    lines = [json.dumps(row) for row in docstrings()]
    random.Random(0).shuffle(lines)
    made["docstrings"] = [lines[HELD_OUT:], lines[:HELD_OUT]]
    for name, parts in made.items():
        for part, some, number in zip(("train", "held"), parts, (ROWS, HELD_OUT), strict=True):
            assert len(some) >= number, (name, part, len(some))
            (folder / f"{name}_{part}.jsonl").write_text("\n".join(some[:number]) + "\n", encoding="utf-8")


def make_model(folder: Path, size: str) -> None:
    """SmolLM2 with fewer layers (three fifths of them from its beginning), healed on the manual."""
    import pydoc_data.topics

    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    import strop
    from strop.model.facts import locate
    from strop.model.load import load_base
    from strop.model.tokenizer import load_tokenizer

    source, keep = locate("demo"), SIZES[size]
    model: Any = load_base(source, torch.bfloat16, "cpu")
    layers, first = model.model.layers, math.ceil(0.6 * keep)
    model.model.layers = nn.ModuleList([*layers[:first], *layers[first - keep :]])
    model.config.num_hidden_layers = keep
    cut = folder / f"{size}-cut"
    model.save_pretrained(cut)
    load_tokenizer(source).save_pretrained(cut)
    assert len(AutoModelForCausalLM.from_pretrained(cut).model.layers) == keep
    texts = folder / "manual.jsonl"
    with texts.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in pydoc_data.topics.topics.values())
    run = strop.train(model=str(cut), data={"train": str(texts), "overlong": "split", "max_length": 256},
                      lora={"r": 64}, train={"epochs": 1, "batch_size": 16, "learning_rate": 2e-3},
                      out=str(folder / f"{size}-healing"), **{"model.dtype": "bf16"})  # fmt: skip
    print(f"{size}: healed in {run.report['seconds']:.0f} s, loss {run.report['loss']}", flush=True)
    strop.merge(run.folder, folder / size, measure=False)
    shutil.rmtree(run.folder)
    shutil.rmtree(cut)
