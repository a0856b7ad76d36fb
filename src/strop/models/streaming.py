"""A frozen base in one file a layer, mapped into memory: the system keeps as many layers as fit.

A file has the weights in the layout in which the fast step computes, so that nothing is copied. A thread reads the next
layer while one is computed, so that a run waits for the disk only if reading takes longer than computing. Forward and
backward passes visit the layers in opposite orders, so the layers that are still in memory are those needed next.
Processes on one machine that train on the same base share its memory.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import mmap
import os
import re
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import nn

from strop.errors import RunError
from strop.machine.memory import USABLE_SHARE
from strop.machine.probe import free_bytes
from strop.models.families.shape import read_model_info
from strop.models.load import layers_cache
from strop.models.sharding import (
    EMBEDDING,
    ModuleKey,
    ShardedTensor,
    assign_views,
    in_layer_order,
    load_by_layer,
    open_checkpoint,
    split_by_layer,
)
from strop.models.source import Source, prequantized, read_headers
from strop.models.tensor_files import check_finite
from strop.runs.folder import build_once, new_folder, read_json

LOG = logging.getLogger(__name__)

INDEX_FILE = "layers.json"  # size and CRC-32 of each file
READ_BYTES = 1 << 20
AHEAD_BYTES = 1 << 17  # the least that the system reads ahead of one request
MADV_POPULATE_READ = 22  # of Linux, not in the module mmap
STORED_BITS = {"nf4": 4.5, "fp4": 4.5, "int8": 8}  # per weight, with its constants


class MappedLayer:
    """The tensors of a layer, as views of a file.

    crc: of the file's content, which is compared when it is first read.
    """

    def __init__(self, file: Path, tensors: Sequence[ShardedTensor], size: int, crc: int) -> None:
        self._file, self._size, self._crc = file, size, crc
        self._verified = False
        with file.open("rb") as opened:
            # Private and writable, because torch warns of memory that it must not write; nothing writes it.
            self._pages = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY)
        self._data = torch.frombuffer(self._pages, dtype=torch.uint8)
        assign_views(in_layer_order(tensors), self._data)

    def read(self) -> None:
        """Read the file into the system's memory, and map its pages.

        Raises RunError if the disk fails, or the file is shorter than it was or has other content. Otherwise the
        computation would meet the fault, where the system ends the process.
        """
        try:
            with self._file.open("rb", buffering=0) as file:
                if not (self._verified and self._map_pages(file.fileno())):
                    self._read_all(file)
        except OSError as error:
            raise self._error(error.strerror or str(error)) from None
        self._verified = True

    def _read_all(self, file: IO[bytes]) -> None:
        buffer, crc, left = memoryview(bytearray(READ_BYTES)), 0, self._size
        while left and (count := file.readinto(buffer)):  # type: ignore[attr-defined]
            crc, left = crc if self._verified else zlib.crc32(buffer[:count], crc), left - count
        if left:
            raise self._error("it was cut")
        if not self._verified and crc != self._crc:
            raise self._error("its content has changed since it was written")

    def _map_pages(self, handle: int) -> bool:
        """Map all pages, and read those that the system has dropped, without a copy. Return whether that succeeded.

        It needs Linux 5.14, and fails where an access would end the process: for a file that was cut, or a bad disk.
        """
        if sys.platform != "linux":
            return False
        for start in range(0, self._size, AHEAD_BYTES):  # all at once; populating alone reads piece by piece
            os.posix_fadvise(handle, start, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        address, size = ctypes.c_void_p(self._data.data_ptr()), ctypes.c_size_t(self._size)
        return bool(ctypes.CDLL(None).madvise(address, size, MADV_POPULATE_READ) == 0)

    def release(self) -> None:
        """Take the file's pages out of this process's memory. The system keeps them as long as it has room."""
        if sys.platform != "win32":
            self._pages.madvise(mmap.MADV_DONTNEED)

    def drop(self) -> None:
        """Take the file's pages out of this process's memory, and out of the system's unless others use them."""
        self.release()
        if sys.platform == "linux":
            with self._file.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def size(self) -> int:
        return self._size

    def _error(self, why: str) -> RunError:
        what = f"{self._file}: cannot be read: {why}"
        return RunError(what, fix=f"delete {self._file.parent}, test the disk, and resume: it is written again")


class ReadAhead:
    """Reads each layer before it is computed, and the next one meanwhile. The interface of plain.WeightGatherer.

    waited_s: seconds in which the computation waited for the disk.
    """

    def __init__(self, layers: Mapping[ModuleKey, MappedLayer], modules: dict[ModuleKey, nn.Module]) -> None:
        self.modules, self.waited_s = modules, 0.0
        self._layers = layers
        self._order = [key for key in layers if key != EMBEDDING]
        self._reads: dict[int, Future[None]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._current: int | None = None

    def __call__(self, key: ModuleKey) -> None:
        """Wait for a layer, and begin to read the next. Raises RunError as MappedLayer.read does."""
        if key == EMBEDDING:  # a forward pass begins; only the rows of a batch are used
            for layer in self._layers.values():
                layer.release()
            self._reads = {0: self._read(0)}
            self._current = None
            return
        last, current = self._current, self._order.index(key)
        if current == last:
            return
        began = time.perf_counter()
        (self._reads.pop(current, None) or self._read(current)).result()
        self.waited_s += time.perf_counter() - began
        if last is not None:
            self._layers[self._order[last]].release()
        self._current = current
        is_forward = (last is None or current > last) and current < len(self._order) - 1
        following = current + (1 if is_forward else -1)
        if following >= 0:
            self._reads[following] = self._read(following)

    def verify(self, *keys: ModuleKey) -> None:
        """Read these layers, or all, if they were not read before. Raises RunError as MappedLayer.read does."""
        for key in keys or self._layers:
            if key in self._layers:
                self._layers[key].read()
                self._layers[key].release()

    def describe(self) -> str:
        return f"waited {self.waited_s:.1f} s for weights from the disk"

    def report(self) -> dict[str, float]:
        """Return the fields of report.json."""
        return {"disk_wait_s": self.waited_s}

    def _read(self, index: int) -> Future[None]:
        return self._pool.submit(self._layers[self._order[index]].read)


class LayerCycle:
    """Reads the layers of a base in turn, again and again, as answers need them, each while another one is computed.

    As many layers as fit stay in memory, and the others are dropped after their use. The system would drop what was
    used least recently, which is always the layer that is needed next.
    """

    def __init__(self, layers: Mapping[ModuleKey, MappedLayer]) -> None:
        self._layers = [layers[key] for key in sorted(key for key in layers if isinstance(key, int))]
        size = max(layer.size for layer in self._layers)
        room = int(USABLE_SHARE * free_bytes()) - 2 * size  # of the layer in use, and the one that is read
        self._num_kept = max(0, room // size)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._reads: dict[int, Future[None]] = {}

    def __call__(self, number: int) -> None:
        """Wait for a layer, and begin to read the next. Raises RunError as MappedLayer.read does."""
        if self._num_kept >= len(self._layers):
            return
        (self._reads.pop(number, None) or self._read(number)).result()
        previous = (number - 1) % len(self._layers)
        if previous >= self._num_kept:
            self._layers[previous].drop()
        following = (number + 1) % len(self._layers)
        self._reads[following] = self._read(following)

    def wait(self) -> None:
        """Wait for the read that has begun."""
        wait(self._reads.values())

    def _read(self, number: int) -> Future[None]:
        return self._pool.submit(self._layers[number].read)


def load_streamed(
    source: Source, dtype: torch.dtype, *, quantization: str = "none", double: bool = True
) -> tuple[nn.Module, ReadAhead]:
    """Return the model on the CPU in eval mode, with its large weights mapped, and what reads them ahead.

    The files are written to the cache on first use. Raises ModelError as `load_base`.
    """
    LOG.info("mapping the weights of %s", source.name)

    def build(folder: Path) -> None:
        LOG.info("writing the weights of %s layer by layer, once", source.name)
        with new_folder(folder) as temp:
            index: dict[str, tuple[int, int]] = {}

            def write(name: str, tensors: Sequence[ShardedTensor]) -> None:
                index[name] = _write_layer(temp / _file_name(name), tensors)

            split_by_layer(*open_checkpoint(source, dtype, "cpu", quantization, double), write)
            (temp / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")

    folder = build_once(layers_cache(source, quantization, double, dtype), _is_complete, build)
    index = read_json(folder / INDEX_FILE)

    def map_file(name: str, tensors: Sequence[ShardedTensor]) -> MappedLayer:
        return MappedLayer(folder / _file_name(name), tensors, *index[name])

    model, layers, modules = load_by_layer(source, dtype, "cpu", map_file, quantization=quantization, double=double)
    cast(Any, model).layer_cycle = LayerCycle(layers)  # for the decoder
    ahead = ReadAhead(layers, modules)
    ahead.verify(EMBEDDING)  # of which a pass reads some rows
    return model, ahead


def fits_in_memory(source: Source, dtype: torch.dtype, quantization: str, device: str = "cpu") -> bool:
    """Return whether the weights of a base fit in the device's free memory, as they are stored."""
    bits = 8 * dtype.itemsize if quantization == "none" else STORED_BITS[quantization]
    if source.kind == "gguf":  # its header has the sizes, without a conversion
        needed = read_model_info(str(source.path)).parameters * bits // 8
    else:
        entries = [entry for _, header in read_headers(source.path) for entry in header.values()]
        needed = sum(math.prod(entry["shape"]) for entry in entries) * bits // 8
        if prequantized(source.config()) is not None:  # shapes of packed weights are not those of the layers
            needed = sum(end - begin for begin, end in (entry["data_offsets"] for entry in entries))
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else free_bytes()
    return bool(needed <= USABLE_SHARE * free)


def is_written(source: Source, quantization: str, double: bool, dtype: torch.dtype) -> bool:
    """Return whether the cache has the layers of a base."""
    return _is_complete(layers_cache(source, quantization, double, dtype))


def _file_name(name: str) -> str:
    return f"{re.sub('[^0-9a-z]+', '-', name)}.bin"


def _write_layer(file: Path, tensors: Sequence[ShardedTensor]) -> tuple[int, int]:
    """Write a layer's tensors one after the other, and return the size and the CRC-32."""
    size = crc = 0
    with file.open("wb") as out:
        for tensor in in_layer_order(tensors):
            data = tensor.read(0, tensor.size)
            check_finite(data.view(tensor.dtype), f"weight {tensor.name}")
            content = data.numpy().data
            out.write(content)
            size, crc = size + len(content), zlib.crc32(content, crc)
    return size, crc


def _is_complete(folder: Path) -> bool:
    """Return whether a folder has all files in full."""
    index = read_json(folder / INDEX_FILE)
    files = {folder / _file_name(name): size for name, (size, _) in index.items()}
    return bool(files) and all(file.is_file() and file.stat().st_size == size for file, size in files.items())
