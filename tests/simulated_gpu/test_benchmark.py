"""benchmarks/card.py, for a real GPU: all its items run on the simulated one."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import ROOT
from tests.simulated_gpu.conftest import Simulate
from tests.support.scripts import script

CHECKS = [["check", "agree"], ["check", "waits"], ["check", "resumes"], ["rates"]]
TOOLS = [["tool", "strop", scheme, "64"] for scheme in ("none", "nf4", "int8")]
TOOLS += [["tool", "strop, packed", scheme, "64"] for scheme in ("nf4", "int8")]
ANSWERS = ["answers", "none", "3"]
# A process that does what its last argument says. Its child keeps the pipes open.
PROCESS = """
import json, subprocess, sys, time
word = sys.argv[-1]
if word == "sleeps":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(60)
print("on its way")
if word == "fails":
    raise ValueError("a planted failure")
print(json.dumps({"said": word}) if word == "works" else "no figures")
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script(ROOT / "benchmarks" / "card.py")


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [True, False])
def test_every_item_runs_on_a_gpu(simulate: Simulate, kernels: bool) -> None:
    if kernels and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    items = [*CHECKS, *TOOLS] if kernels else [CHECKS[1], TOOLS[0], ANSWERS]
    (results,) = simulate({"scenario": "benchmark", "kernels": kernels, "items": items})
    of: dict[tuple[str, ...], dict[str, Any]] = {
        tuple(item): one for item, one in zip(items, results, strict=True)  # type: ignore[dict-item]
    }  # fmt: skip
    assert of["check", "waits"] == {"passed": True, "waits": {}}
    for item in items:
        if item[0] == "tool":
            result = of[tuple(item)]
            assert result["tokens_per_s"] > 0 and result["planned_bytes"] > 0 and result["flops_per_s"] > 0
            assert result["step"] == "fast" and result["peak_bytes"] == 1 << 30
            assert result["resident"] == (2 if item[1:3] in (["strop", "nf4"], ["strop", "int8"]) else 0)
    if not kernels:
        assert of[tuple(ANSWERS)]["tokens"] > 0  # a simulated token has no value, and may end an answer
    if kernels:
        assert of["check", "agree"]["off"].keys() == {
            f"{scheme}, by {way}" for scheme in ("none", "nf4", "int8") for way in ("strop", "PyTorch")
        }
        assert of["check", "resumes"]["adapters"].keys() == {"whole", "first", "second"}
        assert of["rates",]["card"] == "Fake" and of["rates",]["matmul_flops"] > 0


def test_agreement_check_passes_on_a_cpu(benchmark: ModuleType, tmp_path: Path) -> None:
    options = Namespace(folder=tmp_path / "tiny", device="cpu")
    results = benchmark.run(options, "check", "agree")
    assert results["passed"] and len(results["off"]) == 3


def test_failed_hanging_and_silent_processes_are_listed(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = tmp_path / "process.py"
    process.write_text(PROCESS, encoding="utf-8")
    monkeypatch.setattr(benchmark, "__file__", str(process))
    assert benchmark.child(["works"], 60) == {"said": "works"}
    failed = benchmark.child(["fails"], 60)
    assert failed["failed"] == "ValueError: a planted failure" and failed["exit"] == 1
    assert benchmark.child(["babbles"], 60)["failed"] == "no figures"
    assert "longer than" in benchmark.child(["sleeps"], 1)["failed"]
    assert benchmark.child(["works"], 0) == {"failed": "there was no time left for it"}


def test_failure_does_not_stop_the_others(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The failure is listed; all other results are in the table and in the file."""
    commands: list[list[str]] = []

    def child(words: list[str], seconds: float) -> dict[str, Any]:
        assert words[0].startswith(str(tmp_path)) and 0 < seconds <= benchmark.MOST_S
        commands.append(words[4:])
        if words[4:] in (["check", "waits"], ["tool", "strop", "nf4", "4096"]):
            return {"failed": "ValueError: planted"}
        if words[4] in ("check", "rates"):
            return {"passed": True} if words[4] == "check" else {"matmul_flops": 2e12, "bytes_per_s": 1e9}
        if words[4] in benchmark.USES:
            return {"answer_tokens_per_s": 50.0, "peak_bytes": 4_000_000_000}
        rates = {"tokens_per_s": 1234.0, "flops_per_s": 1e12}
        return {**rates, "peak_bytes": 3_000_000_000, "planned_bytes": 2_500_000_000}

    monkeypatch.setattr(benchmark, "child", child)
    monkeypatch.setattr(benchmark, "CHECKED", ("agree", "waits"))
    monkeypatch.setattr(sys, "argv", ["card.py", "folder"])
    monkeypatch.setenv("STROP_CACHE", "mine")
    out = tmp_path / "found.json"
    benchmark.main([str(tmp_path), "--shapes", "8b", "--schemes", "none,nf4", "--out", str(out)])
    others = [tool for tool in benchmark.NEEDS if all(map(find_spec, benchmark.NEEDS[tool]))]
    tools_of_length = [("none", "strop"), ("nf4", "strop"), ("nf4", "strop, packed")]
    tools = [(tool, scheme, length) for length in ("4096", "1024", "16384") for scheme, tool in tools_of_length]
    assert [words for words in commands if words[0] in ("check", "rates")] == [
        ["check", "agree"], ["check", "waits"], ["rates"],
    ]  # fmt: skip
    ways = (("answers", "1"), ("answers", "64"), ("grpo", "8"))
    uses = [[use, scheme, number] for use, number in ways for scheme in ("none", "nf4")]
    at = commands.index(uses[0])
    assert commands[at : at + len(uses)] == uses and commands[at + len(uses)][-1] == "1024"
    assert [tuple(words[1:]) for words in commands if words[0] == "tool" and words[1] not in others] == tools
    output = capsys.readouterr().out
    assert "agree: right" in output and "waits: WRONG" in output
    assert (
        "failed: waits: ValueError: planted" in output and "failed: 8b, strop, nf4, 4096: ValueError: planted" in output
    )
    assert "| 8b | none | 4,096 | strop | 1,234 | 50% | 3.0 GB | 2.5 GB |" in output
    saved = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert len(saved) == len(commands) and sum("failed" in one for one in saved) == 2
    assert "| 8b | nf4 | 64 | answers | 50 tokens/s | 4.0 GB |" in out.with_suffix(".md").read_text(encoding="utf-8")
    commands.clear()
    benchmark.main([str(tmp_path), "--shapes", "8b", "--schemes", "none,nf4", "--out", str(out)])
    assert commands == [["check", "waits"], ["tool", "strop", "nf4", "4096"]]  # what had failed


def test_trl_trains_with_its_trainer(benchmark: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    options = Namespace(folder=tmp_path / "tiny", device="cpu")
    results = benchmark.run(options, "tool", "trl", "none", "32")
    assert results["tokens_per_s"] > 0 and results["peak_bytes"] > 0
