"""Helpers to test code that uses strop: a tiny model, a few rows, and a complete run that takes seconds.

    from strop import testing

    def test_my_callback(tmp_path):
        seen = []
        testing.tiny_run(tmp_path, callback=seen.append)
        assert seen[-1]["event"] == "end"

The model has random weights, so a run tests the integration with strop, not the quality of a model.
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
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MAX_LENGTH = 512  # context length in tokens


def tiny_model(folder: str | Path, *, seed: int = 0) -> Path:
    """Save a Llama model with two layers and random weights as a model folder that transformers can load.

    The hidden size is 32. The vocabulary has 259 tokens: all bytes and the three special tokens of ChatML.

    Args:
        folder: the folder to write.
        seed: random seed of the weights.

    Returns:
        The folder.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL_TOKENS[0], chat_template=CHATML)
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": MAX_LENGTH,
        "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:  # with the small default values, all tokens would be about equally likely
                weight.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_rows(file: str | Path, number: int = 24) -> Path:
    """Write short conversations of two turns as JSON Lines.

    Args:
        file: the file to write.
        number: the number of rows.

    Returns:
        The file's path.
    """
    with Path(file).open("w", encoding="utf-8") as out:
        for n in range(number):
            messages = [
                {"role": "user", "content": f"what is {n}"},
                {"role": "assistant", "content": f"it is {n * n}" + "!" * (n % 5)},
            ]
            out.write(json.dumps({"messages": messages}) + "\n")
    return Path(file)


def tiny_run(folder: str | Path, *, callback: Callable[[dict[str, Any]], None] | None = None, **options: Any) -> Run:
    """Train a tiny model on tiny rows for four steps.

    Args:
        folder: receives model/, rows.jsonl and run/.
        callback: called with each event of the run.
        **options: recipe fields, as for `strop.train`.

    Returns:
        The run.

    Raises:
        StropError: For the same reasons as `strop.train`.
    """
    import strop

    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {
        "out": root / "run", "train.max_steps": 4, "train.batch_size": 4, "lora.r": 4, "model.dtype": "fp32",
        "model.device": "cpu", **options,
    }  # fmt: skip
    model = fields.pop("model", None) or tiny_model(root / "model")
    data = fields.pop("data", None) or tiny_rows(root / "rows.jsonl")
    return strop.train(model=str(model), data=str(data), callback=callback, **fields)
