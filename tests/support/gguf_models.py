"""Tiny random models of every family with GGUF export, with tokenizers that split text as the family's do."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from strop.exporting.llama_cpp import SAMPLE_STRINGS
from strop.models.adapters import save_adapter
from strop.models.source import fingerprint, locate
from tests.support.families import CORPUS, TEMPLATES

TEXTS = [*CORPUS, *SAMPLE_STRINGS, *(f"what is {n}, it is {n * n}!" for n in range(40))]
SPECIAL: dict[str, tuple[list[str], str | None, str]] = {  # control tokens, bos, eos
    "chatml": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|endoftext|>"),
    "llama3": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    "gemma": (["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "mistral": (["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>"),
    "phi": (
        ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        None,
        "<|endoftext|>",
    ),
}


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


@cache
def byte_level(style: str, steps: tuple[str, ...] = (), own: bool = True, keep: bool = False) -> Any:
    """Return a byte-level BPE tokenizer. steps: "digits" or patterns before byte level. own: add GPT-2's pattern."""
    backend = Tokenizer(models.BPE(ignore_merges=keep))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)
    before = [pre_tokenizers.Digits(individual_digits=True) if step == "digits" else split(step) for step in steps]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return _finished(backend, style)


@cache
def sentencepiece(style: str, prefix: bool) -> Any:
    """Return a tokenizer as converted from SentencePiece: ▁ for spaces, byte fallback, a merge for each pair that is a
    piece.

    prefix: a space before the text and after each control token (Llama 2, Phi 3), or none (Gemma).
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=1200, show_progress=False))
    learned = sorted(trained.get_vocab(), key=trained.token_to_id)
    control = SPECIAL[style][0]
    pieces = list(dict.fromkeys([*control, *(f"<0x{byte:02X}>" for byte in range(256)), *learned, "▁"]))
    vocab = {piece: token for token, piece in enumerate(pieces)}
    merges = [
        (piece[:at], piece[at:])
        for piece in learned
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blanks = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prefix else blanks
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return _finished(backend, style)


def _finished(backend: Tokenizer, style: str) -> Any:
    control, bos, eos = SPECIAL[style]
    rstrip = style == "phi"  # Phi 3's control tokens take the white space that follows them
    added = [AddedToken(t, special=True, normalized=False, rstrip=rstrip and t.startswith("<|")) for t in control]
    backend.add_special_tokens(added)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    unknown = {"unk_token": "<unk>"} if "<unk>" in control else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=TEMPLATES[style], **unknown
    )


TOKENIZERS: dict[str, Any] = {
    "llama": lambda: byte_level("llama3", (PATTERNS["llama3"],), own=False, keep=True),
    "llama-2": lambda: sentencepiece("mistral", prefix=True),
    "mistral": lambda: sentencepiece("mistral", prefix=True),
    "qwen2": lambda: byte_level("chatml", (PATTERNS["qwen2"],), own=False),
    "qwen3": lambda: byte_level("chatml", (PATTERNS["qwen2"],), own=False),
    "smollm": lambda: byte_level("chatml", ("digits",)),
    "gemma2": lambda: sentencepiece("gemma", prefix=False),
    "gemma3_text": lambda: sentencepiece("gemma", prefix=False),
    "phi3": lambda: sentencepiece("phi", prefix=True),
}
PATTERNS = {
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "llama-2": {"tie_word_embeddings": True, "attention_bias": True},
    "smollm": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
    "mistral": {"sliding_window": 128},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 2},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 6},
    "phi3": {"sliding_window": 128},
}


def config(family: str, vocabulary: int, **changes: Any) -> Any:
    kind = {"llama-2": "llama", "smollm": "llama"}.get(family, family)
    sizes = {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return transformers.AutoConfig.for_model(kind, **{**sizes, **OPTIONS[family], **changes})


def save(family: str, folder: Path, **changes: Any) -> Path:
    """Save a model folder with random weights, varied norms and nonzero biases."""
    tokenizer = TOKENIZERS[family]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(family, len(tokenizer), **changes)).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(4)
            elif "norm" in name or name.endswith("bias"):
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapt(base: str | Path, folder: Path, **options: Any) -> Path:
    """Save an adapter of a base in strop's format with nonzero B and, if trained, other biases."""
    source = locate(str(base))
    from strop.models.load import load_base
    from strop.models.tokenizer import load_tokenizer

    torch.manual_seed(1)
    model = load_base(source, torch.float32, "cpu")
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**chosen))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name or (name.endswith("bias") and weight.requires_grad):
                weight.normal_(0, 0.1)
    identity = {"base": {"name": source.name, "fingerprint": fingerprint(source)}, "dtype": "fp32"}
    save_adapter(tuned, load_tokenizer(source), folder, identity)
    return folder
