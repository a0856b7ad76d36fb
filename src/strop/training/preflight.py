"""What a run is made of, all checked before any weights are read: model, machine, plan, data, room on the disk."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from strop.config.load import Resolved
from strop.config.schema import Recipe
from strop.data.examples import shorter
from strop.data.prepare import Prepared, prepare
from strop.distributed.devices import ALONE, Devices
from strop.engine.device import pick_device, pick_dtype, prepare_process
from strop.errors import TROUBLESHOOTING_PAGE, DataError, DeviceError, FolderError, ModelError
from strop.evaluation.rewards import check_rewards, files_hash, rewards_of
from strop.machine.probe import Machine, probe
from strop.models.adapter_config import expand_adapter_config, read_adapter_config
from strop.models.adapters import adapter_folder, check_adapter_kind, read_identity, tokenizer_source
from strop.models.experts import quantizable_names
from strop.models.families.layers import load_balancing
from strop.models.families.shape import ModelShape
from strop.models.introspect import (
    count_parameters,
    count_path_kinds,
    find_modules_to_save,
    shape_from_model,
    text_path,
)
from strop.models.load import DTYPES, copies_needed, load_config, load_without_weights
from strop.models.lora import check_lora, check_score_head, count_trainable
from strop.models.source import Source, check_not_widened, fingerprint, locate, prequantized
from strop.models.tokenizer import load_tokenizer
from strop.objectives.table import drawn_tokens, learning_of, objective_of
from strop.planning.choose import choose, memory_key, why_no_integers
from strop.planning.learning_rate import kept
from strop.planning.memory import CUDA_CONTEXT_BYTES, constant_bytes, weight_bytes
from strop.planning.workload import Setting
from strop.runs.folder import RunFolder, cache_folder, free_bytes
from strop.runs.lock import sha256_text, versions
from strop.training import state as checkpoints
from strop.training.job import stream_of
from strop.training.trackers import check_trackers
from strop.training.vllm_rollouts import check_vllm

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """What a run is made of, all checked, before any weights are read."""

    resolved: Resolved
    machine: Machine
    source: Source
    tokenizer: Any
    data: Prepared
    lock: dict[str, Any]
    memory_key: str
    num_weights: int  # trainable ones
    shape: ModelShape
    parameters: int


def preview(resolved: Resolved, *, memory: int | None = None, devices: int = 1) -> Resolved:
    """The complete recipe that `train` would use on so many devices of this machine; reads no weights and no data."""
    prepare_process()
    source = locate(resolved.recipe.model.name, resolved.recipe.model.revision)
    return _plan(resolved, source, _look(resolved.recipe, memory, devices), devices)[0]


def set_up(resolved: Resolved, memory: int | None = None, devices: Devices = ALONE) -> Setup:
    lora = resolved.recipe.lora
    rank = max([lora.r, *lora.rank_pattern.values()])
    prepare_process(deterministic=resolved.recipe.train.deterministic, rank=rank)  # before a card is looked at
    check_trackers(resolved.recipe.track)
    source = locate(resolved.recipe.model.name, resolved.recipe.model.revision)
    machine = _look(resolved.recipe, memory, devices.local_world)
    resolved, key, num_weights, shape, parameters = _plan(resolved, source, machine, devices.world)
    check_vllm(resolved.recipe)
    start = start_adapter(resolved.recipe)  # may have brought tokens and a template of its own
    tokenizer = load_tokenizer(source if start is None else tokenizer_source(start, source))
    LOG.info("reading and checking the rows")
    learning = learning_of(resolved.recipe.train)
    data = prepare(resolved.recipe.data, tokenizer, cache=cache_folder() / "data", learning=learning)
    _check_rewards(resolved.recipe, data)
    drawn = drawn_tokens(resolved.recipe.train)
    if shape.learned and (text := shape.count_too_long(_lengths(data), drawn)):
        fix = f"--data.max_length {shape.positions}, with --data.overlong {shorter(learning)}"
        if drawn:
            fix = "lower --train.answer_tokens, or --data.max_length with --data.overlong drop"
        raise DataError(f"{text}: it has learned a vector for each, and none for more", fix=fix)
    if not resolved.recipe.lora.new_tokens:  # which give each token of the tokenizer a row
        _check_vocabulary(source, shape, tokenizer, data)
    if data.renderer.template is not None:  # data.template: the adapter's tokenizer must say what it was trained with
        tokenizer.chat_template = data.renderer.template
    lock = {
        "base": {"name": source.name, "fingerprint": fingerprint(source)},
        "data": data.hash,
        "template": data.renderer.template_hash,
        "rewards": files_hash(rewards_of(resolved.recipe.train.rewards)),
        "recipe": sha256_text(json.dumps(resolved.recipe.model_dump(exclude={"out"}), sort_keys=True)),
        "values": {field: choice.value for field, choice in resolved.choices.items()},
        "seed": resolved.recipe.seed,
        "precision": resolved.recipe.model.dtype,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "machine": asdict(machine),
        "devices": {"count": devices.world, "nodes": devices.nodes},
    }
    return Setup(resolved, machine, source, tokenizer, data, lock, key, num_weights, shape, parameters)


def _check_vocabulary(source: Source, shape: ModelShape, tokenizer: Any, data: Prepared) -> None:
    """Raises ModelError for a row with a token that the model has no embedding of."""
    if len(tokenizer) <= shape.vocabulary:
        return
    known = int(load_without_weights(source).get_input_embeddings().num_embeddings)  # type: ignore[operator]
    for row in (row for rows in (data.train, data.eval or ()) for row in rows):
        if (beyond := row.ids[row.ids >= known]).size:
            token = tokenizer.convert_ids_to_tokens(int(beyond[0]))
            what = (
                f"{row.file}:{row.line}: token {beyond[0]} ({token}) is beyond the {known:,} that {source.name} knows"
            )
            raise ModelError(what, fix="use the model's own tokenizer, or resize the model's embeddings and save it")


def _check_rewards(recipe: Recipe, data: Prepared) -> None:
    """Raises RecipeError and DataError for rewards that cannot be given to these rows."""
    rewards = rewards_of(recipe.train.rewards)
    for rows in (data.train_conversations, data.eval_conversations or ()) if rewards else ():
        check_rewards(rewards, [data.renderer.answer(row) for row in rows], [(row.file, row.line) for row in rows])


def check_space(folder: RunFolder, setup: Setup) -> None:
    """Raises FolderError where the disk has no room for the run's checkpoints (one more than are kept, and the best)
    and its adapter, or the cache's for the copies that loading makes of the base."""
    copies = _copies_bytes(setup)
    if copies and free_bytes(cache_folder()) < copies:
        free = free_bytes(cache_folder()) / 1e6
        what = f"{cache_folder()}: copies of the base need {copies / 1e6:,.0f} MB of disk, {free:,.0f} MB are free"
        raise FolderError(
            what, fix=f"free some space, or set STROP_CACHE to another disk; see {TROUBLESHOOTING_PAGE}#disk"
        )
    checkpoint = checkpoints.size_bytes(setup.num_weights)
    needed = (setup.resolved.recipe.train.keep_checkpoints + 2) * checkpoint + 4 * setup.num_weights + (16 << 20)
    free = free_bytes(folder.path)
    if free < needed:
        what = f"{folder.path}: the run needs {needed / 1e6:,.0f} MB of disk, {free / 1e6:,.0f} MB are free"
        raise FolderError(
            what,
            fix="free some space, give --out another disk, or lower --train.keep_checkpoints; "
            f"see {TROUBLESHOOTING_PAGE}#disk",
        )


def _copies_bytes(setup: Setup) -> int:
    recipe = setup.resolved.recipe
    model = recipe.model
    how = (model.quantization, model.double_quantization, DTYPES[model.dtype])
    half, packed = copies_needed(setup.source, *how)
    setting = Setting.of(recipe, setup.shape, setup.parameters).but(resident_layers=0)
    return 2 * setup.parameters * half + (weight_bytes(setting) + constant_bytes(setting)) * packed


def _look(recipe: Recipe, memory: int | None, processes: int = 1) -> Machine:
    """This machine, and what is free on the card that the run takes: with what PyTorch holds of it already, and its
    context, which every phase counts. processes: those of the run on this machine, which share its memory."""
    machine, device = probe(memory), pick_device(recipe.model.device)
    if processes > 1:
        if device not in ("cpu", "cuda"):
            raise DeviceError(f"--model.device {device}: there are {processes} processes", fix="use cpu, or cuda")
        machine = replace(machine, free_bytes=machine.free_bytes // processes)
    if not device.startswith("cuda"):
        return machine
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) + CUDA_CONTEXT_BYTES
    return replace(machine, gpu_free_bytes=min(free, total))


def remarks(setup: Setup) -> list[str]:
    """What a person should know before training starts: values of a recipe that were chosen by others, a card or
    integers that are not used, options that do nothing here, another base than the adapter's, experts, other towers,
    more modules trained in full than a name says, rows longer than what the model was made for, a warmup as long as
    the run.
    """
    found = (
        *kept(setup.resolved, setup.shape),
        *(_passed_over(setup), _faster(setup), *_idle(setup), _never_at_peak(setup), _stored_otherwise(setup)),
        *(*_experts(setup), _towers(setup), *_in_full(setup), _beyond(setup)),
    )
    return [text for text in found if text]


def _beyond(setup: Setup) -> str | None:
    return setup.shape.count_too_long(_lengths(setup.data), drawn_tokens(setup.resolved.recipe.train))


def _lengths(data: Prepared) -> npt.NDArray[np.int64]:
    """Tokens of all rows (n,), those of the evaluation too."""
    return np.concatenate([rows.lengths for rows in (data.train, data.eval) if rows is not None])


def _faster(setup: Setup) -> str | None:
    """That a CPU which was found to have no bf16 multiplies integers."""
    recipe, dtype = setup.resolved.recipe, setup.resolved.choices["model.dtype"]
    if dtype.value != "fp32" or dtype.origin != "plan" or recipe.train.int8_matmul:
        return None
    if recipe.int8_matmul_conflict() or why_no_integers(recipe, setup.machine, setup.shape):
        return None
    return "this CPU multiplies 8-bit integers faster: --train.int8_matmul true; see docs/performance.md#integers"


def _idle(setup: Setup) -> list[str]:
    """Options that were asked for, and for which nothing is done here."""
    recipe, alone = setup.resolved.recipe, setup.lock["devices"]["count"] == 1
    model, train = recipe.model, recipe.train
    found = {
        "model.double_quantization false: the base is not in 4 bit": (
            not model.double_quantization and model.quantization not in ("nf4", "fp4")
        ),
        f"model.placement {model.placement}: one device holds all of the base": model.placement != "auto" and alone,
        f"train.timeout {train.timeout}: one device waits for no other": train.timeout != "30m" and alone,
        "train.deterministic: a CPU computes the same bits each time without it": (
            train.deterministic and recipe.model.device == "cpu"
        ),
        f"train.eval_steps {train.eval_steps}: nothing is evaluated without data.eval": (
            train.eval_steps is not None and recipe.data.eval is None
        ),
    }
    return [text for text, holds in found.items() if holds]


def _never_at_peak(setup: Setup) -> str | None:
    """That a warmup in steps is as long as the run."""
    train = setup.resolved.recipe.train
    steps = stream_of(setup.resolved.recipe, len(setup.data.train_units or setup.data.train)).total_steps
    if train.warmup < max(1, steps):
        return None
    return f"train.warmup {train.warmup:g}: the run has {steps} steps, and its learning rate never reaches its peak"


def _stored_otherwise(setup: Setup) -> str | None:
    """That the adapter to start from was trained on a base that was stored in another way."""
    start, now = start_adapter(setup.resolved.recipe), setup.resolved.recipe.model.quantization
    then = now if start is None else read_identity(start).get("quantization", now)
    if then == now:
        return None
    was, is_ = ("not quantized" if scheme == "none" else f"in {scheme}" for scheme in (then, now))
    more = "; one that began with lora.init loftq needs it" if then != "none" else ""
    what = f"the adapter to start from was trained on the base {was}, and this run has it {is_}: other numbers"
    return f"{what} (--model.quantization {then}: the same{more})"


def _passed_over(setup: Setup) -> str | None:
    """That a card is there and the run goes without it, where nobody asked for that."""
    gpus, device = setup.machine.gpus, setup.resolved.choices["model.device"]
    if not gpus or device.origin != "plan" or device.value != "cpu":
        return None
    built = torch.version.cuda or "no CUDA"
    return (
        f"{gpus[0]} is there, and torch {torch.__version__} (built for {built}) cannot use it: "
        f"training runs on the CPU; see {TROUBLESHOOTING_PAGE}#cuda"
    )


def _experts(setup: Setup) -> list[str]:
    """Of a mixture: how much of it a token goes through, whether adapters sit on its experts, and the loss that keeps
    the experts evenly used."""
    shape, recipe = setup.shape, setup.resolved.recipe
    held = shape.layers * sum(linear.weights for linear in shape.expert_linears)
    if not held:
        return []
    said = [
        f"a mixture of experts: a token goes through {setup.parameters - shape.idle_expert_weights:,} "
        f"of {setup.parameters:,} weights"
    ]
    if not Setting.of(recipe, shape, setup.parameters).expert_adapter_weights:
        share = held / setup.parameters
        said.append(f"no adapter sits on its experts, which are {share:.0%} of it; all-linear adapts them too")
    loss, text = load_balancing(load_config(setup.source)), "its config"
    if loss and recipe.train.objective != "sft":
        return [
            *said,
            f"load-balancing loss: left out by objective {recipe.train.objective}, though {text} asks for it",
        ]
    on = f"on, at {loss:g}, as {text} says" if loss else f"off, as {text} says (output_router_logits)"
    return [*said, f"load-balancing loss: {on}"]


def _towers(setup: Setup) -> str | None:
    config = load_config(setup.source)
    if setup.source.kind == "gguf" or not text_path(load_without_weights(setup.source)):
        return None
    return f"{config.model_type}: its text half is trained; what sees or hears is frozen and left as it is"


def _in_full(setup: Setup) -> list[str]:
    """Of a name in lora.modules_to_save that stands for modules of several kinds: all of them."""
    names = setup.resolved.recipe.lora.modules_to_save
    if not names:
        return []
    bare = load_without_weights(setup.source)
    kinds = {name: count_path_kinds(find_modules_to_save(bare, name)) for name in names}
    return [
        f"lora.modules_to_save {name}: all {sum(found.values())} modules whose names end so are trained in full: "
        + ", ".join(f"{path} ({count})" for path, count in found.items())
        for name, found in kinds.items()
        if len(found) > 1
    ]


def _plan(
    resolved: Resolved, source: Source, machine: Machine, devices: int = 1
) -> tuple[Resolved, str, int, ModelShape, int]:
    """The complete recipe, what running out of memory is remembered under, how many weights are trained, and the
    model's shape and parameters."""
    recipe = resolved.recipe
    device = pick_device(recipe.model.device)
    start, objective = start_adapter(recipe), objective_of(recipe.train)
    scored = objective is not None and objective.scored
    if start is not None:
        check_adapter_kind(start, scored)
    bare = load_without_weights(source)
    if scored:
        check_score_head(bare.config)
    shape, parameters = shape_from_model(load_config(source).to_dict(), source.config(), bare), count_parameters(bare)
    adapter = None if start is None else expand_adapter_config(start, read_adapter_config(start))
    dtype = pick_dtype(device) if recipe.model.dtype == "auto" else (recipe.model.dtype, "")
    resolved = choose(resolved, machine, shape, device, dtype, adapter, parameters, devices)
    check_lora(bare, resolved.recipe.lora)
    scheme = resolved.recipe.model.quantization
    if scheme != "none":
        check_not_widened(source.path if source.kind == "folder" else source.path.parent)
    if scheme != "none" and prequantized(source.config()) is None and not quantizable_names(bare):
        what = f"--model.quantization {scheme}: {shape.family} has no linear weights to quantize"
        raise ModelError(what, fix="use --model.quantization none")
    key = memory_key(resolved.recipe, machine, shape)
    return resolved, key, count_trainable(bare, resolved.recipe.lora, scored=scored), shape, parameters


def start_adapter(recipe: Recipe) -> Path | None:
    if recipe.model.adapter is None:
        return None
    folder = adapter_folder(recipe.model.adapter)
    if folder is None:
        raise ModelError(
            f"--model.adapter {recipe.model.adapter}: no adapter there", fix="give a run or adapter folder"
        )
    return folder
