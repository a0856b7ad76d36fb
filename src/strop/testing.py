"""For tests of what is built around strop: a tiny model, a few rows, a whole run in seconds.

    from strop import testing

    def test_my_callback(tmp_path):
        run = testing.tiny_run(tmp_path, callback=seen.append)
        assert seen[-1]["event"] == "end"

The model is random and knows nothing: it shows that things fit together, never that a model is good.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strop.training.run import Run

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LONGEST = 512  # tokens of a row


def tiny_model(folder: str | Path, *, seed: int = 0) -> Path:
    """Saves a random Llama of two layers (width 32, 259 tokens: bytes and ChatML's) as a model folder; gives its path.

    It loads in transformers like any other. The same seed gives the same weights.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], chat_template=CHATML)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LONGEST,
        "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():
        for weight in model.parameters():  # larger than the default start, so that predictions differ
            if weight.dim() == 2:
                weight.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_rows(file: str | Path, number: int = 24) -> Path:
    """Writes `number` short conversations of two turns as JSONL; gives the file's path."""
    with Path(file).open("w", encoding="utf-8") as out:
        for n in range(number):
            said = [
                {"role": "user", "content": f"what is {n}"},
                {"role": "assistant", "content": f"it is {n * n}" + "!" * (n % 5)},
            ]
            out.write(json.dumps({"messages": said}) + "\n")
    return Path(file)


def tiny_run(folder: str | Path, *, callback: Callable[[dict[str, Any]], None] | None = None, **options: Any) -> Run:
    """Trains a tiny model on tiny rows for four steps, in `folder`: model/, rows.jsonl, run/. options: as of `train`.

    Raises what `strop.train` raises.
    """
    import strop

    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {
        "out": place / "run", "train.max_steps": 4, "train.batch_size": 4, "lora.r": 4, "model.dtype": "fp32",
        "model.device": "cpu", **options,
    }  # fmt: skip
    model = given.pop("model", None) or tiny_model(place / "model")
    data = given.pop("data", None) or tiny_rows(place / "rows.jsonl")
    return strop.train(model=str(model), data=str(data), callback=callback, **given)
