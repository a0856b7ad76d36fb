"""The model and the adapter of a training script."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

from strop.errors import InputError
from strop.interop.draft import Draft, Keys, shown
from strop.interop.hf_arguments import first_weights, lora, whole
from strop.interop.script_parser import UNREAD, Call, Script, keys_of, text_of

MODEL_WAYS = (
    "attn_implementation", "device_map", "low_cpu_mem_usage", "token", "trust_remote_code", "use_cache",
    "fast_inference", "gpu_memory_utilization", "max_lora_rank", "use_exact_model_name", "random_state",
)  # fmt: skip
NO_TARGETS = (
    "not given: peft then takes a few by family (q_proj and v_proj of Llama, Qwen and more); "
    "strop takes all linear layers"
)
_MAKERS = (
    "from_pretrained",
    "get_peft_model",
    "SFTTrainer",
    "DPOTrainer",
    "KTOTrainer",
    "ORPOTrainer",
    "RewardTrainer",
)
# attributes and calls that do not change what is learned here
_NO_MATTER = (
    "pad_token",
    "pad_token_id",
    "padding_side",
    "use_cache",
    "pretraining_tp",
    "model_max_length",
    "_name_or_path",
)
_ONLY_COMPUTED = ("gradient_checkpointing_enable", "enable_input_require_grads", "prepare_model_for_kbit_training")
_NEW_TOKENS = "adds tokens to the vocabulary: give lora.new_tokens"
_CHANGE_WORDS = {
    "setup_chat_format": "ChatML as the template, with tokens of its own: data.template chatml (lora.new_tokens)",
    "add_tokens": _NEW_TOKENS,
    "add_special_tokens": f"{_NEW_TOKENS} (a pad token alone needs nothing)",
    "resize_token_embeddings": _NEW_TOKENS,
}


def read_model(draft: Draft, script: Script, given: ast.expr | None, trainer_line: float) -> None:
    """from_pretrained of a model (not of a tokenizer), or `given`, the name that the trainer is given. What loads after
    the trainer is made (to merge, to try) is not read."""
    loads = [call for call in script.calls if call.name == "from_pretrained" and "Model" in call.owner]
    starts = [call for call in loads if "Peft" in call.owner and call.line < trainer_line]
    loads = [call for call in loads if "Peft" not in call.owner]
    fast = draft.peer == "unsloth"
    if loads:
        _load(draft, script, loads[0], fast)
    bits = [call for call in script.calls if call.name == "BitsAndBytesConfig"]
    if bits:
        _bits(draft, keys_of(draft, script, bits[0]))
        for call in bits[1:]:
            draft.lack(call.name, "a further one; the first was read", call.line)
    elif draft.get("model.quantization") is None:
        draft.put("model.quantization", "none", "no BitsAndBytesConfig")
    name = script.value(given) if given is not None else None
    if isinstance(name, str) and draft.get("model.name") is None:
        draft.put("model.name", name, "the trainer's model")
    if draft.get("model.name") is None and (loads or given is not None):
        draft.unread_model = True
        if not loads and given is not None:
            draft.lack("model", f"{text_of(given)}: not a literal value: give model.name", given.lineno)
    for call in starts:
        at = call.arguments[1:] if call.owner.endswith("PeftModel") else call.arguments
        folder = script.value(at[0]) if at else UNREAD
        if isinstance(folder, str):
            draft.put("model.adapter", folder, f"{call.owner}.from_pretrained, line {call.line}")
        else:
            draft.lack(call.owner, "an adapter to start from: give model.adapter", call.line)
    _afterwards(draft, script, trainer_line)


def _load(draft: Draft, script: Script, call: Call, fast: bool) -> None:
    nodes = {key: node for key, node in call.keywords.items() if key != "quantization_config"}
    keys = keys_of(
        draft, script, replace(call, keywords=nodes, into=""),
        ("model_name" if fast else "pretrained_model_name_or_path",),
    )  # fmt: skip
    for key in ("model_name", "pretrained_model_name_or_path"):
        if (name := keys.take(key)) is not None:
            draft.put("model.name", str(name), key)
    if (revision := keys.take("revision")) is not None:
        draft.put("model.revision", str(revision), "revision")
    types(draft, keys.take("dtype") or keys.take("torch_dtype"))
    keys.take("torch_dtype")
    if (length := keys.take("max_seq_length")) is not None:
        draft.put("data.max_length", whole("max_seq_length", length), "max_seq_length")
    if fast:
        four, eight = keys.take("load_in_4bit"), keys.take("load_in_8bit")
        if keys.take("full_finetuning"):
            raise InputError(f"{draft.file}:{call.line}: full_finetuning: strop trains LoRA adapters alone", fix="")
        half = keys.take("load_in_16bit")
        source = "load_in_4bit" if four is not None else "unsloth's default"
        four = not (eight or half) if four is None else four
        draft.put("model.quantization", "nf4" if four else "int8" if eight else "none", source)
    elif keys.peek("load_in_4bit") or keys.peek("load_in_8bit"):
        _bits(draft, Keys({key: keys.take(key) for key in ("load_in_4bit", "load_in_8bit")}))
    keys.end(draft, (*MODEL_WAYS, "load_in_4bit", "load_in_8bit"))


def _afterwards(draft: Draft, script: Script, trainer_line: float) -> None:
    """What the script does to a model, a tokenizer or a trainer that it has made."""
    made = [call for call in script.calls if call.into and call.line <= trainer_line and call.name in _MAKERS]
    for name in dict.fromkeys(call.into for call in made):
        for key, node, line, _ in script.settings(name):
            if key.rpartition(".")[2] in _NO_MATTER:
                draft.skip(f"{name}.{key}", "", line)
            else:
                draft.lack(f"{name}.{key}", f"{text_of(node)}: set by code, which is not run", line)
    for call in script.calls:
        if call.name in _ONLY_COMPUTED:
            draft.skip(call.name, "", call.line)
        elif call.name in _CHANGE_WORDS:
            draft.lack(call.name, _CHANGE_WORDS[call.name], call.line)


def types(draft: Draft, name: Any) -> None:
    known = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
    if name in known:
        draft.put("model.dtype", known[str(name)], "dtype")
    elif name not in (None, "auto"):
        draft.lack("dtype", str(name))


def _bits(draft: Draft, keys: Keys) -> None:
    four, eight = keys.take("load_in_4bit"), keys.take("load_in_8bit")
    kind = keys.take("bnb_4bit_quant_type", "fp4")
    double = keys.take("bnb_4bit_use_double_quant", False)
    if four:
        draft.put("model.quantization", str(kind), "bnb_4bit_quant_type")
        draft.put("model.double_quantization", bool(double), "bnb_4bit_use_double_quant")
    elif eight:
        draft.put("model.quantization", "int8", "load_in_8bit")
        draft.differ("load_in_8bit", "rows are quantized by their largest value here; there outliers stay in 16 bit")
    keys.end(draft, ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_threshold"))


def read_adapter(draft: Draft, script: Script) -> None:
    fast = draft.peer == "unsloth"
    made = [call for call in script.calls if call.name == ("get_peft_model" if fast else "LoraConfig")]
    if not made:
        raise InputError(
            f"{draft.file}: no {'FastLanguageModel.get_peft_model' if fast else 'LoraConfig'} is called in it: "
            "strop trains LoRA adapters alone", fix="give a script that trains an adapter",
        )  # fmt: skip
    for call in made[1:]:
        if not fast:
            draft.lack(call.name, "a further one; the first was read", call.line)
    call = made[0]
    arguments = call.arguments[1:] if fast else call.arguments
    keys = keys_of(draft, script, replace(call, arguments=arguments, into="" if fast else call.into), ("r",))
    rank = {"lora.r": 16 if fast else 8, "lora.alpha": 16 if fast else 8, "lora.dropout": 0.0}
    modules = keys.peek("target_modules")
    lora(draft, keys, rank="r", alpha="lora_alpha", dropout="lora_dropout", modules="target_modules", defaults=rank)
    if modules is None and fast:
        named = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        draft.put("lora.target_modules", named, "unsloth's default")
    elif modules is None:
        draft.differ("target_modules", NO_TARGETS)
    if (bias := keys.take("bias")) is not None:
        draft.put("lora.bias", bias, "bias")
    if saved := keys.take("modules_to_save"):
        draft.put("lora.modules_to_save", saved, "modules_to_save")
    for key in ("rank_pattern", "alpha_pattern"):
        if value := keys.take(key):
            draft.put(f"lora.{key}", value, key)
    first_weights(draft, keys, "init_lora_weights")
    if loftq := keys.take("loftq_config"):
        draft.lack("loftq_config", f"{shown(loftq)}: lora.init loftq is near to it")
    keys.take("task_type"), keys.take("inference_mode")
    keys.end(draft, ("use_gradient_checkpointing", "random_state", "max_seq_length", "temporary_location"))
