"""The files with which sentence-transformers loads a model of embeddings: modules, pooling and normalization."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from strop.errors import ModelError
from strop.models.adapter_config import read_identity
from strop.runs.folder import read_json, write_json

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
POOLING_FOLDER, NORMALIZE_FOLDER = "1_Pooling", "2_Normalize"
MODES = {"last": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens"}
OTHER_MODES = ("cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
LIBRARY = "sentence_transformers.models"  # the module's path in all versions


def write_modules(folder: Path, pooling: Literal["last", "mean"], size: int, max_length: int | None) -> None:
    """Write sentence-transformers' files next to the weights, the config and the tokenizer.

    size: of the vectors. max_length: the model's maximum number of tokens, to which longer texts are truncated.
    """
    paths = {"Transformer": "", "Pooling": POOLING_FOLDER, "Normalize": NORMALIZE_FOLDER}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{LIBRARY}.{name}"}
        for index, (name, path) in enumerate(paths.items())
    ]
    for name in (POOLING_FOLDER, NORMALIZE_FOLDER):
        (folder / name).mkdir(exist_ok=True)
    modes = {name: MODES[pooling] == name for name in (*MODES.values(), *(f"pooling_mode_{x}" for x in OTHER_MODES))}
    write_json(folder / POOLING_FOLDER / "config.json", {"word_embedding_dimension": size, **modes})
    write_json(folder / MODULES_FILE, modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    settings: dict[str, Any] = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / SETTINGS_FILE, settings)


def set_padding(tokenizer: Any) -> None:
    """Give a tokenizer a padding token, and pad on the right, where padding does not move the tokens of a text."""
    if tokenizer.pad_token is None:
        known = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        tokenizer.pad_token = next((token for token in known if token is not None), tokenizer.convert_ids_to_tokens(0))
    tokenizer.padding_side = "right"


def read_pooling(folder: Path) -> Literal["last", "mean"]:
    """Return how an adapter pools hidden states. Raises ModelError for ways that strop does not support."""
    pooling = read_identity(folder).get("pooling")
    if pooling is None:
        config = read_json(folder / POOLING_FOLDER / "config.json")
        pooling = next((name for name, mode in MODES.items() if config.get(mode)), None)
    if pooling == "last":
        return "last"
    if pooling == "mean":
        return "mean"
    what = f"{folder}: not the pooling of the last token or the mean of all tokens"
    raise ModelError(what, fix="use sentence-transformers for it")
