"""Whether what is published works where nothing else is: python tools/packages.py [CASE ...], after `make packages`.

Builds wheel and source distribution into dist/. Then installs the wheel into bare environments, one after another, uses
it there, and deletes them. Cases: 3.10 to 3.13 (pip, the newest of all dependencies; where this Python is found),
`lowest` and `lowest-3.10` (uv, the lowest that pyproject.toml allows), `uv-tool` and `pipx`; `constraints` installs
nothing: it asks whether constraints.txt and pyproject.toml agree on each Python. Without a CASE: all. A case takes some
minutes and, with PyTorch for CUDA, up to 8 GB of disk. The answer is a table; the exit code is 1 where a case failed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST, PLACE = ROOT / "dist", ROOT / "build" / "packages"
TOOLS = Path(sys.executable).parent  # build, uv and pipx are beside this Python
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LOWEST = {"lowest": "3.11", "lowest-3.10": "3.10"}  # bounds differ on 3.10; later ones have no wheels of the lowest
CASES = ("constraints", *PYTHONS, *LOWEST, "uv-tool", "pipx")

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 259, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip
TINY = "from strop import testing; testing.tiny_model('model'); testing.tiny_rows('rows.jsonl')"


class Failed(Exception):
    """A command of a case, and what it said."""


def say(words: Sequence[object], where: Path, **more: str) -> str:
    """Runs a command there; its output, both streams. Raises Failed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(word) for word in words], cwd=where, env={**env, **more}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise Failed(f"{' '.join(map(str, words))}\nends with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def python_of(version: str) -> str | None:
    """A Python of this version: on the PATH, or one of pyenv's."""
    found = shutil.which(f"python{version}")
    kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    return str(kept[-1]) if kept else found


def build() -> Path:
    """Wheel and source distribution in dist/; the wheel."""
    shutil.rmtree(DIST, ignore_errors=True)
    say([sys.executable, "-m", "build", "--outdir", DIST, ROOT], ROOT)
    (wheel,), (_source,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    return wheel


def install(case: str, wheel: Path, place: Path) -> tuple[Path, Path]:
    """(the environment's Python, its strop) of a case. Raises Failed, and LookupError where its Python is not here."""
    version = LOWEST.get(case, case)
    python = python_of(version) if version in PYTHONS else sys.executable
    if python is None:
        raise LookupError(f"no Python {version}")
    bare, bins = place / "env", place / "bin"
    if case == "uv-tool":
        tools = {"UV_TOOL_DIR": str(place / "tools"), "UV_TOOL_BIN_DIR": str(bins)}
        say([TOOLS / "uv", "tool", "install", "--python", python, wheel], place, **tools)
        return place / "tools" / "strop" / "bin" / "python", bins / "strop"
    if case == "pipx":
        homes = {"PIPX_HOME": str(place / "pipx"), "PIPX_BIN_DIR": str(bins), "PIPX_MAN_DIR": str(place / "man")}
        say([TOOLS / "pipx", "install", "--python", python, wheel], place, **homes)
        return place / "pipx" / "venvs" / "strop" / "bin" / "python", bins / "strop"
    say([python, "-m", "venv", bare], place)
    if case in LOWEST:
        # of the wheel alone all that it needs would be indirect, and the newest
        into = [TOOLS / "uv", "pip", "install", "--python", bare / "bin" / "python"]
        say([*into, "--resolution", "lowest-direct", "-r", ROOT / "pyproject.toml"], place)
        say([*into, "--no-deps", wheel], place)
        bound = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        assert bound is not None
        found = say([bare / "bin" / "python", "-c", "import torch; print(torch.__version__)"], place).strip()
        if not found.startswith(bound[1]):
            raise Failed(f"torch {found} is not the lowest, {bound[1]}")
    else:
        say([bare / "bin" / "python", "-m", "pip", "install", "--quiet", wheel], place)
    return bare / "bin" / "python", bare / "bin" / "strop"


def resolve() -> str:
    """Whether what the tests need can be had at the versions of constraints.txt, on each Python. Raises Failed."""
    for version in PYTHONS:
        asked = ["--python-version", version, "--extra", "test", "-c", "constraints.txt", "pyproject.toml"]
        say([TOOLS / "uv", "pip", "compile", "--quiet", *asked], ROOT)
    return f"on {', '.join(PYTHONS)}"


def use(python: Path, strop: Path, place: Path) -> str:
    """What everybody does first, on a model of strop.testing; the versions that were used. Raises Failed."""
    here = {"HF_HUB_OFFLINE": "1", "STROP_CACHE": str(place / "cache"), "COLUMNS": "120"}
    (place / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    say([strop, "--help"], place, **here)
    say([python, "-c", TINY], place, **here)
    say([strop, "doctor"], place, **here)
    say([strop, "plan", "--model", place / "config.json"], place, **here)
    say([strop, "check", "--model", "model", "--data", "rows.jsonl", "--show", "1"], place, **here)
    small = ["--train.max_steps", "2", "--train.batch_size", "4", "--lora.r", "4"]
    say([strop, "train", "--model", "model", "--data", "rows.jsonl", "--out", "run", *small], place, **here)
    losses = [json.loads(line)["loss"] for line in (place / "run" / "events.jsonl").open() if '"event": "step"' in line]
    if len(losses) != 2 or not all(0 < loss < 20 for loss in losses):
        raise Failed(f"the losses of two steps: {losses}")
    names = ("torch", "transformers", "peft", "bitsandbytes", "numba")
    script = f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {names}), sep=', ')"
    return say([python, "-c", script], place).strip()


def tried(case: str, wheel: Path) -> str:
    """What came of a case, in a line; it begins with "ok", "skipped" or "FAILED"."""
    place, started = PLACE / case, time.monotonic()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        if case == "constraints":
            said = f"ok       {resolve()}"
        else:
            python, strop = install(case, wheel, place)
            print(f"{case}: installed in {time.monotonic() - started:.0f} s", flush=True)
            said = f"ok       {use(python, strop, place)}"
    except LookupError as error:
        said = f"skipped  {error}"
    except Failed as error:
        said = f"FAILED   {error}"
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f"{case}: {said} ({time.monotonic() - started:.0f} s)", flush=True)
    return said


def main(asked: Sequence[str]) -> int:
    unknown = [case for case in asked if case not in CASES]
    if unknown:
        print(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}", file=sys.stderr)
        return 2
    wheel = build()
    print(f"built {', '.join(sorted(file.name for file in DIST.iterdir()))}", flush=True)
    told = {case: tried(case, wheel) for case in asked or CASES}
    print("\n".join(f"{case:<11} {said.splitlines()[0]}" for case, said in told.items()))
    return int(any(said.startswith("FAILED") for said in told.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
