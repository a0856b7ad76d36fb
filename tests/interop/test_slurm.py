"""The batch script in a real Slurm: two nodes, a signal before the time limit, and the restart after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.jobs import ASKED, FIRST, WHY_NOT, adapter, events, strop, until, write_recipe
from tests.support.slurm import Slurm, cluster, why_not

pytestmark = pytest.mark.skipif(not ASKED or bool(why_not()), reason=why_not() if ASKED else WHY_NOT)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with cluster(tmp_path_factory.mktemp("slurm")) as up:
        yield up


def submitted(slurm: Slurm, folder: Path) -> str:
    """Submit a job of two nodes with the printed command and return its number."""
    output = strop(
        "launch", "slurm", FIRST, "--nodes", "2", "--cores", "1", "--time", "10", "--out", "runs/x y", cwd=folder
    )
    return slurm.run("bash", "-c", output["submit"], cwd=folder).split()[-1]


def test_two_nodes_match_one_process(slurm: Slurm, tmp_path: Path, tiny_folder: Path) -> None:
    write_recipe(tmp_path, tiny_folder, steps=30)
    slurm.wait(submitted(slurm, tmp_path), ["COMPLETED"])
    run = tmp_path / "runs" / "x y"
    (start,) = events(run, "start")
    assert (start["devices"]["count"], start["devices"]["nodes"]) == (2, 2)
    strop("train", FIRST, "--out", "alone", cwd=tmp_path)
    assert adapter(run) == adapter(tmp_path / "alone")


def test_signal_saves_and_the_next_start_resumes(slurm: Slurm, tmp_path: Path, tiny_folder: Path) -> None:
    write_recipe(tmp_path, tiny_folder, steps=150)
    number, run = submitted(slurm, tmp_path), tmp_path / "runs" / "x y"
    until(run, 5)
    slurm.run("scancel", "--signal=TERM", "--batch", number)  # as --signal=B:TERM does before the time limit
    slurm.wait(number, ["PENDING", "REQUEUED", "COMPLETING"])
    slurm.run("scontrol", "update", f"JobId={number}", "StartTime=now")
    result = slurm.wait(number, ["COMPLETED"])
    assert result["Restarts"] == "1"
    (again,) = events(run, "resume")
    assert 5 <= again["step"] < 150
    strop("train", FIRST, "--out", "alone", cwd=tmp_path)
    assert adapter(run) == adapter(tmp_path / "alone")


def test_failing_job_is_not_requeued(slurm: Slurm, tmp_path: Path, tiny_folder: Path) -> None:
    write_recipe(tmp_path, tiny_folder, steps=30)
    (tmp_path / "rows.jsonl").write_text("no row\n", encoding="utf-8")
    result = slurm.wait(submitted(slurm, tmp_path), ["FAILED"])
    assert (result["ExitCode"], result["Restarts"]) == ("2:0", "0")
