"""Load a frozen base model from a Source; a GGUF file is dequantized once into a cached folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from strop.config.schema import DEVICE_PATTERN
from strop.errors import ModelError, RecipeError, first_line
from strop.models.embedder import MODULES_FILE
from strop.models.experts import dequantization_growth, dequantize_experts
from strop.models.families.gguf import read_gguf_tensors
from strop.models.quantize import FOUR_BIT, dequantize_layers
from strop.models.source import (
    Source,
    fingerprint,
    is_demo,
    prequantized,
    quantization_method,
    read_config,
    read_headers,
    weight_files,
)
from strop.models.tensor_files import (
    CheckpointLayout,
    CheckpointTensors,
    build_quantized,
    check_finite,
    check_packed_checkpoint,
    check_unused_tensors,
    has_all_weights,
    quantize_folder,
    repack_layers,
    write_shards,
)
from strop.models.tokenizer import LOCAL_LOAD_OPTIONS, clear_gguf_quantization, config_folder, gguf_cache, gguf_errors
from strop.runs.folder import build_once, cache_folder, new_folder, write_json
from strop.runs.lock import sha256_text

LOG = logging.getLogger(__name__)

ALL_LAYERS = 1 << 30
RESERVED_BYTES, RESERVED_SHARE = 1 << 30, 0.3  # free GPU memory reserved for generation: the larger of the two
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
GGUF_NOTE = "the base is a GGUF file, whose weights are rounded to bf16 when it is read, also for fp32"
transformers.utils.logging.disable_progress_bar()  # strop shows its own


def check_device_and_dtype(device: str, dtype: str) -> None:
    if not re.fullmatch(DEVICE_PATTERN, device):
        raise RecipeError(f"--device {device}: no such device", fix="choose among auto, cpu, cuda, cuda:N, mps")
    if dtype not in ("auto", *DTYPES):
        meant = next((name for name, type in DTYPES.items() if str(type).endswith(str(dtype))), None)  # torch.bfloat16
        near = f" (did you mean {meant}?)" if meant else ""
        raise RecipeError(f"--dtype {dtype}: no such type{near}", fix=f"choose among auto, {', '.join(DTYPES)}")


def refuse_classifier(source: Source) -> None:
    """Raise ModelError for a merged classifier or reward model."""
    if is_classifier(source):
        what = f"{source.name}: a classifier or reward model, which generates no text"
        raise ModelError(what, fix="give the run that it was merged from, or use transformers' text-classification")


def is_classifier(source: Source) -> bool:
    """Return whether a folder has a score head in place of an output head."""
    architectures = read_config(config_folder(source)).get("architectures") or []
    return bool(architectures) and all(str(name).endswith("ForSequenceClassification") for name in architectures)


def refuse_embedder(source: Source) -> None:
    """Raise ModelError for a folder of sentence-transformers, such as a merged model of embeddings."""
    if is_embedder(source):
        what = f"{source.name}: a model of embeddings, which generates no text"
        raise ModelError(what, fix="give the run that it was merged from, or use sentence-transformers")


def is_embedder(source: Source) -> bool:
    """Return whether a folder has a merged model of embeddings."""
    return (config_folder(source) / MODULES_FILE).is_file()


def load_config(source: Source) -> Any:
    """Return the transformers config. Raises ModelError if transformers does not know the architecture."""
    folder = config_folder(source)
    read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL_LOAD_OPTIONS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        message = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error)
        what = f"{source.name}: transformers {transformers.__version__} cannot read its config: {message}"
        raise ModelError(what) from None
    refuse_classifier(source)
    for section in (config, config.get_text_config()):
        if section.dtype is not None and section.dtype.itemsize == 1:  # the storage dtype, not the compute dtype
            section.dtype = torch.bfloat16
    return config


def load_without_weights(source: Source) -> nn.Module:
    return model_without_weights(load_config(source))


def model_without_weights(config: Any) -> nn.Module:
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
    """Load the frozen model in eval mode. Raises ModelError if weights are missing, misshapen, NaN or infinite."""
    # dtype: of unquantized weights. device: cpu, cuda, cuda:N or mps. quantization: none, nf4, fp4 or int8. double:
    # also quantize the scales of 4-bit weights. resident_layers: number of decoder layers, from the first, to
    # dequantize permanently; None: all, or on a GPU as many as leave enough memory for generation.
    LOG.info("loading the weights of %s", "demo" if is_demo(source.name) else source.name)
    check_generation_config(source)
    if quantization == "none":
        model: Any = _load_16_bit(source, dtype)
    else:
        folder = quantized_folder(source, quantization, double, dtype, device)
        model = build_quantized(
            lambda: build_from_config(load_config(source)), folder, source.name, quantization, dtype
        )
    model.to(device)  # before dequantizing, so that host memory only needs the packed weights
    if quantization != "none":
        layers = resident_layers if resident_layers is not None else _count_fitting_layers(model, device)
        dequantize_layers(model, layers)
        dequantize_experts(model, layers)
    for name, weight in model.named_parameters():
        check_finite(weight, f"{source.name}: weight {name}")
    return prepare_frozen(model, source)


def check_generation_config(source: Source) -> bool:
    """Return whether a folder has sampling settings and stop tokens. Raises ModelError if their file is damaged."""
    # transformers ignores a damaged file, and its stop tokens would be missing
    exists = source.kind == "folder" and (source.path / "generation_config.json").is_file()
    if exists:
        read_config(source.path, "generation_config.json")
    return exists


def prepare_frozen(model: Any, source: Source) -> nn.Module:
    """Set the model's name and generation config, freeze it, set eval mode, and work around bugs in its class."""
    # Depending on its version, PEFT writes one of these into adapters as the name of the base, to load it again.
    name = str(_gguf_folder(source).resolve()) if source.kind == "gguf" else source.name
    model.name_or_path = model.config._name_or_path = name
    if check_generation_config(source):
        model.generation_config = GenerationConfig.from_pretrained(source.path)
    _fix_text_forward(model)
    keep_attention_softcap(model)
    return cast(nn.Module, model.eval().requires_grad_(False))


def _fix_text_forward(model: nn.Module) -> None:
    """Make Llama 4 accept text without images; its forward reads `image_outputs`, unset then (transformers 5.24)."""
    wrapper: Any = model
    if type(model).__name__ != "Llama4ForConditionalGeneration":
        return

    def forward(input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        if pixel_values is not None:
            fix = "train on text, or choose another model that reads images"
            raise ModelError("llama4: transformers fails on its images", fix=fix)
        return wrapper.language_model(input_ids=input_ids, **kwargs)

    wrapper.forward = forward


def keep_attention_softcap(model: Any) -> None:
    """Use eager attention for models with soft-capped scores (Gemma 2): SDPA in transformers 5.20 ignores the cap."""
    text = model.config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) and text._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def _count_fitting_layers(model: nn.Module, device: str) -> int:
    """Return the number of decoder layers to dequantize permanently: all, except on a GPU with too little memory."""
    if not device.startswith("cuda"):
        return ALL_LAYERS
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available, growth = free - max(RESERVED_BYTES, int(RESERVED_SHARE * free)), dequantization_growth(model)
    return next((n for n in range(len(growth), 0, -1) if sum(growth[:n]) <= available), 0)


def restore_packed_weights(model: nn.Module, source: Source, scheme: str, double: bool, dtype: torch.dtype) -> None:
    """Quantize again the layers that `load_base` dequantized for `resident_layers`."""
    repack_layers(model, quantized_folder(source, scheme, double, dtype), source.name, scheme, dtype)


def weights_folder(source: Source) -> Path:
    """Return the folder with a source's 16-bit weights. A GGUF file is converted into the cache on first use."""
    return _dequantize_gguf(source) if source.kind == "gguf" else source.path


def _gguf_folder(source: Source) -> Path:
    return gguf_cache(source) / "bf16"


def stored_dtype(source: Source) -> torch.dtype:
    """Return the smallest dtype that represents all of a source's weights exactly."""
    dtypes = {entry["dtype"] for _, header in read_headers(weights_folder(source)) for entry in header.values()}
    only = dtypes.pop() if len(dtypes) == 1 else ""
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(only, torch.float32)


def stored_dtype_name(source: Source) -> str:
    """Return the key of DTYPES for `stored_dtype`."""
    stored = stored_dtype(source)
    return next(name for name, dtype in DTYPES.items() if dtype == stored)


def check_not_prequantized(source: Source) -> None:
    if scheme := prequantized(source.config()):
        raise ModelError(f"{source.name}: its weights are already quantized", fix=f"use --model.quantization {scheme}")


def _load_16_bit(source: Source, dtype: torch.dtype) -> Any:
    check_not_prequantized(source)
    folder, config = weights_folder(source), load_config(source)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, **LOCAL_LOAD_OPTIONS}
    if quantization_method(source.config()):
        config.quantization_config["dequantize"] = True  # also on a GPU: otherwise adapters get no gradient
        options["config"] = config
    else:
        tensors = CheckpointTensors(folder)
        CheckpointLayout(model_without_weights(config), tensors).check(source.name, tensors)
    with _build_errors(config):
        # Mismatched sizes are reported below, together with missing weights.
        model, info = auto_class(config).from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if wrong := sorted(info.get("missing_keys") or []) + sorted(key for key, *_ in info.get("mismatched_keys") or []):
        raise ModelError(f"{source.name}: {len(wrong)} weights are missing or of another shape, first {wrong[0]}")
    check_unused_tensors(source.name, model, info.get("unexpected_keys") or [])
    return model


def copies_needed(source: Source, scheme: str, double: bool, dtype: torch.dtype) -> tuple[bool, bool]:
    """Return whether loading writes to the cache (a 16-bit copy of a GGUF file, a quantized copy)."""
    is_cached = scheme == "none" or has_all_weights(_quantized_cache(source, scheme, double, dtype))
    needs_quantized = not is_cached and prequantized(source.config()) is None
    needs_16_bit = source.kind == "gguf" and not _is_complete(_gguf_folder(source))
    return needs_16_bit and (needs_quantized or scheme == "none"), needs_quantized


def _quantized_cache(source: Source, scheme: str, double: bool, dtype: torch.dtype) -> Path:
    folder = cache_folder() / "quantized" / fingerprint(source)[:24]
    constants = "-double" if double and scheme in FOUR_BIT else ""
    return folder / f"{scheme}{constants}-{str(dtype).removeprefix('torch.')}-v2"  # v2: increase it if the files change


def layers_cache(source: Source, scheme: str, double: bool, dtype: torch.dtype) -> Path:
    """Return the cache folder of a streamed base's layers (models.streaming)."""
    # The fingerprint does not notice a change of some rows of a tensor; the times of the files do.
    files = [source.path] if source.kind == "gguf" else weight_files(source.path)
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = f"{fingerprint(source)[:24]}-{sha256_text(repr(stamps))[:8]}"
    return cache_folder() / "layers" / key / _quantized_cache(source, scheme, double, dtype).name


def quantized_folder(source: Source, scheme: str, double: bool, dtype: torch.dtype, device: str = "cpu") -> Path:
    """Return the folder with the quantized weights: the source's, or one in the cache that is made on first use."""
    stored = prequantized(source.config())
    if stored == scheme:
        check_packed_checkpoint(source, load_without_weights(source))
        return source.path
    if stored is not None:
        raise ModelError(f"{source.name}: its weights are already {stored}", fix=f"use --model.quantization {stored}")

    def quantize(folder: Path) -> None:
        LOG.info("quantizing the weights of %s to %s, once", source.name, scheme)
        full_precision = Source(source.name, "folder", weights_folder(source))
        quantize_folder(full_precision, load_without_weights(source), folder, scheme, double, dtype, device)

    return build_once(_quantized_cache(source, scheme, double, dtype), has_all_weights, quantize)


def build_from_config(config: Any) -> nn.Module:
    """Build a model with random weights. Raises ModelError if transformers has no language model for the config."""
    with _build_errors(config):
        return cast(nn.Module, auto_class(config).from_config(config, trust_remote_code=False))


@contextmanager
def _build_errors(config: Any) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        message = first_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {first_line(error)}"
        what = f"transformers {transformers.__version__} has no language model of type {config.model_type}: {message}"
        fix = "use a decoder-only language model" if isinstance(error, ValueError) else "correct its config.json"
        raise ModelError(what, fix=fix) from None


def auto_class(config: Any) -> Any:
    """Return the auto class whose weight names match the checkpoint's: the multimodal or the text class."""
    architecture = (config.architectures or [""])[0]
    is_multimodal = architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    needs_multimodal = is_multimodal and architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return AutoModelForImageTextToText if needs_multimodal else AutoModelForCausalLM


def _is_complete(folder: Path) -> bool:
    return has_all_weights(folder) and "architectures" in read_config(folder)


def _dequantize_gguf(source: Source) -> Path:
    """Convert a GGUF file to bf16 safetensors in the cache, once, and return the folder."""
    # Tensor by tensor for families in the table; for others transformers loads the whole model into memory.

    def convert(folder: Path) -> None:
        LOG.info("copying the weights of %s in 16 bit, once", source.name)
        meta_model = load_without_weights(source)
        with gguf_errors(source.path), new_folder(folder) as temp:
            tensors = read_gguf_tensors(source.path, meta_model, meta_model.config, torch.bfloat16)
            if tensors is not None:
                fields = {"architectures": [type(meta_model).__name__], "dtype": "bfloat16"}  # other programs need them
                write_json(temp / "config.json", {**read_config(config_folder(source)), **fields})
                write_shards(temp, ({name: weight} for name, weight in tensors), {})
                return
            options: dict[str, Any] = {"gguf_file": source.path.name, "dtype": torch.bfloat16}
            gguf_config = getattr(transformers, "GgufConfig", None)
            if gguf_config is not None:  # transformers 5.2x keeps GGUF blocks packed by default
                options["quantization_config"] = gguf_config(dequantize=True)
            options["output_loading_info"] = True
            model, info = AutoModelForCausalLM.from_pretrained(str(source.path.parent), **options)
            if missing := sorted(info.get("missing_keys") or []):  # transformers has filled them with random values
                what = f"{source.path}: {len(missing)} weights are missing, first {missing[0]}"
                raise ModelError(what, fix="download it again")
            clear_gguf_quantization(model.config)
            for attribute in ("hf_quantizer", "quantization_method"):
                if hasattr(model, attribute):
                    setattr(model, attribute, None)
            model.is_quantized = False
            model.save_pretrained(temp)

    return build_once(_gguf_folder(source), _is_complete, convert)
