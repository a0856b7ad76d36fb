"""Write the folder of a tuned model: its configs and tokenizer, and all weights if they were trained in full."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strop.models.adapter_config import STROP_FILE
from strop.models.introspect import text_filter
from strop.models.load import load_config, load_without_weights, weights_folder
from strop.models.source import Source
from strop.models.tensor_files import CheckpointLayout, CheckpointTensors, dtype_caster, write_shards
from strop.runs.folder import new_folder, write_json
from strop.runs.lock import versions

GENERATION_CONFIG = "generation_config.json"  # has the sampling settings and the tokens that end an answer
# Files copied from the base. The processor configs describe how images, videos and audio are converted to tensors.
COPIED_FILES = (
    GENERATION_CONFIG, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def make_config(source: Source, dtype: torch.dtype, vocabulary: int) -> Any:
    """Return a base's config for a tuned model in `dtype`, with at least this many embeddings."""
    config = load_config(source)
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, vocabulary)
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Inference servers select the model class by this name, which a GGUF header does not have.
    config.architectures = config.architectures or [type(load_without_weights(source)).__name__]
    return config


def write_generation_config(source: Source, config: Any, end_ids: Sequence[int], out: Path) -> None:
    """Copy a base's generation config and processor configs, and add the tokens that end an answer in training."""
    for name in COPIED_FILES:
        if (file := weights_folder(source) / name).is_file():
            shutil.copy2(file, out / name)
    # They depend on the chat template.
    file = out / GENERATION_CONFIG
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    eos = settings.get("eos_token_id", getattr(config.get_text_config(), "eos_token_id", None))
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not set(end_ids) <= set(eos_ids):
        settings.pop("_from_model_config", None)  # with this key, transformers regenerates the file from config.json
        write_json(file, {**settings, "eos_token_id": list(dict.fromkeys([*end_ids, *eos_ids]))})


def save_model(
    model: nn.Module, tokenizer: Any, source: Source, folder: Path, dtype: torch.dtype, end_ids: Sequence[int],
    identity: dict[str, Any], *, new_tokens: bool = False,
) -> None:  # fmt: skip
    """Write a model whose weights were all trained as a model folder, atomically.

    source: the base, from which weights that are not in the text model are copied. dtype: of the other weights.
    identity: as of `save_adapter`. new_tokens: whether tokens were added to the vocabulary.
    """
    with new_folder(folder) as temp:
        write_shards(temp, _tuned_tensors(model, source, dtype), {})
        own: Any = model.config
        config = make_config(source, dtype, own.get_text_config().vocab_size if new_tokens else 0)
        if new_tokens and hasattr(own.get_text_config(), "vocab_size_per_layer_input"):  # Gemma 4
            config.get_text_config().vocab_size_per_layer_input = _per_layer_embedding(model).num_embeddings
        config.save_pretrained(temp)
        tokenizer.save_pretrained(temp)
        write_generation_config(source, config, end_ids, temp)
        write_json(temp / STROP_FILE, {**identity, "versions": versions()})


def _per_layer_embedding(model: nn.Module) -> Any:
    return next(module for path, module in model.named_modules() if path.endswith("embed_tokens_per_layer"))


def _tuned_tensors(model: nn.Module, source: Source, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a model folder with the names of the base's files, a few at a time."""
    tensors, meta_model, state = (
        CheckpointTensors(weights_folder(source)),
        load_without_weights(source),
        model.state_dict(),
    )
    layout, is_text = CheckpointLayout(meta_model, tensors), text_filter(meta_model)
    cast, written = dtype_caster(meta_model, dtype), set[int]()
    for group in layout.groups:
        names = layout.parameters(group)
        if not any(is_text(name) and name in state for name in names):
            yield {name: tensors.get(name) for name in group.names}
            continue
        parts = layout.write(group, {name: cast(name, state[name].detach().cpu()) for name in names})
        for name, part in parts.items():  # a checkpoint may store a tied weight twice
            parts[name] = part.clone() if part.data_ptr() in written else part
            written.add(parts[name].data_ptr())
        yield parts
