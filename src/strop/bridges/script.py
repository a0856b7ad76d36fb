"""Training scripts for TRL or Unsloth, and TRL's YAML, as a recipe. Names and defaults as of TRL 1.10 and Unsloth of
August 2026."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from strop.bridges.calls import UNREAD, Call, Script
from strop.bridges.draft import Draft, Keys, read_yaml, shown
from strop.bridges.terms import CUTS_THE_END, OWN_WAY, lora, number, packing, training_arguments
from strop.errors import InputError, RecipeError

CONFIGS = {
    "SFTConfig": "sft", "TrainingArguments": "sft", "UnslothTrainingArguments": "sft", "DPOConfig": "dpo",
    "KTOConfig": "kto", "ORPOConfig": "orpo", "CPOConfig": "simpo", "RewardConfig": "reward",
}  # fmt: skip
TRAINERS = (
    "SFTTrainer",
    "DPOTrainer",
    "KTOTrainer",
    "ORPOTrainer",
    "CPOTrainer",
    "RewardTrainer",
    "Trainer",
    "UnslothTrainer",
)
NOT_HERE = (
    "GRPOConfig", "PPOConfig", "RLOOConfig", "BCOConfig", "OnlineDPOConfig", "NashMDConfig", "XPOConfig", "GKDConfig",
    "PRMConfig",
)  # fmt: skip
RATES = {"sft": 2e-5, "reward": 1e-4}  # else 1e-6
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "simpo": "simpo"}
DEFAULTS = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear", "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42,
}  # fmt: skip
MODEL_WAYS = (
    "attn_implementation", "device_map", "low_cpu_mem_usage", "token", "trust_remote_code", "use_cache",
    "fast_inference", "gpu_memory_utilization", "max_lora_rank", "use_exact_model_name", "random_state",
)  # fmt: skip
CHANGES = (
    "map",
    "filter",
    "select",
    "shuffle",
    "remove_columns",
    "rename_column",
    "train_test_split",
    "concatenate_datasets",
    "standardize_sharegpt",
    "standardize_data_formats",
    "to_sharegpt",
    "cast_column",
)
ON_ALL = (
    "rows of `messages` and of `text` are trained on in full there unless assistant_only_loss is on, prompt and "
    "completion on the completion; strop trains on answers: data.loss all trains on everything"
)


def read(path: Path, peer: str) -> Draft:
    """peer: trl or unsloth. Raises InputError where no training is found, or one that strop does not have."""
    draft = Draft(peer, path)
    if peer == "trl" and path.suffix in (".yaml", ".yml"):
        return _from_yaml(draft)
    script = Script(path)
    refused = [call for call in script.calls if call.name in NOT_HERE]
    if refused:
        what = f"{path}:{refused[0].line}: {refused[0].name}: strop has no such objective"
        raise InputError(what, fix="it has sft, dpo, ipo, kto, orpo, simpo and reward")
    configs = [call for call in script.calls if call.name in CONFIGS]
    if not configs:
        raise InputError(f"{path}: no {', '.join(CONFIGS)} is made in it", fix="give the script that trains")
    for call in configs[1:]:
        draft.lack(call.name, "a second one; the first was read", call.line)
    _model(draft, script)
    _adapter(draft, script)
    config = configs[0]
    keys = _keys(draft, script, config)
    keys_of_trainer = _trainer(draft, script)
    objective = CONFIGS[config.name]
    _arguments(draft, keys, objective, peer)
    _rows(draft, script, keys_of_trainer)
    _masks(draft, script, keys, objective)
    keys.end(draft, OWN_WAY)
    return draft


def _keys(draft: Draft, script: Script, call: Call, positional: tuple[str, ...] = ()) -> Keys:
    """The literal arguments of a call; of the others it is told that they cannot be read."""
    given = {**dict(zip(positional, call.arguments, strict=False)), **call.keywords}
    values: dict[str, Any] = {}
    for key, node in given.items():
        value = script.value(node)
        if value is UNREAD:
            draft.lack(f"{call.name}.{key}", f"{_text(node)}: not a literal value, and nothing is run", node.lineno)
        else:
            values[key] = value
    return Keys(values, {key: node.lineno for key, node in given.items()})


def _text(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _model(draft: Draft, script: Script) -> None:
    """from_pretrained of a model (not of a tokenizer), or the name that the trainer is given."""
    loads = [
        call for call in script.calls
        if call.name == "from_pretrained" and ("Model" in call.owner) and "Peft" not in call.owner
    ]  # fmt: skip
    fast = draft.peer == "unsloth"
    if loads:
        call = loads[0]
        nodes = {key: node for key, node in call.keywords.items() if key != "quantization_config"}
        keys = _keys(draft, script, Call(call.name, call.owner, call.line, call.arguments, nodes, call.into),
                     ("model_name" if fast else "pretrained_model_name_or_path",))  # fmt: skip
        for key in ("model_name", "pretrained_model_name_or_path"):
            if (name := keys.take(key)) is not None:
                draft.put("model.name", str(name), key)
        if (revision := keys.take("revision")) is not None:
            draft.put("model.revision", str(revision), "revision")
        _types(draft, keys.take("dtype") or keys.take("torch_dtype"))
        keys.take("torch_dtype")
        if (length := keys.take("max_seq_length")) is not None:
            draft.put("data.max_length", int(length), "max_seq_length")
        if fast:
            four, eight = keys.take("load_in_4bit"), keys.take("load_in_8bit")
            whole = keys.take("full_finetuning")
            if whole:
                raise InputError(f"{draft.file}:{call.line}: full_finetuning: strop trains LoRA adapters alone", fix="")
            half = keys.take("load_in_16bit")
            source = "load_in_4bit" if four is not None else "unsloth's default"
            four = not (eight or half) if four is None else four
            draft.put("model.quantization", "nf4" if four else "int8" if eight else "none", source)
        keys.end(draft, MODEL_WAYS)
    bits = [call for call in script.calls if call.name == "BitsAndBytesConfig"]
    if bits:
        _bits(draft, _keys(draft, script, bits[0]))
    elif not fast:
        draft.put("model.quantization", "none", "no BitsAndBytesConfig")


def _types(draft: Draft, name: Any) -> None:
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


def _adapter(draft: Draft, script: Script) -> None:
    fast = draft.peer == "unsloth"
    made = [call for call in script.calls if call.name == ("get_peft_model" if fast else "LoraConfig")]
    if not made:
        raise InputError(
            f"{draft.file}: no {'FastLanguageModel.get_peft_model' if fast else 'LoraConfig'} is called in it: "
            "strop trains LoRA adapters alone", fix="give a script that trains an adapter",
        )  # fmt: skip
    call = made[0]
    arguments = call.arguments[1:] if fast else call.arguments
    keys = _keys(draft, script, Call(call.name, call.owner, call.line, arguments, call.keywords, call.into), ("r",))
    rank = {"lora.r": 16 if fast else 8, "lora.alpha": 16 if fast else 8, "lora.dropout": 0.0}
    modules = keys.peek("target_modules")
    lora(draft, keys, rank="r", alpha="lora_alpha", dropout="lora_dropout", modules="target_modules", defaults=rank)
    if modules is None and fast:
        named = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        draft.put("lora.target_modules", named, "unsloth's default")
    elif modules is None:
        draft.differ(
            "target_modules", "not given: peft then takes a few by family (q_proj and v_proj of Llama, Qwen and more); "
            "strop takes all linear layers",
        )  # fmt: skip
    if (bias := keys.take("bias")) is not None:
        draft.put("lora.bias", bias, "bias")
    if saved := keys.take("modules_to_save"):
        draft.put("lora.modules_to_save", saved, "modules_to_save")
    for key in ("rank_pattern", "alpha_pattern"):
        if value := keys.take(key):
            draft.put(f"lora.{key}", value, key)
    start = keys.take("init_lora_weights")
    if start in ("gaussian", "loftq"):
        draft.put("lora.init", start, "init_lora_weights")
    elif start not in (None, True):
        draft.lack("init_lora_weights", shown(start))
    if loftq := keys.take("loftq_config"):
        draft.lack("loftq_config", f"{shown(loftq)}: lora.init loftq is near to it")
    keys.take("task_type"), keys.take("inference_mode")
    keys.end(draft, ("use_gradient_checkpointing", "random_state", "max_seq_length", "temporary_location"))


def _trainer(draft: Draft, script: Script) -> dict[str, ast.expr]:
    """The arguments of the trainer's call."""
    made = [call for call in script.calls if call.name in TRAINERS]
    if not made:
        return {}
    keywords = dict(made[0].keywords)
    for key in ("model", "args", "peft_config", "tokenizer", "processing_class", "data_collator", "callbacks"):
        node = keywords.pop(key, None)
        name = script.value(node) if node is not None and key == "model" else UNREAD
        if isinstance(name, str) and draft.get("model.name") is None:
            draft.put("model.name", name, f"{made[0].name}.model")
        if key in ("data_collator", "callbacks") and node is not None:
            draft.lack(f"{made[0].name}.{key}", _text(node), node.lineno)
    for key, node in keywords.items():
        if key in ("train_dataset", "eval_dataset", "dataset_num_proc"):
            continue
        value = script.value(node)
        if key in ("max_seq_length", "max_length") and isinstance(value, int):
            draft.put("data.max_length", value, key)
        elif key == "packing" and value is True:
            packing(draft, key)
        elif value is not None and (key, value) not in (("packing", False), ("dataset_text_field", "text")):
            draft.lack(f"{made[0].name}.{key}", _text(node), node.lineno)
    return keywords


def _rows(draft: Draft, script: Script, keywords: dict[str, ast.expr]) -> None:
    loads = [call for call in script.calls if call.name in ("load_dataset", "from_json", "from_csv", "from_parquet")]
    held_out = script.root(keywords["eval_dataset"]) if "eval_dataset" in keywords else ""
    share = [call for call in script.calls if call.name == "train_test_split"]
    by_name = {call.into: call for call in loads if call.into}
    for call in loads:
        source = _source(draft, script, call)
        if source and call.into == held_out and len(by_name) > 1:
            draft.put("data.eval", source, f"load_dataset, line {call.line}")
        elif source and draft.get("data.train") is None:
            draft.put("data.train", source, f"load_dataset, line {call.line}")
        elif source:
            draft.lack("load_dataset", f"{shown(source)}: a further data set", call.line)
    if held_out and share and draft.get("data.eval") is None:
        size = script.value(share[0].keywords["test_size"]) if "test_size" in share[0].keywords else 0.25
        if isinstance(size, float) and 0 < size < 1:
            draft.put("data.eval", f"{100 * size:g}%", "train_test_split")
            draft.differ("train_test_split", "which rows are held out is decided by their content here, not by a seed")
        else:
            draft.lack("train_test_split", "a number of rows; give data.eval a file or a share", share[0].line)
    elif held_out and draft.get("data.eval") is None:
        draft.lack(
            "eval_dataset", f"{_text(keywords['eval_dataset'])}: give data.eval", keywords["eval_dataset"].lineno
        )
    for call in script.calls:
        if call.name == "get_chat_template":
            draft.differ(call.name, "a name of unsloth's own; strop takes the model's chat template (or data.template)")
        if call.name in CHANGES and call.name != "train_test_split":
            of = f"{call.owner}." if call.owner else ""
            draft.lack(call.name, f"rows are changed by code, which is not run: {of}{call.name}(...)", call.line)


def _source(draft: Draft, script: Script, call: Call) -> Any:
    path = script.value(call.arguments[0]) if call.arguments else script.value(call.keywords.get("path", ast.Name("")))
    files = script.value(call.keywords["data_files"]) if "data_files" in call.keywords else None
    if call.name != "load_dataset":
        return path if path is not UNREAD else None
    if path is UNREAD or files is UNREAD:
        draft.lack("load_dataset", "of a value that is not literal: give --data", call.line)
        return None
    split = script.value(call.keywords["split"]) if "split" in call.keywords else "train"
    if (
        split is UNREAD
        or not (isinstance(split, str) and split.startswith(("train", "test", "valid")))
        or "[" in str(split)
    ):
        draft.lack(
            "load_dataset.split",
            f"{shown(split) if split is not UNREAD else 'not literal'}: all rows are taken",
            call.line,
        )
    elif split != "train" and files is None:
        draft.differ("load_dataset.split", f"{split}: name the split's file within the data set: {path}/...")
    if len(call.arguments) > 1 or "name" in call.keywords:
        draft.lack("load_dataset.name", f"a part of the data set: give its path within it: {path}/...", call.line)
    if files is None:
        return path
    if isinstance(files, dict):
        files = files.get(str(split), next(iter(files.values())))
    listed = [files] if isinstance(files, str) else list(files)
    found = [str(file) if path in ("json", "csv", "parquet", "text") else f"{path}/{file}" for file in listed]
    return found[0] if len(found) == 1 else found


def _arguments(draft: Draft, keys: Keys, objective: str, peer: str) -> None:
    loss = keys.take("loss_type")
    loss = loss[0] if isinstance(loss, list) and len(loss) == 1 else loss
    if objective in ("dpo", "simpo") and loss is not None:
        if loss not in LOSSES:
            raise RecipeError(
                f"{draft.file}: loss_type {shown(loss)}: strop has no such objective", fix="sigmoid, ipo or simpo"
            )
        objective = LOSSES[str(loss)]
    elif objective == "simpo":
        raise RecipeError(
            f"{draft.file}: CPO: strop has no such objective", fix="it has simpo: loss_type simpo, cpo_alpha 0"
        )
    elif loss not in (None, "nll", "chunked_nll", "kto"):
        raise RecipeError(
            f"{draft.file}: loss_type {shown(loss)}: strop has no such objective", fix="leave it out there"
        )
    if objective != "sft":
        draft.put("train.objective", objective, "the config's class")
    rate = 5e-5 if objective == "sft" and peer == "unsloth" else RATES.get(objective, 1e-6)
    training_arguments(
        draft, keys, {**DEFAULTS, "learning_rate": rate}, said="trl" if peer == "trl" else "transformers"
    )
    for key, name, used in (
        ("beta", "train.beta", ("dpo", "ipo", "kto", "orpo", "simpo")),
        ("label_smoothing", "train.label_smoothing", ("dpo", "simpo")),
        ("simpo_gamma", "train.gamma", ("simpo",)),
        ("desirable_weight", "train.desirable_weight", ("kto",)),
        ("undesirable_weight", "train.undesirable_weight", ("kto",)),
    ):
        if (value := keys.take(key)) is not None and objective in used:
            draft.put(name, number(value), key)
        elif value:
            draft.lack(key, f"{shown(value)}: not read by {objective}")
    if objective == "simpo" and (alpha := keys.take("cpo_alpha", 1.0)):
        draft.lack("cpo_alpha", f"{alpha}: train.sft_weight is near to it (a mean over tokens)")
    length = keys.take("max_length", keys.take("max_seq_length"))
    if length is not None:
        draft.put("data.max_length", int(length), "max_length")
    elif draft.get("data.max_length") is None:
        draft.put("data.max_length", 1024, "trl's default")
    draft.differ("max_length", CUTS_THE_END)
    keys.take("truncation_mode"), keys.take("disable_dropout")
    if keys.take("packing"):
        packing(draft, "packing")
    if keys.peek("dataset_text_field") == "text":
        keys.take("dataset_text_field")


def _masks(draft: Draft, script: Script, keys: Keys, objective: str) -> None:
    """Which tokens are trained on."""
    only, completion = keys.take("assistant_only_loss"), keys.take("completion_only_loss")
    masked = [call for call in script.calls if call.name == "train_on_responses_only"]
    if objective != "sft" or only or completion or masked:
        return
    if completion is False:
        draft.put("data.loss", "all", "completion_only_loss")
    else:
        draft.differ("assistant_only_loss", ON_ALL)


def _from_yaml(draft: Draft) -> Draft:
    """What `trl sft --config FILE` reads: the arguments of script, training and model in one map."""
    keys = Keys(read_yaml(draft.file))
    if not keys.take("use_peft"):
        raise InputError(
            f"{draft.file}: use_peft is not on: strop trains LoRA adapters alone", fix="set use_peft: true"
        )
    for key, name in (
        ("model_name_or_path", "model.name"),
        ("dataset_name", "data.train"),
        ("model_revision", "model.revision"),
    ):
        if (value := keys.take(key)) is not None and value != "main":
            draft.put(name, str(value), key)
    _types(draft, keys.take("dtype") or keys.take("torch_dtype"))
    lora(draft, keys, rank="lora_r", alpha="lora_alpha", dropout="lora_dropout", modules="lora_target_modules",
         defaults={"lora.r": 16, "lora.alpha": 32, "lora.dropout": 0.05})  # fmt: skip
    if keys.take("load_in_4bit"):
        draft.put("model.quantization", keys.take("bnb_4bit_quant_type", "nf4"), "load_in_4bit")
        draft.put("model.double_quantization", bool(keys.take("use_bnb_nested_quant", False)), "use_bnb_nested_quant")
    else:
        draft.put("model.quantization", "int8" if keys.take("load_in_8bit") else "none", "load_in_8bit")
    if saved := keys.take("lora_modules_to_save"):
        draft.put("lora.modules_to_save", saved, "lora_modules_to_save")
    loss = str(keys.peek("loss_type", ""))
    objective = "dpo" if "beta" in keys or loss in ("sigmoid", "ipo") else "sft"
    draft.differ(
        "the command", f"a config does not say whether it is for `trl sft` or `trl dpo`: taken for {objective}"
    )
    _arguments(draft, keys, objective, "trl")
    only, completion = keys.take("assistant_only_loss"), keys.take("completion_only_loss")
    if objective == "sft" and not only and not completion:
        draft.differ("assistant_only_loss", ON_ALL)
    keys.end(draft, (*OWN_WAY, *MODEL_WAYS, "dataset_train_split", "dataset_test_split", "lora_task_type"))
    return draft
