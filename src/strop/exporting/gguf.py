"""Implement `strop export gguf`: write a tuned model or its adapter as a GGUF file, and check it in llama.cpp.

Tensors are written one by one, so the whole model is never in memory. A file of a quantized type is first written and
checked in f16, because only the limit for f16 is tight enough to detect a missing adapter.
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
from gguf import GGMLQuantizationType as TensorType
from rich.console import Console
from rich.markup import escape

from strop.data.rendering.image_encoder import image_encoder
from strop.data.rendering.render import Renderer
from strop.display.tables import Printed, print_notes
from strop.errors import ModelError, ParityError, RecipeError, suggest
from strop.exporting import llama_cpp
from strop.exporting.adapter_weights import find_non_lora, read_names, read_scales, read_weights
from strop.exporting.gguf_tokenizer import Vocabulary, build_vocabulary
from strop.exporting.llama_cpp import LIMITS, SAMPLE_STRINGS, FileCheck, open_checker
from strop.exporting.merge import TunedModel, check_data_option, check_memory, round_weight
from strop.exporting.tables import print_base_losses, print_parity
from strop.models.adapter_config import read_adapter_config, refuse_on_16_bit_base
from strop.models.families.gguf import GgufLayout
from strop.models.load import load_config, weights_folder
from strop.models.tensor_files import CheckpointTensors
from strop.models.tokenizer import load_tokenizer, trained_token_rows
from strop.runs.folder import check_new_output, disk_errors, exclusive_output, fsync_folder

# The types that strop writes itself. The others need llama.cpp's quantizer.
FILE_TYPES = {
    "f32": (TensorType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (TensorType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (TensorType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (TensorType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
NOT_INSTALLED = f"not measured: llama.cpp is not installed ({llama_cpp.INSTALL})"
DISABLED = "not measured, as asked"
Checker = Callable[[Path, str, "Path | None"], FileCheck]  # (file, type, adapter file) -> result
CheckerContext = AbstractContextManager["Checker | None"]


@dataclass(frozen=True, repr=False)
class Exported(Printed):
    """An exported GGUF file.

    Attributes:
        out: the file.
        files: names of all files that were written.
        kind: type of the weights, such as q8_0.
        base: the base the adapter was merged into, "original" or "dequantized".
        base_losses: loss of the adapter on each base, if both were compared.
        check: result of the comparison in llama.cpp, or None.
        unmeasured: the reason if there was no comparison.
        vocabulary: the tokenizer in the file.
        notes: what to know about the file.
    """

    out: Path
    files: list[str]
    kind: str
    base: str
    base_losses: dict[str, float]
    check: FileCheck | None
    unmeasured: str | None
    vocabulary: Vocabulary
    notes: list[str]

    def _print(self, out: Console) -> None:
        print_exported(self, out)

    def __repr__(self) -> str:
        return f"Exported({str(self.out)!r}, kind={self.kind!r})"

    def as_json(self) -> dict[str, Any]:
        parity = self.check.parity if self.check is not None else None
        return {
            "out": str(self.out), "files": self.files, "type": self.kind, "base": self.base,
            "base_losses": self.base_losses, "parity": parity.as_json() if parity else None,
            "not_measured": self.unmeasured,
            "text": self.check.as_json() if self.check else None, "notes": self.notes,
        }  # fmt: skip


def print_exported(exported: Exported, out: Console) -> None:
    print_checks(exported, out)
    print_notes(exported.notes, out)
    out.print(f"[bold]exported[/] {escape(str(exported.out))}")


def print_checks(exported: Exported, out: Console) -> None:
    print_base_losses(exported.base_losses, exported.base, out)
    check = exported.check
    if check is None or check.parity is None:
        out.print(f"[bold]parity[/]   {escape(str(exported.unmeasured))}", style="yellow")
        return
    print_parity(check.parity, out)
    out.print(
        f"[bold]text[/]     {check.strings} of 200 strings tokenized identically, {check.conversations} prompts equal; "
        f"{check.answers_equal} of {check.answers} greedy answers equal, {check.answers_stopped} with a stop token"
    )


def export_gguf(
    name: str,
    out: Path,
    *,
    kind: str | None = None,
    adapter: bool = False,
    data: str | None = None,
    measure: bool = True,
    has_modelfile: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write a tuned model or its adapter as a GGUF file; see `strop.export`. May raise MemoryLimitError.

    has_modelfile: a Modelfile next to it has the system prompt.
    """
    kind = kind and kind.lower()  # llama.cpp and Ollama write Q4_K_M
    if adapter and kind not in (None, "f32"):
        raise RecipeError(f"--type {kind} --adapter: an adapter is stored in f32", fix="leave --type out")
    kind = kind or ("f32" if adapter else "q8_0")
    if kind not in LIMITS:
        start = next((name for name in LIMITS if name.startswith(kind)), None)
        near = f" (did you mean {start}?)" if start else suggest(kind, LIMITS)
        raise RecipeError(f"--type {kind}: no such type{near}", fix=f"choose among {', '.join(LIMITS)}")
    if kind not in FILE_TYPES and not llama_cpp.is_installed():
        raise RecipeError(f"--type {kind}: needs llama.cpp's quantizer", fix=f"{llama_cpp.INSTALL}, or q8_0")
    check_new_output(out, ".gguf")
    check_data_option(data, measure)
    unmeasured = DISABLED if not measure else None if llama_cpp.is_installed() else NOT_INSTALLED
    if unmeasured is None or kind not in FILE_TYPES:
        llama_cpp.check_import()
    tuned = TunedModel.open(name)
    if tuned.folder is not None and trained_token_rows(read_adapter_config(tuned.folder)):
        what = f"{name}: trains rows of the embedding (new tokens)"
        raise ModelError(what, fix="run `strop merge` on it, and export the merged folder")
    chooses_base = not adapter and tuned.storage.scheme != "none"
    # rows of a model for images tell whether it was trained on some
    if measure and (chooses_base or unmeasured is None or image_encoder(tuned.load_tokenizer()) is not None):
        tuned = tuned.load_rows(data, choose_base=chooses_base)
    if tuned.has_images:
        what = (
            f"{name}: was trained on images, and llama.cpp needs a second file for them (mmproj), which is not written"
        )
        raise ModelError(what, fix="run `strop merge`, and llama.cpp's convert_hf_to_gguf.py with --mmproj")
    tuned = tuned.on_original_base() if adapter else tuned
    config = load_config(tuned.source)
    layout, renderer = GgufLayout(config), Renderer(tuned.load_tokenizer())
    vocabulary = build_vocabulary(tuned.source, renderer, config.vocab_size)
    if adapter:
        _check_adapter(tuned, renderer)
    if tuned.folder is not None:
        _check_trained_weights(tuned.folder, layout, CheckpointTensors(weights_folder(tuned.source)))
    if unmeasured is None:
        check_memory(tuned.source, 4 if kind == "f32" and not adapter else 2, progress)
    with disk_errors(out.parent), exclusive_output(out), ExitStack() as stack:
        writer = _ModelWriter(tuned, layout, vocabulary, Path(name).name, stack)
        progress(f"writing {out}")
        checker: CheckerContext = nullcontext()
        if unmeasured is None:
            checker = open_checker(tuned, renderer, _build_base_vocabulary(tuned) if adapter else vocabulary)
        file, check = _export_adapter(writer, out, checker) if adapter else _export_model(writer, out, kind, checker)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        file.replace(out)
        fsync_folder(out.parent)
    notes = [*layout.notes, *vocabulary.notes]
    if tuned.system is not None and not has_modelfile:
        what = "the system prompt of the training rows is not in the file, so send it in chats"
        notes.append(f"{what}: {tuned.system!r:.200}")
    if adapter and tuned.source.kind != "gguf":
        command = f"strop export gguf {tuned.source.name} --type f16 --data ..."
        notes.append(f"llama.cpp needs the base in GGUF too: {command}")
    if check is not None and check.strings_differ:
        count = f"{len(check.strings_differ)} of {len(SAMPLE_STRINGS)} test strings"
        notes.append(f"llama.cpp tokenizes {count} differently, but no row and no prompt of the run")
    return Exported(out, [out.name], kind, tuned.base, tuned.base_losses, check, unmeasured, vocabulary, notes)


def _export_model(writer: _ModelWriter, out: Path, kind: str, checker: CheckerContext) -> tuple[Path, FileCheck | None]:
    file = writer.temporary_file(out, kind)
    with checker as check:
        if kind in ("f32", "f16", "bf16") or (kind in FILE_TYPES and check is None):
            writer.write_model(file, kind)
        else:
            f16_file = writer.temporary_file(out, "f16")
            writer.write_model(f16_file, "f16")
            if check is not None:
                check(f16_file, "f16", None)
            if kind in FILE_TYPES:
                writer.write_model(file, kind)
            else:
                llama_cpp.quantize(f16_file, file, kind)
        return file, None if check is None else check(file, kind, None)


def _export_adapter(writer: _ModelWriter, out: Path, checker: CheckerContext) -> tuple[Path, FileCheck | None]:
    """Write an adapter, and check it on its base: the GGUF file that it was trained on, or a temporary f16 file."""
    file = writer.temporary_file(out, "lora")
    writer.write_adapter(file)
    with checker as check:
        if check is None:
            return file, None
        if writer.tuned.source.kind == "gguf":  # llama.cpp multiplies quantized weights by activations in 8 bits
            return file, check(writer.tuned.source.path, "q8_0", file)
        base = writer.temporary_file(out, "base")
        writer.write_model(base, "f16", base_only=True)
        return file, check(base, "f16", file)


def _build_base_vocabulary(tuned: TunedModel) -> Vocabulary:
    """Return the vocabulary of the base without the adapter's changes."""
    renderer = Renderer(load_tokenizer(tuned.source))
    return build_vocabulary(tuned.source, renderer, load_config(tuned.source).vocab_size)


def _check_adapter(tuned: TunedModel, renderer: Renderer) -> None:
    """Raise ModelError if the adapter has more than LoRA matrices, or another chat template than its base."""
    if tuned.folder is None:
        raise ModelError("--adapter: no adapter there", fix="give a run or adapter folder")
    refuse_on_16_bit_base(tuned.folder, "a GGUF file")
    if names := find_non_lora(tuned.folder):
        raise ModelError(f"--adapter: a LoRA GGUF cannot hold {min(names)}", fix="leave --adapter out: merge it")
    if Renderer(load_tokenizer(tuned.source)).template_hash != renderer.template_hash:
        what = "--adapter: trained with another chat template than its base's, which a LoRA GGUF cannot hold"
        raise ModelError(what, fix="leave --adapter out: merge it")


def _check_trained_weights(folder: Path, layout: GgufLayout, tensors: CheckpointTensors) -> None:
    """Raise ModelError if the adapter changes a weight that a GGUF file does not have, such as a tied output head."""
    for key in read_names(folder):
        module, is_lora, _ = key.partition(".lora_")
        weight = f"{module}.weight" if is_lora else key
        if weight not in tensors or layout.name(weight) is None:
            module = weight.removesuffix(".weight")
            what = f"{folder}: trains {module}, which GGUF does not store (it is tied to another)"
            raise ModelError(what, fix="serve the adapter on its base, or train without that module")


class _ModelWriter:
    """Write the tuned model's tensors and metadata under llama.cpp's names."""

    def __init__(
        self, tuned: TunedModel, layout: GgufLayout, vocabulary: Vocabulary, name: str, stack: ExitStack
    ) -> None:
        self.tuned, self.layout, self.vocabulary = tuned, layout, vocabulary
        self._name = name
        if layout.arch == "phi3":
            # By a name with phi-3, llama.cpp recognizes the tokenizer of Phi 3, and looks for its tokens.
            if "</s>" not in vocabulary.entries["tokenizer.ggml.tokens"][0]:
                self._name = re.sub("(?i)phi-?3", "phi 3", name)
            elif "phi-3" not in name.lower():
                self._name = f"phi-3 {name}"
        self._stack = stack
        self._tensors = CheckpointTensors(weights_folder(tuned.source))
        self._merge = tuned.load_merger()

    def temporary_file(self, out: Path, suffix: str) -> Path:
        """Return the path of a file next to `out` that is deleted when the export ends or fails."""
        file = out.with_name(f".{out.name}.{suffix}.partial")
        self._stack.callback(file.unlink, missing_ok=True)
        return file

    def write_model(self, file: Path, kind: str, *, base_only: bool = False) -> None:
        """Write the model in one of FILE_TYPES. base_only: omit the adapter and its changes to the vocabulary."""
        tensor_type, file_type = FILE_TYPES[kind]
        writer = gguf.GGUFWriter(file, self.layout.arch)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self._name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.layout.write_metadata(writer)
        (_build_base_vocabulary(self.tuned) if base_only else self.vocabulary).write(writer)
        extra = dict(self.layout.extra_tensors())
        for name, weight in extra.items():
            _add_tensor_info(writer, name, list(weight.shape), TensorType.F32)
        stored: list[tuple[str, TensorType]] = []
        for source_name in sorted(self._tensors, key=_layer_order):
            if (gguf_name := self.layout.name(source_name)) is not None:
                shape = self._tensors.shape(source_name)
                stored.append((source_name, _choose_type(gguf_name, shape, tensor_type)))
                _add_tensor_info(writer, gguf_name, shape, stored[-1][1])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight in extra.values():
            writer.write_tensor_data(weight.numpy())
        for source_name, stored_type in stored:
            writer.write_tensor_data(self._convert(source_name, stored_type, merge=not base_only))
        writer.close()

    def _convert(self, name: str, stored_type: TensorType, *, merge: bool) -> np.ndarray[Any, Any]:
        base = self._tensors.get(name)
        merged, base = self._merge(name, base) if merge else (base, base)
        if stored_type == TensorType.BF16:
            rounded = round_weight(name, merged, base, torch.bfloat16)
            return self.layout.convert(name, rounded).contiguous().view(torch.int16).numpy()
        if stored_type == TensorType.F16:
            half = self.layout.convert(name, round_weight(name, merged, base, torch.float16)).contiguous()
            if not torch.isfinite(half).all():
                raise ParityError(f"{name}: too large for f16", fix="choose --type bf16 or f32")
            return half.numpy()
        values = self.layout.convert(name, merged).float().contiguous().numpy()
        quantized: np.ndarray[Any, Any] = gguf.quants.quantize(values, stored_type)
        return quantized

    def write_adapter(self, file: Path) -> None:
        """Write the LoRA matrices in f32. llama.cpp scales by alpha / rank, so B is scaled to give the same product."""
        folder = self.tuned.folder
        assert folder is not None
        saved, settings = read_weights(folder), peft.LoraConfig.from_pretrained(str(folder))
        scales, alpha = read_scales(self.tuned.source, folder), float(settings.lora_alpha)
        writer = gguf.GGUFWriter(file, self.layout.arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(self._name)
        for module in sorted(scales, key=_layer_order):
            name = self.layout.name(f"{module}.weight")
            a, b = (saved[f"{module}.lora_{side}.weight"].float() for side in "AB")
            b = self.layout.convert(f"{module}.weight", b * (scales[module] * len(a) / alpha)).contiguous()
            writer.add_tensor(f"{name}.lora_a", a.numpy())
            writer.add_tensor(f"{name}.lora_b", b.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _choose_type(name: str, shape: list[int], tensor_type: TensorType) -> TensorType:
    """Return the type of a tensor: f32 for norms and biases, f16 if its rows are not divisible into blocks."""
    if len(shape) == 1 or name.endswith("_norm.weight"):  # llama.cpp's kernels require f32
        return TensorType.F32
    return tensor_type if shape[-1] % gguf.GGML_QUANT_SIZES[tensor_type][0] == 0 else TensorType.F16


def _add_tensor_info(writer: gguf.GGUFWriter, name: str, shape: list[int], stored_type: TensorType) -> None:
    block, size = gguf.GGML_QUANT_SIZES[stored_type]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, stored_type)


def _layer_order(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that orders layers by number."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
