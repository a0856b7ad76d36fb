"""Fixtures: every test gets its own strop cache and no network; the tiny model on disk is created once."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.support.forks import Forks
    from tests.support.serving import Server

NO_PLOTS = (
    "distributed",
    "evaluation",
    "exporting",
    "models",
    "objectives",
    "sweeping",
    "training",
)  # folders of tests
GROWTH = 200  # imported modules after which they are kept from garbage collections

os.fsync = lambda fd: None  # the machine does not crash; tests of crashes record or count the calls
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.pop("PYTHONUNBUFFERED", None)  # users' pipes are buffered: what a command prints must be flushed
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch is imported: as many threads in total as cores
    own = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, own)))
# Other tests run beside these, so no example has a time limit.
slowness = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("shared-machine", deadline=None, suppress_health_check=slowness)
settings.load_profile("shared-machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out, unless their file is named or -m is given, and run the longest one first."""
    names_file = any(".py" in argument for argument in config.args)
    if not (names_file or config.option.markexpr):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    items.sort(key=lambda item: item.path.name != "test_real_models.py")
    for item in items:
        draws = item.path.parent.name not in NO_PLOTS or item.path.name == "test_report.py"
        if not draws and isinstance(item, pytest.Function):
            item.fixturenames.append("no_plots")


_frozen = 0


def pytest_runtest_setup() -> None:
    """Keep garbage collections, one of which each training makes, from visiting the imported objects and the tests."""
    global _frozen
    if len(sys.modules) >= _frozen + GROWTH:
        _frozen = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plots of reports, a fifth of the time of a small training. Tests of reports have them."""
    from unittest.mock import MagicMock

    from markupsafe import Markup

    monkeypatch.setattr("strop.display.plots._make_figure", lambda *size_and_title: (None, MagicMock()))
    monkeypatch.setattr("strop.display.plots._to_svg", lambda _, label: Markup("<svg>{}</svg>").format(label))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a strop cache that has the fastest dtype of this CPU, which each run would measure beside other tests."""
    from strop.machine.probe import probe
    from strop.machine.rates import save_precision

    folder = tmp_path_factory.getbasetemp() / "cache"
    with pytest.MonkeyPatch.context() as context:
        context.setenv("STROP_CACHE", str(folder))
        machine = probe()
        for threads in range(1, machine.cores + 1):
            save_precision(machine, threads, machine.expected_dtype, "estimated from the CPU's instructions")
    return folder


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_CACHE", str(cache))


@pytest.fixture
def few_questions(monkeypatch: pytest.MonkeyPatch) -> int:
    """Make the general set have some questions of each kind, and return how many."""
    from strop.evaluation import general

    questions = general.load_questions()[::16]
    monkeypatch.setattr(general, "load_questions", lambda: questions)
    return len(questions)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random Llama with a ChatML tokenizer."""
    from tests.support.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def seeing_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random model that reads images."""
    from tests.support.seeing import save_seeing

    return save_seeing(tmp_path_factory.mktemp("seeing-model"))


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    from tests.support.tiny import write_rows

    return write_rows(tmp_path / "rows.jsonl", 24)


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> list[Path]:
    """Return two adapters of the tiny model: calm, and bold, which has a system prompt."""
    from tests.support.serving import save_adapters

    return save_adapters(tmp_path_factory.mktemp("adapters"), tiny_folder)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Run a process that has imported strop and its libraries, whose forks start at once."""
    from tests.support.forks import Forks

    forks = Forks()
    yield forks
    forks.stop()


@pytest.fixture(scope="session")
def server(adapter_folders: list[Path]) -> Iterator[Server]:
    """Run `strop serve` on both adapters for all its tests; it is stopped by Ctrl-C."""
    from tests.support.serving import serving

    with serving(*adapter_folders, "--slots", "4", "--queue", "4", "--max-body", "1") as started:
        yield started
        assert started.stop() == 130
