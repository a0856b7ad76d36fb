"""Loading libraries, and compiling kernels ahead of time in another process: nothing is left to compile in training."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from strop.engine.kernels import warmup
from strop.errors import DiskError
from tests import ROOT
from tests.support.dash import make_run

TIMEOUT_S = 600  # of one process: seconds on an idle machine
UNKNOWN = "no_such_warmup"
MODULE = "strop.engine.kernels.warmup_models"

TRAINING = """
import sys
from strop.engine.kernels.warmup import load
load(None)
import numba.core.event as events, numpy as np, peft, torch
from strop.data.types import Example
from strop.engine.train.fast import FastLoss
from strop.models.families.table import FAMILIES
from strop.engine.train.eligibility import why_not_fast, uses_llama_kernels
from tests.support import tiny_families
for sizes, size in {"hidden_size": 128, "intermediate_size": 64, "head_dim": 32}.items():  # sizes that tiles support
    tiny_families.SMALL |= {name: size for name in tiny_families.SMALL if name.endswith(sizes)}
listener = events.RecordingListener()
events.register("numba:compile", listener)
kinds = dict.fromkeys(FAMILIES, {})
kinds |= {"llama with " + name: {name: value} for name, value in {
    "lora_dropout": 0.1, "use_dora": True, "modules_to_save": ["norm"], "r": 40, "trainable_token_indices": [1, 2],
}.items()}
names = {True: "usual", False: "all"}
for kind, more in kinds.items():
    try:
        base = tiny_families.build(kind.split()[0]).to(torch.bfloat16)
    except (KeyError, ValueError):  # this version of transformers does not have it
        continue
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 2, "target_modules": "all-linear", **more})).train()
    if why_not_fast(model) is not None:
        continue
    rows = [Example(np.arange(n, dtype=np.int32), (np.arange(n) > 0).astype(np.float32), "", 0) for n in (12, 15)]
    step = FastLoss(model, warm=False)
    if sys.argv[1] == names[uses_llama_kernels(model)]:
        step.token_loss(rows).backward()
        step.log_probs(rows).sum().backward()
        compiled = sorted({event.data["dispatcher"].py_func.__name__ for _, event in listener.buffer})
        print(kind, compiled)
        listener.buffer.clear()
"""

DECODING = """
from strop.engine.kernels.warmup import load
load(None)
import numba.core.event as events, torch
from strop.engine.kernels.warmup_models import warm_up_decoding
listener = events.RecordingListener()
events.register("numba:compile", listener)
warm_up_decoding(torch.bfloat16)
print("compiled:", *(event.data["dispatcher"].py_func.__name__ for _, event in listener.buffer))
"""


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate two cores, and forget the compiler processes of earlier tests."""
    monkeypatch.setattr(warmup, "_started", [])
    monkeypatch.setattr("os.cpu_count", lambda: 2)


@pytest.fixture
def empty_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let compiler processes import empty modules, which takes no time, in place of the libraries."""
    for name in ("torch", "peft", *warmup.LIBRARIES):
        file = (tmp_path / "empty").joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        for path in (
            file,
            *(folder / "__init__.py" for folder in file.parents if tmp_path / "empty" in folder.parents),
        ):
            path.touch()
    monkeypatch.syspath_prepend(str(tmp_path / "empty"))


def test_load_enables_garbage_collection_again() -> None:
    before = gc.get_freeze_count()
    warmup.load()
    assert gc.isenabled() and gc.get_freeze_count() > before and "peft" in sys.modules


def test_load_enables_garbage_collection_after_a_failed_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError):
        warmup.load()
    assert gc.isenabled()


def test_import_leaves_out_inductor_and_leaves_the_process_as_it_was() -> None:
    program = (
        "import gc, os, sys; from strop.engine.kernels import warmup; gc.disable(); warmup.import_libraries()\n"
        "import torch; print('bitsandbytes' in sys.modules, 'torch._inductor.compile_fx' in sys.modules)\n"
        "print(os.environ.get(warmup.WITHOUT_COMPILER), torch.compile(f := lambda x: x) is f)\n"
        "print(gc.isenabled(), gc.get_freeze_count())"
    )
    assert run_python(["-c", program]).split() == ["True", "False", "None", "False", "False", "0"]


@pytest.fixture
def cpu_with_bf16(tmp_path: Path) -> Path:
    """Return a folder with a `bitsandbytes` that imports `kernels`, as it does on CPUs with bf16, to download one."""
    (tmp_path / "bitsandbytes.py").write_text(
        "from types import SimpleNamespace\nnn = SimpleNamespace()\n"
        "try:\n    import kernels\n    print('kernels imported', flush=True)\nexcept ImportError:\n"
        "    print('kernels refused', flush=True)\n",
        encoding="utf-8",
    )
    if importlib.util.find_spec("kernels") is None:
        (tmp_path / "kernels.py").touch()
    return tmp_path


@pytest.mark.parametrize("call", ["import_libraries()", "main()", "_start(['json.tool', '--help'])()"])
def test_libraries_download_no_kernels(call: str, cpu_with_bf16: Path) -> None:
    program = (
        f"from strop.engine.kernels import warmup; warmup.FORKS = {call == 'main()'}; warmup.{call}\n"
        "import kernels; from transformers.integrations import hub_kernels as hub\n"
        "print('enabled', hub._kernels_enabled() if callable(hub._kernels_enabled) else hub._kernels_enabled)"
    )
    printed = run_python(["-c", program], PYTHONPATH=str(cpu_with_bf16))
    assert "kernels refused" in printed and "kernels imported" not in printed
    assert "enabled False" in printed or call.startswith("_start")  # a child of this process, which imports nothing


SWEEP = "import sys, strop; strop.sweep(model=sys.argv[1], data=sys.argv[2], over={'lora.r': [8, 16]}, out='sweep')"


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "strop", "train", "--model", "MODEL", "--data", "ROWS", "--print-recipe"],
        ["-m", "strop", "export-script", "RUN", "--out", "script"],
        ["-m", "strop", "adapters", "ADAPTER"],
        ["-m", "strop", "push", "ADAPTER", "me/mine"],
        ["-c", SWEEP, "MODEL", "ROWS"],
    ],
    ids=lambda words: words[2] if words[0] == "-m" else "sweep",
)
def test_commands_download_no_kernels(
    words: list[str], cpu_with_bf16: Path, tiny_folder: Path, adapter_folders: list[Path], rows_file: Path
) -> None:
    """These import PEFT only to read. Some end with an error here, after the imports."""
    run = make_run(cpu_with_bf16, "run", [])
    paths = {"MODEL": tiny_folder, "ADAPTER": adapter_folders[0], "ROWS": rows_file, "RUN": run}
    done = subprocess.run(
        [sys.executable, *(str(paths.get(word, word)) for word in words)], cwd=cpu_with_bf16, timeout=TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": str(cpu_with_bf16)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "kernels refused" in done.stdout and "kernels imported" not in done.stdout, done.stderr


def test_compiler_starts_only_where_nothing_is_compiled(
    no_compiler: None, empty_libraries: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (tmp_path / "cpu_1").mkdir()
    (tmp_path / "cpu_1" / "strop-0-train-bfloat16").touch()
    warmup.start_compiler("train")
    assert warmup._started == []
    (tmp_path / "cpu_1" / "strop-0-train-bfloat16").unlink()
    warmup.start_compiler("train")
    warmup.start_compiler("train")
    [compiler] = warmup._started
    assert compiler.is_waiting and warmup.take_compiler() is compiler and warmup._started == []
    assert compiler.run([["strop.no_such_module"], ["this"]])[0] == 1
    assert not compiler.is_waiting


def test_a_compiler_that_waited_too_long_is_closed_and_replaced(
    no_compiler: None, empty_libraries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = warmup.Compiler()
    late._process.kill()
    late._process.wait()
    monkeypatch.setattr(warmup, "_started", [late])
    compiler = warmup.take_compiler()
    assert compiler is not late and compiler.is_waiting
    compiler.close()
    pipes = [pipe for each in (late, compiler) for pipe in (each._process.stdin, each._process.stderr)]
    assert all(pipe is not None and pipe.closed for pipe in pipes)


def test_programs_of_a_stage_run_with_their_arguments(
    empty_libraries: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_part.py").write_text("import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])")
    monkeypatch.syspath_prepend(str(tmp_path))
    programs = [["a_part", str(tmp_path / name), name] for name in ("one", "two")]
    assert warmup.Compiler().run(programs) == (0, "")
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["one", "two"]
    code, last_line = warmup.Compiler().run([*programs, ["no_such_part"]])
    assert code == 1 and "No module named no_such_part" in last_line


def test_compiler_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "from strop.engine.kernels import warmup\n"
        "warmup._started.append(warmup.Compiler())\n"
        "print(warmup._started[0]._process.pid)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(timeout=60)


def test_warmup_imports_no_libraries() -> None:
    program = "import sys, strop.engine.kernels.warmup; print(*{'torch', 'numba', 'numpy', 'peft'} & set(sys.modules))"
    assert run_python(["-c", program]).strip() == ""


def run_python(arguments: list[str], **environment: str) -> str:
    """Run Python with these arguments and return its output."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, check=True, timeout=TIMEOUT_S,
        stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip


def warm_up(folder: Path, *arguments: str) -> dict[str, str]:
    """Run both parts of a warm-up at the same time and return the environment in which their kernels are found."""
    environment = {"NUMBA_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        compiler = warmup.Compiler()
    code, last_line = compiler.run([[MODULE, *arguments, part] for part in ("attention", "matmuls")])
    assert code == 0, last_line
    return environment


@pytest.mark.slow
def test_training_compiles_nothing_after_the_warm_up(tmp_path: Path) -> None:
    """Otherwise the first step would take longer, and compiling would count as its time and memory."""
    for models, family, fewest in (("usual", "llama", 20), ("all", "glm", 19)):
        environment = warm_up(tmp_path, "train", "bfloat16", models)
        lines = run_python(["-c", TRAINING, models], **environment).splitlines()
        assert len(lines) >= fewest and f"{family} []" in lines
        assert [line for line in lines if not line.endswith("[]")] == []


@pytest.mark.slow
def test_decoding_compiles_nothing_after_the_warm_up(tmp_path: Path) -> None:
    environment = warm_up(tmp_path, "decode", "bfloat16")

    def compiled() -> set[str]:
        return set(run_python(["-c", DECODING], **environment).split("compiled:")[1].split())

    # The functions that hold or call the kernels of both parts.
    assert compiled() - {"impl"} == {"_make_layer_ref", "_make_buffers_ref", "layer_forward"}
    assert compiled() == set()


def test_failed_compilation_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warmup.compile_once(torch.float32, tmp_path, UNKNOWN)
    assert "(exit 1)" in caplog.text and UNKNOWN in caplog.text
    caplog.clear()
    warmup.compile_once(torch.float32, tmp_path, UNKNOWN)
    assert not caplog.text


def test_full_disk_raises_before_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strop.runs.folder.free_bytes", lambda _: 1 << 20)
    with pytest.raises(DiskError, match="32 MiB of disk, 1 are free") as raised:
        warmup.compile_once(torch.float32, tmp_path / "kernels", UNKNOWN)
    assert raised.value.what.startswith(f"{tmp_path / 'kernels'}: ") and "NUMBA_CACHE_DIR" in raised.value.fix
    assert not (tmp_path / "kernels").exists()


def test_message_says_what_the_kernels_are_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler = SimpleNamespace(run=lambda *stages: (0, ""))
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(warmup, "take_compiler", lambda: compiler)
        for use in (warmup.TRAIN, warmup.DECODE):
            warmup.compile_once(torch.bfloat16, tmp_path / use, use)
    assert [text.partition(",")[0] for text in caplog.messages] == [
        "compiling CPU kernels for training in bfloat16",
        "compiling CPU kernels for generating text in bfloat16",
    ]


def test_message_says_that_another_program_compiles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock, before = tmp_path / "strop.lock", warmup.compile_seconds()
    program = (
        f"from filelock import FileLock\nwith FileLock({str(lock)!r}):\n    print('locked', flush=True)\n    input()"
    )
    command = [sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with (
        subprocess.Popen(command, **pipes) as other,
        pytest.MonkeyPatch.context() as patch,
        caplog.at_level("INFO"),
    ):
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline()
        threading.Timer(0.3, other.stdin.close).start()  # ends the program
        patch.setattr(warmup, "take_compiler", lambda: SimpleNamespace(run=lambda *stages: (0, "")))
        warmup.compile_once(torch.bfloat16, tmp_path, warmup.DECODE)
    assert [text.partition(",")[0] for text in caplog.messages] == [
        "waiting for another program that compiles CPU kernels",
        "compiling CPU kernels for generating text in bfloat16",
    ]
    assert warmup.compile_seconds() > before  # the forecast of a run leaves this time out


def test_kernels_of_other_sources_are_removed(empty_libraries: None, tmp_path: Path) -> None:
    for name in ("kernel-1.nbi", "kernel-1.1.nbc", "strop-other-train-float32"):
        (tmp_path / name).touch()
    warmup.compile_once(torch.float32, tmp_path, UNKNOWN)
    (tmp_path / "kernel-2.nbi").touch()
    warmup.compile_once(torch.bfloat16, tmp_path, UNKNOWN)
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file() and path.suffix != ".lock")
    assert [name.rpartition("-")[2] for name in names] == ["2.nbi", "bfloat16", "float32"]


@pytest.mark.parametrize("damage", ["cut", "gone", "marker", "zeros"])
def test_damaged_kernels_are_compiled_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that crashed while files were written leaves them damaged; reading one would crash numba."""
    monkeypatch.setattr(warmup, "take_compiler", lambda: SimpleNamespace(run=lambda *stages: (1, "no such module")))
    kernel = tmp_path / "kernel-1.nbi"
    warmup.compile_once(torch.float32, tmp_path, UNKNOWN)
    kernel.write_bytes(b"compiled")
    warmup.compile_once(torch.bfloat16, tmp_path, UNKNOWN)
    kernel.write_bytes(b"compiled, and more types")
    caplog.clear()
    warmup.compile_once(torch.bfloat16, tmp_path, UNKNOWN)
    assert kernel.is_file() and not caplog.text
    if damage == "gone":
        kernel.unlink()
    elif damage == "zeros":
        kernel.write_bytes(b"compiled" + bytes(20))
    else:
        cut = kernel if damage == "cut" else next(tmp_path.glob("strop-*-bfloat16"))
        cut.write_bytes(b"")
    warmup.compile_once(torch.bfloat16, tmp_path, UNKNOWN)
    assert "(exit 1)" in caplog.text and not kernel.exists()
    assert [path.name.rpartition("-")[2] for path in tmp_path.glob("strop-*-*")] == ["bfloat16"]


def test_programs_start_without_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "FORKS", False)
    codes = [warmup._start(["json.tool", option])() for option in ("--help", "--no-such-option")]
    assert codes == [0, 2]
