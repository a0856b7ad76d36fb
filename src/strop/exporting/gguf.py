"""`strop export gguf`: the tuned model as one GGUF file, or its adapter as one, proved in real llama.cpp.

Tensor by tensor, so that a model never lies in memory whole. A quantized type is made and checked in two steps: first
in f16, where the limit is tight enough to tell whether the adapter is in it at all, then in its own type.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import torch
from gguf import GGMLQuantizationType as Stored
from torch import Tensor

from strop.data.rendering.render import Renderer
from strop.errors import FolderError, ModelError, ParityError, RecipeError
from strop.exporting import llama_cpp
from strop.exporting.gguf_tokenizer import Vocabulary, vocabulary
from strop.exporting.merge import check_measured, check_memory, rounded
from strop.exporting.tuned import Tuned
from strop.exporting.verify_gguf import LIMITS, Findings, checking
from strop.exporting.weight_changes import beyond_lora, module_scales, names_in, read_weights
from strop.models.families.gguf import GgufLayout
from strop.models.load import load_config, weights_folder
from strop.models.tensor_files import CheckpointTensors
from strop.models.tokenizer import load_tokenizer
from strop.runs.folder import disk_errors, exclusive_output, fsync_folder

OWN_TYPES = {
    "f32": (Stored.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Stored.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Stored.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Stored.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
UNMEASURED = f"not measured: llama.cpp is not installed ({llama_cpp.INSTALL})"
UNASKED = "not measured: --no-parity"
Check = Callable[[Path, str, "Path | None"], Findings]
Checks = AbstractContextManager["Check | None"]


@dataclass(frozen=True)
class Exported:
    """found: what llama.cpp made of the file; None where it was not asked: then unmeasured says why.

    notes: what the user should know.
    """

    out: Path
    files: list[str]
    kind: str
    base: str
    base_losses: dict[str, float]
    found: Findings | None
    unmeasured: str | None
    vocabulary: Vocabulary
    renderer: Renderer
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        parity = self.found.parity if self.found is not None else None
        return {
            "out": str(self.out), "files": self.files, "type": self.kind, "base": self.base,
            "base_losses": self.base_losses, "parity": parity.as_json() if parity else None,
            "not_measured": self.unmeasured,
            "text": self.found.as_json() if self.found else None, "notes": self.notes,
        }  # fmt: skip


def export_gguf(
    name: str,
    out: Path,
    *,
    kind: str | None = None,
    adapter: bool = False,
    data: str | None = None,
    measure: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Writes the tuned model of a run or adapter folder (or a plain model) as a GGUF file.

    kind: a type, by default q8_0. adapter: the LoRA adapter alone, in f32, for llama.cpp's --lora beside a base in
    GGUF. data: rows to measure on; default: the run's own. measure: False where there is no memory for it. say: told
    what is about to be done. Raises InputError before anything is written, MemoryLimitError where the measurement would
    not fit, ParityError where llama.cpp makes another model of it.
    """
    if adapter and kind not in (None, "f32"):
        raise RecipeError(f"--type {kind} --adapter: an adapter is stored in f32", fix="leave --type out")
    kind = kind or ("f32" if adapter else "q8_0")
    if kind not in LIMITS:
        raise RecipeError(f"--type {kind}: no such type", fix=f"choose among {', '.join(LIMITS)}")
    if kind not in OWN_TYPES and not llama_cpp.is_installed():
        raise RecipeError(f"--type {kind}: made by llama.cpp's own quantizer", fix=f"{llama_cpp.INSTALL}, or q8_0")
    if out.exists():
        raise FolderError(f"{out}: already exists", fix="give --out a new file")
    check_measured(data, measure)
    unmeasured = UNASKED if not measure else None if llama_cpp.is_installed() else UNMEASURED
    if unmeasured is None or kind not in OWN_TYPES:
        llama_cpp.check_loads()
    tuned = Tuned.read(name, data, base="original" if adapter else None, measure=measure)
    config = load_config(tuned.source)
    layout, renderer = GgufLayout(config), Renderer(tuned.tokenizer)
    words = vocabulary(tuned.source, renderer, config.vocab_size)
    if adapter:
        _check_adapter(tuned, renderer)
    if tuned.folder is not None:
        _check_places(tuned.folder, layout, CheckpointTensors(weights_folder(tuned.source)))
    if unmeasured is None:
        check_memory(tuned.source, 4 if kind == "f32" and not adapter else 2, say)
    with disk_errors(out.parent), exclusive_output(out), ExitStack() as stack:
        model = _Model(tuned, layout, words, Path(name).name, stack)
        say(f"writing {out}")
        checks: Checks = nullcontext()
        if unmeasured is None:
            checks = checking(tuned, renderer, _words_of_base(tuned) if adapter else words)
        made, found = _make_adapter(model, out, checks) if adapter else _make_model(model, out, kind, checks)
        with made.open("rb") as handle:
            os.fsync(handle.fileno())
        made.replace(out)
        fsync_folder(out.parent)
    notes = [*layout.notes, *words.notes]
    if adapter and tuned.source.kind != "gguf":
        notes.append(
            f"llama.cpp wants its base as GGUF too: strop export gguf {tuned.source.name} --type f16 --data ..."
        )
    if found is not None and found.strings_differ:
        number = len(found.strings_differ)
        notes.append(f"{number} of 200 strings are cut otherwise in llama.cpp; no row and no prompt of the run is")
    return Exported(out, [out.name], kind, tuned.base, tuned.base_losses, found, unmeasured, words, renderer, notes)


def _make_model(model: _Model, out: Path, kind: str, checks: Checks) -> tuple[Path, Findings | None]:
    made, own = model.temporary(out, kind), kind in OWN_TYPES
    with checks as check:
        if kind in ("f32", "f16", "bf16") or (own and check is None):
            model.write(made, kind)
        else:
            plain = model.temporary(out, "f16")
            model.write(plain, "f16")
            if check is not None:
                check(plain, "f16", None)
            if own:
                model.write(made, kind)
            else:
                llama_cpp.quantize(plain, made, kind)
        return made, None if check is None else check(made, kind, None)


def _make_adapter(model: _Model, out: Path, checks: Checks) -> tuple[Path, Findings | None]:
    """The adapter, checked on the GGUF that the base came from, or else on the base in f16."""
    made = model.temporary(out, "lora")
    model.write_adapter(made)
    with checks as check:
        if check is None:
            return made, None
        base, limit = model.tuned.source.path, "q8_0"  # llama.cpp rounds activations to 8 bits for quantized weights
        if model.tuned.source.kind != "gguf":
            base, limit = model.temporary(out, "base"), "f16"
            model.write(base, "f16", base=True)
        return made, check(base, limit, made)


def _words_of_base(tuned: Tuned) -> Vocabulary:
    """The base's own: what a user's GGUF of it has, which an adapter file changes nothing of."""
    renderer = Renderer(load_tokenizer(tuned.source))
    return vocabulary(tuned.source, renderer, load_config(tuned.source).vocab_size)


def _check_adapter(tuned: Tuned, renderer: Renderer) -> None:
    """Raises ModelError for an adapter that is more than plain LoRA matrices on the base as it is in GGUF."""
    if tuned.folder is None:
        raise ModelError("--adapter: no adapter there", fix="give a run or adapter folder")
    if odd := beyond_lora(tuned.folder):
        raise ModelError(f"--adapter: a LoRA GGUF has no place for {min(odd)}", fix="leave --adapter out: merge it")
    if Renderer(load_tokenizer(tuned.source)).template_hash != renderer.template_hash:
        what = "--adapter: trained with another chat template than its base's, and a LoRA GGUF brings none"
        raise ModelError(what, fix="leave --adapter out: merge it")


def _check_places(folder: Path, layout: GgufLayout, tensors: CheckpointTensors) -> None:
    """Raises ModelError for what is trained of a weight that is in no file of its own: a head that is tied to the
    embedding."""
    for key in names_in(folder):
        module, lora, _ = key.partition(".lora_")
        weight = f"{module}.weight" if lora else key
        if weight not in tensors or layout.name(weight) is None:
            trained = weight.removesuffix(".weight")
            what = f"{folder}: trains {trained}, which has no weight of its own in GGUF (it is tied to another)"
            raise ModelError(what, fix="serve the adapter on its base, or train without that module")


class _Model:
    """What is written: the tuned model's tensors and settings, under llama.cpp's names."""

    def __init__(self, tuned: Tuned, layout: GgufLayout, words: Vocabulary, name: str, stack: ExitStack) -> None:
        self.tuned, self.layout, self.words = tuned, layout, words
        self._name = name if layout.arch != "phi3" or "phi-3" in name.lower() else f"phi-3 {name}"  # llama.cpp looks
        self._stack = stack
        self._tensors = CheckpointTensors(weights_folder(tuned.source))
        self._merged: Callable[[str, Tensor], tuple[Tensor, Tensor]] = tuned.merging()

    def temporary(self, out: Path, what: str) -> Path:
        """A file beside `out` that is gone when the export ends, however it ends."""
        file = out.with_name(f".{out.name}.{what}.partial")
        self._stack.callback(file.unlink, missing_ok=True)
        return file

    def write(self, file: Path, kind: str, *, base: bool = False) -> None:
        """The whole model in one of OWN_TYPES. base: without the adapter, and with the base's own vocabulary."""
        wanted, file_type = OWN_TYPES[kind]
        writer = gguf.GGUFWriter(file, self.layout.arch)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self._name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.layout.write_metadata(writer)
        (_words_of_base(self.tuned) if base else self.words).write(writer)
        extra = dict(self.layout.extra_tensors())
        plan: list[tuple[str, str | None, Stored]] = []
        for name, weight in extra.items():
            _announce(writer, name, list(weight.shape), Stored.F32)
            plan.append((name, None, Stored.F32))
        for source in sorted(self._tensors, key=_in_order):
            name_there = self.layout.name(source)
            if name_there is not None:
                shape = self._tensors.shape(source)
                stored = _stored(name_there, shape, wanted)
                _announce(writer, name_there, shape, stored)
                plan.append((name_there, source, stored))
        _open(writer)
        for name, tensor, stored in plan:
            writer.write_tensor_data(
                extra[name].numpy() if tensor is None else self._data(tensor, stored, merged=not base)
            )
        writer.close()

    def _data(self, source: str, stored: Stored, *, merged: bool) -> np.ndarray[Any, Any]:
        base = self._tensors.get(source)
        made, base = self._merged(source, base) if merged else (base, base)
        if stored == Stored.BF16:
            made = rounded(source, made, base, torch.bfloat16)
            return self.layout.convert(source, made).contiguous().view(torch.int16).numpy()
        if stored == Stored.F16:
            half = self.layout.convert(source, rounded(source, made, base, torch.float16)).contiguous()
            if not torch.isfinite(half).all():
                raise ParityError(f"{source}: too large for f16", fix="choose --type bf16 or f32")
            return half.numpy()
        made = self.layout.convert(source, made).float().contiguous()
        data: np.ndarray[Any, Any] = gguf.quants.quantize(made.numpy(), stored)
        return data

    def write_adapter(self, file: Path) -> None:
        """The LoRA matrices in f32. llama.cpp scales them by alpha / rank; another scale goes into B."""
        folder = self.tuned.folder
        assert folder is not None
        saved, settings = read_weights(folder), peft.LoraConfig.from_pretrained(str(folder))
        scale, alpha = module_scales(self.tuned.source, folder), float(settings.lora_alpha)
        writer = gguf.GGUFWriter(file, self.layout.arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(self._name)
        for module in sorted(scale, key=_in_order):
            name = self.layout.name(f"{module}.weight")
            a, b = (saved[f"{module}.lora_{side}.weight"].float() for side in "AB")
            b = self.layout.convert(f"{module}.weight", b * (scale[module] * len(a) / alpha)).contiguous()
            writer.add_tensor(f"{name}.lora_a", a.numpy())
            writer.add_tensor(f"{name}.lora_b", b.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _stored(name: str, shape: list[int], wanted: Stored) -> Stored:
    """Norms and biases stay in f32, as llama.cpp's kernels want them; rows that do not fill q8_0's blocks go to f16."""
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return Stored.F32
    fits = shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if fits else Stored.F16


def _announce(writer: gguf.GGUFWriter, name: str, shape: list[int], stored: Stored) -> None:
    block, size = gguf.GGML_QUANT_SIZES[stored]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, stored)


def _open(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """Layers by number."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"\.", name)]
