"""Import distillation from a teacher: GKD of TRL 1.16 and ms-swift 4, TRL's DistillationTrainer, Axolotl's KD plugin.

strop has two kinds: the teacher's probabilities on the rows (sft, forward KL), and its judgement of the student's own
completions (grpo, reverse KL). A config between them becomes one of the two, and each setting that differs is reported.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

from strop.interop.draft import Draft, Keys, as_float, as_int, format_value
from strop.interop.script_parser import Call, Script, report_expression

TRL_KINDS = {"GKDConfig": "gkd", "DistillationConfig": "distillation"}
TRL_TRAINERS = ("GKDTrainer", "DistillationTrainer")
TRL_KEYS = {"gkd": ("lmbda", "seq_kd", "max_new_tokens"), "distillation": ("teacher_model_name_or_path",)}
POSITIONS = {  # of the trainers' arguments after `model`
    "GKDTrainer": ("teacher_model", "args", "data_collator", "train_dataset", "eval_dataset"),
    "DistillationTrainer": ("teacher_model", "args", "train_dataset", "eval_dataset"),
}
IGNORED_KEYS = (
    "assistant_only_loss", "cache_implementation", "completion_only_loss", "dataset_kwargs", "dataset_text_field",
    "ds3_gather_for_generation", "log_completions", "log_unique_prompts", "num_completions_to_print",
    "offload_teacher_model", "packing", "packing_strategy", "sleep_level", "teacher_deepspeed", "use_vllm",
    "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_max_model_len", "vllm_mode",
    "vllm_model_impl", "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
    "vllm_tensor_parallel_size",
)  # fmt: skip
TOP_K_NOTE = (
    "the whole distribution there; strop keeps the teacher's 32 largest probabilities, and counts all others as one"
)
OWN_NOTE = (
    "there the divergence over the whole vocabulary at each sampled token; strop estimates it from the sampled tokens "
    "(the expected gradient of a token is the same), and samples at least two completions of each prompt"
)
TEACHER_ANSWERS_NOTE = (
    "the teacher answers all prompts there, at each step, sampled; in strop rows without an answer, once, greedily: "
    "remove the answers from the rows"
)


@dataclass(frozen=True)
class Gkd:
    """Keys and defaults of a tool. length: key of the longest completion. loss_temperature: whether the loss has it."""

    teacher: str
    length: str
    lmbda: float = 0.5
    beta: float = 0.5
    temperature: float = 0.9
    length_default: int = 128
    loss_temperature: bool = False  # TRL's GKDTrainer uses it for sampling alone


TOOLS = {
    "gkd": Gkd("teacher_model_name_or_path", "max_new_tokens"),
    "distillation": Gkd("teacher_model_name_or_path", "max_completion_length", 1.0, 1.0, 1.0, 512, True),
    "swift": Gkd("teacher_model", "max_completion_length", length_default=512, loss_temperature=True),
}


def put_temperature(draft: Draft, key: str, temperature: float) -> None:
    """Import the temperature of both distributions in the loss on rows."""
    if temperature != 1:
        draft.put("train.teacher_temperature", temperature, key)


def read_gkd(draft: Draft, keys: Keys, kind: str) -> str:
    """Import generalized knowledge distillation, and return the objective: sft or grpo. kind: of TOOLS."""
    tool = TOOLS[kind]

    def take(key: str, default: float) -> tuple[float, str]:
        value = keys.take(key)
        is_given = value is not None
        return as_float(key, value) if is_given else default, "" if is_given else f" ({draft.tool}'s default)"

    on_policy, from_policy = take("lmbda", tool.lmbda)
    (beta, from_beta), (temperature, from_temperature) = take("beta", tool.beta), take("temperature", tool.temperature)
    length = as_int(tool.length, keys.take(tool.length, tool.length_default))
    uses_teacher_answers = bool(keys.take("seq_kd"))
    if (teacher := keys.take(tool.teacher)) is not None:
        draft.put("train.teacher", str(teacher), tool.teacher)
    sampled = f"{temperature:g}{from_temperature}: strop samples at 1"
    if on_policy == 1:
        draft.put("train.objective", "grpo", "lmbda 1" if kind != "distillation" else "DistillationConfig")
        draft.put("train.beta", 0.0, "no reference model")
        draft.put("train.group", 2, "the smallest; one completion of a prompt there")
        draft.put("train.answer_tokens", length, tool.length)
        draft.add_difference("objective", OWN_NOTE)
        if dropout := draft.get("lora.dropout"):
            text = f"{dropout:g}: none in strop with own completions, whose log-probabilities are computed twice"
            draft.add_difference("lora_dropout", text)
        draft.put("lora.dropout", 0.0, "needed for own completions")
        if beta != 1:
            draft.add_unsupported("beta", f"{beta:g}{from_beta}: strop has 1 here, the reverse KL")
        if temperature != 1:
            draft.add_unsupported("temperature", sampled)
        if uses_teacher_answers:
            draft.add_ignored("seq_kd", "no effect with lmbda 1")
        return "grpo"
    if on_policy:
        text = (
            f"{on_policy:g}{from_policy}: that share of the batches has the student's own completions; strop trains on"
        )
        draft.add_unsupported(
            "lmbda", f"{text} the rows (as lmbda 0), or on own completions alone: set lmbda 1, beta 1"
        )
    if beta:
        draft.add_unsupported("beta", f"{beta:g}{from_beta}: strop has 0 on rows, the forward KL")
    if uses_teacher_answers:
        draft.add_difference("seq_kd", TEACHER_ANSWERS_NOTE)
        if not tool.loss_temperature and temperature != 1:
            draft.add_difference("temperature", f"{temperature:g}: the teacher answers greedily in strop")
    else:
        draft.add_ignored(tool.length, f"{length}: no completion is sampled")
        if not tool.loss_temperature:
            draft.add_ignored("temperature", f"{temperature:g}: TRL samples with it, and its loss is at temperature 1")
    if tool.loss_temperature:
        put_temperature(draft, "temperature", temperature)
    cross_entropy = as_float("sft_alpha", keys.take("sft_alpha", 0))
    squared = temperature**2 if tool.loss_temperature else 1  # strop multiplies the divergence by it, ms-swift does not
    put_weights(draft, 1 / squared, cross_entropy, "sft_alpha" if cross_entropy else "no cross entropy there")
    draft.add_difference("teacher", TOP_K_NOTE)
    draft.add_difference("answers", "the other tool trains on the last answer of a row; strop on all answers of a row")
    return "sft"


def put_weights(draft: Draft, kl: float, cross_entropy: float, key: str) -> None:
    """Import the weights of the divergence and of the cross entropy, which add up to 1 in strop."""
    total = kl + cross_entropy
    if not total:
        draft.add_unsupported(key, "both weights are 0: nothing is learned")
        return
    draft.put("train.teacher_weight", round(kl / total, 6), key)
    if total != 1:
        draft.add_difference(
            key, f"the weights add up to 1 in strop: the loss and its gradients are divided by {total:g}"
        )


def finish_trl(draft: Draft, kind: str, objective: str, keys: Keys, *, has_rate: bool) -> None:
    """Import the defaults of GKDConfig and DistillationConfig that differ from those of other configs of TRL."""
    if objective == "grpo":
        draft.fields.pop("train.micro_batch", None)  # in completions in strop
    if kind == "distillation":
        if draft.fields["data.max_length"][1].endswith("default"):
            del draft.fields["data.max_length"]
            draft.differs = [note for note in draft.differs if note.key != "max_length"]
    elif not has_rate:
        draft.put("train.learning_rate", 2e-5, keys.default_source("learning_rate", "trl's default"))


def read_teacher(draft: Draft, script: Script, arguments: dict[str, ast.expr], loads: list[Call]) -> Call | None:
    """Import the trainer's `teacher_model`, a name or a loaded model. Return the call that loads it, if any."""
    node = arguments.get("teacher_model")
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return None
    load = next(iter(script.find_sources([node], loads)), None)
    name = script.value(node)
    if load is not None:
        given = load.arguments[0] if load.arguments else load.keywords.get("pretrained_model_name_or_path")
        name = None if given is None else script.value(given)
        for key in ("revision", "quantization_config", "load_in_4bit", "load_in_8bit"):
            if key in load.keywords:
                report_expression(draft, f"teacher_model.{key}", load.keywords[key], "not supported for a teacher")
    if isinstance(name, str):
        draft.put("train.teacher", name, "teacher_model")
    else:
        report_expression(draft, "teacher_model", node, "not a literal value: set train.teacher")
    return load


def read_axolotl(draft: Draft, keys: Keys) -> None:
    """Import the keys of Axolotl's KD plugin, whose teacher is a server, or a column of the rows."""
    kl = as_float("kd_alpha", keys.take("kd_alpha", 1.0))
    put_weights(draft, kl, as_float("kd_ce_alpha", keys.take("kd_ce_alpha", 0.0)), "kd_alpha")
    if draft.get("train.teacher_weight") == 0:
        draft.fields.pop("train.teacher_weight")
        draft.add_unsupported("kd_alpha", "0: without a weight, the teacher has no effect")
        return
    put_temperature(draft, "kd_temperature", as_float("kd_temperature", keys.take("kd_temperature", 1.0)))
    beta = as_float("kd_beta", keys.take("kd_beta", 0.0))
    if beta:
        draft.add_unsupported("kd_beta", f"{beta:g}: strop has 0, the forward KL")
    if (lowest := keys.take("kd_temperature_min")) is not None:
        draft.add_unsupported("kd_temperature_min", f"{format_value(lowest)}: the temperature does not change in strop")
    server, model = keys.take("kd_online_server_base_url"), keys.take("kd_online_server_model")
    if model is not None:
        draft.put("train.teacher", str(model), "kd_online_server_model")
    text = "a column of the rows has the teacher's probabilities there; strop computes them: set train.teacher"
    if server is not None:
        text = f"{server}: strop loads the teacher itself, because servers do not give what it needs: set train.teacher"
    draft.add_difference("kd_online_server_base_url" if server is not None else "kd_trainer", text)
    topk, normalizes = keys.take("kd_online_topk"), keys.take("kd_normalize_topk", True)
    text = "strop keeps 32 probabilities of a token" + f" ({topk} there)" * (topk not in (None, 32))
    text += ", and counts all others as one; there they are normalized to 1" * bool(normalizes)
    draft.add_difference("kd_online_topk", text)
    for key in ("kd_online_server", "kd_online_timeout", "kd_online_max_new_tokens", "kd_compiled_kernel"):
        if keys.take(key) is not None:
            draft.add_ignored(key)
