"""Generation stops at the template's stop token, the tokenizer's EOS token and those of the generation config."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import strop
import strop.api
from strop.engine import device
from strop.engine.decode.generate import generation_stop_ids
from strop.exporting import llama_cpp
from strop.exporting.gguf import export_gguf
from strop.models.adapter_config import STROP_FILE
from strop.models.load import DTYPES, GGUF_NOTE
from strop.runs.events import read_events
from strop.runs.folder import RunFolder
from strop.serve.models import load_models
from tests.support import gguf_models
from tests.support.runs import run
from tests.support.tiny import write_rows

PROMPT = np.arange(7, 12, dtype=np.int32)


@pytest.mark.parametrize("source", ["tokenizer", "generation config"])
def test_generation_stops_at_eos_of_tokenizer_and_generation_config(
    source: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(tiny_folder, folder)
    free = strop.load(folder, dtype="fp32")
    ids = torch.from_numpy(PROMPT.astype(np.int64))[None]
    end = int(free.module(ids).logits[0, -1].argmax())  # the first token of a completion
    assert end not in free.renderer.end_ids and free.answer([PROMPT], max_new_tokens=6)[0].tokens > 1
    if source == "tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        tokenizer.save_pretrained(folder)
    else:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 1]}), encoding="utf-8")
    model = strop.load(folder, dtype="fp32")
    answer = model.answer([PROMPT], max_new_tokens=6)[0]
    assert answer.stopped and answer.tokens == 1
    how = {"device": "cpu", "dtype": "fp32", "quantization": "auto", "force": False}
    served = load_models([str(folder)], **how).models["own"]
    assert end in served.stop_ids and set(free.renderer.stop_ids) <= set(served.stop_ids)


def test_generated_generation_config_adds_no_stop_tokens() -> None:
    assert generation_stop_ids(GenerationConfig(eos_token_id=[1, 2])) == (1, 2)
    assert generation_stop_ids(GenerationConfig(eos_token_id=1)) == (1,)
    assert (
        generation_stop_ids(GenerationConfig())
        == generation_stop_ids(GenerationConfig(eos_token_id=1, _from_model_config=True))
        == ()
    )


def trained_in(folder: Path, dtype: str, copy: Path) -> Path:
    """Return a copy of an adapter whose record says that it was trained in `dtype`."""
    shutil.copytree(folder, copy)
    record = copy / STROP_FILE
    record.write_text(json.dumps({**json.loads(record.read_text(encoding="utf-8")), "dtype": dtype}), encoding="utf-8")
    return copy


@pytest.mark.parametrize(
    ("trained", "fastest", "loaded"),
    [("fp32", "bf16", "fp32"), ("bf16", "bf16", "bf16"), ("bf16", "fp32", "fp32"), ("fp16", "bf16", "fp32")],
)
def test_run_is_loaded_in_the_dtype_of_training_or_a_note_says_otherwise(
    trained: str, fastest: str, loaded: str, adapter_folders: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(device, "pick_dtype", lambda device: (fastest, "measured"))
    folder = trained_in(adapter_folders[0], trained, tmp_path / "run")
    model = strop.load(folder)
    assert (model.dtype, next(model.module.parameters()).dtype) == (loaded, DTYPES[loaded])
    note = f"trained in {trained}, loaded in {loaded} (measured): --dtype {trained} loads it as trained"
    assert model.notes == ([] if trained == loaded else [note])
    explicit = strop.load(folder, dtype="bf16")
    assert explicit.dtype == "bf16" and explicit.notes == []
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    words = ["--data", rows, "--max-new-tokens", "2", "--json"]
    for option, expected in (([], loaded), (["--dtype", "bf16"], "bf16")):
        code, out, err = run("eval", folder, *words, *option, capsys=capsys)
        assert code == 0 and json.loads(out)["dtype"] == expected, err
        assert ("trained in" in err) == (expected != trained and not option)


def test_chat_has_a_dtype_and_knows_which(
    adapter_folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    loaded = []
    load = strop.load
    monkeypatch.setattr(strop.api, "load", lambda *args, **options: loaded.append(load(*args, **options)) or loaded[0])
    code, _, err = run("chat", adapter_folders[0], "--dtype", "fp32", "--max-new-tokens", "2", capsys=capsys)
    assert code == 0 and loaded[0].dtype == "fp32", err
    code, _, err = run("chat", adapter_folders[0], "--dtype", "fp8", capsys=capsys)
    assert code == 2 and "--dtype fp8: no such type" in err


def test_adapters_of_different_dtypes_on_one_base_are_noted(adapter_folders: list[Path], tmp_path: Path) -> None:
    first, second = (
        trained_in(folder, dtype, tmp_path / dtype)
        for folder, dtype in zip(adapter_folders, ("fp32", "bf16"), strict=True)
    )
    served = load_models([str(first), str(second)], device="cpu", dtype="auto", quantization="auto", force=False)
    assert served.dtype == "fp32"
    assert served.notes == [f"{second}: was trained on another dtype of the base than {first}, which is used here"]


def test_rounding_of_a_gguf_base_is_noted_where_fp32_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    rows = str(write_rows(tmp_path / "rows.jsonl", 8))
    adapter = gguf_models.adapt(gguf_models.save("llama", tmp_path / "base"), tmp_path / "tuned")
    export_gguf(str(adapter), tmp_path / "m.gguf", kind="f32", data=rows)
    model = strop.load(tmp_path / "m.gguf", dtype="fp32")
    assert model.notes == [GGUF_NOTE]
    weight = model.module.get_input_embeddings().weight
    assert torch.equal(weight, weight.bfloat16().float())
    assert strop.load(tmp_path / "m.gguf", dtype="bf16").notes == []
    small = {"train.max_steps": 1, "lora.r": 2, "model.dtype": "fp32", "out": tmp_path / "r"}
    trained = strop.train(model=tmp_path / "m.gguf", data=rows, **small)
    notes = [event.get("text") for event in read_events(RunFolder(Path(trained)).events) if event["event"] == "note"]
    assert GGUF_NOTE in notes and GGUF_NOTE not in strop.load(trained).notes


def test_chat_accepts_a_list_of_messages_and_the_usual_names(tiny_folder: Path) -> None:
    model = strop.load(tiny_folder)
    history: list[Any] = []
    answer = model.chat([{"role": "user", "content": "hi"}], max_tokens=3, temperature=0)
    assert answer == model.chat("hi", max_new_tokens=3, temperature=0, history=history)
    assert history == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
    turns = [*history, {"role": "user", "content": "and"}]
    assert model.chat("and", max_tokens=3, temperature=0, history=history) == model.chat(
        turns, max_tokens=3, temperature=0
    )
    assert len(history) == 4
    for wrong in ({"text": "hi", "system": "be kind"}, {"text": turns}):
        with pytest.raises(strop.InputError, match=r"goes on|next to messages"):
            model.chat(**wrong, history=history)
    messages = [{"role": role, "content": "an <image> tag"} for role in ("user", "assistant", "user")]
    assert model.chat(messages, max_tokens=3, temperature=0)  # it is text without an image
    with pytest.raises(strop.InputError, match="did you mean temperature"):
        model.chat("hi", temprature=1)
    with pytest.raises(strop.errors.InputError, match="nothing to answer"):
        model.chat([{"role": "assistant", "content": "hi"}])
