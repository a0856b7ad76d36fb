"""A recipe being imported: where each value came from, what differs in meaning, and what has no equivalent."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from strop.config.load import Resolved, resolve
from strop.errors import InputError, RecipeError, nearest

# the module that imports each tool's configs
IMPORTERS = {
    "axolotl": "axolotl", "llamafactory": "llamafactory", "trl": "trl", "unsloth": "trl", "torchtune": "torchtune",
}  # fmt: skip
# fields that only the user can fill in, with placeholders used while the recipe is validated
MISSING = {"model.name": "MODEL", "data.train": "YOURS.jsonl"}
_GIVE = {"model": ("model.name", "give the model here, or with --model"),
         "data": ("data.train", "give your rows here, or with --data")}  # fmt: skip


OPTIMIZERS: dict[str, str] = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adam"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("lion", "lion_32bit", "paged_lion_32bit"), "lion"),
    "paged_adamw_8bit": "paged_adamw_8bit", "adafactor": "adafactor", "sgd": "sgd",
}  # fmt: skip
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
# keys that decide how a run is computed, watched and stored, not what is learned
IGNORED_KEYS = (
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
# transformers reads these step counts only if the strategy is "steps"
STRATEGY_KEYS = {"eval_steps": ("eval_strategy", "evaluation_strategy"), "save_steps": ("save_strategy",)}
LAYER_NAME = re.compile(r"[\w.\- ]*$")  # a plain layer name, not a regular expression
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}  # the defaults of strop and of all tools here
TRUNCATION_NOTE = (
    "the other tool cuts longer rows at their end, and the answer loses its stop token; strop refuses such rows: "
    "raise data.max_length, or choose data.overlong"
)
NO_LIMIT_NOTE = "null or None: no limit in the other tool; at most data.max_length tokens in strop"
WARMUP_NOTE = "the first step has learning rate 0 in the other tool, and one warmup step's rate in strop"
NO_GRPO = (  # message, fix
    "its reward functions are code, which is not executed",
    "write the recipe yourself: train.objective grpo, train.rewards file.py:function",
)
# how several GPUs share the work
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
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


@dataclass(frozen=True)
class Note:
    """A key of the other tool's config, what the user should know about it, and its line if known."""

    key: str
    text: str
    line: int | None = None


@dataclass
class Draft:
    """The result of reading another tool's config, before validation."""

    peer: str
    file: Path
    fields: dict[str, tuple[Any, str]] = field(default_factory=dict)  # by dotted name: value, and the key it came from
    differs: list[Note] = field(default_factory=list)  # keys that have another meaning in strop
    unsupported: list[Note] = field(default_factory=list)  # keys without an equivalent
    ignored: list[Note] = field(default_factory=list)  # keys that strop decides itself; they do not change the result
    model_unreadable: bool = False  # a model is given as an expression that only running the script would evaluate

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
        if self.get("data.eval") is None and (patience := self.fields.pop("train.early_stopping", None)) is not None:
            what = f"{patience[0]}: needs evaluation rows: set data.eval and train.early_stopping {patience[0]}"
            self.add_unsupported(patience[1], what)
        values = {name: value for name, (value, _) in self.fields.items()}
        if "model.name" not in values and not self.model_unreadable:
            raise RecipeError(f"{self.file}: no model is given", fix="check that it is a training config of this tool")
        missing = [name for name in MISSING if name not in values]
        resolved = resolve(None, {**values, **{name: MISSING[name] for name in missing}})
        return Imported(self, resolved, missing)

    def read_yaml(self) -> dict[str, Any]:
        """Return the mapping in the config, a YAML file. Raises InputError."""
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
        """Import keys whose values mean the same in strop. fields: recipe fields by key."""
        for key, name in fields.items():
            if (value := keys.take(key)) is not None:
                self.put(name, convert(value), key)

    def put_batch_size(self, rows: Any, steps: Any, key: str) -> None:
        """Set the effective batch size from the micro-batch and gradient accumulation of one device."""
        at_once = as_int(key, rows)
        self.put("train.batch_size", at_once * as_int(key, steps), key)
        self.put("train.micro_batch", at_once, key)
        text = "per device in the other tool; strop's batch_size is the effective batch over all devices"
        self.add_difference(key, text)

    def put_int8(self, key: str) -> None:
        self.put("model.quantization", "int8", key)
        text = "strop scales each weight row by its largest value; the other tool keeps outliers in 16 bit"
        self.add_difference(key, text)

    def note_max_length(self, key: str) -> None:
        self.add_difference(key, NO_LIMIT_NOTE if self.get("data.max_length") is None else TRUNCATION_NOTE)

    def note_packing(self, key: str) -> None:
        text = (
            "the other tool's batch counts packed sequences of many rows; strop counts rows and packs automatically: "
        )
        text += "multiply train.batch_size by the number of rows that fit into one sequence"
        self.add_difference(key, text)

    def put_eval_share(self, key: str, share: Any) -> None:
        if not share:
            return
        if isinstance(share, float) and 0 < share < 1:
            self.put("data.eval", f"{100 * share:g}%", key)
            self.add_difference(key, "held-out rows are chosen by their content here, not by a seed")
        else:
            self.add_unsupported(
                key, f"{format_value(share)}: a row count; set data.eval to a file or a share such as 5%"
            )

    def put_optimizer(self, key: str, name: Any) -> None:
        known = OPTIMIZERS.get(str(name).lower())
        if known is None:
            self.add_unsupported(key, f"{name}: not supported; strop uses adamw unless train.optimizer is set")
            return
        self.put("train.optimizer", known, key)
        if "paged" in str(name) and "paged" not in known:
            self.add_difference(key, f"{name}: {known} here, not paged; the results are the same")
        if known == "adafactor":
            self.add_difference(key, "the learning rate is used unchanged here, not scaled by the norm of the weights")

    def check_adam_betas(self, keys: Keys) -> None:
        """Report AdamW's betas and epsilon, which strop does not expose, if they differ from strop's."""
        for key, ours in ADAM.items():
            if (value := as_number(keys.take(key))) is not None and value != ours:
                self.add_unsupported(key, f"{value}: {ours:g} here", keys.line(key))

    def disable_dropout_for_preferences(self, key: str) -> None:
        """Set dropout to 0 for preference objectives, as TRL and tools built on it do (disable_dropout)."""
        if self.get("train.objective") is not None and (share := self.get("lora.dropout")):
            self.put("lora.dropout", 0.0, "disable_dropout")
            self.add_difference(key, f"{share}: not used by the other tool: its preference objectives disable dropout")

    def put_schedule(self, key: str, name: Any) -> None:
        known = SCHEDULES.get(str(name).lower())
        if known is None:
            self.add_unsupported(
                key, f"{name}: strop has {', '.join(sorted(set(SCHEDULES.values())))}; cosine is taken"
            )
            self.put("train.lr_scheduler", "cosine", f"{key} has no equivalent")
            return
        self.put("train.lr_scheduler", known, key)
        if name == "constant":
            self.put("train.warmup", 0, f"{key}: no warmup")

    def put_dtype_flags(self, keys: Keys) -> None:
        for key in ("bf16", "fp16"):
            if keys.take(key) is True:
                self.put("model.dtype", key, key)

    def put_checkpointing(self, key: str, on: Any) -> None:
        if isinstance(on, str):
            self.add_ignored(key, f"{on}: the plan decides")
        elif on is not None:
            self.put("train.gradient_checkpointing", "on" if on else "off", key)

    def put_training_arguments(self, keys: Keys, defaults: dict[str, Any], *, tool: str) -> None:
        """Read TrainingArguments and its subclasses. defaults: by key; tool: the tool they belong to."""

        def value(key: str) -> tuple[Any, str]:
            given = keys.take(key)
            return (given, key) if given is not None else (defaults.get(key), keys.default(key, f"{tool}'s default"))

        rows, at = value("per_device_train_batch_size")
        steps, _ = value("gradient_accumulation_steps")
        self.put_batch_size(rows, steps, "per_device_train_batch_size" if at == f"{tool}'s default" else at)
        for key, name in (
            ("learning_rate", "train.learning_rate"), ("num_train_epochs", "train.epochs"),
            ("weight_decay", "train.weight_decay"), ("max_grad_norm", "train.max_grad_norm"), ("seed", "seed"),
        ):  # fmt: skip
            given, source = value(key)
            if given is not None:
                self.put(name, as_number(given), source)
        schedule, _ = value("lr_scheduler_type")
        self.put_warmup(keys, constant=schedule == "constant")
        self.put_schedule("lr_scheduler_type", schedule)
        self.put_optimizer("optim", value("optim")[0])
        self.check_adam_betas(keys)
        self.put_dtype_flags(keys)
        for key in ("gradient_checkpointing", "activation_checkpointing"):  # its name since transformers 5.24
            self.put_checkpointing(key, keys.take(key))
        self.put_intervals_and_output(keys)

    def put_warmup(self, keys: Keys, *, constant: bool) -> None:
        """Read the warmup. constant: the schedule is `constant`, which ignores warmup in transformers."""
        steps, ratio = keys.take("warmup_steps"), keys.take("warmup_ratio")
        value, key = (steps, "warmup_steps") if steps else (ratio, "warmup_ratio")
        self.put("train.warmup", as_number(value or 0), key if value else "no warmup")
        if value and constant:
            self.add_ignored(key, f"{value}: ignored by the other tool too: lr_scheduler_type constant has no warmup")
        elif value:
            self.add_difference(key, WARMUP_NOTE)

    def put_intervals_and_output(self, keys: Keys) -> None:
        """Read step limits and intervals, output folder, parallelism and trackers."""
        if (max_steps := keys.take("max_steps")) is not None and as_int("max_steps", max_steps) > 0:
            self.put("train.max_steps", as_int("max_steps", max_steps), "max_steps")
        for key, name in (("logging_steps", "log_steps"), ("eval_steps", "eval_steps"), ("save_steps", "save_steps")):
            interval, at = as_number(keys.take(key)), keys.line(key)
            if interval is None:
                continue
            strategies = [keys.peek(strategy) for strategy in STRATEGY_KEYS.get(key, ())]
            if unused := [strategy for strategy in strategies if strategy not in (None, "steps")]:
                strategy = f"{key.partition('_')[0]}_strategy"
                self.add_ignored(key, f"{interval}: ignored by the other tool: {strategy} is {unused[0]}", at)
                continue
            if isinstance(interval, int) and interval >= 1:
                self.put(f"train.{name}", interval, key)
            elif interval:
                text = f"{interval}: a share of all steps in the other tool; set train.{name} to a number of steps"
                self.add_unsupported(key, text, at)
        for key in PARALLELISM_KEYS:
            if keys.take(key):
                self.add_unsupported(key, _PARALLELISM_NOTE, keys.line(key))
        if (most := keys.take("save_total_limit")) is not None:
            self.put("train.keep_checkpoints", max(1, as_int("save_total_limit", most)), "save_total_limit")
        self.put_fields(keys, {"output_dir": "out"}, str)
        for key in ("push_to_hub", "hub_model_id", "hub_strategy"):
            if value := keys.take(key):
                text = f"{value}: run `strop push RUN OWNER/NAME` after training"
                self.add_unsupported(key, text, keys.line(key))
        if resume := keys.take("resume_from_checkpoint"):
            self.add_unsupported("resume_from_checkpoint", f"{resume}: use `strop resume RUN`")
        trackers = keys.take("report_to")
        for tracker in [trackers] if isinstance(trackers, str) else trackers or []:
            self.put_tracker("report_to", tracker)

    def put_tracker(self, key: str, tracker: str) -> None:
        if tracker in ("tensorboard", "wandb", "trackio"):
            self.put("track", [*(self.get("track") or []), tracker], key)
        elif tracker not in ("none", "all"):
            self.add_unsupported(key, f"{tracker}: strop has tensorboard, wandb and trackio")

    def put_lora(
        self, keys: Keys, *, rank: str, alpha: str, dropout: str, modules: str, defaults: dict[str, Any]
    ) -> None:
        """Read rank, alpha, dropout and target modules under a tool's key names."""
        for key, name in ((rank, "lora.r"), (alpha, "lora.alpha"), (dropout, "lora.dropout")):
            given = keys.take(key)
            value, source = (given, key) if given is not None else (defaults.get(name), None)
            source = source or keys.default(key, f"default of {key}")
            if value is not None:
                self.put(name, as_number(value), source)
        given = keys.take(modules)
        if isinstance(given, str):
            given = given if given.strip() in ("all", "all-linear") else [part.strip() for part in given.split(",")]
        if odd := [name for name in given if not LAYER_NAME.match(str(name))] if isinstance(given, list) else []:
            text = "a regular expression; strop takes names of linear layers, by default all of them: set "
            text += "lora.target_modules (`strop modules MODEL` lists the names)"
            self.add_unsupported(modules, f"{odd[0]}: {text}", keys.line(modules))
        elif isinstance(given, list):
            self.put("lora.target_modules", given, modules)
        elif given is not None:
            self.put("lora.target_modules", "all-linear", modules)
        for key in ("use_rslora", "use_dora"):
            if keys.peek(key) is not None:
                self.put(f"lora.{key}", bool(keys.take(key)), key)

    def put_lora_init(self, keys: Keys, key: str) -> None:
        """Read PEFT's `init_lora_weights`."""
        start = keys.take(key)
        if start in ("gaussian", "loftq"):
            self.put("lora.init", start, key)
        elif start not in (None, True):
            self.add_unsupported(key, format_value(start))

    def put_simpo(self, keys: Keys) -> None:
        """Read SimPO as in TRL's CPOTrainer, which Axolotl uses too: other defaults and an additional loss."""
        if self.get("train.beta") is None:
            self.put("train.beta", 0.1, "trl's default")
        self.put("train.gamma", 0.5, "trl's default")
        self.put_fields(keys, {"simpo_gamma": "train.gamma"})
        alpha = keys.take("cpo_alpha")
        if alpha or alpha is None:
            value = "1.0, trl's default" if alpha is None else alpha
            self.add_unsupported("cpo_alpha", f"{value}: train.sft_weight is similar (a mean over tokens)")


@dataclass(frozen=True)
class Imported:
    """An imported config: the draft with notes on every key, the recipe, and the fields the user must fill in."""

    draft: Draft
    resolved: Resolved
    missing: list[str]

    def to_yaml(self) -> str:
        """Return the recipe as YAML, each value with its source key; keys that were not imported follow as comments."""
        lines = [f"# From {self.draft.file.name} ({self.draft.peer}), by `strop import`."]
        section = ""
        order = ["preset", "model", "data", "lora", "train", "track", "seed", "out"]
        for name in sorted(self.draft.fields, key=lambda name: (order.index(name.partition(".")[0]), name)):
            value, source = self.draft.fields[name]
            head, _, leaf = name.rpartition(".")
            if head and head != section:
                lines.append(f"{head}:")
                field_, what = _GIVE.get(head, ("", ""))
                lines += [f"  # {field_.partition('.')[2]}: {what}"] * (field_ in self.missing)
            section = head
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
            lines.append(f"{'  ' if head else ''}{leaf}: {text.removesuffix('...' + chr(10)).strip()}  # {source}")
        for title, notes in (
            ("Imported, with a different meaning", self.draft.differs),
            ("Left out: no equivalent in strop", self.draft.unsupported),
            ("Left out: strop decides it itself, and it does not change what is learned", self.draft.ignored),
        ):
            lines += [f"# {title}:"] * bool(notes)
            for note in notes:
                at = f" (line {note.line})" if note.line else ""
                lines.append(f"#   {note.key}{at}{': ' if note.text else ''}{note.text}".replace("\n", " "))
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        fields = [{"field": name, "value": value, "from": key} for name, (value, key) in self.draft.fields.items()]
        lists = {"differs": self.draft.differs, "no_equivalent": self.draft.unsupported, "own_way": self.draft.ignored}
        notes_by_kind = {
            name: [{"key": note.key, "what": note.text, "line": note.line} for note in notes]
            for name, notes in lists.items()
        }
        return {"peer": self.draft.peer, "fields": fields, "missing": self.missing, **notes_by_kind}


def import_config(peer: str, path: Path) -> Imported:
    """Import another tool's config as a recipe, with a note on every key that differs or is left out."""
    if peer not in IMPORTERS:
        what = f"{peer}: not a tool that strop imports from{nearest(peer, IMPORTERS)}"
        raise RecipeError(what, fix=f"give {', '.join(IMPORTERS)}")
    draft = Draft(peer, path)
    importlib.import_module(f"strop.interop.{IMPORTERS[peer]}").read(draft)
    return draft.finish()


class Keys:
    """The keys of a config, taken one by one. unread: keys whose values cannot be evaluated. none: given as None."""

    def __init__(
        self, values: Mapping[str, Any], lines: Mapping[str, int] | None = None, unread: Iterable[str] = ()
    ) -> None:
        self._unread = set(unread)
        self.none = {str(key) for key, value in values.items() if value is None}
        self._left = {str(key): value for key, value in values.items() if value is not None and value != ""}
        self._lines = dict(lines or {})

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, default: Any = None) -> Any:
        return self._left.pop(key, default)

    def peek(self, key: str, default: Any = None) -> Any:
        return self._left.get(key, default)

    def default(self, key: str, source: str) -> str:
        """Return the source of a default, with a hint if the file sets `key` to something unreadable."""
        return f"{source}: line {self._lines[key]} cannot be read, set it here" if key in self._unread else source

    def left(self) -> list[str]:
        return list(self._left)

    def line(self, key: str) -> int | None:
        return self._lines.get(key)

    def report_rest(self, draft: Draft, ignored: Iterable[str]) -> None:
        """Report the keys that were not taken: as ignored if listed in `ignored`, else as unsupported."""
        known = set(ignored)
        for key, value in self._left.items():
            if key in known:
                draft.add_ignored(key)
            else:
                draft.add_unsupported(key, format_value(value), self.line(key))


def format_value(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return text if len(text) <= 80 else f"{text[:77]}..."


def objective_for(kind: str, value: Any, known: dict[str, str]) -> str:
    """Return strop's objective for a method's name. Raises InputError if strop has none."""
    if value == "grpo":
        raise InputError(f"{kind}: grpo: {NO_GRPO[0]}", fix=NO_GRPO[1])
    if value not in known:
        what = f"{kind}: {value}: not an objective of strop{nearest(str(value), known)}"
        raise InputError(what, fix=f"it has {', '.join(dict.fromkeys(known))}")
    return known[value]
