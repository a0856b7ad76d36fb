"""Tokenizer and frozen base out of a Source.

A GGUF file is dequantized once into a cached folder, and from then on is like any other model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from strop.errors import ModelError
from strop.model.facts import Source, read_config
from strop.runs.folder import cache_folder, new_folder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
transformers.utils.logging.disable_progress_bar()  # strop draws its own
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_tokenizer(source: Source) -> Any:
    """The model's own tokenizer (fast ones only: offsets are needed to find the supervised tokens).

    Raises ModelError where the folder holds none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(_head(source), **_LOCAL)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source.name}: no tokenizer that loads: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"{source.name}: no fast tokenizer (tokenizer.json)", fix="save the tokenizer with a current transformers"
        )
    return tokenizer


def load_config(source: Source) -> Any:
    """The transformers config, weights unread. Raises ModelError where transformers does not know the architecture."""
    folder = _head(source)
    read_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{source.name}: transformers {transformers.__version__} cannot read its config: {_first_line(error)}"
        ) from None


def skeleton(source: Source) -> nn.Module:
    """The model without weights (meta tensors), to look at its layers."""
    with torch.device("meta"):
        return _from_config(load_config(source))


def load_base(source: Source, dtype: torch.dtype, device: str) -> nn.Module:
    """The frozen model in eval mode, every weight read from the file.

    Raises ModelError where weights are missing or do not fit (transformers would fill them with random numbers).
    """
    folder = _dequantized(source) if source.kind == "gguf" else source.path
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True, **_LOCAL
    )
    faults = sorted(info.get("missing_keys") or []) + sorted(str(key) for key in info.get("mismatched_keys") or [])
    if faults:
        raise ModelError(f"{source.name}: {len(faults)} weights are missing or of another shape, first {faults[0]}")
    bad = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if bad:
        raise ModelError(f"{source.name}: weight {bad[0]} holds NaN or infinity", fix="fetch the model again")
    # what peft writes into adapters as the base's name, by its version from one or the other
    model.name_or_path = model.config._name_or_path = source.name
    module: nn.Module = model.to(device).eval().requires_grad_(False)
    return module


def _from_config(config: Any) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def _head(source: Source) -> Path:
    """The folder with config and tokenizer; for a GGUF file they are taken out of it once, without its weights."""
    if source.kind == "folder":
        return source.path
    folder = _gguf_cache(source) / "head"
    if not (folder / "config.json").is_file():
        with new_folder(folder) as temp:
            where = {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": source.path.name}
            AutoTokenizer.from_pretrained(**where).save_pretrained(temp)
            _plain(AutoConfig.from_pretrained(**where)).save_pretrained(temp)
    return folder


def _dequantized(source: Source) -> Path:
    """The GGUF file as a folder of bf16 safetensors, made on first use and kept in the cache."""
    folder = _gguf_cache(source) / "bf16"
    if not (folder / "model.safetensors").is_file() and not (folder / "model.safetensors.index.json").is_file():
        with new_folder(folder) as temp:
            options: dict[str, Any] = {"gguf_file": source.path.name, "dtype": torch.bfloat16}
            packed = getattr(transformers, "GgufConfig", None)
            if packed is not None:  # transformers 5.2x keeps GGUF blocks packed unless told otherwise
                options["quantization_config"] = packed(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(str(source.path.parent), **options)
            _plain(model.config)
            for part in ("hf_quantizer", "quantization_method"):
                if hasattr(model, part):
                    setattr(model, part, None)
            model.is_quantized = False
            model.save_pretrained(temp)
    return folder


def _gguf_cache(source: Source) -> Path:
    digest = source.name.partition("#sha256=")[2][:16] or source.name.removeprefix("demo:").replace("/", "-")
    stat = source.path.stat()
    return cache_folder() / "gguf" / f"{digest}-{stat.st_size}"


def _plain(config: Any) -> Any:
    """A config that no longer says its weights are packed GGUF blocks (save_pretrained would refuse)."""
    config.__dict__.pop("quantization_config", None)
    config._name_or_path = ""
    return config


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
