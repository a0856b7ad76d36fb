"""An adapter into its base: in fp32, tensor by tensor, and then measured against the adapter on the base.

Never into quantized weights: rounding to 4 bits loses a small adapter whole (TRAPS 0, finding 3). The folder appears
when it is complete and verified; a merge that was cut short goes on from the shards that are whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from strop.adapters import WEIGHTS_FILE, adapter_folder
from strop.errors import FolderError, ModelError, RecipeError
from strop.export.parity import LIMITS, Parity, compare
from strop.export.tuned import Tuned
from strop.model.facts import Source, fingerprint
from strop.model.load import DTYPES, load_base, load_config, weights_folder
from strop.model.shards import SHARD_BYTES, Tensors
from strop.runs.folder import disk_faults, fsync_folder, write_json
from strop.runs.lock import sha256_file, sha256_text


@dataclass(frozen=True)
class Merged:
    out: Path
    files: list[str]
    base: str  # original or dequantized
    base_losses: dict[str, float]  # of the adapter on either, where both were tried
    parity: Parity

    def as_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out), "files": self.files, "base": self.base, "base_losses": self.base_losses,
            "parity": self.parity.as_json(),
        }  # fmt: skip


def merge(name: str, out: Path, *, dtype: str = "bf16", data: str | None = None) -> Merged:
    """Merges the adapter of a run or adapter folder into a new model folder of the given type.

    data: rows to measure on; default: the run's own evaluation rows, or training rows.
    Raises InputError before anything is written; ParityError where the merged model is not the tuned one.
    """
    if dtype not in LIMITS:
        raise RecipeError(f"--dtype {dtype}: no such type", fix=f"choose among {', '.join(LIMITS)}")
    if out.exists():
        raise FolderError(f"{out}: is there already", fix="give --out a new folder")
    if adapter_folder(name) is None:
        raise ModelError(f"{name}: no adapter there", fix="give a run or adapter folder")
    tuned = Tuned.read(name, data)
    with disk_faults(out.parent):
        made = _write(tuned, out, dtype)
        parity = compare(tuned.model, partial(_loaded, made), tuned.examples, LIMITS[dtype])
        if not parity.passed:
            shutil.rmtree(made)
        parity.check(str(out))
        made.replace(out)
        fsync_folder(out.parent)
    return Merged(out, sorted(file.name for file in out.iterdir()), tuned.base, tuned.base_losses, parity)


def _loaded(folder: Path) -> Any:
    return load_base(Source(str(folder), "folder", folder), torch.float32, "cpu")


def _write(tuned: Tuned, out: Path, dtype: str) -> Path:
    """The merged folder under a name of its own; shards that an earlier try left whole are kept."""
    source, folder = tuned.source, tuned.folder
    assert folder is not None
    made = out.with_name(f"{out.name}.partial")
    made_of = {
        "adapter": sha256_file(folder / WEIGHTS_FILE),
        "base": fingerprint(source),
        "scheme": tuned.trained.scheme,
        "dtype": dtype,
    }
    progress = made / "merge.json"
    done: dict[str, Any] = json.loads(progress.read_text(encoding="utf-8")) if progress.is_file() else {}
    if done.get("of") != made_of:
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        done = {"of": made_of, "shards": {}}
    merged = tuned.merging()
    index: dict[str, str] = {}
    with ExitStack() as stack:
        tensors = Tensors(weights_folder(source), stack)
        for number, names in enumerate(_shards(tensors)):
            file = f"model-{number + 1:05d}.safetensors"
            index |= dict.fromkeys(names, file)
            if done["shards"].get(file) == (sha256_file(made / file) if (made / file).is_file() else ""):
                continue
            shard = {}
            for name in names:
                shard[name] = rounded(name, *merged(name, tensors.get(name)), DTYPES[dtype])
            save_file(shard, made / file, {"format": "pt"})
            done["shards"][file] = sha256_file(made / file)
            write_json(progress, done)
    size = sum((made / file).stat().st_size for file in set(index.values()))
    write_json(made / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})
    _write_rest(source, folder, made, dtype)
    progress.unlink()
    return made


def rounded(name: str, merged: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    """The merged weight in its new type; a changed one in bf16 is rounded up or down at random, in proportion.

    Rounding to nearest takes back what is smaller than half a step: 83 % of the weights of a lightly trained adapter
    came out as they had been, mean KL 4.7e-3; this way the mean of the change is kept, mean KL 6.7e-5 (docs/log.md).
    The random numbers belong to the tensor's name: the same merge gives the same bits.
    """
    if not merged.is_floating_point():
        return merged
    if dtype != torch.bfloat16 or merged is base:
        return merged.to(dtype)
    generator = torch.Generator().manual_seed(int(sha256_text(name)[:8], 16))
    bits = merged.float().contiguous().view(torch.int32)
    dither = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=generator)
    return ((bits + dither) & -(1 << 16)).view(torch.float32).to(dtype)


def _shards(tensors: Tensors) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name in tensors:
        if names and size + tensors.size_bytes(name) > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensors.size_bytes(name)
    yield names


def _write_rest(source: Source, folder: Path, out: Path, dtype: str) -> None:
    """Config, generation config, tokenizer and template, as they were trained with."""
    config = load_config(source)
    config.dtype = DTYPES[dtype]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(out)
    for file in folder.iterdir():
        if file.is_file() and file.name not in (WEIGHTS_FILE, "adapter_config.json", "strop.json", "README.md"):
            shutil.copy2(file, out / file.name)
    generation = weights_folder(source) / "generation_config.json"
    if generation.is_file():
        shutil.copy2(generation, out / "generation_config.json")
