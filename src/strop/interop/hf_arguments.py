"""What several tools share: transformers' TrainingArguments, peft's LoraConfig, names of optimizers and schedules."""

from __future__ import annotations

import re
from typing import Any

from strop.errors import InputError, RecipeError, nearest
from strop.interop.draft import Draft, Keys, shown

OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adam"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw_8bit",), "paged_adamw_8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("adafactor",), "adafactor"),
    **dict.fromkeys(("lion", "lion_32bit", "paged_lion_32bit"), "lion"),
    **dict.fromkeys(("sgd",), "sgd"),
}
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
# of TrainingArguments and the like: how it is computed, watched and stored, not what is learned
OWN_WAY = (
    "bf16_full_eval", "data_seed", "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "dataset_num_proc", "ddp_timeout", "disable_tqdm", "do_eval", "do_train",
    "eval_accumulation_steps", "eval_strategy", "evaluation_strategy", "fp16_full_eval",
    "gradient_checkpointing_kwargs", "group_by_length", "include_tokens_per_second", "load_best_model_at_end",
    "log_level", "logging_dir", "logging_first_step", "logging_strategy", "optim_args", "overwrite_output_dir",
    "pad_to_multiple_of", "padding_free", "per_device_eval_batch_size", "prediction_loss_only",
    "remove_unused_columns", "report_to", "run_name", "save_only_model", "save_safetensors", "save_strategy", "tf32",
    "torch_empty_cache_steps", "use_cpu", "use_liger_kernel", "eval_packing", "packing_strategy",
    "activation_offloading", "precompute_ref_log_probs", "precompute_ref_batch_size", "metric_for_best_model",
    "greater_is_better", "dataset_kwargs", "accelerator_config", "activation_checkpointing_kwargs",
    "auto_find_batch_size", "average_tokens_across_devices", "batch_eval_metrics", "dataloader_in_order",
    "dataloader_multiprocessing_context", "dataloader_persistent_workers", "ddp_backend", "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph", "debug", "do_predict",
    "enable_jit_checkpoint", "eval_delay", "eval_do_concat_batches", "eval_on_start", "eval_use_gather_object",
    "full_determinism", "hub_always_push", "hub_private_repo", "hub_revision", "ignore_data_skip",
    "include_for_metrics", "include_num_input_tokens_seen", "label_names", "length_column_name",
    "liger_kernel_config", "local_rank", "log_level_replica", "log_on_each_node", "logging_nan_inf_filter",
    "pad_token", "restore_callback_states_from_checkpoint", "save_on_each_node", "shuffle_dataset",
    "skip_memory_metrics", "torch_compile", "torch_compile_backend", "torch_compile_mode", "trust_remote_code",
    "use_cache",
)  # fmt: skip
# without "steps" in it, the number of steps is not read
WHEN = {"eval_steps": ("eval_strategy", "evaluation_strategy"), "save_steps": ("save_strategy",)}
PLAIN_NAME = re.compile(r"[\w.\- ]*$")  # of a layer, as against an expression
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}  # strop's, and every other tool's default
CUTS_THE_END = (
    "longer rows are cut at their end there, so the answer loses its end and its stop token; strop refuses such rows: "
    "raise data.max_length, or choose data.overlong"
)
NO_LIMIT = "null or None: rows of any length there; at most data.max_length tokens here"
SCHEDULE_STARTS = "the first step has learning rate 0 there, and is one warmup step above 0 here"
# what is wrong, and what to do
NO_GRPO = (
    "its rewards are code, which is not run",
    "write the recipe yourself: train.objective grpo, train.rewards file.py:function",
)
# how several cards share the work
CARDS = (
    "deepspeed", "ds_config", "fsdp", "fsdp_config", "fsdp_version", "fsdp_transformer_layer_cls_to_wrap",
    "dp_shard_size", "dp_replicate_size", "tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree",
    "parallelism_config",
)  # fmt: skip
_CARDS_HERE = (
    "how cards share the work there; here `strop train --devices N`, and a base that does not fit on one is shared out "
    "(model.placement)"
)


def batch(draft: Draft, rows: Any, steps: Any, key: str) -> None:
    """Rows at once times gradient accumulation: the effective batch of one device."""
    at_once = whole(key, rows)
    draft.put("train.batch_size", at_once * whole(key, steps), key)
    draft.put("train.micro_batch", at_once, key)
    draft.differ(
        key, "of one device there; strop's batch_size is the effective batch of the run, whatever the number of devices"
    )


def packing(draft: Draft, key: str) -> None:
    draft.differ(
        key,
        "the batch counts packed sequences there, each of many rows; here it counts rows, and strop packs by itself: "
        "multiply train.batch_size by the rows that fit into one sequence",
    )


def val_split(draft: Draft, key: str, share: Any) -> None:
    if not share:
        return
    if isinstance(share, float) and 0 < share < 1:
        draft.put("data.eval", f"{100 * share:g}%", key)
        draft.differ(key, "which rows are held out is decided by their content here, not by a seed")
    else:
        draft.lack(key, f"{shown(share)}: a number of rows; give data.eval a file or a share such as 5%")


def optimizer(draft: Draft, key: str, name: Any) -> None:
    known = OPTIMIZERS.get(str(name).lower())
    if known is None:
        draft.lack(key, f"{name}: strop takes adamw unless train.optimizer says otherwise")
        return
    draft.put("train.optimizer", known, key)
    if "paged" in str(name) and "paged" not in known:
        draft.differ(key, f"{name}: {known} here, in memory that is not paged; the numbers are the same")
    if known == "adafactor":
        draft.differ(key, "here with the learning rate as it is given, not scaled by the size of the weights")


def adam(draft: Draft, keys: Keys) -> None:
    """AdamW's own numbers, which strop does not let one set: told only where they differ."""
    for key, ours in ADAM.items():
        if (value := number(keys.take(key))) is not None and value != ours:
            draft.lack(key, f"{value}: {ours:g} here", keys.line(key))


def no_dropout(draft: Draft, said: str) -> None:
    """What compares answers switches all dropout off in trl, and in all that is made of it (disable_dropout)."""
    if draft.get("train.objective") is not None and (share := draft.get("lora.dropout")):
        draft.put("lora.dropout", 0.0, "disable_dropout, on there")
        draft.differ(
            said, f"{share}: not used there, where an objective that compares answers switches all dropout off"
        )


def schedule(draft: Draft, key: str, name: Any) -> None:
    known = SCHEDULES.get(str(name).lower())
    if known is None:
        draft.lack(key, f"{name}: strop has {', '.join(sorted(set(SCHEDULES.values())))}; cosine is taken")
        draft.put("train.lr_scheduler", "cosine", f"{key} has no equivalent")
        return
    draft.put("train.lr_scheduler", known, key)
    if name == "constant":
        draft.put("train.warmup", 0, f"{key}: without a warmup there")


def dtype(draft: Draft, keys: Keys) -> None:
    """bf16 and fp16 as TrainingArguments have them."""
    for key in ("bf16", "fp16"):
        value = keys.take(key)
        if value is True:
            draft.put("model.dtype", key, key)


def checkpointing(draft: Draft, key: str, on: Any) -> None:
    if isinstance(on, str):
        draft.skip(key, f"{on}: the plan decides")
    elif on is not None:
        draft.put("train.gradient_checkpointing", "on" if on else "off", key)


def training_arguments(draft: Draft, keys: Keys, defaults: dict[str, Any], *, said: str) -> None:
    """TrainingArguments and what is made of them. defaults: of those that decide what is learned; said: whose."""

    def value(key: str) -> tuple[Any, str]:
        given = keys.take(key)
        return (given, key) if given is not None else (defaults.get(key), keys.default(key, f"{said}'s default"))

    rows, at = value("per_device_train_batch_size")
    steps, _ = value("gradient_accumulation_steps")
    batch(draft, rows, steps, "per_device_train_batch_size" if at == f"{said}'s default" else at)
    for key, name in (
        ("learning_rate", "train.learning_rate"),
        ("num_train_epochs", "train.epochs"),
        ("weight_decay", "train.weight_decay"),
        ("max_grad_norm", "train.max_grad_norm"),
        ("seed", "seed"),
    ):
        found, source = value(key)
        if found is not None:
            draft.put(name, number(found), source)
    name, _ = value("lr_scheduler_type")
    warmup(draft, keys, constant=name == "constant")
    schedule(draft, "lr_scheduler_type", name)
    found, _ = value("optim")
    optimizer(draft, "optim", found)
    adam(draft, keys)
    dtype(draft, keys)
    for key in ("gradient_checkpointing", "activation_checkpointing"):  # its name since transformers 5.24
        checkpointing(draft, key, keys.take(key))
    steps_and_places(draft, keys)


def warmup(draft: Draft, keys: Keys, *, constant: bool) -> None:
    """constant: the schedule of that name, which has no warmup in transformers."""
    steps, ratio = keys.take("warmup_steps"), keys.take("warmup_ratio")
    value, key = (steps, "warmup_steps") if steps else (ratio, "warmup_ratio")
    draft.put("train.warmup", number(value or 0), key if value else "no warmup there")
    if value and constant:
        draft.skip(key, f"{value}: lr_scheduler_type constant has no warmup there either")
    elif value:
        draft.differ(key, SCHEDULE_STARTS)


def steps_and_places(draft: Draft, keys: Keys) -> None:
    """When something is done, where it goes, who watches."""
    if (most := keys.take("max_steps")) is not None and whole("max_steps", most) > 0:
        draft.put("train.max_steps", whole("max_steps", most), "max_steps")
    for key, name in (("logging_steps", "log_steps"), ("eval_steps", "eval_steps"), ("save_steps", "save_steps")):
        number_, at = number(keys.take(key)), keys.line(key)
        when = [keys.peek(word) for word in WHEN.get(key, ())]
        if number_ is None:
            continue
        if other := [str(one) for one in when if one not in (None, "steps")]:
            draft.skip(key, f"{number_}: not read there, {key.partition('_')[0]}_strategy is {other[0]}", at)
            continue
        if isinstance(number_, int) and number_ >= 1:
            draft.put(f"train.{name}", number_, key)
        elif number_:
            draft.lack(key, f"{number_}: a share of all steps there; give train.{name}, a number of steps", at)
    for key in CARDS:
        at = keys.line(key)
        if keys.take(key):
            draft.lack(key, _CARDS_HERE, at)
    if (most := keys.take("save_total_limit")) is not None:
        draft.put("train.keep_checkpoints", max(1, whole("save_total_limit", most)), "save_total_limit")
    if (out := keys.take("output_dir")) is not None:
        draft.put("out", str(out), "output_dir")
    for key in ("push_to_hub", "hub_model_id", "hub_strategy"):
        at = keys.line(key)
        if value := keys.take(key):
            draft.lack(key, f"{value}: a command of its own, after training: `strop push RUN OWNER/NAME`", at)
    if resume := keys.take("resume_from_checkpoint"):
        draft.lack("resume_from_checkpoint", f"{resume}: a run of strop goes on with `strop resume RUN`")
    trackers = keys.take("report_to")
    for tracker in [trackers] if isinstance(trackers, str) else trackers or []:
        track(draft, "report_to", tracker)


def track(draft: Draft, key: str, tracker: str) -> None:
    if tracker in ("tensorboard", "wandb", "trackio"):
        draft.put("track", [*(draft.get("track") or []), tracker], key)
    elif tracker not in ("none", "all"):
        draft.lack(key, f"{tracker}: strop has tensorboard, wandb and trackio")


def lora(
    draft: Draft, keys: Keys, *, rank: str, alpha: str, dropout: str, modules: str, defaults: dict[str, Any]
) -> None:
    """Rank, alpha, dropout and targets under a tool's names."""
    for key, name in ((rank, "lora.r"), (alpha, "lora.alpha"), (dropout, "lora.dropout")):
        given = keys.take(key)
        value, source = (given, key) if given is not None else (defaults.get(name), None)
        source = source or keys.default(key, f"default of {key} there")
        if value is not None:
            draft.put(name, number(value), source)
    given = keys.take(modules)
    if isinstance(given, str):
        given = given if given.strip() in ("all", "all-linear") else [part.strip() for part in given.split(",")]
    if odd := [name for name in given if not PLAIN_NAME.match(str(name))] if isinstance(given, list) else []:
        draft.lack(
            modules,
            f"{odd[0]}: a regular expression; strop takes names of linear layers, and all of them unless "
            "lora.target_modules says otherwise (`strop modules MODEL` lists them)",
            keys.line(modules),
        )
    elif isinstance(given, list):
        draft.put("lora.target_modules", given, modules)
    elif given is not None:
        draft.put("lora.target_modules", "all-linear", modules)
    for key in ("use_rslora", "use_dora"):
        if keys.peek(key) is not None:
            draft.put(f"lora.{key}", bool(keys.take(key)), key)


def first_weights(draft: Draft, keys: Keys, key: str) -> None:
    """peft's `init_lora_weights`."""
    start = keys.take(key)
    if start in ("gaussian", "loftq"):
        draft.put("lora.init", start, key)
    elif start not in (None, True):
        draft.lack(key, shown(start))


def must_be(kind: str, value: Any, known: dict[str, str]) -> str:
    """The objective of a method's name. Raises InputError where strop has none."""
    if value == "grpo":
        raise InputError(f"{kind}: grpo: {NO_GRPO[0]}", fix=NO_GRPO[1])
    if value not in known:
        raise InputError(
            f"{kind}: {value}: strop has no such objective{nearest(str(value), known)}",
            fix=f"it has {', '.join(dict.fromkeys(known))}",
        )
    return known[value]


def simpo(draft: Draft, keys: Keys) -> None:
    """SimPO as TRL has it, in its CPOTrainer, and Axolotl through that: other defaults, and a loss besides."""
    if draft.get("train.beta") is None:
        draft.put("train.beta", 0.1, "trl's default")
    gamma = keys.take("simpo_gamma")
    draft.put(
        "train.gamma", 0.5 if gamma is None else number(gamma), "trl's default" if gamma is None else "simpo_gamma"
    )
    alpha = keys.take("cpo_alpha")
    if alpha or alpha is None:
        said = "1.0, trl's default" if alpha is None else alpha
        draft.lack("cpo_alpha", f"{said}: train.sft_weight is near to it (a mean over tokens)")


def whole(key: str, value: Any) -> int:
    """A whole number, in YAML perhaps a text. Raises RecipeError."""
    try:
        if not isinstance(value, bool) and int(value) == float(value):
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise RecipeError(f"{key}: {shown(value)}: not a whole number", fix="give one there")


def real(key: str, value: Any) -> float:
    """A number, in YAML perhaps a text. Raises RecipeError."""
    found = number(value)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise RecipeError(f"{key}: {shown(value)}: not a number", fix="give one there")
    return found


def number(value: Any) -> Any:
    """YAML reads 1e-4 as text."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
