"""An adapter into its base: in fp32, tensor by tensor, and then measured against the adapter on the base.

Never into quantized weights: rounding to 4 bits loses a small adapter whole (TRAPS 0, finding 3). The folder appears
when it is complete and verified; a merge that was cut short goes on from the shards that are whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from strop.exporting.parity import LIMITS, Parity, compare, freed, in_fp32
from strop.exporting.weight_changes import changes
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
from strop.models.source import Source, fingerprint, quantization_method
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

DRAWING = "generation_config.json"  # how to draw, and at which tokens answers end
# Files of a base that a merged folder has unchanged: that, and how images, videos and sounds become numbers.
AS_THEY_ARE = (DRAWING, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
MOST_ROWS = 2000  # to measure on
CHOOSING_ROWS = 64  # on which two bases are compared
AT_ONCE = 1 << 23  # numbers of a weight that are rounded to fp16 together: some 200 MB


@dataclass(frozen=True)
class Merged:
    out: Path
    files: list[str]
    base: str  # original or dequantized
    base_losses: dict[str, float]  # of the adapter on either, where both were tried
    parity: Parity | None  # None where it was not to be measured

    def as_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out), "files": self.files, "base": self.base, "base_losses": self.base_losses,
            "parity": None if self.parity is None else self.parity.as_json(),
        }  # fmt: skip


def merge(
    name: str,
    out: Path,
    *,
    dtype: str = "bf16",
    data: str | None = None,
    measure: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Merged:
    """Merges the adapter of a run or adapter folder into a new model folder of the given type.

    data: rows to measure on; default: the run's own evaluation rows, or training rows. measure: False where there is
    no memory for it; an adapter that was trained on quantized weights is then merged into those, dequantized.
    say: told what is about to be done. Raises InputError before anything is written, MemoryLimitError where the
    measurement would not fit; ParityError where the merged model is not the tuned one.
    """
    folder = adapter_folder(name)
    if folder is None:
        raise ModelError(f"{name}: no adapter there", fix="give a run or adapter folder")
    if dtype not in LIMITS:
        raise RecipeError(f"--dtype {dtype}: no such type", fix=f"choose among {', '.join(LIMITS)}")
    if out.exists():
        raise FolderError(f"{out}: already exists", fix="give --out a new folder")
    source = base_source(folder)
    if quantization_method(source.config()):
        raise ModelError(f"{source.name}: has no 16-bit weights to merge into", fix="serve the adapter on its base")
    check_adapter_kind(folder, scores=False)
    check_adapter_base(folder, source)
    check_adapter_weights(folder)
    check_measured(data, measure)
    trained = Trained.read(folder)
    base, losses = "original" if trained.scheme == "none" else "dequantized", dict[str, float]()
    if measure:
        check_memory(source, DTYPES[dtype].itemsize, say)
        examples = rows_to_measure(name, folder, source, data)
        base, losses = better_base(source, folder, trained, examples)
    if base == "original":
        trained = replace(trained, scheme="none")
    with disk_errors(out.parent), exclusive_output(out):
        say(f"merging into {out}, shard by shard")
        made, parity = _write(source, folder, out, trained, dtype), None
        if measure:
            say("measuring the merged model against the adapter on its base")
            tuned, merged = partial(tuned_model, source, folder, trained), partial(_loaded, made, DTYPES[dtype])
            parity = compare(tuned, merged, examples, LIMITS[dtype])
            if not parity.passed:
                shutil.rmtree(made)
            parity.check(str(out))
        if report := find_report(folder):
            merged_as = {"dtype": dtype, "parity": None if parity is None else parity.as_json()}
            (made / CARD_FILE).write_text(card(report, merged=merged_as), encoding="utf-8")
        publish(made, out)
    return Merged(out, sorted(file.name for file in out.iterdir()), base, losses, parity)


def check_measured(data: str | None, measure: bool) -> None:
    if data is not None and not measure:
        raise RecipeError("--data: names rows to measure on, and --no-parity measures nothing", fix="leave one out")


@dataclass(frozen=True)
class Trained:
    """How the base was stored while the adapter was trained."""

    scheme: str
    double: bool
    dtype: torch.dtype

    @staticmethod
    def read(folder: Path) -> Trained:
        identity = read_identity(folder)
        scheme, double = identity.get("quantization", "none"), identity.get("double_quantization", True)
        return Trained(str(scheme), bool(double), DTYPES[str(identity.get("dtype", "bf16"))])

    def rounding(self, source: Source) -> Callable[[str, Tensor], Tensor]:
        """Gives a base weight, by its name, as the adapter saw it: rounded to the type it was trained in, quantized."""
        quantized = set[str]() if self.scheme == "none" else quantizable_names(load_without_weights(source))

        def rounded(name: str, weight: Tensor) -> Tensor:
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

        return rounded


def check_memory(source: Source, element: int, say: Callable[[str], None]) -> None:
    """Raises MemoryLimitError where there is no memory to measure what is made, of `element` bytes a weight."""
    bare, widest = load_without_weights(source), max(stored_dtype(source).itemsize, element)
    widest = widest if reads_no_weights(bare) else 4
    parameters = sum(weight.numel() for weight in bare.parameters())
    embedding, head = bare.get_input_embeddings(), bare.get_output_embeddings()  # type: ignore[operator]
    tied = head is None or head.weight is embedding.weight
    parts = parity_model_bytes(parameters, embedding.num_embeddings, embedding.embedding_dim, tied, dtype_bytes=widest)
    needed, free = sum(parts) + PARITY_PROCESS_BYTES, probe().free_bytes
    say(f"measuring takes about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free")
    if needed > free:
        what = f"measuring takes {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
        raise MemoryLimitError(what, fix="free some memory, or leave the measurement out: --no-parity")


def rows_to_measure(name: str, folder: Path, source: Source, data: str | None) -> list[Example]:
    """Held-out rows, or training rows where there are none, or `data`; with the tokenizer of `folder`. Of pairs the
    chosen answers, of judged ones the good: where two bases are compared, a lower loss on bad answers is no gain."""
    tokenizer = load_tokenizer(tokenizer_source(folder, source))
    if data is None and not is_run(Path(name)):
        raise ModelError(f"{name}: an adapter folder has no rows to measure on", fix="give --data")
    data_kind: DataKind = "turns"
    if is_run(Path(name)):
        recipe = read_resolved(RunFolder(Path(name)).recipe).recipe
        section, data_kind = recipe.data, data_kind_of(recipe.train)
        if data_kind == "prompts" and data is None:
            rows = prepare(section, tokenizer, cache=cache_folder() / "data", data_kind=data_kind).train_conversations
            if any(row.answer is None for row in rows):
                raise ModelError(f"{name}: its rows have no answers to measure on", fix="give --data")
            data_kind = "turns"  # on the right answers
        if data is not None:
            section, data_kind = section.model_copy(update={"train": data, "eval": None}), "turns"
    else:
        section = DataSection(train=str(data))
    try:
        prepared = prepare(section, tokenizer, cache=cache_folder() / "data", data_kind=data_kind)
    except DataError as error:
        if data is None:
            more = "these are the run's own rows: give --data with others, or go to the folder where it was trained"
            error.fix = "; ".join(part for part in (error.fix, more) if part)
        raise
    held_out = prepared.eval if prepared.eval is not None else prepared.train
    step = 2 if data_kind == "pairs" else 1
    good = [row for row in range(0, len(held_out), step) if held_out.labels[row] != 0]
    return [held_out[row] for row in good[:MOST_ROWS]]


def better_base(
    source: Source, folder: Path, trained: Trained, examples: list[Example]
) -> tuple[str, dict[str, float]]:
    """Which base an adapter trained on a quantized one does better on: the dequantized, or the original. Measured."""
    if trained.scheme == "none":
        return "original", {}
    losses = {}
    for base, tried in (("original", replace(trained, scheme="none")), ("dequantized", trained)):
        model = tuned_model(source, folder, tried)
        losses[base] = mean_loss(
            step_for(model).token_loss, examples[:CHOOSING_ROWS], lambda block: [[n] for n in range(len(block))]
        )
        del model
        freed()
    return min(losses, key=lambda base: losses[base]), losses


def tuned_model(source: Source, folder: Path, trained: Trained) -> Any:
    """The adapter on its base, computing in fp32; quantized weights are rounded as they were in training."""
    dtype = stored_dtype(source) if trained.scheme == "none" else trained.dtype
    base = load_base(source, dtype, "cpu", quantization=trained.scheme, double=trained.double, resident_layers=None)
    tuned = attach_adapter(base, folder, source)[0].eval()
    return in_fp32(tuned if reads_no_weights(base) else tuned.float())


def _loaded(folder: Path, dtype: torch.dtype) -> Any:
    model = load_base(Source(str(folder), "folder", folder), dtype, "cpu")
    return in_fp32(model if reads_no_weights(model) else model.float())


def reads_no_weights(model: Any) -> bool:
    """Whether a linear layer's weight is used by that layer alone, so that it may wait in 16 bit. Not so in Mamba's
    and xLSTM's mixers, nor in routers and indexers of mixtures, whose experts, no linear layers, are in fp32 anyway."""
    mixers = any(kind in type(module).__name__ for module in model.modules() for kind in ("Mamba", "xLSTM"))
    return not mixers and next(expert_parameters(model), None) is None


def _write(source: Source, folder: Path, out: Path, trained: Trained, dtype: str) -> Path:
    """The merged folder under a name of its own; shards that an earlier try left whole are kept."""
    change, as_trained = changes(source, folder), trained.rounding(source)
    made = out.with_name(f"{out.name}.partial")
    made_of = {
        "adapter": sha256_file(folder / WEIGHTS_FILE),
        "base": fingerprint(source),
        "scheme": trained.scheme,
        "dtype": dtype,
    }
    progress = made / "merge.json"
    done = read_json(progress)
    if done.get("of") != made_of:
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        done = {"of": made_of, "shards": {}}
    index: dict[str, str] = {}
    tensors, bare = CheckpointTensors(weights_folder(source)), load_without_weights(source)
    layout, text = CheckpointLayout(bare, tensors), in_text(bare)
    for number, groups in enumerate(_shards(tensors, layout)):
        file = f"model-{number + 1:05d}.safetensors"
        index |= {name: file for group in groups for name in group.names}
        if done["shards"].get(file) == (sha256_file(made / file) if (made / file).is_file() else ""):
            continue
        shard: dict[str, Tensor] = {}
        for group in groups:
            outside, same, parts = not any(text(place) for place in layout.parameters(group)), True, {}
            for name, weight in layout.read(group, tensors.get).items():
                weight = weight if outside else as_trained(name, weight)
                changed = change(name, weight)
                same = same and changed is weight
                parts[name] = rounded(name, changed, weight, DTYPES[dtype])
            if outside and same:
                shard |= {name: tensors.get(name) for name in group.names}  # of another tower: as it is, bit by bit
            else:
                shard |= layout.write(group, parts)
        save_file(shard, made / file, {"format": "pt"})
        done["shards"][file] = sha256_file(made / file)
        write_json(progress, done)
    size = sum((made / file).stat().st_size for file in set(index.values()))
    write_json(made / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})
    _write_rest(source, folder, made, dtype)
    progress.unlink()
    return made


def rounded(name: str, merged: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    """The merged weight in its new type; a changed one in 16 bit is rounded up or down at random, in proportion.

    Rounding to nearest takes back what is smaller than half a step: of a lightly trained adapter 83 % of the weights
    came out in bf16 as they had been, mean KL 4.7e-3; this way the mean of the change is kept, mean KL 6.7e-5
    (docs/log). fp16's steps are an eighth of bf16's, and still too long. The random numbers belong to the tensor's
    name: the same merge gives the same bits.
    """
    if not merged.is_floating_point():
        return merged
    if dtype not in (torch.bfloat16, torch.float16) or merged is base:
        return merged.to(dtype)
    generator = torch.Generator().manual_seed(int(sha256_text(name)[:8], 16))
    if dtype == torch.float16:
        parts = [_in_fp16(part.float(), generator) for part in torch.split(merged.flatten(), AT_ONCE)]
        return torch.cat(parts).view(merged.shape)
    bits = merged.float().contiguous().view(torch.int32)
    dither = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=generator)
    return ((bits + dither) & -(1 << 16)).view(torch.float32).to(dtype)


def _in_fp16(x: Tensor, generator: torch.Generator) -> Tensor:
    """As `rounded` says, of fp32. Steps do not get shorter below 2^-14."""
    exponent = torch.frexp(x).exponent.clamp(min=-13)
    scale = ((11 - exponent + 127) << 23).view(torch.float32)  # 2 to the 11 - exponent: how many steps make 1
    steps = x * scale
    whole = steps.floor()
    whole += torch.rand(x.shape, generator=generator) < steps - whole
    return (whole / scale).half()


def _shards(tensors: CheckpointTensors, layout: CheckpointLayout) -> Iterator[list[TensorGroup]]:
    """What is written together: tensors that are parts of one parameter are never apart."""
    groups: list[TensorGroup] = []
    size = 0
    for group in layout.groups:
        more = sum(map(tensors.size_bytes, group.names))
        if groups and size + more > SHARD_BYTES:
            yield groups
            groups, size = [], 0
        groups.append(group)
        size += more
    yield groups


def _write_rest(source: Source, folder: Path, out: Path, dtype: str) -> None:
    """Config, generation config, tokenizer and template, as they were trained with."""
    config = load_config(source)
    rows = trained_token_rows(read_adapter_config(folder))
    text = config.get_text_config()
    text.vocab_size = max([text.vocab_size, *(1 + row for found in rows.values() for row in found)])
    config.dtype = DTYPES[dtype]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A GGUF header names none, and servers look for their model class by it.
    config.architectures = config.architectures or [type(load_without_weights(source)).__name__]
    config.save_pretrained(out)
    tokenizer = load_tokenizer(tokenizer_source(folder, source))
    tokenizer.save_pretrained(out)
    for name in AS_THEY_ARE:
        file = weights_folder(source) / name
        if file.is_file():
            shutil.copy2(file, out / name)
    _add_ends(out / DRAWING, config, make_renderer(tokenizer, read_identity(folder)).end_ids)


def _add_ends(file: Path, config: Any, ends: Sequence[int]) -> None:
    """Names the tokens at which trained answers end in a generation config, where it has others: a template of the
    user's may end turns in another way than the base does."""
    held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = held.get("eos_token_id", getattr(config.get_text_config(), "eos_token_id", None))
    known = named if isinstance(named, list) else [] if named is None else [named]
    if not set(ends) <= set(known):
        held.pop("_from_model_config", None)  # transformers would make it of config.json again
        write_json(file, {**held, "eos_token_id": list(dict.fromkeys([*ends, *known]))})
