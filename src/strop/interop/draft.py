"""Convert other tools' configs to recipes, with a note on every key that differs or is not supported."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from strop.config.load import Resolved, resolve
from strop.config.names import full_name
from strop.config.schema import FULL_OBJECTIVES
from strop.errors import InputError, Location, RecipeError, StropError, suggest
from strop.objectives.table import OBJECTIVES

IMPORTERS = ("axolotl", "llamafactory", "trl", "unsloth", "torchtune", "swift")
# required fields that a config may lack: option of `strop train`, and a placeholder used to validate the recipe
REQUIRED_OPTIONS = {
    "model.name": ("--model", "MODEL"), "data.train": ("--data", "YOURS.jsonl"),
    "train.teacher": ("--train.teacher", "TEACHER"),
}  # fmt: skip
FILE_FORMATS = ("json", "csv", "parquet", "text")  # paths of `load_dataset` that name a format instead of a data set
OPTIMIZERS: dict[str, str] = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adam"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("lion", "lion_32bit", "paged_lion_32bit"), "lion"),
    "paged_adamw_8bit": "paged_adamw_8bit", "adafactor": "adafactor", "sgd": "sgd",
}  # fmt: skip
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
# keys that affect speed, logging and storage, but not the trained weights
IGNORED_KEYS = (
    "activation_checkpointing_kwargs", "activation_offloading", "auto_find_batch_size",
    "average_tokens_across_devices", "batch_eval_metrics", "bf16_full_eval",
    "dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "dataset_num_proc", "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters",
    "ddp_static_graph", "ddp_timeout", "debug", "disable_tqdm", "do_eval", "do_predict", "do_train",
    "enable_jit_checkpoint", "eval_accumulation_steps", "eval_delay", "eval_do_concat_batches", "eval_on_start",
    "eval_packing", "eval_strategy", "eval_use_gather_object", "evaluation_strategy", "fp16_full_eval",
    "full_determinism", "gradient_checkpointing_kwargs", "greater_is_better", "hub_always_push",
    "hub_private_repo", "hub_revision", "ignore_data_skip", "include_for_metrics", "include_num_input_tokens_seen",
    "include_tokens_per_second", "label_names", "length_column_name", "liger_kernel_config",
    "local_rank", "log_level", "log_level_replica", "log_on_each_node", "logging_dir", "logging_first_step",
    "logging_nan_inf_filter", "logging_strategy", "overwrite_output_dir",
    "pad_to_multiple_of", "pad_token", "padding_free", "per_device_eval_batch_size",
    "precompute_ref_batch_size", "precompute_ref_log_probs", "prediction_loss_only", "remove_unused_columns",
    "report_to", "restore_callback_states_from_checkpoint", "run_name", "save_on_each_node", "save_only_model",
    "save_safetensors", "save_strategy", "shuffle_dataset", "skip_memory_metrics", "tf32", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "trust_remote_code", "use_cache",
    "use_cpu", "use_liger_kernel",
)  # fmt: skip
# transformers uses these step counts only if the strategy is "steps"
STRATEGY_KEYS = {"eval_steps": ("eval_strategy", "evaluation_strategy"), "save_steps": ("save_strategy",)}
MAX_READ_ROWS = 1000  # of a data file, to see which columns it has
LAYER_NAME = re.compile(r"[\w.\- ]*$")  # does not match regular expressions
ADAM_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}  # of strop and of all imported tools
PROJECTOR_NOTE = "strop trains the projector in full"
IN_FULL_NOTE = f"{PROJECTOR_NOTE}, and adapters in the encoder"
TRUNCATION_NOTE = (
    "the other tool truncates longer rows, whose answers may lose their stop token; strop refuses such rows: "
    "raise data.max_length, or choose data.overlong"
)
NO_LIMIT_NOTE = "null or None: no limit in the other tool; at most data.max_length tokens in strop"
LAST_BATCH_NOTE = "strop also trains on the last, smaller batch of an epoch, which the other tool drops"
WARMUP_NOTE = "the first step has learning rate 0 in the other tool, and one warmup step's rate in strop"
LINE_BREAK_NOTE = (
    "with a template that has a line break after the stop token (such as ChatML), the other tool trains on it too; in "
    "strop the stop token is the last"
)
ROWS_NOTE = (
    "not compared: the text that the other tool makes of a row (its template, system texts that it adds), weights of "
    "messages (strop reads weight, loss_weight and train), and rows that it skips: see `strop check RECIPE --show 3`"
)
_ORPO_NOTE = (
    "TRL's cross entropy is over prompt and answer, averaged over the tokens of a batch; strop's is over the answer, "
    "averaged per pair"
)
_STRING_ROWS_NOTE = (
    "TRL joins prompts and answers that are strings, and ends with the stop token, without a chat template; strop uses "
    "the model's: for TRL's tokens, set data.template to a file that only joins them (docs/import.md)"
)
_TARGETS_NOTE = (
    "not given: PEFT uses a default by model family (q_proj and v_proj for Llama, Qwen and others); "
    "strop uses all linear layers"
)
Columns = dict[str, str]  # data.columns
PARALLELISM_KEYS = (
    "deepspeed", "ds_config", "fsdp", "fsdp_config", "fsdp_version", "fsdp_transformer_layer_cls_to_wrap",
    "dp_shard_size", "dp_replicate_size", "tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree",
    "parallelism_config",
)  # fmt: skip
_PARALLELISM_NOTE = (
    "parallelism is configured differently: use `strop train --devices N`; a base that does not fit on one GPU is "
    "sharded (model.placement)"
)


def as_int(key: str, value: Any) -> int:
    """Convert a value to int; YAML may hold it as text. Raises RecipeError."""
    try:
        if not isinstance(value, bool) and int(value) == float(value):
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise RecipeError(f"{key}: {format_value(value)}: not a whole number", fix="set a whole number in the file")


def as_float(key: str, value: Any) -> float:
    """Convert a value to float; YAML may hold it as text. Raises RecipeError."""
    converted = as_number(value)
    if isinstance(converted, bool) or not isinstance(converted, int | float):
        raise RecipeError(f"{key}: {format_value(value)}: not a number", fix="set a number in the file")
    return converted


def as_number(value: Any) -> Any:
    """Convert numeric text to float, because YAML reads 1e-4 as text; return other values unchanged."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@dataclass(frozen=True)
class Note:
    key: str  # of the other tool's config
    text: str
    line: int | None = None


@dataclass
class Draft:
    """The values and notes read from another tool's config, before validation."""

    tool: str
    file: Path
    fields: dict[str, tuple[Any, str]] = field(default_factory=dict)  # recipe field: (value, key that it came from)
    differs: list[Note] = field(default_factory=list)  # keys that are imported, but have another meaning in strop
    unsupported: list[Note] = field(default_factory=list)  # keys without an equivalent
    ignored: list[Note] = field(default_factory=list)  # keys that do not affect the trained weights
    loads_best: bool = False  # the other tool keeps the weights of the best evaluation, not the last ones
    best_metric: Any = None  # by which the best evaluation is chosen, if not the loss
    has_teacher: bool = False  # the other tool learns from a teacher, which the config may not name
    model_unreadable: bool = False  # a script gives the model as an expression that cannot be evaluated

    def put(self, name: str, value: Any, source: str) -> None:
        self.fields[name] = (value, source)

    def get(self, name: str) -> Any:
        return self.fields[name][0] if name in self.fields else None

    def add_difference(self, key: str, text: str, line: int | None = None) -> None:
        self.differs.append(Note(key, text, line))

    def add_unsupported(self, key: str, text: str, line: int | None = None) -> None:
        self.unsupported.append(Note(key, text, line))

    def add_ignored(self, key: str, text: str = "", line: int | None = None) -> None:
        self.ignored.append(Note(key, text, line))

    def finish(self) -> Imported:
        """Validate the recipe as `strop train` does. Raises RecipeError if a value is out of range."""
        if self.get("train.lr_scheduler") == "constant" and self.get("train.warmup") is None:
            self.put("train.warmup", 0, "no warmup: constant from the first step")
        if self.get("data.eval") is None and "train.early_stopping" in self.fields:
            patience, key = self.fields.pop("train.early_stopping")
            self.add_unsupported(key, f"needs evaluation rows: set data.eval and train.early_stopping {patience}")
        if self.get("train.objective") is None:
            self.put("train.keep", "off", "the other tool has no general prompts")
        self._note_kept_weights()
        self.add_difference("rows", ROWS_NOTE)
        if any(source.endswith(".txt") for source in self.train_files()):
            self.add_difference("data", "a row is a line of a .txt file in the other tool, and a paragraph in strop")
        self._leave_out_adapter_settings()
        self._leave_out_full()
        if self.get("train.method") == "full":
            self.fields = {
                name: entry
                for name, entry in self.fields.items()
                if not name.startswith("lora.") or name == "lora.new_tokens"
            }
            self.differs = [note for note in self.differs if not note.key.startswith(("lora_", "target_modules"))]
        modules, key = self.fields.get("lora.modules_to_save", ([], ""))
        modules = [modules] if isinstance(modules, str) else modules
        if self.get("train.objective") == "reward" and "score" in modules:
            self.put("lora.modules_to_save", [module for module in modules if module != "score"], key)
            self.add_ignored(key, "score: strop always trains the score head")
        values = {name: value for name, (value, _) in self.fields.items()}
        if "model.name" not in values and not self.model_unreadable:
            raise RecipeError(f"{self.file}: no model is given", fix="check that it is a training config of this tool")
        has_teacher = self.has_teacher or "train.teacher" in values
        missing = [x for x in REQUIRED_OPTIONS if x not in values and (has_teacher or x != "train.teacher")]
        try:
            resolved = resolve(None, {**values, **{name: REQUIRED_OPTIONS[name][1] for name in missing}})
        except RecipeError as error:
            raise self._in_other_words(error) from None
        return Imported(self, resolved, missing)

    def _in_other_words(self, error: RecipeError) -> RecipeError:
        """Return an error of the recipe's values that names the keys of the file they come from."""
        places = []
        for place in error.where:
            field = full_name(place.file.lstrip("-"))
            _, key = self.fields.get(field, ("", ""))
            places.append(Location(str(self.file), None, f"{key or field}: {place.what}"))
        if not places:
            return error
        return RecipeError(
            f"{self.file}: values that strop does not train with", fix="correct them there", where=places
        )

    def _leave_out_full(self) -> None:
        """Train an adapter for objectives that strop cannot train all weights for."""
        if self.get("train.method") == "full" and self.get("train.objective") not in (None, *FULL_OBJECTIVES):
            del self.fields["train.method"]
            self.differs = [note for note in self.differs if note.key != "weights"]
            text = "all are trained in the other tool; strop trains an adapter, which needs a higher learning rate"
            self.add_difference("weights", text)

    def _note_kept_weights(self) -> None:
        if self.get("data.eval") is None:
            return
        if not self.loads_best and self.get("train.early_stopping") is None:
            key = "dataset_val" if self.tool == "torchtune" else "load_best_model_at_end"
            text = "the other tool keeps the last weights; strop keeps those of the evaluation with the lowest loss"
            self.add_difference(key, text)
        elif self.best_metric not in (None, "loss", "eval_loss"):
            self.add_difference("metric_for_best_model", f"{self.best_metric}: strop compares evaluations by loss")

    def _leave_out_adapter_settings(self) -> None:
        """Leave out the LoRA settings if training starts from an adapter, whose own settings apply."""
        if self.get("model.adapter") is None:
            return
        for name in [name for name in self.fields if name.startswith("lora.")]:
            value, key = self.fields[name]
            if (name, value) != ("lora.dropout", 0.0):
                del self.fields[name]
                if "default" not in key:
                    self.add_ignored(key, f"{format_value(value)}: the adapter to start from has its own {name[5:]}")
        if self.tool == "llamafactory" and self.get("train.objective") in ("dpo", "ipo", "kto"):
            text = "the reference is the base without the adapter in the other tool, and with it in strop"
            self.add_difference("adapter_name_or_path", text)

    def put_full(self, source: str) -> None:
        """Import that all weights are trained."""
        self.put("train.method", "full", source)
        self.add_difference("weights", "kept in fp32 while they are trained, also where model.dtype is bf16")

    def not_supported_error(self, setting: str, fix: str) -> InputError:
        return InputError(f"{self.file}: {setting}: strop trains LoRA adapters, or all weights", fix=fix)

    def read_yaml(self) -> dict[str, Any]:
        """Return the mapping in a YAML config. Raises InputError."""
        path = self.file
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            what = f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
            raise InputError(what, fix="give the path of a YAML file") from None
        except yaml.YAMLError as error:
            raise InputError(f"{path}: not YAML: {str(error).splitlines()[0]}", fix="fix the syntax") from None
        except RecursionError:
            raise InputError(f"{path}: nested too deeply to be a config", fix="check the file") from None
        if not isinstance(tree, dict):
            raise InputError(f"{path}: not a mapping of keys", fix="give the config that the other tool trains with")
        return tree

    # --- settings that several tools share: TrainingArguments, LoraConfig, optimizers, schedules

    def put_fields(self, keys: Keys, fields: Mapping[str, str], convert: Callable[[Any], Any] = as_number) -> None:
        """Import keys whose values have the same meaning in strop. fields: keys and the recipe fields they become."""
        for key, name in fields.items():
            if (value := keys.take(key)) is not None:
                self.put(name, convert(value), key)

    def put_int(self, keys: Keys, key: str, name: str) -> None:
        if (value := keys.take(key)) is not None:
            self.put(name, as_int(key, value), key)

    def put_sources(self, name: str, sources: list[str], key: str) -> None:
        """Set data.train or data.eval to one source or a list of them, if there are any."""
        if sources:
            self.put(name, sources[0] if len(sources) == 1 else sources, key)

    def put_columns(self, column_maps: list[dict[str, str]], key: str) -> None:
        """Set data.columns if it is the same for all data sets. An empty dict stands for names that strop detects."""
        if any(column_maps) and all(columns == column_maps[0] for columns in column_maps):
            self.put("data.columns", column_maps[0], f"columns of {key}")
        elif any(column_maps):
            maps = dict.fromkeys(format_value(columns) if columns else "the usual names" for columns in column_maps)
            text = f"column names differ ({' and '.join(maps)}), but data.columns applies to all files: rename columns"
            self.add_unsupported(key, text)

    def put_objective(self, key: str, value: Any, objectives: Mapping[str, str]) -> str:
        """Import and return the objective. objectives: strop's names. Raises InputError if strop does not have it."""
        if value == "grpo":
            raise grpo_error(f"{key}: grpo")
        if value not in objectives:
            what = f"{key}: {value}: not an objective of strop{suggest(str(value), objectives)}"
            raise InputError(what, fix=f"it has {', '.join(objectives)}")
        if objectives[value] != "sft":
            self.put("train.objective", objectives[value], key)
        return objectives[value]

    def put_options(self, keys: Keys, options: Mapping[str, str]) -> None:
        """Import options of the objective, and report those that it does not have. options: names in strop, by key."""
        objective = self.get("train.objective") or "sft"
        known = OBJECTIVES[objective].options if objective in OBJECTIVES else {}
        for key, option in options.items():
            value = as_number(keys.take(key))
            if value is not None and option in known:
                self.put(f"train.{option}", value, key)
            elif value:
                text = f"{format_value(value)}: {objective} has no {option} in strop"
                self.add_unsupported(key, text, keys.line(key))

    def read_trl_loss(self, keys: Keys, smoothing_key: str, objective_key: str) -> None:
        """Report what differs in TRL's loss of the objective."""
        objective = self.get("train.objective")
        if objective in ("dpo", "ipo") and keys.take(smoothing_key):
            self.add_ignored(smoothing_key, f"no effect in TRL's {'sigmoid' if objective == 'dpo' else 'ipo'} loss")
        elif objective == "orpo":
            self.add_difference(objective_key, f"orpo: {_ORPO_NOTE}")

    def note_string_rows(self, key: str) -> None:
        """Report that TRL trains on strings without a chat template, unless the rows are read and have no strings."""
        columns = ("completion",) if self.get("train.objective") in (None, "kto") else ("chosen", "rejected")
        rows = self.read_first_rows()
        if rows is None or any(isinstance(row.get(column), str) for row in rows for column in columns):
            self.add_difference(key, _STRING_ROWS_NOTE)

    def put_default_targets(self, key: str) -> None:
        """Set PEFT's default for the type of the model, if it is on this machine; otherwise report the difference."""
        from huggingface_hub import errors, try_to_load_from_cache

        name, modules, model_type = self.get("model.name"), None, ""
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError, errors.HFValidationError):
            file = Path(name) / "config.json"
            if not file.is_file():
                file = Path(str(try_to_load_from_cache(name, file.name, revision=self.get("model.revision"))))
            model_type = json.loads(file.read_text(encoding="utf-8"))["model_type"]
            from peft.utils import constants  # takes seconds: it imports torch

            modules = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type]
        if isinstance(modules, list):
            self.put("lora.target_modules", modules, f"PEFT's default for {model_type}")
        else:
            self.add_difference(key, _TARGETS_NOTE)

    def put_sft_loss(self, keys: Keys, key: str, losses: Any, weights_key: str) -> Any:
        """Import TRL's loss `sft` next to another one. Return the other loss, or `losses` if this is not possible."""
        if not isinstance(losses, list) or len(losses) == 1:
            return losses[0] if isinstance(losses, list) else losses
        given = keys.peek(weights_key, [1.0] * len(losses))
        weights = dict(zip(map(str, losses), given, strict=False)) if isinstance(given, list) else {}
        other = next((loss for loss in weights if loss in ("sigmoid", "ipo") and weights[loss]), "")
        if set(weights) != {other, "sft"}:
            return losses
        scale, weight = (as_float(weights_key, weights[loss]) for loss in (other, "sft"))
        keys.take(weights_key)
        self.put("train.sft_weight", weight / scale, key)
        self.add_difference(key, "TRL averages sft over the tokens of a batch; strop averages it per answer")
        if scale != 1:
            text = f"{scale:g} for {other}: 1 in strop, so the whole loss and its gradients are divided by {scale:g}"
            self.add_difference(weights_key, text)
        return other

    def put_batch_size(self, micro_batch: Any, accumulation_steps: Any, key: str, source: str = "") -> None:
        """Set the effective batch size and the micro-batch size from those of one device."""
        rows = as_int(key, micro_batch)
        self.put("train.batch_size", rows * as_int(key, accumulation_steps), source or key)
        self.put("train.micro_batch", rows, source or key)
        self.add_difference(key, "per device in the other tool; strop's batch_size is that of all devices together")

    def put_int8(self, key: str) -> None:
        self.put("model.quantization", "int8", key)
        self.add_difference(key, "strop scales weights by row; the other tool keeps outliers in 16 bit")

    def note_max_length(self, key: str) -> None:
        self.add_difference(key, NO_LIMIT_NOTE if self.get("data.max_length") is None else TRUNCATION_NOTE)

    def note_packing(self, key: str, more: str = "") -> None:
        text = "the other tool's batch counts packed sequences; strop counts rows and packs automatically: multiply "
        self.add_difference(key, f"{text}train.batch_size by the number of rows that fit into one sequence{more}")

    def note_batches(self, keys: Keys) -> None:
        """Report settings of transformers that determine which rows are in a batch."""
        if keys.take("dataloader_drop_last"):
            self.add_difference("dataloader_drop_last", LAST_BATCH_NOTE)
        if keys.take("group_by_length"):
            text = "a batch has rows of similar lengths in the other tool; strop shuffles rows with the seed"
            self.add_difference("group_by_length", text)

    def columns_to_read(self, key: str, sources: list[str], read: Columns, *, is_given: bool = False) -> Columns:
        """Return data.columns if rows have columns that strop reads, but the other tool does not.

        read: the columns that the other tool reads, by strop's names. is_given: the config names them.
        """
        from strop.data.formats import FORMATS

        rows = self.read_first_rows(sources)
        if rows is None:
            if not is_given:
                text = "other columns, such as system, history and tools, are read by strop if they are there"
                self.add_difference(key, f"{', '.join(read)}: {text}")
            return dict(read) if is_given else {}
        columns = {name for row in rows for name in row}
        detected = {name for entry in FORMATS.values() for keys in (*entry.keys, entry.optional) for name in keys}
        unread = columns & detected - set(read.values())
        return {name: column for name, column in read.items() if column in columns} if unread else {}

    def train_files(self) -> list[str]:
        sources = self.get("data.train") or []
        return [sources] if isinstance(sources, str) else [str(source) for source in sources]

    def read_first_rows(self, sources: list[str] | None = None) -> list[Mapping[str, Any]] | None:
        """Return the first rows of files (default: data.train), or None if they need a download or cannot be read."""
        from strop.data.reading.sources import needs_download, read_rows

        sources = self.train_files() if sources is None else sources
        try:
            if not sources or any(map(needs_download, sources)):
                return None
            return [row.value for row in islice(read_rows(sources, errors=[]), MAX_READ_ROWS)]
        except StropError:
            return None

    def put_eval_share(self, key: str, share: Any) -> None:
        if not share:
            return
        if (file := self.get("data.eval")) is not None:
            self.add_unsupported(key, f"{share}: rows to evaluate are those of {format_value(file)}")
        elif isinstance(share, float) and 0 < share < 1:
            self.put("data.eval", f"{100 * share:g}%", key)
            self.add_difference(key, "strop chooses held-out rows by their content, not by a seed")
        else:
            self.add_unsupported(key, f"{share}: a row count; set data.eval to a file or a share such as 5%")

    def put_optimizer(self, key: str, name: Any, source: str = "") -> None:
        optimizer = OPTIMIZERS.get(str(name).lower())
        if optimizer is None:
            self.add_unsupported(key, f"{name}: not supported; strop uses adamw unless train.optimizer is set")
            return
        self.put("train.optimizer", optimizer, source or key)
        if "paged" in str(name) and "paged" not in optimizer:
            self.add_difference(key, f"{name}: strop uses {optimizer}, not paged; the results are the same")

    def check_adam_betas(self, keys: Keys) -> None:
        """Report AdamW's betas and epsilon, which are constants in strop, if they differ from strop's."""
        for key, default in ADAM_DEFAULTS.items():
            if (value := as_number(keys.take(key))) is not None and value != default:
                self.add_unsupported(key, f"{value}: {default:g} in strop", keys.line(key))

    def disable_dropout_for_preferences(self) -> None:
        """Set dropout to 0 for preference objectives, as TRL and tools built on it do (disable_dropout)."""
        is_preference, dropout = self.get("train.objective") is not None, self.get("lora.dropout")
        if is_preference and (dropout or "lora.dropout" not in self.fields):
            self.put("lora.dropout", 0.0, "disable_dropout")
        if is_preference and dropout:
            text = f"{dropout}: the other tool disables dropout for preference objectives"
            self.add_difference("lora_dropout", text)

    def put_schedule(self, key: str, name: Any, source: str = "") -> None:
        schedule, source = SCHEDULES.get(str(name).lower()), source or key
        if schedule is None:
            schedule, source = "cosine", f"{key} has no equivalent"
            self.add_unsupported(key, f"{name}: strop has {', '.join(sorted(set(SCHEDULES.values())))}; cosine is used")
        self.put("train.lr_scheduler", schedule, source)
        if name == "constant":
            self.put("train.warmup", 0, f"{key}: no warmup")

    def put_dtype_flags(self, keys: Keys) -> None:
        for key in ("bf16", "fp16"):
            if keys.take(key) is True:
                self.put_dtype(key, key)

    def put_dtype(self, dtype: str, source: str) -> None:
        """Import the dtype of the weights, or of their computation (mixed precision)."""
        known = self.fields.get("model.dtype", (dtype, source))
        half = next((choice for choice in (known, (dtype, source)) if choice[0] != "fp32"), None)
        if half is not None and "fp32" in (known[0], dtype):
            text = f"the base is kept in fp32 and computed in {half[0]} in the other tool; strop keeps it in {half[0]}"
            self.add_difference("dtype", text)
        self.put("model.dtype", *(half or (dtype, source)))

    def put_checkpointing(self, key: str, enabled: Any) -> None:
        if isinstance(enabled, str):
            self.add_ignored(key, f"{enabled}: strop decides by the available memory")
        elif enabled is not None:
            self.put("train.gradient_checkpointing", "on" if enabled else "off", key)

    def put_training_arguments(self, keys: Keys, defaults: dict[str, Any]) -> None:
        """Import the fields of transformers' TrainingArguments. defaults: the tool's defaults by key."""

        def take(key: str) -> tuple[Any, str]:
            """Return the value or its default, and where it came from."""
            value = keys.take(key)
            if value is not None:
                return value, key
            return defaults.get(key), keys.default_source(key, f"{self.tool}'s default")

        micro_batch, source = take("per_device_train_batch_size")
        self.put_batch_size(micro_batch, take("gradient_accumulation_steps")[0], "per_device_train_batch_size", source)
        for key, name in (
            ("learning_rate", "train.learning_rate"), ("num_train_epochs", "train.epochs"),
            ("weight_decay", "train.weight_decay"), ("max_grad_norm", "train.max_grad_norm"), ("seed", "seed"),
        ):  # fmt: skip
            value, source = take(key)
            if value is not None:
                self.put(name, as_number(value), source)
        self.note_seed("data_seed", keys.take("data_seed"))
        self.note_batches(keys)
        schedule, source = take("lr_scheduler_type")
        self._put_warmup(keys, is_constant=schedule == "constant", default=defaults.get("warmup_steps", 0))
        self.put_schedule("lr_scheduler_type", schedule, source)
        self.put_optimizer("optim", *take("optim"))
        self.check_adam_betas(keys)
        self.read_kept_weights(keys)
        self.put_dtype_flags(keys)
        for key in ("gradient_checkpointing", "activation_checkpointing"):  # renamed in transformers 5.24
            self.put_checkpointing(key, keys.take(key))
        self.put_intervals_and_output(keys)

    def read_kept_weights(self, keys: Keys) -> None:
        self.loads_best = bool(keys.take("load_best_model_at_end"))
        self.best_metric = keys.take("metric_for_best_model")

    def note_seed(self, key: str, value: Any) -> None:
        """Report a second seed, which determines the order of rows or LoRA's start, if it differs from `seed`."""
        if value not in (None, seed := self.get("seed")):
            self.add_difference(
                key, f"{value}: strop has one seed, here {seed}, for row order, LoRA's start and dropout"
            )

    def _put_warmup(self, keys: Keys, *, is_constant: bool, default: float) -> None:
        """Import the warmup, which transformers ignores for the schedule `constant`."""
        steps, ratio = keys.take("warmup_steps"), keys.take("warmup_ratio")
        value, key = (steps, "warmup_steps") if steps or ratio is None else (ratio, "warmup_ratio")
        source = key
        if steps and ratio:
            self.add_ignored("warmup_ratio", f"{ratio}: ignored by the other tool too: warmup_steps has priority")
        if value is None:
            value, source = default, keys.default_source(key, f"{self.tool}'s default")
        if self.is_whole_warmup(key, value):
            return
        self.put("train.warmup", as_number(value), source if value else "no warmup")
        if value and is_constant:
            self.add_ignored(key, f"{value}: ignored by the other tool too: lr_scheduler_type constant has no warmup")
        elif value:
            self.add_difference(key, WARMUP_NOTE)

    def is_whole_warmup(self, key: str, value: Any) -> bool:
        """Report a ratio of 1, a warmup over all steps: strop reads numbers from 1 on as steps."""
        is_whole = key == "warmup_ratio" and as_float(key, value) >= 1
        if is_whole:
            self.add_unsupported(key, f"{value}: a warmup over all steps; set train.warmup to their number")
        return is_whole

    def put_intervals_and_output(self, keys: Keys) -> None:
        """Import step limits, intervals, the output folder, parallelism and trackers."""
        if (max_steps := keys.take("max_steps")) is not None and as_int("max_steps", max_steps) > 0:
            self.put("train.max_steps", as_int("max_steps", max_steps), "max_steps")
        for key, name in (("logging_steps", "log_steps"), ("eval_steps", "eval_steps"), ("save_steps", "save_steps")):
            interval, line = as_number(keys.take(key)), keys.line(key)
            if interval is None:
                continue
            strategies = [keys.peek(strategy) for strategy in STRATEGY_KEYS.get(key, ())]
            if other_strategies := [strategy for strategy in strategies if strategy not in (None, "steps")]:
                reason = f"{key.partition('_')[0]}_strategy is {other_strategies[0]}"
                self.add_ignored(key, f"{interval}: ignored by the other tool: {reason}", line)
            elif isinstance(interval, int) and interval >= 1:
                self.put(f"train.{name}", interval, key)
            elif interval:
                text = f"{interval}: a share of all steps in the other tool; set train.{name} to a number of steps"
                self.add_unsupported(key, text, line)
        for key in PARALLELISM_KEYS:
            if keys.take(key):
                self.add_unsupported(key, _PARALLELISM_NOTE, keys.line(key))
        if (limit := keys.take("save_total_limit")) is not None:
            self.put("train.keep_checkpoints", max(1, as_int("save_total_limit", limit)), "save_total_limit")
        self.put_fields(keys, {"output_dir": "out"}, str)
        for key in ("push_to_hub", "hub_model_id", "hub_strategy"):
            if value := keys.take(key):
                self.add_unsupported(key, f"{value}: run `strop push RUN OWNER/NAME` after training", keys.line(key))
        if checkpoint := keys.take("resume_from_checkpoint"):
            self.add_unsupported("resume_from_checkpoint", f"{checkpoint}: use `strop resume RUN`")
        trackers = keys.take("report_to")
        for tracker in [trackers] if isinstance(trackers, str) else trackers or []:
            self.put_tracker("report_to", tracker)

    def put_tracker(self, key: str, tracker: str) -> None:
        if tracker in ("tensorboard", "wandb", "trackio"):
            self.put("track", [*(self.get("track") or []), tracker], key)
        elif tracker not in ("none", "all"):
            self.add_unsupported(key, f"{tracker}: strop has tensorboard, wandb and trackio")

    def put_lora(self, keys: Keys, rank: str, modules: str, defaults: Mapping[str, Any]) -> None:
        """Import the LoRA settings. rank, modules: the tool's keys of these settings. defaults: by recipe field."""
        for key, name in ((rank, "lora.r"), ("lora_alpha", "lora.alpha"), ("lora_dropout", "lora.dropout")):
            value, source = keys.take(key), key
            if value is None:
                value, source = defaults.get(name), keys.default_source(key, f"default of {key}")
            if value is not None:
                self.put(name, as_number(value), source)
        targets = keys.take(modules)
        if isinstance(targets, str) and targets.strip() not in ("all", "all-linear"):
            targets = [part.strip() for part in targets.split(",")]
        if not isinstance(targets, list):
            if targets is not None:
                self.put("lora.target_modules", "all-linear", modules)
        elif patterns := [name for name in targets if not LAYER_NAME.match(str(name))]:
            text = "a regular expression; strop takes names of linear layers, by default all of them: set "
            text += "lora.target_modules (`strop modules MODEL` lists the names)"
            self.add_unsupported(modules, f"{patterns[0]}: {text}", keys.line(modules))
        else:
            self.put("lora.target_modules", targets, modules)
        self.put_fields(keys, {key: f"lora.{key}" for key in ("use_rslora", "use_dora")}, bool)

    def put_lora_init(self, keys: Keys, key: str) -> None:
        """Import PEFT's `init_lora_weights`."""
        init = keys.take(key)
        if init in ("gaussian", "loftq"):
            self.put("lora.init", init, key)
        elif init not in (None, True):
            self.add_unsupported(key, format_value(init))

    def put_simpo(self, keys: Keys) -> None:
        """Import SimPO's settings, with the defaults and the additional loss of TRL's CPOTrainer (used by Axolotl)."""
        if self.get("train.beta") is None:
            self.put("train.beta", 0.1, "trl's default")
        self.put("train.gamma", 0.5, "trl's default")
        self.put_fields(keys, {"simpo_gamma": "train.gamma"})
        alpha = keys.take("cpo_alpha")
        if alpha or alpha is None:
            value = "1.0, trl's default" if alpha is None else alpha
            self.add_unsupported("cpo_alpha", f"{value}: train.sft_weight is similar, but averages over tokens")


@dataclass(frozen=True)
class Imported:
    """An imported config. missing: required recipe fields that the config lacks."""

    draft: Draft
    resolved: Resolved
    missing: list[str]

    def to_yaml(self) -> str:
        """Return the recipe as YAML with the source of each value as a comment, followed by the notes."""
        draft = self.draft
        lines = [f"# From {draft.file.name} ({draft.tool}), by `strop import`."]
        previous_section = ""
        order = ["preset", "model", "data", "lora", "train", "track", "seed", "out"]
        for name in sorted(draft.fields, key=lambda name: (order.index(name.partition(".")[0]), name)):
            value, source = draft.fields[name]
            section, _, leaf = name.rpartition(".")
            if section and section != previous_section:
                lines.append(f"{section}:")
                for missing in self.missing:
                    missing_section, _, key = missing.partition(".")
                    if missing_section == section:
                        lines.append(f"  # {key}: set it, or use {REQUIRED_OPTIONS[missing][0]}")
            previous_section = section
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
            lines.append(f"{'  ' if section else ''}{leaf}: {text.removesuffix('...' + chr(10)).strip()}  # {source}")
        for title, notes in (
            ("Imported, with a different meaning", draft.differs),
            ("Left out: no equivalent in strop", draft.unsupported),
            ("Left out: no effect on the trained weights", draft.ignored),
        ):
            lines += [f"# {title}:"] * bool(notes)
            for note in notes:
                line = f" (line {note.line})" if note.line else ""
                lines.append(f"#   {note.key}{line}{': ' if note.text else ''}{note.text}".replace("\n", " "))
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        draft = self.draft
        fields = [{"field": name, "value": value, "from": key} for name, (value, key) in draft.fields.items()]
        # The names own_way and peer are part of the JSON output: no effect on the trained weights, and the other tool.
        lists = {"differs": draft.differs, "no_equivalent": draft.unsupported, "own_way": draft.ignored}
        notes_by_kind = {
            name: [{"key": note.key, "what": note.text, "line": note.line} for note in notes]
            for name, notes in lists.items()
        }
        return {"peer": draft.tool, "fields": fields, "missing": self.missing, **notes_by_kind}


def import_config(tool: str, path: Path) -> Imported:
    """Convert another tool's config to a recipe. Raises InputError or RecipeError if it cannot be imported."""
    if tool not in IMPORTERS:
        raise RecipeError(f"{tool}: unknown tool{suggest(tool, IMPORTERS)}", fix=f"give {', '.join(IMPORTERS)}")
    draft = Draft(tool, path)
    module = "trl" if tool == "unsloth" else tool  # Unsloth's scripts use TRL's trainers
    importlib.import_module(f"strop.interop.{module}").read(draft)
    return draft.finish()


class Keys:
    """The keys of a config. Importers take the keys that they support, and report the rest.

    lines: line numbers by key, for scripts. unreadable: keys whose values cannot be evaluated.
    """

    def __init__(
        self, values: Mapping[str, Any], lines: Mapping[str, int] | None = None, unreadable: Iterable[str] = ()
    ) -> None:
        self._unreadable, self._lines = set(unreadable), dict(lines or {})
        self.null_keys = {str(key) for key, value in values.items() if value is None}
        self._remaining = {str(key): value for key, value in values.items() if value is not None and value != ""}

    def __contains__(self, key: str) -> bool:
        return key in self._remaining or key in self._unreadable

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._remaining))

    def take(self, key: str, default: Any = None) -> Any:
        return self._remaining.pop(key, default)

    def peek(self, key: str, default: Any = None) -> Any:
        return self._remaining.get(key, default)

    def default_source(self, key: str, source: str) -> str:
        """Return the source of a default, with a hint if the config's value of `key` cannot be evaluated."""
        return f"{source}: line {self._lines[key]} cannot be read, set it here" if key in self._unreadable else source

    def line(self, key: str) -> int | None:
        return self._lines.get(key)

    def report_rest(self, draft: Draft, ignored_keys: Collection[str]) -> None:
        """Report the keys that were not taken: as ignored if listed in `ignored_keys`, else as unsupported."""
        for key, value in self._remaining.items():
            if key in ignored_keys:
                draft.add_ignored(key)
            else:
                draft.add_unsupported(key, format_value(value), self.line(key))


def format_value(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return text if len(text) <= 80 else f"{text[:77]}..."


def join_files(path: Any, data_files: Any) -> list[str]:
    """Return the paths of `data_files`: relative to the data set `path`, or local if `path` is a file format."""
    files = [data_files] if isinstance(data_files, str) else list(data_files)
    return [str(file) if path in (None, *FILE_FORMATS) else f"{path}/{file}" for file in files]


def grpo_error(config: str) -> InputError:
    fix = "write the recipe yourself: train.objective grpo, train.rewards file.py:function"
    return InputError(f"{config}: its reward functions are code, which is not executed", fix=fix)
