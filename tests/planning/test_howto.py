"""The plan that the how-to page prints is the current plan."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import Qwen2Config

import strop

ROOT = Path(__file__).parents[2]
NAMES = {"constants": "quantization_constants", "activations": "saved_activations"}  # table label -> JSON name
QWEN = Qwen2Config(
    architectures=["Qwen2ForCausalLM"], hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
)  # fmt: skip


def test_howto_page_prints_the_current_plan_of_a_7b_model(tmp_path: Path) -> None:
    QWEN.save_pretrained(tmp_path)
    plan = strop.plan(model=str(tmp_path), gpu="RTX 4060", data={"max_length": 512}).as_json()
    page = (ROOT / "docs" / "howto.md").read_text(encoding="utf-8")
    block = page[page.index("its column `train` says") :].split("```")[1]
    printed = {
        name: int(number.replace(",", "")) for name, number in re.findall(r"^([a-z ]+?)  +([\d,]+)", block, re.M)
    }
    train = plan["phases"]["train"]
    expected = {name: round(train["parts"][NAMES.get(name, name)] / 2**20) for name in set(printed) - {"needed"}}
    assert printed == {**expected, "needed": round(train["needed_bytes"] / 2**20)}
    assert sum(expected.values()) > 0.999 * printed["needed"]
    assert re.findall(r"^given up (.*)$", block, re.M) == plan["gives_up"] and plan["fits"]
    assert f"{plan['phases']['merge']['peak_bytes'] / 2**30:.0f} GiB for this model" in page
