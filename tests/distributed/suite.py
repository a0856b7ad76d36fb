"""Runs on several ranks, compared with the same runs on one; and injected faults."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file

from strop.cli import app
from strop.data.types import Example
from strop.distributed.devices import Devices
from strop.runs.events import read_events
from strop.training import build, loop
from strop.training import gradients as parts
from strop.training import state as checkpoints
from strop.training.criteria import make_criterion
from tests import ROOT
from tests.distributed.crew import Crew, Prepare, command, crew, inside
from tests.faults.harness import Ended
from tests.support import texts, tiny, tiny_families, triplets
from tests.support.seeing import save_seeing, seeing_rows

NEAR = 1e-6
STEPS = 12


class Lab:
    """A tiny model with rows, and runs on them through the command line."""

    def __init__(self, folder: Path, rows: int = 29) -> None:
        os.environ.setdefault("STROP_CACHE", str(folder / "cache"))
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.model = tiny.save_tiny(folder / "model")
        self.rows = tiny.write_rows(folder / "rows.jsonl", rows)
        self._next = 0

    def words(self, out: Path, *more: str) -> list[str]:
        data = [] if "--data" in more else ["--data", str(self.rows)]
        start = ["train", "--model", str(self.model), *data, "--out", str(out)]
        how = ["--model.dtype", "fp32", "--lora.r", "4", "--lora.dropout", "0.1", "--train.learning_rate", "5e-4"]
        steps = ["--train.max_steps", str(STEPS), "--train.batch_size", "7", "--train.micro_batch", "2"]
        return [*start, *how, *steps, *more]

    def out(self) -> Path:
        self._next += 1
        return self.folder / "runs" / f"r{self._next}"

    def start(self, world: int, words: Sequence[str], prepare: dict[int, Prepare] | None = None) -> Crew:
        return crew(command(words), world, self.folder / "output", prepare)

    def train(self, world: int, *more: str, prepare: dict[int, Prepare] | None = None) -> tuple[Path, list[Ended]]:
        out = self.out()
        return out, self.start(world, self.words(out, *more), prepare).end()

    def good(self, world: int, *more: str, prepare: dict[int, Prepare] | None = None) -> Path:
        out, ended = self.train(world, *more, prepare=prepare)
        assert codes(ended) == [0] * world, outputs(ended)
        return out

    def resume(self, world: int, out: Path, *more: str) -> None:
        ended = self.start(world, ["resume", str(out), *more]).end()
        assert codes(ended) == [0] * world, outputs(ended)


def codes(ended: Sequence[Ended]) -> list[int]:
    return [one.code for one in ended]


def outputs(ended: Sequence[Ended]) -> str:
    return "\n".join(f"rank {rank}, exit {one.code}: {one.output[-1500:]}" for rank, one in enumerate(ended))


def losses(out: Path) -> list[float]:
    result = {event["step"]: event["loss"] for event in events(out, "step")}
    return [result[step] for step in sorted(result)]


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(out / "events.jsonl") if event["event"] == kind]


def apart(one: Path, other: Path) -> float:
    """Return the largest difference of adapter weights, or of losses of the same step."""
    a, b = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (one, other))
    assert a.keys() == b.keys() and len(losses(one)) == len(losses(other))
    weights = max(float((a[name] - b[name]).abs().max()) for name in a)
    return max(weights, *(abs(x - y) for x, y in zip(losses(one), losses(other), strict=True)))


def at_step(step: int, act: Callable[[Any], None]) -> Prepare:
    """Return a preparation that calls `act` on the job after this step, before evaluation and save."""

    def prepare() -> None:
        take = loop._step_and_log

        def taken(job: Any, batch: Any, stream: Any) -> None:
            take(job, batch, stream)
            if batch.index + 1 == step:
                act(job)

        mock.patch.object(loop, "_step_and_log", taken).start()

    return prepare


def in_step(step: int, act: Callable[[Any], Any]) -> Prepare:
    """Return a preparation that replaces this rank's gradients of a step by `act` of them."""

    def prepare() -> None:
        gradients, count = loop.compute_gradients, iter(range(1, 10_000))

        def computed(job: Any, items: Any) -> Any:
            part = gradients(job, items)
            return act(part) if next(count) == step else part

        mock.patch.object(loop, "compute_gradients", computed).start()

    return prepare


# --- equal results


def equals_one_device(lab: Lab, worlds: Sequence[int] = (2, 3, 4)) -> None:
    """30 steps with dropout and evaluations are within 1e-6 (fp32 resolves a loss of 6 to 5e-7), and equal to the bit
    with train.exact."""
    held_out = ["--data.eval", "20%", "--train.eval_steps", "10", "--train.max_steps", "30"]
    one, exact = lab.good(1, *held_out), lab.good(1, "--train.exact", "true", *held_out)
    assert apart(one, exact) < NEAR
    for world in worlds:
        several, bits = lab.good(world, *held_out), lab.good(world, "--train.exact", "true", *held_out)
        assert apart(one, several) < NEAR, (world, apart(one, several))
        assert apart(exact, bits) == 0.0, (world, apart(exact, bits))
        result = [[event["loss"] for event in events(out, "eval")] for out in (exact, bits)]
        assert result[0] == result[1] and len(result[0]) == 3
        report = json.loads((bits / "report.json").read_text())
        assert report["devices"]["count"] == world and 0 < report["devices"]["balance"] <= 1
        assert report["tokens"] == json.loads((exact / "report.json").read_text())["tokens"]


def samples(lab: Lab) -> None:
    """Rank 0 logs samples without changing the run. A run with a sharded base logs none."""
    held_out = ["--data.eval", "20%", "--train.eval_steps", "10", "--train.max_steps", "20"]
    without = lab.good(2, *held_out, "--train.samples", "0")
    replicated, sharded = lab.good(2, *held_out), lab.good(2, *held_out, "--model.placement", "sharded")
    assert apart(without, replicated) == apart(without, sharded) == 0.0
    assert [event["step"] for event in events(replicated, "samples")] == [10, 20]
    assert not events(sharded, "samples")
    assert not [event for event in events(replicated, "note") if "sample completions" in event["text"]]


def unusual_batches(lab: Lab) -> None:
    """Test supervised tokens on a single rank, a last batch of one row, and more ranks than rows."""
    plain = tiny.examples(9, seed=1)
    bare = [replace(row, weights=np.zeros_like(row.weights)) for row in plain[1:]]
    cases: dict[str, tuple[list[Example], dict[str, Any]]] = {
        "supervised on one rank": ([plain[0], *bare[:3]], {"train.batch_size": 4}),
        "a last batch of one row": (plain, {"train.batch_size": 4}),
        "more ranks than rows": (plain[:2], {"train.batch_size": 2, "train.micro_batch": 2}),
    }
    for name, (rows, options) in cases.items():
        for exact in (False, True):
            result = {}
            for world in (1, 2, 4):
                out = lab.out()
                more = {"train.micro_batch": 2, "train.epochs": 2, **options, "train.exact": exact}
                ended = crew(
                    inside(lambda devices, a=(out, rows, more): _fit(devices, *a)), world, lab.folder / "s"
                ).end()
                assert codes(ended) == [0] * world, (name, outputs(ended))
                result[world] = load_file(out / "weights.safetensors")
            for world in (2, 4):
                off = max(float((result[1][key] - result[world][key]).abs().max()) for key in result[1])
                assert off == 0.0 if exact else off < NEAR, (name, exact, world, off)


def _fit(devices: Devices, out: Path, rows: list[Example], options: dict[str, Any]) -> None:
    job = tiny.job(out, rows, **options)
    job = replace(job, devices=devices, criterion=make_criterion(job.recipe.train, job.model, devices))
    loop.fit(job)
    if devices.is_main:
        last = job.folder.checkpoints()[-1][1] / "weights.safetensors"
        (out / "weights.safetensors").write_bytes(last.read_bytes())


def resume_on_other_counts(lab: Lab) -> None:
    """A run saved after SIGTERM to one of 4 ranks and resumed on 1, 2 and 3 equals the uninterrupted run."""
    for exact, worlds in (("false", (3,)), ("true", (1, 2))):
        whole = lab.good(1, "--train.exact", exact)
        for world in worlds:
            terminate = at_step(5, lambda job: os.kill(os.getpid(), signal.SIGTERM))
            out, ended = lab.train(4, "--train.exact", exact, prepare={2: terminate})
            assert codes(ended) == [130] * 4, outputs(ended)
            assert [event["step"] for event in events(out, "save")] == [0, 5]
            lab.resume(world, out)
            off = apart(whole, out)
            assert off == 0.0 if exact == "true" else off < NEAR, (exact, world, off)
            (facts,) = events(out, "resume")
            assert facts["devices_before"] == 4 and facts["devices"] == world


def write_pairs(file: Path) -> list[dict[str, str]]:
    rows = [
        {"prompt": f"what is {n}", "chosen": f"it is {n * n}", "rejected": f"no{'!' * (n % 4)} {n}"} for n in range(13)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def preference_objectives(lab: Lab) -> None:
    """Pairs and labelled answers are never split over ranks."""
    pairs, judged = lab.folder / "pairs.jsonl", lab.folder / "judged.jsonl"
    written = write_pairs(pairs)
    lines = [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 3 else "rejected"], "label": bool(n % 3)}
        for n, row in enumerate(written)
    ]
    judged.write_text("".join(json.dumps(row) + "\n" for row in lines))
    for objective, rows in (("dpo", pairs), ("kto", judged)):
        for exact in ("false", "true"):
            more = ["--data", str(rows), "--train.objective", objective, "--train.exact", exact, "--data.eval", "20%"]
            one, several = lab.good(1, *more), lab.good(3, *more)
            off = apart(one, several)
            assert off == 0.0 if exact == "true" else off < NEAR, (objective, exact, off)
            shown = [[event["accuracy"] for event in events(out, "step")] for out in (one, several)]
            assert shown[0] == shown[1]


def classification(lab: Lab) -> None:
    """Texts are never split over ranks, and the loss with class weights does not depend on their number."""
    rows = texts.write(lab.folder / "classes.jsonl", texts.rows(13))
    for exact in ("false", "true"):
        more = ["--data", str(rows), "--train.objective", "classify", "--train.exact", exact, "--data.eval", "20%"]
        one, several = (lab.good(world, *more, "--train.class_weights", "music=3") for world in (1, 3))
        off = apart(one, several)
        assert off == 0.0 if exact == "true" else off < NEAR, (exact, off)
        for kind in ("step", "eval"):
            shown = [[event["accuracy"] for event in events(out, kind)] for out in (one, several)]
            assert shown[0] == shown[1] and shown[0]


def images(lab: Lab) -> None:
    """Batches in which some ranks have images, and others only text, with a trained image encoder."""
    rows = seeing_rows(lab.folder / "seen", 13)
    for family, exact in (("idefics3", "false"), ("idefics3", "true"), ("qwen3_vl", "true")):
        model = save_seeing(lab.folder / family, family)
        more = ["--model", str(model), "--data", str(rows), "--lora.vision", "all", "--train.exact", exact]
        off = apart(*(lab.good(world, *more) for world in (1, 3)))
        assert off == 0.0 if exact == "true" else off < NEAR, (family, exact, off)


def embedding(lab: Lab) -> None:
    """Rows of texts that match are never split over ranks."""
    rows = texts.write(lab.folder / "triplets.jsonl", triplets.rows(30, negatives=True))
    more = ["--data", str(rows), "--train.objective", "embed", "--train.exact", "true", "--data.eval", "20%"]
    one, two = lab.good(1, *more), lab.good(2, *more)
    assert apart(one, two) == 0.0, apart(one, two)


def evaluation(lab: Lab, general: bool = True) -> None:
    """`strop eval` gives the same answers and scores on 1 and 3 ranks: of rows, the general set, regression data, and
    pairs (by log-probabilities and by a reward model)."""
    out, pairs, other = lab.good(1), lab.folder / "pairs.jsonl", lab.folder / "other.jsonl"
    write_pairs(pairs)
    tiny.write_rows(other, 7)
    judge = lab.good(1, "--data", str(pairs), "--train.objective", "reward")
    commands = [
        [str(out), "--data", str(lab.rows), "--metric", "contains", "--max-new-tokens", "6"],
        [str(out), "--data", str(lab.rows), "--metric", "choice", "--max-new-tokens", "6"],
        [
            str(out),
            "--data",
            str(other),
            "--regression-data",
            str(lab.rows),
            *(["--general"] if general else []),
            "--max-new-tokens",
            "6",
        ],
        [str(out), "--data", str(pairs)],
        [str(judge), "--data", str(pairs)],
    ]
    for words in commands:
        result = []
        for world in (1, 3):
            ended = lab.start(world, ["eval", *words, "--json"]).end()
            assert codes(ended) == [0] * world, outputs(ended)
            lines = [line for one in ended for line in one.output.splitlines() if line.startswith("{")]
            assert len(lines) == 1
            result.append(without_speed(json.loads(lines[0])))
            # a note on the evaluation before this one
            result[-1]["notes"] = [note for note in result[-1]["notes"] if "replace the earlier" not in note]
        assert result[0] == result[1], words
        assert "--general" not in words or result[0]["general"]["rows"] == 340


def without_speed(result: Any) -> Any:
    if isinstance(result, dict):
        return {name: without_speed(value) for name, value in result.items() if name != "tokens_per_s"}
    return [without_speed(value) for value in result] if isinstance(result, list) else result


# --- injected faults


def nan_on_one_rank(lab: Lab) -> None:
    """If one rank has NaN, all ranks skip the step, and the event names the rank and its rows."""

    def poison(part: Any) -> Any:
        return replace(part, loss=part.loss * math.nan, buffers=[buffer * math.nan for buffer in part.buffers])

    out = lab.good(3, prepare={1: in_step(4, poison)})
    (skip,) = events(out, "skip")
    assert skip["step"] == 4 and skip["ranks"] == [1] and 1 <= len(skip["rows"]) < 7
    assert len(events(out, "step")) == STEPS - 1


def out_of_memory_on_one_rank(lab: Lab) -> None:
    """If one rank runs out of memory, all continue with smaller micro-batches and the same numbers."""

    def prepare() -> None:
        compute, count = parts.compute_gradients, iter(range(1, 10_000))

        def starved(job: Any, items: Any) -> Any:
            if next(count) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory (planted)")
            return compute(job, items)

        mock.patch.object(loop, "compute_gradients", starved).start()

    one, out = lab.good(1), lab.good(3, prepare={2: prepare})
    (shrunk,) = events(out, "shrink")
    assert "rank 2 of 3" in shrunk["why"] and apart(one, out) < NEAR


def failing_ranks(lab: Lab) -> None:
    """After an exception in or between steps, or a full disk, all ranks end soon and one reports the reason."""

    def planted(what: Any) -> Any:
        raise ValueError("planted")

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    def fill() -> None:
        mock.patch.object(checkpoints, "save_file", full).start()

    for rank, prepare, words in (
        (1, in_step(3, planted), "ValueError: planted"),
        (2, at_step(3, planted), "ValueError: planted"),
        (0, at_step(3, planted), "ValueError: planted"),
        (0, fill, "No space left"),
    ):
        _, ended = lab.train(3, prepare={rank: prepare})
        assert codes(ended) == [1, 1, 1], outputs(ended)
        assert words in ended[rank].output, outputs(ended)
        assert ("Traceback" in ended[rank].output) == ("planted" in words)
        if rank:
            assert f"rank {rank} of 3" in ended[rank].output
        others = [one.output for place, one in enumerate(ended) if place != rank]
        assert not any("error" in one or "Traceback" in one for one in others), outputs(ended)
    _, ended = lab.train(2, "--lora.target_modules", "nothing")
    assert codes(ended) == [2, 2] and sum("error" in one.output for one in ended) == 1, outputs(ended)


def add_arguments(*more: str) -> Prepare:
    """Return a preparation that adds arguments to one rank's command line."""
    main = app.main

    def with_more() -> None:
        sys.argv += more
        main()

    return lambda: mock.patch.object(app, "main", with_more).start() and None


def different_settings(lab: Lab) -> None:
    """Ranks with different options or evaluation rows are refused."""

    def refused(words: Sequence[str], more: Sequence[str], shown: str) -> None:
        ended = lab.start(3, words, {1: add_arguments(*more)}).end()
        assert codes(ended) == [2] * 3 and outputs(ended).count("error:") == 1, outputs(ended)
        assert shown in ended[0].output, outputs(ended)

    train = lab.words(lab.out())
    refused(train, ["--train.epochs", "2"], "train.epochs of rank 1 is 2.0, of rank 0 3.0")
    refused(train, ["--out", "elsewhere"], "out of rank 1 is elsewhere, of rank 0")
    refused([*train[:-2], "--train.save_steps", "3"], train[-2:], "train.micro_batch of rank 1 is 2, of rank 0 None")
    without = [word for word in train if word not in ("--out", train[train.index("--out") + 1])]
    refused(without, ["--out", "elsewhere"], "out of rank 1 is elsewhere, of rank 0 None")
    out = lab.good(1)
    refused(["resume", str(out)], ["--lora.dropout", "0.2"], "lora.dropout of rank 1 is")
    fewer = tiny.write_rows(lab.folder / "fewer.jsonl", 5)
    command = ["eval", str(out), "--max-new-tokens", "4", "--data", str(lab.rows)]
    refused(command, ["--data", str(fewer)], "the content of the rows of rank 1 is")
    refused(command, ["--max-new-tokens", "5"], "max_new_tokens of rank 1 is 5, of rank 0 4")


def flipped_bit(lab: Lab) -> None:
    """Flip the lowest bit of a weight on one rank: the next comparison names it."""

    def flip(job: Any) -> None:
        name = sorted(job.state.weights)[0]
        job.state.weights[name].data.view(torch.int32).view(-1)[3] ^= 1

    for world, words in ((2, "differs between rank 0 and rank 1"), (3, "of rank 1 is not that of the others")):
        out, ended = lab.train(world, "--train.save_steps", "6", prepare={1: at_step(3, flip)})
        assert codes(ended) == [1] * world and words in ended[0].output, outputs(ended)
        assert [event["step"] for event in events(out, "save")] == [0]  # a doubtful state is not saved


def killed_rank(lab: Lab) -> None:
    """After SIGKILL of one rank, the others end soon, and the resumed run is bit-identical to the uninterrupted one."""
    whole = lab.good(1, "--train.exact", "true")
    for rank in (0, 1):
        die = at_step(7, lambda job: os.kill(os.getpid(), signal.SIGKILL))
        more = ["--train.exact", "true", "--train.save_steps", "3"]
        out, ended = lab.train(2, *more, prepare={rank: die})
        assert ended[rank].code == -signal.SIGKILL and ended[1 - rank].code == 1, outputs(ended)
        assert f"rank {rank} has ended" in ended[1 - rank].output or rank == 0, outputs(ended)
        lab.resume(3 - rank, out)
        assert apart(whole, out) == 0.0


def hanging_rank(lab: Lab) -> None:
    """A rank that does not answer is named after train.timeout."""
    asleep = at_step(3, lambda job: time.sleep(12))
    out = lab.out()
    running = lab.start(3, lab.words(out, "--train.timeout", "3s"), {1: asleep})
    ended = running.end(within=25)
    assert codes(ended)[::2] == [1, 1], outputs(ended)
    assert "rank 1 has not answered for" in ended[0].output, outputs(ended)


def restarted_by_torchrun(lab: Lab) -> None:
    """After SIGKILL, torchrun restarts all ranks, which resume from the last checkpoint bit-identically."""
    more, out = ["--train.exact", "true", "--train.save_steps", "2"], lab.out()
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    words = [*agent, "-m", "tests.distributed.dies_once", *lab.words(out, *more)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (facts,) = events(out, "resume")
    assert facts["step"] == 4
    assert apart(lab.good(1, "--train.exact", "true"), out) == 0.0


def nan_weight_at_save(lab: Lab) -> None:
    """A non-finite weight on one rank at a save ends the run with an error that names the rank."""

    def poison(job: Any) -> None:
        job.state.weights[sorted(job.state.weights)[0]].data.view(-1)[3] = math.nan

    out = lab.out()
    running = lab.start(3, lab.words(out, "--train.save_steps", "3"), {1: at_step(3, poison)})
    ended = running.end(within=200)
    assert codes(ended) == [1] * 3 and "of rank 1 is not that of the others" in ended[0].output, outputs(ended)
    assert [event["step"] for event in events(out, "save")] == [0]


def judge_runs_on_one_rank(lab: Lab) -> None:
    """Only one rank calls a judge, which may cost money."""
    calls_file, out = lab.folder / "asked.txt", lab.good(1, "--train.learning_rate", "0.05")
    judge = lab.folder / "judge.py"
    count = f"open({str(calls_file)!r}, 'a').write('.')"
    judge.write_text(f"def own(asked, gold, first, second):\n    {count}\n    return len(first) - len(second)\n")
    result = []
    for world in (1, 3):
        calls_file.write_text("")
        words = ["eval", str(out), "--data", str(lab.rows), "--metric", "contains", "--max-new-tokens", "4", "--json"]
        ended = lab.start(world, [*words, "--judge", f"{judge}:own"]).end()
        assert codes(ended) == [0] * world, outputs(ended)
        facts = next(json.loads(line) for one in ended for line in one.output.splitlines() if line.startswith("{"))
        result.append((len(calls_file.read_text()), facts["judge"]))
    assert result[0] == result[1] and result[0][0] > 0


def idle_experts(lab: Lab) -> None:
    """Weight decay of experts without tokens in a step is the same on any number of devices."""
    lab.model = lab.folder / "longcat"
    tiny_families.save("longcat_flash", lab.model)
    more = ["--train.max_steps", "4", "--train.batch_size", "3", "--train.micro_batch", "1", "--lora.dropout", "0"]
    more += ["--train.weight_decay", "0.1", "--train.learning_rate", "2e-3"]
    off = apart(lab.good(1, *more), lab.good(3, *more))
    assert off < NEAR, off


def out_of_memory_inside_nested_blocks(lab: Lab) -> None:
    """If one rank runs out of memory while the others are in a nested block (KTO's divergence), all retry together.

    If no retry helps, one rank reports it, and there is one JSON object.
    """
    judged = lab.folder / "judged.jsonl"
    lines = [{"prompt": f"what is {n}", "completion": f"it is {n * n}", "label": bool(n % 3)} for n in range(13)]
    judged.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def starve(owner: Any, name: str, when: int) -> Prepare:
        def prepare() -> None:
            make, count = getattr(owner, name), iter(range(1, 10_000))

            def starved(*args: Any, **more: Any) -> Any:
                if next(count) >= when:
                    mock.patch.object(owner, name, make).start()
                    raise torch.OutOfMemoryError("CUDA out of memory (planted)")
                return make(*args, **more)

            mock.patch.object(owner, name, starved).start()

        return prepare

    more = ["--data", str(judged), "--train.objective", "kto"]
    one, out = lab.good(1, *more), lab.good(3, *more, prepare={1: starve(loop, "allocate_state", 3)})
    assert len(events(out, "shrink")) == 1 and apart(one, out) < NEAR
    _, ended = lab.train(3, "--model.placement", "sharded", "--json", prepare={1: starve(build, "load_sharded", 1)})
    assert codes(ended) == [1] * 3
    lines = [line for one in ended for line in one.output.splitlines()]
    assert sum("error:" in line for line in lines) == 1, outputs(ended)
    assert sum(line.startswith("{") for line in lines) == 1, outputs(ended)
