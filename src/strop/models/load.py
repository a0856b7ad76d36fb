"""The frozen base out of a Source.

A GGUF file is dequantized once into a cached folder, and from then on is like any other model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from strop.config.schema import DEVICES
from strop.errors import ModelError, RecipeError, first_line
from strop.models.experts import dequantized_growth, dequantize_experts
from strop.models.families.gguf import read_gguf_tensors
from strop.models.introspect import text_forward
from strop.models.quantize import cache_name, dequantize_layers
from strop.models.source import Source, fingerprint, read_headers, prequantized, quantization_method, read_config
from strop.models.tensor_files import (
    CheckpointLayout,
    CheckpointTensors,
    build_quantized,
    check_packed_checkpoint,
    floating_parameters,
    is_finite,
    has_all_weights,
    repack_layers,
    quantize_folder,
    check_unused_tensors,
    write_shards,
)
from strop.models.tokenizer import LOCAL, gguf_cache, gguf_errors, config_folder, unpacked_config
from strop.runs.folder import cache_folder, made_once, new_folder, write_json

LOG = logging.getLogger(__name__)

ALL_LAYERS = 1 << 30
TEXTS_BYTES, TEXTS_SHARE = 1 << 30, 0.3  # of a card's free memory, for the texts that are answered: whichever is more
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
transformers.utils.logging.disable_progress_bar()  # strop draws its own


def check_device_and_dtype(device: str, dtype: str) -> None:
    """Raises RecipeError for a device or a type that there is not."""
    if not re.fullmatch(DEVICES, device):
        raise RecipeError(f"--device {device}: no such device", fix="choose among auto, cpu, cuda, cuda:N, mps")
    if dtype not in ("auto", *DTYPES):
        raise RecipeError(f"--dtype {dtype}: no such type", fix=f"choose among auto, {', '.join(DTYPES)}")


def load_config(source: Source) -> Any:
    """The transformers config, weights unread. Raises ModelError where transformers does not know the architecture."""
    folder = config_folder(source)
    read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        said = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error)
        what = f"{source.name}: transformers {transformers.__version__} cannot read its config: {said}"
        raise ModelError(what) from None
    for one in {id(part): part for part in (config, config.get_text_config())}.values():
        if one.dtype is not None and one.dtype.itemsize == 1:  # of weights on disk; none is computed in
            one.dtype = torch.bfloat16
    return config


def load_without_weights(source: Source) -> nn.Module:
    """The model without weights (meta tensors), to look at its layers."""
    return model_without_weights(load_config(source))


def model_without_weights(config: Any) -> nn.Module:
    """A model of a transformers config on meta tensors. Raises ModelError where transformers has no such model."""
    with torch.device("meta"):
        return build_from_config(config)


def load_base(
    source: Source,
    dtype: torch.dtype,
    device: str,
    *,
    quantization: str = "none",
    double: bool = True,
    resident_layers: int | None = 0,
) -> nn.Module:
    """The frozen model in eval mode, every weight read from the file.

    quantization: none, nf4, fp4 or int8; double: quantize the constants of 4-bit weights too. resident_layers: how many
    decoder layers, from the first, have their weights dequantized once rather than for each product; None: all, on a
    card as many as find room there beside what answering needs.
    Raises ModelError where weights are missing or do not fit (transformers would fill them with random numbers).
    """
    LOG.info("loading the weights of %s", source.name)
    generation = source.kind == "folder" and (source.path / "generation_config.json").is_file()
    if generation:  # transformers passes over one that is broken, and the model would not stop
        read_config(source.path, "generation_config.json")
    if quantization == "none":
        model: Any = _load_16_bit(source, dtype)
    else:
        folder = quantized_folder(source, quantization, double, dtype, device)
        model = build_quantized(lambda: build_from_config(load_config(source)), folder, source.name, quantization, dtype)
        if generation:
            model.generation_config = GenerationConfig.from_pretrained(source.path)
    model.to(device)  # packed weights: those that are dequantized never lie in the host's memory
    if quantization != "none":
        layers = resident_layers if resident_layers is not None else _fitting_layers(model, device)
        dequantize_layers(model, layers)
        dequantize_experts(model, layers)
    bad = [name for name, weight in floating_parameters(model) if not is_finite(weight)]
    if bad:
        raise ModelError(f"{source.name}: weight {bad[0]} holds NaN or infinity", fix="fetch the model again")
    return prepare_frozen(model, source)


def prepare_frozen(model: Any, source: Source) -> nn.Module:
    """The frozen model, named, in eval mode, letting text through."""
    # what peft writes into adapters as the base's name, by its version from one or the other
    model.name_or_path = model.config._name_or_path = source.name
    text_forward(model)
    keep_attention_softcap(model)
    module: nn.Module = model.eval().requires_grad_(False)
    return module


def keep_attention_softcap(model: Any) -> None:
    """Attention that bends its scores (Gemma 2) by the family's own code: transformers 5.20, the newest for Python
    3.10, takes PyTorch's, which leaves the soft cap out without a word."""
    text = model.config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) and text._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def _fitting_layers(model: nn.Module, device: str) -> int:
    """How many decoder layers can be dequantized once where the model is: all but on a card, where room is left for
    texts and what is computed of them."""
    if not device.startswith("cuda"):
        return ALL_LAYERS
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room, grown = free - max(TEXTS_BYTES, int(TEXTS_SHARE * free)), dequantized_growth(model)
    return next((n for n in range(len(grown), 0, -1) if sum(grown[:n]) <= room), 0)


def restore_packed_weights(model: nn.Module, source: Source, scheme: str, double: bool, dtype: torch.dtype) -> None:
    """Puts the packed weights back into a quantized base, in the place of those that `resident_layers` dequantized."""
    repack_layers(model, quantized_folder(source, scheme, double, dtype), source.name, scheme, dtype)


def weights_folder(source: Source) -> Path:
    """The folder with a source's 16-bit weights; a GGUF file's are made on first use."""
    return _dequantized(source) if source.kind == "gguf" else source.path


def stored_dtype(source: Source) -> torch.dtype:
    """The narrowest type that holds all of a source's weights as they are on disk."""
    kinds = {entry["dtype"] for _, header in read_headers(weights_folder(source)) for entry in header.values()}
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(kinds.pop() if len(kinds) == 1 else "", torch.float32)


def refuse_prequantized(source: Source) -> None:
    """Raises ModelError for weights that are quantized on disk, where 16 bit is asked for."""
    if prequantized(source.config()):
        raise ModelError(
            f"{source.name}: its weights are quantized already",
            fix=f"use --model.quantization {prequantized(source.config())}",
        )


def _load_16_bit(source: Source, dtype: torch.dtype) -> Any:
    refuse_prequantized(source)
    folder, config = weights_folder(source), load_config(source)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, **LOCAL}
    if quantization_method(source.config()):
        config.quantization_config["dequantize"] = True  # on a card as well: adapters have no gradient otherwise
        options["config"] = config
    else:
        tensors = CheckpointTensors(folder)
        CheckpointLayout(model_without_weights(config), tensors).check(source.name, tensors)
    with _known(config):
        auto = _auto(config)
        model, info = auto.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )  # what does not fit is told below
    faults = sorted(info.get("missing_keys") or []) + sorted(key for key, *_ in info.get("mismatched_keys") or [])
    if faults:
        raise ModelError(f"{source.name}: {len(faults)} weights are missing or of another shape, first {faults[0]}")
    check_unused_tensors(source.name, model, info.get("unexpected_keys") or [])
    return model


def copies_needed(source: Source, scheme: str, double: bool, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether loading will write a 16-bit copy of the weights (of a GGUF file), and a quantized one, into the cache."""
    packed = scheme != "none" and not has_all_weights(_quantized_folder(source, scheme, double, dtype))
    packed = packed and prequantized(source.config()) is None
    return source.kind == "gguf" and not _is_made(_bf16_folder(source)) and (packed or scheme == "none"), packed


def _quantized_folder(source: Source, scheme: str, double: bool, dtype: torch.dtype) -> Path:
    kept = cache_folder() / "quantized" / fingerprint(source)[:24]
    return kept / cache_name(scheme, double, str(dtype).removeprefix("torch."))


def quantized_folder(source: Source, scheme: str, double: bool, dtype: torch.dtype, device: str = "cpu") -> Path:
    """The folder with the quantized weights: the source itself, or one in the cache that is made on first use, on the
    device."""
    already = prequantized(source.config())
    if already == scheme:
        check_packed_checkpoint(source, load_without_weights(source))
        return source.path
    if already is not None:
        raise ModelError(f"{source.name}: its weights are {already} already", fix=f"use --model.quantization {already}")

    def make(folder: Path) -> None:
        LOG.info("quantizing the weights of %s to %s, once", source.name, scheme)
        full = Source(source.name, "folder", weights_folder(source))
        quantize_folder(full, load_without_weights(source), folder, scheme, double, dtype, device)

    return made_once(_quantized_folder(source, scheme, double, dtype), has_all_weights, make)


def build_from_config(config: Any) -> nn.Module:
    """Raises ModelError where transformers has no language model for such a config, or cannot build it."""
    with _known(config):
        model: nn.Module = _auto(config).from_config(config, trust_remote_code=False)
    return model


@contextmanager
def _known(config: Any) -> Iterator[None]:
    """Around what builds a model."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        said = first_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {first_line(error)}"
        what = f"transformers {transformers.__version__} builds no language model of type {config.model_type}: {said}"
        fix = "use a decoder-only language model" if isinstance(error, ValueError) else "mend its config.json"
        raise ModelError(what, fix=fix) from None


def _auto(config: Any) -> Any:
    """The whole model where its class sees or hears too, so that its weights have their published names."""
    named = (config.architectures or [""])[0]
    sees = named in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    whole = sees and named not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def _bf16_folder(source: Source) -> Path:
    return gguf_cache(source) / "bf16"


def _is_made(folder: Path) -> bool:
    return has_all_weights(folder) and "architectures" in read_config(folder)


def _dequantized(source: Source) -> Path:
    """The GGUF file as a folder of bf16 safetensors, made on first use and kept in the cache: tensor by tensor, or, of
    other families, by transformers, which has the whole model in memory."""

    def make(folder: Path) -> None:
        LOG.info("copying the weights of %s in 16 bit, once", source.name)
        bare = load_without_weights(source)
        with gguf_errors(source.path), new_folder(folder) as temp:
            tensors = read_gguf_tensors(source.path, bare, bare.config)
            if tensors is not None:
                kind = {"architectures": [type(bare).__name__], "dtype": "bfloat16"}  # other programs ask for both
                write_json(temp / "config.json", {**read_config(config_folder(source)), **kind})
                write_shards(temp, ({name: weight.to(torch.bfloat16)} for name, weight in tensors), {})
                return
            options: dict[str, Any] = {"gguf_file": source.path.name, "dtype": torch.bfloat16}
            packed = getattr(transformers, "GgufConfig", None)
            if packed is not None:  # transformers 5.2x keeps GGUF blocks packed unless told otherwise
                options["quantization_config"] = packed(dequantize=True)
            model, info = AutoModelForCausalLM.from_pretrained(
                str(source.path.parent), output_loading_info=True, **options
            )
            if lost := sorted(info.get("missing_keys") or []):  # transformers has filled them with random numbers
                raise ModelError(
                    f"{source.path}: {len(lost)} weights are missing, first {lost[0]}", fix="fetch it again"
                )
            unpacked_config(model.config)
            for part in ("hf_quantizer", "quantization_method"):
                if hasattr(model, part):
                    setattr(model, part, None)
            model.is_quantized = False
            model.save_pretrained(temp)

    return made_once(_bf16_folder(source), _is_made, make)
