"""Merge an adapter into its base in fp32, tensor by tensor, and compare the result with the adapter on its base.

The merged weights are never quantized, because rounding to 4 bits can remove a small adapter completely. The output
folder appears when it is complete and verified. An interrupted merge is resumed after its last complete shard.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from safetensors.torch import save_file
from torch import Tensor

from strop.config.load import read_resolved
from strop.config.schema import DataSection
from strop.data.formats import example_row
from strop.data.prepare import prepare
from strop.data.rendering.image_encoder import image_encoder
from strop.data.types import DataKind, Example, Item
from strop.display.tables import Printed
from strop.engine.images import install_images
from strop.engine.step import step_for
from strop.errors import DataError, MemoryLimitError, ModelError, RecipeError, Stopped
from strop.evaluation.compare import mean_loss
from strop.evaluation.model_card import CARD_FILE, find_report, format_card
from strop.exporting.adapter_weights import load_merger
from strop.exporting.classifier import SCORE_WEIGHT, compare_classifiers, read_score_weight, set_classes
from strop.exporting.embedder import compare_embedders, set_architecture
from strop.exporting.parity import LIMITS, Parity, compare, compute_in_fp32, linears_may_stay_16bit
from strop.exporting.tables import print_base_losses, print_parity
from strop.machine.memory import free_memory
from strop.machine.probe import probe
from strop.models.adapter_config import (
    ORIGIN_FILE,
    STROP_FILE,
    WEIGHTS_FILE,
    AdapterKind,
    adapter_folder,
    adapter_kind,
    check_adapter_kind,
    find_adapter_folder,
    read_adapter_config,
    read_identity,
)
from strop.models.adapters import (
    attach_adapter,
    check_adapter_base,
    check_adapter_weights,
    locate_base,
    locate_tokenizer,
    make_renderer,
    model_identity,
    read_classes,
    restore_precision,
)
from strop.models.embedder import read_pooling, write_modules
from strop.models.experts import PackedExperts, pack_experts, quantizable_names
from strop.models.introspect import text_filter
from strop.models.load import (
    DTYPES,
    load_base,
    load_without_weights,
    refuse_embedder,
    stored_dtype,
    weights_folder,
)
from strop.models.lora import embedding_paths
from strop.models.model_folder import make_config, write_generation_config
from strop.models.quantize import dequantize_weight, quantize_weight
from strop.models.source import Source, fingerprint, locate, quantization_method
from strop.models.tensor_files import (
    SHARD_BYTES,
    CheckpointLayout,
    CheckpointTensors,
    TensorGroup,
    dtype_caster,
)
from strop.models.tokenizer import load_tokenizer, trained_token_rows
from strop.objectives.table import data_kind_of
from strop.planning.memory import PARITY_PROCESS_BYTES, parity_model_bytes
from strop.runs.folder import (
    RunFolder,
    cache_folder,
    check_new_output,
    disk_errors,
    exclusive_output,
    is_run,
    read_json,
    replace_folder,
    write_json,
)
from strop.runs.lock import sha256_file, sha256_text

LOG = logging.getLogger(__name__)
SCORE_FILE = "model-score.safetensors"  # the score head of a classifier
TEXT_KINDS: dict[AdapterKind, DataKind] = {"classifier": "classes", "embedder": "triplets"}  # and their rows
MAX_ROWS = 2000  # maximum number of rows for the comparison
BASE_CHOICE_ROWS = 64  # number of rows to choose between the original and the dequantized base
ROUNDING_CHUNK = 1 << 23  # values that are rounded to fp16 at once, which takes about 200 MB


@dataclass(frozen=True, repr=False)
class Merged(Printed):
    """A merged model.

    Attributes:
        out: its folder.
        files: names of its files.
        base: the base it was merged into, "original" or "dequantized".
        base_losses: loss of the adapter on each base, if both were compared.
        parity: how it differs from the adapter on its base, or None if they were not compared.
        dtype: data type of its weights.
    """

    out: Path
    files: list[str]
    base: str
    base_losses: dict[str, float]
    parity: Parity | None
    dtype: str = "bf16"

    def _print(self, out: Console) -> None:
        print_merged(self, out)

    def __repr__(self) -> str:
        return f"Merged({str(self.out)!r}, dtype={self.dtype!r})"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out), "parity": None if self.parity is None else self.parity.as_json()}


def print_merged(merged: Merged, out: Console) -> None:
    print_base_losses(merged.base_losses, merged.base, out)
    print_parity(merged.parity, out)
    out.print(f"[bold]merged[/]   {escape(str(merged.out))}")


def merge(
    name: str,
    out: Path,
    *,
    dtype: str = "bf16",
    data: str | None = None,
    measure: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Merged:
    """Merge an adapter into a new model folder; see `strop.merge`. May raise MemoryLimitError."""
    folder = find_adapter_folder(name)
    if dtype not in LIMITS:
        raise RecipeError(f"--dtype {dtype}: no such type", fix=f"choose among {', '.join(LIMITS)}")
    check_new_output(out)
    kind = adapter_kind(folder)
    kind = kind if kind in TEXT_KINDS else "text"  # others are refused
    tuned = TunedModel.open(name, kind)
    check_data_option(data, measure)
    texts: Any = []
    if measure:
        check_memory(tuned.source, DTYPES[dtype].itemsize, progress)
        if kind == "text":
            tuned = tuned.load_rows(data)
        else:
            labels = read_classes(folder).names if kind == "classifier" else None
            texts = _read_texts(name, tuned.load_tokenizer(), data, TEXT_KINDS[kind], labels)
    with disk_errors(out.parent), exclusive_output(out), _resumable(out):
        merged_folder, parity = _write_merged(tuned, folder, out, dtype, progress), None
        if measure:
            progress("measuring the merged model against the adapter on its base")
            arguments = tuned.load, merged_folder, DTYPES[dtype], texts
            if kind == "classifier":
                parity = compare_classifiers(*arguments, read_classes(folder), LIMITS[dtype])
            elif kind == "embedder":
                parity = compare_embedders(*arguments, read_pooling(folder), LIMITS[dtype])
            else:
                load_merged = partial(_load_merged, merged_folder, DTYPES[dtype], tuned.tokenizer)
                parity = compare(tuned.load, load_merged, tuned.examples, LIMITS[dtype])
            if not parity.passed:
                shutil.rmtree(merged_folder)
            parity.check(str(out), "" if dtype == "fp32" else "--dtype fp32 rounds nothing")
        if report := find_report(folder):
            details = {"dtype": dtype, "parity": None if parity is None else parity.as_json()}
            (merged_folder / CARD_FILE).write_text(format_card(report, merged=details), encoding="utf-8")
        replace_folder(merged_folder, out)
    return Merged(out, sorted(file.name for file in out.iterdir()), tuned.base, tuned.base_losses, parity, dtype)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Say after Ctrl-C that the shards that are complete are kept."""
    try:
        yield
    except KeyboardInterrupt:
        fix = f"the same command continues from {_partial_folder(out)}; delete that folder to give up"
        raise Stopped("stopped before the merged model was complete", fix=fix) from None


def _partial_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def check_data_option(data: str | None, measure: bool) -> None:
    if data is not None and not measure:
        raise RecipeError("--data: names rows to measure on, but --no-parity measures nothing", fix="leave one out")


def check_memory(source: Source, element_bytes: int, progress: Callable[[str], None]) -> None:
    """Raise MemoryLimitError if there is not enough memory to compare with a model of `element_bytes` per weight."""
    meta_model = load_without_weights(source)
    dtype_bytes = max(stored_dtype(source).itemsize, element_bytes) if linears_may_stay_16bit(meta_model) else 4
    parameters = sum(weight.numel() for weight in meta_model.parameters())
    embedding, head = meta_model.get_input_embeddings(), meta_model.get_output_embeddings()  # type: ignore[operator]
    tied = head is None or head.weight is embedding.weight
    parts = parity_model_bytes(
        parameters, embedding.num_embeddings, embedding.embedding_dim, tied, dtype_bytes=dtype_bytes
    )
    needed, free = sum(parts) + PARITY_PROCESS_BYTES, probe().free_bytes
    figures = f"{needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
    progress(f"measuring takes about {figures}")
    if needed > free:
        fix = "free some memory, or leave the measurement out: --no-parity"
        raise MemoryLimitError(f"measuring takes {figures}", fix=fix)


@dataclass(frozen=True)
class BaseStorage:
    """How the base's weights were stored while the adapter was trained."""

    scheme: str = "none"  # quantization: none, nf4, fp4 or int8
    double: bool = True  # double quantization
    dtype: torch.dtype = torch.float32

    @staticmethod
    def read(folder: Path) -> BaseStorage:
        identity = read_identity(folder)
        scheme, double = identity.get("quantization", "none"), identity.get("double_quantization", True)
        return BaseStorage(str(scheme), bool(double), DTYPES[str(identity.get("dtype", "bf16"))])

    def make_rounding(self, source: Source) -> Callable[[str, Tensor], Tensor]:
        """Return a function (name, base tensor) -> the tensor that training used: quantized and dequantized."""
        quantized = set[str]() if self.scheme == "none" else quantizable_names(load_without_weights(source))

        def round_as_trained(name: str, weight: Tensor) -> Tensor:
            if self.scheme == "none" or not weight.is_floating_point():
                return weight
            weight = weight.to(self.dtype)
            if name not in quantized:
                return weight
            if weight.dim() == 3:
                packed = pack_experts(weight, self.scheme, double=self.double)
                return PackedExperts(packed, weight.shape, self.scheme, self.dtype).dequantize_all()
            packed_weight = quantize_weight(weight, self.scheme, double=self.double)
            return dequantize_weight(packed_weight, self.scheme, weight.shape, self.dtype)

        return round_as_trained


@dataclass(frozen=True)
class TunedModel:
    """A base, an adapter on it, and rows to compare models on."""

    name: str
    source: Source  # the base
    folder: Path | None = None  # adapter folder; None for a model without an adapter
    storage: BaseStorage = BaseStorage()  # the base is quantized and dequantized accordingly before merging
    base: str = "original"  # or "dequantized", if the adapter was trained on a quantized base
    base_losses: dict[str, float] = field(default_factory=dict)  # see Merged
    examples: list[Example] = field(default_factory=list)
    tokenizer: Any = None  # with which `examples` were encoded

    @property
    def system(self) -> str | None:
        """The system prompt of the training rows, if they all had the same one."""
        return model_identity(self.folder, self.source).get("system")

    @property
    def has_images(self) -> bool:
        """Return whether there are images in the examples."""
        encoder = image_encoder(self.tokenizer)
        return encoder is not None and len(encoder.table) > 0

    @staticmethod
    def open(name: str, kind: AdapterKind = "text") -> TunedModel:
        """Open a run folder, an adapter folder or a model. Raises InputError if it cannot be merged.

        kind: of the adapter. Raises InputError for another one.
        """
        folder = adapter_folder(name)
        source = locate(name) if folder is None else locate_base(folder)
        if quantization_method(source.config()):
            raise ModelError(f"{source.name}: has no 16-bit weights to merge into", fix="serve the adapter on its base")
        if folder is None:
            refuse_embedder(source)
            return TunedModel(name, source)
        check_adapter_kind(folder, kind)
        check_adapter_base(folder, source)
        check_adapter_weights(folder)
        storage = BaseStorage.read(folder)
        return TunedModel(name, source, folder, storage, "original" if storage.scheme == "none" else "dequantized")

    def on_original_base(self) -> TunedModel:
        return replace(self, base="original", storage=replace(self.storage, scheme="none"))

    def load_rows(self, data: str | None, *, choose_base: bool = True) -> TunedModel:
        """Load rows to compare models on, and with choose_base select the original or dequantized base by its loss."""
        tokenizer = self.load_tokenizer()
        tuned = replace(self, examples=_read_rows(self.name, tokenizer, data), tokenizer=tokenizer)
        if not choose_base or self.storage.scheme == "none":
            return tuned
        losses, rows = {}, tuned.examples[:BASE_CHOICE_ROWS]
        for candidate in (tuned.on_original_base(), tuned):
            LOG.info("measuring the adapter on the %s base: %d rows", candidate.base, len(rows))
            token_loss = step_for(candidate.load()).token_loss
            losses[candidate.base] = mean_loss(token_loss, rows, lambda block: [[row] for row in range(len(block))])
            del token_loss
            free_memory()
        tuned, best = replace(tuned, base_losses=losses), min(losses, key=lambda base: losses[base])
        return tuned.on_original_base() if best == "original" else tuned

    def load_tokenizer(self) -> Any:
        """Load the tokenizer that was used in training, with its chat template."""
        return load_tokenizer(self.source if self.folder is None else locate_tokenizer(self.folder, self.source))

    def load(self) -> Any:
        """Load the adapter on its base, with the base's weights rounded as in training and fp32 computation."""
        if self.folder is None:
            base = load_base(self.source, torch.float32, "cpu")
            install_images(base, self.tokenizer)
            return base
        storage = self.storage
        dtype = stored_dtype(self.source) if storage.scheme == "none" else storage.dtype
        base = load_base(
            self.source, dtype, "cpu", quantization=storage.scheme, double=storage.double, resident_layers=None
        )
        tuned = attach_adapter(base, self.folder, self.source, kind=adapter_kind(self.folder))[0].eval()
        tuned = compute_in_fp32(tuned)
        tuned = restore_precision(tuned, self.folder)
        install_images(tuned, self.tokenizer)
        return tuned

    def load_merger(self) -> Callable[[str, Tensor], tuple[Tensor, Tensor]]:
        """Return a function (name, base tensor) -> (merged tensor, base tensor as in training)."""
        merge_tensor = load_merger(self.source, self.folder) if self.folder is not None else lambda _, weight: weight
        round_as_trained = self.storage.make_rounding(self.source)

        def merge_rounded(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
            weight = round_as_trained(name, weight)
            return merge_tensor(name, weight), weight

        return merge_rounded


def _read_rows(name: str, tokenizer: Any, data: str | None) -> list[Example]:
    """Read the rows to compare models on: the file `data`, else the run's held-out rows, else its training rows."""
    data_kind: DataKind = "turns"
    if is_run(Path(name)):
        recipe = read_resolved(RunFolder(Path(name)).recipe).recipe
        section = recipe.data
        if data is not None:
            section = section.model_copy(update={"train": data, "eval": None})
        elif (data_kind := data_kind_of(recipe.train)) == "prompts":
            rows = prepare(section, tokenizer, cache=cache_folder() / "data", data_kind=data_kind).train_conversations
            if any(row.answer is None for row in rows):
                raise ModelError(f"{name}: its rows have no answers to measure on", fix="give --data")
            data_kind = "turns"  # compare on the reference answers
    elif data is None:
        raise ModelError(f"{name}: not a run, so it has no rows to measure on", fix="give --data, or --no-parity")
    else:
        section = DataSection(train=data)
    try:
        prepared = prepare(section, tokenizer, cache=cache_folder() / "data", data_kind=data_kind)
    except DataError as error:
        if data is None:
            hint = "these are the run's rows: give --data with other rows, or run this in the folder of the training"
            error.fix = "; ".join(part for part in (error.fix, hint) if part)
        elif "--" in error.fix:  # options that a merge does not have
            error.fix = f"give rows with answers, such as {example_row('turns')}, or leave --data out"
        raise
    examples = prepared.eval if prepared.eval is not None else prepared.train
    # Rejected and bad answers are excluded: a base with a lower loss on them is not better.
    step = 2 if data_kind == "pairs" else 1
    good = [row for row in range(0, len(examples), step) if examples.labels[row] != 0]
    return [examples[row] for row in good[:MAX_ROWS]]


def _read_texts(
    name: str, tokenizer: Any, data: str | None, data_kind: DataKind, labels: Sequence[str] | None
) -> Sequence[Item]:
    """Read the texts to compare classifiers or models of embeddings on, as `_read_rows`."""
    recipe = read_resolved(RunFolder(Path(name)).recipe).recipe if is_run(Path(name)) else None
    if recipe is None and data is None:
        raise ModelError(f"{name}: not a run, so it has no rows to measure on", fix="give --data, or --no-parity")
    section = recipe.data if recipe is not None else DataSection(train=str(data))
    if data is not None:
        section = section.model_copy(update={"train": data, "eval": None})
    prepared = prepare(section, tokenizer, cache=cache_folder() / "data", data_kind=data_kind, labels=labels)
    items = prepared.eval_items or prepared.train_items
    assert items is not None, "rows of texts are groups"
    return items[:MAX_ROWS]


def _load_merged(folder: Path, dtype: torch.dtype, tokenizer: Any) -> Any:
    source = Source(str(folder), "folder", folder)
    model: Any = load_base(source, dtype, "cpu")
    model = compute_in_fp32(model)
    install_images(model, tokenizer)
    return model


def _write_merged(
    tuned: TunedModel, folder: Path, out: Path, dtype: str, show: Callable[[str], None] = lambda text: None
) -> Path:
    """Write the merged model to a temporary folder, reusing the complete shards of an interrupted merge."""
    source = tuned.source
    merge_tensor, round_as_trained = load_merger(source, folder), tuned.storage.make_rounding(source)
    merged_folder = _partial_folder(out)
    inputs = {
        "adapter": sha256_file(folder / WEIGHTS_FILE), "base": fingerprint(source), "scheme": tuned.storage.scheme,
        "dtype": dtype,
    }  # fmt: skip
    progress_file = merged_folder / "merge.json"
    progress = read_json(progress_file)
    if progress.get("of") != inputs:
        shutil.rmtree(merged_folder, ignore_errors=True)
        merged_folder.mkdir(parents=True)
        progress = {"of": inputs, "shards": {}}  # hashes of the complete shards
    index: dict[str, str] = {}
    tensors, meta_model = CheckpointTensors(weights_folder(source)), load_without_weights(source)
    layout, is_text_weight = CheckpointLayout(meta_model, tensors), text_filter(meta_model)
    cast = dtype_caster(meta_model, DTYPES[dtype])
    kind = adapter_kind(folder)
    is_classifier = kind == "classifier"
    output_head = embedding_paths(meta_model)[1:] if kind in TEXT_KINDS else []  # which these models do not have
    shards = list(_split_into_shards(tensors, layout))
    for number, all_groups in enumerate(shards, 1):
        show(f"merging into {out}: shard {number} of {len(shards)}")
        groups = [
            group
            for group in all_groups
            if not any(name.rpartition(".")[0] in output_head for name in layout.parameters(group))
        ]
        shard_name = f"model-{number:05d}.safetensors"
        file = merged_folder / shard_name
        index |= {name: shard_name for group in groups for name in group.names}
        if progress["shards"].get(shard_name) == (sha256_file(file) if file.is_file() else ""):
            continue
        shard: dict[str, Tensor] = {}
        for group in groups:
            is_text = any(map(is_text_weight, layout.parameters(group)))
            is_changed, parts = False, {}
            for name, weight in layout.read(group, tensors.get).items():
                base = round_as_trained(name, weight) if is_text else weight
                merged = merge_tensor(name, base)
                is_changed = is_changed or merged is not base
                # some weights, such as the bias of a router, need fp32
                to = cast(name, merged).dtype if merged.is_floating_point() else DTYPES[dtype]
                parts[name] = round_weight(name, merged, base, to)
            if is_text or is_changed:
                shard |= layout.write(group, parts)
            else:  # for example a vision tower, which is copied in its original dtype
                shard |= {name: tensors.get(name) for name in group.names}
        save_file(shard, file, {"format": "pt"})
        progress["shards"][shard_name] = sha256_file(file)
        write_json(progress_file, progress)
    if is_classifier:
        score = {SCORE_WEIGHT: read_score_weight(folder).to(DTYPES[dtype])}
        save_file(score, merged_folder / SCORE_FILE, {"format": "pt"})
        index[SCORE_WEIGHT] = SCORE_FILE
    size = sum((merged_folder / name).stat().st_size for name in set(index.values()))
    write_json(merged_folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})
    _write_configs(source, folder, merged_folder, dtype)
    progress_file.unlink()
    return merged_folder


def round_weight(name: str, merged: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a merged weight. If it changed, it is rounded to 16 bit stochastically, with a seed from its name."""
    # Rounding to nearest would discard changes smaller than half a step: after light training, 83 % of the weights in
    # bf16 did not change, and the mean KL was 4.7e-3. With stochastic rounding it was 6.7e-5 (docs/log). The steps of
    # fp16 are an eighth of those of bf16, which is still too large.
    if not merged.is_floating_point():
        return merged
    if dtype not in (torch.bfloat16, torch.float16) or merged is base:
        return merged.to(dtype)
    generator = torch.Generator().manual_seed(int(sha256_text(name)[:8], 16))
    if dtype == torch.float16:
        chunks = [_round_to_fp16(chunk.float(), generator) for chunk in torch.split(merged.flatten(), ROUNDING_CHUNK)]
        return torch.cat(chunks).view(merged.shape)
    bits = merged.float().contiguous().view(torch.int32)
    dither = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=generator)
    return ((bits + dither) & -(1 << 16)).view(torch.float32).to(dtype)


def _round_to_fp16(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 values to fp16 stochastically."""
    exponent = torch.frexp(x).exponent.clamp(min=-13)  # below 2^-14, fp16 is subnormal: its step size is constant
    scale = ((11 - exponent + 127) << 23).view(torch.float32)  # 2^(11 - exponent) = 1 / step size
    steps = x * scale
    rounded = steps.floor()
    rounded += torch.rand(x.shape, generator=generator) < steps - rounded
    return (rounded / scale).half()


def _split_into_shards(tensors: CheckpointTensors, layout: CheckpointLayout) -> Iterator[list[TensorGroup]]:
    """Yield the tensor groups of each shard. The tensors of a group form one parameter of the model."""
    groups: list[TensorGroup] = []
    size = 0
    for group in layout.groups:
        group_size = sum(map(tensors.fp32_bytes, group.names))
        if groups and size + group_size > SHARD_BYTES:
            yield groups
            groups, size = [], 0
        groups.append(group)
        size += group_size
    yield groups


def _write_configs(source: Source, folder: Path, out: Path, dtype: str) -> None:
    """Write the configs, the tokenizer and the chat template for the merged model."""
    rows = trained_token_rows(read_adapter_config(folder))
    vocabulary = max((1 + row for indices in rows.values() for row in indices), default=0)
    config, tokenizer = make_config(source, DTYPES[dtype], vocabulary), load_tokenizer(locate_tokenizer(folder, source))
    kind = adapter_kind(folder)
    if kind == "classifier":
        set_classes(config, tokenizer, read_classes(folder))
    elif kind == "embedder":
        set_architecture(config, tokenizer)
        head: Any = load_without_weights(source).get_output_embeddings()  # type: ignore[operator]
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        write_modules(out, read_pooling(folder), head.weight.shape[1], positions)
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_json(out / ORIGIN_FILE, {"adapter": str(folder.resolve())})
    if kind not in TEXT_KINDS:
        identity = read_identity(folder)
        # the settings of training with which `load` and `serve` render chats, where the tokenizer does not show them
        shown = {"system": None, "reasoning": make_renderer(tokenizer, {}).reasoning}
        if chat := {key: identity[key] for key in shown if identity.get(key) not in (None, "auto", shown[key])}:
            write_json(out / STROP_FILE, chat)
        write_generation_config(source, config, make_renderer(tokenizer, identity).end_ids, out)
