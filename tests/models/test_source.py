"""Damaged model files raise ModelError with the name of the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from strop.errors import ModelError
from strop.models.families.gguf_header import GgufReader, read_gguf_config
from strop.models.families.shape import ModelShape, read_model_info
from strop.models.source import demo_file, locate, prequantized, read_config, read_safetensors_header, weight_files

CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
VALID = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"1", b"[" * 100_000, b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1]}}',
        *(
            json.dumps({"a": {**VALID, **change}}).encode()
            for change in (
                {"shape": [2]}, {"dtype": "F16"}, {"dtype": "F5"}, {"data_offsets": [-4, 4]},
                {"data_offsets": ["0", "4"]}, {"shape": [-1]}, {"dtype": 3},
            )
        ),
    ],
)  # fmt: skip
def test_invalid_safetensors_header_is_refused(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ModelError, match=r"model.safetensors: damaged: its header"):
        read_safetensors_header(file)


@pytest.mark.parametrize("index", ["[]", "{", "{}", "[" * 100_000, '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_damaged_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index\.json: damaged"):
        weight_files(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model_type": ["x"]}'])
def test_invalid_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("size", [{"num_hidden_layers": 2**62}, {"vocab_size": 2**62}, {"hidden_size": True}])
def test_invalid_size_is_refused(size: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(size))):
        ModelShape.from_config({**CONFIG, **size})
    assert prequantized({"quantization_config": "x"}) is None


def test_gguf_reader_reads_the_same_fields_and_tensors_as_gguf() -> None:
    fast, slow = GgufReader(demo_file()), gguf.GGUFReader(demo_file())
    assert list(fast.fields) == list(slow.fields)
    for name, field in fast.fields.items():
        assert (field.contents(), field.types) == (slow.fields[name].contents(), slow.fields[name].types)
    assert [(x.name, x.data_offset, x.n_bytes) for x in fast.tensors] == [
        (x.name, x.data_offset, x.n_bytes) for x in slow.tensors
    ]


@pytest.mark.parametrize("lost", [1, 1000, 30_000_000])
def test_truncated_gguf_file_is_refused(tmp_path: Path, lost: int) -> None:
    whole = demo_file().read_bytes()
    assert read_gguf_config(demo_file())["num_hidden_layers"] == 30
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[:-lost])
    functions: tuple[Callable[[str], Any], ...] = (read_model_info, locate)
    for read in functions:
        with pytest.raises(ModelError, match=f"cut short: {len(whole) - lost} bytes, {len(whole)} expected"):
            read(str(file))


@pytest.mark.parametrize("recipe", [b"", b"[1, 2]", b"lora: {r: 8}", b"\xff\xfe\0", b"model: {name: [a]}"])
def test_run_with_damaged_recipe_is_refused(tmp_path: Path, recipe: bytes) -> None:
    (tmp_path / "recipe.yaml").write_bytes(recipe)
    (tmp_path / "lock.json").write_text("{}")
    functions: tuple[Callable[[str], Any], ...] = (read_model_info, locate)
    for read in functions:
        with pytest.raises(ModelError, match=r"recipe\.yaml: damaged"):
            read(str(tmp_path))
