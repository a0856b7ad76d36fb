"""Import ms-swift's YAML (`swift sft --config FILE`, `swift rlhf`), or a shell script with such a command.

Names and defaults are those of 4.0 (swift/arguments/, swift/trainers/arguments.py).
"""

from __future__ import annotations

import re
import shlex
import string
from math import ceil
from typing import Any

import yaml

from strop.errors import InputError
from strop.interop import distillation
from strop.interop.draft import IGNORED_KEYS, NO_LIMIT_NOTE, Draft, Keys, as_int, format_value

DEFAULTS = {
    "per_device_train_batch_size": 1, "learning_rate": 1e-4, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine",
    "optim": "adamw_torch", "weight_decay": 0.1, "max_grad_norm": 1.0, "seed": 42, "warmup_steps": 0,
}  # fmt: skip
ACCUMULATED_ROWS = 16  # rows of a step, if gradient_accumulation_steps is not given
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
MORE_IGNORED_KEYS = (
    "acc_strategy", "add_version", "attn_impl", "check_model", "create_checkpoint_symlink", "dataset_num_proc",
    "device_map", "load_from_cache_file", "model_author", "model_name", "model_type", "ref_model", "swanlab_project",
    "tuner_backend", "use_hf", "use_ray",
)  # fmt: skip
SAMPLES = re.compile(r"(.+)#(\d+)$")  # a data set and the number of its rows that are used
COMMAND = re.compile(r"\bswift\s+(sft|rlhf|pt)\b(.*)", re.DOTALL)
ASSIGNMENT = re.compile(r"""^\s*(?:export\s+)?(\w+)=(["']?)([^\s"'$`]+)\2\s*$""", re.MULTILINE)
# a word of a shell command, with its quotes
WORD = re.compile(r"""(?:\$\([^()]*\)|[^\s'"\\]|\\.|'[^']*'|"(?:\\.|[^"\\])*")+""")
END = re.compile(r"#|[;&|]|\d*[<>]")  # start of a word that is not of the command: a comment, another command, a file


def read(draft: Draft) -> None:
    """Import a config. Raises InputError for another tuner than LoRA or full, and for other kinds than sft and gkd."""
    tree = _read_script(draft) if draft.file.suffix == ".sh" else draft.read_yaml()
    if isinstance(targets := tree.get("target_modules"), list) and len(targets) == 1:
        tree["target_modules"] = targets[0]
    keys = Keys(tree)
    tuner = keys.take("tuner_type") or keys.take("train_type") or "lora"
    keys.take("train_type")
    if tuner == "full":
        draft.put_full("tuner_type")
    elif tuner != "lora":
        raise draft.not_supported_error(f"tuner_type: {tuner}", "set it to lora or full")
    if (task := keys.take("task_type", "causal_lm")) != "causal_lm":
        what = f"{draft.file}: task_type: {task}: of ms-swift, only causal_lm is imported"
        raise InputError(what, fix="write the recipe yourself: docs/classify.md, docs/embed.md")
    kind = keys.take("rlhf_type", "sft")
    if kind not in ("sft", "gkd"):
        what = f"{draft.file}: rlhf_type: {kind}: of ms-swift, only sft and gkd are imported"
        raise InputError(what, fix="write the recipe yourself: docs/preferences.md")
    _read_model(draft, keys)
    _read_data(draft, keys)
    ignored: tuple[str, ...] = (*IGNORED_KEYS, *MORE_IGNORED_KEYS)
    if kind == "gkd":
        _read_gkd(draft, keys)
        ignored += distillation.IGNORED_KEYS
    _read_training(draft, keys, is_full=tuner == "full")
    if draft.get("train.objective") == "grpo":
        draft.fields.pop("train.micro_batch", None)  # in completions in strop
    keys.report_rest(draft, ignored)


def _read_script(draft: Draft) -> dict[str, Any]:
    """Return the options of the first `swift` command of a shell script. Raises InputError."""
    try:
        text = draft.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"{draft.file}: cannot be read: {getattr(error, 'strerror', None) or error}"
        raise InputError(what, fix="give a YAML file or a shell script") from None
    lines = re.sub(r"^\s*#.*$", "", text, flags=re.M).replace("\\\n", " ").splitlines()
    command = next((found for line in lines if (found := COMMAND.search(line))), None)
    if command is None:
        raise InputError(f"{draft.file}: no command `swift sft` or `swift rlhf`", fix="give a YAML file or the script")
    line = string.Template(command[2]).safe_substitute({name: value for name, _, value in ASSIGNMENT.findall(text)})
    end = next((match.start() for match in WORD.finditer(line) if END.match(match[0])), len(line))
    if WORD.sub("", line[:end]).strip():
        raise InputError(f"{draft.file}: a quote is not closed", fix="close it")
    options: dict[str, list[str]] = {}
    for word in WORD.findall(line[:end]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name] = [value] if equals else []
        elif options:
            options[[*options][-1]].append(word)
    for key, values in [*options.items()]:
        if computed := next((value for value in values if "$" in re.sub(r"'[^']*'", "", value)), None):
            draft.add_unsupported(key, f"{computed}: strop does not run the shell; set it in the recipe")
            del options[key]
    read = {key: [_parse("".join(shlex.split(x))) for x in words] for key, words in options.items()}
    defaults = {} if command[1] == "sft" else {"rlhf_type": "dpo"} if command[1] == "rlhf" else {"rlhf_type": "pt"}
    return {**defaults, **{key: x if len(x) > 1 else x[0] if x else True for key, x in read.items()}}


def _parse(word: str) -> Any:
    try:
        value = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    return value if isinstance(value, bool | int | float) else word


def _read_model(draft: Draft, keys: Keys) -> None:
    draft.put_fields(keys, {"model": "model.name", "model_revision": "model.revision"}, str)
    if adapters := keys.take("adapters"):
        adapters = [adapters] if isinstance(adapters, str) else adapters
        draft.put("model.adapter", str(adapters[0]), "adapters")
        for other in adapters[1:]:
            draft.add_unsupported("adapters", f"{other}: strop starts from one adapter")
    dtype = keys.take("torch_dtype")
    if dtype in DTYPES:
        draft.put_dtype(DTYPES[dtype], "torch_dtype")
    elif dtype is not None:
        draft.add_unsupported("torch_dtype", str(dtype))
    bits, method = keys.take("quant_bits"), keys.take("quant_method")
    if method == "bnb" and bits == 4:
        draft.put("model.quantization", keys.take("bnb_4bit_quant_type", "nf4"), "quant_bits")
        draft.put("model.double_quantization", bool(keys.take("bnb_4bit_use_double_quant", True)), "quant_bits")
        keys.take("bnb_4bit_compute_dtype")
    elif method == "bnb" and bits == 8:
        draft.put_int8("quant_bits")
    else:
        reason = "no quant_bits" if bits is None else f"quant_method {method or 'is not set'}"
        draft.put("model.quantization", "none", reason)
        if bits is not None and method is None:
            draft.add_ignored("quant_bits", "without quant_method, swift does not quantize")
        elif bits is not None:
            draft.add_unsupported("quant_bits", f"{bits} by {method}: strop has nf4, fp4 and int8")
    draft.put_lora(keys, "lora_rank", "target_modules", {"lora.r": 8, "lora.alpha": 32, "lora.dropout": 0.05})
    if draft.get("lora.target_modules") is None:
        draft.put("lora.target_modules", "all-linear", "swift's default")
    draft.put_fields(keys, {"lora_bias": "lora.bias", "lorap_lr_ratio": "train.lora_plus_ratio"})
    if saved := keys.take("modules_to_save"):
        draft.put("lora.modules_to_save", [saved] if isinstance(saved, str) else saved, "modules_to_save")
    draft.put_lora_init(keys, "init_weights")
    for key, default in (("freeze_vit", True), ("freeze_aligner", True), ("freeze_llm", False)):
        if (value := keys.take(key, default)) is not default:
            draft.add_unsupported(key, f"{format_value(value)}: see lora.vision")


def _read_data(draft: Draft, keys: Keys) -> None:
    for key, field in (("dataset", "data.train"), ("val_dataset", "data.eval")):
        given = keys.take(key, [])
        sources = []
        for source in [given] if isinstance(given, str) else given:
            limited = SAMPLES.match(str(source))
            if limited:
                draft.add_unsupported(key, f"{source}: strop reads all rows of {limited[1]}")
            sources.append(limited[1] if limited else str(source))
        draft.put_sources(field, sources, key)
    if any("/" in source and not source.endswith((".jsonl", ".json", ".csv")) for source in draft.train_files()):
        draft.add_difference("dataset", "ids are those of ModelScope unless use_hf is set; in strop of Hugging Face")
    share = keys.take("split_dataset_ratio")
    if share and keys.peek("eval_strategy") in ("no", False):
        draft.add_ignored("split_dataset_ratio", "not used with eval_strategy no")
    else:
        draft.put_eval_share("split_dataset_ratio", share)
    draft.put_int(keys, "max_length", "data.max_length")
    if draft.get("data.max_length") is None:
        draft.add_difference("max_length", NO_LIMIT_NOTE)
    strategy = keys.take("truncation_strategy", "delete")
    if strategy == "delete":
        draft.put("data.overlong", "drop", "truncation_strategy delete")
    else:
        draft.put("data.overlong", "truncate-start" if strategy == "left" else "refuse", "truncation_strategy")
        if strategy != "left":
            draft.add_unsupported("truncation_strategy", f"{strategy}: strop refuses longer rows: see data.overlong")
    if (template := keys.take("template")) is not None:
        draft.add_difference("template", f"{template}: strop uses the model's chat template, or data.template")
    if (system := keys.take("system")) is not None:
        draft.add_unsupported("system", f"{format_value(system)}: write it into the rows")
    if keys.take("packing"):
        draft.note_packing("packing")
    keys.take("lazy_tokenize")
    if (scale := keys.take("loss_scale", "default")) == "all":
        draft.put("data.loss", "all", "loss_scale")
    elif scale not in ("default", "last_round"):
        draft.add_unsupported("loss_scale", f"{scale}: strop trains on all answers, or reads weights of messages")
    elif scale == "last_round":
        draft.add_difference("loss_scale", "last_round: the last answer of a row is trained on; in strop all answers")


def _read_training(draft: Draft, keys: Keys, *, is_full: bool) -> None:
    rows = as_int("per_device_train_batch_size", keys.peek("per_device_train_batch_size", 1))
    rate = {"learning_rate": 1e-5} if is_full else {}
    steps = max(1, ceil(ACCUMULATED_ROWS / rows))
    if "adam_beta2" not in keys:
        draft.add_difference("adam_beta2", "0.95 by default in swift; 0.999 in strop")
    draft.put_training_arguments(keys, {**DEFAULTS, **rate, "gradient_accumulation_steps": steps})
    if keys.take("max_epochs") is not None:
        draft.add_unsupported("max_epochs", "set train.epochs")


def _read_gkd(draft: Draft, keys: Keys) -> None:
    draft.has_teacher = True
    for key, text in (
        ("teacher_adapters", "give the adapter's folder as train.teacher"),
        ("teacher_model_server", "strop loads the teacher itself: set train.teacher"),
        ("teacher_model_revision", "strop loads the newest revision of a teacher"),
    ):
        if value := keys.take(key):
            draft.add_unsupported(key, f"{format_value(value)}: {text}")
    topk = keys.take("gkd_logits_topk")
    objective = distillation.read_gkd(draft, keys, "swift")
    if topk is not None and objective == "sft":
        draft.add_difference("gkd_logits_topk", f"{topk}: strop keeps 32")
    if objective == "grpo":
        for key, default in (("top_p", 0.9), ("top_k", 50)):
            value = keys.take(key)
            if value not in (1.0, -1):  # of top_p and top_k: the whole distribution
                text = f"{default} (swift's default)" if value is None else format_value(value)
                draft.add_unsupported(key, f"{text}: strop samples from the whole distribution")
