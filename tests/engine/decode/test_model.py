"""Generation stops at the template's stop token, the tokenizer's EOS token and those of the generation config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import strop
from strop.engine.decode.generate import generation_stop_ids
from strop.serve.models import load_models

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


def test_chat_accepts_a_list_of_messages_and_the_usual_names(tiny_folder: Path) -> None:
    model = strop.load(tiny_folder)
    answer = model.chat([{"role": "user", "content": "hi"}], max_tokens=3, temperature=0)
    assert model.history[-1].content == answer and [turn.role for turn in model.history] == ["user", "assistant"]
    assert answer == strop.load(tiny_folder).chat("hi", max_new_tokens=3, temperature=0)
    with pytest.raises(TypeError, match="did you mean temperature"):
        model.chat("hi", temprature=1)
    with pytest.raises(strop.errors.InputError, match="nothing to answer"):
        model.chat([{"role": "assistant", "content": "hi"}])
