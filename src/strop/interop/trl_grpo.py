"""Import what a TRL script gives GRPOTrainer: an environment or tools, reward functions, and the keys of GRPOConfig.

No code is executed: a class or a function is imported by the file that it comes from.
"""

from __future__ import annotations

import ast
from typing import Any

from strop.interop.draft import Draft, Keys, as_int, format_value
from strop.interop.script_parser import Script, report_expression

CONFIG, TRAINER = "GRPOConfig", "GRPOTrainer"
POSITIONS = ("reward_funcs", "args", "train_dataset", "eval_dataset")  # of the trainer's arguments after `model`
CODE_ARGUMENTS = ("environment_factory", "tools", "reward_funcs", "rollout_func", "reward_processing_classes")
LOSSES = ("dapo", "grpo", "dr_grpo")
DEFAULTS = {"num_generations": 8, "max_completion_length": 256}
TRACE_NOTE = (
    "in TRL the longest answer of all turns together; in strop train.answer_tokens is the longest turn, and "
    "data.max_length the longest trace with its prompt and the results of tools"
)


def has_environment(script: Script) -> bool:
    """Return whether the script's GRPOTrainer has an environment or tools."""
    return any(call.name == TRAINER and {"environment_factory", "tools"} & set(call.keywords) for call in script.calls)


def read_code(draft: Draft, script: Script, arguments: dict[str, ast.expr]) -> None:
    """Import the environment or the tools, and the reward functions."""
    for key, field in (("environment_factory", "environment"), ("tools", "environment"), ("reward_funcs", "rewards")):
        node = arguments.get(key)
        if node is None or (isinstance(node, ast.Constant) and node.value is None):
            continue
        items = script.read_list_items(node) if key != "environment_factory" else [node]
        found = [_find_spec(draft, script, key, field, item) for item in items or [node]]
        specs = [spec for spec in found if spec is not None]
        if len(specs) < len(found):
            continue
        files = {file for file, _ in specs}
        if field == "rewards":
            draft.put("train.rewards", [f"{file}:{name}" for file, name in specs], key)
        elif len(files) == 1:
            draft.put("train.environment", f"{files.pop()}:{','.join(name for _, name in specs)}", key)
        else:
            report_expression(draft, key, node, "tools of several files: import them into one file, and name that")
    if {"environment_factory", "reward_funcs"} <= set(arguments):
        text = (
            "if the environment has an attribute `reward`, strop adds it to these: rename it, as TRL does not count it"
        )
        draft.add_difference("reward_funcs", text)
    for key in ("rollout_func", "reward_processing_classes"):
        if key in arguments:
            report_expression(draft, key, arguments[key], "not supported")
    if "rewards" not in {name.rpartition(".")[2] for name in draft.fields} and "reward_funcs" not in arguments:
        draft.add_difference("reward_funcs", "none is given: the environment's own `reward` is used")


def _find_spec(draft: Draft, script: Script, key: str, field: str, node: ast.expr) -> tuple[str, str] | None:
    """Return (file, name) of a class or function, or report why there is none."""
    name = node.id if isinstance(node, ast.Name) else ""
    module, original = script.find_import(name)
    file = draft.file.parent.joinpath(*module.split(".")).with_suffix(".py") if module else None
    if file is not None and file.is_file():
        return str(file), original
    where = f"from {module}, which is not next to the script" if module else "not imported from another file"
    text = f"{where}: put it into a file of its own, and set train.{field} FILE.py:{original or 'NAME'}"
    report_expression(draft, key, node, text)
    return None


def read_config(draft: Draft, keys: Keys, loss_type: Any) -> None:
    """Import the keys of GRPOConfig that other configs do not have. loss_type: its value, or None."""
    group = as_int("num_generations", keys.take("num_generations", DEFAULTS["num_generations"]))
    draft.put("train.group", group, keys.default_source("num_generations", "trl's default"))
    rows = draft.get("train.batch_size")
    if isinstance(rows, int):
        draft.put("train.batch_size", max(1, rows // group), "per_device_train_batch_size, in completions")
        draft.fields.pop("train.micro_batch", None)  # in completions too
    length = keys.take("max_completion_length", DEFAULTS["max_completion_length"])
    draft.put("train.answer_tokens", as_int("max_completion_length", length), "max_completion_length")
    draft.add_difference("max_completion_length", TRACE_NOTE)
    draft.put_options(keys, {"beta": "beta", "epsilon": "clip_low", "epsilon_high": "clip_high"})
    if draft.get("train.beta") is None:
        draft.put("train.beta", 0.0, "trl's default")
    draft.fields.setdefault("train.clip_high", (draft.get("train.clip_low") or 0.2, "epsilon"))
    if (updates := keys.take("num_iterations")) is not None:
        draft.put("train.updates", as_int("num_iterations", updates), "num_iterations")
    if (calls := keys.take("max_tool_calling_iterations")) is not None:
        draft.put("train.turns", as_int("max_tool_calling_iterations", calls) + 1, "max_tool_calling_iterations")
    elif draft.get("train.environment") is not None:
        draft.add_difference("max_tool_calling_iterations", "trl has no limit by default; strop's is train.turns, 4")
    loss = loss_type or "dapo"
    if loss in LOSSES:
        draft.put("train.group_loss", loss, "loss_type")
    else:
        draft.add_unsupported("loss_type", f"{format_value(loss)}: strop has {', '.join(LOSSES)}")
    scaled = keys.take("scale_rewards", "group")
    if scaled not in (True, "group", None) and loss != "dr_grpo":
        draft.add_unsupported("scale_rewards", f"{format_value(scaled)}: set train.group_loss dr_grpo for no scaling")
    for key, only in (("temperature", 1.0), ("top_p", 1.0), ("mask_truncated_completions", False)):
        if (value := keys.take(key, only)) != only:
            draft.add_unsupported(key, f"{format_value(value)}: strop has {only}", keys.line(key))
    for key in ("use_vllm", "vllm_mode", "vllm_gpu_memory_utilization", "log_completions", "num_completions_to_print"):
        if keys.take(key) is not None:
            draft.add_ignored(key, "train.vllm_python samples with vLLM" if key == "use_vllm" else "")
