"""Check that the built packages work in empty environments: python tools/packages.py [CASE ...], after `make packages`.

Builds wheel and source distribution into dist/, then installs the wheel into one environment after another, uses it
there, and deletes the environment. Cases: 3.10 to 3.13 (pip, the newest dependencies, if this Python is found),
`lowest` and `lowest-3.10` (uv, the lowest versions that pyproject.toml allows), `uv-tool` and `pipx`; `constraints`
only checks that constraints.txt and pyproject.toml agree on each Python. The default is all cases. A case takes some
minutes and, with PyTorch for CUDA, up to 8 GB of disk. Prints a table; exits with 1 if a case failed.
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
TOOLS = Path(sys.executable).parent  # build, uv and pipx are next to this Python
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Bounds differ on 3.10. The lowest versions have no wheels for Pythons after 3.11.
LOWEST = {"lowest": "3.11", "lowest-3.10": "3.10"}
CASES = ("constraints", *PYTHONS, *LOWEST, "uv-tool", "pipx")

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 259, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip
TINY = "from strop import testing; testing.tiny_model('model'); testing.tiny_rows('rows.jsonl')"


class Failed(Exception):
    """Raised with a command of a case and its output."""


def run_command(words: Sequence[object], where: Path, **more: str) -> str:
    """Run a command in a folder and return its output, both streams. Raises Failed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(word) for word in words], cwd=where, env={**env, **more}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise Failed(f"{' '.join(map(str, words))}\nends with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def python_of(version: str) -> str | None:
    """Return a Python of this version from the PATH or pyenv."""
    result = shutil.which(f"python{version}")
    pythons = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    return str(pythons[-1]) if pythons else result


def build() -> Path:
    """Build wheel and source distribution in dist/, and return the wheel."""
    shutil.rmtree(DIST, ignore_errors=True)
    run_command([sys.executable, "-m", "build", "--outdir", DIST, ROOT], ROOT)
    (wheel,), (_source,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    return wheel


def install(case: str, wheel: Path, place: Path) -> tuple[Path, Path]:
    """Return the Python and the strop of a case's environment. Raises Failed, and LookupError without its Python."""
    version = LOWEST.get(case, case)
    python = python_of(version) if version in PYTHONS else sys.executable
    if python is None:
        raise LookupError(f"no Python {version}")
    bare, bins = place / "env", place / "bin"
    if case == "uv-tool":
        tools = {"UV_TOOL_DIR": str(place / "tools"), "UV_TOOL_BIN_DIR": str(bins)}
        run_command([TOOLS / "uv", "tool", "install", "--python", python, wheel], place, **tools)
        return place / "tools" / "strop" / "bin" / "python", bins / "strop"
    if case == "pipx":
        homes = {"PIPX_HOME": str(place / "pipx"), "PIPX_BIN_DIR": str(bins), "PIPX_MAN_DIR": str(place / "man")}
        run_command([TOOLS / "pipx", "install", "--python", python, wheel], place, **homes)
        return place / "pipx" / "venvs" / "strop" / "bin" / "python", bins / "strop"
    run_command([python, "-m", "venv", bare], place)
    if case in LOWEST:
        # The dependencies are direct here. Those of the wheel are indirect, so uv would install the newest ones.
        into = [TOOLS / "uv", "pip", "install", "--python", bare / "bin" / "python"]
        run_command([*into, "--resolution", "lowest-direct", "-r", ROOT / "pyproject.toml"], place)
        run_command([*into, "--no-deps", wheel], place)
        bound = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        assert bound is not None
        result = run_command([bare / "bin" / "python", "-c", "import torch; print(torch.__version__)"], place).strip()
        if not result.startswith(bound[1]):
            raise Failed(f"torch {result} is not the lowest, {bound[1]}")
    else:
        run_command([bare / "bin" / "python", "-m", "pip", "install", "--quiet", wheel], place)
    return bare / "bin" / "python", bare / "bin" / "strop"


def resolve() -> str:
    """Check that the tests' dependencies exist at the versions of constraints.txt on each Python. Raises Failed."""
    for version in PYTHONS:
        options = ["--python-version", version, "--extra", "test", "-c", "constraints.txt", "pyproject.toml"]
        run_command([TOOLS / "uv", "pip", "compile", "--quiet", *options], ROOT)
    return f"on {', '.join(PYTHONS)}"


def use(python: Path, strop: Path, place: Path) -> str:
    """Run the first commands of a user on a model of strop.testing, and return the used versions. Raises Failed."""
    here = {"HF_HUB_OFFLINE": "1", "STROP_CACHE": str(place / "cache"), "COLUMNS": "120"}
    (place / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    run_command([strop, "--help"], place, **here)
    run_command([python, "-c", TINY], place, **here)
    run_command([strop, "doctor"], place, **here)
    run_command([strop, "plan", "--model", place / "config.json"], place, **here)
    run_command([strop, "check", "--model", "model", "--data", "rows.jsonl", "--show", "1"], place, **here)
    small = ["--train.max_steps", "2", "--train.batch_size", "4", "--lora.r", "4"]
    run_command([strop, "train", "--model", "model", "--data", "rows.jsonl", "--out", "run", *small], place, **here)
    losses = [json.loads(line)["loss"] for line in (place / "run" / "events.jsonl").open() if '"event": "step"' in line]
    if len(losses) != 2 or not all(0 < loss < 20 for loss in losses):
        raise Failed(f"the losses of two steps: {losses}")
    names = ("torch", "transformers", "peft", "bitsandbytes", "numba")
    script = f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {names}), sep=', ')"
    return run_command([python, "-c", script], place).strip()


def run_case(case: str, wheel: Path) -> str:
    """Run a case and return a line that begins with "ok", "skipped" or "FAILED"."""
    place, started = PLACE / case, time.monotonic()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        if case == "constraints":
            outcome = f"ok       {resolve()}"
        else:
            python, strop = install(case, wheel, place)
            print(f"{case}: installed in {time.monotonic() - started:.0f} s", flush=True)
            outcome = f"ok       {use(python, strop, place)}"
    except LookupError as error:
        outcome = f"skipped  {error}"
    except Failed as error:
        outcome = f"FAILED   {error}"
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f"{case}: {outcome} ({time.monotonic() - started:.0f} s)", flush=True)
    return outcome


def main(cases: Sequence[str]) -> int:
    unknown = [case for case in cases if case not in CASES]
    if unknown:
        print(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}", file=sys.stderr)
        return 2
    wheel = build()
    print(f"built {', '.join(sorted(file.name for file in DIST.iterdir()))}", flush=True)
    outcomes = {case: run_case(case, wheel) for case in cases or CASES}
    print("\n".join(f"{case:<11} {outcome.splitlines()[0]}" for case, outcome in outcomes.items()))
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
