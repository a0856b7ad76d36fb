"""`make faults`: run every case in full, then write docs/reliability.md."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from strop.machine.probe import probe
from strop.runs.lock import versions
from tests.faults import suite
from tests.faults.suite import Lab, Tally
from tests.support.seeing import save_seeing, seeing_rows

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
ORDER = (
    "kills", "crash_points", "cold", "real", "images", "damage", "full_disk", "not_finite", "out_of_memory",
    "interrupts", "two_at_once",
)  # fmt: skip
PEER_OF = {  # strop's case -> TRL's
    "kills": "kills", "damage": "damage", "full_disk": "full_disk", "not_finite": "not_finite",
    "out_of_memory": "out_of_memory", "interrupts": "interrupts",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--cold", type=int, default=20)
    parser.add_argument("--real", type=int, default=10, help="kills of runs of the demo model")
    parser.add_argument("--peer", help="a Python that has trl")
    parser.add_argument("--cases", help="only these, with commas; the others stay as they were found last")
    options = parser.parse_args()
    result: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder, suite.one_thread():
        lab = Lab(Path(folder) / "lab")
        cases: dict[str, Callable[[], Tally]] = {
            "kills": lambda: suite.kills(lab, options.kills),
            "damage": lambda: suite.damage(lab),
            "full_disk": lambda: suite.full_disk(lab),
            "not_finite": lambda: suite.not_finite(lab),
            "out_of_memory": lambda: suite.out_of_memory(Lab(Path(folder) / "eval", eval_share=True), 30),
            "interrupts": lambda: suite.interrupts(lab, 40),
            "two_at_once": lambda: suite.two_at_once(lab, 10),
            "crash_points": lambda: suite.crash_points(lab, 4),
            "cold": lambda: suite.cold_kills(lambda out: lab.words(out, "fast"), Path(folder) / "cold", options.cold),
            "real": lambda: suite.cold_kills(_real_words, Path(folder) / "real", options.real),
            "images": lambda: suite.cold_kills(_image_words(Path(folder)), Path(folder) / "images", options.cold),
        }
        selected = options.cases.split(",") if options.cases else list(cases)
        for name in selected:
            started = time.monotonic()
            tally = cases[name]()
            result[name] = {**asdict(tally), "date": time.strftime("%Y-%m-%d"), "machine": probe().cpu}
            print(
                f"{name}: {tally.tried} times, {len(tally.wrong)} wrong, {time.monotonic() - started:.0f} s", flush=True
            )
            for wrong in tally.wrong[:3]:
                print("   ", wrong[:500], flush=True)
            _keep(result)
        if options.peer:
            result["peer"] = _peer(options.peer, lab.folder)
            _keep(result)
    raise SystemExit(any(result[name]["wrong"] for name in selected))


def _keep(result: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (ROOT / "docs" / "reliability.md").write_text(_page(result), encoding="utf-8")


def _real_words(out: Path) -> list[str]:
    rows = Path(suite.__file__).parents[2] / "src" / "strop" / "demo" / "train.jsonl"
    quick = ["--train.max_steps", "20", "--train.batch_size", "4", "--train.save_steps", "1"]
    return ["train", "--model", "demo", "--data", str(rows), "--out", str(out), *quick]


def _image_words(folder: Path) -> Callable[[Path], list[str]]:
    """Return the command of a run on images and texts that trains the image encoder too, with dropout."""
    model, rows = save_seeing(folder / "seeing"), seeing_rows(folder / "image_rows", 24)
    how = ["--lora.vision", "all", "--lora.r", "4", "--lora.dropout", "0.1", "--model.dtype", "fp32"]
    quick = ["--train.max_steps", "20", "--train.batch_size", "4", "--train.save_steps", "1"]
    return lambda out: ["train", "--model", str(model), "--data", str(rows), "--out", str(out), *how, *quick]


def _peer(python: str, lab: Path) -> dict[str, Any]:
    file = lab / "peer.json"
    subprocess.run(
        [python, "-m", "tests.faults.peer", str(lab), str(file)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _page(result: dict[str, Any]) -> str:
    peer = result.get("peer", {})
    ours = versions()
    dates, cpus = (dict.fromkeys(x[name] for x in result.values() if name in x) for name in ("date", "machine"))
    where = f"{' and '.join(dates)}, {' and '.join(cpus)}, {platform.system()}"
    what = f"strop {ours['strop']}, torch {ours['torch']}"
    if peer:
        known = peer["versions"]
        what += f"; peer: a plain SFTTrainer script, trl {known['trl']}, transformers {known['transformers']}"
    lines = [
        "# Reliability",
        "",
        "`make faults` writes this page. It injects faults into runs, continues with the command that a user would",
        "run next, and compares the adapter with that of an uninterrupted run, bit by bit. Unless noted, a run has",
        "20 steps with a checkpoint after each, of a tiny model in forked processes. Every second kill hits a run",
        "with dropout.",
        "",
        f"{where}; {what}.",
        "",
        "| fault | times | strop: ended as expected | plain SFTTrainer |",
        "|---|---|---|---|",
    ]
    tallies = {name: result[name] for name in ORDER if name in result}
    for name, tally in tallies.items():
        what = tally["what"] + {"real": " (SmolLM2-135M)", "images": " (images; encoder trained)"}.get(name, "")
        theirs = _theirs(peer.get(PEER_OF.get(name, ""), []))
        lines.append(f"| {what} | {tally['tried']} | {_ours(tally)} | {theirs} |")
    wrong = [f"- {tally['what']}: {text}" for tally in tallies.values() for text in tally["wrong"]]
    return "\n".join([*lines, "", _MEANING, *(["## What went wrong", "", *wrong] if wrong else [])]).rstrip() + "\n"


def _ours(tally: dict[str, Any]) -> str:
    more = "".join(f"; {name}: {value:.3g}" for name, value in tally["figures"].items())
    return ("all" if not tally["wrong"] else f"all but {len(tally['wrong'])}") + more


def _theirs(result: list[str]) -> str:
    """Return the outcomes with their counts ("identical 16, lost 4"), without error texts."""
    kinds = Counter(text.split(": ")[0] if text.startswith("lost") else _short(text) for text in result)
    return ", ".join(f"{kind} {number}" for kind, number in kinds.most_common()) or "not tried"


def _short(text: str) -> str:
    head, _, rest = text.partition(", then ")
    return f"{head}, then {rest.split(': ')[0]}" if rest else text


_MEANING = """What "as expected" means:

- **kill -9**: `strop resume` (or `strop train` where the run had not begun) ends with the same adapter, bit for bit,
  and leaves no half-written file. Calls that change the disk are hit one by one: before each fsync, rename, removal.
- **damage**: resume names the damaged checkpoint with the reason, falls back to the one before, ends with the same
  adapter. "Another adapter" in the peer's column: it trained on from a damaged or missing optimizer or random state.
- **disk full** (RLIMIT_FSIZE): exit 1, the checkpoints from before verify, no temp file is left, and a resume ends with
  the same adapter.
- **NaN**: once: the step is skipped and recorded. Three steps in a row, or a weight: back to the last good checkpoint.
  For good: exit 1. No checkpoint and no adapter ever holds NaN.
- **out of memory**: the step is done again in smaller micro-batches; all steps are done, and the adapter differs by no
  more than the order of its sums.
- **SIGINT, SIGTERM**: exit 130 (or 0 where the run was over); a resume ends with the same adapter.
- **two at once**: one trains, the other exits with 2.
"""

if __name__ == "__main__":
    main()
