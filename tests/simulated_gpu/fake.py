"""A simulated CUDA GPU inside one process: tensors on it are fake, those on the CPU are real.

Values read from the GPU are ones (integers: zeros), and each read is recorded by file and line. Nothing is computed.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

assert "torch" not in sys.modules, "the GPU must exist before PyTorch starts"


def start(library: Path) -> None:
    """Load the library of the simulated GPU, and import PyTorch."""
    device = ctypes.CDLL(str(library))
    device.take_hooks.restype = ctypes.c_bool
    assert device.take_hooks()
    import torch

    torch.set_num_threads(1)
    # Before a GPU seems to exist: bitsandbytes has no CUDA library here.
    import bitsandbytes.functional  # noqa: F401 (imported for its side effects)

    device.take_guard()


start(Path(sys.argv[1]))  # before PyTorch is imported: hence E402 below

import bitsandbytes._ops  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.autograd.function import BackwardCFunction  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _pop_mode_temporarily  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import strop  # noqa: E402

SOURCE = str(Path(strop.__file__).parent)
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
FAKE_KEY = torch._C._TorchDispatchModeKey.FAKE
SCALARS = {"__bool__": True, "__float__": 1.0, "__int__": 0, "__index__": 0}
# Operations that allocate, or return a view: no kernel runs.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "detach", "alias"}
NO_KERNEL |= {"_unsafe_view", "_reshape_alias", "set_", "resize_", "view", "t", "unsafe_split", "is_pinned"}


def frames(depth: int = 2) -> str:
    """Return the innermost lines of strop that are running: file:line < file:line."""
    lines, frame = [], sys._getframe(1)
    while frame is not None and len(lines) < depth:
        if frame.f_code.co_filename.startswith(SOURCE):
            lines.append(f"{frame.f_code.co_filename[len(SOURCE) + 1 :]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines) or "elsewhere"


def on_gpu(device: Any) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return device is not None and str(device).startswith("cuda")


def is_fake(x: Any) -> bool:
    return isinstance(x, FakeTensor) and x.device.type == "cuda"


def real_tensor(x: Tensor) -> Tensor:
    """Return a real tensor for a fake one that is copied to the host."""
    with _disable_current_modes():
        make = torch.ones if x.is_floating_point() or x.dtype == torch.bool else torch.zeros
        return make(tuple(x.shape), dtype=x.dtype)


def counts(number: int, bins: int) -> Tensor:
    """Return a real tensor with equal counts in all bins: the tokens of each expert."""
    with _disable_current_modes():
        return torch.tensor([number // bins + (n < number % bins) for n in range(bins)])


class SimulatedGpu(TorchFunctionMode):
    """The simulated GPU, as a dispatch mode.

    waits: operations for which the host waits for the GPU, by stage, kind and line; and `free` copies, for which it
    does not wait. stage: the label under which they are recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage, self.deterministic = "", False
        self.waits: Counter[tuple[str, str, str]] = Counter()
        self.pinned: dict[int, Tensor] = {}

    @contextmanager
    def present(self) -> Iterator[None]:
        """Enter the mode, also in autograd's threads: they inherit FAKE from the caller, but not this mode."""
        original_apply = BackwardCFunction.apply

        def apply(function: Any, *args: Any) -> Any:
            taken_over = torch._C._get_dispatch_mode(FAKE_KEY) is not None
            with _pop_mode_temporarily(FAKE_KEY) if taken_over else nullcontext(), self:
                return original_apply(function, *args)

        BackwardCFunction.apply = apply
        try:
            with self:
                yield
        finally:
            BackwardCFunction.apply = original_apply

    def record(self, kind: str) -> None:
        self.waits[self.stage, kind, frames()] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args else None
        if is_fake(first) and (name in SCALARS or name in ("item", "tolist", "numpy", "__array__")):
            self.record(f"read {name}")
            real = real_tensor(first)
            return SCALARS[name] if name in SCALARS else np.asarray(real) if "array" in name else getattr(real, name)()
        if name == "equal" and any(map(is_fake, args)):
            self.record("read equal")
            return False
        if name == "bincount" and is_fake(first):
            self.record("read bincount")
            return counts(first.numel(), kwargs.get("minlength") or 1)
        if name == "pin_memory" or kwargs.pop("pin_memory", False):
            real = first if name == "pin_memory" else func(*args, **kwargs)
            self.pinned[real.untyped_storage().data_ptr()] = real  # kept allocated, so that its address is not reused
            return real
        if is_fake(first) and name == "cpu":
            self.record("copy to the host")
            return real_tensor(first)
        if name in ("to", "cuda"):
            return self._moved(func, name, args, kwargs)
        if name == "copy_" and is_fake(first) != is_fake(args[1]):
            if is_fake(args[1]):
                self.record(f"{self._free(first, kwargs)}copy to the host")
                return first
            self._record_copy(args[1], kwargs)
        if name in ("tensor", "as_tensor") and on_gpu(kwargs.get("device")):
            self.record("copy to the GPU")
            device = kwargs.pop("device")
            real = func(*args, **kwargs)
            with FAKE:
                return FAKE.from_tensor(real).to(device)
        if on_gpu(kwargs.get("device")) or any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            if name in ("__getitem__", "__setitem__", "index_put", "index_put_"):
                result = self._by_mask(name, args)
                if result is not None:
                    return result
            if name in ("nonzero", "masked_select", "unique"):
                self.record("nonzero")
            with FAKE:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _record_copy(self, real: Tensor, kwargs: dict[str, Any]) -> None:
        self.record(f"{self._free(real, kwargs)}copy to the GPU")

    def _free(self, real: Tensor, kwargs: dict[str, Any]) -> str:
        return "free " if kwargs.get("non_blocking") and real.untyped_storage().data_ptr() in self.pinned else ""

    def _moved(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        first, device = args[0], kwargs.get("device")
        for other in args[1:2]:
            device = other.device if isinstance(other, Tensor) else device if isinstance(other, torch.dtype) else other
        device = "cuda" if name == "cuda" else device
        if on_gpu(device):
            if not is_fake(first):
                self._record_copy(first, kwargs)
                first = FAKE.from_tensor(first.detach()) if not isinstance(first, FakeTensor) else first
            with FAKE:
                return func(first, *args[1:], **kwargs)
        if is_fake(first) and device is not None:
            self.record("copy to the host")
            dtype = kwargs.get("dtype") or next((x for x in args[1:] if isinstance(x, torch.dtype)), None)
            real = real_tensor(first)
            return real if dtype is None else real.to(dtype)
        if isinstance(first, FakeTensor):
            with FAKE:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _by_mask(self, name: str, args: Any) -> Any:
        """Index with a mask as if all of it were True; the host must wait for the number of elements."""
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        tensors = [i for i in index if isinstance(i, Tensor)]
        if any(i.device.type == "cpu" and i.dim() for i in tensors):
            self.record("copy to the GPU")
        if not any(i.dtype == torch.bool for i in tensors):
            return None
        self.record("nonzero")
        if name == "__getitem__" and len(index) == 1:
            with FAKE:
                return args[0].flatten(0, index[0].dim() - 1).clone()
        return None


class Meter(TorchDispatchMode):
    """Counts kernels by operation, and the bytes that are allocated on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.allocated: dict[int, int] = {}
        self.references: dict[int, Any] = {}
        self.now = self.peak = 0
        self.peak_at = ""

    def keep(self, x: Any) -> None:
        """Count a tensor's memory until its storage is freed."""
        import weakref

        if not is_fake(x):
            return
        storage = x.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key in self.allocated:
            return

        def freed(_: Any) -> None:
            self.references.pop(key, None)
            self.now -= self.allocated.pop(key, 0)

        self.references[key] = weakref.ref(storage, freed)
        self.allocated[key] = size
        self.now += size
        if self.now > self.peak:
            self.peak, self.peak_at = self.now, frames(3)

    def exclude(self, x: Tensor) -> None:
        """Exclude a tensor from the allocated bytes: weights are counted separately."""
        self.allocated.setdefault(x.untyped_storage()._cdata, 0)

    def ran(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Called for each operation that runs a kernel. Subclasses record more properties of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [x for x in tree_leaves(out) if is_fake(x)]
        if outputs or any(is_fake(x) for x in tree_leaves((args, kwargs))):
            name = func.name().partition("::")[2].partition(".")[0]
            if not func.is_view and name not in NO_KERNEL and func.namespace != "prim":
                self.kernels[name] += launches(name, args)
                self.ran(func, name, args, kwargs or {}, out)
        for x in outputs:
            self.keep(x)
        return out


def launches(name: str, args: Any) -> int:
    """Return the kernels of an operation; a kernel for lists takes 64 tensors, or 320 pieces of 65,536 elements."""
    if not name.startswith("_foreach"):
        return 1
    tensors = args[0]
    if any(not x.is_contiguous() for x in tensors):
        return len(tensors)
    return max(-(-len(tensors) // 64), -(-sum(-(-x.numel() // 65536) for x in tensors) // 320))


def data_ptr(x: Tensor) -> int:
    return (x.untyped_storage()._cdata << 20) + x.storage_offset()


def apply_with_new_parameters(self: Any, change: Any, recurse: bool = True) -> Any:
    """Replace nn.Module._apply: create new parameters, as a real one cannot become fake in place."""
    for child in self.children() if recurse else ():
        child._apply(change)
    for name, weight in self._parameters.items():
        if weight is not None:
            with torch.no_grad():
                changed = change(weight)
            if changed is not weight:
                self._parameters[name] = torch.nn.Parameter(changed, weight.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = change(buffer)
    return self


class TorchWithoutChecks:
    """The module torch without _check, for bitsandbytes' fake operations, which compare a list with a torch.Size."""

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: None) if name == "_check" else getattr(torch, name)


class Stream:
    """A stream of the GPU, or an event, on which nothing is ever pending."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self) -> Stream:
        return self

    def record(self, stream: Stream) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Stream) -> float:
        return 0.0


class Properties:
    """Properties of the simulated GPU. Other processes use 1 GiB of its memory, and it is never full."""

    capability = (9, 0)
    memory_bytes = 80 << 30
    emptied = 0  # number of calls of empty_cache


def install() -> None:
    """Have torch.cuda report one GPU with these Properties."""
    del FakeTensor.tolist  # it would read each element
    FakeTensor.data_ptr = data_ptr
    of_real = torch.UntypedStorage.data_ptr
    torch.UntypedStorage.data_ptr = lambda self: self._cdata if self.device.type in ("cuda", "meta") else of_real(self)
    torch.nn.Module._apply = apply_with_new_parameters
    bitsandbytes._ops.torch = TorchWithoutChecks()
    state = torch.zeros(16, dtype=torch.uint8)

    def emptied() -> None:
        Properties.emptied += 1

    nothing = lambda *_, **__: None  # noqa: E731 (a table of lambdas follows)
    replacements = {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": nothing,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": nothing, "synchronize": nothing,
        "mem_get_info": lambda device=None: (Properties.memory_bytes - (1 << 30), Properties.memory_bytes),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 1 << 30,
        "reset_peak_memory_stats": nothing, "empty_cache": emptied,
        "get_rng_state": lambda device="cuda": state.clone(), "set_rng_state": nothing,
        "manual_seed": nothing, "manual_seed_all": nothing, "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device=None: Properties.capability,
        "get_device_name": lambda device=None: "Fake",
        "is_bf16_supported": lambda including_emulation=True: Properties.capability >= (8, 0),
    }  # fmt: skip
    properties = SimpleNamespace(name="Fake", total_memory=Properties.memory_bytes, major=9, minor=0)
    replacements |= {
        "get_device_properties": lambda device=None: properties,
        "max_memory_reserved": lambda device=None: 2 << 30,
    }
    replacements |= {"set_sync_debug_mode": nothing}
    replacements |= {
        "Stream": Stream,
        "Event": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
    }
    from tests.support.meta_operations import correct_meta_backward

    correct_meta_backward()
    torch.backends.cuda.is_flash_attention_available = lambda: True
    for name, answer in replacements.items():
        setattr(torch.cuda, name, answer)
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, answer)
