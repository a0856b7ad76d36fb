"""Merge an adapter into its base in fp32, tensor by tensor, and compare the result with the adapter on its base.

Adapters are never merged into quantized weights: rounding to 4 bits can lose a small adapter completely (TRAPS 0,
finding 3). The folder appears when it is complete and verified; an interrupted merge resumes after its last shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from strop.config.load import read_resolved
from strop.config.schema import DataSection
from strop.data.prepare import prepare
from strop.data.types import DataKind, Example
from strop.engine.step import step_for
from strop.errors import DataError, FolderError, MemoryLimitError, ModelError, RecipeError
from strop.evaluation.compare import mean_loss
from strop.evaluation.model_card import CARD_FILE, card, find_report
from strop.exporting.adapter_weights import load_merger
from strop.exporting.parity import LIMITS, Parity, compare, compute_in_fp32, free_memory
from strop.machine.probe import probe
from strop.models.adapter_config import WEIGHTS_FILE, read_adapter_config
from strop.models.adapters import (
    adapter_folder,
    attach_adapter,
    base_source,
    check_adapter_base,
    check_adapter_kind,
    check_adapter_weights,
    make_renderer,
    read_identity,
    tokenizer_source,
)
from strop.models.experts import PackedExperts, expert_parameters, pack_experts, quantizable_names
from strop.models.introspect import in_text
from strop.models.load import DTYPES, load_base, load_config, load_without_weights, stored_dtype, weights_folder
from strop.models.quantize import dequantize_weight, quantize_weight
from strop.models.source import Source, fingerprint, locate, quantization_method
from strop.models.tensor_files import SHARD_BYTES, CheckpointLayout, CheckpointTensors, TensorGroup
from strop.models.tokenizer import load_tokenizer, trained_token_rows
from strop.objectives.table import data_kind_of
from strop.planning.memory import PARITY_PROCESS_BYTES, parity_model_bytes
from strop.runs.folder import (
    RunFolder,
    cache_folder,
    disk_errors,
    exclusive_output,
    is_run,
    publish,
    read_json,
    write_json,
)
from strop.runs.lock import sha256_file, sha256_text

GENERATION_CONFIG = "generation_config.json"  # sampling settings and the tokens that end answers
# Files that are copied from the base: that, and how images, videos and audio become tensors.
COPIED_FILES = (
    GENERATION_CONFIG, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
MAX_ROWS = 2000  # to measure on
BASE_CHOICE_ROWS = 64  # on which two bases are compared
ROUNDING_CHUNK = 1 << 23  # values of a weight that are rounded to fp16 at once: about 200 MB


@dataclass(frozen=True)
class Merged:
    """A merged model."""

    out: Path
    files: list[str]
    base: str  # that it was merged into: "original" or "dequantized"
    base_losses: dict[str, float]  # the adapter's loss on each base, if both were tried
    parity: Parity | None  # None if nothing was measured

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out), "parity": None if self.parity is None else self.parity.as_json()}


def merge(
    name: str,
    out: Path,
    *,
    dtype: str = "bf16",
    data: str | None = None,
    measure: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Merged:
    """Merge an adapter into a new model folder. See `strop.merge`; also raises MemoryLimitError before measuring."""
    folder = adapter_folder(name)
    if folder is None:
        raise ModelError(f"{name}: no adapter there", fix="give a run or adapter folder")
    if dtype not in LIMITS:
        raise RecipeError(f"--dtype {dtype}: no such type", fix=f"choose among {', '.join(LIMITS)}")
    if out.exists():
        raise FolderError(f"{out}: already exists", fix="give --out a new folder")
    tuned = TunedModel.open(name)
    check_data_option(data, measure)
    if measure:
        check_memory(tuned.source, DTYPES[dtype].itemsize, progress)
        tuned = tuned.load_rows(data)
    with disk_errors(out.parent), exclusive_output(out):
        progress(f"merging into {out}, shard by shard")
        merged_folder, parity = _write(tuned, folder, out, dtype), None
        if measure:
            progress("measuring the merged model against the adapter on its base")
            load_merged = partial(_load_merged, merged_folder, DTYPES[dtype])
            parity = compare(tuned.load, load_merged, tuned.examples, LIMITS[dtype])
            if not parity.passed:
                shutil.rmtree(merged_folder)
            parity.check(str(out))
        if report := find_report(folder):
            details = {"dtype": dtype, "parity": None if parity is None else parity.as_json()}
            (merged_folder / CARD_FILE).write_text(card(report, merged=details), encoding="utf-8")
        publish(merged_folder, out)
    return Merged(out, sorted(file.name for file in out.iterdir()), tuned.base, tuned.base_losses, parity)


def check_data_option(data: str | None, measure: bool) -> None:
    if data is not None and not measure:
        raise RecipeError("--data: names rows to measure on, but --no-parity measures nothing", fix="leave one out")


def check_memory(source: Source, element_bytes: int, progress: Callable[[str], None]) -> None:
    """Raise MemoryLimitError if there is no memory to measure a result that stores `element_bytes` per weight."""
    bare, widest = load_without_weights(source), max(stored_dtype(source).itemsize, element_bytes)
    widest = widest if linears_may_stay_16bit(bare) else 4
    parameters = sum(weight.numel() for weight in bare.parameters())
    embedding, head = bare.get_input_embeddings(), bare.get_output_embeddings()  # type: ignore[operator]
    tied = head is None or head.weight is embedding.weight
    parts = parity_model_bytes(parameters, embedding.num_embeddings, embedding.embedding_dim, tied, dtype_bytes=widest)
    needed, free = sum(parts) + PARITY_PROCESS_BYTES, probe().free_bytes
    figures = f"{needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
    progress(f"measuring takes about {figures}")
    if needed > free:
        raise MemoryLimitError(
            f"measuring takes {figures}", fix="free some memory, or leave the measurement out: --no-parity"
        )


@dataclass(frozen=True)
class BaseStorage:
    """Storage of the base's weights during the training of the adapter."""

    scheme: str = "none"
    double: bool = True
    dtype: torch.dtype = torch.float32

    @staticmethod
    def read(folder: Path) -> BaseStorage:
        identity = read_identity(folder)
        scheme, double = identity.get("quantization", "none"), identity.get("double_quantization", True)
        return BaseStorage(str(scheme), bool(double), DTYPES[str(identity.get("dtype", "bf16"))])

    def make_rounding(self, source: Source) -> Callable[[str, Tensor], Tensor]:
        """Return a function (name, base tensor) -> the tensor as in training: cast, quantized and dequantized."""
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
            return dequantize_weight(
                quantize_weight(weight, self.scheme, double=self.double), self.scheme, weight.shape, self.dtype
            )

        return round_as_trained


@dataclass(frozen=True)
class TunedModel:
    """A base, an adapter on it, and rows to measure on."""

    name: str
    source: Source
    folder: Path | None = None  # of the adapter; None for a model without one
    storage: BaseStorage = BaseStorage()  # how the base is rounded before merging
    base: str = "original"  # or "dequantized", if the adapter was trained on a quantized base
    base_losses: dict[str, float] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    @staticmethod
    def open(name: str) -> TunedModel:
        """Open a run folder, an adapter folder or a model. Raises InputError if it cannot be merged."""
        folder = adapter_folder(name)
        source = locate(name) if folder is None else base_source(folder)
        if quantization_method(source.config()):
            raise ModelError(f"{source.name}: has no 16-bit weights to merge into", fix="serve the adapter on its base")
        if folder is None:
            return TunedModel(name, source)
        check_adapter_kind(folder, scores=False)
        check_adapter_base(folder, source)
        check_adapter_weights(folder)
        storage = BaseStorage.read(folder)
        return TunedModel(name, source, folder, storage, "original" if storage.scheme == "none" else "dequantized")

    def on_original_base(self) -> TunedModel:
        return replace(self, base="original", storage=replace(self.storage, scheme="none"))

    def load_rows(self, data: str | None, *, choose_base: bool = True) -> TunedModel:
        """Return the model with rows to measure on and, after training on a quantized base, on the better base."""
        tuned = replace(self, examples=_read_rows(self.name, self.load_tokenizer(), data))
        if not choose_base or self.storage.scheme == "none":
            return tuned
        losses, rows = {}, tuned.examples[:BASE_CHOICE_ROWS]
        for candidate in (tuned.on_original_base(), tuned):
            model = candidate.load()
            losses[candidate.base] = mean_loss(
                step_for(model).token_loss, rows, lambda block: [[row] for row in range(len(block))]
            )
            del model
            free_memory()
        tuned = replace(tuned, base_losses=losses)
        return tuned.on_original_base() if min(losses, key=lambda base: losses[base]) == "original" else tuned

    def load_tokenizer(self) -> Any:
        """Load the tokenizer of training, with its chat template."""
        return load_tokenizer(self.source if self.folder is None else tokenizer_source(self.folder, self.source))

    def load(self) -> Any:
        """Load the adapter on its base, computing in fp32, with the base's weights rounded as in training."""
        if self.folder is None:
            return load_base(self.source, torch.float32, "cpu")
        storage = self.storage
        dtype = stored_dtype(self.source) if storage.scheme == "none" else storage.dtype
        base = load_base(
            self.source, dtype, "cpu", quantization=storage.scheme, double=storage.double, resident_layers=None
        )
        tuned = attach_adapter(base, self.folder, self.source)[0].eval()
        return compute_in_fp32(tuned if linears_may_stay_16bit(base) else tuned.float())

    def load_merger(self) -> Callable[[str, Tensor], tuple[Tensor, Tensor]]:
        """Return a function (name, base tensor) -> (merged tensor, base tensor as in training)."""
        merge_tensor = load_merger(self.source, self.folder) if self.folder is not None else lambda _, weight: weight
        round_as_trained = self.storage.make_rounding(self.source)

        def merge_rounded(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
            weight = round_as_trained(name, weight)
            return merge_tensor(name, weight), weight

        return merge_rounded


def _read_rows(name: str, tokenizer: Any, data: str | None) -> list[Example]:
    """Read rows to measure on: the file `data`, else the run's held-out rows, else its training rows."""
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
            data_kind = "turns"  # on the reference answers
    elif data is None:
        raise ModelError(f"{name}: an adapter folder has no rows to measure on", fix="give --data")
    else:
        section = DataSection(train=data)
    try:
        prepared = prepare(section, tokenizer, cache=cache_folder() / "data", data_kind=data_kind)
    except DataError as error:
        if data is None:
            hint = "these are the run's rows: give --data with other rows, or run this in the folder of the training"
            error.fix = "; ".join(part for part in (error.fix, hint) if part)
        raise
    examples = prepared.eval if prepared.eval is not None else prepared.train
    # Chosen and good answers only: when two bases are compared, a lower loss on bad answers is no improvement.
    step = 2 if data_kind == "pairs" else 1
    good = [row for row in range(0, len(examples), step) if examples.labels[row] != 0]
    return [examples[row] for row in good[:MAX_ROWS]]


def _load_merged(folder: Path, dtype: torch.dtype) -> Any:
    model = load_base(Source(str(folder), "folder", folder), dtype, "cpu")
    return compute_in_fp32(model if linears_may_stay_16bit(model) else model.float())


def linears_may_stay_16bit(model: Any) -> bool:
    """Return whether only their layers use linear weights: mixers, routers and indexers use weights directly."""
    mixers = any(kind in type(module).__name__ for module in model.modules() for kind in ("Mamba", "xLSTM"))
    return not mixers and next(expert_parameters(model), None) is None


def _write(tuned: TunedModel, folder: Path, out: Path, dtype: str) -> Path:
    """Write the merged folder under a temporary name. Complete shards of an interrupted merge are reused."""
    source = tuned.source
    merge_tensor, round_as_trained = load_merger(source, folder), tuned.storage.make_rounding(source)
    merged_folder = out.with_name(f"{out.name}.partial")
    inputs = {
        "adapter": sha256_file(folder / WEIGHTS_FILE), "base": fingerprint(source), "scheme": tuned.storage.scheme,
        "dtype": dtype,
    }  # fmt: skip
    progress_file = merged_folder / "merge.json"
    done = read_json(progress_file)
    if done.get("of") != inputs:
        shutil.rmtree(merged_folder, ignore_errors=True)
        merged_folder.mkdir(parents=True)
        done = {"of": inputs, "shards": {}}
    index: dict[str, str] = {}
    tensors, bare = CheckpointTensors(weights_folder(source)), load_without_weights(source)
    layout, in_language_model = CheckpointLayout(bare, tensors), in_text(bare)
    for number, groups in enumerate(_shards(tensors, layout), 1):
        shard_name = f"model-{number:05d}.safetensors"
        file = merged_folder / shard_name
        index |= {name: shard_name for group in groups for name in group.names}
        if done["shards"].get(shard_name) == (sha256_file(file) if file.is_file() else ""):
            continue
        shard: dict[str, Tensor] = {}
        for group in groups:
            outside = not any(in_language_model(place) for place in layout.parameters(group))
            unchanged, parts = True, {}
            for name, weight in layout.read(group, tensors.get).items():
                base = weight if outside else round_as_trained(name, weight)
                merged = merge_tensor(name, base)
                unchanged = unchanged and merged is base
                parts[name] = round_weight(name, merged, base, DTYPES[dtype])
            if outside and unchanged:  # for example a vision tower: copied bit by bit
                shard |= {name: tensors.get(name) for name in group.names}
            else:
                shard |= layout.write(group, parts)
        save_file(shard, file, {"format": "pt"})
        done["shards"][shard_name] = sha256_file(file)
        write_json(progress_file, done)
    size = sum((merged_folder / name).stat().st_size for name in set(index.values()))
    write_json(merged_folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})
    _write_configs(source, folder, merged_folder, dtype)
    progress_file.unlink()
    return merged_folder


def round_weight(name: str, merged: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a merged weight. A changed one in 16 bit is rounded stochastically, seeded by its name."""
    # Rounding to nearest discards changes below half a step: of a lightly trained adapter 83 % of the weights in bf16
    # were as before, with a mean KL of 4.7e-3. Stochastic rounding keeps the mean of the change: mean KL 6.7e-5
    # (docs/log). fp16's steps are an eighth of bf16's, and still too large.
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
    """Round fp32 stochastically to fp16, whose steps stop shrinking below 2^-14."""
    exponent = torch.frexp(x).exponent.clamp(min=-13)
    scale = ((11 - exponent + 127) << 23).view(torch.float32)  # 2^(11 - exponent), the number of steps in 1
    steps = x * scale
    whole = steps.floor()
    whole += torch.rand(x.shape, generator=generator) < steps - whole
    return (whole / scale).half()


def _shards(tensors: CheckpointTensors, layout: CheckpointLayout) -> Iterator[list[TensorGroup]]:
    """Yield the groups of each shard. Tensors that form one parameter stay together."""
    groups: list[TensorGroup] = []
    size = 0
    for group in layout.groups:
        group_size = sum(map(tensors.size_bytes, group.names))
        if groups and size + group_size > SHARD_BYTES:
            yield groups
            groups, size = [], 0
        groups.append(group)
        size += group_size
    yield groups


def _write_configs(source: Source, folder: Path, out: Path, dtype: str) -> None:
    """Write config, generation config, tokenizer and chat template as in training."""
    config = load_config(source)
    rows = trained_token_rows(read_adapter_config(folder))
    text = config.get_text_config()
    text.vocab_size = max([text.vocab_size, *(1 + row for indices in rows.values() for row in indices)])
    config.dtype = DTYPES[dtype]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Servers choose the model class by this name, which a GGUF header does not have.
    config.architectures = config.architectures or [type(load_without_weights(source)).__name__]
    config.save_pretrained(out)
    tokenizer = load_tokenizer(tokenizer_source(folder, source))
    tokenizer.save_pretrained(out)
    for name in COPIED_FILES:
        if (file := weights_folder(source) / name).is_file():
            shutil.copy2(file, out / name)
    _add_end_tokens(out / GENERATION_CONFIG, config, make_renderer(tokenizer, read_identity(folder)).end_ids)


def _add_end_tokens(file: Path, config: Any, end_ids: Sequence[int]) -> None:
    """Add the tokens that end trained answers to a generation config: a custom template may end turns differently."""
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    eos = settings.get("eos_token_id", getattr(config.get_text_config(), "eos_token_id", None))
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not set(end_ids) <= set(eos_ids):
        settings.pop("_from_model_config", None)  # else transformers would derive the file from config.json again
        write_json(file, {**settings, "eos_token_id": list(dict.fromkeys([*end_ids, *eos_ids]))})
