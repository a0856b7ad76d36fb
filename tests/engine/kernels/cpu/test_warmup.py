"""Compiling beforehand: nothing is left to the process that trains."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from strop.engine.kernels.cpu import warmup
from strop.errors import DiskError
from tests import ROOT

COMPILED = """
import sys
import numba.core.event as events, numpy as np, peft, torch
from strop.data.types import Example
from strop.engine.train.fast import FastLoss
from strop.models.families.table import FAMILIES
from strop.engine.eligibility import unsupported, usual
from tests.support import tiny_families
for sizes, size in {"hidden_size": 128, "intermediate_size": 64, "head_dim": 32}.items():  # that tiles can have
    tiny_families.SMALL |= {name: size for name in tiny_families.SMALL if name.endswith(sizes)}
heard = events.RecordingListener()
events.register("numba:compile", heard)
kinds = dict.fromkeys(FAMILIES, {})
kinds |= {"llama with " + name: {name: value} for name, value in {
    "lora_dropout": 0.1, "use_dora": True, "modules_to_save": ["norm"], "r": 40, "trainable_token_indices": [1, 2],
}.items()}
of = {True: "usual", False: "all"}
for kind, more in kinds.items():
    try:
        base = tiny_families.build(kind.split()[0]).to(torch.bfloat16)
    except (KeyError, ValueError):  # this transformers does not have it
        continue
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 2, "target_modules": "all-linear", **more})).train()
    if unsupported(model) is not None:
        continue
    rows = [Example(np.arange(n, dtype=np.int32), (np.arange(n) > 0).astype(np.float32), "", 0) for n in (12, 15)]
    step = FastLoss(model, warm=False)
    if sys.argv[1] in (of[usual(model)], "all"):
        step(rows).backward()
        step.log_probs(rows).sum().backward()
        found = sorted({event.data["dispatcher"].py_func.__name__ for _, event in heard.buffer})
        print(kind, of[usual(model)], found)
        heard.buffer.clear()
"""


def test_nothing_is_left_to_compile(tmp_path: Path) -> None:
    """Loops that a run compiles itself give other last bits than those of a run that is resumed."""
    about = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for models, fewest in (("usual", 20), ("all", 40)):
        begun = [
            subprocess.Popen(
                [sys.executable, "-m", "strop.engine.kernels.warmup_train", "bfloat16", models, part], env=about
            )
            for part in ("attention", "products")
        ]
        assert [process.wait() for process in begun] == [0, 0]
        words = [sys.executable, "-c", COMPILED, models]
        found = subprocess.run(words, env=about, cwd=ROOT, capture_output=True, text=True, check=True)
        lines = found.stdout.splitlines()
        assert len(lines) >= fewest and "llama usual []" in lines
        assert [line for line in lines if not line.endswith("[]")] == []


ANSWERED = """
import numba.core.event as events, torch
from strop.engine.kernels.warmup_decode import exercise
heard = events.RecordingListener()
events.register("numba:compile", heard)
exercise(torch.bfloat16)
print("compiled:", *(event.data["dispatcher"].py_func.__name__ for _, event in heard.buffer))
"""


def test_nothing_is_left_to_compile_for_answers(tmp_path: Path) -> None:
    about = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "strop.engine.kernels.warmup_decode", "bfloat16"]
    begun = [subprocess.Popen([*words, part], env=about) for part in ("products", "attention")]
    assert [process.wait() for process in begun] == [0, 0]

    def compiled() -> set[str]:
        found = subprocess.run([sys.executable, "-c", ANSWERED], env=about, capture_output=True, text=True, check=True)
        return set(found.stdout.split("compiled:")[1].split())

    assert compiled() - {"impl"} == {"_held", "_held_room", "through"}  # which hold or call what the parts have
    assert compiled() == set()


def test_it_is_said_where_they_cannot_be_compiled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warmup.compile_once(torch.float32, tmp_path, exercise="strop.no_such_module")
    assert "(exit 1)" in caplog.text and "No module named strop.no_such_module" in caplog.text
    caplog.clear()
    warmup.compile_once(torch.float32, tmp_path, exercise="strop.no_such_module")
    assert not caplog.text  # once


def test_a_full_disk_is_named_before_anything_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "free_bytes", lambda _: 1 << 20)
    with pytest.raises(DiskError, match="compiled loops need 32 MiB of disk, 1 are free") as raised:
        warmup.compile_once(torch.float32, tmp_path / "loops", exercise="strop.no_such_module")
    assert raised.value.what.startswith(f"{tmp_path / 'loops'}: ") and "NUMBA_CACHE_DIR" in raised.value.fix
    assert not (tmp_path / "loops").exists()


def test_loops_of_other_sources_are_not_kept(tmp_path: Path) -> None:
    for name in ("loop-1.nbi", "loop-1.1.nbc", "strop-other-exercise-float32"):
        (tmp_path / name).touch()
    warmup.compile_once(torch.float32, tmp_path, exercise="strop.no_such_module")
    (tmp_path / "loop-2.nbi").touch()
    warmup.compile_once(torch.bfloat16, tmp_path, exercise="strop.no_such_module")
    kept = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock")
    assert [name.rpartition("-")[2] for name in kept] == ["2.nbi", "bfloat16", "float32"]


@pytest.mark.parametrize("damage", ["cut", "gone", "mark", "zeros"])
def test_loops_whose_files_are_damaged_are_compiled_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a machine leaves them that stopped while they were written; numba would end each process that reads them."""
    monkeypatch.setattr(warmup, "take", lambda: SimpleNamespace(run=lambda *stages: (1, "no such module")))
    none, loop = "strop.no_such_module", tmp_path / "loop-1.nbi"
    warmup.compile_once(torch.float32, tmp_path, exercise=none)
    loop.write_bytes(b"compiled")
    warmup.compile_once(torch.bfloat16, tmp_path, exercise=none)
    loop.write_bytes(b"compiled, and more types")
    caplog.clear()
    warmup.compile_once(torch.bfloat16, tmp_path, exercise=none)
    assert loop.is_file() and not caplog.text
    if damage == "gone":
        loop.unlink()
    elif damage == "zeros":
        loop.write_bytes(b"compiled" + bytes(20))
    else:
        cut = loop if damage == "cut" else next(tmp_path.glob("strop-*-bfloat16"))
        cut.write_bytes(b"")
    warmup.compile_once(torch.bfloat16, tmp_path, exercise=none)
    assert "(exit 1)" in caplog.text and not loop.exists()
    assert [path.name.rpartition("-")[2] for path in tmp_path.glob("strop-*-*")] == ["bfloat16"]
