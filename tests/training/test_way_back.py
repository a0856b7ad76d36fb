"""An adapter is trained by strop, then by plain peft, then by strop again."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoTokenizer

import strop

FIELDS = {"model.dtype": "fp32", "train.max_steps": 3, "train.batch_size": 24, "train.learning_rate": 5e-3}


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def test_adapter_trained_by_peft_can_be_trained_by_strop_again(
    tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    of = {"model": str(tiny_folder), "data": str(rows_file)}
    first = strop.train(out=tmp_path / "first", **of, **{**FIELDS, "lora.r": 4})
    model = AutoPeftModelForCausalLM.from_pretrained(first.folder / "adapter", is_trainable=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(first.folder / "adapter")
    turns = [{"role": "user", "content": "what is 3"}, {"role": "assistant", "content": "it is 3"}]
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-3)
    before = loss_of(model, ids).item()
    for _ in range(20):
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = loss_of(model, ids).item()
    assert after < before - 0.1  # peft's training has an effect
    model.save_pretrained(tmp_path / "further")
    tokenizer.save_pretrained(tmp_path / "further")

    still = {**FIELDS, "train.learning_rate": 1e-9}  # so that the weights do not change
    again = strop.train(out=tmp_path / "again", **of, **{**still, "model.adapter": str(tmp_path / "further")})
    further, back = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "further", again.folder / "adapter")
    )
    assert further.keys() == back.keys() and any(
        weight.abs().sum() > 0 for name, weight in back.items() if "_B" in name
    )
    assert all(torch.allclose(weight, back[name], atol=1e-6) for name, weight in further.items())
    answers = strop.load(tmp_path / "further").generate(["what is 3"], max_new_tokens=4)
    model.eval()
    prompt = tokenizer.apply_chat_template(
        turns[:1], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(prompt)
        )
    assert answers[0] == tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
